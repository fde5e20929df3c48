"""Text to token ids and back, with the tokenizer that lies beside a model."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from paceline.runtime.errors import ModelError


class Tokenizer:
    """A fast tokenizer. `tokenizer.json` is read directly: importing transformers would cost a
    start-up second."""

    def __init__(self, folder: Path) -> None:
        self._fast = _load(folder)

    def encode(self, text: str) -> list[int]:
        """With the special tokens the model expects at the start of a prompt."""
        return list(self._fast.encode(text).ids)

    def decode(self, token_ids: list[int]) -> str:
        return str(self._fast.decode(token_ids, skip_special_tokens=True))

    def stream(self) -> TextStream:
        return TextStream(self._fast)

    def vocabulary(self) -> dict[str, int]:
        return dict(self._fast.get_vocab())


class TextStream:
    """Text of tokens as they arrive, never half a character."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, token_ids: tuple[int, ...]) -> str:
        """The text that became certain; maybe empty."""
        pieces = (self._stream.step(self._fast, token_id) for token_id in token_ids)
        return "".join(piece for piece in pieces if piece)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def generation_eos(folder: Path) -> tuple[int, ...]:
    """End-of-text ids in generation_config.json, which chat models extend beyond config.json's."""
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    try:
        value = json.loads(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from None
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _load(folder: Path) -> FastTokenizer:
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            return FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} is damaged: {error}") from None
    if not has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer; give prompts as prompt_token_ids")
    from transformers import AutoTokenizer

    converted: FastTokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    return converted

"""Text to token ids and back, with the tokenizer that lies beside a model."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from paceline.runtime.errors import ModelError


class Tokenizer:
    """A fast tokenizer. `tokenizer.json` is read directly: importing transformers would cost a
    start-up second.

    `encode` and `decode` may be called from several threads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fast = _load(folder)
        self._bytes: dict[int, bytes] = {}

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        return Tokenizer, (self.folder,)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """With the special tokens the model expects at the start of a prompt, unless told
        otherwise."""
        return list(self.fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self.fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        return TextStream(self.fast, skip_special_tokens=skip_special_tokens)

    def vocabulary(self) -> dict[str, int]:
        return dict(self.fast.get_vocab())

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; empty for an id it does not have."""
        return self.fast.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token writes. A part of a character is bytes that are no text by themselves."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with a replacement mark for parts of characters."""
        return self.token_bytes(token_id).decode(errors="replace")

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        added = self.fast.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, or empty. Raises ModelError where it is damaged."""
        path = self.folder / "tokenizer_config.json"
        if not path.exists():
            return {}
        try:
            values = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            raise ModelError(f"{path} is damaged: {error}") from None
        if not isinstance(values, dict):
            raise ModelError(f"{path} is not a JSON object")
        return values

    @property
    def chat_template(self) -> str | None:
        """The Jinja text the model brings for chats, if it does."""
        path = self.folder / "chat_template.jinja"
        if path.exists():
            return path.read_text()
        given = self.config.get("chat_template")
        if isinstance(given, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in given}
            given = named.get("default")
        return given if isinstance(given, str) else None

    def special_token(self, name: str) -> str | None:
        """The text of `bos_token`, `eos_token` and the like; None where the model has none."""
        value = self.config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def _spell(self, token_id: int) -> bytes:
        piece = self.token(token_id)
        if token_id in self.fast.get_added_tokens_decoder():
            return piece.encode()
        if "ByteLevel" in self._decoder:
            return b"".join(_byte_of(char) for char in piece)
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece) and "ByteFallback" in self._decoder:
            return bytes([int(piece[3:5], 16)])
        if "▁" in self._decoder:
            return piece.replace("▁", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    @functools.cached_property
    def _decoder(self) -> str:
        """The decoder's description, whose words tell the three usual spellings apart."""
        return json.dumps(json.loads(self.fast.to_str()).get("decoder"), ensure_ascii=False)


class TextStream:
    """Text of tokens as they arrive, never half a character."""

    def __init__(self, fast: FastTokenizer, *, skip_special_tokens: bool = True) -> None:
        self._fast = fast
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def step(self, token_id: int) -> str:
        """The text that became certain with a token; maybe empty."""
        return self._stream.step(self._fast, token_id) or ""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with tokens; maybe empty."""
        return "".join(self.step(token_id) for token_id in token_ids)


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


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies spell each byte as a printable character: itself where it is one,
    else the next from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_of(char: str) -> bytes:
    byte = _byte_alphabet().get(char)
    return char.encode() if byte is None else bytes([byte])


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

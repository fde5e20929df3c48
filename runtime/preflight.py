"""What can be refused before anything is started: models, tokenizers, lengths.

Imports no torch before `examine` reads a model: a server's front needs only the facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors

from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import ModelError
from paceline.runtime.models.arch import Architecture, context_length, read_architecture
from paceline.runtime.tokenizer import Tokenizer, generation_eos, has_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the side that has no weights must know of them."""

    arch: Architecture
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer | None
    """None where the model brings none: prompts are then token ids."""


def examine(config: EngineConfig) -> Facts:
    """Check a config against its models. Raises UserError, in one line, for what could never
    work."""
    from paceline.runtime.models.weights import find_model

    folder = find_model(config.model)
    arch = read_architecture(folder)
    _check_files(folder)
    tokenizer = Tokenizer(folder) if has_tokenizer(folder) else None
    spec = config.speculative_config
    if spec is not None and config.draft_size:
        _examine_drafter(spec.model, arch, tokenizer, target=config.model)
    eos = dict.fromkeys((*arch.eos_token_ids, *generation_eos(folder)))
    return Facts(
        arch=arch,
        max_model_len=context_length(config.max_model_len, arch),
        eos_token_ids=tuple(eos),
        tokenizer=tokenizer,
    )


def _examine_drafter(
    drafter: str, target_arch: Architecture, tokenizer: Tokenizer | None, *, target: str
) -> None:
    from paceline.runtime.models.weights import find_model

    folder = find_model(drafter)
    arch = read_architecture(folder)
    _check_files(folder)
    if tokenizer is not None and has_tokenizer(folder):
        ours, theirs = tokenizer.vocabulary(), Tokenizer(folder).vocabulary()
        if ours != theirs:
            differing = len(set(ours.items()) ^ set(theirs.items()))
            raise ModelError(
                f"{target} and {drafter} have different tokenizers ({differing} entries differ); a drafter must share "
                "its target's"
            )
    elif arch.vocab_size != target_arch.vocab_size:
        raise ModelError(
            f"{target} has a vocabulary of {target_arch.vocab_size}, {drafter} of {arch.vocab_size}, and no tokenizers "
            "show that they are the same"
        )


def _check_files(folder: Path) -> None:
    """Open every weight file's header: a truncated one is found before processes are started for
    it."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no safetensors files")
    for path in files:
        try:
            with safetensors.safe_open(path, framework="numpy"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is truncated or no safetensors file ({path.stat().st_size} bytes): {error}"
            ) from None

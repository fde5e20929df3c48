"""Text as windows of token ids, any of which can be had by its number.

A step asks for windows by number and not for the next ones: so a run that was cut off goes on with
exactly the windows it would have had.

    documents, shuffled per epoch    | d3 ... | d0 . | d2 ........ | d1 .. |
    windows of an epoch, shuffled       [  2  ][  0  ][  3  ][  1  ]
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from paceline.runtime.errors import ConfigError
from paceline.runtime.preflight import Facts

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]


def read_documents(paths: Sequence[str], facts: Facts) -> list[Tokens]:
    """The token ids of every document, each once: a text closed by the target's end of text, ids as
    they are.

    Raises ConfigError for a path that leads to no text and for ids outside the vocabulary.
    """
    found: dict[bytes, Tokens] = {}
    for path in paths:
        for ids in _read(Path(path).expanduser(), facts):
            if ids:
                tokens = np.array(ids, dtype=np.int32)
                found.setdefault(_digest(tokens), tokens)
    if not found:
        raise ConfigError(f"no text in {', '.join(paths)}")
    return list(found.values())


def hold_out(documents: Sequence[Tokens], share: float) -> tuple[list[Tokens], list[Tokens]]:
    """What is learnt from, and what is only measured on: about `share` of all tokens.

    Whole documents, the same ones wherever and in whatever order they are read; of a single document its end.
    """
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - share))
        return [documents[0][:cut]], [documents[0][cut:]]
    wanted, taken = share * sum(map(len, documents)), 0
    learnt: list[Tokens] = []
    held_out: list[Tokens] = []
    for tokens in sorted(documents, key=_digest):
        if not held_out or (taken < wanted and len(held_out) < len(documents) - 1):
            held_out.append(tokens)
            taken += len(tokens)
        else:
            learnt.append(tokens)
    return learnt, held_out


class Windows:
    """Endless windows over documents. Raises ConfigError where they hold not even one."""

    def __init__(self, documents: Sequence[Tokens], *, length: int, seed: int, what: str) -> None:
        self._documents = list(documents)
        self._length = length
        self._seed = seed
        total = sum(map(len, documents))
        self.per_epoch = total // length
        """Different windows."""
        if not self.per_epoch:
            raise ConfigError(f"{what} holds {total} tokens, fewer than one window of {length}")
        self._epoch = -1
        self._cut: Tokens = np.empty((0, length), dtype=np.int32)

    def __getitem__(self, number: int) -> Tokens:
        """`[length]`."""
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._cut = epoch, self._shuffled(epoch)
        window: Tokens = self._cut[index]
        return window

    def _shuffled(self, epoch: int) -> Tokens:
        rng = np.random.default_rng((self._seed, epoch))
        stream = np.concatenate([self._documents[i] for i in rng.permutation(len(self._documents))])
        used = self.per_epoch * self._length
        start = int(rng.integers(len(stream) - used + 1))
        windows = stream[start : start + used].reshape(-1, self._length)
        shuffled: Tokens = windows[rng.permutation(self.per_epoch)]
        return shuffled


def write_token_file(path: Path, documents: Sequence[Sequence[int]]) -> None:
    """A .jsonl file that `read_documents` reads, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps({"token_ids": list(ids)}) + "\n" for ids in documents))
    partial.rename(path)


def _read(path: Path, facts: Facts) -> Iterator[list[int]]:
    if path.is_dir():
        skipped = 0
        for file in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.is_file() and not hidden:
                try:
                    yield from _read_file(file, facts)
                except UnicodeDecodeError:
                    skipped += 1
        if skipped:
            log.warning("%s: %d files that are no UTF-8 text left out", path, skipped)
        return
    try:
        yield from _read_file(path, facts)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no UTF-8 text") from None


def _read_file(path: Path, facts: Facts) -> Iterator[list[int]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        yield _encode(text, facts, where=str(path))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _from_line(line, facts, where=f"{path}:{number}")


def _from_line(line: str, facts: Facts, *, where: str) -> list[int]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return _encode(value["text"], facts, where=where)
    ids = value.get("token_ids") if isinstance(value, dict) else None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ConfigError(f"{where} has neither `text` nor `token_ids`")
    if not all(0 <= i < facts.arch.vocab_size for i in ids):
        raise ConfigError(f"{where} has ids outside the vocabulary of {facts.arch.vocab_size}")
    return ids


def _encode(text: str, facts: Facts, *, where: str) -> list[int]:
    if facts.tokenizer is None:
        raise ConfigError(f"{where}: the target has no tokenizer; give .jsonl lines with token_ids")
    return [*facts.tokenizer.encode(text), *facts.eos_token_ids[:1]] if text else []


def _digest(tokens: Tokens) -> bytes:
    return blake2b(tokens.tobytes(), digest_size=16).digest()

"""The corpus: the standard library's own source, its held-out files, its tokenizer, its windows.

A packed corpus is one `.npz`: `text` (all files' bytes, one after another), `ends [files]`,
`paths [files]`, `is_test [files]`, `is_held_out [files]` and the `version` of the interpreter.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
NUM_HELD_OUT = 40
# Packages whose modules people read; the rest of the tree (encodings, lib2to3, idlelib, ...) is
# tables, old tools and demos, no measure of ordinary source.
_HELD_OUT_FOLDERS = frozenset(
    [
        *("asyncio", "concurrent/futures", "email", "http", "importlib", "json", "logging"),
        *("multiprocessing", "sqlite3", "tkinter", "unittest", "urllib", "xml/dom", "xml/etree"),
    ]
)
# Left the library by 3.13: a benchmark on a newer interpreter could not read them.
_REMOVED = frozenset(
    [
        *("aifc", "asynchat", "asyncore", "cgi", "cgitb", "chunk", "crypt", "imghdr", "imp"),
        *("mailcap", "msilib", "nntplib", "pathlib", "pipes", "smtpd", "sndhdr", "sunau"),
        *("telnetlib", "uu", "xdrlib"),
    ]
)
_HELD_OUT_BYTES = range(8_000, 120_000)

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of the standard library."""

    path: str
    text: str
    is_test: bool
    is_held_out: bool


def _is_test(path: str) -> bool:
    parts = path.split("/")
    return any(part in ("test", "tests", "idle_test") for part in parts[:-1])


def _may_be_held_out(path: str, size: int) -> bool:
    folder, _, name = path.rpartition("/")
    ordinary = not name.startswith("_") and size in _HELD_OUT_BYTES and not _is_test(path)
    lasting = name.removesuffix(".py") not in _REMOVED
    return ordinary and lasting and (folder == "" or folder in _HELD_OUT_FOLDERS)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def collect(root: Path | None = None) -> list[SourceFile]:
    """Read the running interpreter's library in path order; equal files count once."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if "site-packages" in path or "dist-packages" in path:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            log.debug("skipped %s: not UTF-8", path)
            continue
        if text.strip():
            found[path] = text
    candidates = [path for path, text in found.items() if _may_be_held_out(path, len(text))]
    held_out = set(sorted(candidates, key=_digest)[:NUM_HELD_OUT])
    # Held-out text first, so that a copy of a held-out file elsewhere is what gets dropped.
    seen: set[str] = set()
    files = []
    for path in sorted(found, key=lambda path: (path not in held_out, path)):
        if (digest := _digest(found[path])) not in seen:
            seen.add(digest)
            files.append(
                SourceFile(
                    path=path,
                    text=found[path],
                    is_test=_is_test(path),
                    is_held_out=path in held_out,
                )
            )
    return files


def pack(files: list[SourceFile], target: Path) -> None:
    """Write the packed corpus, so that another interpreter trains on the very same text."""
    chunks = [file.text.encode() for file in files]
    np.savez_compressed(
        target,
        text=np.frombuffer(b"".join(chunks), dtype=np.uint8),
        ends=np.cumsum([len(chunk) for chunk in chunks]),
        paths=np.array([file.path for file in files]),
        is_test=np.array([file.is_test for file in files]),
        is_held_out=np.array([file.is_held_out for file in files]),
        version=np.array(platform.python_version()),
    )


def unpack(source: Path) -> list[SourceFile]:
    """Read a packed corpus."""
    with np.load(source) as data:
        raw, ends = data["text"].tobytes(), data["ends"].tolist()
        columns = zip(
            [0, *ends[:-1]], ends, data["paths"], data["is_test"], data["is_held_out"], strict=True
        )
        return [
            SourceFile(
                path=str(path),
                text=raw[start:end].decode(),
                is_test=bool(is_test),
                is_held_out=bool(is_held_out),
            )
            for start, end, path, is_test, is_held_out in columns
        ]


def train_tokenizer(files: list[SourceFile]) -> Tokenizer:
    """Byte-level BPE on the non-test training text, id 0 the end of a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (file.text for file in files if not file.is_held_out and not file.is_test)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files that transformers' fast tokenizer reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Tokenizer, files: list[SourceFile]) -> list[Tokens]:
    """Each document's ids, closed by the end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch_fast([file.text for file in files])
    return [np.array([*document.ids, end], dtype=np.uint16) for document in encoded]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The three parts of the corpus as token ids, one array per document."""

    modules: list[Tokens]
    tests: list[Tokens]
    held_out: list[Tokens]


def encode_parts(tokenizer: Tokenizer, files: list[SourceFile]) -> Encoded:
    """Encode everything and sort it into its part."""
    documents = list(zip(files, encode(tokenizer, files), strict=True))
    return Encoded(
        modules=[ids for file, ids in documents if not (file.is_test or file.is_held_out)],
        tests=[ids for file, ids in documents if file.is_test],
        held_out=[ids for file, ids in documents if file.is_held_out],
    )


def windows(documents: list[Tokens], *, length: int, rng: np.random.Generator) -> Iterator[Tokens]:
    """Endless windows of `length` tokens: each epoch shuffles documents, cuts, shuffles cuts."""
    while True:
        order = rng.permutation(len(documents))
        stream = np.concatenate([documents[i] for i in order])[rng.integers(length) :]
        cut = stream[: len(stream) // length * length].reshape(-1, length)
        yield from cut[rng.permutation(len(cut))]


def mixed_windows(
    parts: Encoded, *, length: int, share_of_tests: float, rng: np.random.Generator
) -> Iterator[Tokens]:
    """Windows of modules and, at `share_of_tests`, of tests."""
    modules = windows(parts.modules, length=length, rng=rng)
    tests = windows(parts.tests, length=length, rng=rng)
    while True:
        yield next(tests if rng.random() < share_of_tests else modules)

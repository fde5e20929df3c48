"""Prompts the embedded pair has never seen: files of the standard library held out of its training.

They are read from the running interpreter's own library, so nothing is copied into the repository; another Python
version gives other prompts, and a report names its version.
"""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path

import paceline.runtime.models.embedded as embedded
from paceline.runtime.tokenizer import Tokenizer


def given(path: str | None, tokenizer: Tokenizer, *, count: int, length: int) -> list[list[int]]:
    """The prompts of a file if one is named, else `count` held-out ones."""
    if path is not None:
        return from_file(path, tokenizer, length=length)
    return held_out(tokenizer, count=count, length=length)


def held_out(tokenizer: Tokenizer, *, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of `length` tokens, from as many different held-out files as there are."""
    folder = Path(embedded.__file__).parent
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [library / name for name in json.loads((folder / "held_out.json").read_text())]
    texts = [path.read_text() for path in sorted(paths) if path.exists()]
    choices = random.Random(seed)
    choices.shuffle(texts)
    prompts: list[list[int]] = []
    while len(prompts) < count:
        ids = tokenizer.encode(texts[len(prompts) % len(texts)])
        if len(ids) > length:
            start = choices.randrange(len(ids) - length)
            prompts.append(ids[start : start + length])
        else:
            texts.remove(texts[len(prompts) % len(texts)])
    return prompts


def from_file(path: str, tokenizer: Tokenizer, *, length: int) -> list[list[int]]:
    """The last `length` tokens of every prompt in a JSONL file."""
    prompts = []
    for line in Path(path).read_text().splitlines():
        value = json.loads(line)
        ids = value.get("prompt_token_ids") or tokenizer.encode(value["prompt"])
        prompts.append(ids[-length:])
    return prompts

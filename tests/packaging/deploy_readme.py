"""What deploy/README.md tells its readers to type, by kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README = ROOT / "deploy/README.md"


class Block(NamedTuple):
    """A fenced block, under the second-level heading it is in.

    `use` says what becomes of it: `walked` is run as it is, `ray` is replaced by the tests' own cluster,
    `setup` is how the tests came to run, `kustomize` is run where there is a kubectl, `linted` and
    `cluster` are only read.
    """

    section: str
    language: str
    use: str
    text: str


def blocks() -> Iterator[Block]:
    """In the order of the page."""
    section = ""
    pattern = re.compile(r"^## ([^\n]+)$|^```(\w+) (\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for heading, language, use, text in pattern.findall(README.read_text()):
        if heading:
            section = heading
        else:
            yield Block(section, language, use, text)


def commands(block: Block) -> list[str]:
    """The commands of a shell block, continued lines joined."""
    joined = block.text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]

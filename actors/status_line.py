"""One line at the foot of a terminal that stays while text scrolls above it.

text text text text        rows 1 .. n-1 scroll
text text
2/12 prompts, 184 tokens/s row n does not
"""

from __future__ import annotations

import shutil
from types import TracebackType
from typing import IO, Self

SAVE, RESTORE, CLEAR_LINE = "\x1b7", "\x1b8", "\x1b[2K"


class StatusLine:
    """A context manager over a stream; does nothing where the stream is no terminal."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        size = shutil.get_terminal_size()
        self._rows, self._columns = size.lines, size.columns
        self._shown = stream.isatty() and self._rows > 2

    def __enter__(self) -> Self:
        # a new line first, so that the cursor is not on the row that is about to leave the scrolling part
        self._write(f"\n{SAVE}\x1b[1;{self._rows - 1}r{RESTORE}\x1b[1A")
        return self

    def show(self, text: str) -> None:
        """Replace the line."""
        self._write(f"{SAVE}\x1b[{self._rows};1H{CLEAR_LINE}{text[: self._columns - 1]}{RESTORE}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._write(f"{SAVE}\x1b[r\x1b[{self._rows};1H{CLEAR_LINE}{RESTORE}")

    def _write(self, codes: str) -> None:
        if self._shown:
            self._stream.write(codes)
            self._stream.flush()

"""What an engine's process warns of, to be said where people look: in the log of whoever started it.

logger.warning ──> Notes ──> engine loop ──link──> LinkClient.watch ──> the supervisor's log
"""

from __future__ import annotations

import collections
import logging
from typing import Annotated

import msgspec

from paceline.runtime.types import WireType

MOST_NOTES = 200
MOST_CHARS = 64 * 2**10


class Note(WireType, frozen=True, kw_only=True, tag="note"):
    """One line, or the stacks of a rank."""

    level: Annotated[int, msgspec.Meta(ge=0, le=100)]
    text: str


class Notes(logging.Handler):
    """Keeps the latest warnings of the package's loggers until they are taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._notes: collections.deque[Note] = collections.deque(maxlen=MOST_NOTES)
        logging.getLogger("paceline").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info is not None:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self._notes.append(Note(level=record.levelno, text=text[:MOST_CHARS]))

    def take(self) -> list[Note]:
        """Those since the last call, oldest first."""
        notes = []
        while self._notes:
            notes.append(self._notes.popleft())
        return notes

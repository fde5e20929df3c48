"""Counts that several frontends keep together and any of them can tell: numbers in one memory.

    what a frontend counts of its requests ──> its own slot; the slots' sum is the server's
    what engines say of themselves ──────────> a row per engine; all frontends hear the same, so
                                               only that of slot 0 writes it down

A frontend that dies leaves its numbers behind, and the next of its slot counts on from there. Each
number has one writer, who stores it whole: there is no lock, and no half a number to be read.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import takewhile
from multiprocessing.reduction import DupFd
from typing import Any

logger = logging.getLogger(__name__)

SLOT_CELLS = 1024
"""Room for what one frontend counts."""
MOST_ENGINES = 128
"""Engines that may serve at once."""
MOST_TOTALS, MOST_LATEST = 96, 32
"""Numbers that an engine may say of itself, of either kind."""
FORGET_S = 60.0
"""How long an engine must not have been heard of before another gets its row."""

_CELL_BYTES = 8
_NAME, _SEEN_S, _HEAD = 0, 1, 2
_ROW_CELLS = _HEAD + 2 * MOST_TOTALS + MOST_LATEST
_TABLE_CELLS = 1 + MOST_ENGINES * _ROW_CELLS


class CountsMemory:
    """The memory, all zeros at first. A process that gets it as an argument has the same one."""

    def __init__(self, *, num_slots: int) -> None:
        fd = os.memfd_create("paceline-counts", os.MFD_CLOEXEC)
        os.ftruncate(fd, _num_cells(num_slots) * _CELL_BYTES)
        self._hold(fd)

    def counts(self, *, slot: int) -> Counts:
        """As the frontend of this slot, of which there may be one at a time, sees it."""
        return Counts(memoryview(mmap.mmap(self._fd, 0)).cast("d"), slot=slot)

    def _hold(self, fd: int) -> None:
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    def __reduce__(self) -> tuple[Callable[[Any], CountsMemory], tuple[Any]]:
        return _received, (DupFd(self._fd),)


def _received(descriptor: Any) -> CountsMemory:
    memory = CountsMemory.__new__(CountsMemory)
    memory._hold(descriptor.detach())
    return memory


class Counts:
    """The memory as one frontend sees it."""

    def __init__(self, cells: memoryview[float], *, slot: int) -> None:
        self.slot = slot
        self.engines = EngineTable(cells[:_TABLE_CELLS])
        firsts = range(_TABLE_CELLS, len(cells), SLOT_CELLS)
        self._slots = [cells[first : first + SLOT_CELLS] for first in firsts]
        self._num_taken = 0

    @classmethod
    def private(cls) -> Counts:
        """For a frontend that is the only one."""
        return cls(memoryview(bytearray(_num_cells(1) * _CELL_BYTES)).cast("d"), slot=0)

    def tally(self, num_cells: int) -> Tally:
        """The next cells of every slot: all frontends must ask for the same, in the same order."""
        first = self._num_taken
        self._num_taken += num_cells
        assert self._num_taken <= SLOT_CELLS, "expected a slot to have room for every tally"
        parts = [cells[first : self._num_taken] for cells in self._slots]
        return Tally(parts[self.slot], parts)


class Tally:
    """A few numbers of which every frontend has its own."""

    __slots__ = ("_parts", "own")

    def __init__(self, own: memoryview[float], parts: Sequence[memoryview[float]]) -> None:
        self.own, self._parts = own, parts

    def sums(self) -> list[float]:
        """Over all frontends."""
        return [sum(each) for each in zip(*self._parts, strict=True)]


class EngineTable:
    """What engines have said of themselves, each in a row:

        name, seen_s | base ... | counted ... | latest ...

    `counted` only grows: it is `base` plus the engine's own totals, so that it does no harm to write
    down the same twice. An engine whose totals fall has been started anew, and goes on from what was
    counted; so does one that gets the row of another that is long gone.
    """

    def __init__(self, cells: memoryview[float]) -> None:
        self._most = cells[:1]
        firsts = range(1, len(cells), _ROW_CELLS)
        self._rows = [_Row(cells[first : first + _ROW_CELLS]) for first in firsts]
        self._is_full = False

    @property
    def most_at_once(self) -> int:
        """How many engines there have been at the same time, as far as a frontend has noted."""
        return int(self._most[0])

    def note_at_once(self, num_engines: int) -> None:
        """Any frontend may."""
        if num_engines > self._most[0]:
            self._most[0] = num_engines

    def follow(
        self, name: str, totals: Sequence[float], latest: Sequence[float] = (), *, now_s: float
    ) -> None:
        """Count what an engine's totals have grown by, and keep the latest of its other numbers."""
        if not any(totals) and not any(latest):  # it has yet to speak: that is no fall
            return
        row = self._find(name) or self._claim(name, now_s=now_s)
        if row is None:
            return
        row.head[_SEEN_S] = now_s
        if any(total < said for total, said in zip(totals, row.said, strict=False)):
            row.base[:] = row.counted
        for i, total in enumerate(totals):
            row.counted[i] = row.base[i] + total
        for i, number in enumerate(latest):
            row.latest[i] = number

    def said(self, name: str) -> list[float]:
        """The totals of an engine that were last followed; zeros if none were."""
        row = self._find(name)
        return [0.0] * MOST_TOTALS if row is None else row.said

    def latest(self, name: str) -> list[float]:
        """Its other numbers; zeros if none are known."""
        row = self._find(name)
        return [0.0] * MOST_LATEST if row is None else list(row.latest)

    def sums(self) -> list[float]:
        """What was counted of all engines there ever were."""
        used = takewhile(lambda row: row.head[_NAME], self._rows)
        counted = [row.counted for row in used]
        return [sum(each) for each in zip(*counted, strict=True)] or [0.0] * MOST_TOTALS

    def _find(self, name: str) -> _Row | None:
        key = _key(name)
        return next((row for row in self._rows if row.head[_NAME] == key), None)

    def _claim(self, name: str, *, now_s: float) -> _Row | None:
        """A row for an engine that has none."""
        row = next((row for row in self._rows if not row.head[_NAME]), None)
        if row is None:
            row = min(self._rows, key=lambda row: row.head[_SEEN_S])
            if now_s - row.head[_SEEN_S] < FORGET_S:
                if not self._is_full:
                    logger.warning(
                        "more than %d engines: metrics do not count what others say", MOST_ENGINES
                    )
                self._is_full = True
                return None
        # the name comes last: whoever finds it must find the row ready
        row.base[:] = row.counted
        for i in range(MOST_LATEST):
            row.latest[i] = 0.0
        row.head[_NAME] = _key(name)
        return row


class _Row:
    __slots__ = ("base", "counted", "head", "latest")

    def __init__(self, cells: memoryview[float]) -> None:
        ends = (_HEAD, _HEAD + MOST_TOTALS, _HEAD + 2 * MOST_TOTALS)
        self.head, self.base = cells[: ends[0]], cells[ends[0] : ends[1]]
        self.counted, self.latest = cells[ends[1] : ends[2]], cells[ends[2] :]

    @property
    def said(self) -> list[float]:
        return [counted - base for counted, base in zip(self.counted, self.base, strict=True)]


def _num_cells(num_slots: int) -> int:
    return _TABLE_CELLS + num_slots * SLOT_CELLS


def _key(name: str) -> float:
    """A number that stands for a name; never 0."""
    return float(1 + int.from_bytes(blake2b(name.encode(), digest_size=6).digest()))

"""The memory of a server's counts: whoever dies while writing, what is read is right."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.runtime.counts import (
    FORGET_S,
    MOST_ENGINES,
    MOST_LATEST,
    MOST_TOTALS,
    Counts,
    CountsMemory,
    EngineTable,
)


class DiedError(Exception):
    pass


class Mortal:
    """Cells whose writer dies before it has stored as many numbers as it wants to."""

    def __init__(self, cells: memoryview[float], life: list[int]) -> None:
        self.cells, self.life = cells, life

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, at: Any) -> Any:
        found = self.cells[at]
        return Mortal(found, self.life) if isinstance(at, slice) else found

    def __setitem__(self, at: Any, new: Any) -> None:
        places = range(len(self.cells))[at] if isinstance(at, slice) else [at]
        for place, number in zip(places, new if isinstance(at, slice) else [new], strict=True):
            if not self.life[0]:
                raise DiedError
            self.life[0] -= 1
            self.cells[place] = number


def table_of_four() -> memoryview[float]:
    row = 2 + 2 * MOST_TOTALS + MOST_LATEST
    return memoryview(bytearray(8 * (1 + 4 * row))).cast("d")


@pytest.mark.parametrize(
    ("name", "says"),
    [("a", [7.0, 9.0]), ("a", [1.0, 2.0]), ("another", [3.0, 4.0])],
    ids=["an engine goes on", "an engine starts anew", "an engine comes"],
)
def test_a_writer_may_die_at_any_store_and_the_next_writes_the_same(
    name: str, says: list[float]
) -> None:
    wanted = None
    for life in (10_000, *range(250)):
        cells = table_of_four()
        for i, each in enumerate(("a", "b", "c", "d")):
            EngineTable(cells).follow(each, [5.0, 6.0], now_s=float(i))
        mortal = Mortal(cells, [life])
        before = EngineTable(cells).sums()
        try:
            EngineTable(mortal).follow(name, says, now_s=FORGET_S)  # type: ignore[arg-type]
        except DiedError:
            left = EngineTable(cells).sums()
            assert all(now >= was for now, was in zip(left, before, strict=True))
            EngineTable(cells).follow(name, says, now_s=FORGET_S)
        sums = EngineTable(cells).sums()
        wanted = wanted or sums
        assert sums == wanted, f"after {life} stores"


def test_an_engine_that_is_long_gone_leaves_its_row_but_not_what_was_counted() -> None:
    table = Counts.private().engines
    for i in range(MOST_ENGINES):
        table.follow(f"engine-{i}", [1.0], [4.0], now_s=0.0)
    table.follow("engine-1", [2.0], now_s=1.0)
    table.follow("new", [10.0], now_s=FORGET_S)
    assert table.sums()[0] == MOST_ENGINES + 1 + 10
    assert table.said("new")[0] == 10
    assert table.latest("new")[0] == 0
    assert table.said("engine-0")[0] == 0, "its row was the oldest"
    table.follow("engine-1", [3.0], now_s=FORGET_S)
    assert table.sums()[0] == MOST_ENGINES + 1 + 10 + 1


def test_an_engine_too_many_is_told_of_once_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = Counts.private().engines
    for _ in range(2):
        for i in range(MOST_ENGINES + 2):
            table.follow(f"engine-{i}", [1.0], now_s=0.0)
    assert table.sums()[0] == MOST_ENGINES
    assert [each.getMessage() for each in caplog.records] == [
        "more than 128 engines: metrics do not count what others say"
    ]


def test_an_engine_that_has_yet_to_speak_has_not_started_anew() -> None:
    table = Counts.private().engines
    for says in (5.0, 0.0, 6.0):
        table.follow("a", [says], now_s=0.0)
    assert table.sums()[0] == 6


def test_slots_are_apart_and_their_sum_is_the_same_from_each() -> None:
    memory = CountsMemory(num_slots=3)
    tallies = []
    for slot in range(3):
        counts = memory.counts(slot=slot)
        counts.tally(5)
        tallies.append(counts.tally(2))
    for slot, tally in enumerate(tallies):
        tally.own[0] += 1
        tally.own[1] += 10.0**slot
    assert [tally.sums() for tally in tallies] == [[3, 111]] * 3

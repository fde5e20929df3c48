"""A mark is only ever taken for the request it was made for."""

from __future__ import annotations

import mmap
import secrets

import numpy as np
import pytest

from paceline.runtime.transfer.board import Board

GEOMETRY = {"num_slots": 3, "num_layers": 4, "num_draft_layers": 2}


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, Board.nbytes(**GEOMETRY))


def test_a_reader_sees_marks_of_the_generation_it_was_told(memory: mmap.mmap) -> None:
    writer, reader = Board(memory, **GEOMETRY), Board(memory, **GEOMETRY)
    assert reader.read(1, 7) is None
    writer.begin(1, 7)
    writer.marks[1], writer.draft_marks[1] = 32, 16
    writer.marks[1, 2] = 48
    writer.draft_marks[1, 0] = 33
    marks, draft = reader.read(1, 7), reader.read(1, 7, draft=True)
    assert marks is not None
    assert draft is not None
    assert marks.tolist() == [32, 32, 48, 32]
    assert draft.tolist() == [33, 16]
    assert reader.read(1, 6) is None
    writer.begin(1, 8)
    assert reader.read(1, 7) is None
    assert reader.generation(1) == 8
    assert [reader.generation(slot) for slot in (0, 2)] == [0, 0]


def test_slots_and_words_do_not_overlap(memory: mmap.mmap) -> None:
    board, nonce = Board(memory, **GEOMETRY), secrets.token_bytes(16)
    board.nonce = nonce
    board.beat()
    for slot in range(3):
        board.begin(slot, 10 + slot)
        board.marks[slot], board.draft_marks[slot] = 20 + slot, 30 + slot
    again = Board(memory, **GEOMETRY)
    assert (again.nonce, again.heartbeat) == (nonce, 1)
    assert memory[16:32] == nonce, "expected where proto/README.md has it"
    assert [again.generation(slot) for slot in range(3)] == [10, 11, 12]
    assert again.marks.tolist() == [[20] * 4, [21] * 4, [22] * 4]
    assert again.draft_marks.tolist() == [[30] * 2, [31] * 2, [32] * 2]


def test_marks_are_seen_by_neither_generation_while_they_change(memory: mmap.mmap) -> None:
    """The writer is stopped after each of its writes, and a reader looks."""
    plain = Board(memory, **GEOMETRY)
    plain.begin(0, 1)
    seen: list[tuple[bool, bool]] = []

    class Watched(np.ndarray):  # type: ignore[type-arg]
        def __setitem__(self, key: object, value: object) -> None:
            super().__setitem__(key, value)  # type: ignore[index]
            seen.append((plain.read(0, 1) is not None, plain.read(0, 2) is not None))

    writer = Board(memory, **GEOMETRY)
    for name in ("marks", "draft_marks", "_generations"):
        setattr(writer, name, getattr(writer, name).view(Watched))
    writer.begin(0, 2)
    assert seen == [(False, False)] * 3 + [(False, True)]


def test_memory_that_is_too_small_is_ours_to_mend() -> None:
    with pytest.raises(AssertionError, match="expected"):
        Board(bytearray(Board.nbytes(**GEOMETRY) - 8), **GEOMETRY)

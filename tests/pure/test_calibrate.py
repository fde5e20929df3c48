"""The drafter's KV rows are as exact as the bookkeeping says, whatever is accepted.

A shadow cache stands beside the lengths: per row, the token it was written for and whether it is
what a fresh exact prefill would have written there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from paceline.runtime.spec.calibrate import Calibration, DraftRows, FirstPass


@dataclass
class Row:
    token: int
    exact: bool


@dataclass
class ShadowedDrafter:
    """What `DraftModel` does to a request's rows, with a shadow cache for a KV pool."""

    rows: DraftRows
    committed: list[int] = field(default_factory=list)
    cache: list[Row] = field(default_factory=list)
    next_token: int = 0
    first_passes: list[FirstPass] = field(default_factory=list)

    def new_tokens(self, count: int) -> list[int]:
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def write(self, tokens: list[int], *, start: int, exact: bool) -> None:
        """A pass: rows from `start` on. They are exact if it is, and all rows it sees are."""
        assert start <= len(self.cache), "a pass must not leave a hole before it"
        good = (exact or not self.rows.grouped) and all(row.exact for row in self.cache[:start])
        self.cache[start:] = [Row(token, good) for token in tokens]
        self.rows.passed(end=start + len(tokens), exact=exact and start <= self.rows.exact)

    def read_prompt(self, num_tokens: int) -> None:
        chunk = self.new_tokens(num_tokens)
        self.write(chunk, start=len(self.committed), exact=True)
        self.committed += chunk

    def emit_without_drafting(self) -> None:
        self.committed += self.new_tokens(1)

    def round(self, *, num_drafted: int, num_accepted: int) -> FirstPass:
        """Draft, verify, commit what was accepted and the target's own token."""
        before = len(self.committed)
        first = self.rows.first_pass(committed=before)
        self.first_passes.append(first)
        self.write(self.committed[first.start :], start=first.start, exact=first.exact)
        drafts = self.new_tokens(num_drafted)
        for depth in range(num_drafted - 1):  # the last draft is never fed
            self.write([drafts[depth]], start=before + depth, exact=False)
        self.rows.verified(committed=before, num_drafted=num_drafted, num_accepted=num_accepted)
        self.committed += drafts[:num_accepted] + self.new_tokens(1)
        return first


def make_drafter(
    calibration: Calibration = Calibration.ON_MISMATCH,
    *,
    grouped: bool = True,
    prompt: int = 4,
) -> ShadowedDrafter:
    """A drafter that has read a prompt, after which the target emitted its first token."""
    drafter = ShadowedDrafter(DraftRows(calibration=calibration, grouped=grouped))
    drafter.read_prompt(prompt)
    drafter.emit_without_drafting()
    return drafter


class AnyHistory(RuleBasedStateMachine):
    """Prompts in chunks, rounds with any number of drafts accepted, rounds without drafts."""

    @initialize(
        calibration=st.sampled_from(Calibration), grouped=st.booleans(), prompt=st.integers(1, 6)
    )
    def start(self, calibration: Calibration, grouped: bool, prompt: int) -> None:
        self.drafter = ShadowedDrafter(DraftRows(calibration=calibration, grouped=grouped))
        self.drafter.read_prompt(prompt)
        self.reading = True
        self.rejected = False

    @precondition(lambda self: self.reading)
    @rule(num_tokens=st.integers(1, 5))
    def read_another_chunk(self, num_tokens: int) -> None:
        self.drafter.read_prompt(num_tokens)

    @rule()
    def emit_without_drafting(self) -> None:
        self.drafter.emit_without_drafting()
        self.reading = False

    @precondition(lambda self: not self.reading)
    @rule(num_drafted=st.integers(1, 5), data=st.data())
    def draft_and_verify(self, num_drafted: int, data: st.DataObject) -> None:
        num_accepted = data.draw(st.integers(0, num_drafted))
        rows = self.drafter.rows
        filled, exact, committed = rows.filled, rows.exact, len(self.drafter.committed)
        first = self.drafter.round(num_drafted=num_drafted, num_accepted=num_accepted)
        if not rows.grouped:
            assert first == FirstPass(start=filled, exact=True)
        else:
            behind = committed - filled > 2
            calibrate = rows.calibration is Calibration.EVERY_ROUND or (
                rows.calibration is Calibration.ON_MISMATCH and (self.rejected or behind)
            )
            assert first == FirstPass(
                start=exact if calibrate else filled, exact=calibrate or behind
            )
        self.rejected = num_accepted < num_drafted

    @invariant()
    def lengths_are_in_order(self) -> None:
        rows = self.drafter.rows
        assert 0 <= rows.exact <= rows.filled <= len(self.drafter.committed)

    @invariant()
    def rows_called_exact_are_those_of_a_fresh_exact_prefill(self) -> None:
        drafter = self.drafter
        assert drafter.cache[: drafter.rows.exact] == [
            Row(token, True) for token in drafter.committed[: drafter.rows.exact]
        ]

    @invariant()
    def rows_called_filled_were_written_for_the_committed_tokens(self) -> None:
        drafter = self.drafter
        written = [row.token for row in drafter.cache[: drafter.rows.filled]]
        assert written == drafter.committed[: drafter.rows.filled]


TestAnyHistory = AnyHistory.TestCase


@pytest.mark.parametrize("calibration", Calibration)
def test_after_an_exact_pass_every_row_is_exact(calibration: Calibration) -> None:
    rows = DraftRows(calibration=calibration, grouped=True, exact=2, filled=5)
    rows.passed(end=7, exact=True)
    assert rows.exact == rows.filled == 7


def test_grouped_pass_fills_rows_without_making_them_exact() -> None:
    rows = DraftRows(calibration=Calibration.NEVER, grouped=True, exact=2, filled=5)
    rows.passed(end=6, exact=False)
    assert (rows.exact, rows.filled) == (2, 6)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("calibration", Calibration)
def test_prompt_is_always_exact(calibration: Calibration, grouped: bool) -> None:
    drafter = make_drafter(calibration, grouped=grouped, prompt=6)
    assert drafter.rows.exact == drafter.rows.filled == 6


@pytest.mark.parametrize("num_accepted", range(5))
def test_every_round_calibrates_whatever_was_accepted(num_accepted: int) -> None:
    drafter = make_drafter(Calibration.EVERY_ROUND)
    drafter.round(num_drafted=4, num_accepted=num_accepted)
    exact = drafter.rows.exact
    assert drafter.round(num_drafted=4, num_accepted=0) == FirstPass(start=exact, exact=True)


def test_on_mismatch_keeps_grouped_rows_after_full_acceptance() -> None:
    drafter = make_drafter(Calibration.ON_MISMATCH)
    drafter.round(num_drafted=3, num_accepted=3)
    # the last draft and the target's own token are what the drafter has not seen
    assert drafter.rows.filled == len(drafter.committed) - 2
    first = drafter.round(num_drafted=3, num_accepted=3)
    assert first == FirstPass(start=len(drafter.committed) - 6, exact=False)


@pytest.mark.parametrize("num_accepted", range(3))
def test_on_mismatch_makes_everything_since_the_last_exact_row_exact(num_accepted: int) -> None:
    drafter = make_drafter(Calibration.ON_MISMATCH, prompt=4)
    drafter.round(num_drafted=3, num_accepted=3)
    drafter.round(num_drafted=3, num_accepted=3)
    assert drafter.rows.exact == 4
    drafter.round(num_drafted=3, num_accepted=num_accepted)
    committed = len(drafter.committed)
    drafter.round(num_drafted=1, num_accepted=0)
    assert drafter.first_passes[-1] == FirstPass(start=4, exact=True)
    assert drafter.rows.exact == committed


def test_on_mismatch_calibrates_once_per_mismatch() -> None:
    drafter = make_drafter(Calibration.ON_MISMATCH)
    accepted = (3, 0, 3, 3, 1, 3)
    for num_accepted in accepted:
        drafter.round(num_drafted=3, num_accepted=num_accepted)
    assert [first.exact for first in drafter.first_passes] == [
        False,
        False,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("num_accepted", range(4))
def test_never_leaves_everything_after_the_prompt_grouped(num_accepted: int) -> None:
    drafter = make_drafter(Calibration.NEVER, prompt=4)
    for _ in range(3):
        first = drafter.round(num_drafted=3, num_accepted=num_accepted)
        assert not first.exact
    assert drafter.rows.exact == 4


@pytest.mark.parametrize("calibration", Calibration)
@pytest.mark.parametrize("num_accepted", range(4))
def test_drafter_without_groups_never_computes_a_row_twice(
    calibration: Calibration, num_accepted: int
) -> None:
    drafter = make_drafter(calibration, grouped=False)
    for _ in range(3):
        filled = drafter.rows.filled
        first = drafter.round(num_drafted=3, num_accepted=num_accepted)
        assert first == FirstPass(start=filled, exact=True)
        assert drafter.rows.exact == drafter.rows.filled


def test_rows_of_rejected_drafts_are_forgotten() -> None:
    drafter = make_drafter(prompt=4)
    drafter.round(num_drafted=4, num_accepted=1)
    assert drafter.rows.filled == 5 + 1


def test_first_pass_changes_nothing() -> None:
    rows = DraftRows(calibration=Calibration.EVERY_ROUND, grouped=True, exact=3, filled=5)
    assert rows.first_pass(committed=6) == rows.first_pass(committed=6)
    assert (rows.exact, rows.filled) == (3, 5)


def test_drafter_that_has_seen_the_last_committed_token_is_refused() -> None:
    rows = DraftRows(calibration=Calibration.NEVER, grouped=True, exact=5, filled=5)
    with pytest.raises(AssertionError, match="never seen yet, 5 of 5 are"):
        rows.first_pass(committed=5)


@pytest.mark.parametrize("calibration", list(Calibration))
def test_text_that_was_written_without_the_drafter_is_read_exactly(
    calibration: Calibration,
) -> None:
    """Its blocks may be shared with requests that take them for exact."""
    rows = DraftRows(calibration=calibration, grouped=True, exact=16, filled=16)
    first = rows.first_pass(committed=40)
    assert first.exact
    assert first.start == 16

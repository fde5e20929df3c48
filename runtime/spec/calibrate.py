"""When the drafter's KV is made exact again, and from where.

A request's KV rows in the drafter, by position:

    0 ............ exact ............ filled ............ committed
    |-- of an exact pass --|-- of grouped passes --|-- not seen yet --|

An exact pass over everything from `exact` on makes all rows exact and, as its last row stands for
the last committed token, also gives the first draft: calibration is the first drafting pass of a
round, not one more. Afterwards the drafter's KV equals that of a fresh exact prefill.

Source: EasySpec (arXiv 2502.02493), "bonus calibration".
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from paceline.runtime.types import AS_CONFIGURED, DraftForm

ROUND_LEAVES = 2
"""Committed tokens that a round of its own leaves the drafter to read, at most."""


class Calibration(enum.StrEnum):
    """After which rounds the next one begins with an exact pass."""

    EVERY_ROUND = "every_round"
    ON_MISMATCH = "on_mismatch"
    """Only where a draft was rejected. After a full acceptance the grouped rows are kept."""
    NEVER = "never"
    """The prompt is exact, nothing after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstPass:
    """The pass that opens a round: rows from `start` to the last committed token."""

    start: int
    exact: bool


@dataclass(slots=True, kw_only=True)
class DraftRows:
    """The lengths drawn above, for one request. `grouped` is whether any layers run side by side at
    all."""

    calibration: Calibration
    grouped: bool
    exact: int = 0
    filled: int = 0
    _mismatch: bool = False

    def first_pass(self, *, committed: int, form: DraftForm = AS_CONFIGURED) -> FirstPass:
        """What to run before the second draft, given the number of committed tokens. Mutates
        nothing."""
        assert self.filled < committed, (
            f"the last committed token is never seen yet, {self.filled} of {committed} are"
        )
        if not self.grouped:
            return FirstPass(start=self.filled, exact=True)
        # a round leaves its last draft and the target's own token unread; more is text that was
        # written or read without this drafter, perhaps in blocks that others take for exact
        behind = committed - self.filled > ROUND_LEAVES
        if form.exact:  # what grouped passes have left between must not be built upon
            return FirstPass(start=self.exact, exact=True)
        wanted = self.calibration if form.calibration is None else Calibration(form.calibration)
        calibrate = wanted is Calibration.EVERY_ROUND or (
            wanted is Calibration.ON_MISMATCH and (self._mismatch or behind)
        )
        if calibrate:
            return FirstPass(start=self.exact, exact=True)
        return FirstPass(start=self.filled, exact=behind)

    def passed(self, *, end: int, exact: bool) -> None:
        """A pass wrote every row up to `end`. An exact one must have begun no later than
        `exact`."""
        self.filled = end
        if exact:
            self.exact = end

    def verified(self, *, committed: int, num_drafted: int, num_accepted: int) -> None:
        """A round drafted after `committed` tokens and kept `num_accepted`. Rows of rejected drafts
        are forgotten.

        The last draft of a round is never fed to the drafter, so its row does not exist even if it
        was accepted.
        """
        self.filled = min(self.filled, committed + num_accepted)
        self.exact = min(self.exact, self.filled)
        if not self.grouped:
            self.exact = self.filled
        self._mismatch = num_accepted < num_drafted

"""What every drafter is to the worker: something that proposes tokens for the requests of a step and
learns what became of them."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from paceline.runtime.sequence import Sequence
from paceline.runtime.types import StageTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """At most `num_tokens`, at least 1, tokens to follow all committed ones of a request."""

    sequence: Sequence
    num_tokens: int
    drafted: tuple[int, ...] = ()
    """Drafts at the end of the sequence's tokens: there already, and not known to its sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Committed tokens that the target reads in this step, up to `end`: a drafter with KV of its own
    may read them too, so that it need not when it is asked."""

    sequence: Sequence
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A chain of proposed tokens, maybe none."""

    token_ids: tuple[int, ...] = ()
    """The same on every rank of the target axis."""
    probs_PV: Tensor | None = None
    """Row i is the distribution the i-th token was drawn from, where that matters to verification
    (`rejection`); on rank 0 only."""


class Drafter(Protocol):
    """Called in lockstep on every rank, every request's state being in its `Sequence`."""

    def describe(self) -> str:
        """A few words for a person."""

    def propose(self, asks: Many[Ask], readings: Many[Reading]) -> tuple[list[Draft], StageTimes]:
        """A draft per ask, in order, and where the time went (without `verify_ms`)."""

    def verified(self, sequence: Sequence, *, num_drafted: int, num_accepted: int) -> None:
        """The target kept the first `num_accepted` of the tokens drafted for a request. Called
        before the round's tokens are committed."""

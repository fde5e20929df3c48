"""What every drafter is to the worker: something that proposes tokens for the requests of a step and
learns what became of them."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from paceline.runtime.sequence import Sequence
from paceline.runtime.spec.tree import DraftTree
from paceline.runtime.types import (
    AS_CONFIGURED,
    DraftForm,
    DraftShape,
    ScheduledRequest,
    StageTimes,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """At most `num_tokens`, at least 1, tokens to follow all committed ones of a request."""

    sequence: Sequence
    num_tokens: int
    tree: DraftShape | None = None
    """How they may branch, `num_tokens` deep; a drafter that does not branch drafts a chain."""
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
    """Proposed tokens, maybe none: a chain or a tree."""

    token_ids: tuple[int, ...] = ()
    """The same on every rank of the target axis; of a tree by node."""
    tree: DraftTree | None = None
    """None for a chain."""
    rows: tuple[int, ...] = ()
    """Of a tree, by node: the place of its KV among the slots after the committed tokens' in the
    drafter's cache; -1 for a node that the drafter has not read."""
    probs_PV: Tensor | None = None
    """Row i is the distribution that the i-th token of a chain, or the children of node i - 1 of a
    tree, were drawn from, where that matters to verification (`rejection`); on rank 0 only."""


def draft_words(draft: Draft) -> tuple[int, ...]:
    """A draft as numbers, to be told to other ranks; without its distributions."""
    if draft.tree is None:
        return draft.token_ids
    return (*draft.token_ids, *draft.tree.parents, *draft.rows)


def most_words(scheduled: ScheduledRequest) -> int:
    """How many numbers the draft that a plan asks for can have, at most."""
    tree = scheduled.tree
    return scheduled.num_draft_tokens if tree is None else 3 * tree.nodes


def read_words(words: Many[int], *, branches: bool, probs_PV: Tensor | None) -> Draft:
    """The draft that `draft_words` told of; whether it branches, the plan knows."""
    if not branches:
        return Draft(token_ids=tuple(words), probs_PV=probs_PV)
    count = len(words) // 3
    token_ids, parents, rows = (tuple(words[i * count : (i + 1) * count]) for i in range(3))
    tree = DraftTree(token_ids, parents)
    return Draft(token_ids=token_ids, tree=tree, rows=rows, probs_PV=probs_PV)


class Drafter(Protocol):
    """Called in lockstep on every rank, every request's state being in its `Sequence`."""

    def describe(self) -> str:
        """A few words for a person."""

    def propose(
        self, asks: Many[Ask], readings: Many[Reading], form: DraftForm = AS_CONFIGURED
    ) -> tuple[list[Draft], StageTimes]:
        """A draft per ask, in order, and where the time went (without `verify_ms`)."""

    def verified(self, sequence: Sequence, *, num_drafted: int, num_accepted: int) -> None:
        """The target kept the first `num_accepted` of the tokens drafted for a request, of a tree so
        many levels of `num_drafted`. Called before the round's tokens are committed."""

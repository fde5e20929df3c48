"""Three schedules of drafting and verifying, played through: what becomes of tokens, and who does what when.

    lockstep     ranks   | draft A      | verify A     | draft A      | verify A     |
    interleaved  ranks   | draft A, verify B | draft B, verify A | draft A, verify B |      two halves of the batch
    ahead        target  | verify    | verify    | verify    |      takes whatever has been drafted by then
                 drafter | d | d | d | d | d | d | d | d | d |      goes on from its own drafts until they prove wrong

In lockstep and interleaved a round is always the same: their tokens are known in closed form. Ahead is simulated: which
drafts are there when a pass of the target begins depends on which were right before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from paceline.runtime.costmodel.tree import Chances, Tree, round_values

Schedule = Literal["lockstep", "interleaved", "ahead"]

_TIE_S = 1e-9
"""Passes of drafter and target that end no further apart hear of each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """What is drafted, and how likely it is kept."""

    exact: Chances
    """Of the children of a node that went through the drafter's layers in turn; one chance: a chain."""
    grouped: Chances
    """Likewise, through layers side by side."""
    depth: int
    """Passes of the drafter per round; ahead: for which there is room at most between two passes of the target."""
    width: int = 1
    """Nodes that each of them forwards."""
    nodes: int
    """Most that the target checks at once."""

    @property
    def round_tokens(self) -> float:
        """That a round emits on average if all drafts are made, then all checked."""
        values = round_values(
            self.exact, self.grouped, depth=self.depth, width=self.width, nodes=self.nodes
        )
        return 1.0 + sum(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Seconds that each stage takes for the sequences of one pass."""

    first_s: float
    """The drafter's exact pass over what it has not seen, which gives the first draft."""
    later_s: float
    """Each pass after it."""
    verify_s: float
    """The target's pass over one token and `nodes` drafts of each sequence."""
    plain_s: float
    """Its pass over one token of each."""
    telling_s: float
    """Between two passes of the target: schedule, tell the ranks, hear from them."""

    def drafting_s(self, depth: int) -> float:
        return self.first_s + (depth - 1) * self.later_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stage on a rank; the row of a time line."""

    rank: int
    stage: str
    start_ms: float
    end_ms: float
    group: int
    """Which requests: the half of the batch; 0 where it is not halved."""


@dataclass(slots=True)
class Lanes:
    """Spans of ranks, as they are added."""

    target: Sequence[int] = ()
    """Its ranks."""
    drafter: Sequence[int] = ()
    spans: list[Span] = field(default_factory=list)

    def add(self, stage: str, start_s: float, seconds: float, *, group: int = 0) -> float:
        """Returns the end."""
        ranks = self.target if stage == "verify" else self.drafter
        start_ms, end_ms = 1e3 * start_s, 1e3 * (start_s + seconds)
        self.spans += [
            Span(rank=rank, stage=stage, start_ms=start_ms, end_ms=end_ms, group=group)
            for rank in ranks
        ]
        return start_s + seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What came of drafting ahead, of all sequences together."""

    seconds: float
    tokens: int
    passes: int
    """Of the target."""
    exact_s: float
    """Of the drafter's exact passes."""
    grouped_s: float
    """Of its others."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def ahead(
    stages: Stages,
    drafts: Drafts,
    *,
    batch: int,
    passes: int,
    seed: int = 0,
    lanes: Lanes | None = None,
) -> Ahead:
    """Drafter and target on ranks of their own, until the target has done so many passes.

    Neither waits for the other. A sequence without drafts is decoded plainly; one whose tree is full is left alone by
    the drafter. After a mismatch the drafter's next pass is the exact one, for all sequences of that pass. What PEARL
    calls pre-verify and post-verify (arXiv 2408.11850) are two cases of this: no drafts yet, and drafts beyond those
    checked.
    """
    rng = random.Random(seed)
    trees = [Tree(drafts.exact, drafts.grouped, rng) for _ in range(batch)]
    # what the target checks, as much again, and its own token between
    room = drafts.width * (2 * drafts.depth + 1)
    lanes = lanes or Lanes()
    tokens = done = 0
    exact_s = grouped_s = now_s = 0.0
    drafter_at, target_at = float("inf"), 0.0
    is_exact = is_verifying = False

    def draft() -> float:
        """Begin a pass; when it ends."""
        nonlocal is_exact, exact_s, grouped_s
        free = [tree for tree in trees if tree.num_forwarded < room]
        if not free:
            return float("inf")
        is_exact = any(tree.is_behind for tree in free)
        for tree in free:
            tree.forward(drafts.width)
        if is_exact:
            exact_s += stages.first_s
            return lanes.add("calibrate", now_s, stages.first_s)
        grouped_s += stages.later_s
        return lanes.add("draft", now_s, stages.later_s)

    def verify() -> float:
        """Begin a pass; when its result is known and the next may begin."""
        count = sum(tree.check(drafts.nodes) for tree in trees)
        share = count / (batch * drafts.nodes)
        seconds = stages.plain_s + share * (stages.verify_s - stages.plain_s)
        return lanes.add("verify", now_s, seconds) + stages.telling_s

    while done < passes:
        now_s = max(
            at for at in (drafter_at, target_at) if at <= min(drafter_at, target_at) + _TIE_S
        )
        if landed := drafter_at <= now_s:
            for tree in trees:
                tree.land(exact=is_exact)
        if settled := target_at <= now_s:
            tokens += sum(tree.settle() for tree in trees) if is_verifying else 0
            done += is_verifying
            is_verifying = True
        if landed or drafter_at == float("inf"):
            drafter_at = draft()
        if settled:
            target_at = verify()
    return Ahead(
        seconds=now_s,
        tokens=tokens,
        passes=done,
        exact_s=exact_s,
        grouped_s=grouped_s,
    )


def draw_lockstep(stages: Stages, drafts: Drafts, *, rounds: int, lanes: Lanes) -> None:
    """Add the spans of so many rounds."""
    now_s = 0.0
    for _ in range(rounds):
        now_s = lanes.add("calibrate", now_s, stages.first_s)
        for _ in range(drafts.depth - 1):
            now_s = lanes.add("draft", now_s, stages.later_s)
        now_s = lanes.add("verify", now_s, stages.verify_s) + stages.telling_s


def draw_interleaved(
    stages: Stages, drafts: Drafts, *, together_s: float, rounds: int, lanes: Lanes
) -> None:
    """Add the spans of so many rounds of two halves of the batch. While one half is verified the other is drafted for,
    which takes `together_s`: both are drawn slower by as much as the longer of the two is."""
    slower = together_s / max(stages.verify_s, stages.drafting_s(drafts.depth))
    for slot in range(2 * rounds):
        start_s = slot * (together_s + stages.telling_s)
        if slot > 0:
            lanes.add("verify", start_s, slower * stages.verify_s, group=(slot + 1) % 2)
        now_s = lanes.add("calibrate", start_s, slower * stages.first_s, group=slot % 2)
        for _ in range(drafts.depth - 1):
            now_s = lanes.add("draft", now_s, slower * stages.later_s, group=slot % 2)

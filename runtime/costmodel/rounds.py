"""A round of speculation in lockstep: drafting, verifying, telling; and the way of drafting that gives most tokens.

    round = exact pass of the drafter  +  (n - 1) grouped passes  +  the target's pass over 1 + n tokens  +  telling

The exact pass is calibration and first draft in one. All sequences of a batch share every pass. Of a tree, n is the
depth, a grouped pass forwards its `width` of nodes, and the target's goes over 1 + `nodes` tokens. The other schedules:
`schedules.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from paceline.parallel.layer import Groups, layer_groups
from paceline.runtime.costmodel.acceptance import KEPT
from paceline.runtime.costmodel.memory import Held, RankMemory, held, rank_memory
from paceline.runtime.costmodel.passes import Load, Machine, Pass, split_pass, whole_pass
from paceline.runtime.costmodel.shapes import Shape
from paceline.runtime.costmodel.simulate import Drafts, Schedule
from paceline.runtime.costmodel.tree import MOST_CHILDREN, child_chances

MOST_DRAFTS = 16
"""Longer drafts are not looked at: hardly any pair keeps so many."""
Placement = Literal["tensor", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """A way to draft, in the words of `speculative_config`."""

    num_speculative_tokens: int
    """Of a tree, its depth."""
    layer_parallel_size: int
    draft_tensor_parallel_size: int
    """Ahead, ranks that are the drafter's alone."""
    placement: Placement = "tensor"
    schedule: Schedule = "lockstep"
    tree_width: int = 1
    """1: a chain."""
    tree_nodes: int | None = None
    """Most that are verified at once; None: a chain's own length."""

    @property
    def is_tree(self) -> bool:
        return self.tree_width > 1

    @property
    def num_nodes(self) -> int:
        return self.num_speculative_tokens if self.tree_nodes is None else self.tree_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is asked: models, GPUs, load."""

    target: Shape
    drafter: Shape | None
    machine: Machine
    ranks: int
    """Of the target; where the drafter has ranks of its own, of both together."""
    batch: int
    """Sequences written side by side."""
    context: int
    """Tokens of each, prompt and text together, at its longest."""
    acceptance: float
    """Chance that a draft of the exact drafter is kept if all before it were."""
    utilization: float

    def load(self, rows_each: float) -> Load:
        rows = rows_each * self.batch
        return Load(rows=rows, sequences=self.batch, context=self.context, outputs=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Seconds of a round by stage, and what it gives."""

    exact_s: float
    grouped_s: float
    """Of all grouped passes together."""
    verify_s: float
    telling_s: float
    """Sending drafts and verdicts to the other ranks, and the step's own overhead."""
    tokens: float
    """That each sequence gains, on average."""
    overlapped_s: float = 0.0
    """Of these, what runs beside another stage; below zero where sharing a device costs more than it saves."""

    @property
    def drafting_s(self) -> float:
        return self.exact_s + self.grouped_s

    @property
    def total_s(self) -> float:
        return self.drafting_s + self.verify_s + self.telling_s - self.overlapped_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A way to draft and what came of it. `drafting` is None without speculation."""

    drafting: Drafting | None
    round: Round
    memory: RankMemory
    tokens_per_s: float
    """Of the whole batch."""


def evaluate(setting: Setting, drafting: Drafting | None) -> Choice:
    """Time, memory and speed of one way to draft, in lockstep."""
    made = _plain_round(setting) if drafting is None else _round(setting, drafting)
    return Choice(
        drafting=drafting,
        round=made,
        memory=engine_memory(setting, drafting),
        tokens_per_s=setting.batch * made.tokens / made.total_s,
    )


def engine_memory(setting: Setting, drafting: Drafting | None) -> RankMemory:
    """Of the fullest rank."""
    drafter = None
    if drafting is not None:
        assert setting.drafter is not None, "expected a drafter to draft with"
        drafter = _drafter_part(setting.drafter, drafting)
    return rank_memory(
        held(setting.target, ranks=setting.ranks),
        drafter,
        gpu_bytes=setting.machine.gpu.memory_bytes,
        utilization=setting.utilization,
    )


def choices(
    setting: Setting,
    *,
    sizes: Sequence[int] = tuple(KEPT),
    draft_ranks: Sequence[int],
    lengths: Iterable[int] = range(1, MOST_DRAFTS + 1),
    placements: Sequence[Placement] = ("tensor", "layer"),
) -> list[Choice]:
    """Every way to draft among those given that leaves room for the batch's KV, the fastest first."""
    found = [
        evaluate(setting, drafting)
        for drafting in _drafting_ways(sizes, draft_ranks, tuple(lengths), placements)
    ]
    needed = setting.batch * setting.context
    fitting = [choice for choice in found if choice.memory.kv_tokens >= needed]
    return sorted(fitting, key=lambda choice: -choice.tokens_per_s)


def _drafting_ways(
    sizes: Sequence[int],
    draft_ranks: Sequence[int],
    lengths: Sequence[int],
    placements: Sequence[Placement],
) -> Iterable[Drafting]:
    for size in sizes:
        for ranks in draft_ranks:
            for placement in placements:
                if placement == "layer" and min(size, ranks) == 1:
                    continue  # nothing to place, or nowhere: as `tensor` on one rank, or worse
                for length in lengths:
                    yield Drafting(
                        num_speculative_tokens=length,
                        layer_parallel_size=size,
                        draft_tensor_parallel_size=ranks,
                        placement=placement,
                    )


def _plain_round(setting: Setting) -> Round:
    machine = setting.machine
    verify = split_pass(setting.target, setting.load(1), machine=machine, ranks=setting.ranks)
    telling_s = machine.execution.step_s + machine.all_reduce_s(0, ranks=setting.ranks)
    return Round(
        exact_s=0.0, grouped_s=0.0, verify_s=verify.total_s, telling_s=telling_s, tokens=1.0
    )


def _round(setting: Setting, drafting: Drafting) -> Round:
    tokens = drafts_of(setting, drafting).round_tokens
    exact = draft_pass(setting, drafting, rows_each=tokens, exact=True)
    grouped = draft_pass(setting, drafting, rows_each=drafting.tree_width, exact=False)
    return Round(
        exact_s=exact.total_s,
        grouped_s=(drafting.num_speculative_tokens - 1) * grouped.total_s,
        verify_s=verify_pass(setting, drafting.num_nodes, ranks=setting.ranks).total_s,
        telling_s=telling_s(setting, drafting),
        tokens=tokens,
    )


def telling_s(setting: Setting, drafting: Drafting) -> float:
    """Of a round: the step's own overhead, each draft and the verdict to the other ranks."""
    machine, ranks = setting.machine, drafting.draft_tensor_parallel_size
    return machine.execution.step_s + (
        drafting.num_speculative_tokens * machine.all_reduce_s(0, ranks=ranks)
        + machine.all_reduce_s(0, ranks=max(setting.ranks, ranks))
    )


def drafts_of(setting: Setting, drafting: Drafting) -> Drafts:
    """What is drafted and how likely it is kept. With layers side by side only what comes of the exact pass is as
    likely as the setting says."""
    chance, count = setting.acceptance, MOST_CHILDREN if drafting.is_tree else 1
    return Drafts(
        exact=child_chances(chance, count),
        grouped=child_chances(chance * KEPT[drafting.layer_parallel_size], count),
        depth=drafting.num_speculative_tokens,
        width=drafting.tree_width,
        nodes=drafting.num_nodes,
    )


def verify_pass(setting: Setting, num_drafts: float, *, ranks: int) -> Pass:
    """The target's, over one token and so many drafts of each sequence."""
    load = setting.load(1 + num_drafts)
    return split_pass(setting.target, load, machine=setting.machine, ranks=ranks)


def draft_pass(setting: Setting, drafting: Drafting, *, rows_each: float, exact: bool) -> Pass:
    """One pass of the drafter, its layers in turn or side by side."""
    drafter, ranks = setting.drafter, drafting.draft_tensor_parallel_size
    assert drafter is not None, "expected a drafter to draft with"
    load, machine = setting.load(rows_each), setting.machine
    groups = None if exact else _groups(drafter, drafting)
    if drafting.placement == "layer":
        if groups is None:  # every rank runs all of it, and they need not talk
            return split_pass(drafter, load, machine=machine, ranks=1)
        return whole_pass(drafter, load, machine=machine, ranks=ranks, groups=groups)
    return split_pass(drafter, load, machine=machine, ranks=ranks, groups=groups)


def _drafter_part(drafter: Shape, drafting: Drafting) -> Held:
    if drafting.placement == "layer":
        return held(drafter, ranks=1)
    groups = _groups(drafter, drafting)
    return held(drafter, ranks=drafting.draft_tensor_parallel_size, groups=groups)


def _groups(drafter: Shape, drafting: Drafting) -> Groups:
    return layer_groups(drafter.num_layers, size=drafting.layer_parallel_size)

"""A round of speculation: drafting, verifying, telling; and which way of drafting gives most tokens per second.

    round = exact pass of the drafter  +  (n - 1) grouped passes  +  the target's pass over 1 + n tokens  +  telling

The exact pass is calibration and first draft in one. All sequences of a batch share every pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from paceline.parallel.layer import Groups, layer_groups
from paceline.runtime.costmodel.acceptance import KEPT, layer_parallel_chances, round_tokens
from paceline.runtime.costmodel.memory import Held, RankMemory, held, rank_memory
from paceline.runtime.costmodel.passes import Load, Machine, split_pass, whole_pass
from paceline.runtime.costmodel.shapes import Shape

MOST_DRAFTS = 16
"""Longer drafts are not looked at: hardly any pair keeps so many."""
Placement = Literal["tensor", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """A way to draft, in the words of `speculative_config`."""

    num_speculative_tokens: int
    layer_parallel_size: int
    draft_tensor_parallel_size: int
    placement: Placement = "tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is asked: models, GPUs, load."""

    target: Shape
    drafter: Shape | None
    machine: Machine
    ranks: int
    """Of the target."""
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

    @property
    def drafting_s(self) -> float:
        return self.exact_s + self.grouped_s

    @property
    def total_s(self) -> float:
        return self.drafting_s + self.verify_s + self.telling_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A way to draft and what came of it. `drafting` is None without speculation."""

    drafting: Drafting | None
    round: Round
    memory: RankMemory
    tokens_per_s: float
    """Of the whole batch."""


def evaluate(setting: Setting, drafting: Drafting | None) -> Choice:
    """Time, memory and speed of one way to draft."""
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
    assert setting.drafter is not None, "expected a drafter to draft with"
    machine, length = setting.machine, drafting.num_speculative_tokens
    size = drafting.layer_parallel_size
    tokens = round_tokens(layer_parallel_chances(setting.acceptance, length, size=size))
    exact_s = draft_pass_s(setting, drafting, rows_each=tokens, exact=True)
    grouped_s = draft_pass_s(setting, drafting, rows_each=1, exact=False)
    verify = split_pass(
        setting.target, setting.load(1 + length), machine=machine, ranks=setting.ranks
    )
    world = max(setting.ranks, drafting.draft_tensor_parallel_size)
    telling_s = machine.execution.step_s + (
        length * machine.all_reduce_s(0, ranks=drafting.draft_tensor_parallel_size)
        + machine.all_reduce_s(0, ranks=world)
    )
    return Round(
        exact_s=exact_s,
        grouped_s=(length - 1) * grouped_s,
        verify_s=verify.total_s,
        telling_s=telling_s,
        tokens=tokens,
    )


def draft_pass_s(setting: Setting, drafting: Drafting, *, rows_each: float, exact: bool) -> float:
    """One pass of the drafter, its layers in turn or side by side."""
    drafter, ranks = setting.drafter, drafting.draft_tensor_parallel_size
    assert drafter is not None, "expected a drafter to draft with"
    load, machine = setting.load(rows_each), setting.machine
    groups = None if exact else _groups(drafter, drafting)
    if drafting.placement == "layer":
        if groups is None:  # every rank runs all of it, and they need not talk
            return split_pass(drafter, load, machine=machine, ranks=1).total_s
        return whole_pass(drafter, load, machine=machine, ranks=ranks, groups=groups).total_s
    return split_pass(drafter, load, machine=machine, ranks=ranks, groups=groups).total_s


def _drafter_part(drafter: Shape, drafting: Drafting) -> Held:
    if drafting.placement == "layer":
        return held(drafter, ranks=1)
    groups = _groups(drafter, drafting)
    return held(drafter, ranks=drafting.draft_tensor_parallel_size, groups=groups)


def _groups(drafter: Shape, drafting: Drafting) -> Groups:
    return layer_groups(drafter.num_layers, size=drafting.layer_parallel_size)

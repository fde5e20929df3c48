"""The best way to draft on each schedule, as a chain and as a tree.

Lockstep and interleaved have closed forms, so that all that is looked at is worked out. Ahead must be simulated: closed
forms of drafter and target in step choose the few that are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from paceline.runtime.costmodel.acceptance import KEPT, parallel_tokens
from paceline.runtime.costmodel.rounds import (
    MOST_DRAFTS,
    Choice,
    Drafting,
    Setting,
    drafts_of,
    evaluate,
)
from paceline.runtime.costmodel.schedules import evaluate_ahead, evaluate_interleaved, stages_of

TREE_WIDTHS = (4, 8)
TREE_NODES = (8, 16, 32, 64)
MOST_LEVELS = 8
"""Of trees, what is looked at."""
MOST_ROWS = 512
"""No trees where the target's pass would have more: arithmetic costs there, and chains are what remains."""


def best_tree(setting: Setting, like: Iterable[Drafting], lengths: Sequence[int]) -> Choice | None:
    """In lockstep: the best tree, its layers and ranks those of one of the chains in `like`."""
    ways = [
        replace(chain, num_speculative_tokens=depth, tree_width=width, tree_nodes=nodes)
        for chain in like
        for depth in lengths
        if 1 < depth <= MOST_LEVELS
        for width in TREE_WIDTHS
        for nodes in _tree_nodes(setting)
    ]
    return _fastest(setting, [evaluate(setting, way) for way in ways])


def best_interleaved(
    setting: Setting, like: Iterable[Drafting], lengths: Sequence[int]
) -> Choice | None:
    """The best chain for halves of the batch; None for a single sequence."""
    if setting.batch < 2:
        return None
    ways = [
        replace(chain, num_speculative_tokens=length, schedule="interleaved")
        for chain in like
        for length in lengths
    ]
    return _fastest(setting, [evaluate_interleaved(setting, way) for way in ways])


def best_ahead(
    setting: Setting, *, draft_ranks: Sequence[int], sizes: Sequence[int], lengths: Sequence[int]
) -> list[Choice]:
    """The best chain and the best tree, as far as there are ranks for both models."""
    chains = [
        way
        for ranks in draft_ranks
        if ranks < setting.ranks
        for size in sizes
        for way in _balanced(
            setting,
            Drafting(
                num_speculative_tokens=1,
                layer_parallel_size=size,
                draft_tensor_parallel_size=ranks,
                schedule="ahead",
            ),
            lengths,
        )
    ]
    trees = [
        way
        for chain in _leaders(setting, chains, 2)
        for width in TREE_WIDTHS
        for nodes in _tree_nodes(setting)
        for way in _balanced(setting, replace(chain, tree_width=width, tree_nodes=nodes), lengths)
    ]
    found = [
        _fastest(setting, [evaluate_ahead(setting, way) for way in _leaders(setting, ways, count)])
        for ways, count in ((chains, 2), (trees, 1))
    ]
    return [choice for choice in found if choice is not None]


def _tree_nodes(setting: Setting) -> list[int]:
    return [nodes for nodes in TREE_NODES if setting.batch * (1 + nodes) <= MOST_ROWS]


def _balanced(setting: Setting, like: Drafting, lengths: Sequence[int]) -> list[Drafting]:
    """As long as the drafter takes for them just less, and just more, than the target for a pass."""
    stages = stages_of(setting, like)
    ratio = (stages.verify_s + stages.telling_s) / stages.later_s
    wanted = {max(1, min(MOST_DRAFTS, whole)) for whole in (math.floor(ratio), math.ceil(ratio))}
    return [
        replace(like, num_speculative_tokens=length)
        for length in sorted(wanted & set(lengths)) or [lengths[-1]]
    ]


def _leaders(setting: Setting, ways: Iterable[Drafting], count: int) -> list[Drafting]:
    """Those that drafter and target in step would make fastest."""

    def speed(way: Drafting) -> float:
        stages, drafts = stages_of(setting, way), drafts_of(setting, way)
        period_s = max(
            stages.verify_s + stages.telling_s, way.num_speculative_tokens * stages.later_s
        )
        if way.is_tree:
            return drafts.round_tokens / period_s
        chance = setting.acceptance * KEPT[way.layer_parallel_size]
        return parallel_tokens(chance, way.num_speculative_tokens) / period_s

    return sorted(ways, key=speed, reverse=True)[:count]


def _fastest(setting: Setting, found: Iterable[Choice]) -> Choice | None:
    """Of those with room for the batch's KV."""
    needed = setting.batch * setting.context
    fitting = [choice for choice in found if choice.memory.kv_tokens >= needed]
    return max(fitting, key=lambda choice: choice.tokens_per_s, default=None)

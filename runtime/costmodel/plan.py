"""A whole plan: how a pair of models is best run on given GPUs, and what is to be expected of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from paceline.runtime.costmodel.acceptance import KEPT
from paceline.runtime.costmodel.memory import RankMemory
from paceline.runtime.costmodel.rounds import (
    MOST_DRAFTS,
    Choice,
    Drafting,
    Placement,
    Setting,
    choices,
    engine_memory,
    evaluate,
)
from paceline.runtime.costmodel.schedules import target_ranks
from paceline.runtime.costmodel.search import best_ahead, best_interleaved, best_tree
from paceline.runtime.costmodel.simulate import Schedule
from paceline.runtime.costmodel.transfers import Apart, apart
from paceline.runtime.errors import ConfigError

T = TypeVar("T")

WORTHWHILE = 1.05
"""Less than that is within what the model does not know: the simpler way is advised."""
LAYOUTS = 3
"""Layer-parallel size and draft ranks of so many chains are tried for trees and halves too."""
NEEDS: dict[Schedule, str] = {
    "lockstep": "a drafter",
    "interleaved": "a batch of two and placement tensor",
    "ahead": "ranks for both models, room for the KV on each, and placement tensor",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a user has fixed of how to draft; None leaves it open."""

    num_speculative_tokens: int | None = None
    layer_parallel_size: int | None = None
    draft_tensor_parallel_size: int | None = None
    placement: Placement | None = None
    schedule: Schedule | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Ways to draft, compared."""

    plain: Choice
    """Without a drafter."""
    ways: tuple[Choice, ...]
    """Chains in lockstep: the best of each layer-parallel size and placement; none without a drafter."""
    schedules: tuple[Choice, ...]
    """The advised one of these first, then the best tree, and the best of each other schedule."""
    best: Choice
    apart: Apart

    @property
    def speedup(self) -> float:
        """Of the best way over no speculation."""
        return self.best.tokens_per_s / self.plain.tokens_per_s


def make_plan(
    setting: Setting, wish: Wish, *, prompt: int, output: int, chunk: int, num_engines: int
) -> Plan:
    """Raises ConfigError where the models and the KV of the batch do not fit the GPUs, and for a wish that no way to
    draft fulfils."""
    if setting.drafter is None and wish != Wish():
        raise ConfigError("how to draft was given, but no --speculative-model")
    plain = evaluate(setting, None)
    check_fits(setting, plain.memory)
    ways: list[Choice] = []
    schedules: list[Choice] = []
    if setting.drafter is not None:
        found = _chains(setting, wish)
        ways = _best_of_each(found)
        schedules = [_advised(plain, ways) or found[0], *_others(setting, wish, found)]
    allowed = [
        choice
        for choice in schedules
        if is_served(choice) and wish.schedule in (None, _drafting(choice).schedule)
    ]
    if schedules and not allowed:
        raise ConfigError(
            f"nothing to run {wish.schedule}: it needs {NEEDS[wish.schedule or 'lockstep']}"
        )
    best = plain
    for choice in allowed:  # from simple to less so
        if choice.tokens_per_s > WORTHWHILE * best.tokens_per_s:
            best = choice
    return Plan(
        plain=plain,
        ways=tuple(ways),
        schedules=tuple(schedules),
        best=best,
        apart=apart(
            _of_target(setting, best),
            best,
            prompt=prompt,
            output=output,
            chunk=chunk,
            num_engines=num_engines,
        ),
    )


def _chains(setting: Setting, wish: Wish) -> list[Choice]:
    """In lockstep, the fastest first."""
    found = choices(
        setting,
        sizes=_or(wish.layer_parallel_size, tuple(KEPT)),
        draft_ranks=_or(wish.draft_tensor_parallel_size, _powers(setting.ranks)),
        lengths=_or(wish.num_speculative_tokens, range(1, MOST_DRAFTS + 1)),
        placements=_or(wish.placement, ("tensor", "layer")),
    )
    if not found:
        check_fits(setting, _smallest(setting, wish))
        raise ConfigError("placement layer needs several draft ranks and layers side by side")
    return found


def _others(setting: Setting, wish: Wish, chains: Sequence[Choice]) -> list[Choice]:
    """The best of what is not a chain in lockstep. Layer-parallel sizes and draft ranks are those of the best chains
    where ranks are shared."""
    if wish.placement == "layer":
        return []
    lengths = _or(wish.num_speculative_tokens, range(1, MOST_DRAFTS + 1))
    layouts: dict[tuple[int, int], Drafting] = {}
    for choice in chains:
        drafting = _drafting(choice)
        if drafting.placement == "tensor":
            layout = (drafting.layer_parallel_size, drafting.draft_tensor_parallel_size)
            layouts.setdefault(layout, drafting)
    like = list(layouts.values())[:LAYOUTS]
    found = [best_tree(setting, like, lengths), best_interleaved(setting, like, lengths)]
    ahead = best_ahead(
        setting,
        draft_ranks=_or(wish.draft_tensor_parallel_size, _powers(setting.ranks)),
        sizes=_or(wish.layer_parallel_size, tuple(KEPT)),
        lengths=lengths,
    )
    return [choice for choice in (*found, *ahead) if choice is not None]


def is_served(choice: Choice) -> bool:
    """Whether Paceline runs it: trees are not drafted ahead."""
    drafting = choice.drafting
    return drafting is None or not (drafting.is_tree and drafting.schedule == "ahead")


def _drafting(choice: Choice) -> Drafting:
    assert choice.drafting is not None, "expected a way to draft"
    return choice.drafting


def _of_target(setting: Setting, choice: Choice) -> Setting:
    """With the ranks that the target has under this choice."""
    if choice.drafting is None:
        return setting
    return replace(setting, ranks=target_ranks(setting, choice.drafting))


def check_fits(setting: Setting, memory: RankMemory) -> None:
    """Raise ConfigError, saying what is too large, where the KV of the batch finds no room."""
    needed = setting.batch * setting.context
    if memory.kv_tokens >= needed:
        return
    gpu, weights = setting.machine.gpu, (memory.target + memory.drafter) / 1e9
    what = f"weights take {weights:.1f} GB of each {gpu.name} of {gpu.memory_bytes / 1e9:g} GB"
    if memory.kv_room > 0:
        what += f" and leave room for {memory.kv_tokens:,} tokens, not for {needed:,}"
    raise ConfigError(
        f"{what}: raise --tensor-parallel-size (now {setting.ranks}) or --gpus, or lower --context or --batch"
    )


def speculative_config(drafter: str, drafting: Drafting) -> str:
    """As `--speculative-config` takes it; what is the default is left out."""
    config: dict[str, str | int] = {
        "model": drafter,
        "num_speculative_tokens": drafting.num_speculative_tokens,
    }
    if drafting.schedule != "lockstep":
        config["schedule"] = drafting.schedule
    ranks = "draft_ranks" if drafting.schedule == "ahead" else "draft_tensor_parallel_size"
    config[ranks] = drafting.draft_tensor_parallel_size
    if drafting.is_tree:
        config |= {
            "tree": "beam",
            "tree_width": drafting.tree_width,
            "tree_nodes": drafting.num_nodes,
        }
    if drafting.layer_parallel_size > 1:
        config["layer_parallel_size"] = drafting.layer_parallel_size
    if drafting.placement != "tensor":
        config["placement"] = drafting.placement
    return json.dumps(config)


def _or(wished: T | None, all_of_them: Sequence[T]) -> Sequence[T]:
    return all_of_them if wished is None else (wished,)


def _powers(ranks: int) -> list[int]:
    """1, 2, 4, ... and all ranks."""
    return sorted({2**i for i in range(ranks.bit_length()) if 2**i <= ranks} | {ranks})


def _best_of_each(found: Sequence[Choice]) -> list[Choice]:
    """`found` is sorted by speed."""
    best: dict[tuple[int, str], Choice] = {}
    for choice in found:
        drafting = _drafting(choice)
        best.setdefault((drafting.layer_parallel_size, drafting.placement), choice)
    return [best[key] for key in sorted(best, key=lambda key: (key[1] != "tensor", key[0]))]


def _advised(plain: Choice, ways: Sequence[Choice]) -> Choice | None:
    """The fastest, unless something simpler is about as fast; None where none is worth it."""
    best = plain
    for way in sorted(ways, key=_simplicity):
        if way.tokens_per_s > WORTHWHILE * best.tokens_per_s:
            best = way
    return None if best is plain else best


def _simplicity(choice: Choice) -> tuple[bool, int]:
    drafting = _drafting(choice)
    return (drafting.placement != "tensor", drafting.layer_parallel_size)


def _smallest(setting: Setting, wish: Wish) -> RankMemory:
    """Of all ways to draft, the one that takes least memory."""
    drafting = Drafting(
        num_speculative_tokens=1,
        layer_parallel_size=wish.layer_parallel_size or 1,
        draft_tensor_parallel_size=wish.draft_tensor_parallel_size or setting.ranks,
        placement=wish.placement or "tensor",
    )
    return engine_memory(setting, drafting)

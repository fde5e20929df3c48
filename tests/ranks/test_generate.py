"""Whole engines on several ranks: the text is the target's own, whatever drafts it and wherever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.ranks import jobs
from tests.ranks.pool import RankPool

from paceline.runtime.types import KvPolicyName, SamplingParams

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SHORT = SamplingParams(temperature=0.0, max_tokens=12)
SAMPLED = SamplingParams(temperature=0.9, top_k=20, max_tokens=12, seed=3)


def settings(tiny: Callable[..., Path], **speculative: Any) -> dict[str, Any]:
    drafter = str(tiny(seed=0, noise=0.03))
    return {
        "model": str(tiny(seed=0)),
        "dtype": "float32",
        "max_num_seqs": 8,
        "speculative_config": {
            "model": drafter,
            "num_speculative_tokens": 4,
            "draft_length": "fixed",
            **speculative,
        },
    }


def plain(tiny: Callable[..., Path]) -> dict[str, Any]:
    return {**settings(tiny), "speculative_config": None}


def texts(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["token_ids"] for answer in answers]


@pytest.mark.parametrize("placement", ["tensor", "layer"])
@pytest.mark.parametrize("policy", ["attention", "block"])
@pytest.mark.parametrize("calibration", ["every_round", "on_mismatch", "never"])
def test_greedy_text_is_the_targets_own_on_two_ranks(
    tiny: Callable[..., Path],
    two_ranks: RankPool,
    placement: str,
    policy: str,
    calibration: str,
) -> None:
    expected = two_ranks.run(jobs.generate, plain(tiny), PROMPTS, GREEDY)[0]
    given = settings(
        tiny,
        layer_parallel_size=2,
        placement=placement,
        layer_parallel_policy=policy,
        calibration=calibration,
    )
    found = two_ranks.run(jobs.generate, given, PROMPTS, GREEDY)
    assert texts(found[0]) == texts(expected)
    assert found[0] == found[1], "every rank is told the same"
    assert sum(answer["accepted"] for answer in found[0]) > 0, (
        "a drafter that is never right proves nothing"
    )


def test_placements_draft_the_same_tokens(tiny: Callable[..., Path], two_ranks: RankPool) -> None:
    accepted = []
    for placement in ("tensor", "layer"):
        given = settings(tiny, layer_parallel_size=2, placement=placement)
        accepted.append(two_ranks.run(jobs.generate, given, PROMPTS, GREEDY)[0])
    assert accepted[0] == accepted[1]


@pytest.mark.parametrize(("target", "draft"), [(4, 4), (4, 1), (4, 2), (1, 4), (2, 4)])
def test_target_and_drafter_have_independent_sizes(
    tiny: Callable[..., Path], four_ranks: RankPool, target: int, draft: int
) -> None:
    given = settings(tiny, layer_parallel_size=2)
    expected = four_ranks.run(jobs.generate, plain(tiny), PROMPTS[:1], SHORT)[0]
    for answers in four_ranks.run(
        jobs.generate, given, PROMPTS[:1], SHORT, target_size=target, draft_size=draft
    ):
        assert texts(answers) == texts(expected)


def test_sampled_text_depends_on_the_seed_not_on_the_number_of_ranks(
    tiny: Callable[..., Path], two_ranks: RankPool, four_ranks: RankPool
) -> None:
    given = settings(tiny, layer_parallel_size=2)
    two = two_ranks.run(jobs.generate, given, PROMPTS, SAMPLED)[0]
    four = four_ranks.run(jobs.generate, given, PROMPTS, SAMPLED)[0]
    alone = two_ranks.run(jobs.generate, given, PROMPTS[:1], SAMPLED)[0]
    assert texts(two) == texts(four)
    assert texts(alone)[0] == texts(two)[0]


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
@pytest.mark.parametrize("method", ["draft_model", "combined"])
def test_every_rank_follows_the_one_that_decides(
    tiny: Callable[..., Path], two_ranks: RankPool, method: str, verification: str
) -> None:
    """Penalties and log-probabilities are known to rank 0 alone."""
    params = SamplingParams(
        temperature=0.9, max_tokens=12, seed=3, logprobs=1, presence_penalty=0.5
    )
    given = settings(tiny, layer_parallel_size=2, method=method, verification=verification)
    found = two_ranks.run(jobs.generate, given, PROMPTS, params)
    assert texts(found[0]) == texts(found[1])
    if verification == "coupled":
        expected = two_ranks.run(jobs.generate, plain(tiny), PROMPTS, params)[0]
        assert texts(found[0]) == texts(expected)


@pytest.mark.parametrize(
    ("tree", "verification", "placement", "target"),
    [
        ("beam", "coupled", "tensor", 2),
        ("beam", "coupled", "layer", 1),
        ("dynamic", "rejection", "layer", 2),
        ("dynamic_threshold", "coupled", "tensor", 1),
    ],
)
def test_trees_are_the_same_on_every_rank(
    tiny: Callable[..., Path],
    two_ranks: RankPool,
    tree: str,
    verification: str,
    placement: str,
    target: int,
) -> None:
    """Rank 0 alone knows what is drafted; the KV of paths is moved on all of them."""
    params = SamplingParams(temperature=0.9, max_tokens=24, seed=3, presence_penalty=0.5)
    given = settings(
        tiny,
        layer_parallel_size=2,
        placement=placement,
        tree=tree,
        tree_width=5,
        tree_nodes=12,
        verification=verification,
    )
    found = two_ranks.run(jobs.generate, given, PROMPTS, params, target_size=target)
    assert found[0] == found[1]
    assert sum(answer["accepted"] for answer in found[0]) > 20
    if verification == "coupled":
        expected = two_ranks.run(jobs.generate, plain(tiny), PROMPTS, params)[0]
        assert texts(found[0]) == texts(expected)


@pytest.mark.parametrize("kv_policy", ["full", "sink_window"])
def test_preempted_requests_keep_their_texts_on_two_ranks(
    tiny: Callable[..., Path], two_ranks: RankPool, kv_policy: KvPolicyName
) -> None:
    params = SamplingParams(temperature=0.9, max_tokens=90, seed=3, kv_policy=kv_policy)
    prompts = [[i, *range(40)] for i in range(6)]
    given = {**settings(tiny, layer_parallel_size=2), "kv_window": 64}
    small = {**given, "kv_cache_memory": 300_000}
    expected = two_ranks.run(jobs.generate, given, prompts, params)[0]
    found = two_ranks.run(jobs.generate, small, prompts, params)[0]
    assert texts(found) == texts(expected)


def test_ranks_agree_on_the_blocks_that_fit_the_smallest(
    tiny: Callable[..., Path], two_ranks: RankPool
) -> None:
    # this rank's part of 6 layers: one KV head each, keys and values of 8 floats, 16 tokens
    each = 6 * 1 * 2 * 8 * 4 * 16
    assert two_ranks.run(jobs.num_blocks, plain(tiny)) == [500_000 // each] * 2

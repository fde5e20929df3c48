"""Whole engines on several ranks: the text is the target's own, whatever drafts it and wherever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.ranks import jobs
from tests.ranks.pool import RankPool

from paceline.runtime.types import SamplingParams

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SHORT = SamplingParams(temperature=0.0, max_tokens=12)
SAMPLED = SamplingParams(temperature=0.9, top_k=20, max_tokens=12, seed=3)


def settings(tiny: Callable[..., Path], **speculative: Any) -> dict[str, Any]:
    drafter = str(tiny(seed=0, noise=0.03))
    return {
        "model": str(tiny(seed=0)),
        "dtype": "float32",
        "speculative_config": {"model": drafter, "num_speculative_tokens": 4, **speculative},
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

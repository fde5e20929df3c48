"""Every path says the same three things."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.ranks import jobs
from tests.ranks.pool import RankPool


@pytest.mark.parametrize("fixture", ["two_ranks", "two_gloo_ranks", "four_ranks"])
def test_every_path_sums_gathers_and_tells(fixture: str, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue(fixture)
    size = pool.size
    for answer in pool.run(jobs.collectives):
        assert answer["sum"] == [[size * (size + 1) / 2] * 5] * 3
        assert answer["rows"] == [[[float(r), 2.0**23 + r]] for r in range(size)]
        assert answer["told"] == [7, 2**24 - 1, 0]
        assert answer["half"] == [size * (size + 1) / 2] * 4


@pytest.mark.parametrize("fixture", ["two_ranks", "four_ranks"])
def test_equal_logits_go_to_the_lowest_token_wherever_it_lives(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    for ids in request.getfixturevalue(fixture).run(jobs.best_of_ties):
        assert ids == [1, 0, 3]


@pytest.mark.parametrize(("fixture", "read"), [("two_ranks", "ab"), ("two_gloo_ranks", "none")])
def test_ranks_of_one_host_have_memory_in_common_and_leave_no_name(
    fixture: str, read: str, request: pytest.FixtureRequest
) -> None:
    pool: RankPool = request.getfixturevalue(fixture)
    assert pool.run(jobs.shares, 1 << 16) == [(read, [])] * 2


def test_memory_that_one_cannot_map_is_nobody_s(
    two_ranks: RankPool,
) -> None:
    assert two_ranks.run(jobs.shares, 1 << 60) == [("none", [])] * 2


@pytest.mark.parametrize(("fixture", "whole"), [("two_ranks", True), ("two_gloo_ranks", False)])
def test_passes_of_ranks_give_the_same_sums_every_time(
    fixture: str, whole: bool, request: pytest.FixtureRequest, tiny: Callable[..., Path]
) -> None:
    pool: RankPool = request.getfixturevalue(fixture)
    assert pool.run(jobs.many_sums, str(tiny()), 300) == [(whole, 1)] * 2


def test_a_rank_does_not_wait_for_another_without_end(
    two_ranks: RankPool, tiny: Callable[..., Path]
) -> None:
    said, _ = two_ranks.run(jobs.waits_for_nobody, str(tiny()))
    assert said.startswith("another rank did not come")

"""Every path says the same three things."""

from __future__ import annotations

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

"""Pools of ranks: two over the fastest path of this machine, two and four over Gloo."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.ranks.pool import RankPool


def _pool(size: int, *, shared_memory: bool) -> Iterator[RankPool]:
    pool = RankPool(size, shared_memory=shared_memory)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    yield from _pool(2, shared_memory=True)


@pytest.fixture(scope="session")
def two_gloo_ranks() -> Iterator[RankPool]:
    yield from _pool(2, shared_memory=False)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    yield from _pool(4, shared_memory=False)

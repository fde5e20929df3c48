"""Every part of a model is held by somebody, and twice only where it cannot be split."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.parallel.shard import GroupShard, HeadUnit, shard_group, split

SHAPES = [
    (num_layers, num_heads, num_kv_heads)
    for num_layers in range(1, 4)
    for num_heads in range(1, 10)
    for num_kv_heads in range(1, num_heads + 1)
    if num_heads % num_kv_heads == 0
]
for_1_to_5_ranks = pytest.mark.parametrize("ranks", range(1, 6))


def shards(num_layers: int, num_heads: int, num_kv_heads: int, ranks: int) -> list[GroupShard]:
    """The parts of all ranks, of layers with 7 feed-forward units."""
    return [
        shard_group(
            num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            ff_size=7,
            ranks=ranks,
            rank=rank,
        )
        for rank in range(ranks)
    ]


def holders(parts: list[GroupShard]) -> Counter[tuple[int, int]]:
    """How many ranks hold each (layer, KV head)."""
    return Counter((unit.layer, unit.kv_head) for part in parts for unit in part.units)


@for_1_to_5_ranks
def test_every_query_head_of_every_layer_is_on_exactly_one_rank(ranks: int) -> None:
    for num_layers, num_heads, num_kv_heads in SHAPES:
        parts = shards(num_layers, num_heads, num_kv_heads, ranks)
        held = [
            (unit.layer, head) for part in parts for unit in part.units for head in unit.query_heads
        ]
        assert sorted(held) == list(itertools.product(range(num_layers), range(num_heads)))


@for_1_to_5_ranks
def test_query_heads_lie_with_the_kv_head_they_read(ranks: int) -> None:
    for num_layers, num_heads, num_kv_heads in SHAPES:
        per_kv = num_heads // num_kv_heads
        for part in shards(num_layers, num_heads, num_kv_heads, ranks):
            for unit in part.units:
                assert {head // per_kv for head in unit.query_heads} <= {unit.kv_head}


@for_1_to_5_ranks
def test_kv_head_is_held_twice_only_where_there_are_fewer_than_ranks(ranks: int) -> None:
    for num_layers, num_heads, num_kv_heads in SHAPES:
        held = holders(shards(num_layers, num_heads, num_kv_heads, ranks))
        assert set(held) == set(itertools.product(range(num_layers), range(num_kv_heads)))
        assert sum(held.values()) == max(ranks, num_layers * num_kv_heads)


@for_1_to_5_ranks
def test_every_rank_holds_a_unit_of_a_group(ranks: int) -> None:
    for shape in SHAPES:
        assert all(part.units for part in shards(*shape, ranks))


@for_1_to_5_ranks
def test_units_are_spread_evenly(ranks: int) -> None:
    for num_layers, num_heads, num_kv_heads in SHAPES:
        counts = [len(p.units) for p in shards(num_layers, num_heads, num_kv_heads, ranks)]
        per_layer = num_kv_heads >= ranks  # then every layer is split alike
        assert max(counts) - min(counts) <= (num_layers if per_layer else 1)


@for_1_to_5_ranks
def test_all_units_of_a_rank_have_equally_many_query_heads(ranks: int) -> None:
    for shape in SHAPES:
        for part in shards(*shape, ranks):
            assert {len(unit.query_heads) for unit in part.units} == {part.queries_per_unit}


@for_1_to_5_ranks
def test_units_of_a_layer_are_one_contiguous_run(ranks: int) -> None:
    for num_layers, num_heads, num_kv_heads in SHAPES:
        for part in shards(num_layers, num_heads, num_kv_heads, ranks):
            runs = [part.units_of(layer) for layer in range(num_layers)]
            assert [i for run in runs for i in run] == list(range(len(part.units)))
            for layer, run in enumerate(runs):
                assert {part.units[i].layer for i in run} <= {layer}
                heads = [part.units[i].kv_head for i in run]
                assert not heads or heads == list(range(heads[0], heads[-1] + 1))


@for_1_to_5_ranks
def test_every_feed_forward_unit_is_on_exactly_one_rank(ranks: int) -> None:
    for shape in SHAPES:
        assert [unit for part in shards(*shape, ranks) for unit in part.ff] == list(range(7))


def test_drawing_of_plain_tensor_parallelism_is_right() -> None:
    heads = [[u.kv_head for u in part.units] for part in shards(1, 8, 8, 2)]
    assert heads == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_drawing_of_split_query_heads_is_right() -> None:
    parts = shards(1, 8, 2, 4)
    assert [part.units for part in parts] == [
        (HeadUnit(layer=0, kv_head=0, query_heads=range(2)),),
        (HeadUnit(layer=0, kv_head=0, query_heads=range(2, 4)),),
        (HeadUnit(layer=0, kv_head=1, query_heads=range(4, 6)),),
        (HeadUnit(layer=0, kv_head=1, query_heads=range(6, 8)),),
    ]


def test_drawing_of_two_layers_dealt_to_four_ranks_is_right() -> None:
    parts = shards(2, 8, 2, 4)
    assert [[(u.layer, u.kv_head) for u in part.units] for part in parts] == [
        [(0, 0)],
        [(0, 1)],
        [(1, 0)],
        [(1, 1)],
    ]


def test_rank_without_a_head_of_a_layer_has_an_empty_run_there() -> None:
    assert shards(2, 2, 2, 4)[0].units_of(1) == range(0)


def test_heads_that_kv_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(AssertionError, match="whole groups, found 5/2"):
        shard_group(1, num_heads=5, num_kv_heads=2, ff_size=4, ranks=1, rank=0)


@given(st.integers(0, 60), st.integers(1, 12))
def test_split_covers_everything_once_in_order_and_evenly(total: int, parts: int) -> None:
    ranges = [split(total, parts, index) for index in range(parts)]
    assert [item for each in ranges for item in each] == list(range(total))
    sizes = [len(each) for each in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("index", [-1, 3])
def test_part_that_does_not_exist_is_refused(index: int) -> None:
    with pytest.raises(AssertionError, match=f"a part below 3, found {index}"):
        split(9, 3, index)

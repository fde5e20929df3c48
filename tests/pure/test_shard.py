"""Every part of a model is held by somebody, and twice only where it cannot be split."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.parallel.shard import GroupShard, HeadUnit, shard_group, split

COMBINATIONS = [
    (num_layers, num_heads, num_kv_heads, ranks)
    for num_layers in range(1, 4)
    for num_heads in range(1, 10)
    for num_kv_heads in range(1, num_heads + 1)
    if num_heads % num_kv_heads == 0
    for ranks in range(1, 6)
]
every_combination = pytest.mark.parametrize(
    ("num_layers", "num_heads", "num_kv_heads", "ranks"), COMBINATIONS
)


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


@every_combination
def test_every_query_head_of_every_layer_is_on_exactly_one_rank(
    num_layers: int, num_heads: int, num_kv_heads: int, ranks: int
) -> None:
    parts = shards(num_layers, num_heads, num_kv_heads, ranks)
    held = Counter(
        (unit.layer, head) for part in parts for unit in part.units for head in unit.query_heads
    )
    assert held == Counter(
        (layer, head) for layer in range(num_layers) for head in range(num_heads)
    )


@every_combination
def test_query_heads_lie_with_the_kv_head_they_read(
    num_layers: int, num_heads: int, num_kv_heads: int, ranks: int
) -> None:
    per_kv = num_heads // num_kv_heads
    for part in shards(num_layers, num_heads, num_kv_heads, ranks):
        for unit in part.units:
            assert {head // per_kv for head in unit.query_heads} <= {unit.kv_head}


@every_combination
def test_kv_head_is_held_twice_only_where_there_are_fewer_of_them_than_ranks(
    num_layers: int, num_heads: int, num_kv_heads: int, ranks: int
) -> None:
    held = holders(shards(num_layers, num_heads, num_kv_heads, ranks))
    assert set(held) == {(i, k) for i in range(num_layers) for k in range(num_kv_heads)}
    if num_layers * num_kv_heads >= ranks:
        assert set(held.values()) == {1}
    else:
        assert sum(held.values()) == ranks


@every_combination
def test_every_rank_has_work_and_no_rank_more_than_one_unit_above_another_in_a_layer_split(
    num_layers: int, num_heads: int, num_kv_heads: int, ranks: int
) -> None:
    counts = [len(part.units) for part in shards(num_layers, num_heads, num_kv_heads, ranks)]
    assert min(counts) >= 1
    most_apart = num_layers if num_kv_heads >= ranks else 1
    assert max(counts) - min(counts) <= most_apart


@every_combination
def test_units_stand_in_the_order_of_their_layers_with_equally_many_query_heads(
    num_layers: int, num_heads: int, num_kv_heads: int, ranks: int
) -> None:
    for part in shards(num_layers, num_heads, num_kv_heads, ranks):
        layers = [unit.layer for unit in part.units]
        assert layers == sorted(layers)
        assert {len(unit.query_heads) for unit in part.units} == {part.queries_per_unit}


@every_combination
def test_units_of_a_layer_are_one_contiguous_run(
    num_layers: int, num_heads: int, num_kv_heads: int, ranks: int
) -> None:
    for part in shards(num_layers, num_heads, num_kv_heads, ranks):
        runs = [part.units_of(layer) for layer in range(num_layers)]
        assert [i for run in runs for i in run] == list(range(len(part.units)))
        for layer, run in enumerate(runs):
            assert {part.units[i].layer for i in run} <= {layer}
            heads = [part.units[i].kv_head for i in run]
            assert heads == list(range(heads[0], heads[-1] + 1) if heads else [])


@every_combination
def test_every_feed_forward_unit_is_on_exactly_one_rank(
    num_layers: int, num_heads: int, num_kv_heads: int, ranks: int
) -> None:
    parts = shards(num_layers, num_heads, num_kv_heads, ranks)
    assert [unit for part in parts for unit in part.ff] == list(range(7))


def test_drawing_of_plain_tensor_parallelism_is_right() -> None:
    heads = [[u.kv_head for u in part.units] for part in shards(1, 8, 8, 2)]
    assert heads == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_drawing_of_split_query_heads_is_right() -> None:
    parts = shards(1, 8, 2, 4)
    assert [part.units for part in parts] == [
        (HeadUnit(layer=0, kv_head=0, query_heads=range(0, 2)),),
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

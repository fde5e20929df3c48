"""Layers are cut into groups as the paper cuts them, or as the user says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.parallel.layer import check_groups, exact_groups, layer_groups, owner


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """A number of layers, a group size, and layers that stay alone, some counted from the end."""
    num_layers = draw(st.integers(1, 20))
    exact = draw(st.lists(st.integers(-num_layers, num_layers - 1), max_size=5))
    return num_layers, draw(st.integers(1, 6)), exact


def test_drawing_in_the_module_s_docstring_is_right() -> None:
    assert layer_groups(8, size=3) == ((0,), (1, 2, 3), (4, 5, 6), (7,))


def test_paper_s_example_of_32_layers_is_cut_as_there() -> None:
    groups = layer_groups(32, size=4)
    assert groups[0] == (0,)
    assert groups[-1] == (31,)
    assert [len(group) for group in groups] == [1, 4, 4, 4, 4, 4, 4, 4, 2, 1]


def test_first_and_last_are_exact_unless_told_otherwise() -> None:
    assert layer_groups(6, size=2) == layer_groups(6, size=2, exact=(0, -1))


def test_no_layer_is_exact_where_the_list_is_empty() -> None:
    assert layer_groups(5, size=2, exact=()) == ((0, 1), (2, 3), (4,))


def test_exact_layer_ends_the_group_before_it() -> None:
    assert layer_groups(7, size=3, exact=(2,)) == ((0, 1), (2,), (3, 4, 5), (6,))


def test_size_one_is_the_model_as_it_was_trained() -> None:
    assert layer_groups(5, size=1) == exact_groups(5) == ((0,), (1,), (2,), (3,), (4,))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_model_of_ends_only_has_no_group(num_layers: int) -> None:
    assert layer_groups(num_layers, size=4) == exact_groups(num_layers)


@given(cuts())
def test_every_layer_is_in_one_group_in_order(cut: tuple[int, int, list[int]]) -> None:
    num_layers, size, exact = cut
    groups = layer_groups(num_layers, size=size, exact=exact)
    assert check_groups(groups, num_layers=num_layers) == groups


@given(cuts())
def test_exact_layers_stand_alone_and_no_group_is_too_large(
    cut: tuple[int, int, list[int]],
) -> None:
    num_layers, size, exact = cut
    groups = layer_groups(num_layers, size=size, exact=exact)
    assert all((layer % num_layers,) in groups for layer in exact)
    assert all(len(group) <= size for group in groups)


@given(cuts())
def test_group_is_cut_short_only_by_an_exact_layer_or_the_end(
    cut: tuple[int, int, list[int]],
) -> None:
    num_layers, size, exact = cut
    alone = {layer % num_layers for layer in exact} | {num_layers}
    for group in layer_groups(num_layers, size=size, exact=exact):
        if len(group) < size and group[0] not in alone:
            assert group[-1] + 1 in alone


@pytest.mark.parametrize("size", [0, -2])
def test_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"layer_parallel_size must be at least 1, not {size}"):
        layer_groups(4, size=size)


@pytest.mark.parametrize("layer", [4, -5])
def test_exact_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"exact layer {layer} does not exist in a model of 4"):
        layer_groups(4, size=2, exact=(layer,))


def test_listed_groups_come_back_as_tuples() -> None:
    assert check_groups([[0], [1, 2], [3]], num_layers=4) == ((0,), (1, 2), (3,))


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param([[0, 1], [3]], id="a layer left out"),
        pytest.param([[0, 1], [1, 2, 3]], id="a layer twice"),
        pytest.param([[1, 0], [2, 3]], id="out of order"),
        pytest.param([[0, 1], [2, 3, 4]], id="a layer too many"),
        pytest.param([[0, 1], [], [2, 3]], id="an empty group"),
        pytest.param([], id="no group"),
    ],
)
def test_groups_that_are_not_all_layers_once_in_order_are_refused(groups: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="must list the layers 0 to 3 once each and in order"):
        check_groups(groups, num_layers=4)


def test_published_placement_deals_layers_to_ranks_in_turn() -> None:
    assert [owner(position, ranks=3) for position in range(5)] == [0, 1, 2, 0, 1]

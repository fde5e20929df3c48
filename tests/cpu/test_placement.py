"""Where engines go: to which node, and to which bundles of a group that is there already."""

from __future__ import annotations

import pytest

from paceline.actors.placement import Node, Slot, choose_slots, least_used, slots_of
from paceline.runtime.errors import PlacementError

ONE_CPU = {"CPU": 1.0}
ACROSS = {0: "a", 1: "b", 2: "a", 3: "b"}
"""Four bundles that lie on two nodes in turn."""


def test_an_engine_goes_to_the_node_with_the_fewest_others_that_can_hold_it() -> None:
    small, full, roomy, roomier = (
        Node("a", "10.0.0.1", 1, 1),
        Node("b", "10.0.0.2", 4, 0),
        Node("c", "10.0.0.3", 4, 2),
        Node("d", "10.0.0.4", 4, 3),
    )
    nodes = [small, full, roomy, roomier]
    assert least_used(nodes, {}, num_ranks=2) == "d"
    assert least_used(nodes, {"d": 1}, num_ranks=2) == "c"
    assert least_used(nodes, {"c": 1, "d": 1}, num_ranks=1) == "a"
    assert least_used([small, full], {}, num_ranks=2) == "b", "it may be free soon"
    assert least_used(nodes, {}, num_ranks=5) is None, "it takes several nodes"


def bundles(slots: list[Slot]) -> list[int]:
    return [slot.bundle for slot in slots]


def test_bundles_of_one_node_stay_together() -> None:
    slots = slots_of(dict.fromkeys(range(4), ONE_CPU), ACROSS, device="CPU", indices=None)
    assert bundles(slots) == [0, 2, 1, 3]


def test_given_indices_are_the_order_of_ranks() -> None:
    slots = slots_of(dict.fromkeys(range(4), ONE_CPU), ACROSS, device="CPU", indices=(3, 0, 1))
    assert bundles(slots) == [3, 0, 1]


def test_a_bundle_holds_a_rank_per_device_and_none_without() -> None:
    group = {0: {"CPU": 4.0}, 1: {"GPU": 2.0, "CPU": 1.0}, 2: {"GPU": 0.5}}
    slots = slots_of(group, dict.fromkeys(group, "a"), device="GPU", indices=None)
    assert bundles(slots) == [1, 1]


@pytest.mark.parametrize(
    ("indices", "reason"),
    [
        ((0, 7), "has 7 1 times, and the placement group has bundles 0 to 1"),
        ((0, 0), "has 0 2 times, and that bundle of the placement group has 1 GPU"),
        ((1,), "has 1 1 times, and that bundle of the placement group has 0 GPU"),
    ],
)
def test_indices_without_a_device_are_refused(indices: tuple[int, ...], reason: str) -> None:
    group = {0: {"GPU": 1.0}, 1: {"CPU": 1.0}}
    with pytest.raises(PlacementError, match=reason):
        slots_of(group, dict.fromkeys(group, "a"), device="GPU", indices=indices)


def test_an_engine_takes_bundles_of_one_node_where_that_suffices() -> None:
    free = [Slot(0, 5, "a"), Slot(1, 6, "b"), Slot(2, 7, "b")]
    chosen = choose_slots(free, num_ranks=2)
    assert chosen is not None
    assert bundles(chosen) == [6, 7]


def test_an_engine_that_no_node_can_hold_takes_the_first_bundles() -> None:
    free = [Slot(0, 5, "a"), Slot(1, 6, "b"), Slot(2, 7, "b")]
    assert choose_slots(free, num_ranks=3) == free
    assert choose_slots(free, num_ranks=4) is None

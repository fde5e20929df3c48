"""Which devices of the cluster the ranks of an engine have: bundles of a placement group.

a group of its own    one bundle per rank, asked for when the engine starts, removed when it ends
an outer group        that of the actor we run in (Serve, Tune, a trainer), or the one that
                      `ray_placement_group` names: engines take bundles of it, each its own, and
                      leave the group to whoever made it
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import EngineError, PlacementError


class Node(NamedTuple):
    """A node of the cluster, and its devices of the kind that is wanted."""

    node_id: str
    address: str
    num_devices: float
    num_free: float


class Slot(NamedTuple):
    """Room for one rank in an outer group: one device of a bundle."""

    number: int
    """Its turn: ranks take slots in this order."""
    bundle: int
    node_id: str


class Place:
    """Where the ranks of one engine go: rank i to `bundles[i]` of `group`."""

    def __init__(
        self,
        group: PlacementGroup,
        bundles: Sequence[int],
        *,
        device: str,
        on_release: Callable[[], None],
    ) -> None:
        self.group = group
        self.bundles = tuple(bundles)
        self.device = device
        """What Ray calls the device that each rank has for itself: `CPU` or `GPU`."""
        self._on_release = on_release
        self._released = False

    def wait(self, config: EngineConfig, *, stop: threading.Event) -> None:
        """Return when the group is there. Raises PlacementError after `placement_timeout_s`, EngineError
        when told to stop."""
        deadline_s = time.monotonic() + config.placement_timeout_s
        while not self.group.wait(min(1.0, max(0.01, deadline_s - time.monotonic()))):
            if stop.is_set():
                raise EngineError("the engine was told to stop before it had a place")
            if time.monotonic() >= deadline_s:
                raise PlacementError(_why_not_placed(config, self.device))

    def release(self) -> None:
        """Give the bundles back, once; what ran in them has been ended before."""
        if not self._released:
            self._released = True
            self._on_release()


class Places(Protocol):
    """Hands out the places of the engines of one cluster. Any thread may ask."""

    device: str
    num_nodes: int
    """Nodes with devices that engines may have; at least 1."""

    def take(self, config: EngineConfig) -> Place:
        """A place for an engine, to be waited for. Raises PlacementError where none can be."""


def find_places(config: EngineConfig, *, num_ranks: int, spread: bool = False) -> Places:
    """Where engines like `config` go. Raises PlacementError where there can never be room for
    `num_ranks`, those of all engines together. With `spread` each engine that has a group of its own
    goes to the node with the fewest of the others."""
    group = _outer_group(config)
    if group is not None:
        return OuterPlaces(config, group, num_ranks=num_ranks)
    if config.ray_bundle_indices is not None:
        raise PlacementError(
            "ray_bundle_indices are those of a placement group: run Paceline inside one, or name it by "
            "ray_placement_group"
        )
    return OwnPlaces(config, num_ranks=num_ranks, spread=spread)


class OwnPlaces:
    """A placement group for each engine."""

    def __init__(self, config: EngineConfig, *, num_ranks: int, spread: bool) -> None:
        """Raises PlacementError where a Ray of our own can never hold `num_ranks`."""
        self.device = _device(config, ray.cluster_resources())
        there = ray.cluster_resources().get(self.device, 0)
        # a cluster that was there before may still be growing; one of our own will not
        if there < num_ranks and config.ray_address is None and "RAY_ADDRESS" not in os.environ:
            raise PlacementError(
                f"{num_ranks} ranks need {num_ranks} {self.device}, one each; this machine has {there:g}: "
                "lower tensor_parallel_size, draft_tensor_parallel_size or the replicas, or join a cluster "
                "with ray_address"
            )
        self.num_nodes = max(1, len(_nodes(self.device)))
        self._spread = spread
        self._homes: Counter[str] = Counter()
        """How many engines each node is home to."""
        self._lock = threading.Lock()

    def take(self, config: EngineConfig) -> Place:
        """On the engine's home if it has one and there is room, else on as few nodes as possible."""
        size = config.num_ranks
        home = self._choose_home(size)
        bundles: list[dict[str, float]] = [{self.device: 1}] * size
        if home is None:
            group = placement_group(bundles, strategy="PACK")
        else:
            group = placement_group(bundles, strategy="STRICT_PACK", _soft_target_node_id=home)

        def release() -> None:
            remove_placement_group(group)
            if home is not None:
                with self._lock:
                    self._homes[home] -= 1

        return Place(group, range(size), device=self.device, on_release=release)

    def _choose_home(self, num_ranks: int) -> str | None:
        if not self._spread:
            return None
        with self._lock:
            home = least_used(_nodes(self.device), self._homes, num_ranks=num_ranks)
            if home is not None:
                self._homes[home] += 1
        return home


class OuterPlaces:
    """Bundles of one placement group that is not ours."""

    def __init__(self, config: EngineConfig, group: PlacementGroup, *, num_ranks: int) -> None:
        """Raises PlacementError where the bundles that may be used have fewer than `num_ranks` devices."""
        table = placement_group_table(group)
        bundles: dict[int, Mapping[str, float]] = table["bundles"]
        self.device = _device(config, _summed(bundles.values()))
        slots = slots_of(
            bundles,
            table["bundles_to_node_id"],
            device=self.device,
            indices=config.ray_bundle_indices,
        )
        if len(slots) < num_ranks:
            has = ", ".join(f"{index}: {dict(bundle)}" for index, bundle in sorted(bundles.items()))
            raise PlacementError(
                f"{num_ranks} ranks need {num_ranks} {self.device}, one each, and may use {len(slots)} of "
                f"the placement group around them, whose bundles are {{{has}}}: give the group one bundle "
                f"{{{self.device!r}: 1}} per rank, name more in ray_bundle_indices, or lower the replicas "
                "or tensor parallel sizes"
            )
        self.num_nodes = max(1, len({slot.node_id for slot in slots}))
        self._group = group
        self._free = slots
        self._lock = threading.Lock()

    def take(self, config: EngineConfig) -> Place:
        """On one node if its free bundles suffice. Raises PlacementError where too few are free."""
        with self._lock:
            taken = choose_slots(self._free, num_ranks=config.num_ranks)
            if taken is None:
                raise PlacementError(
                    f"{config.num_ranks} ranks need {config.num_ranks} {self.device}, one each; "
                    f"{len(self._free)} of the placement group around them are free"
                )
            self._free = [slot for slot in self._free if slot not in taken]

        def release() -> None:
            with self._lock:
                self._free = sorted([*self._free, *taken])

        bundles = [slot.bundle for slot in taken]
        return Place(self._group, bundles, device=self.device, on_release=release)


def least_used(nodes: Sequence[Node], homes: Mapping[str, int], *, num_ranks: int) -> str | None:
    """The node for one more engine: of those that can hold it, now if possible, the one that is home
    to the fewest, and then the emptiest. None where no single node can."""
    able = [node for node in nodes if node.num_devices >= num_ranks]
    able = [node for node in able if node.num_free >= num_ranks] or able
    best = min(able, key=lambda n: (homes.get(n.node_id, 0), -n.num_free, n.node_id), default=None)
    return None if best is None else best.node_id


def slots_of(
    bundles: Mapping[int, Mapping[str, float]],
    nodes: Mapping[int, str],
    *,
    device: str,
    indices: Sequence[int] | None,
) -> list[Slot]:
    """The room for ranks in the bundles of a group. With `indices` a slot for each, in their order; else
    one for each device, those of a node together.

    `nodes` says which node each bundle is on. Raises PlacementError for an index that the group does not
    have, or that is named more often than its bundle has devices.
    """
    room = {index: int(bundle.get(device, 0)) for index, bundle in bundles.items()}
    if indices is None:
        first = {nodes.get(index, ""): index for index in sorted(bundles, reverse=True)}
        near = sorted(bundles, key=lambda index: (first[nodes.get(index, "")], index))
        indices = [index for index in near for _ in range(room[index])]
    for index, wanted in Counter(indices).items():
        if wanted > room.get(index, 0):
            raise PlacementError(
                f"ray_bundle_indices has {index} {wanted} times, and "
                + (
                    f"that bundle of the placement group has {room[index]} {device}"
                    if index in room
                    else f"the placement group has bundles 0 to {len(bundles) - 1}"
                )
            )
    return [Slot(number, index, nodes.get(index, "")) for number, index in enumerate(indices)]


def choose_slots(free: Sequence[Slot], *, num_ranks: int) -> list[Slot] | None:
    """The first slots that are on one node, or else the first there are; None if they are too few."""
    if len(free) < num_ranks:
        return None
    num_on = Counter(slot.node_id for slot in free)
    node_id = next((slot.node_id for slot in free if num_on[slot.node_id] >= num_ranks), None)
    near = [slot for slot in free if node_id in (None, slot.node_id)]
    return near[:num_ranks]


def _outer_group(config: EngineConfig) -> PlacementGroup | None:
    """The group named by the config, or else that of the actor we run in, if any."""
    wanted = config.ray_placement_group
    if wanted is None:
        return get_current_placement_group()
    groups: dict[str, dict[str, Any]] = placement_group_table()
    living = {key: row for key, row in groups.items() if row["state"] != "REMOVED"}
    found = [key for key, row in living.items() if wanted in (key, row["name"])]
    if len(found) == 1:
        return PlacementGroup(ray.PlacementGroupID.from_hex(found[0]))
    there = ", ".join(row["name"] or key for key, row in living.items()) or "none"
    raise PlacementError(
        f"{len(found) or 'no'} placement groups are named {wanted!r} in this cluster; there are: {there}"
    )


def _device(config: EngineConfig, resources: Mapping[str, float]) -> str:
    """What Ray calls the device that each rank has for itself."""
    if config.device == "auto":
        return "GPU" if resources.get("GPU", 0) > 0 else "CPU"
    return "GPU" if config.device == "cuda" else "CPU"


def _summed(bundles: Iterable[Mapping[str, float]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    return total


def _nodes(device: str) -> list[Node]:
    """Those that live."""
    free = ray._private.state.available_resources_per_node()
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["Resources"].get(device, 0),
            free.get(node["NodeID"], {}).get(device, 0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _why_not_placed(config: EngineConfig, device: str) -> str:
    nodes = [
        f"{node.address} has {node.num_devices:g} {device} ({node.num_free:g} free)"
        for node in _nodes(device)
    ]
    return (
        f"{config.num_ranks} ranks need {config.num_ranks} {device}, one each, and found no place "
        f"in {config.placement_timeout_s:.0f} s: "
        f"{'; '.join(nodes)}. Lower tensor_parallel_size ({config.tensor_parallel_size}) or "
        f"{'draft_ranks' if config.drafts_ahead else 'draft_tensor_parallel_size'} ({config.draft_size}), free "
        "devices, or add nodes"
    )

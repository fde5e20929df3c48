"""Bring an engine up on Ray: a cluster, a placement group, one shard per device, the coordinator;
and take it down.

driver ──> placement group: one bundle per rank ──> shard 0 .. shard n-1
       └─> coordinator (no device), on the node of shard 0

Engines that serve together share one connection to Ray, a `RayCluster`, and have a placement group
each.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import ray
import zmq
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    remove_placement_group,
)

from paceline.actors import handles
from paceline.actors.coordinator import Coordinator
from paceline.actors.shard import Shard
from paceline.parallel.rank import RankSpec
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import EngineError, PlacementError, UserError
from paceline.runtime.link import LinkClient
from paceline.runtime.llm import LLM
from paceline.runtime.preflight import Facts
from paceline.runtime.types import EngineStatus, Request, TokenDelta

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
STOP_EVERY_S = 0.1
"""How soon a start under way notices that it is not wanted any more."""


def ray_llm(model: str = "embedded", **settings: Any) -> LLM:
    """An `LLM` whose ranks are Ray actors: on a local Ray, or on the cluster of `ray_address` or
    RAY_ADDRESS."""
    return LLM(model, connect=connect, **{**settings, "distributed_executor_backend": "ray"})


def connect(config: EngineConfig, facts: Facts) -> RayEngine:
    """An engine on Ray, loaded and ready. Raises UserError or EngineError, with everything already
    taken down."""
    return RayEngine(config, facts)


class RayCluster:
    """Ray, for several engines: joined or started before the first, left after the last."""

    def __init__(self, config: EngineConfig, *, num_ranks: int, spread: bool) -> None:
        """Raises PlacementError where Ray cannot be reached, or where a Ray of our own can never hold
        `num_ranks`. With `spread` each engine goes to the node with the fewest of the others."""
        self._spread = spread
        self._homes: Counter[str] = Counter()
        """How many engines each node is home to."""
        self._lock = threading.Lock()
        self._owns_ray = not ray.is_initialized()
        try:
            if self._owns_ray:
                _init_ray(config)
            device = _device(config)
            there = ray.cluster_resources().get(device, 0)
            if there < num_ranks and _is_local(config):
                raise PlacementError(
                    f"the engines have {num_ranks} ranks together and need one {device} each; this "
                    f"machine has {there:g}: lower the replicas or tensor parallel sizes, or join a "
                    "cluster with ray_address"
                )
            self.num_nodes = max(1, len(_nodes(device)))
            """With devices of the kind that is used."""
        except BaseException:
            self.close()
            raise

    def start(self, config: EngineConfig, facts: Facts, *, stop: threading.Event) -> RayEngine:
        """An engine, loaded and ready. Raises UserError or EngineError, soon after `stop` is set at the
        latest, with everything taken down."""
        home = self._choose_home(config)
        return RayEngine(config, facts, stop=stop, home=home, on_close=lambda: self._leave(home))

    def close(self) -> None:
        """Leave Ray: whatever still runs there ends."""
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()

    def _choose_home(self, config: EngineConfig) -> str | None:
        if not self._spread:
            return None
        with self._lock:
            home = least_used(_nodes(_device(config)), self._homes, num_ranks=config.world_size)
            if home is not None:
                self._homes[home] += 1
        return home

    def _leave(self, home: str | None) -> None:
        if home is not None:
            with self._lock:
                self._homes[home] -= 1


class Node(NamedTuple):
    """A node of the cluster, and its devices of the kind that is wanted."""

    node_id: str
    address: str
    num_devices: float
    num_free: float


def least_used(nodes: Sequence[Node], homes: Mapping[str, int], *, num_ranks: int) -> str | None:
    """The node for one more engine: of those that can hold it, now if possible, the one that is home
    to the fewest, and then the emptiest. None where no single node can."""
    able = [node for node in nodes if node.num_devices >= num_ranks]
    able = [node for node in able if node.num_free >= num_ranks] or able
    best = min(able, key=lambda n: (homes.get(n.node_id, 0), -n.num_free, n.node_id), default=None)
    return None if best is None else best.node_id


class RayEngine:
    """Satisfies `EngineClient`: Ray places and watches, the link carries."""

    def __init__(
        self,
        config: EngineConfig,
        facts: Facts,
        *,
        stop: threading.Event | None = None,
        home: str | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """`stop`, set from another thread, gives a start up. `home` is the node to be on, if there is
        room."""
        self._shards: list[handles.ShardHandle] = []
        self._coordinator: handles.CoordinatorHandle | None = None
        self._group: PlacementGroup | None = None
        self._link: LinkClient | None = None
        self._home = home
        self._on_close = on_close
        self._closed = False
        self._lock = threading.Lock()
        self._stop = stop or threading.Event()
        self._owns_ray = not ray.is_initialized()
        try:
            if self._owns_ray:
                _init_ray(config)
            with self._given_up_when_stopped():
                self._start(config, facts)
        except BaseException:
            self.close()
            raise

    def submit(self, requests: list[Request]) -> None:
        self._running().submit(requests)

    def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:
        return self._running().poll(wait_s)

    def abort(self, request_ids: list[str]) -> None:
        self._running().abort(request_ids)

    def status(self) -> EngineStatus:
        return self._running().status()

    @property
    def news_socket(self) -> zmq.Socket[bytes]:
        """See `LinkClient.news_socket`."""
        return self._running().news_socket

    def close(self) -> None:
        with self._lock:
            first, self._closed = not self._closed, True
            if self._link is not None:
                self._link.close()
                self._link = None
            if ray.is_initialized():
                handles.close(self._coordinator, self._shards, timeout_s=5.0)
                self._coordinator, self._shards = None, []
                if self._group is not None:
                    remove_placement_group(self._group)
                    self._group = None
                if self._owns_ray:
                    ray.shutdown()
        if first:
            self._on_close()

    def _running(self) -> LinkClient:
        link = self._link
        if link is None:
            raise EngineError("this engine is closed")
        return link

    @contextlib.contextmanager
    def _given_up_when_stopped(self) -> Iterator[None]:
        """While it starts, a thread takes it down when it is told to stop: the start then fails at once,
        whatever it waits for."""
        started = threading.Event()

        def watch() -> None:
            while not started.wait(STOP_EVERY_S):
                if self._stop.is_set():
                    self.close()
                    return

        thread = threading.Thread(target=watch, name="engine start", daemon=True)
        thread.start()
        try:
            yield
        finally:
            started.set()
            thread.join(CONNECT_S)

    @contextlib.contextmanager
    def _still_wanted(self) -> Iterator[None]:
        """What is made within is taken down by `close`. Raises EngineError if that was before."""
        with self._lock:
            if self._closed or self._stop.is_set():
                raise EngineError("the engine was told to stop while it started")
            yield

    def _start(self, config: EngineConfig, facts: Facts) -> None:
        gpu = _device(config) == "GPU"
        size = config.world_size
        with self._still_wanted():
            self._group = _group(config, home=self._home)
        _wait_placed(self._group, config, stop=self._stop)
        with self._still_wanted():
            self._shards = [
                handles.make_shard(Shard, self._group, bundle, gpu=gpu) for bundle in range(size)
            ]
        places = handles.nodes_of(self._shards, timeout_s=config.placement_timeout_s)
        node_ids = [node_id for node_id, _ in places]
        with self._still_wanted():
            self._coordinator = handles.make_coordinator(Coordinator, node_id=node_ids[0])
        port = handles.port_of(self._shards[0]) if size > 1 else 0
        specs = [
            RankSpec(
                rank=rank,
                local_rank=node_ids[:rank].count(node_id),
                local_size=node_ids.count(node_id),
                target_size=config.tensor_parallel_size,
                draft_size=config.draft_size,
                master_addr=places[0][1],
                master_port=port,
                device="cuda"
                if gpu
                else "cpu",  # Ray shows each actor its own GPU only, as number 0
                shared_memory=not config.disable_custom_all_reduce,
                num_threads=config.cpu_threads,
                timeout_s=config.load_timeout_s,
            )
            for rank, node_id in enumerate(node_ids)
        ]
        here = ray.get_runtime_context().get_node_id()
        started = handles.start(
            self._coordinator,
            config,
            facts.max_model_len,
            self._shards,
            specs,
            ranks_here=len(set(node_ids)) == 1,
            frontend_here=node_ids[0] == here,
        )
        if started.error is not None:
            raise (UserError if started.user_error else EngineError)(started.error)
        assert started.link is not None, "expected a link with a started engine"
        watched = handles.watch(self._coordinator)
        link = LinkClient(started.link, watch=lambda: handles.why_ended(watched))
        try:
            with self._still_wanted():
                self._link = link
        except EngineError:
            link.close()
            raise


def _init_ray(config: EngineConfig) -> None:
    """Join the cluster of the config or of RAY_ADDRESS, or start one of our own."""
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        settings |= {"address": "local", "include_dashboard": False}
    else:
        _knock(address)
        settings |= {"address": address}
    try:
        with _interrupts_after():
            ray.init(**settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise PlacementError(
            f"cannot reach Ray at {address}: {str(error).splitlines()[0]}"
        ) from None


@contextlib.contextmanager
def _interrupts_after() -> Iterator[None]:
    """Hold the first Ctrl-C back until the work within is done: a Ray that is half there cannot be taken
    down."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if held:
            raise KeyboardInterrupt
        held.append(number)

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


def _knock(address: str) -> None:
    """Ray itself waits for minutes before it says that nobody is there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto" and the like
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise PlacementError(f"cannot reach Ray at {address}: {error.strerror or error}") from None


def _device(config: EngineConfig) -> str:
    """What Ray calls the device that each rank has for itself."""
    if config.device == "auto":
        return "GPU" if ray.cluster_resources().get("GPU", 0) > 0 else "CPU"
    return "GPU" if config.device == "cuda" else "CPU"


def _group(config: EngineConfig, *, home: str | None) -> PlacementGroup:
    """Ask for a bundle of one device per rank: on one node, `home` if possible, or on as few as
    possible."""
    bundles: list[dict[str, float]] = [{_device(config): 1}] * config.world_size
    if home is None:
        return placement_group(bundles, strategy="PACK")
    return placement_group(bundles, strategy="STRICT_PACK", _soft_target_node_id=home)


def _wait_placed(group: PlacementGroup, config: EngineConfig, *, stop: threading.Event) -> None:
    """Raises PlacementError at the deadline, EngineError when told to stop."""
    device = _device(config)
    # a cluster that was there before may still be growing; one of our own will not
    patience_s = config.placement_timeout_s
    if ray.cluster_resources().get(device, 0) < config.world_size and _is_local(config):
        patience_s = 0.0
    deadline = time.monotonic() + patience_s
    while not group.wait(timeout_seconds=min(1.0, max(0.01, deadline - time.monotonic()))):
        if stop.is_set():
            raise EngineError("the engine was told to stop before it had a place")
        if time.monotonic() >= deadline:
            raise PlacementError(_why_not_placed(config, device, patience_s))


def _is_local(config: EngineConfig) -> bool:
    return config.ray_address is None and "RAY_ADDRESS" not in os.environ


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


def _why_not_placed(config: EngineConfig, device: str, waited_s: float) -> str:
    nodes = [
        f"{node.address} has {node.num_devices:g} {device} ({node.num_free:g} free)"
        for node in _nodes(device)
    ]
    return (
        f"{config.world_size} ranks need {config.world_size} {device}, one each, and found no place "
        f"in {waited_s:.0f} s: "
        f"{'; '.join(nodes)}. Lower tensor_parallel_size ({config.tensor_parallel_size}) or "
        f"draft_tensor_parallel_size ({config.draft_size}), free devices, or add nodes"
    )

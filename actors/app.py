"""Bring an engine up on Ray: a cluster, a placement group, one shard per device, the coordinator;
and take it down.

driver ──> placement group: one bundle per rank ──> shard 0 .. shard n-1
       └─> coordinator (no device), on the node of shard 0
"""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Any

import ray
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


def ray_llm(model: str = "embedded", **settings: Any) -> LLM:
    """An `LLM` whose ranks are Ray actors: on a local Ray, or on the cluster of `ray_address` or
    RAY_ADDRESS."""
    return LLM(model, connect=connect, **{**settings, "distributed_executor_backend": "ray"})


def connect(config: EngineConfig, facts: Facts) -> RayEngine:
    """An engine on Ray, loaded and ready. Raises UserError or EngineError, with everything already
    taken down."""
    return RayEngine(config, facts)


class RayEngine:
    """Satisfies `EngineClient`: Ray places and watches, the link carries."""

    def __init__(self, config: EngineConfig, facts: Facts) -> None:
        self._shards: list[handles.ShardHandle] = []
        self._coordinator: handles.CoordinatorHandle | None = None
        self._group: PlacementGroup | None = None
        self._link: LinkClient | None = None
        self._owns_ray = not ray.is_initialized()
        try:
            if self._owns_ray:
                _init_ray(config)
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

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
        if not ray.is_initialized():
            return
        handles.close(self._coordinator, self._shards, timeout_s=5.0)
        self._coordinator, self._shards = None, []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._owns_ray:
            ray.shutdown()

    def _running(self) -> LinkClient:
        if self._link is None:
            raise EngineError("this engine is closed")
        return self._link

    def _start(self, config: EngineConfig, facts: Facts) -> None:
        gpu = _use_gpu(config)
        self._group = _place(config, gpu=gpu)
        size = config.world_size
        self._shards = [
            handles.make_shard(Shard, self._group, bundle, gpu=gpu) for bundle in range(size)
        ]
        places = handles.nodes_of(self._shards, timeout_s=config.placement_timeout_s)
        node_ids = [node_id for node_id, _ in places]
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
        self._link = LinkClient(started.link, watch=lambda: handles.why_ended(watched))


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
        ray.init(**settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise PlacementError(
            f"cannot reach Ray at {address}: {str(error).splitlines()[0]}"
        ) from None


def _knock(address: str) -> None:
    """Ray itself waits for minutes before it says that nobody is there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto" and the like
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise PlacementError(f"cannot reach Ray at {address}: {error.strerror or error}") from None


def _use_gpu(config: EngineConfig) -> bool:
    if config.device == "auto":
        return bool(ray.cluster_resources().get("GPU", 0) > 0)
    return config.device == "cuda"


def _place(config: EngineConfig, *, gpu: bool) -> PlacementGroup:
    """A bundle of one device per rank, on as few nodes as possible. Raises PlacementError at the
    deadline."""
    device = "GPU" if gpu else "CPU"
    group = placement_group([{device: 1}] * config.world_size, strategy="PACK")
    # a cluster that was there before may still be growing; one of our own will not
    patience_s = config.placement_timeout_s
    if ray.cluster_resources().get(device, 0) < config.world_size and _is_local(config):
        patience_s = 0.0
    deadline = time.monotonic() + patience_s
    while not group.wait(timeout_seconds=min(1.0, max(0.01, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            text = _why_not_placed(config, device, patience_s)
            remove_placement_group(group)
            raise PlacementError(text)
    return group


def _is_local(config: EngineConfig) -> bool:
    return config.ray_address is None and "RAY_ADDRESS" not in os.environ


def _why_not_placed(config: EngineConfig, device: str, waited_s: float) -> str:
    available = ray._private.state.available_resources_per_node()
    nodes = [
        f"{node['NodeManagerAddress']} has {node['Resources'].get(device, 0):g} {device} "
        f"({available.get(node['NodeID'], {}).get(device, 0):g} free)"
        for node in ray.nodes()
        if node["Alive"]
    ]
    return (
        f"{config.world_size} ranks need {config.world_size} {device}, one each, and found no place "
        f"in {waited_s:.0f} s: "
        f"{'; '.join(nodes)}. Lower tensor_parallel_size ({config.tensor_parallel_size}) or "
        f"draft_tensor_parallel_size ({config.draft_size}), free devices, or add nodes"
    )

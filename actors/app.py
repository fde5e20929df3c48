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
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
import zmq

from paceline.actors import handles
from paceline.actors.coordinator import Coordinator
from paceline.actors.placement import Place, Places, find_places
from paceline.actors.ray_token import TOKEN_ADVICE
from paceline.actors.shard import Shard
from paceline.parallel.launch import calm_openmp
from paceline.parallel.leftovers import sweep_after
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import EngineError, PlacementError, UserError
from paceline.runtime.link import LinkAddress, LinkClient, Patience
from paceline.runtime.llm import LLM
from paceline.runtime.preflight import Facts
from paceline.runtime.types import EngineStatus, Request, TokenDelta

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
GONE_S = 2.0
"""What killed actors may take to be gone."""
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
        """Raises PlacementError where Ray cannot be reached, or where there can never be room for
        `num_ranks`. With `spread` each engine goes to the node with the fewest of the others."""
        self._owns_ray = not ray.is_initialized()
        try:
            if self._owns_ray:
                _init_ray(config)
            self._places = find_places(config, num_ranks=num_ranks, spread=spread)
        except BaseException:
            self.close()
            raise

    @property
    def num_nodes(self) -> int:
        """With devices of the kind that is used."""
        return self._places.num_nodes

    def start(self, config: EngineConfig, facts: Facts, *, stop: threading.Event) -> RayEngine:
        """An engine, loaded and ready. Raises UserError or EngineError, soon after `stop` is set at the
        latest, with everything taken down."""
        return RayEngine(config, facts, stop=stop, places=self._places)

    def close(self) -> None:
        """Leave Ray: whatever still runs there ends."""
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()


class RayEngine:
    """Satisfies `EngineClient`: Ray places and watches, the link carries."""

    def __init__(
        self,
        config: EngineConfig,
        facts: Facts,
        *,
        stop: threading.Event | None = None,
        places: Places | None = None,
    ) -> None:
        """`stop`, set from another thread, gives a start up. Engines that serve together share
        `places`."""
        self._shards: list[handles.ShardHandle] = []
        self._coordinator: handles.CoordinatorHandle | None = None
        self._place: Place | None = None
        self._link: LinkClient | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._stop = stop or threading.Event()
        self._owns_ray = not ray.is_initialized()
        try:
            if self._owns_ray:
                _init_ray(config)
            with self._given_up_when_stopped():
                self._start(
                    config, facts, places or find_places(config, num_ranks=config.num_ranks)
                )
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
    def address(self) -> LinkAddress:
        """Where frontends link up with it."""
        return self._running().address

    def link(self, frontend: bytes | None = None) -> LinkClient:
        """See `LinkClient.link`."""
        return self._running().link(frontend)

    def watch(self, wait_s: float) -> None:
        """See `LinkClient.watch`."""
        self._running().watch(wait_s)

    def forget(self, frontend: bytes) -> None:
        """See `LinkClient.forget`."""
        self._running().forget(frontend)

    @property
    def news_socket(self) -> zmq.Socket[bytes]:
        """See `LinkClient.news_socket`."""
        return self._running().news_socket

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._link is not None:
                self._link.close()
                self._link = None
            if ray.is_initialized():
                pids = handles.close(self._coordinator, self._shards, timeout_s=5.0)
                self._coordinator, self._shards = None, []
                if self._place is not None:
                    self._place.release()
                    self._place = None
                if self._owns_ray:
                    ray.shutdown()
                sweep_after(pids, timeout_s=GONE_S)

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

    def _start(self, config: EngineConfig, facts: Facts, places: Places) -> None:
        with self._still_wanted():
            place = self._place = places.take(config)
        gpu = place.device == "GPU"
        place.wait(config, stop=self._stop)
        with self._still_wanted():
            self._shards = [
                handles.make_shard(Shard, place.group, bundle, gpu=gpu) for bundle in place.bundles
            ]
            self._coordinator = handles.make_coordinator(Coordinator, place.group, place.bundles[0])
        started = handles.start(
            self._coordinator,
            config,
            facts.max_model_len,
            self._shards,
            gpu=gpu,
            frontend_node=ray.get_runtime_context().get_node_id(),
        )
        if started.error is not None:
            raise (UserError if started.user_error else EngineError)(started.error)
        assert started.link is not None, "expected a link with a started engine"
        watched = handles.watch(self._coordinator)
        coordinator = handles.places_of([self._coordinator], timeout_s=CONNECT_S)
        patience = Patience(
            step_s=config.step_timeout_s,
            restart_s=config.placement_timeout_s + config.load_timeout_s,
            stacks=lambda: handles.stacks_of(coordinator)[0],
        )
        link = LinkClient(started.link, watch=lambda: handles.why_ended(watched), patience=patience)
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
        calm_openmp()
        settings |= {"address": "local", "include_dashboard": False}
    else:
        _knock(address)
        settings |= {"address": address}
    try:
        with _interrupts_after():
            ray.init(**settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        token = "" if os.environ.get("RAY_AUTH_MODE") else f"; {TOKEN_ADVICE}"
        raise PlacementError(
            f"cannot reach Ray at {address}: {str(error).splitlines()[0]}{token}"
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

"""Engines that serve as one, and the router between them, in this process.

    AsyncLLM ──EngineClient──> Fleet: Router ──> prefill-0, decode-0, decode-1 ...
                                 └─── EngineSet: starts, watches, replaces, adds, removes

`paceline serve` has the two halves in processes of their own: see `actors/supervisor.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import msgspec

from paceline.actors.engine_set import (
    BACKOFF_S,
    EngineInfo,
    EngineSet,
    Start,
    engine_config,
    first_roles,
    is_linked,
)
from paceline.actors.members import MemberKeeper, Wanted
from paceline.actors.router import Router
from paceline.runtime.config import EngineConfig, FleetConfig
from paceline.runtime.errors import DeadlineError, EngineError
from paceline.runtime.preflight import Facts
from paceline.runtime.types import EngineRole, EngineStatus, Request, TokenDelta

KNOWN_S = 20.0
"""How long the router may take to know all that serve."""


def open_engines(
    config: EngineConfig,
    facts: Facts,
    settings: FleetConfig,
    *,
    on_change: Callable[[], None] = lambda: None,
    drain_s: float = 600.0,
) -> EngineSet:
    """Start engines where the config says. Raises UserError or EngineError."""
    linked = is_linked(settings, config)
    configs = [
        engine_config(config, settings, role=role, engine_id=role, linked=linked)
        for role in first_roles(settings, config)
    ]
    num_ranks = sum(each.num_ranks for each in configs)
    shared = len(configs) > 1 or linked
    if config.distributed_executor_backend != "ray":
        from paceline.runtime import local

        config = _sharing(config, num_ranks) if shared else config
        return EngineSet(
            config, facts, settings, start=local.connect, on_change=on_change, drain_s=drain_s
        )
    from paceline.actors.app import RayCluster

    cluster = RayCluster(config, num_ranks=num_ranks, spread=settings.engine_placement == "spread")
    config = _sharing(config, -(-num_ranks // cluster.num_nodes)) if shared else config
    return EngineSet(
        config,
        facts,
        settings,
        start=cluster.start,
        on_change=on_change,
        on_close=cluster.close,
        drain_s=drain_s,
    )


def _sharing(config: EngineConfig, num_ranks: int) -> EngineConfig:
    """So many ranks of several engines share the cores of a host."""
    threads = config.cpu_threads or max(1, (os.cpu_count() or 1) // num_ranks)
    return msgspec.structs.replace(config, cpu_threads=threads)


def open_fleet(config: EngineConfig, facts: Facts, settings: FleetConfig) -> Fleet:
    """A fleet where the config says, all of whose engines serve. Raises UserError or EngineError, with
    everything taken down."""
    return Fleet(
        config,
        facts,
        settings,
        engines=lambda on_change: open_engines(config, facts, settings, on_change=on_change),
    )


class Fleet:
    """Satisfies `EngineClient` over engines that come and go. Any thread may change it."""

    def __init__(
        self,
        config: EngineConfig,
        facts: Facts,
        settings: FleetConfig,
        *,
        start: Start | None = None,
        engines: Callable[[Callable[[], None]], EngineSet] | None = None,
        on_close: Callable[[], None] = lambda: None,
        backoff_s: tuple[float, float] = BACKOFF_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Returns when all engines that `settings` ask for serve; raises what the first of them that
        fails raises, with everything taken down. `engines` makes the set of them and is given what it
        is to call on a change; without it one is made that uses `start`."""

        def own(on_change: Callable[[], None]) -> EngineSet:
            assert start is not None, "expected start or engines"
            return EngineSet(
                config,
                facts,
                settings,
                start=start,
                on_change=on_change,
                on_close=on_close,
                backoff_s=backoff_s,
                clock=clock,
            )

        self._router = make_router(config, settings)
        self._keeper = MemberKeeper(self._router, on_drained=lambda name: self._set.drained(name))
        try:
            self._set = (engines or own)(self._on_change)
            try:
                self._set.wait()
                self._on_change()
                self._wait_known()
            except BaseException:
                self._set.close()
                raise
        except BaseException:
            self._keeper.close()
            self._router.close()
            raise

    def engines(self) -> list[EngineInfo]:
        """See `EngineSet.engines`."""
        return self._set.engines()

    def add_engine(self, role: EngineRole) -> str:
        """See `EngineSet.add_engine`."""
        return self._set.add_engine(role)

    def remove_engine(self, engine_id: str) -> None:
        """See `EngineSet.remove_engine`."""
        self._set.remove_engine(engine_id)

    def submit(self, requests: list[Request]) -> None:
        self._router.submit(requests)

    def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:
        if (lost := self._set.lost) is not None:
            raise EngineError(str(lost))
        return self._router.poll(wait_s)

    def abort(self, request_ids: list[str]) -> None:
        self._router.abort(request_ids)

    def status(self) -> EngineStatus:
        return self._router.status()

    def close(self) -> None:
        self._keeper.close()
        self._router.close()
        self._set.close()

    def _on_change(self) -> None:
        if hasattr(self, "_set"):
            self._keeper.tell(
                Wanted(
                    engine_id=each.engine_id,
                    role=each.role,
                    draining=each.draining,
                    link=each.started.link,
                )
                for each in self._set.live()
            )

    def _wait_known(self) -> None:
        """Until every engine is the router's, and has told where its KV links are."""
        deadline_s = time.monotonic() + KNOWN_S
        while not all(self._is_known(each) for each in self._set.engines()):
            if time.monotonic() >= deadline_s:
                raise DeadlineError(f"waited {KNOWN_S:.0f} s for the engines' first status")
            self._router.poll(0.01)

    def _is_known(self, engine: EngineInfo) -> bool:
        known = {each.engine_id: each for each in self._router.status().members}
        return engine.engine_id in known and known[engine.engine_id].num_blocks > 0


def make_router(config: EngineConfig, settings: FleetConfig, *, tag: str = "") -> Router:
    """A router that waits for engines in place of those it loses. `tag` tells what it calls requests
    from other routers' names of them."""
    return Router(
        policy=settings.routing_policy,
        transfer=config.kv_transfer_config,
        enable_prefix_caching=config.enable_prefix_caching,
        tag=tag,
        resume_s=config.placement_timeout_s + config.load_timeout_s,
        on_lost=lambda engine_id, error: None,  # noqa: ARG005  whoever watches the engines sees it too
    )

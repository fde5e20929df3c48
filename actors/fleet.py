"""Engines that serve as one: started side by side, replaced when they are lost, added and taken away
while others serve.

    frontend ──EngineClient──> Fleet ──> Router ──> prefill-0, decode-0, decode-1 ...

    add_engine ──> starting ──> serving ──remove_engine──> draining ──> forgotten
                    │    ^         │
          failed <──┘    └──lost───┘ under a new name

The router knows requests and engines that live; the fleet knows how engines come to be and end. Each
engine is started by a thread of its own, which ends early when the fleet is closed.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import msgspec

from paceline.actors.router import Member, Router
from paceline.runtime.config import EngineConfig, FleetConfig, KvTransferConfig
from paceline.runtime.engine import EngineClient
from paceline.runtime.errors import DeadlineError, EngineError, PacelineError, UserError
from paceline.runtime.preflight import Facts
from paceline.runtime.types import EngineRole, EngineStatus, Request, TokenDelta

logger = logging.getLogger(__name__)

BACKOFF_S = (1.0, 60.0)
"""First and longest wait before an engine is started again that did not last."""
STEADY_S = 60.0
"""An engine that served so long is replaced at once when it is lost."""
START_GRACE_S = 120.0
"""What a start may take besides its own deadlines."""
FIRST_STATUS_S = 20.0
CLOSE_S = 20.0
"""What starts under way may take to end."""
MOST_FAILED = 16
"""Engines that did not start and are still told of."""

EngineState = Literal["starting", "serving", "draining", "failed"]


class UnknownEngineError(UserError):
    """There is no engine of that name."""


class FleetError(UserError):
    """What was asked for would leave the fleet unable to serve."""


class Start(Protocol):
    """Brings an engine up, wherever it runs."""

    def __call__(
        self, config: EngineConfig, facts: Facts, *, stop: threading.Event
    ) -> EngineClient:
        """An engine, loaded and ready. Raises UserError or EngineError, soon after `stop` is set at
        the latest, with everything taken down."""


class EngineInfo(NamedTuple):
    """An engine of a fleet."""

    engine_id: str
    role: EngineRole
    state: EngineState
    error: str
    """Why the last start failed, if one did."""


@dataclass(slots=True, eq=False)
class _Engine:
    engine_id: str
    role: EngineRole
    num_short: int = 0
    """Engines in a row, of which it replaces the last, that did not last."""
    state: EngineState = "starting"
    served_since_s: float = 0.0
    failure: Exception | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when it is not wanted any more before it serves."""


def is_fleet(settings: FleetConfig, config: EngineConfig) -> bool:
    """Whether engines are to serve together, or one alone without links to others."""
    return settings.num_engines > 1 or config.kv_transfer_config is not None


def first_roles(settings: FleetConfig, config: EngineConfig) -> list[EngineRole]:
    """The roles a fleet begins with."""
    reads: list[EngineRole] = ["prefill"] * settings.prefill_replicas
    if reads:
        return reads + ["decode"] * settings.decode_replicas
    role: EngineRole = "both"
    if config.kv_transfer_config is not None:
        role = _ROLES[config.kv_transfer_config.kv_role]
    return [role] * settings.decode_replicas


_ROLES: dict[str, EngineRole] = {
    "kv_producer": "prefill",
    "kv_consumer": "decode",
    "kv_both": "both",
}
_KV_ROLES = {role: kv_role for kv_role, role in _ROLES.items()}


def engine_config(
    config: EngineConfig, settings: FleetConfig, *, role: EngineRole, engine_id: str, linked: bool
) -> EngineConfig:
    """One engine's own settings. Without `linked` its KV stays where it is.

    A prefill engine has the drafter only so that its KV can travel, on no more ranks than it has for
    the target.
    """
    prefills = role == "prefill"
    size = (
        settings.prefill_tensor_parallel_size if prefills else settings.decode_tensor_parallel_size
    )
    size = size or config.tensor_parallel_size
    transfer = config.kv_transfer_config or KvTransferConfig()
    spec = config.speculative_config
    if spec is not None and prefills:
        if transfer.draft_kv == "rebuild" or spec.method == "ngram":
            spec = None
        elif (spec.draft_tensor_parallel_size or 0) > size:
            spec = msgspec.structs.replace(spec, draft_tensor_parallel_size=size)
    return msgspec.structs.replace(
        config,
        tensor_parallel_size=size,
        speculative_config=spec,
        kv_transfer_config=msgspec.structs.replace(
            transfer, engine_id=engine_id, kv_role=_KV_ROLES[role]
        )
        if linked
        else None,
    )


def open_fleet(config: EngineConfig, facts: Facts, settings: FleetConfig) -> Fleet:
    """A fleet where the config says, all of whose engines serve. Raises UserError or EngineError, with
    everything taken down."""
    linked = _is_linked(settings, config)
    configs = [
        engine_config(config, settings, role=role, engine_id=role, linked=linked)
        for role in first_roles(settings, config)
    ]
    num_ranks = sum(each.world_size for each in configs)
    if config.distributed_executor_backend != "ray":
        from paceline.runtime import local

        return Fleet(_sharing(config, num_ranks), facts, settings, start=local.connect)
    from paceline.actors.app import RayCluster

    cluster = RayCluster(config, num_ranks=num_ranks, spread=settings.engine_placement == "spread")
    config = _sharing(config, -(-num_ranks // cluster.num_nodes))
    return Fleet(config, facts, settings, start=cluster.start, on_close=cluster.close)


def _sharing(config: EngineConfig, num_ranks: int) -> EngineConfig:
    """So many ranks of several engines share the cores of a host."""
    threads = config.cpu_threads or max(1, (os.cpu_count() or 1) // num_ranks)
    return msgspec.structs.replace(config, cpu_threads=threads)


def _is_linked(settings: FleetConfig, config: EngineConfig) -> bool:
    return settings.prefill_replicas > 0 or config.kv_transfer_config is not None


def _hear_from(client: EngineClient) -> None:
    """Wait for a new engine's first status: without it nobody knows where its KV links are. Raises
    EngineError, with the engine taken down."""
    deadline_s = time.monotonic() + FIRST_STATUS_S
    try:
        while not client.status().num_blocks:
            if time.monotonic() >= deadline_s:
                raise DeadlineError(f"waited {FIRST_STATUS_S:.0f} s for the engine's first status")
            client.poll(0.05)
    except BaseException:
        client.close()
        raise


class Fleet:
    """Satisfies `EngineClient` over engines that come and go. Any thread may change it."""

    def __init__(
        self,
        config: EngineConfig,
        facts: Facts,
        settings: FleetConfig,
        *,
        start: Start,
        on_close: Callable[[], None] = lambda: None,
        backoff_s: tuple[float, float] = BACKOFF_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Returns when all engines that `settings` ask for serve; raises what the first of them that
        fails raises, with everything taken down. `on_close` is called once, after all have ended."""
        self._config, self._facts, self._settings = config, facts, settings
        self._start, self._on_close = start, on_close
        self._backoff_s = backoff_s
        self._clock = clock
        self._linked = _is_linked(settings, config)
        transfer = config.kv_transfer_config
        self._given_id = None if transfer is None else transfer.engine_id
        self._router = Router(
            policy=settings.routing_policy,
            transfer=transfer,
            enable_prefix_caching=config.enable_prefix_caching,
            on_lost=self._on_lost if settings.restart_engines else None,
        )
        self._changed = threading.Condition()
        self._engines: dict[str, _Engine] = {}
        """By name, in the order they were asked for."""
        self._threads: list[threading.Thread] = []
        self._numbers: defaultdict[EngineRole, itertools.count[int]] = defaultdict(itertools.count)
        self._closing = False
        self._is_closed = threading.Event()
        try:
            with self._changed:
                first = [self._begin(role) for role in first_roles(settings, config)]
            self._wait_for(first)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------ engines

    def engines(self) -> list[EngineInfo]:
        """All there are, those included that start, are leaving, or did not start."""
        with self._changed:
            self._forget_gone()
            return [
                EngineInfo(
                    each.engine_id,
                    each.role,
                    each.state,
                    "" if each.failure is None else str(each.failure),
                )
                for each in self._engines.values()
            ]

    def add_engine(self, role: EngineRole) -> str:
        """Start one more; its name. It serves as soon as it has loaded. Raises FleetError where an
        engine of that role would be of no use."""
        with self._changed:
            self._check()
            if role == "prefill" and not self._linked:
                raise FleetError(
                    "these engines have no KV links: start the server with prefill_replicas or a "
                    "kv_transfer_config to add engines that read prompts for others"
                )
            return self._begin(role).engine_id

    def remove_engine(self, engine_id: str) -> None:
        """Give an engine nothing new, and end it once nobody waits for it. Safe to call twice. Raises
        UnknownEngineError, and FleetError where it is the last that can serve."""
        with self._changed:
            self._check()
            self._forget_gone()
            engine = self._engines.get(engine_id)
            if engine is None:
                raise UnknownEngineError(f"there is no engine {engine_id!r:.80}")
            if engine.state == "serving":
                self._drain(engine)
            elif engine.state != "draining":
                engine.stop.set()
                del self._engines[engine_id]
            self._changed.notify_all()

    def _drain(self, engine: _Engine) -> None:
        others = [
            each
            for each in self._engines.values()
            if each.state == "serving" and each is not engine
        ]
        writes = engine.role != "prefill"
        if not others or (writes and all(each.role == "prefill" for each in others)):
            what = "serves" if not others else "writes texts"
            raise FleetError(
                f"{engine.engine_id} is the last engine that {what}: add another first, and wait until "
                "it serves"
            )
        engine.state = "draining"
        try:
            self._router.drain_member(engine.engine_id)
        except KeyError:  # lost a moment ago: it is as good as drained
            self._engines.pop(engine.engine_id, None)

    # ------------------------------------------------------------------------------------- EngineClient

    def submit(self, requests: list[Request]) -> None:
        self._router.submit(requests)

    def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:
        return self._router.poll(wait_s)

    def abort(self, request_ids: list[str]) -> None:
        self._router.abort(request_ids)

    def status(self) -> EngineStatus:
        return self._router.status()

    def close(self) -> None:
        with self._changed:
            first, self._closing = not self._closing, True
            for engine in self._engines.values():
                engine.stop.set()
            threads = list(self._threads)
            self._changed.notify_all()
        deadline_s = time.monotonic() + CLOSE_S
        if not first:
            self._is_closed.wait(CLOSE_S)
            return
        try:
            self._router.close()
            for thread in threads:
                thread.join(max(0.0, deadline_s - time.monotonic()))
                if thread.is_alive():
                    logger.error("%s has not ended in %g s", thread.name, CLOSE_S)
        finally:
            self._on_close()
            self._is_closed.set()

    # -------------------------------------------------------------------------------- starting, and again

    def _begin(self, role: EngineRole, *, num_short: int = 0) -> _Engine:
        """Start an engine in a thread of its own. With the lock held."""
        name = "engine" if role == "both" else role
        engine_id, self._given_id = self._given_id or f"{name}-{next(self._numbers[role])}", None
        engine = _Engine(engine_id, role, num_short)
        self._engines[engine.engine_id] = engine
        thread = threading.Thread(
            target=self._bring_up, args=(engine,), name=f"start of {engine.engine_id}", daemon=True
        )
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()
        return engine

    def _bring_up(self, engine: _Engine) -> None:
        """Start an engine; one in place of another until it serves or nobody wants it."""
        config = engine_config(
            self._config,
            self._settings,
            role=engine.role,
            engine_id=engine.engine_id,
            linked=self._linked,
        )
        first_s, most_s = self._backoff_s
        replaces = engine.num_short > 0
        while True:
            wait_s = (
                min(most_s, first_s * 2.0 ** (engine.num_short - 2)) if engine.num_short > 1 else 0
            )
            if engine.stop.wait(wait_s):
                return
            try:
                client = self._start(config, self._facts, stop=engine.stop)
                _hear_from(client)
            except Exception as error:  # whatever it is, others serve on
                if engine.stop.is_set():
                    return
                self._note_failure(engine, error, again=replaces)
                if not replaces:
                    return
                engine.num_short += 1
            else:
                self._join(engine, client)
                return

    def _join(self, engine: _Engine, client: EngineClient) -> None:
        """Let a started engine serve, if it is still wanted."""
        with self._changed:
            if wanted := not engine.stop.is_set():
                try:
                    self._router.add_member(Member(engine.engine_id, engine.role, client))
                except EngineError:  # the router has lost its last engine and takes no more
                    wanted = False
                else:
                    engine.state, engine.failure = "serving", None
                    engine.served_since_s = self._clock()
            self._changed.notify_all()
        if wanted:
            logger.info("engine %s serves", engine.engine_id)
        else:
            client.close()

    def _note_failure(self, engine: _Engine, error: Exception, *, again: bool) -> None:
        logger.error(
            "engine %s did not start: %s",
            engine.engine_id,
            error,
            exc_info=None if isinstance(error, PacelineError) else error,
        )
        with self._changed:
            engine.failure = error
            if not again:
                engine.state = "failed"
                failed = [each for each in self._engines.values() if each.state == "failed"]
                for old in failed[:-MOST_FAILED]:
                    del self._engines[old.engine_id]
            self._changed.notify_all()

    def _on_lost(self, engine_id: str, error: EngineError) -> None:  # noqa: ARG002  the router logs it
        """The router has given an engine up: another takes its place."""
        with self._changed:
            engine = self._engines.pop(engine_id, None)
            if engine is None or engine.state == "draining" or self._closing:
                return
            lasted = self._clock() - engine.served_since_s >= STEADY_S
            other = self._begin(
                engine.role, num_short=1 if lasted else max(1, engine.num_short) + 1
            )
        logger.warning("engine %s starts in place of %s", other.engine_id, engine_id)

    def _wait_for(self, engines: list[_Engine]) -> None:
        """Until all serve, or one has failed."""
        patience_s = self._config.placement_timeout_s + self._config.load_timeout_s + START_GRACE_S
        deadline_s = time.monotonic() + patience_s
        with self._changed:
            while late := [each.engine_id for each in engines if each.state == "starting"]:
                self._raise_failure(engines)
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise DeadlineError(f"waited {patience_s:.0f} s for {', '.join(late)} to start")
                self._changed.wait(left_s)
            self._raise_failure(engines)

    def _raise_failure(self, engines: list[_Engine]) -> None:
        for engine in engines:
            if isinstance(engine.failure, PacelineError):
                kind = UserError if isinstance(engine.failure, UserError) else EngineError
                raise kind(f"engine {engine.engine_id}: {engine.failure}") from engine.failure
            if engine.failure is not None:
                raise engine.failure

    def _forget_gone(self) -> None:
        """Forget engines that have drained, or were lost and are not replaced. With the lock held."""
        live = self._router.member_ids
        left = ("draining",) if self._settings.restart_engines else ("draining", "serving")
        for engine in list(self._engines.values()):
            if engine.state in left and engine.engine_id not in live:
                del self._engines[engine.engine_id]

    def _check(self) -> None:
        if self._closing:
            raise EngineError("this fleet is closed")

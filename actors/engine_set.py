"""Engines come and go: started side by side, watched, replaced when they are lost, added and taken away
while others serve.

    add_engine ──> starting ──> serving ──remove_engine──> draining ──> forgotten
                    │    ^         │
          failed <──┘    └──lost───┘ under a new name

Whoever sends requests to them is told of every change and asks for `live`. Each engine is started and
then watched by a thread of its own, which ends early when all are closed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import msgspec

from paceline.runtime.config import EngineConfig, FleetConfig, KvTransferConfig
from paceline.runtime.engine import EngineClient
from paceline.runtime.errors import DeadlineError, EngineError, PacelineError, UserError
from paceline.runtime.link import LinkAddress
from paceline.runtime.preflight import Facts
from paceline.runtime.types import EngineRole

logger = logging.getLogger(__name__)

BACKOFF_S = (1.0, 60.0)
"""First and longest wait before an engine is started again that did not last."""
STEADY_S = 60.0
"""An engine that served so long is replaced at once when it is lost."""
START_GRACE_S = 120.0
"""What a start may take besides its own deadlines."""
CLOSE_S = 20.0
"""What starts under way, and engines that end, may take."""
WATCH_S = 0.5
MOST_FAILED = 16
"""Engines that did not start and are still told of."""

EngineState = Literal["starting", "serving", "draining", "failed"]


class UnknownEngineError(UserError):
    """There is no engine of that name."""


class FleetError(UserError):
    """What was asked for would leave nobody to serve."""


class StartedEngine(Protocol):
    """An engine that is up, for any number of frontends."""

    @property
    def address(self) -> LinkAddress:
        """Where frontends of other processes link up with it. Raises EngineError once it is closed."""

    def link(self, frontend: bytes | None = None) -> EngineClient:
        """A way to it, under a name of the frontend's own; closing that leaves the engine alone."""

    def watch(self, wait_s: float) -> None:
        """Returns after `wait_s` at the latest. Raises EngineError once the engine is lost."""

    def forget(self, frontend: bytes) -> None:
        """A frontend has ended without a word: so shall its requests."""

    def close(self) -> None:
        """End it. Safe to call twice."""


class Start(Protocol):
    """Brings an engine up, wherever it runs."""

    def __call__(
        self, config: EngineConfig, facts: Facts, *, stop: threading.Event
    ) -> StartedEngine:
        """An engine, loaded and ready. Raises UserError or EngineError, soon after `stop` is set at
        the latest, with everything taken down."""


class EngineInfo(NamedTuple):
    """An engine, as people are told of it."""

    engine_id: str
    role: EngineRole
    state: EngineState
    error: str
    """Why the last start failed, if one did."""


class LiveEngine(NamedTuple):
    """An engine that has requests, or may get some."""

    engine_id: str
    role: EngineRole
    draining: bool
    """Whether it gets no new ones."""
    started: StartedEngine


@dataclass(slots=True, eq=False)
class _Engine:
    engine_id: str
    role: EngineRole
    num_short: int = 0
    """Engines in a row, of which it replaces the last, that did not last."""
    state: EngineState = "starting"
    served_since_s: float = 0.0
    drains_until_s: float = 0.0
    failure: Exception | None = None
    started: StartedEngine | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when it is not wanted any more."""
    ended: threading.Event = field(default_factory=threading.Event)
    """Set once it holds nothing any more."""
    after: threading.Event | None = None
    """When what it replaces has ended: not before that there may be room for it."""


class EngineSet:
    """Any thread may change it."""

    def __init__(
        self,
        config: EngineConfig,
        facts: Facts,
        settings: FleetConfig,
        *,
        start: Start,
        on_change: Callable[[], None] = lambda: None,
        on_close: Callable[[], None] = lambda: None,
        backoff_s: tuple[float, float] = BACKOFF_S,
        drain_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts all engines that `settings` ask for; `wait` waits for them. `on_change` is called by any
        thread whenever `live` is another; `on_close` once, after all have ended. An engine that is
        removed gets `drain_s` to finish what it has."""
        self._config, self._facts, self._settings = config, facts, settings
        self._start, self._on_change, self._on_close = start, on_change, on_close
        self._backoff_s, self._drain_s, self._clock = backoff_s, drain_s, clock
        self.linked = is_linked(settings, config)
        """Whether KV moves between them."""
        transfer = config.kv_transfer_config
        self._given_id = None if transfer is None else transfer.engine_id
        self._changed = threading.Condition()
        self._engines: dict[str, _Engine] = {}
        """By name, in the order they were asked for."""
        self._threads: list[threading.Thread] = []
        self._numbers: defaultdict[EngineRole, itertools.count[int]] = defaultdict(itertools.count)
        self._closing = False
        self._is_closed = threading.Event()
        self._lost: EngineError | None = None
        with self._changed:
            self._first = [self._begin(role) for role in first_roles(settings, config)]

    # ------------------------------------------------------------------------------------ what there is

    def engines(self) -> list[EngineInfo]:
        """All there are, those included that start, are leaving, or did not start."""
        with self._changed:
            return [
                EngineInfo(
                    each.engine_id,
                    each.role,
                    each.state,
                    "" if each.failure is None else str(each.failure),
                )
                for each in self._engines.values()
            ]

    def live(self) -> list[LiveEngine]:
        """Those to which requests may be on their way."""
        with self._changed:
            return [
                LiveEngine(each.engine_id, each.role, each.state == "draining", each.started)
                for each in self._engines.values()
                if each.started is not None
            ]

    @property
    def lost(self) -> EngineError | None:
        """Why nobody can serve any more, now or ever: the last that wrote texts is gone and is not
        replaced."""
        return self._lost

    def wait(self) -> None:
        """Until all of the first engines serve. Raises what the first of them that fails raised."""
        patience_s = self._config.placement_timeout_s + self._config.load_timeout_s + START_GRACE_S
        deadline_s = time.monotonic() + patience_s
        with self._changed:
            while late := [each.engine_id for each in self._first if each.state == "starting"]:
                self._raise_failure(self._first)
                self._check()
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise DeadlineError(f"waited {patience_s:.0f} s for {', '.join(late)} to start")
                self._changed.wait(left_s)
            self._raise_failure(self._first)

    # ------------------------------------------------------------------------------------------ changes

    def add_engine(self, role: EngineRole) -> str:
        """Start one more; its name. It serves as soon as it has loaded. Raises FleetError where an
        engine of that role would be of no use."""
        with self._changed:
            self._check()
            if role == "prefill" and not self.linked:
                raise FleetError(
                    "these engines have no KV links: start the server with prefill_replicas or a "
                    "kv_transfer_config to add engines that read prompts for others"
                )
            return self._begin(role).engine_id

    def remove_engine(self, engine_id: str) -> None:
        """Give an engine nothing new, and end it once nobody waits for it, or in `drain_s`: what is left
        then goes on elsewhere. Safe to call twice. Raises UnknownEngineError, and FleetError where it
        is the last that can serve."""
        with self._changed:
            self._check()
            engine = self._engines.get(engine_id)
            if engine is None:
                raise UnknownEngineError(f"there is no engine {engine_id!r:.80}")
            if engine.state == "serving":
                self._refuse_last(engine)
                engine.state = "draining"
                engine.drains_until_s = self._clock() + self._drain_s
            elif engine.state != "draining":
                engine.stop.set()
                del self._engines[engine_id]
            self._changed.notify_all()
        self._on_change()

    def drained(self, engine_id: str) -> None:
        """Nobody sends anything to an engine any more, or waits for it."""
        with self._changed:
            engine = self._engines.get(engine_id)
            if engine is not None and engine.state == "draining":
                engine.stop.set()

    def forget(self, frontend: bytes) -> None:
        """A frontend has ended without a word."""
        for each in self.live():
            with _none_if_lost():
                each.started.forget(frontend)

    def close(self) -> None:
        """End all. Safe to call twice."""
        with self._changed:
            first, self._closing = not self._closing, True
            for engine in self._engines.values():
                engine.stop.set()
            threads = list(self._threads)
            self._changed.notify_all()
        if not first:
            self._is_closed.wait(CLOSE_S)
            return
        deadline_s = time.monotonic() + CLOSE_S
        try:
            for thread in threads:
                thread.join(max(0.0, deadline_s - time.monotonic()))
                if thread.is_alive():
                    logger.error("%s has not ended in %g s", thread.name, CLOSE_S)
        finally:
            self._on_close()
            self._is_closed.set()

    def _refuse_last(self, engine: _Engine) -> None:
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

    # -------------------------------------------------------------------------------- an engine's thread

    def _begin(
        self, role: EngineRole, *, num_short: int = 0, after: threading.Event | None = None
    ) -> _Engine:
        """Start an engine in a thread of its own. With the lock held."""
        name = "engine" if role == "both" else role
        engine_id, self._given_id = self._given_id or f"{name}-{next(self._numbers[role])}", None
        engine = _Engine(engine_id, role, num_short, after=after)
        self._engines[engine.engine_id] = engine
        thread = threading.Thread(
            target=self._live, args=(engine,), name=f"engine {engine.engine_id}", daemon=True
        )
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()
        return engine

    def _live(self, engine: _Engine) -> None:
        """An engine's whole life."""
        started = self._bring_up(engine)
        if started is None:
            return
        try:
            if self._enter(engine, started):
                self._watch(engine, started)
        finally:
            try:
                started.close()
            finally:
                engine.ended.set()

    def _bring_up(self, engine: _Engine) -> StartedEngine | None:
        """Start an engine; one in place of another until it is up or nobody wants it."""
        config = engine_config(
            self._config,
            self._settings,
            role=engine.role,
            engine_id=engine.engine_id,
            linked=self.linked,
        )
        while engine.after is not None and not engine.after.wait(WATCH_S):
            if engine.stop.is_set():
                return None
        first_s, most_s = self._backoff_s
        replaces = engine.num_short > 0
        while True:
            wait_s = (
                min(most_s, first_s * 2.0 ** (engine.num_short - 2)) if engine.num_short > 1 else 0
            )
            if engine.stop.wait(wait_s):
                return None
            try:
                return self._start(config, self._facts, stop=engine.stop)
            except Exception as error:  # whatever it is, others serve on
                if engine.stop.is_set():
                    return None
                self._note_failure(engine, error, again=replaces)
                if not replaces:
                    return None
                engine.num_short += 1

    def _enter(self, engine: _Engine, started: StartedEngine) -> bool:
        """Let a started engine serve, if it is still wanted."""
        with self._changed:
            if engine.stop.is_set():
                return False
            engine.state, engine.failure, engine.started = "serving", None, started
            engine.served_since_s = self._clock()
            self._changed.notify_all()
        logger.info("engine %s serves", engine.engine_id)
        self._on_change()
        return True

    def _watch(self, engine: _Engine, started: StartedEngine) -> None:
        """Until it is lost or not wanted any more."""
        error = None
        while error is None and not engine.stop.is_set():
            try:
                started.watch(WATCH_S)
            except EngineError as lost:
                error = lost
            except Exception as unknown:  # whatever it is, others serve on
                logger.exception("engine %s cannot be watched", engine.engine_id)
                error = EngineError(f"{type(unknown).__name__}: {unknown}")
            if engine.state == "draining" and self._clock() >= engine.drains_until_s:
                logger.warning(
                    "engine %s has not drained in %g s: what it has goes on elsewhere",
                    engine.engine_id,
                    self._drain_s,
                )
                break
        with self._changed:
            engine.started = None
            self._engines.pop(engine.engine_id, None)
            if error is not None and not engine.stop.is_set():
                self._on_lost(engine, error)
            self._changed.notify_all()
        self._on_change()

    def _on_lost(self, engine: _Engine, error: EngineError) -> None:
        """Another takes its place. With the lock held."""
        logger.error("engine %s is lost: %s", engine.engine_id, error)
        if self._closing or engine.state == "draining":
            return
        if self._settings.restart_engines:
            lasted = self._clock() - engine.served_since_s >= STEADY_S
            num_short = 1 if lasted else max(1, engine.num_short) + 1
            other = self._begin(engine.role, num_short=num_short, after=engine.ended)
            logger.warning("engine %s starts in place of %s", other.engine_id, engine.engine_id)
        elif all(each.role == "prefill" for each in self._engines.values()):
            self._lost = error

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

    def _raise_failure(self, engines: list[_Engine]) -> None:
        for engine in engines:
            if isinstance(engine.failure, PacelineError):
                kind = UserError if isinstance(engine.failure, UserError) else EngineError
                raise kind(f"engine {engine.engine_id}: {engine.failure}") from engine.failure
            if engine.failure is not None:
                raise engine.failure

    def _check(self) -> None:
        if self._closing:
            raise EngineError("these engines are closed")


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


def is_linked(settings: FleetConfig, config: EngineConfig) -> bool:
    """Whether KV moves between the engines."""
    return settings.prefill_replicas > 0 or config.kv_transfer_config is not None


def _none_if_lost() -> contextlib.AbstractContextManager[None]:
    """That it is lost is found by whoever watches it."""
    return contextlib.suppress(EngineError)

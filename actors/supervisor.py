"""What `paceline serve` is: it starts engines and frontends, watches both, and replaces what ends.

    listening sockets ──inherited──> frontend-0, frontend-1 ...     processes
                                          │ pipes
    signals ──> Supervisor ───────────────┤
                                          │ EngineSet
                                     decode-0, prefill-0 ...        Ray actors, or processes

It sees no request, so there is little in it that could fail. Frontends come and go with their
clients' connections; engines hold the weights and outlive them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import FrameType

import msgspec

from paceline.actors.engine_set import EngineSet, StartedEngine
from paceline.actors.frontend import (
    Answer,
    Ask,
    Drain,
    Drained,
    EngineAt,
    Engines,
    FrontendSpec,
    Ping,
    Pong,
    Serving,
    Stopped,
    frontend_process,
)
from paceline.runtime import stacks
from paceline.runtime.config import EngineConfig, FleetConfig, ServerConfig
from paceline.runtime.counts import CountsMemory
from paceline.runtime.errors import DeadlineError, EngineError, PacelineError, UserError
from paceline.runtime.link import LinkAddress
from paceline.runtime.preflight import Facts

logger = logging.getLogger(__name__)

OPEN_S = 120.0
"""How long a frontend may take from its start to open doors."""
END_S = 5.0
"""What a frontend gets beyond the time it was given to drain."""
BACKOFF_S = (0.05, 10.0)
"""First and longest wait before a frontend is started again that did not last."""
STEADY_S = 30.0
LOOK_S = 0.2
TWICE_S = 0.5
"""Who stops a job may signal its process and its process group: that is one signal."""
PING_S = 1.0
SILENT_S = 15.0
"""How long the event loop of a frontend may stand still."""

_from_frontend = msgspec.msgpack.Decoder(Serving | Drained | Ask | Pong | Stopped)
_out = msgspec.msgpack.Encoder()


@dataclass(slots=True, eq=False)
class _Frontend:
    name: str
    slot: int
    process: BaseProcess
    pipe: Connection
    began_s: float
    num_short: int
    """Frontends in a row, of which it replaces the last, that did not last."""
    heard_s: float
    """When its event loop last answered."""
    pinged_s: float = 0.0
    ports: tuple[int, ...] = ()
    drained: set[str] = field(default_factory=set)
    stopped: Stopped | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, message: Engines | Drain | Ping | Answer) -> None:
        with self.lock, contextlib.suppress(OSError):  # it is gone, as its thread will see
            self.pipe.send_bytes(_out.encode(message))


class Supervisor:
    """Owns the sockets, the engines and the frontends."""

    def __init__(
        self,
        facts: Facts,
        config: EngineConfig,
        server: ServerConfig,
        settings: FleetConfig,
        listener: socket.socket,
        *,
        open_engines: Callable[[Callable[[], None]], EngineSet],
    ) -> None:
        """`open_engines` starts them and is given what it is to call on a change."""
        self._facts, self._config, self._server = facts, config, server
        self._settings, self._listener = settings, listener
        self._open_engines = open_engines
        self._counts = CountsMemory(num_slots=server.api_server_count)
        self._set: EngineSet | None = None
        self._frontends: dict[int, _Frontend] = {}
        """By slot."""
        self._names = itertools.count()
        self._news: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """What threads have for the main one to do."""
        self._complete = False
        """Whether all engines that were asked for have been up."""
        self._ready = False
        """Whether all doors have been open: from then on a frontend that cannot go on is replaced."""
        self._looked_s = -math.inf
        """When the frontends were last looked at."""
        self._draining = False
        self._told_s = 0.0
        self._told: int | None = None
        """The signal that came."""

    def run(self, on_ready: Callable[[tuple[int, ...], list[str]], None]) -> int:
        """Serve until a signal comes or no engine is left; the exit code. `on_ready` is told the ports
        and the engines. Raises UserError or EngineError, with everything taken down."""
        with self._signals():
            try:
                for slot in range(self._server.api_server_count):
                    self._start(slot)
                self._set = self._open_engines(self._publish)
                self._set.wait()
                self._complete = True
                self._publish()
                self._until(self._all_open, OPEN_S)
                if self._told is None:
                    self._ready = True
                    on_ready(
                        next(iter(self._frontends.values())).ports,
                        [each.engine_id for each in self._set.engines()],
                    )
                self._until(lambda: False, None)
                return self._drain()
            finally:
                self._end()

    # ------------------------------------------------------------------------------------------ engines

    def _publish(self) -> None:
        """Tell every frontend which engines there are. Any thread."""
        self._news.put(self._tell_all)

    def _tell_all(self) -> None:
        for each in self._frontends.values():
            each.say(self._engines())

    def _engines(self) -> Engines:
        if self._set is None:
            return Engines(engines=())
        live = {each.engine_id: each.started for each in self._set.live()}
        engines = []
        for info in self._set.engines():
            engines.append(
                EngineAt(
                    engine_id=info.engine_id,
                    role=info.role,
                    state=info.state,
                    error=info.error,
                    address=_address(live.get(info.engine_id)),
                )
            )
        return Engines(
            engines=tuple(engines),
            complete=self._complete,
            lost=None if self._set.lost is None else str(self._set.lost),
        )

    # ---------------------------------------------------------------------------------------- frontends

    def _start(self, slot: int, *, num_short: int = 0) -> None:
        name = f"f{next(self._names)}"
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        spec = FrontendSpec(
            name=name,
            slot=slot,
            role=f"frontend-{slot}",
            facts=self._facts,
            config=self._config,
            server=self._server,
            settings=self._settings,
            num_frontends=self._server.api_server_count,
            counts=self._counts,
            logs_throughput=slot == 0 and not self._server.disable_log_stats,
        )
        process = context.Process(
            target=frontend_process,
            args=(spec, self._listener, theirs),
            name=f"frontend-{slot}",
            daemon=True,
        )
        process.start()
        theirs.close()
        frontend = self._frontends[slot] = _Frontend(
            name, slot, process, ours, time.monotonic(), num_short, heard_s=time.monotonic()
        )
        threading.Thread(target=self._listen, args=(frontend,), name=name, daemon=True).start()
        frontend.say(self._engines())

    def _listen(self, frontend: _Frontend) -> None:
        """A frontend's own thread: what it says, until it is gone."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._hear(frontend, _from_frontend.decode(frontend.pipe.recv_bytes()))
        frontend.process.join(END_S)
        if frontend.process.is_alive():
            frontend.process.kill()
            frontend.process.join(END_S)
        self._news.put(lambda: self._on_gone(frontend))
        if self._set is not None:
            self._set.forget(frontend.name.encode())

    def _hear(self, frontend: _Frontend, message: Serving | Drained | Ask | Pong | Stopped) -> None:
        match message:
            case Pong():
                frontend.heard_s = time.monotonic()
            case Serving():
                frontend.heard_s = time.monotonic()
                self._news.put(lambda: setattr(frontend, "ports", message.ports))
            case Stopped():
                frontend.stopped = message
            case Drained():
                self._news.put(lambda: self._on_drained(frontend, message.engine_id))
            case Ask():
                frontend.say(self._answer(message))

    def _answer(self, ask: Ask) -> Answer:
        try:
            if self._set is None:
                raise EngineError("the engines are still being started")
            engine_id = self._set.add_engine(ask.add) if ask.add is not None else ask.remove or ""
            if ask.remove is not None:
                self._set.remove_engine(ask.remove)
        except PacelineError as error:
            return Answer(number=ask.number, error=str(error), kind=type(error).__name__)
        self._publish()
        return Answer(number=ask.number, engine_id=engine_id)

    def _on_drained(self, frontend: _Frontend, engine_id: str) -> None:
        frontend.drained.add(engine_id)
        if self._set is not None and all(
            engine_id in each.drained for each in self._frontends.values()
        ):
            self._set.drained(engine_id)

    def _on_gone(self, frontend: _Frontend) -> None:
        """A frontend's process has ended: another opens its doors, unless it said that none can."""
        if self._draining or self._frontends.get(frontend.slot) is not frontend:
            return
        stopped = frontend.stopped
        if not self._ready and stopped is not None and stopped.error is not None:
            kind = UserError if stopped.user_error else EngineError
            raise kind(stopped.error)
        lasted = time.monotonic() - frontend.began_s >= STEADY_S
        num_short = 0 if lasted else frontend.num_short + 1
        first_s, most_s = BACKOFF_S
        wait_s = min(most_s, first_s * 2.0 ** (num_short - 1)) if num_short else 0.0
        logger.error(
            "frontend %d ended with exit code %s%s: another starts in %g s",
            frontend.slot,
            frontend.process.exitcode,
            "" if stopped is None or stopped.error is None else f" ({stopped.error})",
            wait_s,
        )
        del self._frontends[frontend.slot]
        timer = threading.Timer(
            wait_s,
            lambda: self._news.put(lambda: self._start_again(frontend.slot, num_short=num_short)),
        )
        timer.daemon = True
        timer.start()

    def _start_again(self, slot: int, *, num_short: int) -> None:
        if not self._draining:
            self._start(slot, num_short=num_short)

    # -------------------------------------------------------------------------------------- begin and end

    def _until(self, done: Callable[[], bool], timeout_s: float | None) -> None:
        """Do what threads ask for until `done`, or a signal came, or no engine is left. Raises
        DeadlineError, and EngineError where none is left."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not done() and self._told is None:
            with contextlib.suppress(queue.Empty):
                self._news.get(timeout=LOOK_S)()
            self._ping()
            if self._set is not None and self._set.lost is not None:
                self._let_hear()
                raise EngineError(f"the engine is lost: {self._set.lost}")
            if deadline_s is not None and time.monotonic() >= deadline_s:
                for each in self._frontends.values():
                    logger.error("%s:\n%s", each.name, stacks.take(each.process.pid or 0))
                raise DeadlineError(
                    f"waited {timeout_s:.0f} s for the frontends to open their doors"
                )

    def _all_open(self) -> bool:
        open_ones = [each for each in self._frontends.values() if each.ports]
        return len(open_ones) == self._server.api_server_count

    def _ping(self) -> None:
        """See that the event loop of every frontend turns; one that hangs is ended."""
        now_s = time.monotonic()
        # this process stood still itself, as after Ctrl-Z: whoever waits for it has done no wrong
        was_away = now_s - self._looked_s > SILENT_S / 2
        self._looked_s = now_s
        for each in self._frontends.values():
            if was_away:
                each.heard_s = now_s
            if now_s - each.pinged_s >= PING_S:
                each.pinged_s = now_s
                each.say(Ping())
            if now_s - each.heard_s > (SILENT_S if each.ports else OPEN_S):
                logger.error("%s hangs:\n%s", each.process.name, stacks.take(each.process.pid or 0))
                each.heard_s = math.inf
                each.process.kill()

    def _let_hear(self) -> None:
        """Every frontend hears that no engine is left, tells its clients, and ends."""
        self._draining = True
        self._tell_all()
        self._until_ended(END_S)

    def _until_ended(self, timeout_s: float) -> None:
        """Wait for the frontends to end, and tell them of engines meanwhile."""
        deadline_s = time.monotonic() + timeout_s
        while any(each.process.is_alive() for each in self._frontends.values()):
            if time.monotonic() >= deadline_s:
                return
            with contextlib.suppress(queue.Empty):
                self._news.get(timeout=LOOK_S)()

    def _drain(self) -> int:
        """Let every frontend end, and its requests with it."""
        self._draining = True
        timeout_s = self._server.shutdown_timeout
        for each in self._frontends.values():
            each.say(Drain(timeout_s=timeout_s))
        self._until_ended(timeout_s + END_S + 10.0)
        return 0

    def _end(self) -> None:
        self._draining = True
        for each in self._frontends.values():
            if each.process.is_alive():
                each.process.kill()
            each.process.join(END_S)
        if self._set is not None:
            self._set.close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal ends `run` in good order, or at once where nothing serves yet; the second
        ends the process."""

        def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            now_s = time.monotonic()
            if self._told is not None:
                if now_s - self._told_s < TWICE_S:
                    return
                for each in self._frontends.values():
                    each.process.kill()
                os._exit(130)
            self._told, self._told_s = number, now_s
            if not (self._ready or any(each.ports for each in self._frontends.values())):
                raise KeyboardInterrupt

        before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _address(started: StartedEngine | None) -> LinkAddress | None:
    """Where frontends link up with an engine; None where it is not up, or just being closed."""
    with contextlib.suppress(EngineError):
        return None if started is None else started.address
    return None

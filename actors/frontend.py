"""A frontend: a process with the doors that clients knock at, and a router of its own.

    HTTP, gRPC ──> AsyncLLM ──> Router ──> every engine's link
                                  ^
    supervisor ──pipe── Engines ──┘     which engines there are, whenever that changes
               <─pipe── Serving, Drained, Ask, Stopped

It holds no weights and no state that outlives its clients' connections, but what it counted, which
lies in memory of the supervisor's: if it dies, the supervisor starts another on the same sockets, and
clients ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

import msgspec

from paceline.actors.engine_set import EngineInfo, EngineState, FleetError, UnknownEngineError
from paceline.actors.fleet import make_router
from paceline.actors.members import MemberKeeper, Wanted
from paceline.actors.throughput import throughput
from paceline.runtime import logs, stacks
from paceline.runtime.async_llm import AsyncLLM, Observer, Observers
from paceline.runtime.config import EngineConfig, FleetConfig, ServerConfig
from paceline.runtime.counts import CountsMemory
from paceline.runtime.errors import DeadlineError, EngineError, PacelineError, UserError
from paceline.runtime.link import LinkAddress, LinkClient
from paceline.runtime.preflight import Facts
from paceline.runtime.tls import server_tls
from paceline.runtime.tracing import open_tracer, otlp_target
from paceline.runtime.types import EngineRole, WireType

logger = logging.getLogger(__name__)

STATS_EVERY_S = 10.0
ASK_S = 30.0
"""How long the supervisor may take to answer."""
CLOSE_GRACE_S = 2.0
"""How long connections may take to end once their requests have."""
KNOWN_S = 5.0
"""How long the doors stay closed for an engine that serves but says nothing, as while its ranks are started
anew."""


# What the two say to each other


class EngineAt(WireType, frozen=True, kw_only=True):
    """An engine, and where it is if requests may be on their way to it."""

    engine_id: str
    role: EngineRole
    state: EngineState
    error: str = ""
    address: LinkAddress | None = None


class Engines(WireType, frozen=True, kw_only=True, tag="engines"):
    """All there are."""

    engines: tuple[EngineAt, ...]
    complete: bool = False
    """Whether all that were asked for when the server began have been up."""
    lost: str | None = None
    """Why there will be no others."""


class Drain(WireType, frozen=True, kw_only=True, tag="drain"):
    """Take nothing new, and end."""

    timeout_s: float


class Ping(WireType, frozen=True, kw_only=True, tag="ping"):
    """To be answered by the event loop, with a `Pong`."""


class Answer(WireType, frozen=True, kw_only=True, tag="answer"):
    """To an `Ask`."""

    number: int
    engine_id: str = ""
    error: str | None = None
    kind: str = ""


class Serving(WireType, frozen=True, kw_only=True, tag="serving"):
    """The doors are open."""

    ports: tuple[int, ...]


class Drained(WireType, frozen=True, kw_only=True, tag="drained"):
    """Nothing of this frontend's is left on an engine that gets no more."""

    engine_id: str


class Ask(WireType, frozen=True, kw_only=True, tag="ask"):
    """Add an engine of a role, or remove one."""

    number: int
    add: EngineRole | None = None
    remove: str | None = None


class Pong(WireType, frozen=True, kw_only=True, tag="pong"):
    """The event loop turns."""


class Stopped(WireType, frozen=True, kw_only=True, tag="stopped"):
    """The last word. With an `error`, why it cannot go on."""

    error: str | None = None
    user_error: bool = False


_from_supervisor = msgspec.msgpack.Decoder(Engines | Drain | Ping | Answer)
_out = msgspec.msgpack.Encoder()
_REFUSALS: dict[str, type[Exception]] = {
    each.__name__: each for each in (FleetError, UnknownEngineError, EngineError)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendSpec:
    """All that a frontend is told when it starts."""

    name: str
    """That no other has, nor any that came before it."""
    slot: int
    """Its place among the frontends; that of one that ended goes to the next."""
    role: str
    """What it is called in the log."""
    facts: Facts
    config: EngineConfig
    server: ServerConfig
    settings: FleetConfig
    num_frontends: int
    counts: CountsMemory
    """Of all frontends."""
    logs_throughput: bool
    """One of them does."""


class Door(Protocol):
    """A running front end."""

    @property
    def port(self) -> int: ...

    async def stop(self, grace_s: float, /) -> None:
        """Take nothing new, end what is left after the grace."""


def frontend_process(spec: FrontendSpec, listener: socket.socket, pipe: Connection) -> None:
    """The life of the process. It ends when told to, or when the supervisor is gone."""
    import uvloop

    for number in (signal.SIGINT, signal.SIGTERM):  # the supervisor's business: it says when to end
        signal.signal(number, signal.SIG_IGN)
    stacks.allow()
    logs.configure(spec.config, role=spec.role, log_requests=not spec.server.disable_log_requests)
    line = SupervisorLine(pipe)
    try:
        uvloop.run(_serve(spec, listener, line))
    except PacelineError as error:
        line.say(Stopped(error=str(error), user_error=isinstance(error, UserError)))
    except Exception as error:
        logger.exception("this frontend cannot go on")
        line.say(Stopped(error=f"{type(error).__name__}: {error}"))
    else:
        line.say(Stopped())
    os._exit(0)  # the last word is said: whatever thread still waits must not hold it up


async def _serve(spec: FrontendSpec, listener: socket.socket, line: SupervisorLine) -> None:
    from paceline.actors.frontends import http
    from paceline.runtime.metrics import Metrics

    config, server = spec.config, spec.server
    speculative = config.speculative_config
    metrics = Metrics(
        http.model_name(config, server),
        version=http.version(),
        num_speculative_tokens=0 if speculative is None else speculative.num_speculative_tokens,
        vllm_names=server.enable_vllm_metric_names,
        counts=spec.counts.counts(slot=spec.slot),
    )
    observers: list[Observer] = [metrics, logs.RequestLog()]
    tracer = None
    if (target := otlp_target(server)) is not None:
        name = http.model_name(config, server)
        tracer = open_tracer(target, model=name, version=http.version(), instance=spec.role)
        observers.append(tracer)
    router = make_router(config, spec.settings, tag=f"{spec.name}.")
    keeper = MemberKeeper(router, on_drained=lambda name: line.say(Drained(engine_id=name)))
    share = max(1, config.max_queued_requests // spec.num_frontends)
    llm = AsyncLLM(
        router,
        spec.facts,
        msgspec.structs.replace(config, max_queued_requests=share),
        observer=Observers(*observers),
        num_engines=spec.settings.decode_replicas,
    )
    loop = asyncio.get_running_loop()

    def on_engines(engines: Engines) -> None:
        keeper.tell(_wanted(engines, spec.name.encode(), keeper))
        if engines.lost is not None:
            loop.call_soon_threadsafe(llm.lose, EngineError(engines.lost))

    def on_ping() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: this process ends
            loop.call_soon_threadsafe(line.say, Pong())

    line.listen(on_engines, on_ping)
    app = http.make_app(llm, spec.facts, config, server, exposition=metrics.exposition, fleet=line)
    doors: list[Door] = []
    try:
        llm.start()
        await _until_known(llm, line)
        doors.append(await http.start(app, listener, tls=server_tls(server)))
        if server.grpc_port is not None:
            from paceline.actors.frontends import grpc

            doors.append(await grpc.start(llm, spec.facts, config, server, shares_port=True))
        line.say(Serving(ports=tuple(door.port for door in doors)))
        stats = asyncio.ensure_future(_log_throughput(llm)) if spec.logs_throughput else None
        try:
            await _until_told(llm, line)
        finally:
            if stats is not None:
                stats.cancel()
        logger.info("stopping: %d requests may finish", llm.num_in_flight)
        await llm.drain(timeout_s=line.drain_s)
    finally:
        for door in doors:
            await door.stop(CLOSE_GRACE_S)
        await llm.close()
        await asyncio.to_thread(keeper.close)
        await asyncio.to_thread(router.close)
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


async def _until_known(llm: AsyncLLM, line: SupervisorLine) -> None:
    """Until the router has heard from every engine that serves, or `KNOWN_S` were not enough: requests wait
    for engines too. Ends early when told to stop."""
    deadline_s = None
    while not line.draining.is_set():
        known = {each.engine_id for each in llm.status().members if each.num_blocks}
        serving = {
            each.engine_id
            for each in line.latest.engines
            if each.address is not None and each.state == "serving"
        }
        if line.latest.complete and serving <= known:
            return
        if line.latest.complete and deadline_s is None:
            deadline_s = time.monotonic() + KNOWN_S
        if deadline_s is not None and time.monotonic() >= deadline_s:
            logger.warning("opens without %s", ", ".join(sorted(serving - known)))
            return
        await asyncio.sleep(0.02)


async def _until_told(llm: AsyncLLM, line: SupervisorLine) -> None:
    """Return when told to stop. Raises EngineError where no engine is left or will be."""
    waiters = [
        asyncio.ensure_future(asyncio.to_thread(line.draining.wait)),
        asyncio.ensure_future(llm.wait_lost()),
    ]
    await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
    waiters[1].cancel()
    line.draining.set()  # the thread that waits for it would hold up the end
    if llm.lost is not None:
        raise EngineError(f"the engine is lost: {llm.lost}")


async def _log_throughput(llm: AsyncLLM) -> None:
    before, before_s = llm.status(), time.monotonic()
    while True:
        await asyncio.sleep(STATS_EVERY_S)
        now, now_s = llm.status(), time.monotonic()
        if now.num_steps != before.num_steps:
            logger.info("%s", throughput(before, now, now_s - before_s))
        before, before_s = now, now_s


def _wanted(engines: Engines, name: bytes, keeper: MemberKeeper) -> list[Wanted]:
    return [
        Wanted(
            engine_id=each.engine_id,
            role=each.role,
            draining=each.state == "draining",
            link=_linker(each.address, each.engine_id, name, keeper),
        )
        for each in engines.engines
        if each.address is not None
    ]


def _linker(
    address: LinkAddress, engine_id: str, name: bytes, keeper: MemberKeeper
) -> Callable[[], LinkClient]:
    def why() -> str | None:
        return None if keeper.is_wanted(engine_id) else "the supervisor has given it up"

    return lambda: LinkClient(address, watch=why, frontend=name)


class SupervisorLine:
    """A frontend's end of the pipe. Satisfies what HTTP needs to list and change engines."""

    def __init__(self, pipe: Connection) -> None:
        self.latest = Engines(engines=())
        self.draining = threading.Event()
        self.drain_s = 0.0
        self._pipe = pipe
        self._lock = threading.Lock()
        self._asked: dict[int, Future[str]] = {}
        self._numbers = itertools.count()

    def listen(self, on_engines: Callable[[Engines], None], on_ping: Callable[[], object]) -> None:
        """From now on, in a thread. The process ends with the supervisor."""

        def run() -> None:
            try:
                while True:
                    message = _from_supervisor.decode(self._pipe.recv_bytes())
                    if isinstance(message, Ping):
                        on_ping()
                    else:
                        self._hear(message, on_engines)
            except (EOFError, OSError):
                os._exit(1)

        threading.Thread(target=run, name="supervisor", daemon=True).start()

    def say(self, message: Serving | Drained | Ask | Pong | Stopped) -> None:
        with self._lock, contextlib.suppress(OSError):  # it is gone: `listen` ends this process
            self._pipe.send_bytes(_out.encode(message))

    def engines(self) -> list[EngineInfo]:
        """All there are."""
        return [EngineInfo(e.engine_id, e.role, e.state, e.error) for e in self.latest.engines]

    def add_engine(self, role: EngineRole) -> str:
        """Start one more; its name. Raises FleetError."""
        return self._ask(add=role)

    def remove_engine(self, engine_id: str) -> None:
        """Drain and end one. Raises UnknownEngineError and FleetError."""
        self._ask(remove=engine_id)

    def _ask(self, *, add: EngineRole | None = None, remove: str | None = None) -> str:
        number, answer = next(self._numbers), Future[str]()
        self._asked[number] = answer
        self.say(Ask(number=number, add=add, remove=remove))
        try:
            return answer.result(ASK_S)
        except TimeoutError:
            raise DeadlineError(f"waited {ASK_S:.0f} s for the supervisor") from None
        finally:
            del self._asked[number]

    def _hear(
        self, message: Engines | Drain | Answer, on_engines: Callable[[Engines], None]
    ) -> None:
        if isinstance(message, Engines):
            self.latest = message
            on_engines(message)
        elif isinstance(message, Drain):
            self.drain_s = message.timeout_s
            self.draining.set()
        elif (answer := self._asked.get(message.number)) is not None:
            if message.error is None:
                answer.set_result(message.engine_id)
            else:
                answer.set_exception(_REFUSALS.get(message.kind, EngineError)(message.error))

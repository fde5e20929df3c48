"""Between a frontend and an engine: requests up, one batch of new tokens per step down, without Ray.

    frontend   PUSH   ── Submit, Abort ──────>  PULL    engine loop
               DEALER ── hello, once ────────>  ROUTER
                      <── an empty Batch ────           before anything may be submitted
                      <── Batch ─────────────           after every step that has news for this frontend
                      <── Lost ──────────────           when the engine cannot go on

Commands and news have a socket each, so that one thread may submit while another waits. Messages are
MessagePack, checked against their types on arrival; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
import zmq

from paceline.runtime.errors import DeadlineError, EngineError
from paceline.runtime.types import WIRE_VERSION, EngineStatus, Request, TokenDelta, WireType

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1 << 28
WATCH_EVERY_S = 0.5
STATUS_EVERY_S = 0.1
GREETING_S = 60.0
MOST_BLOCKS = 1 << 17
"""Block events that are kept for whoever does not ask for the status."""


class LinkAddress(WireType, frozen=True, kw_only=True):
    """Where an engine loop is."""

    commands: str
    news: str


class Submit(WireType, frozen=True, kw_only=True, tag="submit"):
    frontend: Annotated[bytes, msgspec.Meta(min_length=1, max_length=64)]
    requests: tuple[Request, ...]
    version: int = WIRE_VERSION


class Abort(WireType, frozen=True, kw_only=True, tag="abort"):
    request_ids: tuple[str, ...]


class Batch(WireType, frozen=True, kw_only=True, tag="batch"):
    deltas: tuple[TokenDelta, ...]
    status: EngineStatus | None = None


class Lost(WireType, frozen=True, kw_only=True, tag="lost"):
    error: str


_commands_in = msgspec.msgpack.Decoder(Submit | Abort)
_news_in = msgspec.msgpack.Decoder(Batch | Lost)
_out = msgspec.msgpack.Encoder()


class LinkServer:
    """The engine's end: one thread's."""

    def __init__(self, address: str, news_address: str) -> None:
        """Binds both, such as `ipc:///tmp/x` or `tcp://10.0.0.1:*`."""
        self._context = zmq.Context()
        self._commands = _bound(self._context, zmq.PULL, address)
        self._news = _bound(self._context, zmq.ROUTER, news_address)
        self.address = LinkAddress(
            commands=self._commands.getsockopt_string(zmq.LAST_ENDPOINT),
            news=self._news.getsockopt_string(zmq.LAST_ENDPOINT),
        )
        self._frontends: set[bytes] = set()
        self._asked_by: dict[str, bytes] = {}
        """Which frontend each request came from."""
        self._status_due_s = 0.0

    def receive(
        self, *, wait_s: float, wakers: Sequence[zmq.Socket[bytes]] = ()
    ) -> list[Submit | Abort]:
        """Commands that came in; waits up to `wait_s` for the first, or for one of `wakers`."""
        if wait_s > 0:
            poller = zmq.Poller()
            for waker in wakers:
                poller.register(waker, zmq.POLLIN)
            poller.register(self._commands, zmq.POLLIN)
            poller.register(self._news, zmq.POLLIN)
            poller.poll(int(wait_s * 1e3))
        self._greet()
        found: list[Submit | Abort] = []
        while True:
            try:
                body = self._commands.recv(zmq.DONTWAIT)
            except zmq.Again:
                return found
            try:
                command = _commands_in.decode(body)
            except msgspec.DecodeError as error:  # nobody may stop an engine by talking to it
                logger.warning("ignored a command that is none: %s", error)
                continue
            if isinstance(command, Submit):
                if command.version != WIRE_VERSION:
                    logger.warning(
                        "ignored a frontend of version %d, this is %d",
                        command.version,
                        WIRE_VERSION,
                    )
                    continue
                command = self._accept(command)
            found.append(command)

    def _accept(self, command: Submit) -> Submit:
        """Note whose requests these are. Those under a name that is in use are answered here: they
        must not take anything from the one who uses it."""
        new = [r for r in command.requests if r.request_id not in self._asked_by]
        refused = [r.request_id for r in command.requests if r.request_id in self._asked_by]
        for request in new:
            self._asked_by[request.request_id] = command.frontend
        if not refused:
            return command
        deltas = tuple(
            TokenDelta(request_id=each, finish_reason="error", error=f"request id {each} is in use")
            for each in refused
        )
        self._send(command.frontend, Batch(deltas=deltas))
        return msgspec.structs.replace(command, requests=tuple(new))

    def send(self, deltas: list[TokenDelta], status: Callable[[], EngineStatus]) -> None:
        """Hand every frontend its deltas, and now and then the status."""
        now_s = time.monotonic()
        due = now_s >= self._status_due_s
        if not deltas and not due:
            return
        by_frontend: dict[bytes, list[TokenDelta]] = {}
        for delta in deltas:
            done = delta.finish_reason is not None
            frontend = (self._asked_by.pop if done else self._asked_by.get)(delta.request_id, None)
            if frontend is not None:
                by_frontend.setdefault(frontend, []).append(delta)
        news = None
        if due:
            news, self._status_due_s = status(), now_s + STATUS_EVERY_S
        self._greet()
        for frontend in self._frontends if due else by_frontend:
            batch = Batch(deltas=tuple(by_frontend.get(frontend, ())), status=news)
            self._send(frontend, batch)

    def lost(self, error: str) -> None:
        """Tell every frontend that there will be no more."""
        self._greet()
        for frontend in self._frontends:
            self._send(frontend, Lost(error=error))

    def close(self) -> None:
        self._commands.close(linger=0)
        self._news.close(linger=500)
        self._context.term()

    def _greet(self) -> None:
        """Take note of frontends that have come."""
        while True:
            try:
                frontend, *_ = self._news.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._frontends.add(frontend)
            self._send(frontend, Batch(deltas=()))

    def _send(self, frontend: bytes, message: Batch | Lost) -> None:
        with contextlib.suppress(zmq.ZMQError):  # that frontend is gone: so are its requests
            self._news.send_multipart((frontend, _out.encode(message)), zmq.DONTWAIT)


class LinkClient:
    """The frontend's end. Satisfies `EngineClient`; any thread may submit while one polls."""

    def __init__(
        self,
        address: LinkAddress,
        *,
        watch: Callable[[], str | None],
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """`watch` says why the engine is gone, or None; it is asked while waiting. `on_close` ends
        the engine."""
        self._id = uuid.uuid4().bytes
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._news = self._context.socket(zmq.DEALER)
        self._news.setsockopt(zmq.IDENTITY, self._id)
        self._news.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        for socket, to in ((self._commands, address.commands), (self._news, address.news)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.connect(to)
        self._news.send(b"")
        self._lock = threading.Lock()
        self._watch = watch
        self._watched_s = time.monotonic()
        self._on_close = on_close
        self._closed = False
        self._status = EngineStatus()
        self._blocks: dict[bytes, bool] = {}
        """Whether each was stored or removed last, since the status was asked for."""
        self._status_lock = threading.Lock()
        try:
            self._wait_for_greeting()
        except BaseException:
            self.close()
            raise

    def _wait_for_greeting(self) -> None:
        """The engine answers a new frontend; before it has, news could be lost."""
        deadline = time.monotonic() + GREETING_S
        while not self._news.poll(int(WATCH_EVERY_S * 1e3)):
            if (why := self._watch()) is not None:
                raise EngineError(why)
            if time.monotonic() >= deadline:
                raise DeadlineError(f"waited {GREETING_S:.0f} s for the engine to answer")
        self._receive()

    def submit(self, requests: list[Request]) -> None:
        self._command(Submit(frontend=self._id, requests=tuple(requests)))

    def abort(self, request_ids: list[str]) -> None:
        self._command(Abort(request_ids=tuple(request_ids)))

    @property
    def news_socket(self) -> zmq.Socket[bytes]:
        """Readable when `poll` has something: for whoever waits for several engines at once. Only to
        be waited for, and only by the thread that polls."""
        return self._news

    def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:
        """With 0, what lies there already."""
        deadline = time.monotonic() + wait_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            told = self._news.poll(math.ceil(min(left, WATCH_EVERY_S) * 1e3))
            if told and (deltas := self._receive()):
                return deltas
            now_s = time.monotonic()
            if not told or now_s - self._watched_s >= WATCH_EVERY_S:
                self._watched_s = now_s
                if (why := self._watch()) is not None:
                    raise EngineError(why)
            if left == 0:
                return []

    def status(self) -> EngineStatus:
        with self._status_lock:
            status, blocks = self._status, self._blocks
            self._status = msgspec.structs.replace(
                status, steps=(), stored_blocks=(), removed_blocks=()
            )
            self._blocks = {}
        return msgspec.structs.replace(
            status,
            stored_blocks=tuple([each for each, stored in blocks.items() if stored]),
            removed_blocks=tuple([each for each, stored in blocks.items() if not stored]),
        )

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._commands.close()
        self._on_close()
        self._news.close()
        self._context.term()

    def _receive(self) -> list[TokenDelta]:
        """Everything that lies there."""
        deltas: list[TokenDelta] = []
        while True:
            try:
                news = _news_in.decode(self._news.recv(zmq.DONTWAIT))
            except zmq.Again:
                return deltas
            except msgspec.DecodeError as error:
                raise EngineError(f"the engine sent what is no news: {error}") from None
            if isinstance(news, Lost):
                raise EngineError(news.error)
            deltas += news.deltas
            if news.status is not None:
                with self._status_lock:
                    steps = (self._status.steps + news.status.steps)[-1000:]
                    self._status = msgspec.structs.replace(news.status, steps=steps)
                    self._note(news.status)

    def _note(self, status: EngineStatus) -> None:
        """Gather block events, each block's latest, of the latest `MOST_BLOCKS` blocks."""
        blocks = self._blocks
        for each in status.stored_blocks:
            blocks.pop(each, None)
            blocks[each] = True
        for each in status.removed_blocks:
            blocks.pop(each, None)
            blocks[each] = False
        while len(blocks) > MOST_BLOCKS:
            del blocks[next(iter(blocks))]

    def _command(self, command: Submit | Abort) -> None:
        with self._lock:
            if self._closed:
                raise EngineError("this engine is closed")
            self._commands.send(_out.encode(command))


def _bound(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.bind(address)
    return socket

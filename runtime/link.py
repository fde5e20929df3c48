"""Between a frontend and an engine: requests up, one batch of new tokens per step down, without Ray.

    frontend   PUSH   ── Submit, Abort ──────>  PULL    engine loop
               DEALER ── hello, once ────────>  ROUTER
                      <── Batch: the status ─           before anything may be submitted
                      <── Batch ─────────────           after every step that has news for this frontend
                      <── Note ──────────────           for the log of whoever watches the engine
                      <── Lost ──────────────           when the engine cannot go on

Commands and news have a socket each, so that one thread may submit while another waits. Messages are
MessagePack, checked against their types on arrival; nothing is unpickled.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import zmq

from paceline.runtime.errors import DeadlineError, EngineError
from paceline.runtime.notes import MOST_NOTES, Note
from paceline.runtime.types import WIRE_VERSION, EngineStatus, Request, TokenDelta, WireType

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1 << 28
WATCH_EVERY_S = 0.5
STATUS_EVERY_S = 0.1
GREETING_S = 60.0
SILENT_S = 30.0
"""How much longer than its longest step an engine may be silent: it takes the stacks of ranks that hang
before it says that they are started anew."""
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


class Forget(WireType, frozen=True, kw_only=True, tag="forget"):
    """A frontend has ended without a word."""

    frontend: Annotated[bytes, msgspec.Meta(min_length=1, max_length=64)]


class Batch(WireType, frozen=True, kw_only=True, tag="batch"):
    deltas: tuple[TokenDelta, ...]
    status: EngineStatus | None = None


class Lost(WireType, frozen=True, kw_only=True, tag="lost"):
    error: str


_commands_in = msgspec.msgpack.Decoder(Submit | Abort | Forget)
_news_in = msgspec.msgpack.Decoder(Batch | Note | Lost)
_out = msgspec.msgpack.Encoder()


class LinkServer:
    """The engine's end: one thread's."""

    def __init__(self, address: str, news_address: str) -> None:
        """Binds both, such as `ipc:///tmp/x` or `tcp://10.0.0.1:*`."""
        self._context = zmq.Context()
        self._commands = _bound(self._context, zmq.PULL, address)
        self._news = _bound(self._context, zmq.ROUTER, news_address)
        # a frontend that links up again goes before what is left of its last connection
        self._news.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.address = LinkAddress(
            commands=self._commands.getsockopt_string(zmq.LAST_ENDPOINT),
            news=self._news.getsockopt_string(zmq.LAST_ENDPOINT),
        )
        self._frontends: set[bytes] = set()
        self._new: set[bytes] = set()
        """Those that have come and were not answered."""
        self._gone: set[bytes] = set()
        """Those that have ended without a word: what of theirs still comes is nobody's."""
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
            elif isinstance(command, Forget):
                command = self._forget(command.frontend)
            found.append(command)

    def _accept(self, command: Submit) -> Submit:
        """Note whose requests these are. Those under a name that is in use are answered here: they
        must not take anything from the one who uses it."""
        if command.frontend in self._gone:
            return msgspec.structs.replace(command, requests=())
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

    def _forget(self, frontend: bytes) -> Abort:
        """Stop what a frontend asked for that is gone."""
        self._gone.add(frontend)
        self._frontends.discard(frontend)
        self._new.discard(frontend)
        left = tuple(name for name, asker in self._asked_by.items() if asker == frontend)
        return Abort(request_ids=left)

    def send(
        self,
        deltas: list[TokenDelta],
        status: Callable[[], EngineStatus],
        *,
        stored: Callable[[], tuple[bytes, ...]] = tuple,
        urgent: bool = False,
    ) -> None:
        """Hand every frontend its deltas, and now and then, or where it is `urgent`, the status. One that
        is new is answered with the status and all blocks that are `stored`."""
        now_s = time.monotonic()
        self._greet()
        due = urgent or bool(self._new) or now_s >= self._status_due_s
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
        if news is not None and self._new:
            whole = msgspec.structs.replace(news, stored_blocks=stored(), removed_blocks=())
            for frontend in self._new:
                self._send(frontend, Batch(deltas=(), status=whole))
        for frontend in self._frontends if due else by_frontend:
            batch = Batch(deltas=tuple(by_frontend.get(frontend, ())), status=news)
            self._send(frontend, batch)
        self._frontends |= self._new
        self._new.clear()

    def tell(self, note: Note) -> None:
        """Pass a note on to every frontend; those that `watch` log it."""
        for frontend in self._frontends:
            self._send(frontend, note)

    def lost(self, error: str) -> None:
        """Tell every frontend that there will be no more."""
        self._greet()
        for frontend in self._frontends | self._new:
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
            if frontend not in self._gone:
                self._new.add(frontend)

    def _send(self, frontend: bytes, message: Batch | Note | Lost) -> None:
        with contextlib.suppress(zmq.ZMQError):  # that frontend is gone: so are its requests
            self._news.send_multipart((frontend, _out.encode(message)), zmq.DONTWAIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an engine may be silent before it is taken for hung."""

    step_s: float
    restart_s: float
    """While its ranks are started anew."""
    stacks: Callable[[], str]
    """What its process is doing."""

    def of(self, status: EngineStatus) -> float:
        return SILENT_S + (self.restart_s if status.restarting else self.step_s)


class LinkClient:
    """The frontend's end. Satisfies `EngineClient`; any thread may submit while one polls."""

    def __init__(
        self,
        address: LinkAddress,
        *,
        watch: Callable[[], str | None],
        on_close: Callable[[], None] = lambda: None,
        frontend: bytes | None = None,
        patience: Patience | None = None,
    ) -> None:
        """`watch` says why the engine is gone, or None; it is asked while waiting. `on_close` ends
        the engine. `frontend` is the name by which it knows this end, one that no other has."""
        self.address = address
        self._id = frontend or uuid.uuid4().bytes
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
        self._patience = patience
        self._watched_s = time.monotonic()
        self._on_close = on_close
        self._closed = False
        self._status = EngineStatus()
        self._notes: collections.deque[Note] = collections.deque(maxlen=MOST_NOTES)
        self._heard_s = time.monotonic()
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

    def link(self, frontend: bytes | None = None) -> LinkClient:
        """Another frontend's end; closing it leaves the engine alone."""
        return LinkClient(self.address, watch=self._watch, frontend=frontend)

    def forget(self, frontend: bytes) -> None:
        """Have the engine stop what another end asked for, which is gone."""
        self._command(Forget(frontend=frontend))

    def watch(self, wait_s: float) -> None:
        """Take no part but see that the engine lives, and log what it warns of: returns after `wait_s`.
        Raises EngineError once it is lost, or silent for longer than a step or a restart of its ranks
        may take."""
        deadline_s = time.monotonic() + wait_s
        try:
            while (left_s := deadline_s - time.monotonic()) > 0:
                self.poll(left_s)
        finally:
            while self._notes:
                note = self._notes.popleft()
                logger.log(note.level, "%s", note.text)
        quiet_s = time.monotonic() - self._heard_s
        if self._patience is None or quiet_s < self._patience.of(self.status()):
            return
        logger.error("the engine loop hangs:\n%s", self._patience.stacks())
        raise EngineError(f"the engine has said nothing for {quiet_s:.0f} s")

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
            self._heard_s = time.monotonic()
            if isinstance(news, Lost):
                raise EngineError(news.error)
            if isinstance(news, Note):
                self._notes.append(news)
                continue
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

    def _command(self, command: Submit | Abort | Forget) -> None:
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

"""Several engines as one: whatever speaks to an `EngineClient` can speak to a `Router`.

    submit, abort ──┐                  ┌──submit, abort──> clients of all members
    add_member ─────┼──> Dispatcher <──┤
    drain_member ───┘     (a lock)     └──deltas, status── poll: waits on all of them at once
    remove_member

One thread polls; any thread may submit, abort, and add or take away members. Whoever changes
something that the polling thread must know of wakes it. Clients are closed by threads of their own:
taking an engine down may take seconds.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import msgspec
import zmq

from paceline.actors.routing.dispatch import Dispatcher
from paceline.actors.routing.index import PrefixIndex
from paceline.actors.routing.policies import POLICIES, PolicyName, RoutingPolicy
from paceline.actors.routing.roster import Member, MemberState, Roster
from paceline.runtime.config import KvTransferConfig
from paceline.runtime.engine import EngineClient
from paceline.runtime.errors import EngineError
from paceline.runtime.types import EngineStatus, Request, StepStats, TokenDelta

__all__ = ["Member", "Router"]

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 0.5
"""How often a member that says nothing is polled all the same, which tells whether it lives."""
NO_SOCKET_S = 0.005
"""How often a member is polled that cannot be waited for."""
CLOSE_S = 10.0
"""How long members may take to close."""
MOST_STEPS = 1000


@runtime_checkable
class HasNews(Protocol):
    """A client that can be waited for together with others, as `LinkClient` can."""

    @property
    def news_socket(self) -> zmq.Socket[bytes]:
        """Readable when `poll` has something."""


class Router:
    """Satisfies `EngineClient` over several of them."""

    def __init__(
        self,
        members: Iterable[Member] = (),
        *,
        policy: PolicyName | RoutingPolicy = "conditional",
        transfer: KvTransferConfig | None = None,
        enable_prefix_caching: bool = True,
        min_remote_tokens: int | None = None,
        patience_s: float = 60.0,
        resume_s: float = 600.0,
        tag: str = "",
        on_lost: Callable[[str, EngineError], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_lost` is told, by the thread that polls, of each member that failed, so that another
        may be added; without it the loss of the last one is the router's own. Requests wait
        `patience_s` for an engine, and `resume_s` for another after they lost theirs. `tag` keeps the
        names that engines know requests by apart from other routers'. A prompt with less than
        `min_remote_tokens` to be read, by default two blocks, is never read elsewhere."""
        self._clock = clock
        self._on_lost = on_lost
        self._lock = threading.RLock()
        self._dispatcher = Dispatcher(
            POLICIES[policy]() if isinstance(policy, str) else policy,
            roster=Roster(min_remote_tokens=min_remote_tokens),
            index=PrefixIndex(),
            uses_prefixes=enable_prefix_caching,
            transfer=transfer or KvTransferConfig(),
            patience_s=patience_s,
            resume_s=resume_s,
            tag=tag,
            clock=clock,
        )
        self._members = self._dispatcher.roster.members
        self._steps: deque[StepStats] = deque(maxlen=MOST_STEPS)
        self._closers: list[threading.Thread] = []
        self._lost: EngineError | None = None
        self._closed = False
        self._polling = threading.RLock()
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._waits = _Waits((), self._wake_out)
        self._watched_s = clock()
        for member in members:
            self.add_member(member)

    # ------------------------------------------------------------------------------------- membership

    def add_member(self, member: Member) -> None:
        """Route to it from now on; the router closes it. Raises ValueError if its id is in use."""
        with self._lock:
            self._check()
            self._dispatcher.add(member)
            self._wake()

    def drain_member(self, engine_id: str) -> None:
        """Route nothing new to it, and take it away once nobody waits for it. Raises KeyError."""
        with self._lock:
            self._members[engine_id].draining = True
            self._wake()

    def remove_member(self, engine_id: str) -> None:
        """Take it away now; its requests go on elsewhere. Raises KeyError."""
        with self._lock:
            self._dispatcher.remove(engine_id)
            self._wake()

    @property
    def member_ids(self) -> tuple[str, ...]:
        """Those that are draining included."""
        with self._lock:
            return tuple(self._members)

    # ----------------------------------------------------------------------------------- EngineClient

    def submit(self, requests: list[Request]) -> None:
        with self._lock:
            self._check()
            self._dispatcher.submit(requests)
            if self._dispatcher.needs_settling:
                self._wake()

    def abort(self, request_ids: list[str]) -> None:
        with self._lock:
            self._check()
            self._dispatcher.abort(request_ids)
            if self._dispatcher.needs_settling:
                self._wake()

    def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:
        deadline_s = self._clock() + wait_s
        left_s = 0.0
        with self._polling:
            while True:
                deltas = [delta for each in self._wait(left_s) for delta in self._poll_member(each)]
                deltas += self._settle()
                left_s = deadline_s - self._clock()
                if deltas or left_s <= 0:
                    return deltas

    def status(self) -> EngineStatus:
        with self._lock:
            steps = tuple(self._steps)
            self._steps.clear()
            return msgspec.structs.replace(self._dispatcher.status(), steps=steps)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake()
        deadline_s = time.monotonic() + CLOSE_S
        held = self._polling.acquire(timeout=CLOSE_S)
        with self._lock:
            self._dispatcher.gone += [state.member.client for state in self._members.values()]
            self._members.clear()
        self._close_gone()
        for thread in self._closers:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        if held:
            self._wake_in.close()
            self._wake_out.close()
            self._polling.release()

    # ------------------------------------------------------------------------------------ the one poll

    def _wait(self, left_s: float) -> list[MemberState]:
        """Members to poll: those with news, those that cannot be waited for, and all now and then."""
        with self._lock:
            self._check()
            members = tuple(self._members.values())
            if members != self._waits.members:
                self._waits = _Waits(members, self._wake_out)
            wait_s = min(left_s, WATCH_EVERY_S)
            if (ends_s := self._dispatcher.patience_ends_s) is not None:
                wait_s = min(wait_s, max(0.0, ends_s - self._clock()))
        ready = self._waits.wait(wait_s)
        now_s = self._clock()
        if now_s - self._watched_s >= WATCH_EVERY_S:
            self._watched_s = now_s
            return list(members)
        return ready

    def _poll_member(self, state: MemberState) -> list[TokenDelta]:
        """What a member says, for those who asked for it."""
        client = state.member.client
        try:
            deltas, status = client.poll(0.0), client.status()
        except EngineError as error:
            with self._lock:
                if self._members.get(state.engine_id) is state:
                    self._dispatcher.lose(state.engine_id, error)
            return []
        with self._lock:
            self._steps.extend(status.steps)
            return self._dispatcher.on_news(state, deltas, status)

    def _settle(self) -> list[TokenDelta]:
        """All that is due between polls: requests that end here, engines to close and to tell of."""
        with self._lock:
            deltas = self._dispatcher.settle()
            lost, self._dispatcher.lost = self._dispatcher.lost, []
            if lost and self._on_lost is None and not self._dispatcher.roster.writers:
                self._lost = lost[-1][1]
        self._close_gone()
        for engine_id, error in lost:
            if self._on_lost is not None:
                self._on_lost(engine_id, error)
        if not deltas:
            self._check()
        return deltas

    # ------------------------------------------------------------------------------------------- small

    def _check(self) -> None:
        with self._lock:
            if self._closed:
                raise EngineError("this router is closed")
            if self._lost is not None:
                raise EngineError(str(self._lost))

    def _close_gone(self) -> None:
        """By the polling thread only: it may be waiting on their sockets."""
        with self._lock:
            gone, self._dispatcher.gone = self._dispatcher.gone, []
            self._closers = [each for each in self._closers if each.is_alive()]
            for client in gone:
                thread = threading.Thread(target=client.close, name="close engine", daemon=True)
                thread.start()
                self._closers.append(thread)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake
            self._wake_in.send(b"\0")


class _Waits:
    """Waiting for news of some members, and for being woken."""

    def __init__(self, members: tuple[MemberState, ...], wake: socket.socket) -> None:
        self.members = members
        self._wake = wake
        self._poller = zmq.Poller()
        self._poller.register(wake.fileno(), zmq.POLLIN)
        self._sockets = [(state, _news_socket(state.member.client)) for state in members]
        for _, news in self._sockets:
            if news is not None:
                self._poller.register(news, zmq.POLLIN)
        self._all_tell = all(news is not None for _, news in self._sockets)

    def wait(self, wait_s: float) -> list[MemberState]:
        """Those to poll, after `wait_s` at most."""
        if not self._all_tell:
            wait_s = min(wait_s, NO_SOCKET_S)
        found = {each for each, _ in self._poller.poll(math.ceil(wait_s * 1e3))}
        if self._wake.fileno() in found:
            with contextlib.suppress(BlockingIOError):
                while self._wake.recv(4096):
                    pass
        return [state for state, news in self._sockets if news is None or news in found]


def _news_socket(client: EngineClient) -> zmq.Socket[bytes] | None:
    try:
        return client.news_socket if isinstance(client, HasNews) else None
    except EngineError:  # it is closed, as polling it will say
        return None

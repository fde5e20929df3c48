"""What of a running server is struck, and how one sees that it is whole again.

Server.look ──> Look: processes by what they are, engines ──> Strike: SIGKILL, or SIGSTOP for ever
     └── again and again ──> as many as at the first look, all at work, the victim gone
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import psutil

from benchmarks import report
from benchmarks.census import marked
from benchmarks.client import Client
from benchmarks.process_tree import name_of

WHOLE_S = 60.0
"""A server that is whole again by then has recovered."""
GIVE_UP_S = 180.0
"""One that is not whole by then will never be."""
LOOK_EVERY_S = 0.25
"""Looking at all processes costs them time."""

Role = Literal["shard", "coordinator", "frontend"]
ROLES: Mapping[str, Role] = {
    "Shard": "shard",
    "rank": "shard",
    "Coordinator": "coordinator",
    "engine": "coordinator",
    "frontend": "frontend",
}
"""Of processes, by their name, as Ray actors and as local processes."""


class Kind(NamedTuple):
    """A way to strike."""

    name: str
    role: Role
    number: signal.Signals
    weight: int
    """How often, among all of them."""


KINDS = (
    Kind("kill shard", "shard", signal.SIGKILL, 3),
    Kind("kill coordinator", "coordinator", signal.SIGKILL, 2),
    Kind("kill frontend and router", "frontend", signal.SIGKILL, 3),
    Kind("hang shard", "shard", signal.SIGSTOP, 1),
    Kind("hang frontend and router", "frontend", signal.SIGSTOP, 1),
)
"""A router lives in its frontend's process: whatever strikes one strikes the other."""


class EngineAt(NamedTuple):
    """An engine, as a frontend sees it."""

    engine_id: str
    num_restarts: int
    """Of its ranks."""
    at_work: bool


class Look(NamedTuple):
    """A server at one moment."""

    names: Mapping[int, str]
    """Of its processes, by their ids."""
    engines: tuple[EngineAt, ...]

    def victims(self, role: Role) -> list[int]:
        return sorted(pid for pid, name in self.names.items() if ROLES.get(name) == role)

    @property
    def roles(self) -> Counter[Role]:
        return Counter(ROLES[name] for name in self.names.values() if name in ROLES)

    def is_whole(self, first: Look) -> bool:
        """Whether as much is at work as at the `first` look."""
        return (
            self.roles == first.roles
            and len(self.engines) == len(first.engines)
            and all(each.at_work for each in self.engines)
        )

    def has_replaced(self, pid: int, role: Role, before: Look) -> bool:
        """Whether a process that was struck after a look is gone, and its engine knows: Ray may start
        another shard before."""
        lives = {(each.engine_id, each.num_restarts) for each in self.engines}
        lived = {(each.engine_id, each.num_restarts) for each in before.engines}
        return pid not in self.names and (role == "frontend" or lives != lived)

    def num_new(self, before: Look) -> int:
        """Processes that are in the place of others."""
        return sum(
            pid not in before.names
            for pid, name in self.names.items()
            if ROLES.get(name) is not None
        )


def engines_of(status: Mapping[str, Any]) -> tuple[EngineAt, ...]:
    """From what `/live/status` answers."""
    members = {each["engine_id"]: each for each in status["status"]["members"]}
    found = []
    for engine in status["engines"]:
        member = members.get(engine["id"], {})
        at_work = (
            engine["state"] == "serving"
            and member.get("num_blocks", 0) > 0
            and not member.get("restarting", False)
        )
        found.append(EngineAt(engine["id"], member.get("num_restarts", 0), at_work))
    return tuple(found)


class Server:
    """A running server, seen from outside: its processes, and what its frontends tell."""

    def __init__(self, pid: int, client: Client, *, grpc_port: int, mark: str) -> None:
        """`client` asks its HTTP door. A frontend is one that listens at its gRPC port, the last door
        that it opens. All its processes bear the mark."""
        self._root = psutil.Process(pid)
        self._client = client
        self._grpc_port = grpc_port
        self._mark = mark

    @property
    def pid(self) -> int:
        return self._root.pid

    def processes(self) -> list[tuple[psutil.Process, str]]:
        """All that live, with what they are; also those that have lost their parents."""
        return list(self._named())

    async def look(self) -> Look:
        """Raises OSError where no frontend answers."""
        names = {process.pid: name for process, name in await asyncio.to_thread(self.processes)}
        return Look(names, engines_of(await self.status()))

    async def status(self) -> dict[str, Any]:
        """What `/live/status` answers. Raises OSError."""
        answer: dict[str, Any] = json.loads(await self._client.get("/live/status"))
        return answer

    def hang_up(self) -> None:
        """Let go of the connections over which it is asked."""
        self._client.close()

    def _named(self) -> Iterator[tuple[psutil.Process, str]]:
        # Ray's own overwrite their environment, and with it the mark, where they give themselves a name
        below = self._root.children(recursive=True) if self._root.is_running() else []
        found = {each.pid: each for each in (self._root, *below, *marked(self._mark))}
        for each in found.values():
            with contextlib.suppress(psutil.Error):
                if each.status() != psutil.STATUS_ZOMBIE:
                    yield each, name_of(each, root=self._root, port=self._grpc_port)


@dataclass(slots=True, kw_only=True)
class Strike:
    """One that was dealt, and how it went on."""

    kind: Kind
    at_s: float
    in_flight: int
    """Requests that it met."""
    whole_s: float | None = None
    """Until the server was whole again."""
    num_replaced: int = 0
    """Processes that ended with the one that was struck, and have others in their place."""

    @property
    def recovered(self) -> bool:
        return self.whole_s is not None and self.whole_s <= WHOLE_S

    def row(self, *, since_s: float) -> report.Row:
        return {
            "row": "strike",
            "kind": self.kind.name,
            "at_s": round(self.at_s - since_s, 3),
            "in_flight": self.in_flight,
            "whole_s": None if self.whole_s is None else round(self.whole_s, 3),
            "replaced": self.num_replaced,
        }


def decks(rng: random.Random) -> Iterator[Kind]:
    """Kinds at random for ever, each as often as its weight says."""
    while True:
        deck = [kind for kind in KINDS for _ in range(kind.weight)]
        rng.shuffle(deck)
        yield from deck


async def strike(
    server: Server, first: Look, kind: Kind, *, in_flight: int, rng: random.Random
) -> Strike | None:
    """Strike, and wait until the server is as whole again as it was at the `first` look; its `whole_s`
    stays None where it never is. None where it was not whole before."""
    before = await _until_whole(server, first, lambda _: True)
    if before is None:
        return None
    pid = rng.choice(before.victims(kind.role))
    dealt = Strike(kind=kind, at_s=time.monotonic(), in_flight=in_flight)
    psutil.Process(pid).send_signal(kind.number)
    now = await _until_whole(server, first, lambda look: look.has_replaced(pid, kind.role, before))
    if now is not None:
        dealt.whole_s = time.monotonic() - dealt.at_s
        dealt.num_replaced = now.num_new(before)
    return dealt


async def _until_whole(server: Server, first: Look, also: Callable[[Look], bool]) -> Look | None:
    """A look at a server that is whole, and of which something else is so; None if that takes too
    long."""
    deadline_s = time.monotonic() + GIVE_UP_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError):  # no frontend answers, or one that hangs was asked
            look = await server.look()
            if look.is_whole(first) and also(look):
                return look
        await asyncio.sleep(LOOK_EVERY_S)
    return None

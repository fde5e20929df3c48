"""Faults that strike a fleet while KV moves between its engines, and what becomes of it.

Scene.strike(kind) ──aim──> an engine with a transfer under way ──> a process, a connection,
                                                                    a frame, a client, a reader
Scene.watch ──> Fault: when all engines were back, when all whom it met had ended
"""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import psutil

from benchmarks import report
from benchmarks.census import Census, EngineTree, cut, ports, shared_files
from benchmarks.known_texts import Asked, Load
from paceline.actors.fleet import Fleet
from paceline.runtime.transfer.process import SLOW_FOR_S
from paceline.runtime.types import EngineRole, EngineStatus

AIM_S = 10.0
"""How long a fault waits for KV to be under way where it can strike."""
WHOLE_S = 60.0
"""What engines get to be all back."""
NOTICE_S = 3.0
"""How long a flipped byte is waited for to be noticed."""
LOOK_EVERY_S = 0.25
"""Looking at all processes costs them time."""
AT_REST = 0.25
"""Of the deaths of prefill engines."""
DOWN_S = (0.0, 0.3, 1.0)
"""How long a cut link stays cut."""

Kind = Literal[
    "kill prefill",
    "kill decode",
    "kill link",
    "cut link",
    "flip byte",
    "slow reader",
    "client leaves",
]
KILLS: tuple[Kind, ...] = ("kill prefill", "kill decode", "kill link")
WIRE: tuple[Kind, ...] = ("cut link", "flip byte", "slow reader")
KINDS: tuple[Kind, ...] = (*WIRE, "client leaves", *KILLS)


class NothingToStrikeError(Exception):
    """Engines did not come back, or nothing is asked of them."""


@dataclass(slots=True, eq=False, kw_only=True)
class Fault:
    """One that struck, and how it went on."""

    kind: Kind
    victim: str
    at_s: float
    in_flight: list[Asked]
    """Requests that it met."""
    moving: int
    """Transfers under way at the victim's engine."""
    gone: frozenset[str] = frozenset()
    """Addresses of links that died."""
    whole_s: float | None = None
    """Until all engines and links were there again; of those that kill."""
    quiet_s: float | None = None
    """Until all requests that it met had ended."""
    freed_s: float | None = None
    """Where all clients left: until no engine held anything."""
    gap_s: float | None = None
    """Where a reader was slow: the longest that a text which was being written stood still; those that
    an earlier fault may have moved left out."""
    noticed: bool | None = None
    """Where a byte was flipped: whether its reader saw it."""
    wrong: int = 0
    hung: int = 0
    errors: int = 0

    @property
    def is_over(self) -> bool:
        return self.quiet_s is not None and (self.whole_s is not None or self.kind not in KILLS)

    def row(self, *, since_s: float) -> report.Row:
        times = ("whole_s", "quiet_s", "freed_s", "gap_s")
        return {
            "kind": self.kind,
            "victim": self.victim,
            "at_s": round(self.at_s - since_s, 3),
            "in_flight": len(self.in_flight),
            "moving": self.moving,
            **{name: rounded(getattr(self, name)) for name in times},
            "noticed": self.noticed,
            "wrong": self.wrong,
            "hung": self.hung,
            "errors": self.errors,
        }


def rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


class Target(NamedTuple):
    """An engine that can be struck."""

    status: EngineStatus
    tree: EngineTree

    @property
    def moving(self) -> int:
        return self.status.transfers.producing + self.status.transfers.fetching

    @property
    def is_complete(self) -> bool:
        """Whether all of its links are those that it tells others of."""
        told = {_port(address) for address in self.status.links.addresses}
        links = [each for rank in self.tree.ranks for each in rank.links]
        return len(links) == len(told) and told == {port for each in links for port in ports(each)}


class Scene:
    """A fleet under load, for faults to strike. For one thread."""

    def __init__(
        self, fleet: Fleet, load: Load, *, sizes: Mapping[EngineRole, int], rng: random.Random
    ) -> None:
        """`sizes` are numbers of ranks."""
        self.load = load
        self.rng = rng
        self.faults: list[Fault] = []
        self.shared: set[str] = set()
        """Files in shared memory that have been in use."""
        self._fleet = fleet
        self._sizes = sizes
        self._num_engines = len(fleet.engines())
        self._looked_s = 0.0

    # ------------------------------------------------------------------------------------ what is there

    def census(self) -> Census:
        census = Census.take()
        for engine in census.engines:
            for process in (engine.process, *(rank.process for rank in engine.ranks)):
                self.shared |= shared_files(process)
        return census

    def targets(self) -> list[Target]:
        """Engines that serve, with their processes: known by the ports of their links."""
        trees = {
            port: tree
            for tree in self.census().engines
            for link in tree.links
            for port in ports(link)
        }
        found = []
        for member in self._fleet.status().members:
            known = [trees[p] for a in member.links.addresses if (p := _port(a)) in trees]
            if known:
                found.append(Target(member, known[0]))
        return found

    def is_whole(self) -> bool:
        """Whether all engines serve and have all of their processes."""
        if any(each.state != "serving" for each in self._fleet.engines()):
            return False
        found = self.targets()
        return len(found) == self._num_engines and all(
            each.is_complete and len(each.tree.ranks) == self._sizes[each.status.role]
            for each in found
        )

    def held(self) -> Counter[str]:
        """What engines hold for somebody."""
        found: Counter[str] = Counter()
        for each in self._fleet.status().members:
            found["blocks"] += each.num_blocks - each.num_free_blocks
            found["leases"] += each.transfers.producing + each.transfers.fetching
            found["requests"] += each.num_running + each.num_waiting
        return +found

    @property
    def is_quiet(self) -> bool:
        """Whether all faults are over."""
        return all(each.is_over for each in self.faults)

    # ----------------------------------------------------------------------------------- what is done

    def strike(self, kind: Kind) -> Fault:
        """One fault, where KV is under way if there is such a place. Raises NothingToStrikeError."""
        if kind in KILLS[:2]:
            self.wait(self.is_whole, WHOLE_S)
        began_s = time.monotonic()
        while (fault := STRIKES[kind](self, time.monotonic() > began_s + AIM_S)) is None:
            if time.monotonic() > began_s + WHOLE_S:
                raise NothingToStrikeError(f"{kind}: {self._fleet.engines()}")
            self.wait(lambda: False, 0.02)
        self.faults.append(fault)
        self.load.last_fault_s = fault.at_s
        return fault

    def fault(self, kind: Kind, target: Target, what: str, **more: Any) -> Fault:
        return Fault(
            kind=kind,
            victim=f"{what} of {target.status.engine_id}",
            at_s=time.monotonic(),
            in_flight=self.load.live(),
            moving=target.moving,
            **more,
        )

    def aim(
        self, *, late: bool, role: EngineRole | None = None, producing: bool | None = None
    ) -> Target | None:
        """An engine with a transfer under way, or if it is `late`, any."""
        found = [each for each in self.targets() if role in (None, each.status.role)]
        if not late:
            found = [each for each in found if _moves(each.status, producing)]
        return self.rng.choice(found) if found else None

    def wait(self, done: Callable[[], bool], most_s: float) -> bool:
        """Watch earlier faults until something is so. Whether it came to be. Raises
        NothingToStrikeError if the fleet itself fails."""
        deadline_s = time.monotonic() + most_s
        while True:
            self.watch()
            if done():
                return True
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(0.05, left_s))

    def watch(self) -> None:
        """Note which faults are over."""
        if self.load.failure is not None:
            raise NothingToStrikeError(f"the fleet failed: {self.load.failure}")
        pending = [each for each in self.faults if not each.is_over]
        now_s = time.monotonic()
        if not pending or now_s < self._looked_s + LOOK_EVERY_S:
            return
        self._looked_s = now_s
        killed = [each for each in pending if each.kind in KILLS and each.whole_s is None]
        if killed and self.is_whole():
            there = {a for m in self._fleet.status().members for a in m.links.addresses}
            for each in killed:
                if not each.gone & there:
                    each.whole_s = now_s - each.at_s
        for each in pending:
            ends = [asked.ended_s for asked in each.in_flight if asked.ended_s is not None]
            if each.quiet_s is None and len(ends) == len(each.in_flight):
                each.quiet_s = max((each.at_s, *ends)) - each.at_s


Strike = Callable[[Scene, bool], Fault | None]
"""What it did, or None where there is nothing to strike at this moment. Told that it is late, it takes
what there is."""


def _kill_engine(scene: Scene, kind: Kind, role: EngineRole, late: bool) -> Fault | None:
    target = scene.aim(late=late, role=role, producing=role == "prefill")
    if target is None:
        return None
    ranks = target.tree.ranks
    number = scene.rng.randrange(len(ranks))
    victim, name = ranks[number].process, f"rank {number}"
    if len(ranks) > 1 and scene.rng.random() < 0.25:
        victim, name = target.tree.process, "engine process"
    fault = scene.fault(kind, target, name, gone=frozenset(target.status.links.addresses))
    return fault if _signal(victim, signal.SIGKILL) else None


def _kill_prefill(scene: Scene, late: bool) -> Fault | None:
    """In the middle of its transfers; or now and then at rest, when no fetch fails that would tell
    others of its death."""
    if late or scene.rng.random() >= AT_REST:
        return _kill_engine(scene, "kill prefill", "prefill", late)
    scene.load.stop()
    scene.wait(lambda: not scene.load.live() and not scene.held(), AIM_S)
    fault = _kill_engine(scene, "kill prefill", "prefill", late=True)
    scene.load.start()
    return fault


def _kill_decode(scene: Scene, late: bool) -> Fault | None:
    return _kill_engine(scene, "kill decode", "decode", late)


def _kill_link(scene: Scene, late: bool) -> Fault | None:
    target = scene.aim(late=late)
    if target is None:
        return None
    link = scene.rng.choice(target.tree.links)
    gone = {a for a in target.status.links.addresses if _port(a) in ports(link)}
    fault = scene.fault("kill link", target, "link", gone=frozenset(gone))
    return fault if _signal(link, signal.SIGKILL) else None


def _cut_link(scene: Scene, late: bool) -> Fault | None:
    target = scene.aim(late=late, role="prefill", producing=True)
    if target is None:
        return None
    link = scene.rng.choice(target.tree.links)
    fault = scene.fault("cut link", target, "link")
    down_s, number, listening = scene.rng.choice(DOWN_S), 0, ports(link)
    while True:  # whoever comes back is cut off again
        number += sum(cut(link, port) for port in listening)
        if time.monotonic() >= fault.at_s + down_s:
            break
        time.sleep(0.01)
    fault.victim = f"{number} connections of {target.status.engine_id}, in {down_s} s"
    return fault if number or late else None


def _flip_byte(scene: Scene, late: bool) -> Fault | None:
    target = scene.aim(late=late, role="prefill", producing=True)
    if target is None:
        return None
    fault = scene.fault("flip byte", target, "next frame")
    seen = scene.load.status().transfers.num_corrupt
    if not _signal(scene.rng.choice(target.tree.links), signal.SIGUSR1):
        return None
    fault.noticed = scene.wait(lambda: scene.load.status().transfers.num_corrupt > seen, NOTICE_S)
    return fault


def _slow_reader(scene: Scene, late: bool) -> Fault | None:
    target = scene.aim(late=late, role="decode", producing=False)
    if target is None:
        return None
    fault = scene.fault("slow reader", target, "link")
    # those that lost their engine before are fetched again, perhaps by the very reader that is slow
    moved = {asked for each in scene.faults if each.kind in KILLS for asked in each.in_flight}
    writing = [each for each in fault.in_flight if each.token_ids and each not in moved]
    if not _signal(scene.rng.choice(target.tree.links), signal.SIGUSR2):
        return None
    scene.wait(lambda: False, SLOW_FOR_S)
    gaps = [_longest_gap(each, fault.at_s, time.monotonic()) for each in writing]
    fault.gap_s = max(gaps, default=None)
    return fault


def _client_leaves(scene: Scene, late: bool) -> Fault | None:
    """One client; or all, when no earlier fault is to blame for what is held."""
    target = scene.aim(late=late, role="decode", producing=False)
    live = [each for each in scene.load.live() if not each.left]
    if target is None or not live:
        return None
    all_left = any(each.freed_s is not None for each in scene.faults)
    if not all_left and not scene.is_quiet and not late:
        return None
    if not scene.is_quiet or (all_left and scene.rng.random() < 0.25):
        unread = [each for each in live if not each.token_ids]
        fault = scene.fault("client leaves", target, "a client")
        scene.load.leave([scene.rng.choice(unread or live)])
        return fault
    scene.load.stop()
    fault = scene.fault("client leaves", target, "all clients")
    scene.load.leave(scene.load.live())
    scene.wait(lambda: not scene.load.live() and not scene.held(), AIM_S)
    fault.freed_s = time.monotonic() - fault.at_s
    scene.load.start()
    return fault


STRIKES: dict[Kind, Strike] = {
    "kill prefill": _kill_prefill,
    "kill decode": _kill_decode,
    "kill link": _kill_link,
    "cut link": _cut_link,
    "flip byte": _flip_byte,
    "slow reader": _slow_reader,
    "client leaves": _client_leaves,
}


def _moves(status: EngineStatus, producing: bool | None) -> bool:
    totals = status.transfers
    gives, takes = totals.producing > 0, totals.fetching > 0
    return (gives or takes) if producing is None else (gives if producing else takes)


def _longest_gap(asked: Asked, since_s: float, until_s: float) -> float:
    """The longest time without a token of a text within a window, while it was being written."""
    end_s = until_s if asked.ended_s is None else min(until_s, asked.ended_s)
    times = [since_s, *(at_s for at_s in asked.told_s if since_s <= at_s <= end_s), end_s]
    return max(after - before for before, after in itertools.pairwise(times))


def _signal(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether it was there to get it."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])

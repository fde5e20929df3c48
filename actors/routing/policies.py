"""Who reads a prompt, and who writes the text after it.

conditional   where it costs all requests the least; read elsewhere only where that is cheaper
always        read elsewhere whenever that is possible      ┐ for comparison, else as above
local         never                                         ┘
round_robin   by turns, whatever is cached or busy: the baseline
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from paceline.actors.routing.roster import Ask, MemberState, Roster

PolicyName = Literal["conditional", "always", "local", "round_robin"]

EXPLORE_EVERY = 32
"""After so many prompts in a row that were read where their texts are written, although they need
not have been, the next one is read elsewhere: its estimate may be out of date."""
SESSION_S = 600.0
"""How long a session is remembered after its last request."""
MOST_SESSIONS = 10_000
STICKY_S = 2.0
"""A session moves when its engine makes it wait so much longer than another would."""


class Placement(NamedTuple):
    """Where a request goes."""

    writer: MemberState
    reader: MemberState | None = None
    """Who reads the prompt, if it is not who writes."""


class RoutingPolicy(Protocol):
    """One answer. Mutates nothing but the policy's own memory of what it answered."""

    @property
    def name(self) -> PolicyName:
        """As `--routing-policy` has it."""

    @property
    def uses_prefixes(self) -> bool:
        """Whether `Ask.cached` is looked at."""

    def choose(self, ask: Ask, roster: Roster) -> Placement | None:
        """Where a request goes; None if nobody can take it."""


class Sessions:
    """Which engine each session was sent to last, the latest `MOST_SESSIONS`."""

    def __init__(self) -> None:
        self._places: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def get(self, session_id: str, *, now_s: float) -> str | None:
        engine_id, until_s = self._places.get(session_id, (None, now_s))
        return engine_id if now_s < until_s else None

    def put(self, session_id: str, engine_id: str, *, now_s: float) -> None:
        self._places[session_id] = (engine_id, now_s + SESSION_S)
        self._places.move_to_end(session_id)
        while len(self._places) > MOST_SESSIONS:
            self._places.popitem(last=False)


class _Option(NamedTuple):
    """A way to serve a request, better if it sorts first."""

    lacks_room: bool
    cost_s: float
    order: int
    writer: MemberState
    reader: MemberState | None


class ByCost:
    """The cheapest for all, sessions staying where they are."""

    uses_prefixes = True

    def __init__(self, *, remote: Literal["if cheaper", "always", "never"]) -> None:
        self.name: PolicyName = _BY_REMOTE[remote]
        self._remote = remote
        self._sessions = Sessions()
        self._num_local = 0
        """Prompts in a row that could have been read elsewhere and were not."""

    def choose(self, ask: Ask, roster: Roster) -> Placement | None:
        explore = self._remote == "if cheaper" and self._num_local >= EXPLORE_EVERY
        options = []
        for order, writer in enumerate(roster.writers):
            local_s = roster.read_s(ask, writer)
            elsewhere = self._elsewhere(ask, roster, writer)
            reader, read_s = None, local_s
            if elsewhere is not None:
                remote_s, other = elsewhere
                may_explore = explore and not other.queue_tokens
                if self._remote == "always" or remote_s < local_s or may_explore:
                    reader, read_s = other, remote_s
            cost_s = read_s + roster.write_s(ask, writer)
            lacks_room = not roster.has_room(ask, writer, writes=True)
            options.append(_Option(lacks_room, cost_s, order, writer, reader))
        if not options:
            return None
        best = self._stick(ask, roster, options, min(options, key=lambda option: option[:3]))
        if best.reader is not None:
            self._num_local = 0
        elif self._elsewhere(ask, roster, best.writer) is not None:
            self._num_local += 1
        return Placement(best.writer, best.reader)

    def _elsewhere(
        self, ask: Ask, roster: Roster, writer: MemberState
    ) -> tuple[float, MemberState] | None:
        """The cheapest engine to read the prompt for `writer`, and what it costs."""
        if self._remote == "never" or not roster.is_remote_worthy(ask, writer):
            return None
        readers = roster.readers(writer)
        costs = [
            (roster.remote_s(ask, reader, writer), order, reader)
            for order, reader in enumerate(readers)
            if roster.has_room(ask, reader, writes=False)
        ]
        if not costs:
            return None
        cost_s, _, reader = min(costs, key=lambda each: each[:2])
        return cost_s, reader

    def _stick(self, ask: Ask, roster: Roster, options: list[_Option], best: _Option) -> _Option:
        """The session's own engine instead of the best, unless it is too busy."""
        session_id = ask.request.session_id
        if not session_id:
            return best
        engine_id = self._sessions.get(session_id, now_s=ask.now_s)
        for option in options:
            if option.writer.engine_id == engine_id and option.lacks_room <= best.lacks_room:
                extra_s = roster.load_s(ask, option.writer) - roster.load_s(ask, best.writer)
                if extra_s <= STICKY_S:
                    best = option
                break
        self._sessions.put(session_id, best.writer.engine_id, now_s=ask.now_s)
        return best


class RoundRobin:
    """Writers by turns, and readers by turns."""

    uses_prefixes = False
    name: PolicyName = "round_robin"

    def __init__(self) -> None:
        self._writes, self._reads = itertools.count(), itertools.count()

    def choose(self, ask: Ask, roster: Roster) -> Placement | None:
        writers = roster.writers
        if not writers:
            return None
        writer = writers[next(self._writes) % len(writers)]
        readers = list(roster.readers(writer))
        if not readers or not roster.is_remote_worthy(ask, writer):
            return Placement(writer)
        return Placement(writer, readers[next(self._reads) % len(readers)])


_BY_REMOTE: dict[str, PolicyName] = {
    "if cheaper": "conditional",
    "always": "always",
    "never": "local",
}
POLICIES: dict[PolicyName, Callable[[], RoutingPolicy]] = {
    "conditional": lambda: ByCost(remote="if cheaper"),
    "always": lambda: ByCost(remote="always"),
    "local": lambda: ByCost(remote="never"),
    "round_robin": RoundRobin,
}

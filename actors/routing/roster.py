"""The engines there are, what each is doing, and what one more request would cost there.

    statuses, deltas, submissions ──> MemberState ──┐
    metrics, steps, the router's clock ──> Line ────┼──> Roster: seconds, by engine and request
    block events ──> PrefixIndex ───────────────────┘

A cost is the seconds of waiting that a choice adds to all requests, the request's own included.
Statuses are a moment old, so what was sent since the last one is counted on top.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import msgspec

from paceline.actors.routing.costs import (
    Line,
    MemberCosts,
    OutputLength,
    draft_shares,
    transferring,
)
from paceline.runtime.engine import EngineClient
from paceline.runtime.transfer.layout import differences
from paceline.runtime.types import EngineRole, EngineStatus, Request, TransferTotals

logger = logging.getLogger(__name__)

STATUS_LAG_S = 0.01
"""What was sent so shortly before a status came is not in it yet."""
MIN_REMOTE_BLOCKS = 2
"""A prompt with less to read is not worth a transfer."""


@dataclass(frozen=True, slots=True)
class Member:
    """An engine that requests can be routed to."""

    engine_id: str
    role: EngineRole
    client: EngineClient


class _Sent(NamedTuple):
    at_s: float
    num_tokens: int
    num_blocks: int


@dataclass(slots=True, eq=False)
class MemberState:
    """A member and all that is known of it."""

    member: Member
    costs: MemberCosts = field(default_factory=MemberCosts)
    status: EngineStatus = field(default_factory=EngineStatus)
    draining: bool = False
    """Whether it gets nothing new."""
    writing: set[str] = field(default_factory=set)
    """Requests whose text is written here."""
    num_started: int = 0
    """Those of them that have their first token."""
    serving: set[str] = field(default_factory=set)
    """Requests whose prompt is read here for another engine, until that engine has it."""
    num_unread: int = 0
    """Prompt tokens of requests sent here whose first token has not come."""
    _unread: dict[str, int] = field(default_factory=dict)
    _sent: deque[_Sent] = field(default_factory=deque)
    """Since the last status, or shortly before."""

    @property
    def engine_id(self) -> str:
        return self.member.engine_id

    @property
    def can_write(self) -> bool:
        return self.member.role != "prefill" and not self.draining

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything from here."""
        return not self.writing and not self.serving

    @property
    def queue_tokens(self) -> int:
        """Prompt tokens to be read before those of a new request: as the engine said last, but none
        whose first token has come since."""
        told = self.status.waiting_tokens + sum(sent.num_tokens for sent in self._sent)
        return min(told, self.num_unread)

    @property
    def free_blocks(self) -> int:
        return self.status.num_free_blocks - sum(sent.num_blocks for sent in self._sent)

    def on_sent(self, name: str, *, num_unread: int, num_blocks: int, now_s: float) -> None:
        """A request is on its way here that has so much to read and takes so many blocks."""
        self._unread[name] = num_unread
        self.num_unread += num_unread
        self._sent.append(_Sent(now_s, num_unread, num_blocks))

    def on_read(self, name: str) -> None:
        """Its prompt is read, or nobody wants it any more. Safe to call twice."""
        self.num_unread -= self._unread.pop(name, 0)

    def on_status(self, status: EngineStatus, *, now_s: float) -> None:
        """The latest there is: perhaps the one known."""
        for step in status.steps:
            self.costs.on_step(step)
        before = self.status
        self.status = msgspec.structs.replace(status, steps=(), stored_blocks=(), removed_blocks=())
        if (status.num_steps, status.waiting_tokens, status.num_free_blocks) != (
            before.num_steps,
            before.waiting_tokens,
            before.num_free_blocks,
        ):
            while self._sent and self._sent[0].at_s < now_s - STATUS_LAG_S:
                self._sent.popleft()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request to be routed."""

    request: Request
    """With what it has written already."""
    num_tokens: int
    """To be read, those that are cached somewhere included."""
    cached: dict[str, int]
    """By engine, leading tokens that are believed to be there."""
    now_s: float

    def unread(self, engine_id: str) -> int:
        """What an engine has to read: one token at least."""
        return max(1, self.num_tokens - self.cached.get(engine_id, 0))


class Roster:
    """All members, in the order they came. Not for several threads."""

    def __init__(self, *, min_remote_tokens: int | None = None) -> None:
        self.members: dict[str, MemberState] = {}
        self.lengths = OutputLength()
        self._min_remote_tokens = min_remote_tokens
        self._transfers: dict[tuple[str, str], Line] = {}
        self._said: set[tuple[str, str, str]] = set()

    def remove(self, engine_id: str) -> MemberState:
        """Forget a member, and what transfers to and from it took."""
        self._transfers = {p: line for p, line in self._transfers.items() if engine_id not in p}
        self._said = {said for said in self._said if engine_id not in said[:2]}
        return self.members.pop(engine_id)

    @property
    def writers(self) -> list[MemberState]:
        """Who may write a text: a prefill engine only where there is nobody else."""
        live = [m for m in self.members.values() if not m.draining]
        return [m for m in live if m.can_write] or live

    def readers(self, writer: MemberState) -> Iterator[MemberState]:
        """Who may read a prompt for `writer`: prefill engines. One that writes too would keep others
        waiting for it, just as `writer` would."""
        for each in self.members.values():
            is_free = not each.draining and each is not writer
            if is_free and each.member.role == "prefill" and self._connected(each, writer):
                yield each

    def is_remote_worthy(self, ask: Ask, writer: MemberState) -> bool:
        """Whether a prompt may be read elsewhere for `writer` at all."""
        least = self._min_remote_tokens
        if least is None:
            least = MIN_REMOTE_BLOCKS * max(1, writer.status.block_size)
        full = ask.request.params.kv_policy == "full"
        return full and ask.unread(writer.engine_id) >= least

    def shares_draft(self, reader: MemberState, writer: MemberState) -> bool:
        """Whether the drafter's KV of one is of use to the other."""
        theirs, mine = reader.status.links.fingerprint, writer.status.links.fingerprint
        return theirs == mine or not differences(mine, theirs, draft=True)

    def draft_travels(self, reader: MemberState, writer: MemberState) -> bool:
        """Whether the drafter's KV is better fetched than computed again by the writer.

        What travels while the prompt is still being read costs nobody anything. So only the seconds
        that each token adds after that count, and of those the drafter's share.
        """
        shares = draft_shares(writer.status.links.fingerprint)
        if shares is None:
            return True
        moved_s = shares.of_bytes * self.transfer(reader.engine_id, writer.engine_id).per_unit_s
        return moved_s <= shares.of_work * writer.costs.read.per_unit_s

    def queue_s(self, member: MemberState) -> float:
        """Until a new prompt's turn comes."""
        return member.costs.read.per_unit_s * member.queue_tokens

    def read_s(self, ask: Ask, member: MemberState) -> float:
        """What it costs all to read the prompt there: whoever runs there waits for it too."""
        alone_s = member.costs.read.at(ask.unread(member.engine_id))
        return self.queue_s(member) + alone_s * (1 + member.num_started)

    def remote_s(self, ask: Ask, reader: MemberState, writer: MemberState) -> float:
        """The same for a prompt that is read elsewhere, and the part of the transfer after it."""
        travelling = ask.unread(writer.engine_id)
        transfer_s = self.transfer(reader.engine_id, writer.engine_id).at(travelling)
        return self.read_s(ask, reader) + transfer_s

    def write_s(self, ask: Ask, member: MemberState) -> float:
        """What it costs all to write the text there: each step grows by what one more takes."""
        step, others = member.costs.step, len(member.writing)
        num_steps = self.lengths.expect(ask.request.max_tokens)
        return num_steps * (step.fixed_s + step.per_unit_s * (2 * others + 1))

    def load_s(self, ask: Ask, member: MemberState) -> float:
        """What a request pays there for others' sake."""
        num_steps = self.lengths.expect(ask.request.max_tokens)
        crowd_s = num_steps * member.costs.step.per_unit_s * len(member.writing)
        return self.queue_s(member) + crowd_s

    def blocks_for(self, ask: Ask, member: MemberState, *, num_output: float) -> int:
        """Blocks that a request is going to take of those that are free."""
        size = member.status.block_size
        return -(-int(ask.unread(member.engine_id) + num_output) // size) if size else 0

    def has_room(self, ask: Ask, member: MemberState, *, writes: bool) -> bool:
        """Whether its blocks are free, as far as is known."""
        if not member.status.num_blocks:
            return True
        num_output = self.lengths.expect(ask.request.max_tokens) if writes else 1
        return self.blocks_for(ask, member, num_output=num_output) <= member.free_blocks

    def on_sent(
        self, ask: Ask, member: MemberState, *, name: str, reads: bool, writes: bool
    ) -> None:
        """A request is on its way to a member."""
        num_output = self.lengths.expect(ask.request.max_tokens) if writes else 1
        member.on_sent(
            name,
            num_unread=ask.unread(member.engine_id) if reads else 0,
            num_blocks=self.blocks_for(ask, member, num_output=num_output),
            now_s=ask.now_s,
        )

    def transfer(self, reader_id: str, writer_id: str) -> Line:
        """What transfers between two take."""
        pair = (reader_id, writer_id)
        if pair not in self._transfers:
            self._transfers[pair] = transferring()
        return self._transfers[pair]

    def _connected(self, reader: MemberState, writer: MemberState) -> bool:
        """Whether one's KV can be fetched by the other. Says once why not."""
        theirs, mine = reader.status.links, writer.status.links
        if not theirs.addresses or not mine.addresses:
            silent = reader if not theirs.addresses else writer
            self._say(reader, writer, f"the KV links of {silent.engine_id} do not serve")
            return False
        if theirs.fingerprint == mine.fingerprint:
            return True
        if found := differences(mine.fingerprint, theirs.fingerprint):
            self._say(reader, writer, "; ".join(found))
        return not found

    def _say(self, reader: MemberState, writer: MemberState, why: str) -> None:
        said = (reader.engine_id, writer.engine_id, why)
        if said not in self._said:
            self._said.add(said)
            logger.warning(
                "engine %s cannot fetch from engine %s, so prompts are read where texts are "
                "written: %s",
                writer.engine_id,
                reader.engine_id,
                why,
            )


_NOW = (
    "num_running",
    "num_waiting",
    "num_blocks",
    "num_free_blocks",
    "waiting_tokens",
)
"""Numbers that tell how it is now."""
_SO_FAR = (
    "num_steps",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "prefix_queries",
    "prefix_hits",
    "num_drafts",
    "drafted",
    "accepted",
    "num_restarts",
)
"""Numbers that only grow."""
_TRANSFERS_NOW = ("producing", "fetching")


def total(statuses: Sequence[EngineStatus]) -> EngineStatus:
    """All numbers summed."""
    at_position = zip_longest(*(status.accepted_at_position for status in statuses), fillvalue=0)
    transfers = [status.transfers for status in statuses]
    return EngineStatus(
        **{name: sum([getattr(each, name) for each in statuses]) for name in (*_NOW, *_SO_FAR)},
        accepted_at_position=tuple([sum(counts) for counts in at_position]),
        block_size=max([status.block_size for status in statuses], default=0),
        ways=next((status.ways for status in statuses if status.ways), ()),
        transfers=TransferTotals(
            **{
                name: sum([getattr(each, name) for each in transfers])
                for name in TransferTotals.__struct_fields__
            }
        ),
    )


def left_behind(status: EngineStatus) -> EngineStatus:
    """What of a member's numbers stays in the sums when it is gone, so that no total ever falls."""
    transfers = msgspec.structs.replace(status.transfers, **dict.fromkeys(_TRANSFERS_NOW, 0))
    kept = msgspec.structs.replace(status, **dict.fromkeys(_NOW, 0), transfers=transfers)
    return msgspec.structs.replace(total([kept]), block_size=0)

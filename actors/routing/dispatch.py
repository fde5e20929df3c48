"""Where every request is, and what becomes of it: the router without its threads and sockets.

    submit ──> waiting ──policy──> on a writer, perhaps with a reader ──terminal delta──> forgotten
                  ^                                │
                  └──────its engine is lost────────┘

A request's tokens are journalled as they are passed on, so that another engine can go on after them.
Engines know a request by a name that is new with every placement: what one says of a request that
has moved on means nobody, and is dropped.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from paceline.actors.routing.index import Chain, PrefixIndex, chains_of
from paceline.actors.routing.policies import Placement, RoutingPolicy
from paceline.actors.routing.roster import Ask, Member, MemberState, Roster, left_behind, total
from paceline.runtime.config import KvTransferConfig
from paceline.runtime.engine import EngineClient
from paceline.runtime.errors import EngineError
from paceline.runtime.types import (
    EngineStatus,
    FinishReason,
    Hop,
    KvFetch,
    KvProduce,
    Request,
    TokenDelta,
)

logger = logging.getLogger(__name__)

MOST_LOST = 5
"""Engines that may be lost in a row with a request, and without a token of it: then it is taken for the
cause, and ended."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Routed:
    """A request that has not ended."""

    request: Request
    asked_s: float
    """When it came, or last lost its engine."""
    token_ids: list[int] = field(default_factory=list)
    """Passed on so far: the journal."""
    hops: list[Hop] = field(default_factory=list)
    """Where it has been, and is."""
    name: str = ""
    """What engines call it now."""
    num_placed: int = 0
    num_lost: int = 0
    """Engines that were lost with it since its last token."""
    writer: MemberState | None = None
    """None while it waits for one."""
    reader: MemberState | None = None
    """Who reads its prompt for the writer; None again once both are done with that."""
    num_moved: int = 0
    """Prompt tokens that travel from one to the other."""
    read_s: float | None = None
    """When the reader was done."""
    started: bool = False
    """Whether its present writer has sent a token."""
    patience_ends_s: float | None = None
    """While it waits, when it gives up."""
    aborted: bool = False

    def whole(self) -> Request:
        """With all that it has written."""
        if not self.token_ids:
            return self.request
        written = (*self.request.output_token_ids, *self.token_ids)
        return msgspec.structs.replace(self.request, output_token_ids=written)

    def note(self, **more: Any) -> None:
        """Add to what is known of where it is."""
        self.hops[-1] = msgspec.structs.replace(self.hops[-1], **more)


class Dispatcher:
    """Not for several threads. Calls `submit` and `abort` of its members' clients, nothing else."""

    def __init__(
        self,
        policy: RoutingPolicy,
        *,
        roster: Roster,
        index: PrefixIndex,
        uses_prefixes: bool,
        transfer: KvTransferConfig,
        patience_s: float,
        resume_s: float = 600.0,
        tag: str = "",
        clock: Callable[[], float],
    ) -> None:
        """Unless it `uses_prefixes`, nothing is believed to be cached."""
        self.roster = roster
        self.gone: list[EngineClient] = []
        """Clients that nobody uses any more, for the caller to take and close."""
        self.lost: list[tuple[str, EngineError]] = []
        """Members that failed, for the caller to take."""
        self._policy = policy
        self._index = index
        self._uses_prefixes = uses_prefixes and policy.uses_prefixes
        self._transfer = transfer
        self._patience_s, self._resume_s = patience_s, resume_s
        self._tag = tag
        self._clock = clock
        self._routed: dict[str, _Routed] = {}
        self._by_name: dict[str, _Routed] = {}
        self._waiting: dict[str, _Routed] = {}
        self._deltas: list[TokenDelta] = []
        """Of requests that no engine ended."""
        self._left_behind = EngineStatus()
        """The totals of members that are gone."""

    # ------------------------------------------------------------------------------------- membership

    def add(self, member: Member) -> None:
        """Route to it from now on. Raises ValueError if its id is in use."""
        if member.engine_id in self.roster.members:
            raise ValueError(f"there is an engine {member.engine_id} already")
        state = MemberState(member)
        self.roster.members[member.engine_id] = state
        self._index.add(member.engine_id)
        self._on_status(state, member.client.status())

    def remove(self, engine_id: str) -> None:
        """Take a member away; its requests go on elsewhere."""
        state = self.roster.remove(engine_id)
        self._index.forget(engine_id)
        self._left_behind = total([self._left_behind, left_behind(state.status)])
        self.gone.append(state.member.client)
        orphans = []
        for routed in self._routed.values():
            read_there = routed.reader is state
            if read_there:
                routed.reader = None
            if routed.writer is state or (read_there and not routed.started):
                orphans.append(routed)
                routed.num_lost += not state.draining
        for routed in orphans:
            writer, name = routed.writer, routed.name
            self._displace(routed)
            if writer is not None and writer is not state:
                _abort_at(writer, name)
        self._place(orphans)

    def lose(self, engine_id: str, error: EngineError) -> None:
        """A member has failed."""
        if engine_id not in self.roster.members:
            return
        logger.error("engine %s is lost: %s", engine_id, error)
        self.lost.append((engine_id, error))
        self.remove(engine_id)

    # --------------------------------------------------------------------------------- in, out, state

    @property
    def needs_settling(self) -> bool:
        """Whether `settle` has something to say, or requests wait, or members are gone."""
        return bool(self._deltas or self._waiting or self.gone)

    @property
    def patience_ends_s(self) -> float | None:
        """When the first of those that wait for an engine gives up."""
        ends = [routed.patience_ends_s for routed in self._waiting.values()]
        return min([each for each in ends if each is not None], default=None)

    def submit(self, requests: Iterable[Request]) -> None:
        """Send each to an engine, or let it wait for one."""
        new = []
        for request in requests:
            if request.request_id in self._routed:
                error = f"request id {request.request_id} is in use"
                self._deltas.append(_ended(request.request_id, "error", error))
                continue
            routed = _Routed(request=request, asked_s=self._clock())
            self._routed[request.request_id] = routed
            new.append(routed)
        self._place(new)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop requests, wherever they are."""
        for request_id in request_ids:
            routed = self._routed.get(request_id)
            if routed is None:
                continue
            routed.aborted = True
            if routed.writer is None:
                self._end_here(routed, "abort")
            else:
                _abort_at(routed.writer, routed.name)
                if routed.reader is not None:
                    _abort_at(routed.reader, routed.name)

    def settle(self) -> list[TokenDelta]:
        """Whatever is due: terminal deltas of requests that no engine ended."""
        for state in list(self.roster.members.values()):
            if state.draining and state.idle:
                self.remove(state.engine_id)
        if self._waiting and self.roster.writers:
            waiting, self._waiting = self._waiting, {}
            self._place(waiting.values())
        now_s = self._clock()
        for routed in list(self._waiting.values()):
            if routed.patience_ends_s is not None and now_s >= routed.patience_ends_s:
                waited_s = self._resume_s if routed.num_placed else self._patience_s
                why = f"waited {waited_s:.0f} s for an engine that takes requests"
                self._end_here(routed, "error", why)
        deltas, self._deltas = self._deltas, []
        return deltas

    def status(self) -> EngineStatus:
        """Sums over all members, those that are gone included where numbers only grow."""
        states = self.roster.members.values()
        members = [
            msgspec.structs.replace(s.status, engine_id=s.engine_id, role=s.member.role)
            for s in states
        ]
        summed = total([self._left_behind, *members])
        return msgspec.structs.replace(
            summed,
            num_waiting=summed.num_waiting + len(self._waiting),
            ranks=tuple([f"{s.engine_id}: {rank}" for s in states for rank in s.status.ranks]),
            members=tuple(members),
        )

    # ------------------------------------------------------------------------------ what engines say

    def on_news(
        self, state: MemberState, deltas: Iterable[TokenDelta], status: EngineStatus
    ) -> list[TokenDelta]:
        """Take what a member says; what of it is passed on."""
        if self.roster.members.get(state.engine_id) is not state:
            return []
        now_s = self._clock()
        passed = [self._take(state, delta, now_s=now_s) for delta in deltas]
        self._on_status(state, status)
        return [delta for delta in passed if delta is not None]

    def _on_status(self, state: MemberState, status: EngineStatus) -> None:
        state.on_status(status, now_s=self._clock())
        self._index.update(
            state.engine_id,
            stored=status.stored_blocks,
            removed=status.removed_blocks,
            most=status.num_blocks,
        )

    def _take(self, state: MemberState, delta: TokenDelta, *, now_s: float) -> TokenDelta | None:
        routed = self._by_name.get(delta.request_id)
        if routed is not None and state is routed.writer:
            return self._on_delta(routed, state, delta, now_s=now_s)
        if routed is not None and state is routed.reader and delta.finish_reason is not None:
            self._on_read(routed, state, delta, now_s=now_s)
        return None

    def _on_delta(
        self, routed: _Routed, writer: MemberState, delta: TokenDelta, *, now_s: float
    ) -> TokenDelta:
        """The writer's word, as the client shall hear it."""
        if delta.token_ids and not routed.started:
            self._on_started(routed, writer, now_s=now_s)
        told_first = bool(routed.token_ids)
        routed.token_ids += delta.token_ids
        if delta.token_ids:
            routed.num_lost = 0
        metrics = delta.metrics
        if delta.finish_reason is not None:
            self._learn(routed, writer, delta)
            routed.note(metrics=metrics)
            if metrics is not None:
                num_tokens = len(routed.request.output_token_ids) + len(routed.token_ids)
                metrics = msgspec.structs.replace(metrics, num_tokens=num_tokens)
            self._displace(routed)
            del self._routed[routed.request.request_id]
        elif routed.name == delta.request_id == routed.request.request_id:
            return delta
        return msgspec.structs.replace(
            delta,
            request_id=routed.request.request_id,
            metrics=metrics,
            hops=() if delta.finish_reason is None else tuple(routed.hops),
            num_cached_tokens=0 if told_first else delta.num_cached_tokens,
            prompt_logprobs=() if told_first else delta.prompt_logprobs,
        )

    def _on_started(self, routed: _Routed, writer: MemberState, *, now_s: float) -> None:
        """Its first token from this writer, which has all of the prompt now."""
        routed.started = True
        routed.note(first_token_s=now_s)
        writer.num_started += 1
        writer.on_read(routed.name)
        reader = routed.reader
        if reader is not None:
            after_s = 0.0 if routed.read_s is None else now_s - routed.read_s
            line = self.roster.transfer(reader.engine_id, writer.engine_id)
            line.observe(routed.num_moved, after_s)
            if routed.read_s is not None:
                self._leave_reader(routed)

    def _on_read(
        self, routed: _Routed, reader: MemberState, delta: TokenDelta, *, now_s: float
    ) -> None:
        """The reader is done with a prompt, well or not: its writer hears of it by itself."""
        reader.on_read(routed.name)
        routed.read_s = now_s
        routed.note(read_s=now_s, read=delta.metrics)
        if _is_telling(routed, delta):
            reader.costs.on_prefill(delta)
        if routed.started:
            self._leave_reader(routed)

    def _learn(self, routed: _Routed, writer: MemberState, delta: TokenDelta) -> None:
        """From how a whole request went."""
        if delta.finish_reason in ("length", "stop"):
            self.roster.lengths.observe(len(routed.token_ids))
        if _is_telling(routed, delta) and not routed.num_moved:
            writer.costs.on_prefill(delta)

    # -------------------------------------------------------------------------------------- placement

    def _place(self, many: Iterable[_Routed]) -> None:
        """Send requests to engines; those for which there is none wait."""
        batches: dict[str, list[Request]] = {}
        sent: list[tuple[Placement, dict[int, Chain]]] = []
        sizes = {state.status.block_size for state in self.roster.members.values()} - {0}
        uses_prefixes = self._uses_prefixes and len(self.roster.members) > 1
        for routed in many:
            if routed.aborted:
                self._end_here(routed, "abort")
                continue
            if routed.num_lost >= MOST_LOST:
                told = f"{routed.num_lost} engines in a row were lost with this request: it is not tried again"
                self._end_here(routed, "error", told)
                continue
            whole = routed.whole()
            chains = chains_of(whole, block_sizes=sizes) if uses_prefixes else {}
            now_s, is_new = self._clock(), routed.num_placed == 0
            ask = Ask(
                request=whole,
                num_tokens=len(whole.prompt_token_ids) + len(whole.output_token_ids),
                cached=self._index.cached(chains, now_s=now_s, hoping=is_new),
                now_s=now_s,
            )
            placement = self._policy.choose(ask, self.roster)
            if placement is None:
                self._let_wait(routed)
                continue
            for state, request in self._assign(routed, placement, ask):
                batches.setdefault(state.engine_id, []).append(request)
            sent.append((placement, chains))
        failed = []
        for engine_id, requests in batches.items():
            try:
                self.roster.members[engine_id].member.client.submit(requests)
            except EngineError as error:
                failed.append((engine_id, error))
        for placement, chains in sent:  # only now: most hashes are made for it
            there = [each.engine_id for each in placement if each is not None]
            self._index.expect(there, chains, now_s=self._clock())
        for engine_id, why in failed:
            self.lose(engine_id, why)

    def _assign(
        self, routed: _Routed, placement: Placement, ask: Ask
    ) -> list[tuple[MemberState, Request]]:
        """Note where a request goes; what each engine is asked for, the reader first."""
        writer, reader = placement
        request_id = routed.request.request_id
        again = routed.num_placed or self._tag
        routed.name = f"{request_id}#{self._tag}{routed.num_placed}" if again else request_id
        if routed.num_placed:
            logger.info(
                "a request goes on at %s after %d tokens",
                writer.engine_id,
                len(routed.token_ids),
                extra={"request_id": request_id},
            )
        routed.num_placed += 1
        routed.writer, routed.reader, routed.patience_ends_s = writer, reader, None
        self._by_name[routed.name] = routed
        routed.hops.append(self._hop(routed, placement, ask))
        writer.writing.add(routed.name)
        self.roster.on_sent(ask, writer, name=routed.name, reads=reader is None, writes=True)
        request = msgspec.structs.replace(ask.request, request_id=routed.name)
        if reader is None:
            routed.num_moved = 0
            return [(writer, request)]
        routed.num_moved = ask.unread(writer.engine_id)
        reader.serving.add(routed.name)
        self.roster.on_sent(ask, reader, name=routed.name, reads=True, writes=False)
        produce, fetch = self._transfer_of(request, reader, writer)
        copy = msgspec.structs.replace(
            request,
            max_tokens=len(request.output_token_ids) + 1,
            num_draft_tokens=0,
            produce=produce,
        )
        return [(reader, copy), (writer, msgspec.structs.replace(request, fetch=fetch))]

    def _hop(self, routed: _Routed, placement: Placement, ask: Ask) -> Hop:
        """Where a request goes now."""
        writer, reader = placement
        return Hop(
            engine_id=writer.engine_id,
            reader_id="" if reader is None else reader.engine_id,
            policy=self._policy.name,
            asked_s=routed.asked_s,
            chosen_s=ask.now_s,
            num_cached_tokens=ask.cached.get(writer.engine_id, 0),
            num_moved_tokens=0 if reader is None else ask.unread(writer.engine_id),
        )

    def _transfer_of(
        self, request: Request, reader: MemberState, writer: MemberState
    ) -> tuple[KvProduce, KvFetch]:
        config, transfer_id = self._transfer, uuid.uuid4().hex
        draft = (
            config.draft_kv != "rebuild"
            and request.num_draft_tokens != 0
            and self.roster.shares_draft(reader, writer)
            and (config.draft_kv == "transfer" or self.roster.draft_travels(reader, writer))
        )
        return (
            KvProduce(
                transfer_id=transfer_id,
                lease_s=config.lease_s,
                read_draft=draft,
                consumer_id=writer.engine_id,
            ),
            KvFetch(
                transfer_id=transfer_id,
                addresses=reader.status.links.addresses,
                lease_s=config.lease_s,
                timeout_s=config.timeout_s,
                fetch_draft=draft,
                recompute=config.kv_load_failure_policy == "recompute",
            ),
        )

    def _let_wait(self, routed: _Routed) -> None:
        if routed.patience_ends_s is None:
            waits_s = self._resume_s if routed.num_placed else self._patience_s
            routed.patience_ends_s = self._clock() + waits_s
        self._waiting[routed.request.request_id] = routed

    def _displace(self, routed: _Routed) -> None:
        """Take a request from the engines it is on."""
        writer = routed.writer
        if writer is None:
            return
        self._leave_reader(routed)
        routed.asked_s = self._clock()
        routed.note(ended_s=routed.asked_s)
        writer.writing.discard(routed.name)
        writer.num_started -= routed.started
        writer.on_read(routed.name)
        del self._by_name[routed.name]
        routed.writer, routed.started = None, False

    def _leave_reader(self, routed: _Routed) -> None:
        """The reader need not hold the prompt any longer: where the writer could not fetch it, nobody
        else would tell."""
        reader = routed.reader
        if reader is not None:
            reader.serving.discard(routed.name)
            reader.on_read(routed.name)
            _abort_at(reader, routed.name)
        routed.reader = routed.read_s = None

    def _end_here(self, routed: _Routed, reason: FinishReason, error: str | None = None) -> None:
        """End a request that is on no engine."""
        request_id = routed.request.request_id
        self._waiting.pop(request_id, None)
        del self._routed[request_id]
        ended = _ended(request_id, reason, error)
        self._deltas.append(msgspec.structs.replace(ended, hops=tuple(routed.hops)))


def _is_telling(routed: _Routed, delta: TokenDelta) -> bool:
    """Whether a terminal delta tells how long reading the prompt took."""
    fresh = routed.num_placed == 1 and not routed.request.output_token_ids
    return fresh and delta.finish_reason in ("length", "stop")


def _ended(request_id: str, reason: FinishReason, error: str | None) -> TokenDelta:
    return TokenDelta(request_id=request_id, finish_reason=reason, error=error)


def _abort_at(state: MemberState, name: str) -> None:
    """Ask a member to stop a request; one that cannot hear it will be found to be lost."""
    try:
        state.member.client.abort([name])
    except EngineError as error:
        logger.info("request %s cannot be aborted at %s: %s", name, state.engine_id, error)

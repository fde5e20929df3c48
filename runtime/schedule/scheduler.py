"""Which request gets how many tokens in the next step.

    add ──> waiting (a heap) ──> running, best key first ──> ended: one terminal delta
                 ^                        │
                 └──────preempted─────────┘ the worst key, when blocks run out

What may be added here: decisions that need only counts and ids. The scheduler imports neither
torch, numpy nor Ray, so every policy can be tested in ten lines. How long a draft is, what a KV
policy frees and how prefixes are found is decided next door.

A step is `{request: number of tokens}`. Its rows are given out in this order, of
`max_num_batched_tokens` in all:

    1. one to each running request that has but its last token to feed
    2. drafts for those, of what is left; a quarter of all is kept for prompts if any are unread
    3. what running requests still have to read, best key first
    4. waiting requests, best key first, none before its better

Several steps may be in flight (`Limits.plans_in_flight`), with no request in two of them: a step then
takes its part of the requests, and those whose step is in flight are left alone until it is answered.
They are not planned again, not preempted, and keep their blocks even when they are aborted: ranks still
write them. Ranks take steps in order, so that a step may read what an earlier one writes.

With `Limits.async_scheduling` one step may follow another with the same requests before that is
answered, so that ranks need not wait for a plan. Ranks know by themselves where a text stands; the plan
says how much to draft and has blocks for the longest it can have become. Whoever ends meanwhile is in a
step for nothing. It is done while nobody else wants a part, and nothing hangs on the answer.

No more requests run than there are rows: so every text grows in every step, and while anything is
unread some of it is read.

Why nobody waits forever. A key is the time of arrival plus what the priority costs; it never
changes, so ageing is the same for all and the order is total. Only a worse key is preempted for a
better, and the best running request can take every block, which is enough for it, or it would have
been refused. So it grows in every step until it ends; and so does the next best after it. With several
steps in flight it grows in every one that it can be in: whose blocks it lacks is soon out of its own. A
step that follows an unanswered one may be without it, the next is not.
A request that was preempted returns only when all of its tokens fit beside those who run.
"""

from __future__ import annotations

import heapq
import logging
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from paceline.runtime.config import EngineConfig, SpeculativeConfig
from paceline.runtime.errors import PromptError
from paceline.runtime.schedule.blocks import BlockPool, PrefixHit
from paceline.runtime.schedule.controller import Controller, ways_to_draft
from paceline.runtime.schedule.draft_length import (
    MOST_PLANS,
    Drafting,
    DraftPolicy,
    DraftState,
    FixedDrafts,
    StepCost,
)
from paceline.runtime.schedule.policy import make_policies
from paceline.runtime.schedule.prefix import extend_hashes, root_hash
from paceline.runtime.schedule.request import GONE, RunningRequest, State
from paceline.runtime.schedule.tails import TailBook
from paceline.runtime.schedule.transfers import TransferBook, TransferEnd
from paceline.runtime.spec.ngram import NgramIndex
from paceline.runtime.types import (
    AS_CONFIGURED,
    CalibrationName,
    DraftForm,
    DraftShape,
    EngineStatus,
    Event,
    FinishReason,
    Handover,
    Request,
    RequestResult,
    ScheduledRequest,
    StageTimes,
    StepPlan,
    StepResult,
    StepStats,
    TokenDelta,
)

logger = logging.getLogger(__name__)

_MOST_STEPS = 1000
TRIED_ALONE = 2
"""Crashes in a row of its steps, after which a request is let in only while no other such runs."""
GUILTY = 3
"""Crashes in a row, after which a request is taken for their cause and ended."""
CAUTIOUS_S = 60.0
"""How long steps stay small after memory ran out in one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much there is of everything."""

    num_blocks: int
    max_model_len: int
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 128
    block_size: int = 16
    enable_prefix_caching: bool = True
    sink_tokens: int = 4
    window: int = 1024
    priority_ageing_s: float = 30.0
    plans_in_flight: int = 1
    """Steps that may be planned before the first of them is answered, for different requests."""
    async_scheduling: bool = False
    """Whether one may follow with the same requests."""
    num_slots: int = 0
    """Requests whose KV can be offered to other engines at once; 0 for an engine without KV links."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """What may be drafted, and by whom."""

    num_tokens: int
    """Most drafts of a round."""
    method: Literal["draft_model", "ngram", "combined"] = "draft_model"
    adaptive: bool = False
    tree: DraftShape | None = None
    """How the model's drafts branch while few requests run, if they do."""
    forms: tuple[DraftForm, ...] = (AS_CONFIGURED,)
    """How its layers may run; the first is configured."""
    may_interleave: bool = False
    """Whether that is to be chosen too, from batch to batch."""
    lookup_min: int = 2
    lookup_max: int = 4
    ahead: bool = False
    """Whether drafts are made elsewhere, ahead of the text."""
    max_ahead: int | None = None
    """Most of them for a request; if not given, what a round that accepts all needs for the next."""


@dataclass(slots=True)
class _Share:
    """A request's part of a step."""

    running: RunningRequest
    num_tokens: int
    num_blocks: int
    """In its table before the step."""
    draft: DraftState | None = None
    read_draft: bool = False
    num_draft_tokens: int = 0
    tree: DraftShape | None = None
    length: int = 0
    """Its committed tokens; while an earlier step with it is not answered, the most they can be."""

    @property
    def num_draft_rows(self) -> int:
        return self.num_draft_tokens if self.tree is None else self.tree.nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    """A step that is planned and not yet answered."""

    step: int
    planned_s: float
    shares: list[_Share]
    drafting: Drafting
    alone: bool


class Scheduler:
    """Continuous batching over one pool of blocks.

    `schedule` while `may_plan`; every plan that says anything is carried out, and `update` takes the
    answers in the same order. `add` and `abort` may come between any two calls, from the same thread.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        speculation: Speculation | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = self._full_limits = limits
        self._cautious_until_s = 0.0
        self._speculation = speculation
        self._clock = clock
        has_links = limits.num_slots > 0
        self._pool = BlockPool(limits.num_blocks, report=has_links)
        self.transfers = TransferBook(limits.num_slots)
        self.tails = TailBook() if speculation is not None and speculation.ahead else None
        self._policies = make_policies(
            block_size=limits.block_size, sink_tokens=limits.sink_tokens, window=limits.window
        )
        self._drafts = _draft_policy(speculation)
        self._requests: dict[str, RunningRequest] = {}
        self._running: list[RunningRequest] = []  # best key first
        self._waiting: list[tuple[tuple[float, int], RunningRequest]] = []
        self._num_waiting = 0
        self._blocked: tuple[RunningRequest, int] | None = None
        self._finished: list[str] = []
        self._flights: deque[_Flight] = deque()
        self._ends_in_flight: list[TransferEnd] = []
        self._num_added = 0
        self._num_read_rows = 0  # rows of the last step that were neither last tokens nor drafts
        self._answered_s = 0.0
        self._step = 0
        self._totals = Counter[str]()
        num_positions = 0 if speculation is None else speculation.num_tokens
        self._accepted = [0] * (num_positions + 1)  # entry i: rounds that kept exactly i drafts
        self._steps: deque[StepStats] = deque(maxlen=_MOST_STEPS)

    # ------------------------------------------------------------------------------ in, out, state

    @property
    def has_work(self) -> bool:
        """Whether to make another plan, or to wait for an answer. One that only says who is finished
        is worth a step: the ranks hold what such requests had until they hear of it."""
        return bool(self._running or self._num_waiting or self._finished or self._flights)

    @property
    def may_plan(self) -> bool:
        """Whether fewer plans are in flight than may be."""
        depth = self._plans_in_flight
        return len(self._flights) < depth or (depth == 1 and self._may_follow)

    @property
    def _plans_in_flight(self) -> int:
        return min(self.limits.plans_in_flight, self._drafts.plans_in_flight)

    @property
    def num_requests(self) -> int:
        """Those that have not ended."""
        return len(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request. Raises PromptError if it could never run."""
        limits = self.limits
        policy = self._policies[request.params.kv_policy]
        total = len(request.prompt_token_ids) + request.max_tokens
        if not request.prompt_token_ids:
            raise PromptError("the prompt is empty")
        if request.max_tokens < 1:
            raise PromptError(f"max_tokens must be at least 1, found {request.max_tokens}")
        if len(request.output_token_ids) >= request.max_tokens:
            raise PromptError(
                f"{len(request.output_token_ids)} tokens are written already, max_tokens is "
                f"{request.max_tokens}"
            )
        if policy.bounded_by_context and total > limits.max_model_len:
            raise PromptError(
                f"prompt and max_tokens make {total} tokens, the context holds {limits.max_model_len}"
            )
        if request.request_id in self._requests:
            raise PromptError(f"request id {request.request_id} is in use")
        self._check_transfer(request)
        draft = self._draft_state(request)
        # the last token of a text is never fed; a window waits for a drafter that lags behind it
        behind = limits.window if draft is not None and draft.uses_model else 0
        needed = policy.most_blocks(total - 1, span=1 + behind)
        if needed > limits.num_blocks:
            raise PromptError(
                f"prompt and max_tokens need {needed} KV blocks of {limits.block_size} tokens, "
                f"there are {limits.num_blocks}: ask for fewer tokens or raise kv_cache_memory"
            )
        now_s = self._clock()
        self._num_added += 1
        key = (now_s + request.priority * limits.priority_ageing_s, self._num_added)
        running = RunningRequest(request=request, key=key, policy=policy, draft=draft)
        running.events.append((Event.QUEUED, now_s))
        self._requests[request.request_id] = running
        self._wait(running)

    def _check_transfer(self, request: Request) -> None:
        wanted = (request.produce, request.fetch)
        if wanted == (None, None):
            return
        if self.limits.num_slots == 0:
            raise PromptError("this engine has no kv_transfer_config and moves no KV")
        if None not in wanted:
            raise PromptError("a request either produces its KV for others or fetches it")
        if not self._policies[request.params.kv_policy].shares_prefixes:
            raise PromptError(f"the KV of kv_policy {request.params.kv_policy} stays where it is")
        if any(each is not None and self.transfers.knows(each.transfer_id) for each in wanted):
            raise PromptError(f"request {request.request_id}: its transfer id is in use")

    def abort(self, request_id: str) -> TokenDelta | None:
        """Drop a request wherever it is; its terminal delta, or None if it is not here. Its blocks
        are free at once, or when its step is answered, and the ranks forget it with the next plan. One
        that has ended is not here,
        but its KV may be, held for a consumer that will not come."""
        running = self._requests.get(request_id)
        if running is None:
            self.transfers.let_go(request_id, reason="aborted")
            return None
        if running.state is State.WAITING:
            self._num_waiting -= 1
        self._end(running, now_s=self._clock(), reason="aborted")
        # the heap drops it when it comes up, or when most of the heap is such
        if len(self._waiting) > 2 * self._num_waiting + 64:
            self._waiting = [each for each in self._waiting if each[1].state is State.WAITING]
            heapq.heapify(self._waiting)
        return _terminal(running, "abort")

    def status(self) -> EngineStatus:
        """How things are. Its `steps` are those since the last call; the engine adds `ranks`."""
        totals, steps = self._totals, tuple(self._steps)
        self._steps.clear()
        stored, removed = self._pool.take_changes()
        at_least = 0
        accepted_at_position = []
        for count in reversed(self._accepted[1:]):
            at_least += count
            accepted_at_position.append(at_least)
        return EngineStatus(
            num_running=len(self._running),
            num_waiting=self._num_waiting,
            num_blocks=self.limits.num_blocks,
            num_free_blocks=self._pool.num_free,
            block_size=self.limits.block_size,
            num_steps=totals["steps"],
            num_preemptions=totals["preemptions"],
            prompt_tokens=totals["prompt"],
            generation_tokens=totals["generation"],
            prefix_queries=totals["queries"],
            prefix_hits=totals["hits"],
            num_drafts=totals["drafts"],
            drafted=totals["drafted"],
            accepted=totals["accepted"],
            accepted_at_position=tuple(reversed(accepted_at_position)),
            steps=steps,
            ways=self._drafts.explain() if isinstance(self._drafts, Controller) else (),
            waiting_tokens=sum(
                max(0, len(each.token_ids) - each.seen - 1)
                for each in self._requests.values()
                if each.fetch is None and each.state is not State.FETCHING
            ),
            stored_blocks=stored,
            removed_blocks=removed,
            transfers=self.transfers.totals(),
        )

    def stored_blocks(self) -> tuple[bytes, ...]:
        """Hashes of all blocks that can be found, where they are reported at all."""
        return self._pool.stored()

    def check(self) -> None:
        """Every block is free or held by exactly those that have it in their tables; everybody is
        in one place."""
        self._pool.check()
        held = Counter[int]()
        fetching = [each for each in self._requests.values() if each.state is State.FETCHING]
        in_flight = Counter(share.running for flight in self._flights for share in flight.shares)
        ended = [each for each in in_flight if each.state is State.FINISHED]
        for running in (*self._running, *fetching, *ended):
            held.update(block for block in running.blocks if block != GONE)
        held.update(self.transfers.kept_blocks())
        for block in range(self.limits.num_blocks):
            assert self._pool.holders(block) == held[block], (
                f"block {block} is in {held[block]} tables, {self._pool.holders(block)} hold it"
            )
        assert all(a.key < b.key for a, b in pairwise(self._running)), (
            "running requests are not in the order of their keys"
        )
        most = max(self.limits.plans_in_flight, 1 + self.limits.async_scheduling)
        assert len(self._flights) <= most, f"{len(self._flights)} in flight"
        assert self.limits.async_scheduling or all(n == 1 for n in in_flight.values()), (
            "one is in two steps"
        )
        assert all(each.in_flight == in_flight[each] for each in (*self._running, *ended)), (
            "not those are in flight that are marked so"
        )
        assert all(each in ended or each.state is State.RUNNING for each in in_flight), (
            "one is in a step and does not run"
        )
        num_seated = len(self._running) + len(fetching)
        assert num_seated <= self._seats, f"{num_seated} run or will, on {self._seats} seats"
        assert all(each.transfer is not None for each in fetching), "one fetches without a transfer"
        states = Counter(running.state for running in self._requests.values())
        assert states[State.RUNNING] == len(self._running), f"{states} but {len(self._running)} run"
        assert states[State.WAITING] == self._num_waiting, f"{states}, {self._num_waiting} wait"
        queued = [running for _, running in self._waiting if running.state is State.WAITING]
        assert len(queued) == self._num_waiting, f"{len(queued)} of {self._num_waiting} are queued"
        for running in self._requests.values():
            waits = running.state is State.WAITING
            assert not (waits and running.blocks), f"{running.request_id} waits and holds blocks"
            assert waits or running.seen < len(running.token_ids), (
                f"{running.request_id} has nothing to feed"
            )

    # ------------------------------------------------------------------------------------ the plan

    def schedule(self) -> StepPlan:
        """The next step. Moves waiting requests to running, and back where blocks run out."""
        assert self.may_plan, f"{len(self._flights)} steps are in flight and not answered"
        now_s = self._clock()
        if self.limits is not self._full_limits and now_s >= self._cautious_until_s:
            self.limits = self._full_limits
        depth = self._plans_in_flight
        if self._flights and depth == 1:
            shares, drafting = self._follow(self._flights[0])
        else:
            shares, drafting = self._share(now_s=now_s)
        scheduled = tuple([self._announce(share) for share in shares])
        finished: tuple[str, ...] = ()
        if scheduled or not self._flights:  # it can wait for a step that does more
            finished, self._finished = tuple(self._finished), []
        alone = depth == 1
        plan = StepPlan(
            step=self._step,
            scheduled=scheduled,
            form=drafting.form,
            finished=finished,
            alone=alone,
        )
        if scheduled or finished:
            self._flights.append(
                _Flight(
                    step=self._step,
                    planned_s=now_s,
                    shares=shares,
                    drafting=drafting,
                    alone=alone,
                )
            )
        self._step += 1
        return plan

    def _share(self, *, now_s: float) -> tuple[list[_Share], Drafting]:
        """Parts for those who run, and for those who can be let in."""
        num_preemptions = self._totals["preemptions"]
        ready, most_shares = self._part()
        shares: list[_Share] = []
        free_rows, drafting = self._ask_for_drafts(ready)
        free_rows = self._serve(ready, free_rows, shares, now_s=now_s)
        if self._totals["preemptions"] == num_preemptions:
            self._admit(free_rows, shares, most_shares=most_shares, now_s=now_s)
        return shares, drafting

    @property
    def _may_follow(self) -> bool:
        """Whether a step may be planned for the requests of the one in flight: nobody waits who could be
        let in, all who run are in it, and each will have one token to feed."""
        spec = self._speculation
        if not self.limits.async_scheduling or len(self._flights) != 1:
            return False
        if not self._flights[0].alone:
            return False  # its stages have threads of their own
        if spec is not None and (spec.ahead or spec.method != "draft_model"):
            return False  # what is drafted hangs on the text
        if self._num_waiting and self._num_seated < self._seats:
            first = self._waiting[0][1]
            if first.state is not State.WAITING or not self._lacks_blocks(first):
                return False
        shares = self._flights[0].shares
        return all(each.in_flight for each in self._running) and all(
            share.running.seen + share.num_tokens == len(share.running.token_ids)
            and share.running.may_follow
            for share in shares
            if share.running.state is State.RUNNING
        )

    def _follow(self, flight: _Flight) -> tuple[list[_Share], Drafting]:
        """Parts for the same requests once more, as if all that is drafted for them were accepted. Not
        for one that ends for certain, or lacks spare blocks."""
        shares: list[_Share] = []
        drafting: list[DraftState] = []
        for before in flight.shares:
            running, held = before.running, len(before.running.blocks)
            if running.state is not State.RUNNING or running.tokens_left == 1:
                continue
            longest = len(running.token_ids) + before.num_draft_tokens + 1
            if not self._grow_if_spare(running, longest):
                continue
            draft = running.draft
            shares.append(_Share(running, 1, held, draft=draft, length=longest))
            if draft is not None:
                read = running.draft_read
                if before.num_draft_tokens:  # all but the last of them
                    read = longest - 2
                elif before.read_draft:
                    read = longest - 1
                self._allow(draft, running, longest, read=read)
                drafting.append(draft)
        free_rows = self.limits.max_num_batched_tokens - len(shares)
        self._num_read_rows = 0
        _, counted = self._choose_drafts(drafting, len(shares), for_drafts=free_rows)
        self._give_draft_blocks(shares)
        return shares, counted

    def _part(self) -> tuple[list[RunningRequest], int]:
        """Of the running requests those for this step, best key first, and how many shares it may have,
        those let in by it included. An even part of all, of which each step in flight has one."""
        depth = self._plans_in_flight
        ready = [each for each in self._running if not each.in_flight]
        if depth == 1:
            return ready, len(self._running) + self._num_waiting
        num_running = len(self._running)
        return ready[: -(-num_running // depth)], -(-(num_running + self._num_waiting) // depth)

    def _ask_for_drafts(self, ready: Sequence[RunningRequest]) -> tuple[int, Drafting]:
        """Set every draft length; the rows that are left for reading."""
        num_rows = 0
        drafting: list[DraftState] = []
        for running in ready:
            length = len(running.token_ids)
            if length - running.seen > 1:
                continue
            num_rows += 1
            draft = running.draft
            if draft is None or length == running.num_prompt:
                continue
            self._allow(draft, running, length, read=running.draft_read)
            drafting.append(draft)
        free_rows = for_drafts = self.limits.max_num_batched_tokens - num_rows
        has_seat = self._num_waiting > 0 and len(self._running) < self._seats
        if has_seat or num_rows < len(ready):
            for_drafts -= min(free_rows, max(1, self.limits.max_num_batched_tokens // 4))
        num_drafts, counted = self._choose_drafts(drafting, num_rows, for_drafts=for_drafts)
        return free_rows - num_drafts, counted

    def _allow(self, draft: DraftState, running: RunningRequest, length: int, *, read: int) -> None:
        """Say how much may be drafted after so many tokens, of which the draft model has read some."""
        # a round emits one token besides its drafts: more of them could never be used
        draft.room = max(0, running.num_prompt + running.request.max_tokens - length - 1)
        draft.lag = length - read
        if self.tails is not None:
            draft.room = min(draft.room, 0 if draft.tail is None else len(draft.tail))
            draft.lag = 1  # whatever is read is read elsewhere

    def _choose_drafts(
        self, drafting: Sequence[DraftState], num_rows: int, *, for_drafts: int
    ) -> tuple[int, Drafting]:
        """Set the draft lengths of a step that has so many rows without; the rows they take, at most
        `for_drafts`."""
        if not drafting:
            return 0, Drafting()
        counted = self._drafts.choose(
            drafting, rows=num_rows + self._num_read_rows, num_running=len(self._running)
        )
        num_drafts = self._within_reading(drafting)
        if num_drafts > for_drafts:
            num_drafts = _cut(drafting, for_drafts)
        return num_drafts, counted

    def _may_branch(self, running: RunningRequest) -> bool:
        """Whether its drafts may be a tree: not before its sinks are read, a slot of a tree not being
        its position."""
        keeps_all = running.policy.bounded_by_context
        return keeps_all or len(running.token_ids) >= self.limits.sink_tokens

    def _within_reading(self, drafting: Sequence[DraftState]) -> int:
        """Put off drafts of the model for which it would have to read too much; those left.

        A request that lags by more than a step's rows goes alone.
        """
        num_drafts = num_read = 0
        for draft in drafting:
            if draft.num_tokens and draft.drafter == "draft_model":
                if num_read and num_read + draft.lag > self.limits.max_num_batched_tokens:
                    draft.num_tokens, draft.tree = 0, None
                    continue
                num_read += draft.lag
            num_drafts += draft.num_rows
        return num_drafts

    def _serve(
        self,
        ready: Sequence[RunningRequest],
        free_rows: int,
        shares: list[_Share],
        *,
        now_s: float,
    ) -> int:
        """Shares and blocks for those of a step, best key first; the rows that are left."""
        block_size, pool = self.limits.block_size, self._pool
        self._num_read_rows = 0
        for running in ready:
            if running.state is not State.RUNNING:  # it has made room for a better one
                continue
            length, held = len(running.token_ids), len(running.blocks)
            num_tokens = length - running.seen
            if num_tokens > 1:
                num_tokens = self._fitting(running, min(num_tokens, free_rows))
                while num_tokens == 0 and running is self._running[0] and free_rows > 0:
                    # the best of all must go on: those after it make room
                    victim = self._victim()
                    if victim is None:
                        break
                    self._preempt(victim, now_s=now_s)
                    num_tokens = self._fitting(running, min(length - running.seen, free_rows))
                if num_tokens == 0:
                    continue
                free_rows -= num_tokens
                shares.append(self._read(running, num_tokens))
                continue
            if running.seen == held * block_size:
                victim = self._victim() if pool.num_free == 0 else None
                while victim is not None:
                    self._preempt(victim, now_s=now_s)
                    if victim is running:
                        break
                    victim = self._victim() if pool.num_free == 0 else None
                if victim is running:
                    break
                if pool.num_free == 0:  # it goes on when the links or a step give blocks back
                    continue
                running.blocks += pool.allocate(1)
            share = _Share(running, 1, held, length=length)
            if length > running.num_prompt:
                share.draft = running.draft
            else:
                share.read_draft = self._reads(running)
            shares.append(share)
        self._give_draft_blocks(shares)
        return free_rows

    def _victim(self) -> RunningRequest | None:
        """Whom to preempt: the worst key of those whose blocks are neither in the links' hands nor in a
        step's, if there is a better one to gain by it."""
        candidates = [
            each for each in self._running if each.transfer is None and not each.in_flight
        ]
        return candidates[-1] if len(candidates) > 1 else None

    def _fitting(self, running: RunningRequest, num_tokens: int) -> int:
        """How many of its next tokens free blocks can take."""
        room = (len(running.blocks) + self._pool.num_free) * self.limits.block_size
        return max(0, min(num_tokens, room - running.seen))

    def _read(self, running: RunningRequest, num_tokens: int) -> _Share:
        """A share that reads so many tokens, with their blocks."""
        held = len(running.blocks)
        end = running.seen + num_tokens
        self._grow(running, end)
        self._num_read_rows += num_tokens
        length = len(running.token_ids)
        share = _Share(running, num_tokens, held, length=length, read_draft=self._reads(running))
        # others of this very step may use them: every layer's KV is written before it is read
        exact = end if share.read_draft else running.draft_exact
        self._register(running, end=end, draft_exact=exact)
        return share

    def _reads(self, running: RunningRequest) -> bool:
        draft, produce = running.draft, running.request.produce
        if produce is not None:
            spec = self._speculation
            return produce.read_draft and spec is not None and spec.method != "ngram"
        return (
            draft is not None
            and draft.uses_model
            and self.tails is None
            and draft.most > 0
            and (self._drafts.reads_prompts or draft.asked)
        )

    def _give_draft_blocks(self, shares: Sequence[_Share]) -> None:
        for share in shares:
            if share.draft is not None and share.draft.num_tokens:
                self._draft_blocks(share, share.draft)

    def _draft_blocks(self, share: _Share, draft: DraftState) -> None:
        """Blocks for drafts, if nobody else may soon need them: of a tree whole or, as a chain, of
        as many drafts as have room."""
        running, num_tokens, tree = share.running, draft.num_tokens, draft.tree
        if tree is not None and self._may_branch(running):
            end = share.length + tree.num_slots(num_tokens)
            if self._grow_if_spare(running, end):
                share.num_draft_tokens, share.tree = num_tokens, tree
                return
        if not self._grow_if_spare(running, share.length + num_tokens):
            num_tokens = len(running.blocks) * self.limits.block_size - share.length
        share.num_draft_tokens = num_tokens

    def _grow_if_spare(self, running: RunningRequest, end: int) -> bool:
        """Give it blocks for all tokens before `end`, if others are left enough; whether it has
        them."""
        needed = -(-end // self.limits.block_size) - len(running.blocks)
        if needed > 0:
            if self._pool.num_free < needed + len(self._running) - 1:
                return False
            running.blocks += self._pool.allocate(needed)
        return True

    def _admit(
        self, free_rows: int, shares: list[_Share], *, most_shares: int, now_s: float
    ) -> None:
        """Let waiting requests run while there are rows, seats and blocks."""
        while self._num_waiting and self._num_seated < self._seats and len(shares) < most_shares:
            running = self._waiting[0][1]
            if running.state is not State.WAITING:
                heapq.heappop(self._waiting)
                continue
            if free_rows == 0 and running.fetch is None:
                return
            if running.strikes >= TRIED_ALONE and self._has_suspect:
                return
            if self._lacks_blocks(running):
                return
            if running.request.produce is not None and not self.transfers.has_slot:
                return
            hit = self._find(running)
            length, num_cached = len(running.token_ids), len(hit.blocks) * self.limits.block_size
            num_tokens = min(length - num_cached, free_rows)
            if not self._has_blocks(running, hit, num_tokens):
                # nothing changes for it until something is freed
                self._blocked = (running, self._pool.num_free)
                return
            heapq.heappop(self._waiting)
            self._num_waiting -= 1
            running.events.append((Event.SCHEDULED, now_s))
            self._take_hit(running, hit)
            if running.fetch is not None:
                self._fetch(running, hit)
                continue
            running.state = State.RUNNING
            insort(self._running, running, key=lambda each: each.key)
            self._draft_ahead(running)
            if running.request.produce is not None:
                self._offer(running)
            num_tokens = self._fitting(running, num_tokens)
            assert num_tokens > 0, f"{running.request_id} was let in without room"
            free_rows -= num_tokens
            shares.append(self._read(running, num_tokens))

    def _lacks_blocks(self, running: RunningRequest) -> bool:
        """Whether it was tried, and no more blocks are free now than were then."""
        if self._blocked is None or not self._will_free_blocks:
            return False
        tried, num_free = self._blocked
        return tried is running and self._pool.num_free <= num_free

    @property
    def _will_free_blocks(self) -> bool:
        """Whether anybody holds blocks who will give them back."""
        return bool(self._running or self._flights or self.transfers.holds_blocks)

    def _draft_ahead(self, running: RunningRequest) -> None:
        """Have drafts made for it as long as it runs, where they are made ahead."""
        draft, spec = running.draft, self._speculation
        if self.tails is None or draft is None or spec is None:
            return
        draft.tail = self.tails.open(
            running.request,
            running.token_ids,
            # what is verified, the token that comes with it, and as much again while that goes on
            num_ahead=spec.max_ahead or 2 * draft.most + 1,
        )

    @property
    def _has_suspect(self) -> bool:
        return any(each.strikes >= TRIED_ALONE for each in self._running)

    @property
    def _seats(self) -> int:
        return min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)

    @property
    def _num_seated(self) -> int:
        return len(self._running) + self.transfers.num_fetching

    def _take_hit(self, running: RunningRequest, hit: PrefixHit) -> None:
        """Start from a prefix that is there."""
        block_size = self.limits.block_size
        self._pool.hold(hit.blocks)
        running.blocks = list(hit.blocks)
        running.seen = len(hit.blocks) * block_size
        running.num_registered = len(hit.blocks)
        running.num_draft_registered = hit.num_draft_exact
        running.draft_seen = running.draft_exact = hit.num_draft_exact * block_size
        if running.num_cached is None:
            running.num_cached = running.seen
            if self.limits.enable_prefix_caching and running.may_share:
                self._totals["queries"] += running.num_prompt
                self._totals["hits"] += running.seen

    # ------------------------------------------------------------------------- to and from elsewhere

    def _offer(self, running: RunningRequest) -> None:
        """Reserve all its blocks, and let another engine's links follow as they are filled."""
        produce = running.request.produce
        assert produce is not None
        self._grow(running, len(running.token_ids))
        running.transfer = self.transfers.offer(
            produce, running.request_id, running.blocks, num_tokens=len(running.token_ids)
        )

    def _fetch(self, running: RunningRequest, hit: PrefixHit) -> None:
        """Reserve all its blocks, and let the links fill those behind its cached prefix."""
        fetch, draft, block_size = running.fetch, running.draft, self.limits.block_size
        assert fetch is not None
        self._grow(running, len(running.token_ids))
        running.state = State.FETCHING
        running.transfer = self.transfers.fetch(
            fetch,
            running.request_id,
            running.blocks,
            num_tokens=len(running.token_ids),
            num_cached=len(hit.blocks) * block_size,
            num_draft_cached=hit.num_draft_exact * block_size,
            want_draft=fetch.fetch_draft and draft is not None and draft.uses_model,
        )

    def transferred(self, end: TransferEnd) -> list[TokenDelta]:
        """The links are done with a transfer: its blocks are ours again. The ranks must be too."""
        if self._is_written(end.transfer_id):
            self._ends_in_flight.append(end)
            return []
        transfer = self.transfers.end(end)
        if transfer is None:
            return []
        self._blocked = None
        if transfer.kept is not None:
            self._pool.release(transfer.kept)
            return []
        running = self._requests[transfer.request_id]
        running.transfer = None
        if transfer.producing:  # nobody waits for it any more
            self._end(running, now_s=self._clock())
            return [_terminal(running, "abort")]
        fetch, running.fetch = running.fetch, None
        assert fetch is not None
        error = end.error
        if error is None:
            error = self._mismatch(running, end.handover)
        num_tokens = transfer.num_tokens
        running.note_fetched(end, num_tokens=num_tokens, error=error, now_s=self._clock())
        if error is None:
            assert end.handover is not None
            return [self._arrived(running, end.handover)]
        if fetch.recompute:
            self._release(running)
            self._wait(running)
            return []
        self._end(running, now_s=self._clock())
        error = f"the KV of its prompt could not be fetched: {error}"
        return [_terminal(running, "error", error)]

    def _is_written(self, transfer_id: str) -> bool:
        """Whether a step in flight fills blocks of a transfer and marks how far."""
        transfers = (share.running.transfer for flight in self._flights for share in flight.shares)
        return any(each is not None and each.transfer_id == transfer_id for each in transfers)

    def _mismatch(self, running: RunningRequest, handover: Handover | None) -> str | None:
        """Why this is not what the producer should have handed over; None if it is."""
        if handover is None or len(handover.token_ids) != 1:
            return "it came without its token"
        position = len(running.token_ids) + 1
        if (handover.seed, handover.position) != (running.request.seed, position):
            return (
                f"its sampler is at seed {handover.seed}, position {handover.position}, "
                f"not at {running.request.seed}, {position}"
            )
        return None

    def _arrived(self, running: RunningRequest, handover: Handover) -> TokenDelta:
        """All of its prompt's KV is in place: it runs from here on, its next token known."""
        running.state = State.RUNNING
        insort(self._running, running, key=lambda each: each.key)
        length = len(running.token_ids)
        running.draft_exact = max(running.draft_exact, min(handover.draft_exact, length))
        running.draft_seen = running.draft_exact
        running.num_cached = handover.num_cached_tokens
        if running.num_output == 0:
            running.prompt_logprobs = list(handover.prompt_logprobs)
        share = _Share(running, 0, 0, length=length)
        drawn = RequestResult(
            request_id=running.request_id,
            token_ids=handover.token_ids,
            logprobs=handover.logprobs,
        )
        return self._take(share, drawn, StageTimes(), now_s=self._clock())

    def _hand_over(self, running: RunningRequest, each: RequestResult) -> None:
        """Its prompt is read: what the other engine needs to go on."""
        transfer = running.transfer
        assert transfer is not None, f"{running.request_id} was read for nobody"
        self.transfers.complete(
            transfer,
            Handover(
                token_ids=each.token_ids[:1],
                seed=running.request.seed,
                position=transfer.num_tokens + 1,
                draft_exact=min(running.draft_exact, transfer.num_tokens),
                num_cached_tokens=running.num_cached or 0,
                logprobs=each.logprobs[:1],
                prompt_logprobs=tuple(running.prompt_logprobs),
            ),
        )

    def _find(self, running: RunningRequest) -> PrefixHit:
        """The longest prefix it can start from. One token at least is left to feed: its logits are
        what is wanted."""
        if not (self.limits.enable_prefix_caching and running.may_share):
            return PrefixHit()
        self._hash(running, len(running.token_ids))
        most = (len(running.token_ids) - 1) // self.limits.block_size
        return self._pool.find(running.hashes, most=most)

    def _has_blocks(self, running: RunningRequest, hit: PrefixHit, num_tokens: int) -> bool:
        """Whether all its tokens fit beside those who run, and a block more for each of these."""
        if not self._will_free_blocks:
            return True
        window = self.limits.window
        behind = window if running.draft is not None and running.draft.uses_model else 0
        needed = running.policy.most_blocks(
            len(running.token_ids) + 1, span=num_tokens + behind
        ) - len(hit.blocks)
        free = self._pool.num_free - self._pool.count_free(hit.blocks)
        return free >= needed + len(self._running)

    def _announce(self, share: _Share) -> ScheduledRequest:
        running = share.running
        running.in_flight += 1
        draft = share.draft
        num_drafts = share.num_draft_tokens
        drafter = draft.drafter if num_drafts and draft is not None else "draft_model"
        blocks = running.blocks
        ready: tuple[int, ...] = ()
        if num_drafts and draft is not None and draft.tail is not None:
            ready, num_drafts = draft.tail.first(num_drafts), 0
        if running.announced:
            new_blocks = tuple(blocks[share.num_blocks :]) if len(blocks) > share.num_blocks else ()
            return ScheduledRequest(
                request_id=running.request.request_id,
                num_tokens=share.num_tokens,
                num_draft_tokens=num_drafts,
                tree=share.tree,
                drafter=drafter,
                draft_token_ids=ready,
                read_draft=share.read_draft,
                new_blocks=new_blocks,
            )
        running.announced = True
        transfer = running.transfer
        return ScheduledRequest(
            request_id=running.request.request_id,
            num_tokens=share.num_tokens,
            num_draft_tokens=num_drafts,
            tree=share.tree,
            drafter=drafter,
            draft_token_ids=ready,
            read_draft=share.read_draft,
            new_blocks=tuple(blocks),
            request=running.request,
            output_token_ids=tuple(running.token_ids[running.num_prompt :]),
            num_cached=running.seen,
            num_draft_cached=running.draft_exact,
            slot=None if transfer is None else transfer.slot,
            generation=0 if transfer is None else transfer.generation,
        )

    # ---------------------------------------------------------------------------------- the answer

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take a step's tokens; one delta per request that got any. Ends requests and frees their
        blocks."""
        if not (plan.scheduled or plan.finished):  # of nobody
            return []
        flight = self._flights.popleft()
        assert result.step == plan.step == flight.step, (
            f"expected the result of step {flight.step}, found {plan.step} and {result.step}"
        )
        now_s = self._clock()
        self._observe(flight, result, now_s=now_s)
        deltas: list[TokenDelta] = []
        for share, each in zip(flight.shares, result.results, strict=True):
            running = share.running
            running.in_flight -= 1
            share.length = len(running.token_ids)
            assert each.request_id == running.request.request_id, (
                f"expected the result of {running.request.request_id}, found {each.request_id}"
            )
            if running.state is not State.RUNNING:  # ended by an earlier step, or aborted
                self._release(running, reason="aborted")
                continue
            if each.error is not None:
                self._end(running, now_s=now_s, reason=each.error)
                deltas.append(_terminal(running, "error", each.error))
                continue
            running.draft_exact = each.draft_exact
            if share.read_draft:
                running.draft_seen = running.seen + share.num_tokens
            if each.prompt_logprobs and running.num_output == 0:
                running.prompt_logprobs += each.prompt_logprobs
            if running.seen < running.num_prompt:
                read = min(running.seen + share.num_tokens, running.num_prompt) - running.seen
                self._totals["prompt"] += read
            if each.token_ids:
                if share.num_draft_tokens:
                    self._learn(share, each, way=flight.drafting.way)
                deltas.append(self._take(share, each, result.times, now_s=now_s))
            else:
                if not running.is_first:
                    running.took_part(result.times)
                running.seen += share.num_tokens
                self._settle(running)
        ends, self._ends_in_flight = self._ends_in_flight, []
        for end in ends:
            deltas += self.transferred(end)
        return deltas

    def _take(
        self, share: _Share, each: RequestResult, times: StageTimes, *, now_s: float
    ) -> TokenDelta:
        """A round's tokens: what is passed on of them."""
        running = share.running
        is_first = running.is_first
        if running.request.produce is not None:
            self._hand_over(running, each)
        running.strikes = 0
        token_ids, end = running.append(each.token_ids)
        running.seen = len(running.token_ids) - 1
        self._settle(running)
        num_accepted = min(each.num_accepted, len(token_ids))
        draft = running.draft
        if draft is not None and draft.tail is not None:
            draft.tail.commit()
        if draft is not None and draft.index is not None and end is None:
            index = draft.index
            index.extend(running.token_ids[len(index) :])
        if running.request.produce is None:  # else it is counted where the text goes on
            self._totals["generation"] += len(token_ids)
        if is_first:
            running.events.append((Event.FIRST_TOKEN, now_s))
        else:
            running.took_part(times)
            running.count_round(num_drafted=each.num_drafted, num_accepted=num_accepted)
        if end is None and not is_first and not each.logprobs:
            return TokenDelta(
                request_id=each.request_id, token_ids=token_ids, num_accepted=num_accepted
            )
        if end is not None:
            self._end(running, now_s=now_s)
        prompt_logprobs = tuple(running.prompt_logprobs)
        running.prompt_logprobs = []
        return TokenDelta(
            request_id=each.request_id,
            token_ids=token_ids,
            num_accepted=num_accepted,
            logprobs=each.logprobs[: len(token_ids)],
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=(running.num_cached or 0) if is_first else 0,
            finish_reason=None if end is None else end.reason,
            stop_token_id=None if end is None else end.stop_token_id,
            metrics=None if end is None else running.metrics(),
        )

    def _learn(self, share: _Share, each: RequestResult, *, way: int) -> None:
        """Count a round's drafts, before its tokens are taken."""
        totals, running, draft = self._totals, share.running, share.draft
        assert draft is not None, f"{running.request_id} drafted without being asked"
        if draft.drafter == "draft_model":
            # the last draft is never fed to the drafter
            kept = min(each.num_accepted, share.num_draft_tokens - 1)
            running.draft_seen = share.length + kept
        if each.num_drafted:
            totals["drafts"] += 1
            totals["drafted"] += each.num_drafted
            totals["accepted"] += each.num_accepted
            self._accepted[each.num_accepted] += 1
            self._drafts.verified(
                draft, num_drafted=each.num_drafted, num_accepted=each.num_accepted, way=way
            )

    def _observe(self, flight: _Flight, result: StepResult, *, now_s: float) -> None:
        """Remember what the step was and took: of the time that it shared with an earlier one, what
        came after that one's end. Not if all have ended: then nobody may have waited for it."""
        shares = flight.shares
        seconds = now_s - max(flight.planned_s, self._answered_s)
        self._answered_s = now_s
        if not any(share.running.state is State.RUNNING for share in shares):
            return
        lengths = tuple([s.num_draft_tokens for s in shares if s.num_draft_tokens])
        draft_rows = sum([share.num_draft_rows for share in shares])
        self._totals["steps"] += 1
        self._steps.append(
            StepStats(
                seconds=seconds,
                times=result.times,
                num_requests=len(shares),
                num_rows=result.num_rows,
                draft_lengths=lengths,
                draft_span=result.draft_span,
                verify_span=result.verify_span,
                draft_passes=() if self.tails is None else self.tails.take_passes(),
            )
        )
        if self._speculation is None:
            return
        first_rows = num_passes = later_rows = num_accepted = 0
        drafting = flight.drafting
        for share, each in zip(shares, result.results, strict=True):
            num_drafts = share.num_draft_tokens
            if share.running.state is State.RUNNING:
                num_accepted += each.num_accepted if num_drafts else 0
            elif share.draft is not None and drafting.num_requests > 1:
                # its tokens are nobody's
                drafting = drafting._replace(num_requests=drafting.num_requests - 1)
            draft = share.draft if self.tails is None else None
            if num_drafts and draft is not None and draft.drafter == "draft_model":
                lag = len(share.running.token_ids) - share.running.draft_read
                first_rows += max(1, lag)  # of a text that has ended the end was cut off
                num_passes = max(num_passes, num_drafts)
                later_rows += share.num_draft_rows - 1
            elif share.read_draft:
                first_rows += share.num_tokens
        self._drafts.observe(
            StepCost(
                seconds,
                result.times,
                rows=sum([share.num_tokens for share in shares]) + draft_rows,
                draft_rows=draft_rows,
                num_accepted=num_accepted,
                first_rows=first_rows,
                num_passes=num_passes,
                later_rows=later_rows,
                drafting=drafting,
            )
        )

    # ------------------------------------------------------------------------------------- new ranks

    def restart(self, num_blocks: int, *, out_of_memory: bool = False) -> list[TokenDelta]:
        """All ranks were started again, with so many blocks that hold nothing: every request waits at
        its old place, to read its tokens again. The terminal deltas of those that cannot.

        What a crash leaves undecided is who caused it. A request whose steps crash twice in a row is
        from then on let in only while no other such runs; the third crash in a row is its own, and
        ends it. After `out_of_memory` steps are half as large for `CAUTIOUS_S`.
        """
        now_s = self._clock()
        self._full_limits = replace(self._full_limits, num_blocks=num_blocks)
        self.limits = replace(self.limits, num_blocks=num_blocks)
        if out_of_memory:
            fewer = max(1, self.limits.max_num_batched_tokens // 2)
            self.limits = replace(self.limits, max_num_batched_tokens=fewer)
            self._cautious_until_s = now_s + CAUTIOUS_S
        for running in {share.running for flight in self._flights for share in flight.shares}:
            running.strikes += 1
            running.in_flight = 0
        self._flights.clear()
        self._ends_in_flight.clear()
        seated = [each for each in self._requests.values() if each.state is not State.WAITING]
        self._running, self._finished, self._blocked = [], [], None
        self.transfers.lose_all()
        self._pool = self._pool.emptied(num_blocks)
        deltas = []
        for running in seated:
            was_fetching = running.state is State.FETCHING
            running.transfer = None
            self._stop_ahead(running)
            running.lose_blocks()
            running.events.append((Event.PREEMPTED, now_s))
            self._wait(running)
            why = self._why_not_again(running, was_fetching=was_fetching)
            if was_fetching:
                running.fetch = None
            if why is not None:
                self._num_waiting -= 1
                self._end(running, now_s=now_s, reason=why)
                deltas.append(_terminal(running, "error", why))
        return deltas

    def _why_not_again(self, running: RunningRequest, *, was_fetching: bool) -> str | None:
        """Why a request that had a seat in a crash is not to go on; None if it is."""
        if running.strikes >= GUILTY:
            return (
                f"a rank ended in each of {running.strikes} steps in a row that this request was "
                "part of: it is not tried again"
            )
        if running.request.produce is not None:
            return "the engine that read its prompt for another was started again"
        if was_fetching and running.fetch is not None and not running.fetch.recompute:
            return "the KV of its prompt could not be fetched: this engine was started again"
        needed = running.policy.most_blocks(
            running.num_prompt + running.request.max_tokens - 1, span=1
        )
        if needed > self.limits.num_blocks:
            return f"it needs {needed} KV blocks, and there are {self.limits.num_blocks} now"
        return None

    # -------------------------------------------------------------------------------------- blocks

    def _grow(self, running: RunningRequest, end: int) -> None:
        """Blocks for every token before `end`."""
        missing = -(-end // self.limits.block_size) - len(running.blocks)
        if missing > 0:
            running.blocks += self._pool.allocate(missing)

    def _settle(self, running: RunningRequest) -> None:
        """Let blocks that have become full be found, and free those that are done with."""
        block_size = self.limits.block_size
        if running.policy.shares_prefixes:
            num_full = running.seen // block_size
            if num_full > running.num_registered or (
                running.draft_exact // block_size > running.num_draft_registered
            ):
                self._register(running, end=running.seen, draft_exact=running.draft_exact)
            return
        draft = running.draft
        first_unread = running.seen
        if draft is not None and draft.uses_model:
            if running.seen - running.draft_exact > self.limits.window:
                # its blocks cannot wait for the drafter any longer
                draft.uses_model = False
            else:
                first_unread = min(running.seen, running.draft_exact)
        done = running.policy.done_with(first_unread)
        if done.stop > max(done.start, running.num_gone):
            gone = range(max(done.start, running.num_gone), done.stop)
            self._pool.release([running.blocks[index] for index in gone])
            for index in gone:
                running.blocks[index] = GONE
            running.num_gone = done.stop

    def _hash(self, running: RunningRequest, end: int) -> None:
        if len(running.hashes) < end // self.limits.block_size:
            extend_hashes(
                running.hashes,
                running.token_ids,
                root=root_hash(running.request.cache_salt),
                block_size=self.limits.block_size,
            )

    def _register(self, running: RunningRequest, *, end: int, draft_exact: int) -> None:
        """Let its full blocks before `end` be found, with the drafter's rows where these are
        exact."""
        if not (self.limits.enable_prefix_caching and running.policy.shares_prefixes):
            return
        num_full = end // self.limits.block_size
        num_exact = min(draft_exact // self.limits.block_size, num_full)
        if num_full <= running.num_registered and num_exact <= running.num_draft_registered:
            return
        self._hash(running, end)
        first = min(running.num_registered, running.num_draft_registered)
        for index in range(first, num_full):
            if index >= running.num_registered or index < num_exact:
                self._pool.register(
                    running.blocks[index], running.hashes[index], draft_exact=index < num_exact
                )
        running.num_registered = max(running.num_registered, num_full)
        running.num_draft_registered = max(running.num_draft_registered, num_exact)

    def _release(self, running: RunningRequest, *, reason: str | None = None) -> None:
        """Free its blocks, the last first: heads of prefixes are of most use to others. Those in the
        links' hands are freed when these say so, those that a step writes when it is answered."""
        if running.announced:
            self._finished.append(running.request_id)
            running.announced = False
        self._stop_ahead(running)
        if running.in_flight:
            return
        blocks = [block for block in reversed(running.blocks) if block != GONE]
        if running.transfer is None:
            self._pool.release(blocks)
        else:
            self.transfers.keep(running.transfer, blocks, reason=reason)
            running.transfer = None
        running.lose_blocks()

    def _stop_ahead(self, running: RunningRequest) -> None:
        """No more drafts for one that runs no more."""
        draft = running.draft
        if self.tails is not None and draft is not None and draft.tail is not None:
            self.tails.close(running.request_id)
            draft.tail = None

    # ----------------------------------------------------------------------------- coming and going

    def _draft_state(self, request: Request) -> DraftState | None:
        spec = self._speculation
        asked = request.num_draft_tokens
        if spec is None or asked == 0:
            return None
        if spec.ahead and not self._policies[request.params.kv_policy].shares_prefixes:
            return None  # a drafter that is ahead keeps whole texts
        index = None
        if spec.method != "draft_model":
            index = NgramIndex(
                request.prompt_token_ids, min_length=spec.lookup_min, max_length=spec.lookup_max
            )
        return DraftState(
            most=spec.num_tokens if asked is None else min(asked, spec.num_tokens),
            asked=asked is not None,
            uses_model=spec.method != "ngram",
            index=index,
        )

    def _wait(self, running: RunningRequest) -> None:
        running.state = State.WAITING
        heapq.heappush(self._waiting, (running.key, running))
        self._num_waiting += 1

    def _preempt(self, running: RunningRequest, *, now_s: float) -> None:
        assert len(self._running) > 1, f"{running.request_id} runs alone and lacks blocks"
        self._running.remove(running)
        running.events.append((Event.PREEMPTED, now_s))
        self._totals["preemptions"] += 1
        logger.debug("a request is preempted", extra={"request_id": running.request_id})
        self._release(running)
        self._wait(running)

    def _end(self, running: RunningRequest, *, now_s: float, reason: str | None = None) -> None:
        """With a `reason`, whoever waits for its KV is told so."""
        if running.state is State.RUNNING:
            self._running.remove(running)
        elif running.request.produce is not None:
            self.transfers.refuse(running.request.produce.transfer_id, reason or "aborted")
        if running.state is not State.WAITING:
            self._release(running, reason=reason)
        running.state = State.FINISHED
        running.events.append((Event.FINISHED, now_s))
        del self._requests[running.request_id]


def _draft_policy(spec: Speculation | None) -> DraftPolicy:
    if spec is None:
        return FixedDrafts()
    if not spec.adaptive:
        return FixedDrafts(spec.tree)
    ways = ways_to_draft(
        most=spec.num_tokens,
        tree=spec.tree,
        forms=spec.forms,
        plans_in_flight=(1, 2) if spec.may_interleave else (MOST_PLANS,),
    )
    return ways[0].policy if len(ways) == 1 else Controller(ways)


def make_scheduler(
    config: EngineConfig, *, max_model_len: int, num_blocks: int, async_scheduling: bool = False
) -> Scheduler:
    """The scheduler a config asks for, over as many blocks as the ranks found memory for. Whether
    `async_scheduling` makes sense hangs on these too."""
    limits = Limits(
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        sink_tokens=config.kv_sink_tokens,
        window=config.kv_window,
        priority_ageing_s=config.priority_ageing_s,
        plans_in_flight=config.plans_in_flight,
        async_scheduling=async_scheduling,
        num_slots=0
        if config.kv_transfer_config is None
        else config.kv_transfer_config.max_transfers,
    )
    spec = config.speculative_config
    if spec is None:
        return Scheduler(limits)
    speculation = Speculation(
        num_tokens=spec.num_speculative_tokens,
        method=spec.method,
        adaptive=spec.draft_length == "adaptive",
        tree=None
        if spec.tree == "chain"
        else DraftShape(kind=spec.tree, width=spec.tree_width, nodes=spec.tree_nodes),
        forms=_forms(spec),
        may_interleave=spec.schedule == "adaptive",
        lookup_min=spec.prompt_lookup_min,
        lookup_max=spec.prompt_lookup_max,
        ahead=config.drafts_ahead,
        max_ahead=spec.max_tokens_ahead,
    )
    return Scheduler(limits, speculation=speculation)


def _forms(spec: SpeculativeConfig) -> tuple[DraftForm, ...]:
    """As configured and, where layers are grouped, what could be chosen instead."""
    if spec.layer_parallel_size == 1 and spec.layer_groups is None:
        return (AS_CONFIGURED,)
    others: tuple[CalibrationName, ...] = ("on_mismatch", "every_round")
    return (
        AS_CONFIGURED,
        DraftForm(exact=True),
        *[DraftForm(calibration=other) for other in others if other != spec.calibration],
    )


def _terminal(
    running: RunningRequest, reason: FinishReason, error: str | None = None
) -> TokenDelta:
    """The end of a request that no token ended."""
    return TokenDelta(
        request_id=running.request_id,
        finish_reason=reason,
        error=error,
        metrics=running.metrics(),
    )


def _cut(drafting: Sequence[DraftState], num_rows: int) -> int:
    """Make trees chains, and shorten the longest, until all fit into so many rows; the rows they
    take."""
    for draft in drafting:
        draft.tree = None
    longest = max(draft.num_tokens for draft in drafting)
    while sum([min(draft.num_tokens, longest) for draft in drafting]) > num_rows:
        longest -= 1
    for draft in drafting:
        draft.num_tokens = min(draft.num_tokens, longest)
    return sum([draft.num_tokens for draft in drafting])

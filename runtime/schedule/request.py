"""One request on its way through the engine.

             ┌──────out of blocks, or ranks: PREEMPTED──────┐
             v                                              │
    ──add── WAITING ──a seat and its blocks: SCHEDULED──> RUNNING ──stop, length──> FINISHED
             │ │ ^                                         ^│                          ^
             │ │ └─cannot be had─ FETCHING ──all in place──┘│                          │
             │ └───a prompt that is read elsewhere──^ │     │                          │
             └──────────────────────abort─────────────┴─────┴──────────────────────────┘

Preempted, it keeps its tokens and loses its blocks; it then waits at its old place in the queue and
reads its tokens again. Of its tokens, in the order of their positions:

    0 ............. seen ............. len(token_ids)
    |-- in the KV --|-- still to be fed --|
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from paceline.runtime.schedule.draft_length import DraftState
from paceline.runtime.schedule.policy import KvPolicy
from paceline.runtime.schedule.prefix import BlockHash
from paceline.runtime.schedule.transfers import Transfer, TransferEnd
from paceline.runtime.types import (
    Event,
    FetchAccount,
    FinishReason,
    KvFetch,
    Request,
    RequestMetrics,
    StageTimes,
    TokenLogprobs,
)

GONE = -1
"""Stands in a block table for a block that the policy was done with and that has been freed."""


class State(enum.Enum):
    """Where in the drawing above."""

    WAITING = enum.auto()
    FETCHING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class End(NamedTuple):
    """Why a text ends, and by which of the request's own stop tokens if one did it."""

    reason: FinishReason
    stop_token_id: int | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class RunningRequest:
    """A request and all the scheduler knows of it."""

    request: Request
    key: tuple[float, int]
    """Its place in the queue: lower goes first."""
    policy: KvPolicy
    draft: DraftState | None
    """None for a request that never drafts."""
    state: State = State.WAITING
    token_ids: list[int] = field(init=False)
    """The prompt, then the text."""
    num_prompt: int = field(init=False)
    num_resumed: int = field(init=False)
    """Tokens of the text that another engine wrote."""
    seen: int = 0
    draft_seen: int = 0
    """Leading tokens that the draft model has read, exactly or not."""
    draft_exact: int = 0
    """Those it has read exactly, as the ranks last said."""
    blocks: list[int] = field(default_factory=list)
    """The block table. It keeps its length: entries that have been freed are `GONE`."""
    num_gone: int = 0
    """The end of the entries that have been freed; 0 while there are none."""
    hashes: list[BlockHash] = field(default_factory=list)
    num_registered: int = 0
    """Leading blocks that can be found by their hashes, or share one that can."""
    num_draft_registered: int = 0
    """Those that were registered with exact drafter rows."""
    announced: bool = False
    """Whether the ranks know it."""
    fetch: KvFetch | None = field(init=False)
    """Where its KV is to be had, until that has been tried."""
    in_flight: int = 0
    """Steps with it that are not yet answered."""
    transfer: Transfer | None = None
    """While its blocks are in the links' hands."""
    fetched: FetchAccount | None = None
    """How its KV came from elsewhere, once that has been tried."""
    strikes: int = 0
    """Steps with it that ended in a crash, since it last got a token."""
    num_cached: int | None = None
    """Prompt tokens whose KV was there when it was first scheduled."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    events: list[tuple[Event, float]] = field(default_factory=list)
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    calibrate_ms: float = 0.0
    """Of its steps after the first token, as are the next two."""
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    _stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt = len(request.prompt_token_ids)
        self.num_resumed = len(request.output_token_ids)
        self.fetch = request.fetch
        ends = () if request.params.ignore_eos else request.eos_token_ids
        self._stop_ids = frozenset(ends) | frozenset(request.params.stop_token_ids)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def is_first(self) -> bool:
        """Whether nothing has been written here yet."""
        return self.num_output == self.num_resumed

    @property
    def draft_read(self) -> int:
        """Leading tokens that the draft model has read, as far as is known here."""
        return max(self.draft_seen, self.draft_exact)

    @property
    def tokens_left(self) -> int:
        return self.request.max_tokens - self.num_output

    @property
    def may_share(self) -> bool:
        """Whether its prefix may come from others: not where every prompt row is asked for."""
        asked = self.request.params.prompt_logprobs is not None and self.num_output == 0
        return self.policy.shares_prefixes and not asked

    @property
    def may_follow(self) -> bool:
        """Whether a step with it may be planned before the last is answered: not where the answer
        moves blocks, or its rank could not go on once it has ended."""
        request = self.request
        return (
            self.policy.shares_prefixes
            and request.params.structured_outputs is None
            and request.produce is None
            and self.transfer is None
        )

    def append(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], End | None]:
        """Take a step's tokens up to the one that ends the text: those tokens, and the end."""
        if not self._stop_ids.isdisjoint(token_ids):
            first = max(0, self.request.params.min_tokens - self.num_output - 1)
            for index in range(first, min(len(token_ids), self.tokens_left)):
                if token_ids[index] in self._stop_ids:
                    kept = token_ids[: index + 1]
                    self.token_ids += kept
                    return kept, self._stop_by(token_ids[index])
        left = self.tokens_left
        if len(token_ids) < left:
            self.token_ids += token_ids
            return token_ids, None
        kept = token_ids[:left]
        self.token_ids += kept
        return kept, End("length")

    def _stop_by(self, token_id: int) -> End:
        params = self.request.params
        is_eos = token_id in self.request.eos_token_ids and not params.ignore_eos
        return End("stop", None if is_eos else token_id)

    def count_round(self, *, num_drafted: int, num_accepted: int) -> None:
        """Remember a verification pass after the first token."""
        self.rounds += 1
        self.drafted += num_drafted
        self.accepted += num_accepted
        counts = self.accepted_at
        if num_accepted >= len(counts):
            counts += [0] * (num_accepted + 1 - len(counts))
        counts[num_accepted] += 1

    def note_fetched(
        self, end: TransferEnd, *, num_tokens: int, error: str | None, now_s: float
    ) -> None:
        """Remember how its KV came, or why not."""
        stats = end.stats
        self.events.append((Event.FETCHED, now_s))
        self.fetched = FetchAccount(
            num_tokens=num_tokens,
            num_bytes=stats.num_bytes,
            seconds=stats.seconds,
            unoverlapped_s=stats.unoverlapped_s,
            error=error,
        )

    def took_part(self, times: StageTimes) -> None:
        """In a step that took so long."""
        self.calibrate_ms += times.calibrate_ms
        self.draft_ms += times.draft_ms
        self.verify_ms += times.verify_ms

    def lose_blocks(self) -> None:
        """Forget its KV, that has been freed."""
        self.blocks = []
        self.seen = self.draft_seen = self.draft_exact = self.num_gone = 0
        self.num_registered = self.num_draft_registered = 0
        self.announced = False
        if self.num_output == 0:
            self.prompt_logprobs = []

    def metrics(self) -> RequestMetrics:
        """How it went, once it is over."""
        return RequestMetrics(
            num_prompt_tokens=self.num_prompt,
            num_tokens=self.num_output,
            num_cached_tokens=self.num_cached or 0,
            rounds=self.rounds,
            drafted=self.drafted,
            accepted=self.accepted,
            accepted_at=tuple(self.accepted_at),
            times=StageTimes(
                calibrate_ms=self.calibrate_ms, draft_ms=self.draft_ms, verify_ms=self.verify_ms
            ),
            events=tuple(self.events),
            fetch=self.fetched,
        )

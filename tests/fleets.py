"""Engines that take simulated time, for the tests of what routes between them.

    World: a clock, and which KV has arrived when
      └─ SimEngine: reads prompts in chunks, first come first served, and writes one token per text
                    and step; a step takes longer the more it reads and writes

Texts are a function of seed and position, so that a text that goes on elsewhere can be checked token
by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from paceline.runtime.errors import EngineError
from paceline.runtime.schedule.prefix import extend_hashes, root_hash
from paceline.runtime.types import (
    EngineStatus,
    Event,
    FinishReason,
    KvLinks,
    Request,
    RequestMetrics,
    SamplingParams,
    StageTimes,
    StepStats,
    TokenDelta,
)

BLOCK = 16


def make_request(
    request_id: str = "a",
    prompt: int | Sequence[int] = 40,
    *,
    max_tokens: int = 5,
    seed: int = 0,
    session_id: str = "",
    **params: object,
) -> Request:
    """A prompt of so many tokens is the same for the same `seed` only."""
    ids = [seed * 100_003 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(ids),
        params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        seed=seed,
        max_tokens=max_tokens,
        session_id=session_id,
    )


def text_of(request: Request) -> list[int]:
    """What any engine writes."""
    start = len(request.prompt_token_ids)
    return [token_at(request.seed, start + i) for i in range(request.max_tokens)]


def token_at(seed: int, position: int) -> int:
    return (seed * 7919 + position * 104_729) % 32_003


class World:
    """Time, and transfers."""

    def __init__(self, *, transfer_s: float = 0.01, transfer_per_token_s: float = 1e-6) -> None:
        self.now_s = 100.0
        self.transfer_s = transfer_s
        self.transfer_per_token_s = transfer_per_token_s
        self.engines: list[SimEngine] = []
        self.arrived: dict[str, float] = {}
        """When the KV of a transfer is at its consumer; infinity for one that never will be."""

    def clock(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass and engines work."""
        end_s = self.now_s + seconds
        while (next_s := self.next_s) <= end_s:
            self.now_s = max(self.now_s, next_s)
            for engine in self.engines:
                engine.work()
        self.now_s = end_s

    @property
    def next_s(self) -> float:
        """When something happens next."""
        return min((engine.next_s for engine in self.engines), default=math.inf)


@dataclass(eq=False)
class _Text:
    request: Request
    token_ids: list[int]
    num_cached: int
    unread: int
    queued_s: float
    fetching: bool
    scheduled_s: float | None = None
    first_s: float | None = None


@dataclass(eq=False)
class SimEngine:
    """Satisfies `EngineClient`."""

    world: World
    name: str = "engine"
    step_s: float = 0.01
    per_text_s: float = 0.0005
    per_token_s: float = 0.0002
    """To read."""
    chunk: int = 512
    num_blocks: int = 4096
    fingerprint: dict[str, str] = field(default_factory=lambda: {"model": "m"})
    addresses: tuple[str, ...] = ("127.0.0.1:1",)
    submitted: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    error: str | None = None
    closed: bool = False

    def __post_init__(self) -> None:
        self.world.engines.append(self)
        self._texts: dict[str, _Text] = {}
        self._out: list[TokenDelta] = []
        self._steps: list[StepStats] = []
        self._num_steps = 0
        self._stored: list[bytes] = []
        self._cached: set[bytes] = set()
        self._step: tuple[float, float, list[tuple[_Text, int]], list[_Text]] | None = None

    # EngineClient

    def submit(self, requests: list[Request]) -> None:
        if self.error is not None:
            raise EngineError(self.error)
        for request in requests:
            self.submitted.append(request)
            assert request.request_id not in self._texts, f"{request.request_id} is in use"
            tokens = [*request.prompt_token_ids, *request.output_token_ids]
            hits = 0
            for each in self._hashes(request, tokens):
                if each not in self._cached:
                    break
                hits += BLOCK
            hits = min(hits, len(tokens) - 1)
            text = _Text(
                request=request,
                token_ids=tokens,
                num_cached=hits,
                unread=len(tokens) - hits,
                queued_s=self.world.now_s,
                fetching=request.fetch is not None,
            )
            self._texts[request.request_id] = text
        self.work()

    def abort(self, request_ids: list[str]) -> None:
        if self.error is not None:
            raise EngineError(self.error)
        self.aborted += request_ids
        for request_id in request_ids:
            text = self._texts.pop(request_id, None)
            if text is not None:
                if text.request.produce is not None:
                    self.world.arrived.setdefault(text.request.produce.transfer_id, math.inf)
                self._out.append(TokenDelta(request_id=request_id, finish_reason="abort"))

    def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:
        if self.error is not None:
            raise EngineError(self.error)
        out, self._out = self._out, []
        return out

    def status(self) -> EngineStatus:
        steps, self._steps = self._steps, []
        stored, self._stored = self._stored, []
        held = sum(len(text.token_ids) // BLOCK + 1 for text in self._texts.values())
        unread = [t.unread for t in self._texts.values() if not t.fetching]
        return EngineStatus(
            num_running=len(self._texts),
            num_blocks=self.num_blocks,
            num_free_blocks=max(0, self.num_blocks - held),
            block_size=BLOCK,
            num_steps=self._num_steps,
            steps=tuple(steps),
            waiting_tokens=sum(unread),
            stored_blocks=tuple(stored),
            links=KvLinks(addresses=self.addresses, fingerprint=self.fingerprint),
        )

    def close(self) -> None:
        self.closed = True

    # What happens to it

    def die(self, error: str = "rank 0 died") -> None:
        """All that was not polled is lost."""
        self.error = error
        self._step = None
        for text in self._texts.values():
            if text.request.produce is not None:
                self.world.arrived.setdefault(text.request.produce.transfer_id, math.inf)
        self._texts.clear()
        self._out.clear()

    @property
    def num_texts(self) -> int:
        return len(self._texts)

    @property
    def next_s(self) -> float:
        """When it has something to do."""
        if self._step is not None:
            return self._step[1]
        fetches = [self._arrives(t) for t in self._texts.values() if t.fetching]
        return min(fetches, default=math.inf)

    def work(self) -> None:
        """End the step that is over, and begin the next."""
        now_s = self.world.now_s
        if self._step is not None and self._step[1] <= now_s:
            self._end_step()
        if self._step is not None:
            return
        reads, writes, left = [], [], self.chunk
        for text in self._texts.values():
            if text.fetching:
                if self._arrives(text) > now_s and not self._failed(text):
                    continue
                text.fetching = False
                text.unread = 1 if not self._failed(text) else text.unread
            if text.unread == 0:
                writes.append(text)
            elif left:
                if text.scheduled_s is None:
                    text.scheduled_s = now_s
                reads.append((text, min(left, text.unread)))
                left -= reads[-1][1]
        if reads or writes:
            num_read = sum(num for _, num in reads)
            seconds = self.step_s + self.per_text_s * len(writes) + self.per_token_s * num_read
            self._step = (now_s, now_s + seconds, reads, writes)

    def _arrives(self, text: _Text) -> float:
        fetch = text.request.fetch
        assert fetch is not None
        if self._failed(text):
            return self.world.now_s
        return self.world.arrived.get(fetch.transfer_id, math.inf)

    def _failed(self, text: _Text) -> bool:
        fetch = text.request.fetch
        return fetch is not None and self.world.arrived.get(fetch.transfer_id) == math.inf

    def _end_step(self) -> None:
        assert self._step is not None
        began_s, _, reads, writes = self._step
        self._step = None
        self._num_steps += 1
        num_read = sum(num for _, num in reads)
        self._steps.append(
            StepStats(
                seconds=self.world.now_s - began_s,
                times=StageTimes(),
                num_requests=len(reads) + len(writes),
                num_rows=num_read + len(writes),
            )
        )
        for text, num in reads:
            text.unread -= num
            if text.unread == 0:
                text.first_s = self.world.now_s
                hashes = [
                    each
                    for each in self._hashes(text.request, text.token_ids)
                    if each not in self._cached
                ]
                self._cached.update(hashes)
                self._stored += hashes
                writes = [*writes, text]
        for text in writes:
            if text.request.request_id in self._texts:
                self._write(text)

    def _write(self, text: _Text) -> None:
        request = text.request
        token_id = token_at(request.seed, len(text.token_ids))
        text.token_ids.append(token_id)
        num_output = len(text.token_ids) - len(request.prompt_token_ids)
        reason: FinishReason | None = "length" if num_output >= request.max_tokens else None
        metrics = None
        if reason is not None:
            del self._texts[request.request_id]
            metrics = self._metrics(text, num_output)
            if request.produce is not None:
                num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
                after_s = self.world.transfer_s + self.world.transfer_per_token_s * num_tokens
                self.world.arrived[request.produce.transfer_id] = self.world.now_s + after_s
        self._out.append(
            TokenDelta(
                request_id=request.request_id,
                token_ids=(token_id,),
                num_cached_tokens=text.num_cached if num_output == 1 else 0,
                finish_reason=reason,
                metrics=metrics,
            )
        )

    def _metrics(self, text: _Text, num_output: int) -> RequestMetrics:
        assert text.scheduled_s is not None
        assert text.first_s is not None
        return RequestMetrics(
            num_prompt_tokens=len(text.request.prompt_token_ids),
            num_tokens=num_output,
            num_cached_tokens=text.num_cached,
            rounds=num_output,
            drafted=0,
            accepted=0,
            accepted_at=(),
            times=StageTimes(),
            events=(
                (Event.QUEUED, text.queued_s),
                (Event.SCHEDULED, text.scheduled_s),
                (Event.FIRST_TOKEN, text.first_s),
                (Event.FINISHED, self.world.now_s),
            ),
        )

    def _hashes(self, request: Request, token_ids: Iterable[int]) -> list[bytes]:
        hashes: list[bytes] = []
        extend_hashes(
            hashes,  # type: ignore[arg-type]
            list(token_ids),
            root=root_hash(request.cache_salt),
            block_size=BLOCK,
        )
        return hashes


@dataclass
class Told:
    """What a client hears of its requests."""

    token_ids: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, list[TokenDelta]] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    end_s: dict[str, float] = field(default_factory=dict)

    def hear(self, deltas: Iterable[TokenDelta], *, now_s: float = 0.0) -> None:
        for delta in deltas:
            name = delta.request_id
            assert name not in self.ends, f"{name} has ended, and yet {delta}"
            if delta.token_ids:
                self.first_s.setdefault(name, now_s)
            self.token_ids.setdefault(name, []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                self.ends.setdefault(name, []).append(delta)
                self.end_s[name] = now_s


def run(
    world: World,
    poll: Callable[[], list[TokenDelta]],
    told: Told,
    *,
    names: Iterable[str],
    most_s: float = 1000.0,
) -> None:
    """Let time pass until all these have ended."""
    left, deadline_s = set(names), world.now_s + most_s
    while True:
        told.hear(poll(), now_s=world.now_s)
        left -= set(told.ends)
        if not left:
            return
        assert world.now_s < deadline_s, f"{sorted(left)[:5]} have not ended in {most_s:.0f} s"
        step_s = min(max(world.next_s - world.now_s, 0.0), 0.5)
        world.advance(step_s)

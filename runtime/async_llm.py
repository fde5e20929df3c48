"""`AsyncLLM`: many users' requests on one engine, from one event loop.

    submit ──> sender thread ──one batch──> EngineClient.submit / abort
    stream <── event loop <──one call per poll── poll thread <── EngineClient.poll, status

Everything but the two threads' calls of the engine runs on the event loop, so nothing here is
locked. A stream that is left, by whatever way, aborts its requests: the engine frees their blocks
within a step.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import itertools
import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from paceline.runtime.caller import Caller, current
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import EngineError, OverloadedError, PromptError, ShuttingDownError
from paceline.runtime.outputs import Assembler, CompletionOutput, Position, RequestOutput
from paceline.runtime.requests import PRIORITY_LIMIT, Job, Prompt, RequestFactory, child_id, job_id
from paceline.runtime.types import (
    EngineStatus,
    FinishReason,
    Hop,
    Request,
    RequestMetrics,
    SamplingParams,
    StepStats,
    TokenDelta,
)

if TYPE_CHECKING:
    from paceline.runtime.engine import EngineClient
    from paceline.runtime.preflight import Facts

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""Longest that one poll waits: how soon the poll thread notices that it shall end."""
STATUS_S = 0.5
"""How old the known status of the engine may be while it answers."""
RECENT_S = 2.0
"""A token that is no older proves the decode path by itself."""
LONG_PROMPT_CHARS = 4096
"""Longer ones are tokenised beside the event loop: it has others to serve."""
RETRY_S = (1.0, 60.0)
"""Least and most that a refused client is told to wait."""
ABORT_S = 5.0
"""How long aborted requests may take to end."""


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One text's life as its client sees it, in seconds of the front end's monotonic clock."""

    request_id: str
    num_prompt_tokens: int
    arrived_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    metrics: RequestMetrics | None = None
    """The engine's own account, with its events; None if it was lost."""
    hops: tuple[Hop, ...] = ()
    """Where a router sent it, once it has ended."""
    caller: Caller = field(default_factory=current)
    """On whose behalf."""


class Observer(Protocol):
    """Told of everything that metrics count. Called on the event loop: must be quick, must not
    raise. Health probes are not reported."""

    def on_admitted(self, record: RequestRecord, request: Request) -> None:
        """A text is on its way to the engine."""

    def on_delta(self, record: RequestRecord, *, num_tokens: int, now_s: float) -> None:
        """New tokens. The record is still as the last ones left it: its `last_token_s` is None
        before the first, and `now_s` minus it is the time between."""

    def on_finished(self, record: RequestRecord) -> None:
        """A text has ended; exactly once for each that was admitted."""

    def on_status(self, status: EngineStatus) -> None:
        """A new status. Its `steps` are those since the last call."""


class NullObserver:
    """Satisfies `Observer` and takes no notice."""

    def on_admitted(self, record: RequestRecord, request: Request) -> None:
        pass

    def on_delta(self, record: RequestRecord, *, num_tokens: int, now_s: float) -> None:
        pass

    def on_finished(self, record: RequestRecord) -> None:
        pass

    def on_status(self, status: EngineStatus) -> None:
        pass


class Observers:
    """Satisfies `Observer`: several as one, told in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._all = observers

    def on_admitted(self, record: RequestRecord, request: Request) -> None:
        for each in self._all:
            each.on_admitted(record, request)

    def on_delta(self, record: RequestRecord, *, num_tokens: int, now_s: float) -> None:
        for each in self._all:
            each.on_delta(record, num_tokens=num_tokens, now_s=now_s)

    def on_finished(self, record: RequestRecord) -> None:
        for each in self._all:
            each.on_finished(record)

    def on_status(self, status: EngineStatus) -> None:
        for each in self._all:
            each.on_status(status)


@dataclass(slots=True, kw_only=True)
class _Text:
    """One text that is being written."""

    request: Request
    assembler: Assembler
    record: RequestRecord
    stream: RequestStream
    index: int


class RequestStream:
    """A job's outputs as they come: iterate over it once, and close it or leave its `async with`.

    Each item has what is new since the last: parts of texts in the order they came (`outputs`, maybe
    several of one index). The last has `finished`. Closing early aborts the job. Raises EngineError
    if the engine is lost.
    """

    def __init__(self, llm: AsyncLLM, job: Job) -> None:
        self.job = job
        self._llm = llm
        self._parts: list[CompletionOutput] = []
        self._left = len(job.requests)
        self._waiter: asyncio.Future[None] | None = None
        self._error: EngineError | None = None
        self._prompt_logprobs: list[Position | None] | None = None
        self.num_cached_tokens = 0
        """Known with the first part."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._left == 0:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        parts, self._parts = self._parts, []
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return RequestOutput(
            request_id=self.job.request_id,
            prompt=self.job.prompt,
            prompt_token_ids=self.job.prompt_token_ids,
            outputs=parts,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            finished=self._left == 0,
        )

    def close(self) -> None:
        """Abort what is not finished. Safe to call twice."""
        if self._left:
            self._left = 0
            self._llm._leave(self.job)
        self._wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _push(self, part: CompletionOutput) -> None:
        if part.finish_reason is not None:
            self._left -= 1
        self._parts.append(part)
        self._wake()

    def _fail(self, error: EngineError) -> None:
        self._error, self._left = error, 0
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncLLM:
    """An engine's front: admits, streams, aborts, watches.

    At most `max_num_seqs`, for each of `num_engines` behind the client, and `max_queued_requests`
    texts are in flight. Use it on one event loop; it does not close the engine.
    """

    def __init__(
        self,
        client: EngineClient,
        facts: Facts,
        config: EngineConfig,
        *,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
        num_engines: int = 1,
    ) -> None:
        self.facts = facts
        self.config = config
        self.factory = RequestFactory(facts, config)
        self._client = client
        self._observer = observer or NullObserver()
        self._clock = clock
        self._limit = num_engines * config.max_num_seqs + config.max_queued_requests
        self._streams: dict[str, RequestStream] = {}
        self._texts: dict[str, _Text] = {}
        self._leaving: dict[str, set[str]] = {}
        """Jobs whose client left, and the texts of each that the engine has not ended yet: until then
        their ids are in use, or late tokens would land in somebody else's text."""
        self._num_texts = 0
        """Admitted and not ended; those whose client left stop counting when it leaves."""
        self._finish_times: collections.deque[float] = collections.deque(maxlen=256)
        self._last_token_s = -math.inf
        self._status = EngineStatus()
        self.recent_steps: collections.deque[StepStats] = collections.deque(maxlen=128)
        """The engine's latest, for whoever only looks now and then."""
        self._probe = _Probe(self)
        self._draining = False
        self._lost: EngineError | None = None
        self._idle = asyncio.Event()
        self._is_lost = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = threading.Event()
        self._outbox: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to serve on the running event loop; the first request does it too. Safe to call
        twice."""
        if self._loop is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._threads = [
            threading.Thread(target=target, name=f"paceline-{name}", daemon=True)
            for name, target in (("poll", self._poll), ("send", self._send))
        ]
        for thread in self._threads:
            thread.start()

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        num_draft_tokens: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
        session_id: str = "",
        retry_key: str | None = None,
    ) -> RequestStream:
        """Admit a prompt. Raises PromptError, OverloadedError, ShuttingDownError or EngineError.

        `request_id` must not be in use; one is made up if not given. Requests of one `retry_key` that
        are the same get the same text. The stream must be closed.
        """
        self.start()
        self._check_admission(params.n)
        make = functools.partial(
            self.factory.make,
            prompt,
            params,
            request_id=request_id or uuid.uuid4().hex,
            num_draft_tokens=num_draft_tokens,
            priority=priority,
            cache_salt=cache_salt,
            session_id=session_id,
            retry_key=retry_key,
        )
        if _is_slow(prompt, params):
            job = await asyncio.to_thread(make)
            self._check_admission(params.n)
        else:
            job = make()
        if self.knows(job.request_id):
            raise PromptError(f"request_id {job.request_id!r:.80} is in use")
        return self._admit(job)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        num_draft_tokens: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
        session_id: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """`submit` and its stream in one: what is new per item, the last with `finished`.

        Raises what `submit` raises, at the first item. Leaving early (with `aclose`, or because the
        task is cancelled) aborts.
        """
        stream = await self.submit(
            prompt,
            params,
            request_id=request_id,
            num_draft_tokens=num_draft_tokens,
            priority=priority,
            cache_salt=cache_salt,
            session_id=session_id,
        )
        async with stream:
            async for output in stream:
                yield output

    def abort(self, request_id: str) -> bool:
        """Stop a job by its id: its stream ends with finish reason "abort". False if there is no
        such job."""
        stream = self._streams.get(request_id)
        if stream is None:
            return False
        self._outbox.put(_Message(abort=[r.request_id for r in stream.job.requests]))
        return True

    def knows(self, request_id: str) -> bool:
        """Whether a job of that id is in flight."""
        return request_id in self._streams or request_id in self._leaving

    @property
    def num_in_flight(self) -> int:
        """Texts admitted and not ended."""
        return self._num_texts

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def lost(self) -> EngineError | None:
        """Why the engine is gone, if it is."""
        return self._lost

    async def wait_lost(self) -> None:
        """Returns once the engine is gone."""
        await self._is_lost.wait()

    def status(self) -> EngineStatus:
        """The engine's latest known, half a second old at most while it answers. Its `steps` are
        only the latest ones."""
        return self._status

    async def check_health(self, *, timeout_s: float = 5.0) -> bool:
        """Whether the decode path works: a token came within the last two seconds, or one that is
        asked for now comes in time.

        The probe goes before all requests, past admission, and is in no metric of the front end.
        """
        self.start()
        if self._lost is not None:
            return False
        if self._clock() - self._last_token_s <= RECENT_S:
            return True
        return await self._probe.run(timeout_s=timeout_s)

    async def drain(self, *, timeout_s: float) -> bool:
        """Take nothing new, let running requests finish, abort those left at the deadline. Whether
        all finished by themselves."""
        self._draining = True
        finished = await self._wait_idle(timeout_s)
        if not finished:
            logger.warning("%d texts unfinished after %g s: aborted", self._num_texts, timeout_s)
            for request_id in list(self._streams):
                self.abort(request_id)
            await self._wait_idle(ABORT_S)
        return finished

    def lose(self, error: EngineError) -> None:
        """The engine is gone, and no other will come: every stream ends with the reason."""
        self._lose(error)

    async def close(self) -> None:
        """End the threads. Streams that are left raise EngineError."""
        self._lose(ShuttingDownError("the server is shut down"))
        self._closing.set()
        self._outbox.put(None)
        deadline = time.monotonic() + 2 * POLL_S
        for thread in self._threads:  # daemons: one that hangs in the engine must not hold us
            await asyncio.to_thread(thread.join, max(0.0, deadline - time.monotonic()))

    # Admission

    def _check_admission(self, num_texts: int) -> None:
        if self._draining:
            raise ShuttingDownError("the server is shutting down")
        if self._lost is not None:
            raise EngineError(str(self._lost))
        if num_texts > self._limit:
            raise PromptError(f"n must be at most {self._limit} on this server, found {num_texts}")
        if self._num_texts + num_texts > self._limit:
            raise OverloadedError(
                f"{self._num_texts} requests are running or waiting, and no more than "
                f"{self._limit} may; try again later",
                retry_after_s=self._retry_after_s(),
            )

    def _retry_after_s(self) -> float:
        """When a place is likely to be free: from how fast requests ended lately."""
        least, most = RETRY_S
        if len(self._finish_times) < 2:
            return least
        per_finish_s = (self._clock() - self._finish_times[0]) / len(self._finish_times)
        return min(max(per_finish_s, least), most)

    def _admit(self, job: Job) -> RequestStream:
        stream = RequestStream(self, job)
        now_s = self._clock()
        for index, request in enumerate(job.requests):
            record = RequestRecord(
                request_id=request.request_id,
                num_prompt_tokens=len(request.prompt_token_ids),
                arrived_s=now_s,
            )
            self._texts[request.request_id] = _Text(
                request=request,
                assembler=Assembler(request, self.facts.tokenizer, index=index),
                record=record,
                stream=stream,
                index=index,
            )
            self._observer.on_admitted(record, request)
        self._streams[job.request_id] = stream
        self._num_texts += len(job.requests)
        self._outbox.put(_Message(submit=list(job.requests)))
        return stream

    def _leave(self, job: Job) -> None:
        """The client of a job is gone: abort what the engine still writes, and forget it."""
        self._streams.pop(job.request_id, None)
        left = [r.request_id for r in job.requests if r.request_id in self._texts]
        for request_id in left:
            self._finish(self._texts[request_id], reason="abort", metrics=None)
        if left:
            self._leaving[job.request_id] = set(left)
            self._outbox.put(_Message(abort=left))

    # What the engine says

    def _on_poll(self, deltas: list[TokenDelta], status: EngineStatus | None) -> None:
        now_s = self._clock()
        for delta in deltas:
            text = self._texts.get(delta.request_id)
            if text is not None:
                self._on_delta(text, delta, now_s)
            elif delta.finish_reason is not None and not self._probe.on_delta(delta):
                self._on_left(delta.request_id)
            if delta.token_ids:
                self._last_token_s = now_s
        if status is not None:
            self._status = status
            self.recent_steps.extend(status.steps)
            self._observer.on_status(status)

    def _on_left(self, request_id: str) -> None:
        """The engine has ended a text whose client left."""
        job = job_id(request_id)
        if job in self._leaving:
            self._leaving[job].discard(request_id)
            if not self._leaving[job]:
                del self._leaving[job]

    def _on_delta(self, text: _Text, delta: TokenDelta, now_s: float) -> None:
        record, stream = text.record, text.stream
        stopped = text.assembler.stopped
        try:
            part = text.assembler.feed(delta)
            if text.index == 0 and record.first_token_s is None:
                stream.num_cached_tokens = delta.num_cached_tokens
                stream._prompt_logprobs = text.assembler.prompt_logprobs(delta)
        except Exception as error:  # one request's text must not take the others' down
            logger.exception("request %s: its text cannot be assembled", delta.request_id)
            self._outbox.put(_Message(abort=[delta.request_id]))
            part = CompletionOutput(index=text.index, finish_reason="error", error=str(error))
        if part.token_ids:
            self._observer.on_delta(record, num_tokens=len(part.token_ids), now_s=now_s)
            if record.first_token_s is None:
                record.first_token_s = now_s
                record.num_cached_tokens = delta.num_cached_tokens
            record.last_token_s = now_s
            record.num_tokens += len(part.token_ids)
        if text.assembler.stopped and not stopped and delta.finish_reason is None:
            self._outbox.put(_Message(abort=[delta.request_id]))
        if part.finish_reason is not None:
            record.hops = delta.hops
            self._finish(text, reason=part.finish_reason, metrics=part.metrics, now_s=now_s)
            stream._push(part)
            if stream._left == 0:
                self._streams.pop(stream.job.request_id, None)
        elif part.token_ids or part.text:
            stream._push(part)

    def _finish(
        self,
        text: _Text,
        *,
        reason: FinishReason,
        metrics: RequestMetrics | None,
        now_s: float | None = None,
    ) -> None:
        now_s = self._clock() if now_s is None else now_s
        record = text.record
        del self._texts[record.request_id]
        self._num_texts -= 1
        self._finish_times.append(now_s)
        record.finished_s, record.finish_reason, record.metrics = now_s, reason, metrics
        self._observer.on_finished(record)
        if not self._num_texts:
            self._idle.set()

    def _lose(self, error: EngineError) -> None:
        """The engine is gone: every stream ends with the reason."""
        if self._lost is not None:
            return
        self._lost = error
        self._is_lost.set()
        for text in list(self._texts.values()):
            self._finish(text, reason="error", metrics=None)
        for stream in self._streams.values():
            stream._fail(error)
        self._streams.clear()
        self._probe.fail()

    async def _wait_idle(self, timeout_s: float) -> bool:
        deadline = self._clock() + timeout_s
        while self._num_texts:
            self._idle.clear()
            left_s = deadline - self._clock()
            if left_s <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), left_s)
        return True

    # The two threads

    def _poll(self) -> None:
        next_status_s = 0.0
        try:
            while not self._closing.is_set():
                deltas = self._client.poll(POLL_S)
                status = None
                if time.monotonic() >= next_status_s:
                    status = self._client.status()
                    next_status_s = time.monotonic() + STATUS_S
                if deltas or status is not None:
                    self._call(self._on_poll, deltas, status)
        except EngineError as error:
            self._call(self._lose, error)
        except Exception as error:
            logger.exception("the engine cannot be polled")
            self._call(self._lose, EngineError(f"{type(error).__name__}: {error}"))

    def _send(self) -> None:
        """Hand over all messages that are there in one call each."""
        try:
            while (message := self._outbox.get()) is not None:
                messages = [message]
                with contextlib.suppress(queue.Empty):
                    while (message := self._outbox.get_nowait()) is not None:
                        messages.append(message)
                    self._outbox.put(None)
                if submits := [request for m in messages for request in m.submit]:
                    self._client.submit(submits)
                if aborts := [request_id for m in messages for request_id in m.abort]:
                    self._client.abort(aborts)
        except EngineError as error:
            self._call(self._lose, error)
        except Exception as error:
            logger.exception("the engine takes no requests")
            self._call(self._lose, EngineError(f"{type(error).__name__}: {error}"))

    def _call(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None, "threads start with the loop"
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(function, *args)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    """What the event loop asks of the engine."""

    submit: list[Request] = field(default_factory=list)
    abort: list[str] = field(default_factory=list)


class _Probe:
    """One token, generated to see that it can be. Askers at the same time share one; one that does
    not come back stays out, so that a hung engine is not given more and more of them."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._numbers = itertools.count()
        self._request_id: str | None = None
        self._done: asyncio.Future[bool] | None = None

    async def run(self, *, timeout_s: float) -> bool:
        if self._done is None or self._done.done():
            self._done = asyncio.get_running_loop().create_future()
            self._request_id = child_id(f"paceline health\n{next(self._numbers)}", 0)
            self._llm._outbox.put(_Message(submit=[self._request(self._request_id)]))
        try:
            return await asyncio.wait_for(asyncio.shield(self._done), timeout_s)
        except TimeoutError:
            return False

    def on_delta(self, delta: TokenDelta) -> bool:
        """Whether a terminal delta is the probe's."""
        if delta.request_id != self._request_id or self._done is None:
            return False
        if not self._done.done():
            self._done.set_result(bool(delta.token_ids))
        return True

    def fail(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(False)

    def _request(self, request_id: str) -> Request:
        facts = self._llm.facts
        return Request(
            request_id=request_id,
            prompt_token_ids=facts.eos_token_ids[:1] or (0,),
            params=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
            seed=0,
            max_tokens=1,
            num_draft_tokens=0,
            eos_token_ids=facts.eos_token_ids,
            priority=-PRIORITY_LIMIT,
        )


def _is_slow(prompt: Prompt, params: SamplingParams) -> bool:
    """Whether checking a request could hold the event loop up: a long text, or a grammar."""
    text = prompt if isinstance(prompt, str) else prompt.get("prompt")
    long = isinstance(text, str) and len(text) > LONG_PROMPT_CHARS
    return long or params.structured_outputs is not None

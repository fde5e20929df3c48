"""An engine without a model, and the facts of one, for the tests of everything in front of it.

The tokenizer spells every byte as one token, so that texts and token ids can be written down:
`ids_of("hi") == [104, 105]`, and 256 ends a text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from paceline.actors.fleet import Fleet
from paceline.runtime.async_llm import AsyncLLM, NullObserver, Observer, Observers
from paceline.runtime.config import EngineConfig, ServerConfig
from paceline.runtime.engine import EngineClient
from paceline.runtime.errors import EngineError
from paceline.runtime.link import LinkClient, LinkServer, Submit
from paceline.runtime.models.arch import Architecture, Rope
from paceline.runtime.preflight import Facts
from paceline.runtime.tokenizer import Tokenizer
from paceline.runtime.types import (
    EngineStatus,
    Event,
    FinishReason,
    Request,
    RequestMetrics,
    StageTimes,
    StepStats,
    TokenDelta,
    TokenLogprobs,
)

END = 256
"""The end-of-text token."""
VOCAB_SIZE = 257
BLOCK_SIZE = 16
NUM_BLOCKS = 1024
REPLY = "the quick brown fox jumps over the lazy dog. "

Reply = Callable[[Request], Sequence[int]]


def ids_of(text: str) -> list[int]:
    """The fake tokenizer's ids: the text's bytes."""
    return list(text.encode())


def fake_facts(folder: Path, *, max_model_len: int = 512) -> Facts:
    """Facts of a model that does not exist; its tokenizer is written into `folder`."""
    _save_byte_tokenizer(folder)
    arch = Architecture(
        family="llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        ff_size=8,
        norm_eps=1e-5,
        max_position=max_model_len,
        rope=Rope(),
        tied_embeddings=True,
        dtype="float32",
        eos_token_ids=(END,),
    )
    return Facts(
        arch=arch,
        max_model_len=max_model_len,
        eos_token_ids=(END,),
        tokenizer=Tokenizer(folder),
    )


def endless(request: Request) -> Sequence[int]:
    """A reply without an end: as many tokens of `REPLY` as are asked for."""
    ids = ids_of(REPLY)
    return [ids[i % len(ids)] for i in range(request.max_tokens)]


def saying(text: str, *, end: bool = True) -> Reply:
    """A reply of this text, then the end-of-text token."""
    return lambda _request: [*ids_of(text), *([END] if end else [])]


@dataclass(slots=True)
class _Running:
    request: Request
    reply: list[int]
    arrived_s: float
    started_s: float = 0.0
    first_s: float = 0.0
    written: int = 0
    rounds: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)


class FakeEngine:
    """Satisfies `EngineClient`: replies are written down beforehand, a step emits a few tokens of
    each.

    Of the tokens a step emits for a request all but the last count as drafted and accepted. Blocks
    are taken while a request runs: `status().num_free_blocks` tells whether they came back.

    `reply`           which tokens a request gets; it stops at an end or stop token, or max_tokens
    `tokens_per_step` emitted per request and step
    `step_s`          how long a step takes
    `num_seqs`        requests that run at once; others wait
    """

    def __init__(
        self,
        reply: Reply = endless,
        *,
        tokens_per_step: int = 3,
        step_s: float = 0.0,
        num_seqs: int = 128,
    ) -> None:
        self.reply = reply
        self.tokens_per_step = tokens_per_step
        self.step_s = step_s
        self.num_seqs = num_seqs
        self.submitted: list[Request] = []
        """Every request ever submitted, in order."""
        self.aborted: list[str] = []
        self.closed = False
        self._wake = threading.Condition()
        self._waiting: list[_Running] = []
        self._running: dict[str, _Running] = {}
        self._ended: list[TokenDelta] = []
        self._paused = False
        self._error: str | None = None
        self._steps: list[StepStats] = []
        self._totals = {"num_steps": 0, "prompt_tokens": 0, "generation_tokens": 0}
        self._drafts = [0, 0, 0]
        """Rounds that drafted, tokens drafted, tokens accepted."""

    def submit(self, requests: list[Request]) -> None:
        with self._wake:
            if self._error is not None:
                raise EngineError(self._error)
            now = time.monotonic()
            self.submitted += requests
            for request in requests:
                reply = list(self.reply(request))[: request.max_tokens]
                self._waiting.append(_Running(request, reply, now, accepted_at=[0]))
            self._waiting.sort(key=lambda running: running.request.priority)
            self._wake.notify_all()

    def abort(self, request_ids: list[str]) -> None:
        with self._wake:
            self.aborted += request_ids
            for request_id in request_ids:
                running = self._running.pop(request_id, None)
                for waiting in [w for w in self._waiting if w.request.request_id == request_id]:
                    self._waiting.remove(waiting)
                    running = waiting
                if running is not None:
                    self._ended.append(self._delta(running, (), "abort"))
            self._wake.notify_all()

    def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:
        with self._wake:
            self._wake.wait_for(lambda: self._error is not None or self._has_work(), wait_s)
            if self._error is not None:
                raise EngineError(self._error)
            deltas, self._ended = self._ended, []
            if not self._paused:
                deltas += self._step()
        if self.step_s and deltas:
            time.sleep(self.step_s)
        return deltas

    def status(self) -> EngineStatus:
        with self._wake:
            steps, self._steps = self._steps, []
            drafts, drafted, accepted = self._drafts
            held = sum(self._num_blocks(running) for running in self._running.values())
            return EngineStatus(
                num_running=len(self._running),
                num_waiting=len(self._waiting),
                num_blocks=NUM_BLOCKS,
                num_free_blocks=NUM_BLOCKS - held,
                block_size=BLOCK_SIZE,
                num_drafts=drafts,
                drafted=drafted,
                accepted=accepted,
                accepted_at_position=(drafts,) * max(0, self.tokens_per_step - 1),
                steps=tuple(steps),
                ranks=("rank 0 of 1: a fake on the cpu",),
                **self._totals,
            )

    def close(self) -> None:
        self.closed = True

    # What tests do to it

    def pause(self) -> None:
        """Hang: from now on no step is taken."""
        with self._wake:
            self._paused = True

    def resume(self) -> None:
        with self._wake:
            self._paused = False
            self._wake.notify_all()

    def fail(self, error: str = "rank 0 died") -> None:
        """Be lost: from now on every poll raises."""
        with self._wake:
            self._error = error
            self._wake.notify_all()

    @property
    def error(self) -> str | None:
        """Why it is lost."""
        return self._error

    def link(self, frontend: bytes | None = None) -> EngineClient:
        """As a `StartedEngine` has."""
        return cast(EngineClient, Borrowed(self))

    def watch(self, wait_s: float) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._error is not None, min(wait_s, 0.02))
            if self._error is not None:
                raise EngineError(self._error)

    def forget(self, frontend: bytes) -> None:
        pass

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        with self._wake:
            return not self._running and not self._waiting

    def _has_work(self) -> bool:
        return bool(self._ended) or (not self._paused and bool(self._running or self._waiting))

    def _num_blocks(self, running: _Running) -> int:
        return -(-(len(running.request.prompt_token_ids) + running.written) // BLOCK_SIZE)

    def _step(self) -> list[TokenDelta]:
        now = time.monotonic()
        while self._waiting and len(self._running) < self.num_seqs:
            running = self._waiting.pop(0)
            running.started_s = now
            self._running[running.request.request_id] = running
            self._totals["prompt_tokens"] += len(running.request.prompt_token_ids)
        if not self._running:
            return []
        deltas = [self._advance(running) for running in list(self._running.values())]
        self._totals["num_steps"] += 1
        self._steps.append(
            StepStats(
                seconds=max(self.step_s, 1e-4),
                times=StageTimes(calibrate_ms=0.2, draft_ms=0.3, verify_ms=0.5),
                num_requests=len(deltas),
                num_rows=len(deltas) * self.tokens_per_step,
                draft_lengths=(max(0, self.tokens_per_step - 1),) * len(deltas),
            )
        )
        return deltas

    def _advance(self, running: _Running) -> TokenDelta:
        request = running.request
        if running.written == 0:
            running.first_s = time.monotonic()
        limit = 1 if request.num_draft_tokens == 0 else self.tokens_per_step
        token_ids: list[int] = []
        reason: FinishReason | None = None
        for token_id in running.reply[running.written : running.written + limit]:
            token_ids.append(token_id)
            ends = token_id in request.params.stop_token_ids or (
                token_id in request.eos_token_ids and not request.params.ignore_eos
            )
            if ends and running.written + len(token_ids) > request.params.min_tokens:
                reason = "stop"
                break
        first = running.written == 0
        running.written += len(token_ids)
        if reason is None and running.written >= len(running.reply):
            reason = "length"
        self._count(running, len(token_ids), limit)
        if reason is not None:
            del self._running[request.request_id]
        return self._delta(running, tuple(token_ids), reason, first=first)

    def _count(self, running: _Running, num_tokens: int, limit: int) -> None:
        running.rounds += 1
        accepted = max(0, num_tokens - 1)
        running.accepted += accepted
        running.accepted_at += [0] * (accepted + 1 - len(running.accepted_at))
        running.accepted_at[accepted] += 1
        self._totals["generation_tokens"] += num_tokens
        if limit > 1:
            self._drafts[0] += 1
            self._drafts[1] += limit - 1
            self._drafts[2] += accepted

    def _delta(
        self,
        running: _Running,
        token_ids: tuple[int, ...],
        reason: FinishReason | None,
        *,
        first: bool = False,
    ) -> TokenDelta:
        request, params = running.request, running.request.params
        logprobs: tuple[TokenLogprobs, ...] = ()
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if params.logprobs is not None:
            logprobs = tuple(_logprobs(token_id, params.logprobs) for token_id in token_ids)
        if first and params.prompt_logprobs is not None:
            rest = request.prompt_token_ids[1:]
            prompt_logprobs = tuple(
                _logprobs(token_id, params.prompt_logprobs) for token_id in rest
            )
        by_token = reason == "stop" and token_ids and token_ids[-1] in params.stop_token_ids
        return TokenDelta(
            request_id=request.request_id,
            token_ids=token_ids,
            num_accepted=max(0, len(token_ids) - 1),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=BLOCK_SIZE if len(request.prompt_token_ids) > BLOCK_SIZE else 0,
            finish_reason=reason,
            stop_token_id=token_ids[-1] if by_token else None,
            metrics=None if reason is None else self._metrics(running),
        )

    def _metrics(self, running: _Running) -> RequestMetrics:
        now = time.monotonic()
        events = [(Event.QUEUED, running.arrived_s)]
        if running.started_s:
            events.append((Event.SCHEDULED, running.started_s))
        if running.first_s:
            events.append((Event.FIRST_TOKEN, running.first_s))
        drafts = running.request.num_draft_tokens != 0
        return RequestMetrics(
            num_prompt_tokens=len(running.request.prompt_token_ids),
            num_tokens=running.written,
            num_cached_tokens=0,
            rounds=running.rounds,
            drafted=running.rounds * (self.tokens_per_step - 1) if drafts else 0,
            accepted=running.accepted,
            accepted_at=tuple(running.accepted_at),
            times=StageTimes(verify_ms=running.rounds * 0.5),
            events=(*events, (Event.FINISHED, now)),
        )


class LinkedFake:
    """Satisfies `StartedEngine` with a fake that serves its links in a thread of this process."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-")
        self._server = LinkServer(
            f"ipc://{self._folder.name}/commands", f"ipc://{self._folder.name}/news"
        )
        self.address = self._server.address
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def link(self, frontend: bytes | None = None) -> LinkClient:
        return LinkClient(self.address, watch=self._gone, frontend=frontend)

    def watch(self, wait_s: float) -> None:
        self._closing.wait(wait_s)
        if self.engine.error is not None:
            raise EngineError(self.engine.error)

    def forget(self, frontend: bytes) -> None:
        with contextlib.closing(self.link()) as link:
            link.forget(frontend)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(10)
        self._folder.cleanup()

    def _gone(self) -> str | None:
        return self.engine.error

    def _serve(self) -> None:
        engine = self.engine
        try:
            while not self._closing.is_set():
                for command in self._server.receive(wait_s=0.002 if engine.idle else 0.0):
                    if isinstance(command, Submit):
                        engine.submit(list(command.requests))
                    else:
                        engine.abort(list(command.request_ids))
                self._server.send(engine.poll(0.002), engine.status)
        except EngineError as error:
            self._server.lost(str(error))
        finally:
            engine.close()
            self._server.close()


class Borrowed:
    """A way to a fake in this process; closing it leaves the fake alone."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """The token itself is the best one, its neighbours follow."""
    top = tuple(((token_id + i) % VOCAB_SIZE, -0.5 - i) for i in range(num_top))
    return TokenLogprobs(token_id=token_id, logprob=-0.5, rank=1, top=top)


def _save_byte_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer whose id of a byte is the byte."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelt = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in spelt)
    spelt |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    fast = FastTokenizer(models.BPE(vocab={spelt[b]: b for b in range(256)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server that runs in a thread of this process."""

    url: str
    llm: AsyncLLM
    loop: asyncio.AbstractEventLoop


@contextlib.contextmanager
def serving(
    engine: EngineClient,
    facts: Facts,
    *,
    config: EngineConfig | None = None,
    server: ServerConfig | None = None,
    fleet: Fleet | None = None,
    observer: Observer | None = None,
) -> Iterator[Served]:
    """The HTTP front on a free port, before `engine`. `observer` is told of its requests."""
    from paceline.actors.frontends import http
    from paceline.runtime.metrics import Metrics

    config, server = config or EngineConfig(), server or ServerConfig()
    started: queue.Queue[Served | BaseException] = queue.Queue()
    stop = asyncio.Event()

    async def main() -> None:
        try:
            metrics = Metrics(http.model_name(config, server), version="0")
            observers = Observers(metrics, observer or NullObserver())
            llm = AsyncLLM(engine, facts, config, observer=observers)
            app = http.make_app(
                llm, facts, config, server, exposition=metrics.exposition, fleet=fleet
            )
            with contextlib.closing(http.bind("127.0.0.1", 0)) as listener:
                door = await http.start(app, listener)
                url = f"http://127.0.0.1:{door.port}"
                loop = asyncio.get_running_loop()
                started.put(Served(url=url, llm=llm, loop=loop))
                await stop.wait()
                await llm.close()
                await door.stop(1.0)
        except BaseException as error:
            started.put(error)
            raise

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    served = started.get(timeout=20)
    if isinstance(served, BaseException):
        raise served
    try:
        yield served
    finally:
        served.loop.call_soon_threadsafe(stop.set)
        thread.join(20)

"""Many requests on one engine: streams, aborts, admission, health, the end. The engine is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from tests.engines import REPLY, FakeEngine, fake_facts, ids_of, saying

from paceline.runtime import async_llm
from paceline.runtime.async_llm import (
    AsyncLLM,
    NullObserver,
    RequestRecord,
)
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import EngineError, OverloadedError, PromptError, ShuttingDownError
from paceline.runtime.outputs import Assembler, CompletionOutput, RequestOutput, empty_output
from paceline.runtime.preflight import Facts
from paceline.runtime.types import EngineStatus, SamplingParams, TokenDelta

T = TypeVar("T")
SOON_S = 5.0
"""Longer than anything here takes, so that a failure ends."""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return fake_facts(tmp_path_factory.mktemp("fake"))


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "POLL_S", 0.05)


@pytest.fixture
def run(facts: Facts) -> Callable[..., None]:
    """`run(test, engine, ...)`: call `await test(llm)` on an event loop of its own."""

    def call(
        test: Callable[[AsyncLLM], Awaitable[None]],
        engine: FakeEngine,
        *,
        config: EngineConfig | None = None,
        observer: async_llm.Observer | None = None,
    ) -> None:
        async def main() -> None:
            llm = AsyncLLM(engine, facts, config or EngineConfig(), observer=observer)
            llm.start()
            try:
                await asyncio.wait_for(test(llm), SOON_S)
            finally:
                await llm.close()

        asyncio.run(main())

    return call


class Recorder(NullObserver):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.deltas: list[tuple[str, int, bool]] = []
        self.finished: list[RequestRecord] = []
        self.statuses: list[EngineStatus] = []

    def on_delta(self, record: RequestRecord, *, num_tokens: int, now_s: float) -> None:
        self.deltas.append((record.request_id, num_tokens, record.last_token_s is None))

    def on_finished(self, record: RequestRecord) -> None:
        self.finished.append(record)

    def on_status(self, status: EngineStatus) -> None:
        self.statuses.append(status)


async def whole(outputs: AsyncIterator[RequestOutput]) -> list[str]:
    """The texts of a job."""
    texts: dict[int, str] = {}
    async for output in outputs:
        for part in output.outputs:
            texts[part.index] = texts.get(part.index, "") + part.text
    return [texts[index] for index in sorted(texts)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


LONG = SamplingParams(max_tokens=400)


def test_a_stream_yields_what_is_new_and_ends_with_the_metrics(run: Callable[..., None]) -> None:
    async def test(llm: AsyncLLM) -> None:
        stream = await llm.submit("hi", SamplingParams(max_tokens=10), request_id="mine")
        async with stream:
            total = empty_output(stream.job)
            lengths = []
            async for output in stream:
                lengths.append(sum(len(part.token_ids) for part in output.outputs))
                assert output.request_id == "mine"
                total.add(output)
        assert total.outputs[0].text == REPLY[:10]
        assert sum(lengths) == 10
        assert len(lengths) >= 2, "it came in parts"
        assert total.finished
        assert total.outputs[0].finish_reason == "length"
        assert total.metrics is not None
        assert total.metrics.num_tokens == 10
        assert llm.num_in_flight == 0
        assert not llm.knows("mine")

    run(test, FakeEngine(step_s=0.005))


def test_n_texts_come_side_by_side(run: Callable[..., None]) -> None:
    async def test(llm: AsyncLLM) -> None:
        texts = await whole(llm.generate("hi", SamplingParams(n=3, max_tokens=7)))
        assert texts == [REPLY[:7]] * 3

    run(test, FakeEngine())


def test_many_requests_at_once_each_get_their_own_text(run: Callable[..., None]) -> None:
    engine = FakeEngine(lambda request: ids_of(f"re: {bytes(request.prompt_token_ids).decode()}"))

    async def test(llm: AsyncLLM) -> None:
        jobs = [whole(llm.generate(f"number {i}", LONG)) for i in range(100)]
        assert await asyncio.gather(*jobs) == [[f"re: number {i}"] for i in range(100)]
        assert engine.idle

    run(test, engine)


def test_a_stop_string_ends_the_text_at_once_and_frees_the_engine(
    run: Callable[..., None],
) -> None:
    engine = FakeEngine(step_s=0.002)

    async def test(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=400, stop="brown")
        total = None
        async for output in llm.generate("hi", params, request_id="a"):
            total = output
        assert total is not None
        assert total.finished
        assert (total.outputs[-1].finish_reason, total.outputs[-1].stop_reason) == ("stop", "brown")
        assert engine.aborted == ["a-0"]
        assert engine.status().generation_tokens < 100

    run(test, engine)


@pytest.mark.parametrize("how", ["close", "cancel", "break"])
def test_leaving_a_stream_frees_its_blocks(run: Callable[..., None], how: str) -> None:
    engine = FakeEngine(step_s=0.002)
    observer = Recorder()

    async def test(llm: AsyncLLM) -> None:
        outputs = llm.generate("hi", SamplingParams(n=2, max_tokens=400))
        if how == "cancel":
            task = asyncio.create_task(whole(outputs))
            await until(lambda: llm.num_in_flight == 2)
            await asyncio.sleep(0.01)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await outputs.aclose()  # type: ignore[attr-defined]
        else:
            await anext(outputs)
            await outputs.aclose()  # type: ignore[attr-defined]
        assert llm.num_in_flight == 0
        await until(lambda: engine.idle)
        status = engine.status()
        assert status.num_free_blocks == status.num_blocks
        assert [record.finish_reason for record in observer.finished] == ["abort"] * 2

    run(test, engine, observer=observer)


def test_an_aborted_job_ends_with_that_reason(run: Callable[..., None]) -> None:
    engine = FakeEngine(step_s=0.002)

    async def test(llm: AsyncLLM) -> None:
        stream = await llm.submit("hi", LONG, request_id="mine")
        await anext(stream)
        assert llm.abort("mine")
        assert not llm.abort("nobody's")
        last = [output async for output in stream][-1]
        assert last.finished
        assert last.outputs[-1].finish_reason == "abort"
        assert last.outputs[-1].metrics is not None

    run(test, engine)


def test_past_the_queue_requests_are_refused_until_one_ends(run: Callable[..., None]) -> None:
    engine = FakeEngine(num_seqs=2)
    engine.pause()
    config = EngineConfig(max_num_seqs=2, max_queued_requests=3)

    async def test(llm: AsyncLLM) -> None:
        streams = [await llm.submit("hi", SamplingParams(n=n)) for n in (1, 2, 2)]
        with pytest.raises(OverloadedError, match="5 requests are running or waiting") as caught:
            await llm.submit("hi", LONG)
        assert 1 <= caught.value.retry_after_s <= 60
        streams[1].close()
        streams.append(await llm.submit("hi", SamplingParams(n=2)))
        with pytest.raises(OverloadedError):
            await llm.submit("hi", LONG)
        with pytest.raises(PromptError, match=r"^n must be at most 5"):
            await llm.submit("hi", SamplingParams(n=6))
        engine.resume()
        for stream in streams:
            async for _ in stream:
                pass
        assert llm.num_in_flight == 0

    run(test, engine, config=config)


def test_the_wait_a_refused_client_is_told_follows_the_throughput(
    run: Callable[..., None],
) -> None:
    now = [0.0]

    async def test(llm: AsyncLLM) -> None:
        llm._clock = lambda: now[0]
        assert llm._retry_after_s() == 1.0
        for second in range(0, 80, 8):
            now[0] = float(second)
            llm._finish_times.append(now[0])
        assert 7 <= llm._retry_after_s() <= 9
        now[0] = 1e6
        assert llm._retry_after_s() == 60.0

    run(test, FakeEngine())


def test_an_id_may_be_used_again_but_not_twice_at_once(run: Callable[..., None]) -> None:
    engine = FakeEngine(step_s=0.002)

    async def test(llm: AsyncLLM) -> None:
        async with await llm.submit("hi", LONG, request_id="mine"):
            with pytest.raises(PromptError, match="'mine' is in use"):
                await llm.submit("hi", LONG, request_id="mine")
        await until(lambda: not llm.knows("mine"))  # free again when the engine has let go of it
        short = SamplingParams(max_tokens=3)
        assert await whole(llm.generate("hi", short, request_id="mine")) == [REPLY[:3]]

    run(test, engine)


def test_late_tokens_of_a_job_that_was_left_do_not_land_in_its_successor(
    run: Callable[..., None],
) -> None:
    engine = FakeEngine(step_s=0.01)

    async def test(llm: AsyncLLM) -> None:
        for _ in range(20):
            async with await llm.submit("hi", LONG, request_id="mine") as stream:
                await anext(stream)
            with pytest.raises(PromptError, match="'mine' is in use"):
                await llm.submit("hi", LONG, request_id="mine")
            await until(lambda: not llm.knows("mine"))
            assert engine.idle
        short = SamplingParams(max_tokens=3)
        assert await whole(llm.generate("hi", short, request_id="mine")) == [REPLY[:3]]

    run(test, engine)


def test_a_lost_engine_ends_every_stream_with_the_reason(run: Callable[..., None]) -> None:
    engine = FakeEngine(step_s=0.002)
    observer = Recorder()

    async def test(llm: AsyncLLM) -> None:
        streams = [await llm.submit("hi", LONG) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        engine.fail("rank 1 died")
        for stream in streams:
            with pytest.raises(EngineError, match="rank 1 died"):
                async for _ in stream:
                    pass
        with pytest.raises(EngineError, match="rank 1 died"):
            await llm.submit("hi", LONG)
        assert not await llm.check_health(timeout_s=0.2)
        await llm.wait_lost()
        assert [record.finish_reason for record in observer.finished] == ["error"] * 3

    run(test, engine, observer=observer)


def test_an_engine_that_takes_no_requests_is_lost_too(run: Callable[..., None]) -> None:
    class Deaf(FakeEngine):
        def submit(self, requests: object) -> None:
            raise ValueError("cannot pickle")

    async def test(llm: AsyncLLM) -> None:
        stream = await llm.submit("hi", LONG)
        with pytest.raises(EngineError, match="ValueError: cannot pickle"):
            await anext(stream)

    run(test, Deaf())


def test_health_generates_a_token_and_counts_it_nowhere(run: Callable[..., None]) -> None:
    engine, observer = FakeEngine(num_seqs=1), Recorder()

    async def test(llm: AsyncLLM) -> None:
        assert await llm.check_health(timeout_s=2.0)
        (probe,) = engine.submitted
        assert (probe.max_tokens, probe.num_draft_tokens, probe.priority) == (1, 0, -(2**31))
        assert not observer.deltas
        assert not observer.finished
        assert await llm.check_health(timeout_s=2.0)
        assert len(engine.submitted) == 1, "a token that is two seconds old is proof enough"

    run(test, engine, observer=observer)


def test_health_fails_while_the_engine_hangs_and_does_not_pile_up_probes(
    run: Callable[..., None],
) -> None:
    engine = FakeEngine()
    engine.pause()

    async def test(llm: AsyncLLM) -> None:
        checks = [llm.check_health(timeout_s=0.05) for _ in range(5)]
        assert await asyncio.gather(*checks) == [False] * 5
        assert not await llm.check_health(timeout_s=0.05)
        assert len(engine.submitted) == 1
        engine.resume()
        assert await llm.check_health(timeout_s=2.0)

    run(test, engine)


def test_health_is_not_refused_when_the_queue_is_full(run: Callable[..., None]) -> None:
    config = EngineConfig(max_num_seqs=1, max_queued_requests=0)
    engine = FakeEngine(saying("x", end=False), num_seqs=2)
    engine.pause()

    async def test(llm: AsyncLLM) -> None:
        async with await llm.submit("hi", LONG):
            engine.resume()
            assert await llm.check_health(timeout_s=2.0)

    run(test, engine, config=config)


def test_draining_finishes_what_runs_and_takes_nothing_new(run: Callable[..., None]) -> None:
    engine = FakeEngine(step_s=0.002)

    async def test(llm: AsyncLLM) -> None:
        text = asyncio.create_task(whole(llm.generate("hi", SamplingParams(max_tokens=60))))
        await until(lambda: llm.num_in_flight == 1)
        draining = asyncio.create_task(llm.drain(timeout_s=3.0))
        await until(lambda: llm.draining)
        with pytest.raises(ShuttingDownError):
            await llm.submit("hi", LONG)
        assert await draining
        assert len((await text)[0]) == 60

    run(test, engine)


def test_what_outlasts_the_drain_is_aborted(run: Callable[..., None]) -> None:
    engine = FakeEngine(step_s=0.02)

    async def test(llm: AsyncLLM) -> None:
        stream = await llm.submit("hi", LONG)
        assert not await llm.drain(timeout_s=0.05)
        assert [o async for o in stream][-1].outputs[-1].finish_reason == "abort"
        assert engine.idle

    run(test, engine)


def test_the_observer_sees_every_token_once(run: Callable[..., None]) -> None:
    engine, observer = FakeEngine(step_s=0.002), Recorder()

    async def test(llm: AsyncLLM) -> None:
        await whole(llm.generate("hi", SamplingParams(n=2, max_tokens=10), request_id="a"))
        for name in ("a-0", "a-1"):
            mine = [delta for delta in observer.deltas if delta[0] == name]
            assert sum(num_tokens for _, num_tokens, _ in mine) == 10
            assert [first for _, _, first in mine] == [True] + [False] * (len(mine) - 1)
        for record in observer.finished:
            assert record.num_tokens == 10
            assert record.first_token_s is not None
            assert record.finished_s is not None
            assert record.arrived_s <= record.first_token_s <= record.finished_s
            assert record.metrics is not None
        await until(lambda: any(status.generation_tokens == 20 for status in observer.statuses))
        steps = [step for status in observer.statuses for step in status.steps]
        assert len(steps) == engine.status().num_steps, "each step once"

    run(test, engine, observer=observer)


def test_a_slow_reader_loses_nothing(run: Callable[..., None]) -> None:
    async def test(llm: AsyncLLM) -> None:
        stream = await llm.submit("hi", SamplingParams(max_tokens=60))
        await until(lambda: llm.num_in_flight == 0)
        outputs = [output async for output in stream]
        assert len(outputs) == 1
        assert "".join(part.text for part in outputs[0].outputs) == (REPLY * 2)[:60]

    run(test, FakeEngine())


def test_one_broken_text_does_not_take_the_others_down(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Brittle(Assembler):
        def feed(self, delta: TokenDelta) -> CompletionOutput:
            if delta.request_id == "bad-0":
                raise RuntimeError("no such prefix")
            return super().feed(delta)

    monkeypatch.setattr(async_llm, "Assembler", Brittle)
    engine = FakeEngine()

    async def test(llm: AsyncLLM) -> None:
        bad = await llm.submit("hi", LONG, request_id="bad")
        good = asyncio.create_task(whole(llm.generate("hi", SamplingParams(max_tokens=5))))
        (last,) = [output async for output in bad]
        assert last.outputs[0].finish_reason == "error"
        assert await good == [REPLY[:5]]
        await until(lambda: engine.idle)

    run(test, engine)


def test_closing_does_not_wait_for_an_engine_that_hangs(facts: Facts) -> None:
    class Stuck(FakeEngine):
        def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:
            time.sleep(30)
            return []

    async def main() -> None:
        llm = AsyncLLM(Stuck(), facts, EngineConfig())
        llm.start()
        stream = await llm.submit("hi", LONG)
        await llm.close()
        with pytest.raises(EngineError, match="shut down"):
            await anext(stream)

    started = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started < 5


def test_two_engines_live_in_one_process(facts: Facts, tmp_path: Path) -> None:
    async def main() -> None:
        llms = [
            AsyncLLM(FakeEngine(saying(text)), facts, EngineConfig()) for text in ("one", "two")
        ]
        texts = await asyncio.gather(*(whole(llm.generate("hi", LONG)) for llm in llms))
        assert texts == [["one"], ["two"]]
        for llm in llms:
            await llm.close()

    asyncio.run(main())

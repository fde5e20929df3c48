"""Requests come in order, get their tokens, and each ends exactly once."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paceline.runtime.config import EngineConfig, SpeculativeConfig
from paceline.runtime.engine import Engine
from paceline.runtime.engine import make_scheduler as scheduler_of_config
from paceline.runtime.errors import ShardError
from paceline.runtime.schedule.scheduler import Scheduler
from paceline.runtime.types import (
    Request,
    RequestResult,
    SamplingParams,
    ScheduledRequest,
    StageTimes,
    StepPlan,
    StepResult,
    TokenDelta,
)

EOS = 99


class Clock:
    """A second passes between any two looks."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def make_scheduler(
    *, num_regions: int = 1, chunk: int = 8, num_draft_tokens: int = 4, max_model_len: int = 64
) -> Scheduler:
    return Scheduler(
        num_regions=num_regions,
        max_model_len=max_model_len,
        max_num_batched_tokens=chunk,
        num_draft_tokens=num_draft_tokens,
        clock=Clock(),
    )


def make_request(
    request_id: str = "a",
    *,
    prompt: int = 3,
    max_tokens: int = 10,
    num_draft_tokens: int | None = None,
    ignore_eos: bool = False,
    stop_token_ids: tuple[int, ...] = (),
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(range(prompt)),
        params=SamplingParams(
            max_tokens=max_tokens, ignore_eos=ignore_eos, stop_token_ids=stop_token_ids
        ),
        seed=0,
        num_draft_tokens=num_draft_tokens,
        eos_token_ids=(EOS,),
    )


def answer(
    scheduler: Scheduler, plan: StepPlan, *token_ids: int, **more: object
) -> list[TokenDelta]:
    """The deltas of a step that did this for its only request."""
    assert len(plan.scheduled) == 1
    result = RequestResult(
        request_id=plan.scheduled[0].request_id,
        token_ids=token_ids,
        num_drafted=plan.scheduled[0].num_draft_tokens,
        num_accepted=max(0, len(token_ids) - 1),
        **more,  # type: ignore[arg-type]
    )
    deltas = scheduler.update(plan, StepResult(step=plan.step, results=(result,)))
    scheduler.check()
    return deltas


def make_decoding(request: Request, **settings: int) -> Scheduler:
    """A scheduler whose one request has its prompt read and its first token, 1."""
    scheduler = make_scheduler(**settings)
    scheduler.add(request)
    answer(scheduler, scheduler.schedule(), 1)
    return scheduler


def only(plan: StepPlan) -> ScheduledRequest:
    (share,) = plan.scheduled
    return share


# ------------------------------------------------------------------------------------------ prompts


def test_long_prompt_is_read_in_chunks() -> None:
    scheduler = make_scheduler(chunk=8)
    scheduler.add(make_request(prompt=19))
    fed = []
    for _ in range(3):
        plan = scheduler.schedule()
        fed.append(only(plan).num_tokens)
        answer(scheduler, plan)
    assert fed == [8, 8, 3]


def test_nothing_is_drafted_while_a_prompt_is_read() -> None:
    scheduler = make_scheduler(chunk=8)
    scheduler.add(make_request(prompt=8))
    assert only(scheduler.schedule()).num_draft_tokens == 0


def test_chunk_without_tokens_has_no_delta() -> None:
    scheduler = make_scheduler(chunk=8)
    scheduler.add(make_request(prompt=9))
    assert answer(scheduler, scheduler.schedule()) == []


def test_request_travels_with_its_first_plan_only() -> None:
    scheduler = make_scheduler(chunk=2)
    request = make_request(prompt=4)
    scheduler.add(request)
    first = scheduler.schedule()
    answer(scheduler, first)
    second = scheduler.schedule()
    assert (only(first).request, only(first).region) == (request, 0)
    assert (only(second).request, only(second).region) == (None, None)


def test_steps_are_numbered() -> None:
    scheduler = make_decoding(make_request())
    plan = scheduler.schedule()
    assert plan.step == 1
    answer(scheduler, plan, 2)
    assert scheduler.schedule().step == 2


def test_result_of_another_step_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request())
    plan = scheduler.schedule()
    with pytest.raises(AssertionError, match="the result of step 0, found 7"):
        scheduler.update(plan, StepResult(step=7))


def test_request_that_cannot_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match="at most 64 tokens, found 65"):
        make_scheduler(max_model_len=64).add(make_request(prompt=60, max_tokens=5))


# ------------------------------------------------------------------------------------------- drafts


def test_decoding_request_feeds_its_last_token_and_drafts() -> None:
    share = only(make_decoding(make_request(), num_draft_tokens=4).schedule())
    assert (share.num_tokens, share.num_draft_tokens) == (1, 4)


@pytest.mark.parametrize(("max_tokens", "budget"), [(2, 0), (3, 1), (5, 3), (6, 4), (9, 4)])
def test_no_more_is_drafted_than_a_round_can_use(max_tokens: int, budget: int) -> None:
    scheduler = make_decoding(make_request(max_tokens=max_tokens), num_draft_tokens=4)
    assert only(scheduler.schedule()).num_draft_tokens == budget


@pytest.mark.parametrize(("wanted", "budget"), [(None, 4), (0, 0), (2, 2), (9, 4)])
def test_request_may_ask_for_fewer_drafts_than_the_engine_makes(
    wanted: int | None, budget: int
) -> None:
    scheduler = make_decoding(make_request(num_draft_tokens=wanted), num_draft_tokens=4)
    assert only(scheduler.schedule()).num_draft_tokens == budget


# --------------------------------------------------------------------------------------------- ends


def test_request_ends_with_its_last_token() -> None:
    scheduler = make_decoding(make_request(max_tokens=3))
    (delta,) = answer(scheduler, scheduler.schedule(), 2, 3)
    assert (delta.token_ids, delta.finish_reason) == ((2, 3), "length")


def test_first_token_may_be_the_last() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(max_tokens=1))
    (delta,) = answer(scheduler, scheduler.schedule(), 5)
    assert (delta.token_ids, delta.finish_reason) == ((5,), "length")
    assert not scheduler.has_work


def test_end_of_text_ends_a_request() -> None:
    scheduler = make_decoding(make_request())
    (delta,) = answer(scheduler, scheduler.schedule(), EOS)
    assert (delta.token_ids, delta.finish_reason) == ((EOS,), "stop")


def test_end_of_text_can_be_ignored() -> None:
    scheduler = make_decoding(make_request(ignore_eos=True))
    (delta,) = answer(scheduler, scheduler.schedule(), EOS, 2)
    assert (delta.token_ids, delta.finish_reason) == ((EOS, 2), None)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_token_ends_a_request_even_where_end_of_text_is_ignored(ignore_eos: bool) -> None:
    request = make_request(ignore_eos=ignore_eos, stop_token_ids=(7, 8))
    scheduler = make_decoding(request)
    (delta,) = answer(scheduler, scheduler.schedule(), 8)
    assert (delta.token_ids, delta.finish_reason) == ((8,), "stop")


def test_stop_on_the_last_token_is_a_stop() -> None:
    scheduler = make_decoding(make_request(max_tokens=2))
    (delta,) = answer(scheduler, scheduler.schedule(), EOS)
    assert delta.finish_reason == "stop"


@pytest.mark.parametrize(
    ("emitted", "kept", "num_accepted"),
    [
        ((2, EOS, 3, 4), (2, EOS), 2),
        ((EOS, 2, 3, 4), (EOS,), 1),
        ((2, 3, 4, EOS), (2, 3, 4, EOS), 3),
    ],
)
def test_accepted_path_is_cut_after_the_token_that_ends_the_request(
    emitted: tuple[int, ...], kept: tuple[int, ...], num_accepted: int
) -> None:
    scheduler = make_decoding(make_request())
    margins = tuple(float(token) for token in emitted)
    (delta,) = answer(scheduler, scheduler.schedule(), *emitted, margins=margins)
    assert (delta.token_ids, delta.finish_reason) == (kept, "stop")
    assert delta.margins == margins[: len(kept)]
    assert delta.num_accepted == num_accepted
    assert delta.metrics is not None
    assert delta.metrics.num_tokens == 1 + len(kept)


def test_workers_are_told_to_forget_a_request_in_the_next_plan_only() -> None:
    scheduler = make_scheduler()
    for request_id in ("a", "b"):
        scheduler.add(make_request(request_id, max_tokens=1))
    first = scheduler.schedule()
    answer(scheduler, first, 5)
    second = scheduler.schedule()
    answer(scheduler, second, 5)
    assert (first.finished, second.finished) == ((), ("a",))
    assert scheduler.schedule().finished == ("b",)


def test_freed_region_goes_to_the_next_request_in_the_same_plan() -> None:
    scheduler = make_scheduler()
    for request_id in ("a", "b"):
        scheduler.add(make_request(request_id, max_tokens=1))
    answer(scheduler, scheduler.schedule(), 5)
    plan = scheduler.schedule()
    assert plan.finished == ("a",)
    assert (only(plan).request_id, only(plan).region) == ("b", 0)


def test_metrics_count_rounds_after_the_first_token() -> None:
    scheduler = make_decoding(make_request(max_tokens=6))
    times = StageTimes(calibrate_ms=1.0, draft_ms=2.0, verify_ms=4.0)
    answer(scheduler, scheduler.schedule(), 2, 3, times=times)
    (delta,) = answer(scheduler, scheduler.schedule(), 4, 5, 6, times=times)
    metrics = delta.metrics
    assert metrics is not None
    assert (metrics.num_prompt_tokens, metrics.num_tokens, metrics.rounds) == (3, 6, 2)
    assert (metrics.drafted, metrics.accepted) == (4 + 2, 1 + 2)
    assert metrics.times == times.plus(times)


def test_metrics_measure_from_the_first_step_and_from_the_first_token() -> None:
    scheduler = make_decoding(make_request(max_tokens=2))
    (delta,) = answer(scheduler, scheduler.schedule(), 2)
    assert delta.metrics is not None
    assert delta.metrics.prefill_ms == 1000.0
    assert delta.metrics.decode_s == 1.0
    assert delta.metrics.tokens_per_second == 1.0


# ------------------------------------------------------------------------------------------- aborts


def test_waiting_request_can_be_aborted() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    scheduler.add(make_request("b"))
    scheduler.schedule()
    assert scheduler.abort("b") == TokenDelta(request_id="b", token_ids=(), finish_reason="abort")
    scheduler.check()
    assert [share.request_id for share in scheduler.schedule().scheduled] == ["a"]


def test_running_request_can_be_aborted_and_frees_its_region() -> None:
    scheduler = make_decoding(make_request("a"))
    scheduler.add(make_request("b"))
    delta = scheduler.abort("a")
    scheduler.check()
    assert delta is not None
    assert (delta.token_ids, delta.finish_reason) == ((), "abort")
    plan = scheduler.schedule()
    assert plan.finished == ("a",)
    assert only(plan).request_id == "b"


def test_request_that_is_not_here_is_not_aborted() -> None:
    scheduler = make_decoding(make_request("a", max_tokens=2))
    answer(scheduler, scheduler.schedule(), 2)
    assert scheduler.abort("a") is None
    assert scheduler.abort("never seen") is None


def test_request_aborted_before_its_first_token_took_no_time_to_decode() -> None:
    scheduler = make_scheduler(chunk=2)
    scheduler.add(make_request(prompt=4))
    answer(scheduler, scheduler.schedule())
    delta = scheduler.abort("a")
    assert delta is not None
    assert delta.metrics is not None
    assert delta.metrics.prefill_ms > 0
    assert delta.metrics.decode_s == 0.0
    assert delta.metrics.tokens_per_second == 0.0


# ------------------------------------------------------------------------------------------- engine


class FakeExecutor:
    """Satisfies `Executor`: emits tokens from a seeded generator, never the same request's twice,
    and keeps the books a worker would keep."""

    def __init__(self, *, seed: int = 0, eos_every: int = 20) -> None:
        self._random = random.Random(seed)
        self._eos_every = eos_every
        self.requests: dict[str, Request] = {}
        self.regions: dict[str, int] = {}
        self.seen: dict[str, int] = {}
        self.started: list[str] = []
        self.closed = False

    def step(self, plan: StepPlan) -> StepResult:
        for request_id in plan.finished:
            del self.requests[request_id], self.regions[request_id], self.seen[request_id]
        return StepResult(step=plan.step, results=tuple(self._run(each) for each in plan.scheduled))

    def close(self) -> None:
        self.closed = True

    def _run(self, share: ScheduledRequest) -> RequestResult:
        request_id = share.request_id
        if share.request is not None:
            assert share.region is not None
            assert share.region not in self.regions.values(), "a region has one request at a time"
            self.requests[request_id], self.regions[request_id] = share.request, share.region
            self.seen[request_id] = 0
            self.started.append(request_id)
        left = len(self.requests[request_id].prompt_token_ids) - self.seen[request_id]
        self.seen[request_id] += share.num_tokens
        if left > share.num_tokens:
            return RequestResult(request_id=request_id, token_ids=())
        assert share.num_tokens == max(1, left), "a prompt is never read past its end"
        accepted = self._random.randint(0, share.num_draft_tokens)
        return RequestResult(
            request_id=request_id,
            token_ids=tuple(
                EOS if self._random.randrange(self._eos_every) == 0 else 1
                for _ in range(accepted + 1)
            ),
            num_drafted=share.num_draft_tokens,
            num_accepted=accepted,
        )


def test_requests_start_and_end_in_the_order_they_came() -> None:
    executor = FakeExecutor()
    engine = Engine(make_scheduler(), executor)
    names = [f"r{i}" for i in range(5)]
    engine.submit([make_request(name, prompt=1 + 5 * i) for i, name in enumerate(names)])
    ended = []
    while engine.scheduler.has_work:
        ended += [delta.request_id for delta in engine.poll() if delta.finish_reason]
    assert executor.started == ended == names


def test_requests_of_several_regions_start_in_the_order_they_came() -> None:
    executor = FakeExecutor()
    engine = Engine(make_scheduler(num_regions=3), executor)
    names = [f"r{i}" for i in range(8)]
    engine.submit([make_request(name) for name in names])
    while engine.scheduler.has_work:
        engine.poll()
    assert executor.started == names


def test_poll_without_work_runs_no_step() -> None:
    engine = Engine(make_scheduler(), FakeExecutor())
    assert engine.poll() == []
    assert engine.scheduler.schedule().step == 0


def test_aborted_request_s_terminal_delta_comes_with_the_next_poll() -> None:
    engine = Engine(make_scheduler(), FakeExecutor())
    engine.submit([make_request("a")])
    engine.abort(["a", "unknown"])
    assert [delta.finish_reason for delta in engine.poll()] == ["abort"]
    assert engine.poll() == []


def test_error_in_a_result_is_the_engine_s_end() -> None:
    class Failing(FakeExecutor):
        def step(self, plan: StepPlan) -> StepResult:
            return StepResult(step=plan.step, error="out of memory")

    engine = Engine(make_scheduler(), Failing())
    engine.submit([make_request()])
    with pytest.raises(ShardError, match="out of memory"):
        engine.poll()


def test_closing_an_engine_closes_its_executor() -> None:
    executor = FakeExecutor()
    Engine(make_scheduler(), executor).close()
    assert executor.closed


@pytest.mark.parametrize(
    ("spec", "budget"), [(None, 0), (SpeculativeConfig(num_speculative_tokens=7), 7)]
)
def test_config_decides_how_much_is_drafted(spec: SpeculativeConfig | None, budget: int) -> None:
    config = EngineConfig(speculative_config=spec, max_num_batched_tokens=2)
    scheduler = scheduler_of_config(config, max_model_len=64)
    scheduler.add(make_request(prompt=2, max_tokens=20))
    plan = scheduler.schedule()
    assert only(plan).num_tokens == 2
    answer(scheduler, plan, 1)
    assert only(scheduler.schedule()).num_draft_tokens == budget


# ------------------------------------------------------------------------------------- any history


@dataclass
class Heard:
    """What was said about one request so far."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)


class AnyHistory(RuleBasedStateMachine):
    """Requests come and are aborted at any time, and steps emit whatever they may."""

    @initialize(
        num_regions=st.integers(1, 3),
        chunk=st.integers(1, 6),
        num_draft_tokens=st.integers(0, 4),
        seed=st.integers(0, 2**16),
    )
    def start(self, num_regions: int, chunk: int, num_draft_tokens: int, seed: int) -> None:
        self.executor = FakeExecutor(seed=seed, eos_every=6)
        scheduler = make_scheduler(
            num_regions=num_regions, chunk=chunk, num_draft_tokens=num_draft_tokens
        )
        self.engine = Engine(scheduler, self.executor)
        self.heard: dict[str, Heard] = {}

    @rule(
        prompt=st.integers(1, 12),
        max_tokens=st.integers(1, 12),
        ignore_eos=st.booleans(),
        num_draft_tokens=st.none() | st.integers(0, 6),
    )
    def submit(
        self, prompt: int, max_tokens: int, ignore_eos: bool, num_draft_tokens: int | None
    ) -> None:
        request = make_request(
            f"r{len(self.heard)}",
            prompt=prompt,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            num_draft_tokens=num_draft_tokens,
        )
        self.heard[request.request_id] = Heard(request)
        self.engine.submit([request])

    @precondition(lambda self: self.heard)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort([data.draw(st.sampled_from(sorted(self.heard)))])

    @rule()
    def poll(self) -> None:
        for delta in self.engine.poll():
            heard = self.heard[delta.request_id]
            assert not heard.ends, "nothing comes after the terminal delta"
            heard.token_ids += delta.token_ids
            heard.ends += [delta.finish_reason] if delta.finish_reason else []

    @invariant()
    def every_region_is_free_or_held_once(self) -> None:
        self.engine.scheduler.check()

    @invariant()
    def no_request_gets_more_than_it_asked_for(self) -> None:
        for heard in self.heard.values():
            assert len(heard.token_ids) <= heard.request.params.max_tokens

    @invariant()
    def requests_start_in_the_order_they_came(self) -> None:
        numbers = [int(name[1:]) for name in self.executor.started]
        assert numbers == sorted(numbers)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.scheduler.has_work:
            self.poll()
        self.poll()
        for heard in self.heard.values():
            (end,) = heard.ends
            stops = EOS in heard.token_ids and not heard.request.params.ignore_eos
            whole = len(heard.token_ids) == heard.request.params.max_tokens
            assert end == "abort" or (end == "stop") == stops
            assert end != "length" or whole
            assert not stops or heard.token_ids.index(EOS) == len(heard.token_ids) - 1


TestAnyHistory = AnyHistory.TestCase

"""Two plans on a rank at once: every text is what it is without, and each stage keeps its turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paceline import LLM, SamplingParams
from paceline.runtime.pipeline import Pipeline
from paceline.runtime.requests import Prompt, TokensPrompt
from paceline.runtime.schedule.scheduler import Scheduler
from paceline.runtime.types import ScheduledRequest, StepPlan, StepResult, StepStats

SOON_S = 30.0
SHARED = [(7 * i * i + i) % 61 for i in range(40)]
PROMPTS: list[Prompt] = [
    TokensPrompt(prompt_token_ids=prompt)
    for prompt in ([3, 1, 4, 1, 5], [9, 2, 6], [*SHARED, 1], [*SHARED, 2], [7, 7, 8, 7, 7, 8, 7])
]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.9, max_tokens=30, ignore_eos=True, seed=1),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=17, repetition_penalty=1.2, seed=2),
    SamplingParams(temperature=0.0, max_tokens=20, presence_penalty=0.6, logprobs=1),
    SamplingParams(temperature=0.7, max_tokens=28, kv_policy="sink_window", seed=3),
]


@pytest.fixture(scope="module")
def open_llm(tiny: Callable[..., Path]) -> Callable[..., LLM]:
    """`open_llm(speculative, **engine)`: a target, and a drafter that often agrees with it."""
    target, drafter = str(tiny(seed=0)), str(tiny(seed=0, noise=0.03))

    def start(speculative: dict[str, Any] | None, **engine: Any) -> LLM:
        given = None
        if speculative is not None:
            fixed = {"num_speculative_tokens": 4, "draft_length": "fixed", "dtype": "float32"}
            given = {"model": drafter, "layer_parallel_size": 2, **fixed, **speculative}
        return LLM(target, dtype="float32", speculative_config=given, kv_window=16, **engine)

    return start


def write(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def plain(open_llm: Callable[..., LLM]) -> list[list[int]]:
    with open_llm(None) as llm:
        return write(llm)


# ------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("method", ["draft_model", "ngram", "combined"])
def test_interleaved_texts_are_the_targets_own(
    open_llm: Callable[..., LLM], plain: list[list[int]], method: str
) -> None:
    with open_llm({"schedule": "interleaved", "method": method}) as llm:
        assert write(llm) == plain
        assert llm.status().drafted > 0


@pytest.mark.parametrize("speculative", [None, {}], ids=["plain", "drafted"])
def test_texts_of_steps_that_follow_unanswered_ones_are_the_same(
    open_llm: Callable[..., LLM],
    plain: list[list[int]],
    speculative: dict[str, Any] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    followed = []
    follow = Scheduler._follow

    def counted(self: Scheduler, flight: Any) -> Any:
        followed.append(flight.step)
        return follow(self, flight)

    monkeypatch.setattr(Scheduler, "_follow", counted)
    apart = {"async_scheduling": True, "distributed_executor_backend": "mp"}
    with open_llm(speculative, **apart) as llm:
        together = write(llm)
        # one at a time, as long as the fifth, which keeps a window, runs beside none
        alone = [
            llm.generate([prompt], params)[0].outputs[0].token_ids
            for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        ]
    assert together == alone == plain
    assert len(followed) > 20


def test_preempted_texts_and_shared_prefixes_are_the_same_when_interleaved(
    open_llm: Callable[..., LLM],
) -> None:
    """In a pool of eight blocks, where each text comes to need six."""
    prompts: list[Prompt] = [TokensPrompt(prompt_token_ids=[*SHARED[:20], i]) for i in range(6)]
    params = [
        SamplingParams(temperature=0.9 * (i % 2), max_tokens=70, ignore_eos=True, seed=i)
        for i in range(6)
    ]
    small = {"max_model_len": 96, "kv_cache_memory": 220_000, "max_num_batched_tokens": 32}
    found = []
    for speculative, engine in ((None, {}), ({"schedule": "interleaved"}, small)):
        with open_llm(speculative, **engine) as llm:
            outputs = llm.generate(prompts, params)
            found.append([output.outputs[0].token_ids for output in outputs])
            status = llm.status()
    assert found[0] == found[1]
    assert status.num_blocks == 8
    assert status.num_preemptions > 0
    assert status.prefix_hits > 0
    assert status.num_free_blocks == status.num_blocks


def test_requests_left_early_are_let_go_and_the_others_go_on(
    open_llm: Callable[..., LLM], plain: list[list[int]]
) -> None:
    with open_llm({"schedule": "interleaved"}) as llm:
        for _ in range(3):
            next(iter(llm.stream(llm.jobs(PROMPTS, PARAMS))))
        assert write(llm) == plain
        llm.generate(PROMPTS[:1], PARAMS[0])
        status = llm.status()
        assert status.num_free_blocks == status.num_blocks


def test_greedy_texts_under_the_rejection_rule_are_the_same_when_interleaved(
    open_llm: Callable[..., LLM],
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    found = []
    for schedule in ("lockstep", "interleaved"):
        with open_llm({"schedule": schedule, "verification": "rejection"}) as llm:
            outputs = llm.generate(PROMPTS, params)
            found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------- the time line


def spans(steps: tuple[StepStats, ...]) -> list[tuple[float, float, float, float]]:
    """Of steps that did anything: when drafting began and ended, and verification."""
    return [
        (*step.draft_span, *step.verify_span)
        for step in steps
        if step.draft_span is not None and step.verify_span is not None
    ]


@pytest.mark.parametrize("schedule", ["lockstep", "interleaved"])
def test_steps_tell_when_their_stages_were(open_llm: Callable[..., LLM], schedule: str) -> None:
    with open_llm({"schedule": schedule}) as llm:
        write(llm)
        line = spans(llm.status().steps)
    assert len(line) > 10
    for drafted, draft_end, verified, verify_end in line:
        assert drafted <= draft_end <= verified <= verify_end
    for earlier, later in pairwise(line):
        assert earlier[1] <= later[0], "one drafts at a time"
        assert earlier[3] <= later[2], "one is verified at a time"
    overlaps = sum(later[0] < earlier[3] for earlier, later in pairwise(line))
    assert bool(overlaps) == (schedule == "interleaved")


# --------------------------------------------------------------------------------------- the stages


class SlowWorker:
    """Notes which stage of which plan begins and ends; a stage lasts until it is let go on."""

    mesh = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self) -> None:
        self.told: list[str] = []
        self.go_on = {stage: threading.Semaphore(0) for stage in ("draft", "verify")}
        self.news = threading.Condition()

    def draft(self, plan: StepPlan) -> Any:
        self._stage("draft", plan.step)
        if plan.shutdown:
            raise ValueError("no draft")
        return SimpleNamespace(step=plan.step)

    def verify(self, drafted: Any) -> StepResult:
        self._stage("verify", drafted.step)
        return StepResult(step=drafted.step)

    def _stage(self, stage: str, step: int) -> None:
        self._tell(f"{stage} {step}")
        assert self.go_on[stage].acquire(timeout=SOON_S)
        self._tell(f"{stage} {step} is over")

    def _tell(self, what: str) -> None:
        with self.news:
            self.told.append(what)
            self.news.notify_all()

    def wait_for(self, *what: str) -> None:
        with self.news:
            assert self.news.wait_for(lambda: set(what) <= set(self.told), SOON_S), self.told


@pytest.fixture
def slow() -> Any:
    worker = SlowWorker()
    pipeline = Pipeline(worker)  # type: ignore[arg-type]
    yield worker, pipeline
    for semaphore in worker.go_on.values():
        semaphore.release(10)
    pipeline.close()


def plan(step: int, *names: str, slot: int | None = None, shutdown: bool = False) -> StepPlan:
    scheduled = [ScheduledRequest(request_id=name, num_tokens=1, slot=slot) for name in names]
    return StepPlan(step=step, scheduled=tuple(scheduled), shutdown=shutdown)


def test_a_plan_drafts_while_the_one_before_it_is_verified(
    slow: tuple[SlowWorker, Pipeline],
) -> None:
    worker, pipeline = slow
    results = [pipeline.send(plan(0, "a", "b")), pipeline.send(plan(1, "c"))]
    worker.go_on["draft"].release()
    worker.wait_for("verify 0", "draft 1")
    assert not any(result.done() for result in results)


def test_a_request_is_drafted_for_when_its_own_last_plan_is_over_here_too(
    slow: tuple[SlowWorker, Pipeline],
) -> None:
    """Rank 0 may have answered it, and so the scheduler planned the next, while this rank is late."""
    worker, pipeline = slow
    for step, names in enumerate((("a", "b"), ("b",), ("c",))):
        pipeline.send(plan(step, *names))
    worker.go_on["draft"].release(3)
    worker.wait_for("verify 0")
    assert "draft 1" not in worker.told
    worker.go_on["verify"].release()
    worker.wait_for("draft 1", "verify 1", "draft 2 is over")


def test_a_slot_begins_when_nobody_marks_it_for_the_last_request_any_more(
    slow: tuple[SlowWorker, Pipeline],
) -> None:
    worker, pipeline = slow
    pipeline.send(plan(0, "a"))
    pipeline.send(plan(1, "b", slot=0))
    worker.go_on["draft"].release(2)
    worker.wait_for("verify 0")
    assert "draft 1" not in worker.told
    worker.go_on["verify"].release()
    worker.wait_for("draft 1")


@pytest.mark.parametrize("failing", [True, False])
def test_what_a_stage_raises_is_the_plan_s_result(
    slow: tuple[SlowWorker, Pipeline], failing: bool
) -> None:
    worker, pipeline = slow
    result = pipeline.send(plan(0, "a", shutdown=failing))
    for semaphore in worker.go_on.values():
        semaphore.release()
    if failing:
        with pytest.raises(ValueError, match="no draft"):
            result.result(SOON_S)
    else:
        assert result.result(SOON_S) == StepResult(step=0)


def test_a_plan_that_is_alone_waits_for_those_before_it_and_needs_no_thread(
    slow: tuple[SlowWorker, Pipeline],
) -> None:
    worker, pipeline = slow
    mine = []
    worker.step = lambda given: (
        mine.append(threading.current_thread())
        or StepResult(  # type: ignore[attr-defined]
            step=given.step
        )
    )
    pipeline.send(plan(0, "a"))
    threading.Timer(0.2, lambda: [each.release() for each in worker.go_on.values()]).start()
    assert pipeline.carry_out(plan(1, "a")) == StepResult(step=1)
    assert "verify 0 is over" in worker.told
    assert mine == [threading.current_thread()]


@pytest.mark.parametrize("num_texts", [1, len(PROMPTS)])
def test_an_adaptive_engine_interleaves_many_texts_and_never_one(
    open_llm: Callable[..., LLM],
    plain: list[list[int]],
    num_texts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, carry_out, send = [], Pipeline.carry_out, Pipeline.send
    monkeypatch.setattr(Pipeline, "carry_out", lambda *a: alone.append(True) or carry_out(*a))
    monkeypatch.setattr(Pipeline, "send", lambda *a: alone.append(False) or send(*a))
    with open_llm({"schedule": "adaptive", "draft_length": "adaptive"}) as llm:
        for _ in range(4):
            outputs = llm.generate(PROMPTS[:num_texts], PARAMS[:num_texts])
            assert [each.outputs[0].token_ids for each in outputs] == plain[:num_texts]
    assert set(alone) == ({True} if num_texts == 1 else {True, False})

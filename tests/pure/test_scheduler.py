"""Requests come in any order, share blocks, lose them, and each ends once with the text of its own.

The worker here is a fake that keeps, for every slot of every block, which prefix was written into it:
so a block that is handed out too early, shared wrongly or found under a wrong hash is seen as such.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paceline.runtime.config import EngineConfig, SpeculativeConfig
from paceline.runtime.errors import PromptError
from paceline.runtime.schedule.scheduler import Limits, Scheduler, Speculation, make_scheduler
from paceline.runtime.spec.ngram import NgramIndex
from paceline.runtime.types import (
    DraftShape,
    Event,
    FinishReason,
    KvPolicyName,
    Request,
    RequestResult,
    SamplingParams,
    ScheduledRequest,
    StageTimes,
    StepPlan,
    StepResult,
    TokenDelta,
    TokenLogprobs,
)

EOS = 6
NUM_TOKENS = 7
BLOCK = 4
SINKS, WINDOW = 3, 6


class Clock:
    """A millisecond passes between any two looks."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s


def make(
    *,
    num_blocks: int = 64,
    rows: int = 16,
    seats: int = 8,
    flights: int = 1,
    drafts: int = 0,
    method: Any = "draft_model",
    clock: Callable[[], float] | None = None,
    **more: Any,
) -> Scheduler:
    speculation = {
        key: more.pop(key) for key in ("adaptive", "ahead", "tree", "may_interleave") if key in more
    }
    return Scheduler(
        Limits(
            num_blocks=num_blocks,
            max_model_len=more.pop("max_model_len", 4096),
            max_num_batched_tokens=rows,
            max_num_seqs=seats,
            plans_in_flight=flights,
            block_size=BLOCK,
            sink_tokens=SINKS,
            window=WINDOW,
            **more,
        ),
        speculation=Speculation(num_tokens=drafts, method=method, **speculation)
        if drafts
        else None,
        clock=clock or Clock(),
    )


def make_request(
    request_id: str = "a",
    *,
    prompt: int | tuple[int, ...] = 3,
    max_tokens: int = 10,
    num_draft_tokens: int | None = None,
    priority: int = 0,
    cache_salt: str = "",
    **params: Any,
) -> Request:
    """A request that never ends by itself unless `eos_token_ids` says so."""
    eos = params.pop("eos_token_ids", ())
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(range(100, 100 + prompt)) if isinstance(prompt, int) else prompt,
        params=SamplingParams(**params),
        seed=0,
        max_tokens=max_tokens,
        num_draft_tokens=num_draft_tokens,
        eos_token_ids=eos,
        priority=priority,
        cache_salt=cache_salt,
    )


def text_token(request: Request, position: int) -> int:
    """What the fake target writes at a position of a request: its own seed's, whatever happens."""
    return random.Random(f"{request.seed} {position}").randrange(NUM_TOKENS)


def solo(request: Request) -> tuple[list[int], FinishReason, int | None]:
    """The text of a request alone, and how it ends."""
    text: list[int] = []
    while True:
        token_id = text_token(request, len(request.prompt_token_ids) + len(text))
        text.append(token_id)
        if len(text) >= request.params.min_tokens:
            if token_id in request.eos_token_ids and not request.params.ignore_eos:
                return text, "stop", None
            if token_id in request.params.stop_token_ids:
                return text, "stop", token_id
        if len(text) == request.max_tokens:
            return text, "length", None


@dataclass
class Known:
    """What the fake worker holds of a request."""

    request: Request
    token_ids: list[int]
    seen: int
    draft_exact: int
    blocks: list[int] = field(default_factory=list)

    def prefix(self, position: int) -> int:
        """What a slot holds once the token at `position` has been read after those before it."""
        return hash(tuple(self.token_ids[: position + 1]))


@dataclass
class Drafted:
    """A plan between its stages, with who takes part: a request of the same name may come meanwhile."""

    plan: StepPlan
    known: list[Known]


def draft_rows(each: ScheduledRequest) -> int:
    """Rows of the target's pass that are drafts."""
    return each.num_draft_tokens if each.tree is None else each.tree.nodes


def draft_slots(each: ScheduledRequest) -> int:
    """KV slots behind the fed tokens that may be written."""
    return (
        each.num_draft_tokens if each.tree is None else each.tree.num_slots(each.num_draft_tokens)
    )


class FakeWorker:
    """Carries out plans, and checks that a worker could. The drafter's slots are its first stage's, the
    target's its second's: a later plan's first may come before an earlier one's second."""

    def __init__(self, *, rows: int, seed: int = 0) -> None:
        self.rows = rows
        self.chance = random.Random(seed)
        self.known: dict[str, Known] = {}
        self.target: dict[tuple[int, int], int] = {}
        self.drafter: dict[tuple[int, int], int] = {}
        self.cached_tokens = 0
        self.preempted = 0
        self.drafted = 0

    def step(self, plan: StepPlan) -> StepResult:
        return self.verify(self.draft(plan))

    def draft(self, plan: StepPlan) -> Drafted:
        for request_id in plan.finished:
            del self.known[request_id]
        assert sum(each.num_tokens + draft_rows(each) for each in plan.scheduled) <= self.rows
        assert len({each.request_id for each in plan.scheduled}) == len(plan.scheduled)
        for each in plan.scheduled:
            self._hear(each)
        drafted = Drafted(plan, [self.known[each.request_id] for each in plan.scheduled])
        # all that a stage writes is there before anything is read
        writes: dict[tuple[int, int], int] = {}
        reading = [
            (known, known.seen + each.num_tokens)
            for each, known in zip(plan.scheduled, drafted.known, strict=True)
            if self._model_reads(each)
        ]
        for known, end in reading:
            self._write(writes, known, known.draft_exact, end)
        self.drafter |= writes
        for known, end in reading:
            self._see(self.drafter, known, known.draft_exact, end)
            known.draft_exact = end
        return drafted

    def verify(self, drafted: Drafted) -> StepResult:
        plan = drafted.plan
        writes: dict[tuple[int, int], int] = {}
        for each, known in zip(plan.scheduled, drafted.known, strict=True):
            end = known.seen + each.num_tokens
            self._write(writes, known, known.seen, end)
            for position in range(end, end + draft_slots(each)):
                slot = self._slot(known, position)
                assert slot not in writes, f"two requests write slot {slot}"
                writes[slot] = self.chance.getrandbits(40)
        self.target |= writes
        results = tuple(map(self._answer, plan.scheduled, drafted.known))
        times = StageTimes(calibrate_ms=0.1, draft_ms=0.2, verify_ms=0.3)
        return StepResult(step=plan.step, results=results, times=times, num_rows=1)

    def _hear(self, each: ScheduledRequest) -> None:
        if each.request is not None:
            assert each.request_id not in self.known, "sent again without having been finished"
            request = each.request
            self.known[each.request_id] = Known(
                request=request,
                token_ids=[*request.prompt_token_ids, *each.output_token_ids],
                seen=each.num_cached,
                draft_exact=each.num_draft_cached,
            )
            self.cached_tokens += each.num_cached
            self.preempted += bool(each.output_token_ids)
        known = self.known[each.request_id]
        known.blocks += each.new_blocks
        end = known.seen + each.num_tokens
        assert end <= len(known.token_ids), "more is fed than there is"
        assert end + draft_slots(each) <= len(known.blocks) * BLOCK, "no block for a row"
        if each.tree is not None:
            assert each.drafter == "draft_model"
            assert each.num_draft_tokens > 0
            assert end >= SINKS or known.request.params.kv_policy == "full"
        if each.num_draft_tokens:
            assert end == len(known.token_ids), "drafts before everything is read"

    @staticmethod
    def _model_reads(each: ScheduledRequest) -> bool:
        return each.read_draft or bool(each.num_draft_tokens and each.drafter == "draft_model")

    @staticmethod
    def _slot(known: Known, position: int) -> tuple[int, int]:
        return known.blocks[position // BLOCK], position % BLOCK

    def _write(
        self, writes: dict[tuple[int, int], int], known: Known, start: int, end: int
    ) -> None:
        for position in range(start, end):
            slot, value = self._slot(known, position), known.prefix(position)
            assert writes.get(slot, value) == value, f"two requests write slot {slot}"
            writes[slot] = value

    def _see(self, store: dict[tuple[int, int], int], known: Known, start: int, end: int) -> None:
        """Everything that tokens from `start` to `end` look at holds what it should."""
        oldest = 0
        if known.request.params.kv_policy == "sink_window":
            oldest = max(0, start - WINDOW + 1)
        for position in [*range(min(SINKS, end)), *range(oldest, end)]:
            found = store.get(self._slot(known, position))
            assert found == known.prefix(position), (
                f"{known.request.request_id}: position {position} of {end} holds another's KV"
            )

    def _answer(self, each: ScheduledRequest, known: Known) -> RequestResult:
        request, start = known.request, known.seen
        known.seen += each.num_tokens
        self._see(self.target, known, start, known.seen)
        logprobs = tuple(
            TokenLogprobs(token_id=token_id, logprob=-1.0, rank=1)
            for token_id in request.prompt_token_ids[start + 1 : known.seen + 1]
            if request.params.prompt_logprobs is not None
        )
        if known.seen < len(known.token_ids):
            return RequestResult(
                request_id=each.request_id,
                draft_exact=known.draft_exact,
                prompt_logprobs=logprobs,
            )
        if each.num_draft_tokens and each.drafter == "ngram":
            assert NgramIndex(known.token_ids).has_match, "nothing to draft from"
        self.drafted += draft_rows(each)
        num_accepted = self.chance.randint(0, each.num_draft_tokens)
        for _ in range(num_accepted + 1):
            known.token_ids.append(text_token(request, len(known.token_ids)))
        for position in range(known.seen, known.seen + num_accepted):
            self.target[self._slot(known, position)] = known.prefix(position)
        if each.drafter == "draft_model" and each.num_draft_tokens and self.chance.random() < 0.5:
            for position in range(known.seen, known.seen + num_accepted):
                if position < known.seen + each.num_draft_tokens - 1:
                    self.drafter[self._slot(known, position)] = known.prefix(position)
                    known.draft_exact = position + 1
        known.seen += num_accepted
        return RequestResult(
            request_id=each.request_id,
            token_ids=tuple(known.token_ids[-num_accepted - 1 :]),
            num_drafted=draft_rows(each),
            num_accepted=num_accepted,
            draft_exact=known.draft_exact,
            prompt_logprobs=logprobs,
        )


@dataclass
class Heard:
    """What came back of a request."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    last: TokenDelta | None = None
    first: TokenDelta | None = None

    def hear(self, delta: TokenDelta) -> None:
        assert self.last is None, "nothing comes after the terminal delta"
        if self.first is None and delta.token_ids:
            self.first = delta
            asked = self.request.params.prompt_logprobs is not None
            expected = self.request.prompt_token_ids[1:] if asked else ()
            assert tuple(each.token_id for each in delta.prompt_logprobs) == expected
        else:
            assert not delta.prompt_logprobs, "they come once, with the first token"
        self.token_ids += delta.token_ids
        if delta.finish_reason is not None:
            self.last = delta


class Run:
    """A scheduler, a fake worker and everything that was heard."""

    def __init__(self, scheduler: Scheduler, *, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.worker = FakeWorker(rows=scheduler.limits.max_num_batched_tokens, seed=seed)
        self.heard: dict[str, Heard] = {}
        self.plans: list[StepPlan] = []
        self.in_flight: deque[Drafted | StepPlan] = deque()
        """Plans that are to be answered, and how far each is."""

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)
            self.heard[request.request_id] = Heard(request)

    def abort(self, request_id: str) -> None:
        delta = self.scheduler.abort(request_id)
        if delta is not None:
            self.heard[request_id].hear(delta)

    def step(self, *, abort: str | None = None) -> StepPlan:
        """As many plans as may be in flight, and the earliest answered."""
        while self.scheduler.may_plan and self.send():
            pass
        if abort is not None:
            self.abort(abort)
        return self.receive() if self.in_flight else self.plans[-1]

    def send(self) -> bool:
        """Plan a step; whether there is anything in it."""
        preemptions = self.scheduler._totals["preemptions"]
        plan = self.scheduler.schedule()
        self.scheduler.check()
        if self.scheduler._totals["preemptions"] > preemptions:
            assert not any(each.request for each in plan.scheduled), "one goes and another comes"
        self.plans.append(plan)
        busy = bool(plan.scheduled or plan.finished)
        if busy:
            self.in_flight.append(plan)
        return busy

    def draft(self) -> None:
        """The first stage of the earliest plan that has not had it; of the next one it must wait until
        the last but one is answered. A plan that is alone waits for all before it."""
        for index, plan in enumerate(self.in_flight):
            if isinstance(plan, StepPlan):
                if plan.alone and index > 0:
                    return
                self.in_flight[index] = self.worker.draft(plan)
                return

    def receive(self) -> StepPlan:
        """The earliest plan's end."""
        if isinstance(self.in_flight[0], StepPlan):
            self.draft()
        drafted = self.in_flight.popleft()
        assert isinstance(drafted, Drafted)
        for delta in self.scheduler.update(drafted.plan, self.worker.verify(drafted)):
            self.heard[delta.request_id].hear(delta)
        self.scheduler.check()
        return drafted.plan

    def crash(self, *, out_of_memory: bool = False) -> None:
        """Steps are planned, and the ranks end in them; others take their place."""
        while self.scheduler.may_plan and self.send():
            pass
        self.in_flight.clear()
        self.worker.known.clear()
        self.worker.target.clear()
        self.worker.drafter.clear()
        num_blocks = self.scheduler.limits.num_blocks
        for delta in self.scheduler.restart(num_blocks, out_of_memory=out_of_memory):
            self.heard[delta.request_id].hear(delta)
        self.scheduler.check()

    def finish(self, *, most_steps: int = 3000) -> None:
        """Run until nothing is left; every text is that of its request alone."""
        for _ in range(most_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"still busy after {most_steps} steps"
        assert not self.worker.known, "the ranks were not told who is finished"
        status = self.scheduler.status()
        assert status.num_free_blocks == status.num_blocks, "every block is free in the end"
        for heard in self.heard.values():
            text, reason, stop_token_id = solo(heard.request)
            assert heard.last is not None, f"{heard.request.request_id} never ended"
            assert heard.last.metrics is not None
            assert heard.last.metrics.num_tokens == len(heard.token_ids)
            if heard.last.finish_reason in ("abort", "error"):
                assert heard.token_ids == text[: len(heard.token_ids)]
                continue
            assert heard.token_ids == text, heard.request.request_id
            assert (heard.last.finish_reason, heard.last.stop_token_id) == (reason, stop_token_id)

    def text_of(self, request_id: str) -> list[int]:
        return self.heard[request_id].token_ids


def only(plan: StepPlan) -> ScheduledRequest:
    (share,) = plan.scheduled
    return share


def answer(scheduler: Scheduler, *token_ids: int, **more: Any) -> list[TokenDelta]:
    """The deltas of a step that did this for its only request."""
    plan = scheduler.schedule()
    share = only(plan)
    result = RequestResult(
        request_id=share.request_id,
        token_ids=token_ids,
        num_drafted=share.num_draft_tokens,
        num_accepted=max(0, len(token_ids) - 1),
        **more,
    )
    return scheduler.update(plan, StepResult(step=plan.step, results=(result,)))


# ------------------------------------------------------------------------------------------ reading


def test_a_long_prompt_is_read_in_chunks() -> None:
    run = Run(make(rows=8))
    run.add(make_request(prompt=19, max_tokens=2))
    assert [only(run.step()).num_tokens for _ in range(4)] == [8, 8, 3, 1]
    run.finish()


def test_texts_go_on_while_a_prompt_is_read() -> None:
    run = Run(make(rows=8))
    run.add(make_request("a", prompt=2, max_tokens=40))
    run.step()
    run.add(make_request("b", prompt=30, max_tokens=2))
    for _ in range(4):
        shares = {each.request_id: each.num_tokens for each in run.step().scheduled}
        assert shares == {"a": 1, "b": 7}
    run.finish()


def test_drafts_leave_a_quarter_of_the_rows_to_prompts() -> None:
    run = Run(make(rows=16, drafts=16))
    run.add(make_request("a", prompt=2, max_tokens=60))
    run.step()
    run.add(make_request("b", prompt=30, max_tokens=2))
    first, second = run.step().scheduled
    assert (first.num_draft_tokens, second.num_tokens) == (11, 4)
    run.finish()


def test_some_prompt_is_read_in_every_step_however_many_texts_there_are() -> None:
    run = Run(make(rows=4, seats=100, drafts=3))
    run.add(*(make_request(f"{i}", prompt=9, max_tokens=30) for i in range(12)))
    unread = True
    while unread:
        plan = run.step()
        unread = len(run.scheduler._running) < 3
        reads = [each for each in plan.scheduled if each.request or each.num_tokens > 1]
        assert reads or not unread
    run.finish()


def test_a_request_travels_with_its_first_plan_only() -> None:
    scheduler = make(rows=2)
    request = make_request(prompt=4)
    scheduler.add(request)
    plan = scheduler.schedule()
    assert only(plan).request == request
    done = RequestResult(request_id="a")
    scheduler.update(plan, StepResult(step=plan.step, results=(done,)))
    assert only(scheduler.schedule()).request is None


def test_requests_run_together() -> None:
    run = Run(make(rows=32))
    run.add(*(make_request(f"{i}", prompt=3, max_tokens=5) for i in range(4)))
    assert len(run.step().scheduled) == 4
    run.finish()
    assert len(run.plans) == 6, "five steps and one that says who is finished"


# ------------------------------------------------------------------------------------------ the end


def test_the_last_token_of_max_tokens_is_the_last() -> None:
    run = Run(make(drafts=4))
    run.add(make_request(max_tokens=7))
    run.finish()
    assert len(run.text_of("a")) == 7


def test_a_round_drafts_no_more_than_can_be_used() -> None:
    run = Run(make(drafts=4))
    run.add(make_request(max_tokens=3))
    run.step()
    assert only(run.step()).num_draft_tokens == 1
    run.finish()


@pytest.mark.parametrize("token_id", [1, 2])
def test_tokens_after_the_one_that_ends_the_text_are_cut_off(token_id: int) -> None:
    scheduler = make(drafts=4)
    scheduler.add(make_request(eos_token_ids=(1,), stop_token_ids=(2,)))
    answer(scheduler, 5)
    (delta,) = answer(scheduler, 5, token_id, 7, 8)
    assert delta.token_ids == (5, token_id)
    assert delta.num_accepted == 2
    assert delta.finish_reason == "stop"
    assert delta.stop_token_id == (2 if token_id == 2 else None)


def test_eos_is_ignored_where_it_should_be() -> None:
    scheduler = make()
    scheduler.add(make_request(eos_token_ids=(1,), ignore_eos=True))
    (delta,) = answer(scheduler, 1)
    assert delta.finish_reason is None


@pytest.mark.parametrize(
    ("emitted", "kept"), [((1, 1, 1, 1), (1, 1, 1)), ((5, 5, 1, 5), (5, 5, 1))]
)
def test_no_text_stops_before_min_tokens(emitted: tuple[int, ...], kept: tuple[int, ...]) -> None:
    scheduler = make(drafts=4)
    scheduler.add(make_request(eos_token_ids=(1,), min_tokens=4))
    answer(scheduler, 5)
    (delta,) = answer(scheduler, *emitted)
    assert (delta.token_ids, delta.finish_reason) == (kept, "stop")


def test_length_wins_over_a_stop_token_beyond_it() -> None:
    scheduler = make(drafts=4)
    scheduler.add(make_request(eos_token_ids=(1,), max_tokens=3))
    answer(scheduler, 5)
    (delta,) = answer(scheduler, 5, 5, 1)
    assert (delta.token_ids, delta.finish_reason) == ((5, 5), "length")


def test_an_aborted_request_frees_its_blocks_at_once_and_ends_once() -> None:
    run = Run(make())
    run.add(make_request(prompt=9, max_tokens=50))
    run.step()
    run.abort("a")
    assert run.scheduler.status().num_free_blocks == 64
    assert run.scheduler.has_work, "the ranks still have to hear of it"
    plan = run.step()
    assert (plan.scheduled, plan.finished) == ((), ("a",))
    assert run.scheduler.abort("a") is None
    assert run.scheduler.status().num_running == 0


def test_a_request_aborted_while_its_step_runs_is_not_heard_of_again() -> None:
    run = Run(make())
    run.add(make_request("a", prompt=9, max_tokens=50), make_request("b", max_tokens=4))
    run.step(abort="a")
    run.finish()
    assert run.text_of("a") == []


def test_the_ranks_never_hear_of_a_request_that_never_ran() -> None:
    run = Run(make(seats=1))
    run.add(make_request("a", max_tokens=4), make_request("b"))
    run.step()
    run.abort("b")
    run.finish()
    assert all("b" not in plan.finished for plan in run.plans)


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (make_request(prompt=60, max_tokens=41), "context holds 100"),
        (make_request(prompt=40, max_tokens=50), "need 23 KV blocks"),
        (make_request(prompt=()), "empty"),
        (make_request(max_tokens=0), "at least 1"),
    ],
)
def test_a_request_that_could_never_run_is_refused(request_: Request, words: str) -> None:
    scheduler = make(num_blocks=22, max_model_len=100)
    with pytest.raises(PromptError, match=words):
        scheduler.add(request_)
    assert not scheduler.has_work


def test_an_id_in_use_is_refused() -> None:
    scheduler = make()
    scheduler.add(make_request("a"))
    with pytest.raises(PromptError, match="in use"):
        scheduler.add(make_request("a"))


def test_a_request_that_just_fits_runs() -> None:
    run = Run(make(num_blocks=5, drafts=3))
    run.add(make_request(prompt=8, max_tokens=13))  # 20 tokens are fed, in 5 blocks of 4
    run.finish()
    with pytest.raises(PromptError):
        run.add(make_request(prompt=8, max_tokens=14))


# ------------------------------------------------------------------------------- order, preemption


def scheduled_order(run: Run) -> list[str]:
    return [each.request_id for plan in run.plans for each in plan.scheduled if each.request]


def test_first_come_first_served() -> None:
    run = Run(make(seats=1))
    run.add(*(make_request(name, max_tokens=2) for name in "cab"))
    run.finish()
    assert scheduled_order(run) == ["c", "a", "b"]


def test_a_lower_priority_number_goes_first() -> None:
    run = Run(make(seats=1))
    run.add(*(make_request(f"{i}", max_tokens=2, priority=-i) for i in range(3)))
    run.finish()
    assert scheduled_order(run) == ["2", "1", "0"]


def test_waiting_makes_up_for_priority() -> None:
    clock = Clock()
    run = Run(make(seats=1, clock=clock, priority_ageing_s=30.0))
    run.add(make_request("old", max_tokens=2, priority=1))
    clock.now_s += 31.0
    run.add(make_request("new", max_tokens=2, priority=0))
    clock.now_s += 1.0
    run.add(make_request("urgent", max_tokens=2, priority=-2))
    run.finish()
    assert scheduled_order(run) == ["urgent", "old", "new"]


def test_the_latest_is_preempted_and_resumes_with_the_same_tokens() -> None:
    run = Run(make(num_blocks=8, enable_prefix_caching=False))
    run.add(make_request("a", prompt=4, max_tokens=20), make_request("b", prompt=5, max_tokens=20))
    run.finish()
    assert run.worker.preempted > 0
    metrics = {name: heard.last.metrics for name, heard in run.heard.items() if heard.last}
    kinds = [kind for kind, _ in metrics["b"].events]  # type: ignore[union-attr]
    assert kinds == [
        Event.QUEUED,
        Event.SCHEDULED,
        Event.FIRST_TOKEN,
        Event.PREEMPTED,
        Event.SCHEDULED,
        Event.FINISHED,
    ]
    assert run.scheduler.status().num_preemptions == 1
    assert Event.PREEMPTED not in [kind for kind, _ in metrics["a"].events]  # type: ignore[union-attr]


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    run = Run(make(num_blocks=12))
    run.add(
        make_request("a", prompt=4, max_tokens=30),
        make_request("b", prompt=(9,) * 13, max_tokens=20),
    )
    run.finish()
    resumed = [s for plan in run.plans for s in plan.scheduled if s.output_token_ids]
    assert resumed
    assert any(each.num_cached > 0 for each in resumed)


def test_drafts_are_given_up_before_anybody_is_preempted() -> None:
    run = Run(make(num_blocks=10, drafts=4))
    run.add(make_request("a", prompt=16, max_tokens=4), make_request("b", prompt=16, max_tokens=4))
    run.finish()
    assert run.scheduler.status().num_preemptions == 0


def test_drafts_leave_the_last_blocks_to_texts_that_will_grow() -> None:
    run = Run(make(num_blocks=9, rows=32, drafts=4, enable_prefix_caching=False))
    run.add(
        make_request("a", prompt=13, max_tokens=20), make_request("b", prompt=15, max_tokens=20)
    )
    run.step()
    plan = run.scheduler.schedule()
    assert [each.num_draft_tokens for each in plan.scheduled] == [2, 0]
    assert run.scheduler.status().num_free_blocks == 1


def test_nobody_comes_in_who_leaves_no_block_to_those_who_run() -> None:
    run = Run(make(num_blocks=6, enable_prefix_caching=False))
    run.add(make_request("a", prompt=4, max_tokens=12))
    run.step()
    run.add(make_request("b", prompt=15, max_tokens=2))
    assert only(run.step()).request_id == "a"
    run.finish()
    assert run.scheduler.status().num_preemptions == 0


def test_a_request_comes_in_as_soon_as_there_are_blocks_for_it() -> None:
    run = Run(make(num_blocks=12, enable_prefix_caching=False))
    run.add(make_request("a", prompt=4, max_tokens=20), make_request("b", prompt=12, max_tokens=3))
    run.step()
    run.add(make_request("c", prompt=28, max_tokens=2))
    while run.heard["b"].last is None:
        assert "c" not in [each.request_id for each in run.step().scheduled]
    assert "c" in [each.request_id for each in run.step().scheduled]
    run.finish()


def test_two_requests_that_cannot_both_fit_both_finish() -> None:
    for seed in range(20):
        run = Run(make(num_blocks=6, drafts=3, rows=5), seed=seed)
        run.add(*(make_request(f"{i}", prompt=6, max_tokens=18) for i in range(3)))
        run.finish(most_steps=300)


def test_a_steps_cost_does_not_look_at_those_who_wait() -> None:
    scheduler = make(seats=1, rows=4)
    scheduler.add(make_request("first", max_tokens=100))
    answer(scheduler, 1)
    for index in range(100):
        scheduler.add(make_request(f"{index}"))
    before = [id(entry) for entry in scheduler._waiting]
    scheduler._waiting = Untouchable(scheduler._waiting)
    answer(scheduler, 1)
    assert [id(entry) for entry in list.__iter__(scheduler._waiting)] == before


class Untouchable(list[Any]):
    """A queue that must not be walked through."""

    def __iter__(self) -> Any:
        raise AssertionError("a step walked through the queue")


def test_those_aborted_while_waiting_do_not_pile_up() -> None:
    scheduler = make(seats=1)
    scheduler.add(make_request("first", max_tokens=100))
    answer(scheduler, 1)
    for index in range(1000):
        scheduler.add(make_request(f"{index}"))
        scheduler.abort(f"{index}")
    assert len(scheduler._waiting) < 100
    scheduler.check()


# ------------------------------------------------------------------------------------------ prefixes


def num_cached(run: Run, request_id: str) -> int:
    first = run.heard[request_id].first
    assert first is not None
    return first.num_cached_tokens


def test_a_second_request_starts_from_the_firsts_prefix() -> None:
    run = Run(make())
    run.add(make_request("a", prompt=11, max_tokens=3))
    run.finish()
    run.add(make_request("b", prompt=11, max_tokens=3))
    run.finish()
    assert (num_cached(run, "a"), num_cached(run, "b")) == (0, 8)
    status = run.scheduler.status()
    assert (status.prefix_queries, status.prefix_hits, status.prompt_tokens) == (22, 8, 14)


def test_requests_of_one_step_share_what_it_writes() -> None:
    run = Run(make(rows=32))
    run.add(make_request("a", prompt=11, max_tokens=3), make_request("b", prompt=11, max_tokens=3))
    plan = run.step()
    assert [each.num_cached for each in plan.scheduled] == [0, 8]
    run.finish()


def test_one_token_of_a_prompt_is_always_computed() -> None:
    run = Run(make())
    run.add(make_request("a", prompt=8, max_tokens=3))
    run.finish()
    run.add(make_request("b", prompt=8, max_tokens=3))
    run.finish()
    assert num_cached(run, "b") == 4


@pytest.mark.parametrize(("max_tokens", "cached"), [(7, 8), (8, 12)])
def test_written_text_is_found_by_the_next_turn_of_a_conversation(
    max_tokens: int, cached: int
) -> None:
    for seed in range(10):
        run = Run(make(drafts=seed), seed=seed)
        run.add(make_request("a", prompt=5, max_tokens=max_tokens))
        run.finish()
        turn = (*run.heard["a"].request.prompt_token_ids, *run.text_of("a"), 50, 51)
        run.add(make_request("b", prompt=turn, max_tokens=3))
        run.finish()
        assert num_cached(run, "b") == cached, "the last token of a text is never fed"


def test_salts_keep_prefixes_apart() -> None:
    run = Run(make())
    for name, salt in (("a", ""), ("b", "x"), ("c", "x"), ("d", "")):
        run.add(make_request(name, prompt=11, max_tokens=1, cache_salt=salt))
        run.finish()
    assert [num_cached(run, name) for name in "abcd"] == [0, 0, 8, 8]


def test_nothing_is_shared_where_every_prompt_row_is_asked_for() -> None:
    run = Run(make(rows=4))
    run.add(make_request("a", prompt=11, max_tokens=3))
    run.finish()
    run.add(make_request("b", prompt=11, max_tokens=3, prompt_logprobs=0))
    run.finish()
    assert num_cached(run, "b") == 0
    first = run.heard["b"].first
    assert first is not None
    assert [each.token_id for each in first.prompt_logprobs] == list(range(101, 111))


def test_a_prompt_that_is_read_again_reports_its_rows_once() -> None:
    run = Run(make(num_blocks=9, rows=2))
    run.add(make_request("a", prompt=4, max_tokens=20))
    while run.heard["a"].first is None:
        run.step()
    run.add(make_request("b", prompt=20, max_tokens=2, prompt_logprobs=0))
    run.finish()
    last = run.heard["b"].last
    assert last is not None
    assert last.metrics is not None
    kinds = [kind for kind, _ in last.metrics.events]
    assert kinds.index(Event.PREEMPTED) < kinds.index(Event.FIRST_TOKEN)


def test_no_prefix_is_shared_if_it_is_switched_off() -> None:
    run = Run(make(enable_prefix_caching=False))
    for name in "ab":
        run.add(make_request(name, prompt=11, max_tokens=3))
        run.finish()
    assert num_cached(run, "b") == 0
    assert run.scheduler.status().prefix_queries == 0


def test_drafter_rows_are_shared_only_where_they_are_exact() -> None:
    run = Run(make(drafts=2))
    run.add(make_request("a", prompt=11, max_tokens=1, num_draft_tokens=0))
    run.finish()
    run.add(make_request("b", prompt=11, max_tokens=1))
    run.finish()
    run.add(make_request("c", prompt=11, max_tokens=1))
    run.finish()
    shares = {s.request_id: s for plan in run.plans for s in plan.scheduled if s.request}
    assert [shares[name].num_cached for name in "abc"] == [0, 8, 8]
    assert [shares[name].num_draft_cached for name in "abc"] == [0, 0, 8]


# ---------------------------------------------------------------------------------------- the window


def window_request(name: str = "a", **more: Any) -> Request:
    return make_request(name, kv_policy="sink_window", **more)


def test_a_window_writes_without_end_in_constant_memory() -> None:
    run = Run(make(num_blocks=8, max_model_len=20))
    run.add(window_request(prompt=30, max_tokens=200))
    most = 0
    while run.scheduler.has_work:
        run.step()
        most = max(most, 8 - run.scheduler.status().num_free_blocks)
    assert most <= 8
    run.finish()
    run.add(window_request("b", prompt=3, max_tokens=200))
    most = 0
    for _ in range(100):
        run.step()
        most = max(most, 8 - run.scheduler.status().num_free_blocks)
    assert most <= 4, "one block of sinks, and a window of 6 lies in three at most"


def test_a_window_frees_its_blocks_again_after_a_preemption() -> None:
    run = Run(make())
    run.add(make_request("a", prompt=3, max_tokens=60), window_request("b", max_tokens=60))
    for _ in range(40):
        run.step()
    run.scheduler._preempt(run.scheduler._running[-1], now_s=0.0)
    while run.heard["b"].last is None:
        run.step()
        for running in run.scheduler._running:
            held = [block for block in running.blocks if block >= 0]
            assert running.request_id == "a" or len(held) <= 8
    run.finish()


def test_a_windows_blocks_wait_for_the_drafter_but_not_forever() -> None:
    run = Run(make(num_blocks=12, drafts=2))
    run.add(window_request(prompt=5, max_tokens=100))
    run.finish()
    assert run.worker.drafted > 10
    behind = Run(make(num_blocks=12, drafts=2))
    behind.add(window_request(prompt=5, max_tokens=100))
    verify = behind.worker.verify

    def never_exact(drafted: Drafted) -> StepResult:
        result = verify(drafted)
        for known in behind.worker.known.values():
            known.draft_exact = 0
        results = [
            RequestResult(request_id=each.request_id, token_ids=each.token_ids)
            for each in result.results
        ]
        return StepResult(step=drafted.plan.step, results=tuple(results))

    behind.worker.verify = never_exact  # type: ignore[method-assign]
    behind.worker._see = lambda *_: None  # type: ignore[method-assign]
    for _ in range(30):
        behind.step()
    assert only(behind.plans[-1]).num_draft_tokens == 0
    assert 12 - behind.scheduler.status().num_free_blocks <= 4


def test_a_window_needs_room_for_a_drafter_that_lags() -> None:
    make(num_blocks=4).add(window_request(max_tokens=100))
    with pytest.raises(PromptError, match="need 5 KV blocks"):
        make(num_blocks=4, drafts=2).add(window_request(max_tokens=100))
    run = Run(make(num_blocks=5, drafts=2))
    run.add(window_request(prompt=9, max_tokens=100))
    run.finish()


def test_windows_share_no_prefix() -> None:
    run = Run(make())
    for name in "ab":
        run.add(window_request(name, prompt=11, max_tokens=3))
        run.finish()
    assert num_cached(run, "b") == 0


# ---------------------------------------------------------------------------------------- speculation


def test_the_request_says_how_many_drafts_and_the_engine_bounds_them() -> None:
    run = Run(make(rows=64, drafts=4))
    asked = (None, 0, 2, 9)
    run.add(
        *(
            make_request(f"{i}", max_tokens=50, num_draft_tokens=count)
            for i, count in enumerate(asked)
        )
    )
    run.step()
    assert [each.num_draft_tokens for each in run.step().scheduled] == [4, 0, 2, 4]


def test_too_many_drafts_for_the_rows_are_cut_evenly() -> None:
    run = Run(make(rows=16, drafts=8))
    run.add(*(make_request(f"{i}", max_tokens=50) for i in range(3)))
    run.step()
    assert [each.num_draft_tokens for each in run.step().scheduled] == [4, 4, 4]


def test_without_a_match_ngram_drafts_nothing() -> None:
    scheduler = make(drafts=4, method="ngram")
    scheduler.add(make_request(prompt=(1, 2, 3, 4), max_tokens=50))
    answer(scheduler, 5)
    plan = scheduler.schedule()
    assert (only(plan).num_draft_tokens, only(plan).read_draft) == (0, False)
    result = RequestResult(request_id="a", token_ids=(1,))
    scheduler.update(plan, StepResult(step=plan.step, results=(result,)))
    answer(scheduler, 2)
    share = only(scheduler.schedule())
    assert (share.num_draft_tokens, share.drafter) == (4, "ngram")


def test_combined_drafts_by_model_where_nothing_matches() -> None:
    scheduler = make(drafts=4, method="combined")
    scheduler.add(make_request(prompt=(1, 2, 3, 4), max_tokens=50))
    answer(scheduler, 1)
    assert only(scheduler.schedule()).drafter == "draft_model"


def test_the_draft_model_reads_prompts_along() -> None:
    for drafts, reads in ((0, False), (2, True)):
        run = Run(make(rows=8, drafts=drafts))
        run.add(make_request(prompt=11, max_tokens=3))
        assert [only(run.step()).read_draft for _ in range(2)] == [reads, reads]


def test_a_drafter_that_has_not_read_a_found_prefix_is_known_to_lag() -> None:
    run = Run(make(drafts=2))
    run.add(make_request("a", prompt=11, max_tokens=1, num_draft_tokens=0))
    run.finish()
    run.add(make_request("b", prompt=11, max_tokens=9))
    run.scheduler.schedule()
    (running,) = run.scheduler._running
    assert (running.seen, running.draft_seen) == (8, 0)


def test_a_drafter_has_never_read_its_own_last_draft() -> None:
    scheduler = make(drafts=4)
    scheduler.add(make_request(max_tokens=50))
    answer(scheduler, 1)
    for emitted, lag in (((1, 2, 3, 4, 5), 2), ((1, 2), 1), ((1,), 1)):
        answer(scheduler, *emitted)
        scheduler._ask_for_drafts(scheduler._running)
        (running,) = scheduler._running
        assert running.draft is not None
        assert running.draft.lag == lag


def test_a_drafter_far_behind_does_not_read_more_than_a_step_for_all() -> None:
    scheduler = make(rows=8, drafts=1)
    for name in "ab":
        scheduler.add(make_request(name, max_tokens=50))
    for running in scheduler._requests.values():
        running.draft_seen = 0
    plan = scheduler.schedule()
    results = tuple(RequestResult(request_id=name, token_ids=(1,)) for name in "ab")
    scheduler.update(plan, StepResult(step=plan.step, results=results))
    for running in scheduler._running:
        running.token_ids += [1] * 6
        running.seen += 6
        running.blocks += scheduler._pool.allocate(2)
        running.draft_seen = running.draft_exact = 0
    assert [each.num_draft_tokens for each in scheduler.schedule().scheduled] == [1, 0]


# ------------------------------------------------------------------------------------------ figures


def test_metrics_tell_what_happened() -> None:
    scheduler = make(drafts=3)
    scheduler.add(make_request(max_tokens=6))
    times = StageTimes(calibrate_ms=1.0, draft_ms=2.0, verify_ms=3.0)
    deltas = []
    for emitted in ((1,), (1, 2, 3), (4,), (5,)):
        plan = scheduler.schedule()
        result = RequestResult(
            request_id="a",
            token_ids=emitted,
            num_drafted=only(plan).num_draft_tokens,
            num_accepted=len(emitted) - 1,
        )
        step = StepResult(step=plan.step, results=(result,), times=times, num_rows=4)
        deltas += scheduler.update(plan, step)
    metrics = deltas[-1].metrics
    assert metrics is not None
    assert (metrics.num_prompt_tokens, metrics.num_tokens, metrics.rounds) == (3, 6, 3)
    assert (metrics.drafted, metrics.accepted, metrics.accepted_at) == (4, 2, (2, 0, 1))
    assert metrics.times == StageTimes(calibrate_ms=3.0, draft_ms=6.0, verify_ms=9.0)
    assert [kind for kind, _ in metrics.events] == [
        Event.QUEUED,
        Event.SCHEDULED,
        Event.FIRST_TOKEN,
        Event.FINISHED,
    ]
    status = scheduler.status()
    assert (status.num_steps, status.num_drafts, status.drafted, status.accepted) == (4, 2, 4, 2)
    assert status.accepted_at_position == (1, 1, 0)
    assert status.generation_tokens == 6
    assert [step.draft_lengths for step in status.steps] == [(), (3,), (1,), ()]
    assert [step.num_rows for step in status.steps] == [4] * 4
    assert scheduler.status().steps == ()


def test_time_away_from_the_engine_is_not_counted() -> None:
    run = Run(make(num_blocks=8, enable_prefix_caching=False))
    run.add(make_request("a", prompt=4, max_tokens=20), make_request("b", prompt=5, max_tokens=20))
    run.finish()
    took_part = sum(any(each.request_id == "b" for each in plan.scheduled) for plan in run.plans)
    last = run.heard["b"].last
    assert last is not None
    assert last.metrics is not None
    assert last.metrics.times.verify_ms == pytest.approx(0.3 * (took_part - 1))


def test_a_config_becomes_a_scheduler() -> None:
    config = EngineConfig(
        max_num_seqs=3,
        max_num_batched_tokens=64,
        block_size=32,
        kv_window=64,
        speculative_config=SpeculativeConfig(num_speculative_tokens=7, method="combined"),
    )
    scheduler = make_scheduler(config, max_model_len=512, num_blocks=40)
    assert scheduler.limits == Limits(
        num_blocks=40,
        max_model_len=512,
        max_num_batched_tokens=64,
        max_num_seqs=3,
        block_size=32,
        window=64,
    )
    assert scheduler._speculation == Speculation(num_tokens=7, method="combined", adaptive=True)
    off = make_scheduler(EngineConfig(), max_model_len=512, num_blocks=40)
    assert off._speculation is None


# -------------------------------------------------------------------------------------- any history

FAMILIES = [tuple(random.Random(i).randrange(NUM_TOKENS) for _ in range(40)) for i in range(3)]


@st.composite
def requests(
    draw: st.DrawFn, name: str, *, most_tokens: int, conversations: Sequence[tuple[int, ...]] = ()
) -> Request:
    family = draw(st.sampled_from([*FAMILIES, *conversations]))
    prompt = draw(st.integers(1, max(1, most_tokens // 2)))
    if family in conversations:
        prompt = len(family)
    own = draw(st.lists(st.integers(0, NUM_TOKENS - 1), max_size=2))
    prompt_token_ids = (*family[:prompt], *own)[:most_tokens]
    room = most_tokens + 1 - len(prompt_token_ids)
    policy: KvPolicyName = draw(st.sampled_from(["full", "full", "full", "sink_window"]))
    return Request(
        request_id=name,
        prompt_token_ids=prompt_token_ids,
        params=SamplingParams(
            min_tokens=draw(st.integers(0, 4)),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=draw(st.sampled_from([(), (), (3,)])),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
            kv_policy=policy,
        ),
        # requests of one seed and prompt write the same text: more to share
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.integers(1, room)),
        num_draft_tokens=draw(st.sampled_from([None, None, 0, 2])),
        eos_token_ids=(EOS,),
        priority=draw(st.integers(-1, 1)),
        cache_salt=draw(st.sampled_from(["", "", "s"])),
    )


class AnyHistory(RuleBasedStateMachine):
    """Requests are added, aborted and stepped in any order, in pools of any size."""

    @initialize(
        num_blocks=st.integers(8, 40),
        rows=st.integers(1, 24),
        seats=st.integers(1, 6),
        flights=st.sampled_from([1, 1, 2, 2, 3]),
        follows=st.booleans(),
        drafts=st.integers(0, 4),
        method=st.sampled_from(["draft_model", "ngram", "combined"]),
        adaptive=st.booleans(),
        may_interleave=st.booleans(),
        tree=st.sampled_from(
            [
                None,
                None,
                DraftShape(kind="beam", width=3, nodes=5),
                DraftShape(kind="dynamic", width=2, nodes=4),
            ]
        ),
        caching=st.sampled_from([True, True, False]),
        seed=st.integers(0, 1000),
    )
    def start(
        self,
        num_blocks: int,
        rows: int,
        seats: int,
        flights: int,
        follows: bool,
        drafts: int,
        method: str,
        adaptive: bool,
        may_interleave: bool,
        tree: DraftShape | None,
        caching: bool,
        seed: int,
    ) -> None:
        self.run_ = Run(
            make(
                num_blocks=num_blocks,
                rows=rows,
                seats=seats,
                flights=flights,
                async_scheduling=follows,
                drafts=drafts,
                method=method,
                adaptive=adaptive,
                may_interleave=may_interleave,
                tree=tree,
                enable_prefix_caching=caching,
                priority_ageing_s=0.005,
            ),
            seed=seed,
        )

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        most = self.run_.scheduler.limits.num_blocks * BLOCK
        name = f"r{len(self.run_.heard)}"
        conversations = [
            (*heard.request.prompt_token_ids, *heard.token_ids)
            for heard in self.run_.heard.values()
            if heard.token_ids
        ]
        request = data.draw(
            requests(name, most_tokens=min(most, 48), conversations=conversations[-3:])
        )
        self.run_.add(request)

    @precondition(lambda self: self.run_.heard)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.run_.abort(data.draw(st.sampled_from(sorted(self.run_.heard))))

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.run_.step()

    @precondition(lambda self: self.run_.heard)
    @rule(data=st.data())
    def abort_while_a_step_runs(self, data: st.DataObject) -> None:
        self.run_.step(abort=data.draw(st.sampled_from(sorted(self.run_.heard))))

    @precondition(lambda self: self.run_.scheduler.may_plan)
    @rule()
    def send(self) -> None:
        self.run_.send()

    @rule()
    def draft(self) -> None:
        self.run_.draft()

    @precondition(lambda self: self.run_.in_flight)
    @rule()
    def receive(self) -> None:
        self.run_.receive()

    @rule(out_of_memory=st.booleans())
    def crash(self, out_of_memory: bool) -> None:
        self.run_.crash(out_of_memory=out_of_memory)

    @invariant()
    def everything_is_in_its_place(self) -> None:
        if hasattr(self, "run_"):
            self.run_.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "run_"):
            self.run_.finish()


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    num_blocks=st.integers(8, 14),
    rows=st.integers(1, 12),
    flights=st.integers(1, 2),
    follows=st.booleans(),
    drafts=st.integers(0, 4),
    count=st.integers(2, 6),
)
def test_requests_that_fight_for_blocks_all_finish(
    data: st.DataObject,
    num_blocks: int,
    rows: int,
    flights: int,
    follows: bool,
    drafts: int,
    count: int,
) -> None:
    limits = {"num_blocks": num_blocks, "rows": rows, "flights": flights}
    run = Run(make(**limits, async_scheduling=follows, drafts=drafts))
    for index in range(count):
        run.add(data.draw(requests(f"r{index}", most_tokens=min(48, num_blocks * BLOCK))))
    run.finish()

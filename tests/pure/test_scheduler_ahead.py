"""Drafts that were made ahead go into plans as they are there, and the drafter hears of every text that
runs, and of no other."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.pure.test_scheduler import Drafted, Run, make, make_request, solo, text_token

from paceline.runtime.ahead.messages import Close, Commit, Order, Sync, Tails
from paceline.runtime.ahead.text import DraftedText
from paceline.runtime.schedule.scheduler import Scheduler
from paceline.runtime.schedule.tails import TailBook
from paceline.runtime.types import (
    Request,
    RequestResult,
    StageTimes,
    StepPlan,
    StepResult,
)


class Drafter:
    """Drafts right or wrong by chance, for whatever the scheduler has it told of."""

    def __init__(self, scheduler: Scheduler, *, right: float = 1.0, seed: int = 0) -> None:
        assert scheduler.tails is not None
        self.book: TailBook = scheduler.tails
        self.texts: dict[str, tuple[DraftedText, Request]] = {}
        self.orders: list[Order] = []
        self._right, self._chance = right, random.Random(seed)

    def hear(self) -> None:
        for order in self.book.take_orders():
            self.orders.append(order)
            match order:
                case Sync():
                    self.texts[order.request.request_id] = (DraftedText.of(order), order.request)
                case Commit():
                    self.texts[order.request_id][0].commit(order.base, order.token_ids)
                case Close():
                    del self.texts[order.request_id]

    def draft(self, passes: int) -> None:
        for _ in range(passes):
            for text, request in self.texts.values():
                if text.wants:
                    token_id = text_token(request, len(text.token_ids))
                    wrong = self._chance.random() >= self._right
                    said = text.add(token_id + wrong)
                    self.book.receive(Tails(rank=0, tails=(said,)))


class Target:
    """Writes the texts of `text_token`, and keeps drafts as far as they are the same."""

    def __init__(self) -> None:
        self.texts: dict[str, tuple[Request, list[int], int]] = {}
        self.drafted = self.accepted = 0

    def draft(self, plan: StepPlan) -> Drafted:
        return Drafted(plan, [])

    def verify(self, drafted: Drafted) -> StepResult:
        plan = drafted.plan
        for request_id in plan.finished:
            del self.texts[request_id]
        results = []
        for each in plan.scheduled:
            assert each.num_draft_tokens == 0, "nobody is to draft here"
            assert not each.read_draft
            if each.request is not None:
                text = [*each.request.prompt_token_ids, *each.output_token_ids]
                self.texts[each.request_id] = (each.request, text, each.num_cached)
            request, text, seen = self.texts[each.request_id]
            seen += each.num_tokens
            emitted: list[int] = []
            if seen == len(text):
                for draft in (*each.draft_token_ids, None):
                    emitted.append(text_token(request, len(text)))
                    text.append(emitted[-1])
                    if draft != emitted[-1]:
                        break
                seen = len(text) - 1
            else:
                assert not each.draft_token_ids, "drafts before everything is read"
            self.texts[each.request_id] = (request, text, seen)
            num_accepted = max(0, len(emitted) - 1)
            self.drafted += len(each.draft_token_ids)
            self.accepted += num_accepted
            results.append(
                RequestResult(
                    request_id=each.request_id,
                    token_ids=tuple(emitted),
                    num_drafted=len(each.draft_token_ids),
                    num_accepted=num_accepted,
                )
            )
        times = StageTimes(verify_ms=0.3)
        return StepResult(step=plan.step, results=tuple(results), times=times, num_rows=1)


def written(scheduler: Scheduler, drafter: Drafter, *, passes: int) -> tuple[Run, Target]:
    """A run that drafts so many passes between steps."""
    run, target = Run(scheduler), Target()
    run.worker = target  # type: ignore[assignment]
    step = run.step

    def between(*, abort: str | None = None) -> StepPlan:
        drafter.hear()
        drafter.draft(passes)
        return step(abort=abort)

    run.step = between  # type: ignore[method-assign]
    return run, target


def finish(run: Run) -> None:
    for _ in range(1000):
        if not run.scheduler.has_work:
            return
        run.step()
    raise AssertionError("it never ends")


def test_a_full_tail_is_verified_in_every_step_and_never_runs_dry() -> None:
    scheduler = make(drafts=3, ahead=True)
    drafter = Drafter(scheduler)
    run, target = written(scheduler, drafter, passes=4)
    run.add(make_request(max_tokens=21))
    finish(run)
    assert run.heard["a"].token_ids == solo(make_request(max_tokens=21))[0]
    assert [len(plan.scheduled[0].draft_token_ids) for plan in run.plans if plan.scheduled] == [
        *(0, 3, 3, 3, 3, 3),
    ]
    assert target.drafted == target.accepted == 15


def test_a_drafter_that_is_slow_is_not_waited_for() -> None:
    scheduler = make(drafts=3, ahead=True)
    run, target = written(scheduler, Drafter(scheduler), passes=0)
    run.add(make_request(max_tokens=9))
    finish(run)
    assert run.heard["a"].token_ids == solo(make_request(max_tokens=9))[0]
    assert target.drafted == 0


def test_the_drafter_is_told_how_far_ahead_it_may_be() -> None:
    scheduler = make(drafts=3, ahead=True)
    drafter = Drafter(scheduler)
    run, _ = written(scheduler, drafter, passes=9)
    run.add(make_request("a"), make_request("b", num_draft_tokens=1))
    run.add(make_request("none", num_draft_tokens=0))
    run.step()
    drafter.hear()
    syncs = {each.request.request_id: each for each in drafter.orders if isinstance(each, Sync)}
    assert {key: each.num_ahead for key, each in syncs.items()} == {"a": 7, "b": 3}
    finish(run)
    drafter.hear()
    assert drafter.texts == {}, "it has been told of every end"


def test_who_waits_for_a_seat_is_not_drafted_for() -> None:
    scheduler = make(drafts=3, ahead=True, seats=1)
    drafter = Drafter(scheduler)
    run, _ = written(scheduler, drafter, passes=2)
    run.add(make_request("a", max_tokens=12), make_request("b", max_tokens=12))
    run.step()
    drafter.hear()
    assert set(drafter.texts) == {"a"}
    finish(run)
    assert set(run.heard["b"].token_ids) <= set(range(7))
    assert len(run.heard["b"].token_ids) == 12


def test_a_text_with_a_window_is_not_drafted_for() -> None:
    scheduler = make(drafts=3, ahead=True)
    drafter = Drafter(scheduler)
    run, _ = written(scheduler, drafter, passes=2)
    run.add(make_request(kv_policy="sink_window"))
    finish(run)
    drafter.hear()
    assert drafter.orders == []


@pytest.mark.parametrize("again", [False, True])
def test_new_target_ranks_leave_the_drafter_what_it_has_to_know(*, again: bool) -> None:
    scheduler = make(drafts=3, ahead=True)
    drafter = Drafter(scheduler)
    run, _ = written(scheduler, drafter, passes=4)
    run.add(make_request(max_tokens=30))
    for _ in range(4):
        run.step()
    if again:
        scheduler.schedule()
    scheduler.restart(scheduler.limits.num_blocks)
    run.worker = Target()  # type: ignore[assignment]
    finish(run)
    assert run.heard["a"].token_ids == solo(make_request(max_tokens=30))[0]


@given(
    seed=st.integers(0, 2**16),
    right=st.sampled_from([0.0, 0.6, 0.95]),
    passes=st.integers(0, 5),
    num_blocks=st.integers(9, 40),
    adaptive=st.booleans(),
)
def test_texts_are_their_own_however_many_drafts_are_there_and_whoever_is_preempted(
    *, seed: int, right: float, passes: int, num_blocks: int, adaptive: bool
) -> None:
    scheduler = make(drafts=4, ahead=True, num_blocks=num_blocks, seats=4, adaptive=adaptive)
    drafter = Drafter(scheduler, right=right, seed=seed)
    run, _ = written(scheduler, drafter, passes=passes)
    chance = random.Random(seed)
    requests = [
        make_request(f"r{i}", prompt=chance.randint(1, 9), max_tokens=chance.randint(1, 20))
        for i in range(6)
    ]
    run.add(*requests)
    for _ in range(10):
        run.step(abort="r3" if chance.random() < 0.05 else None)
    finish(run)
    for request in requests:
        heard = run.heard[request.request_id]
        assert heard.last is not None
        if heard.last.finish_reason != "abort":
            assert heard.token_ids == solo(request)[0]
    drafter.hear()
    assert drafter.texts == {}

"""A step planned for the requests of one that is not answered: the same texts, blocks for whatever may
have been accepted, and nobody kept waiting for it."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from tests.pure.test_scheduler import EOS, Run, make, make_request, only, solo
from tests.pure.test_scheduler_transfers import produce

from paceline.runtime.schedule.draft_length import StepCost
from paceline.runtime.schedule.scheduler import GUILTY
from paceline.runtime.types import DraftShape, Request, StepPlan


def following(**more: Any) -> Run:
    return Run(make(async_scheduling=True, **more))


def names(plan: StepPlan) -> list[str]:
    return [each.request_id for each in plan.scheduled]


class AcceptsAll(random.Random):
    """Decides that every draft is right."""

    def randint(self, a: int, b: int) -> int:
        assert a <= b
        return b


def num_followed(run: Run) -> int:
    """Steps from now until all is done that were planned before the last was answered."""
    count = 0
    while run.scheduler.has_work:
        while run.scheduler.may_plan and run.send():
            count += len(run.in_flight) == 2
        if run.in_flight:
            run.receive()
    run.finish()
    return count


def ending_by_itself(request_id: str = "a", **more: Any) -> Request:
    """A request whose text ends before it may be as long as it could be."""
    request = make_request(request_id, max_tokens=40, eos_token_ids=(EOS,), **more)
    assert 4 < len(solo(request)[0]) < 30
    return request


@pytest.mark.parametrize("drafts", [0, 3])
def test_every_step_but_the_first_follows_one_that_is_not_answered(drafts: int) -> None:
    run = following(drafts=drafts)
    run.add(make_request("a", max_tokens=20), make_request("b", max_tokens=20))
    assert run.send()
    assert run.scheduler.may_plan
    assert run.send()
    assert not run.scheduler.may_plan, "two are enough"
    assert names(run.plans[0]) == names(run.plans[1]) == ["a", "b"]
    assert all(plan.alone for plan in run.plans), "one after the other"
    assert [each.num_tokens for each in run.plans[1].scheduled] == [1, 1]
    run.finish()


def test_a_text_of_known_length_costs_no_step_more() -> None:
    run = following()
    run.add(make_request(max_tokens=12))
    assert num_followed(run) == 11
    assert len([plan for plan in run.plans if plan.scheduled]) == 12


def test_a_text_that_ends_by_itself_is_in_one_step_for_nothing() -> None:
    request = ending_by_itself()
    run = following()
    run.add(request)
    num_followed(run)
    assert len([plan for plan in run.plans if plan.scheduled]) == len(solo(request)[0]) + 1


def test_blocks_of_a_text_that_has_ended_are_free_when_its_last_step_is_answered() -> None:
    run = following()
    run.add(ending_by_itself())
    while run.heard["a"].last is None:
        run.step()
    assert len(run.in_flight) == 1
    status = run.scheduler.status()
    assert status.num_free_blocks < status.num_blocks, "a rank writes there"
    run.receive()
    assert run.scheduler.status().num_free_blocks == status.num_blocks
    run.finish()


def test_the_name_of_a_text_that_ended_in_flight_can_be_given_again() -> None:
    run = following()
    run.add(ending_by_itself())
    while run.heard["a"].last is None:
        run.step()
    run.add(make_request("a", prompt=7, max_tokens=4))
    run.finish()
    assert len(run.text_of("a")) == 4


def test_blocks_are_there_for_the_longest_a_text_can_have_become() -> None:
    """The fake ranks refuse a row without one; here every round accepts what chance gives."""
    for seed in range(30):
        run = Run(make(async_scheduling=True, drafts=4, rows=32), seed=seed)
        run.add(*[make_request(name, prompt=3 + seed % 5, max_tokens=40) for name in "abc"])
        assert num_followed(run) > 5


@pytest.mark.parametrize("kind", ["beam", "dynamic"])
def test_trees_follow_trees(kind: Any) -> None:
    tree = DraftShape(kind=kind, width=3, nodes=6)
    run = following(drafts=3, tree=tree, rows=32)
    run.add(make_request(max_tokens=40))
    assert num_followed(run) > 5
    assert all(only(plan).tree == tree for plan in run.plans[2:6])


def test_no_more_is_drafted_than_may_be_left_to_write() -> None:
    run = following(drafts=4)
    run.worker.chance = AcceptsAll()
    run.add(make_request(prompt=3, max_tokens=12))
    run.send()  # writes one
    run.send()  # four drafts: six at most
    run.receive()
    run.send()  # four drafts: eleven at most
    run.receive()
    run.send()  # one is left then
    assert [only(plan).num_draft_tokens for plan in run.plans] == [0, 4, 4, 0]
    run.finish()


def test_who_comes_is_in_the_next_step_that_is_planned() -> None:
    run = following()
    run.add(make_request("a", max_tokens=30))
    run.step()
    run.step()
    run.add(make_request("b", max_tokens=5))
    assert len(run.in_flight) == 1
    assert not run.scheduler.may_plan, "a step for a alone would keep b waiting"
    run.receive()
    run.step()
    assert names(run.plans[-2]) == ["a", "b"], "and the next follows it"
    assert names(run.plans[-1]) == ["a", "b"]
    run.finish()


def test_who_waits_without_a_seat_holds_up_nothing() -> None:
    run = following(seats=1)
    run.add(make_request("a", max_tokens=20), make_request("b", max_tokens=20))
    run.step()
    assert len(run.in_flight) == 1
    assert num_followed(run) > 20


def test_prompts_that_are_not_read_to_their_end_are_not_followed() -> None:
    run = following(rows=8)
    run.add(make_request(prompt=19, max_tokens=6))
    followed = []
    for _ in range(4):
        run.send()
        followed.append(run.scheduler.may_plan)
        run.receive()
    assert followed == [False, False, True, True]
    run.finish()


def test_without_spare_blocks_a_step_waits_for_the_answer() -> None:
    run = following(num_blocks=6, enable_prefix_caching=False)
    run.add(make_request("a", prompt=4, max_tokens=17), make_request("b", prompt=8, max_tokens=13))
    run.finish()
    assert run.scheduler.status().num_preemptions == 1


@pytest.mark.parametrize(
    ("request_", "limits"),
    [
        (make_request(max_tokens=20, kv_policy="sink_window"), {}),
        (make_request(max_tokens=20, structured_outputs={"regex": "a*"}), {}),
        (make_request(max_tokens=20), {"drafts": 3, "method": "ngram"}),
        (make_request(max_tokens=20), {"drafts": 3, "method": "combined"}),
        (make_request(max_tokens=20), {"drafts": 3, "ahead": True}),
    ],
    ids=["window", "grammar", "ngram", "combined", "ahead"],
)
def test_where_something_hangs_on_the_answer_it_is_waited_for(
    request_: Request, limits: dict[str, Any]
) -> None:
    run = following(**limits)
    run.add(request_)
    for _ in range(5):
        run.send()
        assert not run.scheduler.may_plan
        run.receive()


def test_what_another_engine_waits_for_is_not_followed() -> None:
    run = following(num_slots=2)
    run.add(produce(make_request(prompt=12)))
    run.send()
    assert not run.scheduler.may_plan


def test_a_request_aborted_in_two_steps_is_forgotten_after_both() -> None:
    run = following()
    run.add(make_request("a", prompt=9, max_tokens=50))
    run.send()
    run.send()
    run.abort("a")
    for _ in range(2):
        assert run.scheduler.status().num_free_blocks < 64
        run.receive()
    assert run.scheduler.status().num_free_blocks == 64
    run.finish()


def test_a_crash_counts_once_for_a_request_in_two_steps() -> None:
    run = following()
    run.add(make_request("a", max_tokens=30))
    for count in range(1, GUILTY):
        run.crash()
        (running,) = run.scheduler._requests.values()
        assert running.strikes == count
    run.finish()
    assert len(run.text_of("a")) == 30


# ----------------------------------------------------------------------------- what is learnt of steps


def test_what_is_accepted_is_credited_to_the_way_that_drafted_it() -> None:
    """A tree of eight nodes that is accepted to its depth is no chain of eight that is not."""
    tree = DraftShape(kind="beam", width=3, nodes=8)
    for seed in range(6):
        limits = {"drafts": 3, "adaptive": True, "tree": tree, "rows": 64, "num_blocks": 1000}
        run = Run(make(async_scheduling=True, **limits), seed=seed)
        run.add(make_request(max_tokens=1500))
        run.finish()


def test_a_drafter_that_reads_along_does_not_lag_behind_the_prompt() -> None:
    run = following(drafts=3, rows=64)
    run.add(make_request(prompt=50, max_tokens=20))
    run.send()
    run.send()
    (running,) = run.scheduler._running
    assert running.draft is not None
    assert running.draft.lag == 1
    run.finish()


@pytest.mark.parametrize("overlaps", [False, True])
def test_steps_without_drafts_are_tried_one_at_a_time(overlaps: bool) -> None:
    run = Run(make(async_scheduling=overlaps, drafts=3, adaptive=True, rows=64, num_blocks=300))
    run.worker.chance = AcceptsAll()
    run.add(make_request(max_tokens=800))
    run.finish()
    plain = [plan.step for plan in run.plans if plan.scheduled and not only(plan).num_draft_tokens]
    tried = [step for step in plain if 40 < step < plain[-1] - 2]
    assert len(tried) > 1
    assert all(after - before > 1 for before, after in pairwise(tried))


def test_costs_are_of_rows_that_were_there_though_a_text_has_ended() -> None:
    costs: list[StepCost] = []
    for seed in range(20):
        run = Run(make(async_scheduling=True, drafts=8, adaptive=True, rows=64), seed=seed)
        run.scheduler._drafts.observe = costs.append  # type: ignore[method-assign]
        run.add(ending_by_itself("a"), make_request("b", max_tokens=40))
        run.finish()
    assert any(cost.drafting.num_requests == 1 for cost in costs)
    for cost in costs:
        assert cost.first_rows >= bool(cost.num_passes)
        assert cost.num_accepted <= 8 * cost.drafting.num_requests


def test_nothing_follows_a_step_whose_stages_have_threads_of_their_own() -> None:
    """The way that the batch goes may change while one is in flight."""
    run = Run(make(async_scheduling=True, flights=2, drafts=2, rows=64))
    run.add(make_request(max_tokens=30))
    run.step()
    run.send()
    assert not run.plans[-1].alone
    run.scheduler._drafts.plans_in_flight = 1
    assert not run.scheduler.may_plan
    run.receive()
    run.send()
    assert run.plans[-1].alone
    assert run.scheduler.may_plan
    run.finish()


def test_who_waits_for_blocks_holds_up_nothing() -> None:
    run = following(num_blocks=12, rows=64, enable_prefix_caching=False)
    run.add(make_request("a", prompt=30, max_tokens=14), make_request("b", prompt=20, max_tokens=6))
    run.step()
    assert run.scheduler.status().num_waiting == 1
    followed = sum(len(run.in_flight) == 1 for _ in range(6) if run.step())
    assert followed == 6
    run.finish()

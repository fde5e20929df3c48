"""Two steps in flight, no request in both: halves that stay even, and nothing of a step is touched
before it is answered."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from tests.pure.test_scheduler import Clock, Run, make, make_request, only
from tests.pure.test_scheduler_transfers import pair, produce

from paceline.runtime.schedule.scheduler import GUILTY
from paceline.runtime.types import Event, StepPlan


def flying(**more: Any) -> Run:
    return Run(make(flights=2, **more))


def names(plan: StepPlan) -> set[str]:
    return {each.request_id for each in plan.scheduled}


# ------------------------------------------------------------------------------------------- halves


def test_each_of_two_steps_has_half_of_the_requests() -> None:
    run = flying(rows=64)
    run.add(*[make_request(name, max_tokens=30) for name in "abcd"])
    plans = [run.step() for _ in range(12)]
    assert all(len(plan.scheduled) == 2 for plan in plans)
    for plan, following in pairwise(plans):
        assert not names(plan) & names(following)
    run.finish()


def test_a_request_alone_is_in_one_step_after_the_other() -> None:
    run = flying(drafts=2)
    run.add(make_request(max_tokens=20))
    assert run.send()
    assert not run.send(), "there is nobody for a second one"
    run.receive()
    run.finish()


def test_prompts_are_let_in_by_halves_too() -> None:
    run = flying(rows=64)
    run.add(*[make_request(name, max_tokens=4) for name in "abcde"])
    run.send()
    run.send()
    assert [len(plan.scheduled) for plan in run.plans] == [3, 2]
    run.finish()


def test_halves_become_even_again_when_one_of_them_ends() -> None:
    run = flying(rows=64)
    run.add(*[make_request(name, max_tokens=60) for name in "abcdef"])
    for _ in range(4):
        run.step()
    for name in names(run.plans[-1]):
        run.abort(name)
    sizes = [len(run.step().scheduled) for _ in range(6)]
    assert sizes[-2:] == [2, 1] or sizes[-2:] == [1, 2]
    run.finish()


@pytest.mark.parametrize("count", [2, 3, 7])
def test_everybody_is_in_as_many_steps_as_anybody(count: int) -> None:
    run = flying(rows=64)
    run.add(*[make_request(f"{i}", prompt=3, max_tokens=200) for i in range(count)])
    for _ in range(60):
        run.step()
    taken = Counter(each.request_id for plan in run.plans for each in plan.scheduled)
    assert max(taken.values()) - min(taken.values()) <= 1


def test_texts_that_fight_for_blocks_all_end() -> None:
    for seed in range(10):
        run = Run(make(flights=2, num_blocks=6, drafts=3, rows=5), seed=seed)
        run.add(*(make_request(f"{i}", prompt=6, max_tokens=18) for i in range(3)))
        run.finish(most_steps=300)


# ---------------------------------------------------------------------------------- left in peace


def test_blocks_of_a_request_aborted_in_flight_are_free_when_its_step_is_answered() -> None:
    run = flying()
    run.add(make_request("a", prompt=9, max_tokens=50), make_request("b", prompt=9, max_tokens=50))
    run.send()
    run.send()
    run.abort("a")
    free = run.scheduler.status().num_free_blocks
    run.receive()
    assert run.scheduler.status().num_free_blocks == free + 1, "the others hold a prefix of b's"
    run.step()
    run.step()
    assert "a" not in run.worker.known
    run.finish()


def test_the_name_of_a_request_aborted_in_flight_can_be_given_again() -> None:
    run = flying()
    run.add(make_request("a", prompt=9, max_tokens=5), make_request("b", max_tokens=9))
    run.send()
    run.abort("a")
    run.add(make_request("a", prompt=7, max_tokens=4))
    run.finish()
    assert len(run.text_of("a")) == 4


def test_what_a_step_in_flight_writes_is_found_by_the_next() -> None:
    run = flying(rows=16)
    run.add(make_request("a", prompt=11, max_tokens=3))
    run.send()
    run.add(make_request("b", prompt=11, max_tokens=3))
    run.send()
    assert only(run.plans[-1]).num_cached == 8
    run.finish()


def test_nobody_in_flight_is_preempted_and_the_better_one_goes_first_afterwards() -> None:
    run = flying(num_blocks=6, enable_prefix_caching=False)
    run.add(make_request("a", prompt=4, max_tokens=17), make_request("b", prompt=8, max_tokens=13))
    run.finish()
    assert run.scheduler.status().num_preemptions == 1
    last = run.heard["b"].last
    assert last is not None
    assert last.metrics is not None
    assert Event.PREEMPTED in [kind for kind, _ in last.metrics.events]


def test_the_end_of_a_transfer_waits_for_the_step_that_writes_what_is_sent() -> None:
    both = pair(flights=2)
    both.prefill.add(produce(make_request(prompt=12)))
    assert both.send(both.prefill)
    slots = len(both.prefill.scheduler.transfers._free_slots)
    both.end_producer("t-a", error="lease expired")
    assert len(both.prefill.scheduler.transfers._free_slots) == slots, "its marks are still made"
    assert both.prefill.scheduler.status().num_free_blocks < 64
    both.flush()
    assert len(both.prefill.scheduler.transfers._free_slots) == slots + 1
    assert both.prefill.scheduler.status().num_free_blocks == 64


def test_an_aborted_transfer_is_called_off_when_nothing_is_written_any_more() -> None:
    both = pair(flights=2)
    both.prefill.add(produce(make_request(prompt=40)))
    both.send(both.prefill)
    both.abort("a")
    assert both.links["t-a"].withdrawn is None
    both.flush()
    assert both.links["t-a"].withdrawn == "aborted"


# ------------------------------------------------------------------------------------ crashes, figures


def test_texts_go_on_when_ranks_end_with_two_steps_in_flight() -> None:
    run = flying(drafts=3)
    run.add(*[make_request(name, max_tokens=12) for name in "abc"])
    for _ in range(4):
        run.step()
    run.crash()
    run.finish()
    assert all(heard.last and heard.last.finish_reason == "length" for heard in run.heard.values())


def test_requests_of_both_steps_are_suspected_and_none_of_them_for_long() -> None:
    run = flying()
    run.add(*[make_request(name, max_tokens=30) for name in "abcd"])
    for _ in range(GUILTY - 1):
        run.crash()
    assert {each.strikes for each in run.scheduler._requests.values()} == {GUILTY - 1}
    run.finish()
    assert all(heard.last and heard.last.finish_reason == "length" for heard in run.heard.values())


def test_a_step_s_seconds_are_those_after_the_one_before_it() -> None:
    clock = Clock()
    run = flying(rows=64, clock=clock)
    run.add(*[make_request(name, max_tokens=60) for name in "ab"])
    for _ in range(4):
        run.step()
    run.scheduler.status()
    for _ in range(10):
        run.send()
        clock.now_s += 1.0
        run.receive()
    seconds = [step.seconds for step in run.scheduler.status().steps]
    assert seconds == pytest.approx([1.0] * 10, rel=0.05)


def test_a_request_s_times_are_those_of_the_steps_it_was_in() -> None:
    run = flying(rows=64)
    run.add(*[make_request(name, max_tokens=10) for name in "ab"])
    run.finish()
    for heard in run.heard.values():
        assert heard.last is not None
        assert heard.last.metrics is not None
        assert heard.last.metrics.times.verify_ms == pytest.approx(0.3 * 9)

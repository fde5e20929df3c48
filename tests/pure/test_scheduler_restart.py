"""The ranks end and others take their place: every request goes on after its last token, and the one
that ends them is found."""

from __future__ import annotations

import pytest
from tests.pure.test_scheduler import Run, make, make_request
from tests.pure.test_scheduler_transfers import fetch, pair, produce

from paceline.runtime.schedule.scheduler import CAUTIOUS_S, GUILTY
from paceline.runtime.transfer.messages import Withdraw


@pytest.mark.parametrize("drafts", [0, 3])
def test_texts_go_on_after_their_last_token(drafts: int) -> None:
    run = Run(make(drafts=drafts))
    run.add(*[make_request(name, max_tokens=12) for name in "abc"])
    for _ in range(4):
        run.step()
    written = {name: len(run.text_of(name)) for name in "abc"}
    assert all(written.values())
    run.crash()
    run.finish()
    assert all(len(run.text_of(name)) >= count for name, count in written.items())
    assert all(heard.last and heard.last.finish_reason == "length" for heard in run.heard.values())


def test_they_keep_their_places_in_the_queue() -> None:
    run = Run(make(seats=2))
    run.add(*[make_request(name, max_tokens=8) for name in "abcd"])
    run.step()
    run.crash()
    assert {each.request_id for each in run.step().scheduled} == {"a", "b"}


def test_nothing_is_found_in_the_new_ranks_memory() -> None:
    run = Run(make(num_blocks=64))
    run.add(make_request("a", prompt=12, max_tokens=2))
    run.finish()
    run.crash()
    run.add(make_request("b", prompt=12, max_tokens=2))
    cached = run.worker.cached_tokens
    run.finish()
    assert run.worker.cached_tokens == cached


def test_routers_hear_that_no_prefix_is_there_any_more() -> None:
    p = pair()
    p.prefill.scheduler.add(make_request("a", prompt=12, max_tokens=2))
    for _ in range(3):
        plan = p.prefill.scheduler.schedule()
        p.prefill.scheduler.update(plan, p.prefill.worker.step(plan))
    stored = p.prefill.scheduler.status().stored_blocks
    assert stored
    p.prefill.scheduler.restart(64)
    assert set(p.prefill.scheduler.status().removed_blocks) >= set(stored)


def test_one_request_that_ends_every_step_is_found_and_the_others_live() -> None:
    run = Run(make())
    run.add(*[make_request(name, max_tokens=20) for name in ("good", "bad", "fine")])
    num_crashes = 0
    while run.heard["bad"].last is None:
        plan = run.scheduler.schedule()
        if any(each.request_id == "bad" for each in plan.scheduled):
            num_crashes += 1
            assert num_crashes <= GUILTY
            run.worker.known.clear()
            for delta in run.scheduler.restart(run.scheduler.limits.num_blocks):
                run.heard[delta.request_id].hear(delta)
            continue
        for delta in run.scheduler.update(plan, run.worker.step(plan)):
            run.heard[delta.request_id].hear(delta)
    last = run.heard["bad"].last
    assert last is not None
    assert last.finish_reason == "error"
    assert "not tried again" in str(last.error)
    run.finish()
    for name in ("good", "fine"):
        heard = run.heard[name].last
        assert heard is not None
        assert heard.finish_reason == "length"


def test_crashes_with_tokens_between_them_are_nobodys_fault() -> None:
    run = Run(make())
    run.add(make_request("a", max_tokens=20))
    for _ in range(2 * GUILTY):
        run.step()
        run.step()
        run.crash()
    run.finish()
    last = run.heard["a"].last
    assert last is not None
    assert last.finish_reason == "length"


def test_steps_are_half_as_large_for_a_while_after_memory_ran_out() -> None:
    run = Run(make(rows=16))
    run.add(make_request("a", prompt=40, max_tokens=2))
    run.crash(out_of_memory=True)
    assert run.step().scheduled[0].num_tokens == 8
    run.scheduler._cautious_until_s -= CAUTIOUS_S
    assert run.step().scheduled[0].num_tokens == 16
    run.finish()


def test_what_was_read_for_another_engine_ends_and_frees_its_place() -> None:
    scheduler = pair().prefill.scheduler
    scheduler.add(produce(make_request("a", prompt=20, max_tokens=1)))
    scheduler.schedule()
    (delta,) = scheduler.restart(scheduler.limits.num_blocks)
    assert delta.finish_reason == "error"
    assert scheduler.status().num_free_blocks == scheduler.limits.num_blocks
    (order,) = scheduler.transfers.take_orders()
    assert isinstance(order, Withdraw), "whoever waits for it is told by the new links"
    scheduler.check()


@pytest.mark.parametrize("recompute", [True, False])
def test_what_was_being_fetched_is_read_here_if_it_may(recompute: bool) -> None:
    scheduler = pair().decode.scheduler
    scheduler.add(fetch(make_request("a", prompt=20, max_tokens=3), recompute=recompute))
    scheduler.schedule()
    deltas = scheduler.restart(scheduler.limits.num_blocks)
    scheduler.check()
    assert [delta.finish_reason for delta in deltas] == ([] if recompute else ["error"])
    assert bool(scheduler.schedule().scheduled) == recompute


def test_a_request_that_does_not_fit_into_smaller_ranks_ends() -> None:
    run = Run(make(num_blocks=16))
    run.add(make_request("a", prompt=40, max_tokens=2))
    run.step()
    (delta,) = run.scheduler.restart(4)
    assert "KV blocks" in str(delta.error)
    run.scheduler.check()

"""A request's stages lie end to end on the frontend's clock, whatever the engines' clocks say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fleets import SimEngine, World, make_request

from paceline.actors.router import Member, Router
from paceline.runtime.async_llm import RequestRecord
from paceline.runtime.errors import EngineError
from paceline.runtime.stages import Stage, resumptions, stages
from paceline.runtime.types import (
    EngineRole,
    Event,
    FetchAccount,
    Hop,
    RequestMetrics,
    StageTimes,
    TokenDelta,
)

READ = ((Event.QUEUED, 0.0), (Event.SCHEDULED, 1.0), (Event.FIRST_TOKEN, 3.0))


def account(
    *events: tuple[Event, float], zero_s: float = 0.0, fetch: FetchAccount | None = None
) -> RequestMetrics:
    """An engine's, whose clock reads `zero_s` where its first moment is 0."""
    return RequestMetrics(
        num_prompt_tokens=7,
        num_tokens=5,
        num_cached_tokens=2,
        rounds=3,
        drafted=4,
        accepted=1,
        accepted_at=(),
        times=StageTimes(),
        events=tuple((event, at_s + zero_s) for event, at_s in events),
        fetch=fetch,
    )


def record(*hops: Hop, metrics: RequestMetrics | None = None) -> RequestRecord:
    return RequestRecord(
        request_id="a-0",
        num_prompt_tokens=7,
        arrived_s=100.0,
        finished_s=120.0,
        hops=hops,
        metrics=metrics,
    )


def spans(found: list[Stage]) -> list[tuple[str, float, float]]:
    return [(each.name, each.start_s, each.end_s) for each in found]


@pytest.mark.parametrize("zero_s", [0.0, -5e6, 7.25e6])
def test_an_engine_alone_is_placed_by_its_end_whatever_its_clock_says(zero_s: float) -> None:
    metrics = account(*READ, (Event.FINISHED, 10.0), zero_s=zero_s)
    assert spans(stages(record(metrics=metrics))) == [
        ("queue", 110.0, 111.0),
        ("prefill", 111.0, 113.0),
        ("decode", 113.0, 120.0),
    ]


def test_what_the_account_has_before_the_request_came_is_put_where_it_came() -> None:
    metrics = account(*READ, (Event.FINISHED, 20.5))
    assert spans(stages(record(metrics=metrics)))[0] == ("queue", 100.0, 100.5)


def test_a_prompt_read_elsewhere_has_the_stages_of_both_engines() -> None:
    fetch = FetchAccount(num_tokens=7, num_bytes=900, seconds=3.0, unoverlapped_s=0.5)
    writer = account(
        (Event.QUEUED, 0.0),
        (Event.SCHEDULED, 0.25),
        (Event.FETCHED, 4.0),
        (Event.FIRST_TOKEN, 4.0),
        (Event.FINISHED, 16.0),
        zero_s=-3e5,
        fetch=fetch,
    )
    hop = Hop(
        engine_id="decode-0",
        reader_id="prefill-0",
        policy="conditional",
        asked_s=101.0,
        chosen_s=103.0,
        read_s=107.0,
        read=account(*READ, (Event.FINISHED, 3.0), zero_s=9e5),
        ended_s=119.5,
        metrics=writer,
        num_moved_tokens=6,
    )
    found = stages(record(hop))
    assert spans(found) == [
        ("route", 101.0, 103.0),
        ("queue", 104.0, 105.0),
        ("prefill", 105.0, 107.0),
        ("queue", 103.5, 103.75),
        ("transfer", 103.75, 107.5),
        ("decode", 107.5, 119.5),
    ]
    route, _, prefill, _, transfer, decode = found
    assert route.facts["paceline.route.prefill_engine"] == "prefill-0"
    assert prefill.facts["paceline.engine.id"] == "prefill-0"
    assert transfer.facts["paceline.transfer.bytes"] == 900
    assert transfer.facts["paceline.transfer.from"] == "prefill-0"
    assert decode.facts["paceline.engine.id"] == "decode-0"


def test_a_transfer_that_fails_is_marked_and_the_prompt_is_read_after_it() -> None:
    metrics = account(
        (Event.QUEUED, 0.0),
        (Event.SCHEDULED, 1.0),
        (Event.FETCHED, 4.0),
        (Event.SCHEDULED, 5.0),
        (Event.FIRST_TOKEN, 8.0),
        (Event.FINISHED, 10.0),
        fetch=FetchAccount(num_tokens=7, error="the lease has ended"),
    )
    found = stages(record(metrics=metrics))
    assert [each.name for each in found] == ["queue", "transfer", "queue", "prefill", "decode"]
    assert [each.error for each in found] == [None, "the lease has ended", None, None, None]


def test_preemptions_are_events_of_the_stage_they_fall_into() -> None:
    metrics = account(*READ, (Event.PREEMPTED, 5.0), (Event.SCHEDULED, 7.0), (Event.FINISHED, 10.0))
    *_, decode = stages(record(metrics=metrics))
    assert decode.events == [("preempted", 115.0), ("scheduled", 117.0)]


def test_a_client_that_leaves_first_leaves_no_stages() -> None:
    assert stages(record()) == []


def test_a_request_that_waited_for_its_turn_in_vain_was_only_queued() -> None:
    metrics = account((Event.QUEUED, 0.0), (Event.FINISHED, 2.0))
    assert spans(stages(record(metrics=metrics))) == [("queue", 118.0, 120.0)]


events = st.lists(st.sampled_from(list(Event)), max_size=8)
gaps = st.lists(st.floats(0, 1e3), min_size=8, max_size=8)


@given(events, gaps, st.floats(-1e6, 1e6), st.booleans())
def test_stages_never_overlap_nor_leave_the_request(
    kinds: list[Event], gaps: list[float], zero_s: float, fetches: bool
) -> None:
    moments, at_s = [], zero_s
    for kind, gap_s in zip(kinds, gaps, strict=False):
        at_s += gap_s
        moments.append((kind, at_s))
    fetch = FetchAccount(num_tokens=1) if fetches else None
    found = stages(record(metrics=account(*moments, fetch=fetch)))
    edges = [100.0, *(edge for each in found for edge in (each.start_s, each.end_s)), 120.0]
    assert edges == sorted(edges)
    assert all(each.start_s <= at_s <= each.end_s for each in found for _, at_s in each.events)


# ---------------------------------------------------------------------------------- through a router


def routed(*roles: EngineRole, **settings: Any) -> tuple[World, Router, list[SimEngine]]:
    world = World()
    engines = [SimEngine(world, name=f"{role}-{i}") for i, role in enumerate(roles)]
    members = [Member(each.name, role, each) for role, each in zip(roles, engines, strict=True)]
    settings.setdefault("on_lost", lambda *_: None)
    return world, Router(members, clock=world.clock, **settings), engines


def ended(world: World, router: Router) -> TokenDelta:
    """Let time pass to the end of the one request there is."""
    for _ in range(10_000):
        for delta in router.poll(0.0):
            if delta.finish_reason is not None:
                return delta
        world.advance(0.002)
    raise AssertionError("it does not end")


def seen(delta: TokenDelta, *, arrived_s: float, now_s: float) -> RequestRecord:
    return RequestRecord(
        request_id="a-0",
        num_prompt_tokens=1,
        arrived_s=arrived_s,
        finished_s=now_s,
        hops=delta.hops,
        metrics=delta.metrics,
    )


def test_a_router_tells_which_engines_read_and_wrote_and_why() -> None:
    world, router, _ = routed("prefill", "decode", policy="always")
    arrived_s = world.now_s
    router.submit([make_request("a", 400, max_tokens=20)])
    delta = ended(world, router)
    (hop,) = delta.hops
    assert (hop.engine_id, hop.reader_id, hop.policy) == ("decode-1", "prefill-0", "always")
    found = stages(seen(delta, arrived_s=arrived_s, now_s=world.now_s))
    names = [each.name for each in found]
    assert names == ["route", "queue", "prefill", "queue", "transfer", "decode"]
    by_name = {each.name: each for each in found}
    prefill, decode = by_name["prefill"], by_name["decode"]
    critical_s = (prefill.end_s - arrived_s) + (decode.end_s - decode.start_s)
    travelled_s = decode.start_s - prefill.end_s
    total_s = world.now_s - arrived_s
    assert critical_s + travelled_s == pytest.approx(total_s, abs=0.01)
    assert 0 < travelled_s < total_s / 2


def test_a_request_that_goes_on_elsewhere_has_the_stages_of_both_and_says_so() -> None:
    world, router, engines = routed("decode", "decode", policy="round_robin")
    arrived_s = world.now_s
    router.submit([make_request("a", 64, max_tokens=30)])
    world.advance(0.2)
    router.poll(0.0)
    engines[0].die()
    delta = ended(world, router)
    told = seen(delta, arrived_s=arrived_s, now_s=world.now_s)
    names = [each.name for each in stages(told)]
    assert names == ["route", "lost", "route", "queue", "prefill", "decode"]
    assert "decode-0 was lost" in (stages(told)[1].error or "")
    (resumed,) = resumptions(told)
    assert (resumed.from_engine, resumed.to_engine) == ("decode-0", "decode-1")
    assert delta.hops[0].first_token_s is not None


def test_a_request_that_nobody_takes_was_nowhere() -> None:
    world, router, engines = routed("decode", patience_s=1.0)
    engines[0].die()
    with pytest.raises(EngineError):
        engines[0].poll()
    router.poll(0.0)
    router.submit([make_request("a")])
    world.advance(2.0)
    (delta,) = router.poll(0.0)
    assert (delta.finish_reason, delta.hops) == ("error", ())

"""Latencies are differences of moments, and None where one of the two did not happen."""

from __future__ import annotations

import pytest

from paceline.runtime import events
from paceline.runtime.types import Event, RequestMetrics, StageTimes


def metrics(*moments: tuple[Event, float], num_tokens: int = 5) -> RequestMetrics:
    return RequestMetrics(
        num_prompt_tokens=3,
        num_tokens=num_tokens,
        num_cached_tokens=0,
        rounds=4,
        drafted=0,
        accepted=0,
        accepted_at=(4,),
        times=StageTimes(),
        events=moments,
    )


WHOLE = (
    (Event.QUEUED, 1.0),
    (Event.SCHEDULED, 3.0),
    (Event.FIRST_TOKEN, 7.0),
    (Event.PREEMPTED, 8.0),
    (Event.SCHEDULED, 11.0),
    (Event.FINISHED, 15.0),
)


def test_every_latency_is_a_difference() -> None:
    whole = metrics(*WHOLE)
    assert events.queue_s(whole) == 2.0
    assert events.prefill_s(whole) == 4.0
    assert events.decode_s(whole) == 8.0
    assert events.inference_s(whole) == 12.0
    assert events.time_per_output_token_s(whole) == 2.0


def test_what_did_not_happen_has_no_latency() -> None:
    aborted = metrics(WHOLE[0], (Event.FINISHED, 2.0), num_tokens=0)
    assert events.queue_s(aborted) is None
    assert events.prefill_s(aborted) is None
    assert events.decode_s(aborted) is None
    assert events.inference_s(aborted) is None
    assert events.time_per_output_token_s(aborted) is None


def test_one_token_has_no_time_per_output_token() -> None:
    assert events.time_per_output_token_s(metrics(*WHOLE, num_tokens=1)) is None


def test_the_parts_make_the_whole() -> None:
    whole = metrics(*WHOLE)
    parts = (events.queue_s(whole), events.prefill_s(whole), events.decode_s(whole))
    assert sum(part or 0.0 for part in parts) == WHOLE[-1][1] - WHOLE[0][1]


def test_the_frontend_keeps_its_own_clock() -> None:
    times = events.FrontendTimes(arrived_s=100.0, first_token_s=102.5, sent_s=110.0)
    assert events.time_to_first_token_s(times) == 2.5
    assert events.end_to_end_s(times) == 10.0
    unanswered = events.FrontendTimes(arrived_s=100.0)
    assert events.time_to_first_token_s(unanswered) is None
    assert events.end_to_end_s(unanswered) is None


def test_tokens_that_come_together_share_their_gap() -> None:
    assert events.inter_token_s(previous_s=1.0, now_s=1.6, num_tokens=3) == pytest.approx(0.2)

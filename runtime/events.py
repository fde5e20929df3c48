"""Latencies: every one is the difference of two moments.

    arrived   QUEUED   SCHEDULED        FIRST_TOKEN        FINISHED   sent
       |        |-queue-|----prefill----|-----decode------|            |
       |        |       |-----------inference-------------|            |
       |------------time to first token---------|                      |
       |----------------------------end to end------------------------|

QUEUED to FINISHED are seconds of the coordinator's clock, in `RequestMetrics.events`; arrived, the
first token's sending and the last one's are seconds of the frontend's. Only moments of one clock
are subtracted. A preempted request's second wait counts where it falls, in prefill or decode.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.runtime.types import Event, RequestMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendTimes:
    """One request as its frontend saw it, in seconds of the frontend's monotonic clock."""

    arrived_s: float
    first_token_s: float | None = None
    sent_s: float | None = None
    """When its terminal delta had been passed on."""


def queue_s(metrics: RequestMetrics) -> float | None:
    """From the engine's having it to its first step."""
    return metrics.between(Event.QUEUED, Event.SCHEDULED)


def prefill_s(metrics: RequestMetrics) -> float | None:
    """From its first step to its first token."""
    return metrics.between(Event.SCHEDULED, Event.FIRST_TOKEN)


def decode_s(metrics: RequestMetrics) -> float | None:
    """From its first token to its end."""
    return metrics.between(Event.FIRST_TOKEN, Event.FINISHED)


def inference_s(metrics: RequestMetrics) -> float | None:
    """From its first step to its end."""
    return metrics.between(Event.SCHEDULED, Event.FINISHED)


def time_per_output_token_s(metrics: RequestMetrics) -> float | None:
    """Mean over the tokens after the first; None where there are none."""
    decode = decode_s(metrics)
    return None if decode is None or metrics.num_tokens < 2 else decode / (metrics.num_tokens - 1)


def time_to_first_token_s(times: FrontendTimes) -> float | None:
    """From its arrival to its first token, as the client waits for it."""
    return None if times.first_token_s is None else times.first_token_s - times.arrived_s


def end_to_end_s(times: FrontendTimes) -> float | None:
    """From its arrival to its end, as the client waits for it."""
    return None if times.sent_s is None else times.sent_s - times.arrived_s


def inter_token_s(*, previous_s: float, now_s: float, num_tokens: int) -> float:
    """Of each of `num_tokens` that came together, `previous_s` being when the last ones came."""
    assert num_tokens > 0, f"expected at least one token, found {num_tokens}"
    return (now_s - previous_s) / num_tokens

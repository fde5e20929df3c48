"""A policy says how many blocks are needed, and frees none that is still looked at."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline.runtime.schedule.policy import Full, SinkWindow, make_policies

sizes = st.integers(1, 8)


@given(
    block_size=sizes,
    sink_tokens=sizes,
    window=st.integers(1, 30),
    position=st.integers(0, 200),
)
def test_a_window_is_done_with_just_the_blocks_that_nobody_sees_any_more(
    block_size: int, sink_tokens: int, window: int, position: int
) -> None:
    policy = SinkWindow(block_size=block_size, sink_tokens=sink_tokens, window=window)
    seen = {
        key // block_size
        for query in range(position, position + 3 * window)
        for key in (*range(min(sink_tokens, query)), *range(max(0, query - window + 1), query + 1))
    }
    # what holds any sink position stays, whether a short text has reached it or not
    seen |= {key // block_size for key in range(sink_tokens)}
    done = set(policy.done_with(position))
    assert done == set(range(position // block_size + 1)) - seen


@given(
    block_size=sizes,
    sink_tokens=sizes,
    window=st.integers(1, 30),
    span=st.integers(1, 20),
    steps=st.integers(1, 30),
)
def test_a_window_never_holds_more_than_it_said(
    block_size: int, sink_tokens: int, window: int, span: int, steps: int
) -> None:
    policy = SinkWindow(block_size=block_size, sink_tokens=sink_tokens, window=window)
    for step in range(steps):
        end = (step + 1) * span
        table = -(-end // block_size)
        held = table - len(set(policy.done_with(step * span)) & set(range(table)))
        assert held <= policy.most_blocks(end, span=span)


def test_the_bound_on_a_window_is_reached() -> None:
    policy = SinkWindow(block_size=4, sink_tokens=3, window=6)
    most = max(-(-(first + 1) // 4) - len(policy.done_with(first)) for first in range(100))
    assert most == policy.most_blocks(10**6, span=1) - 0 == 4


def test_full_keeps_everything() -> None:
    policy = Full(block_size=4)
    assert [policy.most_blocks(count, span=1) for count in (1, 4, 5, 400)] == [1, 1, 2, 100]
    assert len(policy.done_with(1000)) == 0


def test_only_full_shares_and_only_full_is_bounded() -> None:
    policies = make_policies(block_size=16, sink_tokens=4, window=32)
    assert {name: p.shares_prefixes for name, p in policies.items()} == {
        "full": True,
        "sink_window": False,
    }
    assert {name: p.bounded_by_context for name, p in policies.items()} == {
        "full": True,
        "sink_window": False,
    }

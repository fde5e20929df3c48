"""Random numbers depend on their arguments alone, and draws follow what they are drawn from."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.runtime.sampling.sampler import Purpose, RoundUniforms, draw, uniform

torch.set_num_threads(1)

LAST_U = 1.0 - 2.0**-53  # the largest number that uniform() can give


def chi2_p_value(observed: list[int], expected: list[float]) -> float:
    chi2 = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    half = torch.tensor([(len(observed) - 1) / 2, chi2 / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_numbers_are_the_same_on_every_machine_and_in_every_release() -> None:
    assert uniform(0, position=0, purpose=Purpose.TOKEN) == 0.04000646557181231
    assert uniform(7, position=123, purpose=Purpose.ACCEPT, lane=2) == 0.6859002466352556
    assert uniform(7, position=123, purpose=Purpose.DRAFT, round_start=120) == 0.09674585790964241


def test_every_argument_matters() -> None:
    seen = {
        uniform(seed, position=position, purpose=purpose, lane=lane)
        for seed, position, purpose, lane in itertools.product(
            (-1, 0, 1, 2**62),
            (0, 1, 256, 131_072),
            (Purpose.TOKEN, Purpose.ACCEPT, Purpose.RESIDUAL),
            (0, 1, 63),
        )
    }
    seen |= {uniform(0, position=9, purpose=Purpose.DRAFT, round_start=start) for start in range(9)}
    assert len(seen) == 4 * 4 * 3 * 3 + 9


def test_only_drafts_are_keyed_by_round() -> None:
    early, late = RoundUniforms(3, 10), RoundUniforms(3, 12)
    for purpose in Purpose:
        same = early(4, purpose=purpose) == late(2, purpose=purpose)
        assert same == (purpose != Purpose.DRAFT)
    with pytest.raises(AssertionError, match="DRAFT and only DRAFT"):
        uniform(0, position=0, purpose=Purpose.DRAFT)
    with pytest.raises(AssertionError, match="DRAFT and only DRAFT"):
        uniform(0, position=0, purpose=Purpose.TOKEN, round_start=0)


def test_depth_1_is_the_position_after_the_committed_tokens() -> None:
    number = RoundUniforms(3, 10)(1, purpose=Purpose.ACCEPT, lane=5)
    assert number == uniform(3, position=10, purpose=Purpose.ACCEPT, lane=5)


@pytest.mark.parametrize("purpose", [Purpose.TOKEN, Purpose.ACCEPT, Purpose.RESIDUAL])
def test_numbers_are_uniform_along_positions_and_along_seeds(purpose: Purpose) -> None:
    for numbers in (
        [uniform(1, position=i, purpose=purpose) for i in range(10_000)],
        [uniform(i, position=1, purpose=purpose) for i in range(10_000)],
    ):
        assert all(0.0 <= u < 1.0 for u in numbers)
        observed = torch.histc(torch.tensor(numbers), bins=50, min=0.0, max=1.0).int().tolist()
        assert chi2_p_value(observed, [200.0] * 50) > 1e-4


def test_draft_and_accept_numbers_of_a_position_are_independent() -> None:
    cells = [0] * 64
    for seed in range(20_000):
        uniforms = RoundUniforms(seed, 5)
        u, v = uniforms(1, purpose=Purpose.DRAFT), uniforms(1, purpose=Purpose.ACCEPT)
        cells[8 * int(8 * u) + int(8 * v)] += 1
    assert chi2_p_value(cells, [20_000 / 64] * 64) > 1e-4


def test_draw_takes_tokens_in_order_of_id() -> None:
    probs = torch.tensor([0.25, 0.5, 0.25])
    assert [draw(probs, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, LAST_U)] == [0, 0, 1, 1, 2, 2]


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 0.1, 0.3, 1.0, 7.0]), min_size=1),
    u=st.one_of(st.floats(0.0, LAST_U), st.sampled_from([0.0, 0.5, LAST_U])),
)
def test_draw_never_takes_a_token_of_probability_zero(weights: list[float], u: float) -> None:
    if any(weights):
        assert weights[draw(torch.tensor(weights), u)] > 0.0


@given(st.lists(st.integers(0, 9), min_size=1).filter(any), st.integers(0, 999))
def test_draw_inverts_the_cumulative_sum_of_unnormalised_weights(
    weights: list[int], thousandth: int
) -> None:
    u = (thousandth + 0.5) / 1000
    target = u * sum(weights)
    slow = next(i for i in range(len(weights)) if sum(weights[: i + 1]) > target)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert draw(torch.tensor(weights, dtype=dtype), u) == slow


def test_draw_reaches_every_token_of_a_large_vocabulary() -> None:
    vocab_size = 131_072
    probs = torch.full((vocab_size,), 1.0 / vocab_size)
    for token_id in (0, 1, 65_535, 131_070, 131_071):
        assert draw(probs, (token_id + 0.5) / vocab_size) == token_id


def test_draws_by_counted_numbers_follow_the_distribution() -> None:
    probs = torch.tensor([0.05, 0.0, 0.5, 0.15, 0.3])
    observed = [0] * 5
    for seed in range(50_000):
        observed[draw(probs, uniform(seed, position=3, purpose=Purpose.TOKEN))] += 1
    assert observed.pop(1) == 0
    assert chi2_p_value(observed, [50_000 * p for p in (0.05, 0.5, 0.15, 0.3)]) > 1e-4


@pytest.mark.parametrize("weights", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_draw_refuses_what_is_no_distribution(weights: list[float]) -> None:
    with pytest.raises(AssertionError, match="positive finite sum"):
        draw(torch.tensor(weights), 0.5)


def test_draw_refuses_a_quantile_of_one() -> None:
    with pytest.raises(AssertionError, match=r"a quantile is in \[0, 1\), found 1.0"):
        draw(torch.tensor([1.0]), 1.0)

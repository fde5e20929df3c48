"""Random numbers depend on their arguments alone, and draws follow what they are drawn from."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.runtime.sampling.sampler import (
    Purpose,
    RoundUniforms,
    _gumbel,
    _noise_of,
    draw,
    draw_coupled,
    gumbel_noise,
    gumbel_noise_at,
    mixed_ids,
    uniform,
)

torch.set_num_threads(1)

CPU = torch.device("cpu")
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
@settings(deadline=None)
def test_draw_never_takes_a_token_of_probability_zero(weights: list[float], u: float) -> None:
    if any(weights):
        assert weights[draw(torch.tensor(weights), u)] > 0.0


@given(st.lists(st.integers(0, 9), min_size=1).filter(any), st.integers(0, 999))
@settings(deadline=None)
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


# -------------------------------------------------------------------------------------------- noise


def uniforms_of(noise: torch.Tensor) -> torch.Tensor:
    """The uniform numbers behind Gumbel noise."""
    return (-(-noise.double()).exp()).exp()


def pairs_p_value(a: torch.Tensor, b: torch.Tensor) -> float:
    """Chi-square of the pairs (a, b), both uniform, over 8 x 8 cells."""
    cells = (8 * a).long().clamp_(max=7) * 8 + (8 * b).long().clamp_(max=7)
    observed = torch.bincount(cells.flatten(), minlength=64).tolist()
    return chi2_p_value(observed, [cells.numel() / 64] * 64)


def test_noise_is_the_same_in_every_release() -> None:
    noise = gumbel_noise([0, -7], [0, 123], vocab_size=5, device=CPU)
    expected = [
        [-0.160886, -0.347289, 1.088574, 4.916747, 0.38308],
        [-0.593107, -0.533604, -0.357477, -1.341571, 2.286856],
    ]
    assert noise.tolist() == [pytest.approx(row, rel=1e-5) for row in expected]


def test_noise_of_an_element_depends_on_seed_position_and_token_alone() -> None:
    for vocab_size in (97, 4_096, 5_001):
        rows = [(seed, position) for seed in (0, 1, -1, 2**62) for position in range(40)]
        seeds, positions = [list(x) for x in zip(*rows, strict=True)]
        noise = gumbel_noise(seeds, positions, vocab_size=vocab_size, device=CPU)
        for row in range(0, len(rows), 13):
            seed, position = rows[row]
            alone = gumbel_noise([seed], [position], vocab_size=vocab_size, device=CPU)
            shorter = gumbel_noise([seed], [position], vocab_size=90, device=CPU)
            ids = torch.randint(
                0, vocab_size, (1, 33), generator=torch.Generator().manual_seed(row)
            )
            some = gumbel_noise_at([seed], [position], ids, vocab_size=vocab_size)
            assert torch.equal(noise[row], alone[0])
            assert torch.equal(noise[row, :90], shorter[0])
            assert torch.equal(noise[row, ids[0]], some[0])


def test_many_rows_equal_few() -> None:
    positions = list(range(300))  # several chunks
    noise = gumbel_noise([5] * 300, positions, vocab_size=1_000, device=CPU)
    again = gumbel_noise([5] * 7, positions[290:297], vocab_size=1_000, device=CPU)
    assert torch.equal(noise[290:297], again)
    assert gumbel_noise([], [], vocab_size=10, device=CPU).shape == (0, 10)


def test_noise_is_finite_even_for_the_outermost_numbers() -> None:
    bits = torch.tensor([0, 1, 2**30, 2**31 - 200, 2**31 - 1], dtype=torch.int32)
    noise = _noise_of(bits, out=torch.empty(5)).tolist()
    assert noise == pytest.approx([22.18, 21.08, 0.3665, -2.78, -2.81], rel=1e-2)
    assert noise == sorted(noise, reverse=True)


@pytest.mark.parametrize("along", ["tokens", "positions", "seeds"])
def test_noise_is_gumbel_distributed_along_every_argument(along: str) -> None:
    count = 100_000
    if along == "tokens":
        noise = gumbel_noise([3], [9], vocab_size=count, device=CPU)
    elif along == "positions":
        noise = gumbel_noise([3] * count, list(range(count)), vocab_size=1, device=CPU)
    else:
        noise = gumbel_noise(list(range(count)), [9] * count, vocab_size=1, device=CPU)
    observed = torch.histc(uniforms_of(noise), bins=100, min=0.0, max=1.0).int().tolist()
    assert sum(observed) == count
    assert chi2_p_value(observed, [count / 100] * 100) > 1e-4


def test_neighbouring_rows_and_tokens_are_independent() -> None:
    seeds = [seed for seed in range(40) for _ in range(40)]
    positions = [position for _ in range(40) for position in range(40)]
    u = uniforms_of(gumbel_noise(seeds, positions, vocab_size=64, device=CPU)).view(40, 40, 64)
    pairs = {
        "seeds": (u[:-1], u[1:]),
        "positions": (u[:, :-1], u[:, 1:]),
        "diagonal": (u[:-1, 1:], u[1:, :-1]),
        "tokens": (u[..., :-1], u[..., 1:]),
        "token and position": (u[:, :-1, 1:], u[:, 1:, :-1]),
    }
    for name, (a, b) in pairs.items():
        assert pairs_p_value(a, b) > 1e-4, name
    assert pairs_p_value(u, u) < 1e-12  # the test would notice


def test_no_bit_of_a_token_id_shows() -> None:
    u = uniforms_of(gumbel_noise([1, 2], [3, 4], vocab_size=2**17, device=CPU))
    ids = torch.arange(2**17)
    for bit in range(17):
        low = ids[(ids >> bit) & 1 == 0]
        assert pairs_p_value(u[:, low], u[:, low | 1 << bit]) > 1e-5, bit


def test_every_token_id_has_a_word_of_its_own() -> None:
    assert len(set(mixed_ids(2**18, CPU).tolist())) == 2**18


def test_rows_whose_first_keys_meet_are_told_apart_by_the_second() -> None:
    ids = mixed_ids(2**16, CPU).unsqueeze(0)
    rows = []
    for key in (1, 2, 1 << 30):
        words = torch.tensor([[key]], dtype=torch.int32)
        rows.append(uniforms_of(_gumbel(ids.clone(), words, out=torch.empty(ids.shape))))
    assert pairs_p_value(rows[0], rows[1]) > 1e-4
    assert pairs_p_value(rows[0], rows[2]) > 1e-4


def test_two_rows_never_share_their_order() -> None:
    # A key that only shifted or flipped ids would give two rows the same noise at other ids.
    noise = gumbel_noise([1] * 64, list(range(64)), vocab_size=4_096, device=CPU)
    assert len(set(noise.flatten().tolist())) > 0.99 * noise.numel()


def test_the_lowest_id_wins_among_equals_and_excluded_tokens_never_win() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0], [float("-inf"), -50.0, float("-inf")]])
    assert draw_coupled(logits, torch.zeros(2, 3)).tolist() == [1, 1]
    ids = torch.tensor([[7, 9, 4], [3, 2, 1]])
    assert draw_coupled(logits, torch.zeros(2, 3), token_ids_RW=ids).tolist() == [4, 2]
    noise = gumbel_noise(list(range(2_000)), [0] * 2_000, vocab_size=3, device=CPU)
    assert set(draw_coupled(logits[1:].expand(2_000, 3), noise).tolist()) == {1}

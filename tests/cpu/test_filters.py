"""The filters equal slow ones that go token by token; impossible parameters are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from paceline.runtime.errors import PromptError
from paceline.runtime.sampling.filters import distribution, validate
from paceline.runtime.types import SamplingParams

torch.set_num_threads(1)


class UndecidedError(Exception):
    """Rounding would decide whether a token is in."""


def slow_distribution(logits: list[float], params: SamplingParams) -> list[float]:
    """One row, in the order and words of the docstring."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))  # most probable first
    if params.temperature == 0.0:
        return [float(i == order[0]) for i in range(len(logits))]
    weight = [math.exp((x - max(logits)) / params.temperature) for x in logits]
    order = [i for i in order if weight[i] >= params.min_p * (1 - 1e-6) and weight[i] > 0.0]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        total = sum(weight[i] for i in order)
        kept: list[int] = []
        reached = 0.0
        for i in order:
            if abs(reached - params.top_p) < 1e-6:
                raise UndecidedError
            if reached < params.top_p:
                kept.append(i)
            reached += weight[i] / total
        order = kept
    total = sum(weight[i] for i in order)
    return [weight[i] / total if i in order else 0.0 for i in range(len(logits))]


def assert_same(logits: torch.Tensor, params: SamplingParams) -> None:
    probs = distribution(logits, params)
    assert probs.dtype == torch.float32
    for row, found in zip(logits.double().tolist(), probs.tolist(), strict=True):
        expected = slow_distribution(row, params)
        assert [p > 0.0 for p in found] == [p > 0.0 for p in expected]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
    top_k=st.integers(-1, 14),
    top_p=st.sampled_from([0.05, 0.3, 0.65, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.07, 0.31, 1.0]),
)
LOGIT = st.one_of(  # quarters make ties; -inf is a token ruled out beforehand
    st.integers(-12, 12).map(lambda i: i / 4), st.sampled_from([-math.inf, 1.0])
)


@st.composite
def batches(draw: st.DrawFn) -> torch.Tensor:
    vocab_size = draw(st.integers(1, 12))
    row = st.lists(LOGIT, min_size=vocab_size, max_size=vocab_size).filter(
        lambda xs: max(xs) > -math.inf
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)), dtype=dtype)  # [P, V]


@given(batches(), PARAMS)
@settings(max_examples=300)
def test_distribution_equals_the_slow_one(logits: torch.Tensor, params: SamplingParams) -> None:
    before = logits.clone()
    try:
        assert_same(logits, params)
    except UndecidedError:
        reject()
    assert torch.equal(logits, before)


@given(batches(), PARAMS)
def test_rows_are_normalised_and_do_not_touch_each_other(
    logits: torch.Tensor, params: SamplingParams
) -> None:
    probs = distribution(logits, params)
    assert probs.sum(dim=-1).tolist() == pytest.approx([1.0] * len(logits), abs=1e-5)
    for i in range(len(logits)):
        alone = distribution(logits[i : i + 1], params)[0]
        assert ((probs[i] > 0) == (alone > 0)).all()
        assert torch.allclose(probs[i], alone, atol=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=1),
        SamplingParams(top_k=300),
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.97),
        SamplingParams(top_p=0.97, temperature=3.0),
        SamplingParams(top_p=0.9, min_p=0.02),
        SamplingParams(top_p=0.9, top_k=40),
        SamplingParams(min_p=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.25, 2.0, 30.0])
def test_wide_windows_and_many_ties_equal_the_slow_distribution(
    params: SamplingParams, spread: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (4 * spread * torch.randn(3, 1_500, generator=generator)).round() / 4
    assert_same(logits, params)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 0.0, 2.0]])
    expected = [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert distribution(logits, SamplingParams(temperature=0.0)).tolist() == expected
    assert distribution(logits, SamplingParams(top_k=1)).tolist() == expected


def test_ties_at_the_top_k_boundary_go_to_the_lowest_ids() -> None:
    logits = torch.zeros(2, 5_000)
    logits[:, 4_000] = 1.0
    probs = distribution(logits, SamplingParams(top_k=4))
    assert probs[0].nonzero().flatten().tolist() == [0, 1, 2, 4_000]
    assert torch.equal(probs[0], probs[1])


def test_top_k_keeps_exactly_k_of_many_equal_tokens() -> None:
    probs = distribution(torch.zeros(1, 5_000), SamplingParams(top_k=700))
    assert probs[0].nonzero().flatten().tolist() == list(range(700))


def test_min_p_comes_before_top_p() -> None:
    # min_p leaves 0.5 and 0.3 of 0.5 0.3 0.2, that is 0.625 and 0.375: the first reaches top_p 0.6.
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    probs = distribution(logits, SamplingParams(min_p=0.5, top_p=0.6))
    assert probs[0, 0] == 1.0
    assert (distribution(logits, SamplingParams(top_p=0.6)) > 0).sum() == 2


def test_no_filter_is_plain_softmax() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    for params in (SamplingParams(), SamplingParams(top_k=-1), SamplingParams(top_k=50)):
        assert torch.equal(distribution(logits, params), logits.softmax(-1))


def test_lowest_temperature_does_not_overflow() -> None:
    params = SamplingParams(temperature=1e-5)
    validate(params)
    assert distribution(torch.tensor([[3e4, 2.9e4, -3e4]]), params).tolist() == [[1.0, 0.0, 0.0]]


def test_ordinary_parameters_are_accepted() -> None:
    validate(SamplingParams())
    validate(SamplingParams(temperature=0.0, top_k=-1, top_p=1e-9, min_p=1.0, seed=-5))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(temperature=-0.1), "temperature must be 0 .* found -0.1"),
        (SamplingParams(temperature=1e-6), "temperature must be 0 .* found 1e-06"),
        (SamplingParams(temperature=math.nan), "temperature must be 0 .* found nan"),
        (SamplingParams(temperature=math.inf), "temperature must be 0 .* found inf"),
        (SamplingParams(top_k=-2), "top_k must be .* found -2"),
        (SamplingParams(top_p=0.0), "top_p must be .* found 0.0"),
        (SamplingParams(top_p=1.1), "top_p must be .* found 1.1"),
        (SamplingParams(top_p=math.nan), "top_p must be .* found nan"),
        (SamplingParams(min_p=-0.1), "min_p must be .* found -0.1"),
        (SamplingParams(min_p=1.5), "min_p must be .* found 1.5"),
        (SamplingParams(min_p=math.nan), "min_p must be .* found nan"),
        (SamplingParams(max_tokens=0), "max_tokens must be at least 1, found 0"),
        (SamplingParams(seed=2**63), "seed must fit in 64 bits"),
        (SamplingParams(stop_token_ids=(5, -3)), "stop_token_ids must not be negative, found -3"),
    ],
)
def test_impossible_parameter_is_refused_in_one_line(params: SamplingParams, message: str) -> None:
    with pytest.raises(PromptError, match=f"^{message}") as caught:
        validate(params)
    assert "\n" not in str(caught.value)

"""The filters equal slow ones that go token by token; impossible parameters are refused."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from paceline.runtime.errors import PromptError
from paceline.runtime.sampling.filters import candidates, distribution
from paceline.runtime.sampling.params import validate
from paceline.runtime.types import SamplingParams, StructuredOutputs

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
@settings(max_examples=300, deadline=None)
def test_distribution_equals_the_slow_one(logits: torch.Tensor, params: SamplingParams) -> None:
    before = logits.clone()
    try:
        assert_same(logits, params)
    except UndecidedError:
        reject()
    assert torch.equal(logits, before)


@given(batches(), PARAMS)
@settings(deadline=None)
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


@st.composite
def mixed_batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[SamplingParams]]:
    sampled = PARAMS.filter(lambda params: not params.greedy)
    params = draw(st.lists(sampled, min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    spread = draw(st.sampled_from([1.0, 8.0, 60.0]))
    return (spread * torch.randn(len(params), 700, generator=generator)).round() / 4, params


@given(mixed_batches())
@settings(max_examples=200, deadline=None)
def test_rows_of_different_requests_have_the_candidates_they_have_alone(
    batch: tuple[torch.Tensor, list[SamplingParams]],
) -> None:
    logits, params = batch
    seen = []
    for part in candidates(logits, params):
        for i, row in enumerate(part.rows):
            seen.append(row)
            (alone,) = candidates(logits[row : row + 1], [params[row]])
            assert (alone.token_ids_RW is None) == (part.token_ids_RW is None)
            dense = torch.full((2, logits.shape[1]), -math.inf)
            for side, (found, of) in enumerate(((part, i), (alone, 0))):
                ids = found.token_ids_RW
                where = torch.arange(logits.shape[1]) if ids is None else ids[of]
                dense[side, where] = found.logits_RW[of]
            assert torch.equal(dense[0], dense[1])  # to the last bit: the drawn token hangs on it
    assert sorted(seen) == list(range(len(logits)))


def test_a_row_that_needs_a_wide_window_comes_apart_from_those_that_do_not() -> None:
    logits = torch.zeros(3, 5_000)
    logits[1] = torch.linspace(30.0, 0.0, 5_000)
    params = [SamplingParams(top_p=p) for p in (0.50005, 0.5, 0.90005)]
    parts = {tuple(part.rows): part for part in candidates(logits, params)}
    assert set(parts) == {(1,), (0, 2)}
    kept = [int((part.logits_RW > -math.inf).sum()) for part in parts.values()]
    assert kept[1] == 2_501 + 4_501


def test_a_low_temperature_leaves_the_noise_its_digits() -> None:
    # 3000 and a little: in fp32 the spacing there is 2e-4, at 0 there is none to speak of.
    logits = torch.tensor([[30.0, 30.0 - 1e-5]], dtype=torch.float64).float()
    (part,) = candidates(logits, [SamplingParams(temperature=0.01)])
    gap = (logits[0, 0].double() - logits[0, 1].double()).item() / 0.01
    assert part.logits_RW[0].tolist() == pytest.approx([0.0, -gap], rel=1e-6)


def test_parameters_are_checked_without_torch() -> None:
    code = (
        "import sys; import paceline.runtime.sampling.params, paceline.runtime.sampling.grammar;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    path = ":".join(entry for entry in sys.path if entry)
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}).returncode == 0


def test_ordinary_parameters_are_accepted() -> None:
    validate(SamplingParams())
    validate(SamplingParams(temperature=0.0, top_k=-1, top_p=1e-9, min_p=1.0, seed=-5))
    validate(SamplingParams(temperature=0.0, n=128, max_tokens=None, min_tokens=9, logprobs=20))
    validate(SamplingParams(presence_penalty=-2.0, frequency_penalty=2.0, repetition_penalty=1e-3))
    validate(SamplingParams(stop="\n", stop_token_ids=(0, 9), logit_bias={0: -100.0, 9: 100.0}))
    validate(SamplingParams(stop=("a",) * 16, prompt_logprobs=0, logit_bias={}), vocab_size=1)
    validate(SamplingParams(logit_bias={9: 1.0}, stop_token_ids=(9,)), vocab_size=10)
    for outputs in (
        StructuredOutputs(json="{}"),
        StructuredOutputs(json_object=True),
        StructuredOutputs(regex="a"),
        StructuredOutputs(choice=("a",)),
        StructuredOutputs(grammar="start: A"),
    ):
        validate(SamplingParams(structured_outputs=outputs))


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
        (SamplingParams(max_tokens=2**31), "max_tokens must be at least 1, found 2147483648"),
        (SamplingParams(min_tokens=-1), "min_tokens must not be negative, found -1"),
        (SamplingParams(min_tokens=17), "min_tokens must be at most max_tokens, 16, found 17"),
        (SamplingParams(top_k=2**40), "top_k must be .* found 1099511627776"),
        (SamplingParams(n=0), "n must be from 1 to 128, found 0"),
        (SamplingParams(n=129), "n must be from 1 to 128, found 129"),
        (SamplingParams(seed=2**63), "seed must fit in 64 bits"),
        (SamplingParams(logprobs=21), "logprobs must be from 0 to 20, found 21"),
        (SamplingParams(logprobs=-1), "logprobs must be from 0 to 20, found -1"),
        (SamplingParams(prompt_logprobs=21), "prompt_logprobs must be .* found 21"),
        (SamplingParams(presence_penalty=2.1), "presence_penalty must be .* found 2.1"),
        (SamplingParams(presence_penalty=math.nan), "presence_penalty must be .* found nan"),
        (SamplingParams(frequency_penalty=-2.1), "frequency_penalty must be .* found -2.1"),
        (SamplingParams(repetition_penalty=0.0), "repetition_penalty must be above 0, found 0.0"),
        (SamplingParams(repetition_penalty=math.inf), "repetition_penalty must .* found inf"),
        (SamplingParams(logit_bias={3: 101.0}), "logit_bias must be .* found 101.0 for token 3"),
        (SamplingParams(logit_bias={3: math.nan}), "logit_bias must be .* found nan for token 3"),
        (SamplingParams(logit_bias={-3: 1.0}), "logit_bias must not name negative .* found -3"),
        (SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0)), "logit_bias .* found 1025"),
        (SamplingParams(stop=("a",) * 17), "stop must have at most 16 strings, found 17"),
        (SamplingParams(stop=("a", "")), "stop must have strings of 1 to .* found one of 0"),
        (SamplingParams(stop="a" * 1025), "stop must have strings of .* found one of 1025"),
        (SamplingParams(stop_token_ids=tuple(range(257))), "stop_token_ids must .* found 257"),
        (
            SamplingParams(structured_outputs=StructuredOutputs()),
            "structured_outputs .* found none",
        ),
        (
            SamplingParams(structured_outputs=StructuredOutputs(json="{}", regex="a")),
            "structured_outputs must have exactly one of .* found json and regex",
        ),
        (
            SamplingParams(structured_outputs=StructuredOutputs(json_object=True, choice=("a",))),
            "structured_outputs must have exactly one of .* found json_object and choice",
        ),
        (
            SamplingParams(structured_outputs=StructuredOutputs(regex="a" * 65_537)),
            "structured_outputs.regex must have 1 to 65536 characters, found 65537",
        ),
        (
            SamplingParams(structured_outputs=StructuredOutputs(choice=())),
            "structured_outputs.choice must have 1 to 1024 texts, found 0",
        ),
        (
            SamplingParams(structured_outputs=StructuredOutputs(choice=("a", ""))),
            "structured_outputs.choice must have no empty text",
        ),
        (
            SamplingParams(structured_outputs=StructuredOutputs(choice=("a" * 999,) * 66)),
            "structured_outputs.choice must have at most 65536 characters, found 65934",
        ),
        (SamplingParams(temperature="hot"), "temperature: expected `float`, got `str`"),  # type: ignore[arg-type]
        (SamplingParams(n=True), "n: expected `int`, got `bool`"),
        (SamplingParams(logit_bias={"3": 1.0}), "logit_bias must be keyed by token ids"),  # type: ignore[dict-item]
        (SamplingParams(structured_outputs={"json": "{}"}), "structured_outputs .* found dict"),  # type: ignore[arg-type]
        (SamplingParams(stop=object()), "sampling parameters must be plain values"),  # type: ignore[arg-type]
        (SamplingParams(stop_token_ids=(5, -3)), "stop_token_ids must not be negative, found -3"),
    ],
)
def test_impossible_parameter_is_refused_in_one_line(params: SamplingParams, message: str) -> None:
    with pytest.raises(PromptError, match=f"^{message}") as caught:
        validate(params)
    assert "\n" not in str(caught.value)


def test_token_ids_beyond_the_vocabulary_are_refused_where_it_is_known() -> None:
    for params in (SamplingParams(logit_bias={10: 1.0}), SamplingParams(stop_token_ids=(1, 10))):
        validate(params)
        with pytest.raises(PromptError, match=r"must name token ids below 10, found 10$"):
            validate(params, vocab_size=10)

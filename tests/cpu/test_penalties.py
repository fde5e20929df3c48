"""Penalties equal slow ones that count tokens one by one, for every row of a chain."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.runtime.sampling.batch import SampleState, is_plain_greedy
from paceline.runtime.sampling.penalties import Penalties, allow_only_
from paceline.runtime.types import Request, SamplingParams, StructuredOutputs

torch.set_num_threads(1)

CPU = torch.device("cpu")
VOCAB = 12


def make_state(
    params: SamplingParams,
    *,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    eos: tuple[int, ...] = (),
    vocab_size: int = VOCAB,
) -> SampleState:
    request = Request(
        request_id="r",
        prompt_token_ids=prompt,
        params=params,
        seed=0,
        max_tokens=100,
        eos_token_ids=eos,
    )
    return SampleState(request, vocab_size=vocab_size, device=CPU, output_token_ids=output)


def slow_row(
    logits: list[float],
    params: SamplingParams,
    *,
    prompt: tuple[int, ...],
    text: tuple[int, ...],
    ends: tuple[int, ...],
) -> list[float]:
    """One row after `text`, in the order and words of the module."""
    row = list(logits)
    for token_id in range(len(row)):
        if len(text) < params.min_tokens and token_id in ends:
            row[token_id] = -math.inf
        row[token_id] += (params.logit_bias or {}).get(token_id, 0.0)
        if token_id in prompt or token_id in text:
            above = row[token_id] > 0
            row[token_id] *= 1 / params.repetition_penalty if above else params.repetition_penalty
        row[token_id] -= params.frequency_penalty * text.count(token_id)
        if token_id in text:
            row[token_id] -= params.presence_penalty
    return row


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=6).map(tuple)
PROMPT = st.lists(st.integers(0, VOCAB + 2), max_size=6).map(tuple)
PARAMS = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.5, 2.0]),
    logit_bias=st.one_of(
        st.none(), st.dictionaries(st.integers(0, VOCAB + 3), st.sampled_from([-9.0, 0.5, 100.0]))
    ),
    min_tokens=st.integers(0, 8),
    stop_token_ids=st.lists(st.integers(0, VOCAB + 3), max_size=2).map(tuple),
)


@given(PARAMS, PROMPT, TOKENS, TOKENS, st.integers(0, 99), st.data())
@settings(max_examples=300, deadline=None)
def test_every_row_of_a_chain_equals_the_slow_one(
    params: SamplingParams,
    prompt: tuple[int, ...],
    output: tuple[int, ...],
    drafts: tuple[int, ...],
    seed: int,
    data: st.DataObject,
) -> None:
    logits = 3 * torch.randn(1 + len(drafts), VOCAB, generator=torch.Generator().manual_seed(seed))
    logits[0, 3] = -math.inf
    # Committed at once, in two parts, or after a preemption: the state is the same.
    cut = data.draw(st.integers(0, len(output)))
    state = make_state(params, prompt=prompt, output=output[:cut], eos=(0,))
    state.commit(output[cut:])
    first = data.draw(st.integers(0, len(drafts)))
    found = logits[first:].clone()
    state.process_(found, drafts=drafts, first=first)
    for row in range(first, len(logits)):
        expected = slow_row(
            logits[row].tolist(),
            params,
            prompt=prompt,
            text=output + drafts[:row],
            ends=(0, *params.stop_token_ids),
        )
        assert found[row - first].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert torch.equal(found, _again(logits, params, prompt, output, drafts, first))


def _again(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: tuple[int, ...],
    output: tuple[int, ...],
    drafts: tuple[int, ...],
    first: int,
) -> torch.Tensor:
    """The same rows, each alone, its drafts committed: bit for bit what plain decoding would do."""
    rows = []
    for row in range(first, len(logits)):
        state = make_state(params, prompt=prompt, output=output + drafts[:row], eos=(0,))
        alone = logits[row : row + 1].clone()
        state.process_(alone, drafts=())
        rows.append(alone)
    return torch.cat(rows)


def test_drafts_that_were_rejected_leave_no_trace() -> None:
    state = make_state(SamplingParams(frequency_penalty=1.0, repetition_penalty=1.5))
    for drafts in ((3, 3, 4), (5,), ()):
        state.process_(torch.zeros(1 + len(drafts), VOCAB), drafts=drafts)
    state.commit((5,))
    logits = torch.ones(1, VOCAB)
    state.process_(logits, drafts=())
    expected = [1.0] * VOCAB
    expected[1], expected[5] = 1 / 1.5, 1 / 1.5 - 1.0
    assert logits[0].tolist() == pytest.approx(expected)


def test_long_texts_are_counted_token_by_token() -> None:
    vocab_size = 1_000
    params = SamplingParams(frequency_penalty=0.5)
    text = tuple(i * i % vocab_size for i in range(900))
    state = make_state(params, output=text[:300], vocab_size=vocab_size)
    for token_id in text[300:]:
        state.commit((token_id,))
    logits = torch.zeros(1, vocab_size)
    state.process_(logits, drafts=())
    assert logits[0].tolist() == [-0.5 * text.count(i) for i in range(vocab_size)]


def test_end_and_stop_tokens_are_banned_until_min_tokens_are_written() -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=(4,))
    state = make_state(params, output=(7,), eos=(0, 99))
    logits = torch.zeros(4, VOCAB)
    state.process_(logits, drafts=(8, 8, 8))
    banned = [sorted((row == -math.inf).nonzero().flatten().tolist()) for row in logits]
    assert banned == [[0, 4], [0, 4], [], []]
    state.commit((8, 8))
    assert not state.processes


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        (SamplingParams(temperature=0.0), True),
        (SamplingParams(temperature=0.0, top_p=0.5, top_k=3, logit_bias={}), True),
        (SamplingParams(), False),
        (SamplingParams(temperature=0.0, presence_penalty=0.1), False),
        (SamplingParams(temperature=0.0, frequency_penalty=0.1), False),
        (SamplingParams(temperature=0.0, repetition_penalty=1.1), False),
        (SamplingParams(temperature=0.0, logit_bias={1: 1.0}), False),
        (SamplingParams(temperature=0.0, min_tokens=1), False),
        (
            SamplingParams(temperature=0.0, structured_outputs=StructuredOutputs(json_object=True)),
            False,
        ),
    ],
)
def test_plain_greedy_is_the_best_of_the_raw_logits(params: SamplingParams, plain: bool) -> None:
    assert is_plain_greedy(params) == plain


def test_requests_without_penalties_keep_no_counts() -> None:
    assert not Penalties.wanted(SamplingParams(logit_bias={1: 1.0}, min_tokens=3))
    assert not make_state(SamplingParams(temperature=0.7)).processes


@given(st.lists(st.one_of(st.none(), st.sets(st.integers(0, 15))), min_size=1, max_size=4))
@settings(deadline=None)
def test_a_mask_lets_through_the_tokens_of_its_bits(masks: list[set[int] | None]) -> None:
    for vocab_size in (9, 16, 20):
        packed = [
            None if ids is None else sum(1 << i for i in ids).to_bytes(2, "little") for ids in masks
        ]
        logits = torch.zeros(len(masks), vocab_size)
        allow_only_(logits, packed)
        for row, ids in zip(logits.tolist(), masks, strict=True):
            allowed = {i for i, x in enumerate(row) if x == 0.0}
            assert allowed == set(range(vocab_size)) & (ids if ids is not None else allowed)
            assert ids is not None or len(allowed) == vocab_size

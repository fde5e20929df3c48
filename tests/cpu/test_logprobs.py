"""Log-probabilities, ranks and best tokens equal those of a plain sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.runtime.sampling import logprobs
from paceline.runtime.sampling.logprobs import token_logprobs

torch.set_num_threads(1)


@given(st.integers(1, 5), st.integers(2, 30), st.integers(0, 99), st.data())
@settings(deadline=None)
def test_logprobs_equal_those_of_a_plain_sort(
    rows: int, vocab_size: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Distinct values, so that there is one right order; ties have their own test.
    order = torch.rand(rows, vocab_size, generator=generator).argsort(-1)
    logits = (order / 3 - 2).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    token_ids = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=rows, max_size=rows))
    num_top = data.draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows))
    before = logits.clone()
    found = token_logprobs(logits, token_ids, num_top=num_top)
    assert torch.equal(logits, before)
    expected = logits.double().log_softmax(-1).tolist()
    for row, token_id, most, got in zip(expected, token_ids, num_top, found, strict=True):
        ranked = sorted(range(vocab_size), key=lambda i: (-row[i], i))
        assert got.token_id == token_id
        assert got.rank == 1 + ranked.index(token_id)
        assert got.logprob == pytest.approx(row[token_id], abs=1e-5)
        assert [i for i, _ in got.top] == ranked[:most]
        assert [x for _, x in got.top] == pytest.approx([row[i] for i in ranked[:most]], abs=1e-5)


def test_among_equals_the_lower_id_ranks_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]] * 4)
    found = token_logprobs(logits, [0, 1, 2, 3], num_top=[4, 0, 0, 2])
    assert [one.rank for one in found] == [4, 1, 2, 3]
    assert [i for i, _ in found[0].top] == [1, 2, 3, 0]
    assert len(found[3].top) == 2
    assert found[1].top == ()


def test_many_rows_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(11, 50, generator=torch.Generator().manual_seed(0))
    token_ids, num_top = list(range(11)), [i % 4 for i in range(11)]
    whole = token_logprobs(logits, token_ids, num_top=num_top)
    monkeypatch.setattr(logprobs, "_CHUNK", 150)
    assert token_logprobs(logits, token_ids, num_top=num_top) == whole


def test_no_rows_give_no_logprobs() -> None:
    assert token_logprobs(torch.empty(0, 9), [], num_top=[]) == []

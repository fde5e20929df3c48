"""Which tokens are proposed side by side: those that will do best in the target's race.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.runtime.sampling.batch import SampleRequest, SampleState, draft_tokens, target_token
from paceline.runtime.sampling.ranking import ERROR_SCALE, likeliest
from paceline.runtime.sampling.sampler import gumbel_noise
from paceline.runtime.types import Request, SamplingParams

torch.set_num_threads(1)

V = 50
CPU = torch.device("cpu")
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 7},
    {"temperature": 0.9, "top_p": 0.7},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.8, "repetition_penalty": 1.5, "frequency_penalty": 0.3},
    {"temperature": 0.0, "presence_penalty": 2.0},
    {"temperature": 0.7, "logit_bias": {3: 4.0, 9: -100.0}},
    {"temperature": 0.0, "min_tokens": 6},
]


def request(
    params: dict[str, Any], *, seed: int = 0, drafts: tuple[int, ...] = ()
) -> SampleRequest:
    wanted = Request(
        request_id="r",
        prompt_token_ids=(1, 2, 3, 4),
        params=SamplingParams(**params),
        seed=seed,
        max_tokens=20,
        eos_token_ids=(5,),
    )
    state = SampleState(wanted, vocab_size=V, device=CPU, output_token_ids=(7, 8))
    return SampleRequest(state=state, drafts=drafts)


def random(*shape: int, seed: int = 0) -> Tensor:
    return 2.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_first_is_the_token_that_would_be_drafted_in_a_chain() -> None:
    """By whatever parameters, mixed in one step, at any depth."""
    requests = [
        request(params, seed=seed, drafts=tuple(range(10, 10 + depth)))
        for seed in range(3)
        for depth in (0, 1, 3)
        for params in PARAMS
    ]
    logits_RV = random(len(requests), V)
    before = logits_RV.clone()
    found = likeliest(logits_RV, requests, num_tokens=4, foresee=True)
    assert [ids[0] for ids, _ in found] == draft_tokens(logits_RV, requests).tolist()
    assert torch.equal(logits_RV, before)


@pytest.mark.parametrize("foresee", [True, False])
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_chances_fall_and_are_of_different_tokens_that_may_be_drawn(
    params: dict[str, Any], foresee: bool
) -> None:
    ((ids, chances),) = likeliest(random(1, V), [request(params)], num_tokens=V, foresee=foresee)
    assert len(set(ids)) == len(ids) == len(chances)
    assert chances == sorted(chances, reverse=True)
    assert sum(chances) == pytest.approx(1.0, abs=1e-5)
    assert len(ids) <= params.get("top_k", V)


def test_tokens_that_are_banned_are_never_proposed() -> None:
    ((ids, _),) = likeliest(
        random(1, V), [request({"temperature": 0.0, "min_tokens": 6})], num_tokens=V, foresee=True
    )
    assert sorted(ids) == [token_id for token_id in range(V) if token_id != 5]


def test_chances_are_those_of_the_race_in_units_of_the_drafter_s_errors() -> None:
    logits_RV = random(2, V)
    hot = request({"temperature": 0.8}, seed=4, drafts=(10, 11))
    found = likeliest(logits_RV, [hot, hot], num_tokens=3, foresee=True)
    noise = gumbel_noise([4], [4 + 2 + 2], vocab_size=V, device=CPU)  # prompt, text, drafts
    for row, (ids, chances) in enumerate(found):
        scores = ((logits_RV[row] + 0.8 * noise[0]) / ERROR_SCALE).softmax(-1)
        best = scores.topk(3)
        assert ids == best.indices.tolist()
        assert chances == pytest.approx(best.values.tolist(), rel=1e-4)


def test_without_foresight_they_are_the_drafter_s_own() -> None:
    logits_RV = random(1, V)
    ((ids, chances),) = likeliest(
        logits_RV, [request({"temperature": 0.8})], num_tokens=3, foresee=False
    )
    best = (logits_RV[0] / 0.8).softmax(-1).topk(3)
    assert ids == best.indices.tolist()
    assert chances == pytest.approx(best.values.tolist(), rel=1e-4)


def test_foresight_proposes_the_target_s_token_more_often() -> None:
    """That is what it is for: three tokens each, of a drafter that errs by half a logit."""
    hits = {True: 0, False: 0}
    for seed in range(200):
        target_V = random(V, seed=seed)
        draft_V = target_V + 0.25 * random(V, seed=1000 + seed)
        hot = request({"temperature": 1.0}, seed=seed)
        own = target_token(target_V, hot)
        for foresee in hits:
            ((ids, _),) = likeliest(draft_V[None], [hot], num_tokens=3, foresee=foresee)
            hits[foresee] += own in ids
    assert hits[True] > 180
    assert hits[False] < 160


def test_a_drafter_of_fewer_tokens_proposes_none_that_it_lacks() -> None:
    ((ids, chances),) = likeliest(
        random(1, V - 9), [request({"temperature": 1.0})], num_tokens=V, foresee=True
    )
    assert sorted(ids) == list(range(V - 9))
    assert min(chances) > 0.0

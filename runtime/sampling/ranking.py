"""Which tokens a drafter should propose side by side: those that the target most likely draws there.

Where the target's token is its race's winner, argmax (log p + noise), the noise is known before the
target has run: both sides race with the same (sampler.py). So the drafter ranks tokens as its own
race ends, by log q + noise, which is as if it drew without replacement from q (Gumbel top-k,
arXiv 1903.06059) with the target's own luck. The `num_tokens` likeliest of q would be right as often
as they have mass under p; these are right wherever target and drafter differ by little.

The chance of each. Say the target's logits are the drafter's plus independent Gumbel errors of scale s:
then the target draws token v with chance softmax((logits + T noise) / s)[v], T being the temperature. With T
= 0 and s = 1 this is the drafter's softmax, which EAGLE-2 (arXiv 2406.16858) takes. Chances decide between
depth and breadth, not between siblings.

Letters: R rows, one per request, V vocabulary, W candidates, K best tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.runtime.sampling.batch import SampleRequest, target_width
from paceline.runtime.sampling.filters import candidates, most_probable, select_rows
from paceline.runtime.sampling.sampler import gumbel_noise, gumbel_noise_at

ERROR_SCALE = 0.6
"""s above. DySpec (arXiv 2410.11744) drafts for a greedy target at temperature 0.6, which is the same.
Of 0.25, 0.4, 0.6 and 1 it accepted most on the embedded pair, dynamic trees of 16 nodes: 3.13 a round
greedily and 2.04 at temperature 0.8, against 2.82 and 1.86 at 1."""

Best = tuple[list[int], list[float]]
"""Tokens, best first, and the chance that the target draws each."""


def likeliest(
    logits_RV: Tensor, requests: Sequence[SampleRequest], *, num_tokens: int, foresee: bool
) -> list[Best]:
    """For each row, at most `num_tokens` tokens to follow a request's text and drafts.

    `logits_RV` are the drafter's, raw. Without `foresee` sampled rows are ranked by q alone: where
    the target does not draw by race.
    """
    logits_RV = target_width(logits_RV, requests).to(torch.float32, copy=True)
    for row, request in enumerate(requests):
        if request.state.processes:
            first = len(request.drafts)
            request.state.process_(logits_RV[row : row + 1], drafts=request.drafts, first=first)
    greedy = [row for row, each in enumerate(requests) if each.state.request.params.greedy]
    found: dict[int, Best] = {}
    if greedy:
        scores_RV = select_rows(logits_RV, greedy) / ERROR_SCALE
        found.update(_best(scores_RV, None, greedy, num_tokens))
    sampled = sorted(set(range(len(requests))) - set(greedy))
    if sampled:
        params = [requests[row].state.request.params for row in sampled]
        for part in candidates(select_rows(logits_RV, sampled), params):
            rows = [sampled[row] for row in part.rows]
            scores_RW = part.logits_RW
            if foresee:
                scores_RW = _foreseen(scores_RW, part.token_ids_RW, [requests[r] for r in rows])
            found.update(_best(scores_RW, part.token_ids_RW, rows, num_tokens))
    return [found[row] for row in range(len(requests))]


def _foreseen(
    logits_RW: Tensor, token_ids_RW: Tensor | None, requests: Sequence[SampleRequest]
) -> Tensor:
    """How each token will do in the target's race, in units of the drafter's errors: `[R, W]`.
    `logits_RW` are over the temperature."""
    states = [request.state for request in requests]
    seeds = [state.request.seed for state in states]
    positions = [each.state.num_committed + len(each.drafts) for each in requests]
    if token_ids_RW is None:
        vocab_size = logits_RW.shape[1]
        noise = gumbel_noise(seeds, positions, vocab_size=vocab_size, device=logits_RW.device)
    else:
        noise = gumbel_noise_at(seeds, positions, token_ids_RW, vocab_size=states[0].vocab_size)
    units = [state.request.params.temperature / ERROR_SCALE for state in states]
    return (logits_RW + noise) * torch.tensor(units, device=logits_RW.device)[:, None]


def _best(
    scores_RW: Tensor, token_ids_RW: Tensor | None, rows: list[int], num_tokens: int
) -> dict[int, Best]:
    count = min(num_tokens, scores_RW.shape[1])
    values_RK, ids_RK = most_probable(scores_RW, num_tokens=count)
    chances_RK = (values_RK - scores_RW.logsumexp(dim=-1, keepdim=True)).exp()
    if token_ids_RW is not None:
        ids_RK = token_ids_RW.gather(-1, ids_RK)
    return {
        row: (ids[:possible], chances[:possible])
        for row, ids, chances, possible in zip(
            rows,
            ids_RK.tolist(),
            chances_RK.tolist(),
            (values_RK > -torch.inf).sum(dim=-1).tolist(),
            strict=True,
        )
    }

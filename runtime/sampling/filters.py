"""From logits to the tokens a row may draw, and how probable each is: temperature, min_p, top_k, top_p.

Rows may belong to requests with different parameters. In vLLM's order, each step working on what the
one before it left, renormalised:

    1. temperature: divide the logits by it;
    2. min_p: drop tokens less probable than min_p times the most probable one;
    3. top_k: keep the k most probable tokens;
    4. top_p: keep the fewest most probable tokens that together reach top_p.

Among equally probable tokens the lower id counts as the more probable, so top_k=1 is greedy and
exactly k tokens are kept. Parameters have passed `params.validate`; logits may hold -inf, not NaN,
and are not modified.

Letters: R rows, P positions of one request, V vocabulary, W window of most probable tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.runtime.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The tokens that some of the rows may draw."""

    rows: list[int]
    """Which rows of the logits these are."""
    logits_RW: Tensor
    """fp32, temperature applied, the best 0, dropped tokens -inf: softmax gives the probabilities."""
    token_ids_RW: Tensor | None
    """The token of each column, int64; None where the columns are the vocabulary."""


def distribution(logits_PV: Tensor, params: SamplingParams) -> Tensor:
    """What the tokens of one request are drawn from: [P, V] in fp32, each row normalised.

    Temperature 0 gives the best token all of it, the one of lowest id among equals.
    """
    if params.greedy:
        best_P1 = logits_PV.argmax(dim=-1, keepdim=True)
        return torch.zeros(logits_PV.shape, device=logits_PV.device).scatter_(-1, best_P1, 1.0)
    probs_PV: Tensor | None = None
    for part in candidates(logits_PV, [params] * len(logits_PV)):
        probs_RW = part.logits_RW.softmax(dim=-1)
        if part.token_ids_RW is None:
            return probs_RW  # rows of one request are all filtered or none
        if probs_PV is None:
            probs_PV = torch.zeros(logits_PV.shape, device=logits_PV.device)
        if len(part.rows) == len(logits_PV):
            return probs_PV.scatter_(-1, part.token_ids_RW, probs_RW)
        rows_R = torch.tensor(part.rows, device=logits_PV.device)
        probs_PV[rows_R] = probs_PV[rows_R].scatter_(-1, part.token_ids_RW, probs_RW)
    assert probs_PV is not None, "expected at least one row"
    return probs_PV


def candidates(logits_RV: Tensor, params_R: Sequence[SamplingParams]) -> Iterator[Candidates]:
    """The tokens each row may draw, in parts that together hold every row once.

    Row r has parameters `params_R[r]`, none of them greedy. Rows without top_k and top_p come with
    the whole vocabulary, the others with a window of their most probable tokens.
    """
    assert not any(params.greedy for params in params_R), "a greedy row draws nothing"
    vocab_size = logits_RV.shape[-1]
    scaled_RV = _scaled(logits_RV, params_R)
    top_k = [params.top_k if 0 < params.top_k < vocab_size else vocab_size for params in params_R]
    windowed = [
        row for row, params in enumerate(params_R) if top_k[row] < vocab_size or params.top_p < 1.0
    ]
    if len(windowed) < len(params_R):
        inside = set(windowed)
        rows = [row for row in range(len(params_R)) if row not in inside]
        yield Candidates(rows=rows, logits_RW=select_rows(scaled_RV, rows), token_ids_RW=None)
    if windowed:
        yield from _most_probable_kept(
            select_rows(scaled_RV, windowed),
            windowed,
            top_k=[top_k[row] for row in windowed],
            top_p=[params_R[row].top_p for row in windowed],
        )


def _scaled(logits_RV: Tensor, params_R: Sequence[SamplingParams]) -> Tensor:
    """Temperature and min_p applied, [R, V] in fp32, the best token of each row at 0.

    At 0, because there fp32 is finest: noise that is added must not be rounded away.
    """
    scaled_RV = logits_RV.float()
    scaled_RV = scaled_RV - scaled_RV.amax(dim=-1, keepdim=True)
    # A column of divisors even where all are equal: division by a scalar may be carried out as a
    # product with its inverse, and a row must not depend on the rows beside it.
    if any(params.temperature != 1.0 for params in params_R):
        scaled_RV.div_(_column([params.temperature for params in params_R], scaled_RV))
    if any(params.min_p > 0.0 for params in params_R):
        floors = [math.log(params.min_p) if params.min_p else -math.inf for params in params_R]
        scaled_RV.masked_fill_(scaled_RV < _column(floors, scaled_RV), -math.inf)
    return scaled_RV


def _most_probable_kept(
    scaled_RV: Tensor, rows: list[int], *, top_k: list[int], top_p: list[float]
) -> Iterator[Candidates]:
    """The tokens that top_k and top_p keep; row i of `scaled_RV` is called `rows[i]`.

    Both keep the first few tokens in order of probability, so a window of the W most probable
    decides, and the vocabulary is not sorted. The window grows for rows where it does not reach:
    under top_p without top_k and a flat distribution, or where very many tokens equal the last one
    kept.
    """
    # Measured in ms on one CPU core, six rows   V = 4,096   V = 131,072
    #   no filter                                  0.02          0.4
    #   min_p alone                                0.05          1.2
    #   top_k = 50, with or without top_p          0.2           0.9-1.8
    #   top_p that keeps fewer than 256            0.3           3-4
    #   top_p that keeps more, up to a full sort   2             30-140
    vocab_size = scaled_RV.shape[-1]
    # Beyond top_k some room for tokens equal to the k-th: bf16 logits often have a few.
    window = max(k + k // 4 + 16 if k < vocab_size else 256 for k in top_k)
    top_k_R1 = torch.tensor(top_k, device=scaled_RV.device).unsqueeze(1)
    top_p_R1 = _column(top_p, scaled_RV, dtype=torch.float64)
    nucleus = any(p < 1.0 for p in top_p)
    whole = any(k == vocab_size for k in top_k)
    while True:
        window = min(vocab_size, window)
        values_RW, token_ids_RW = most_probable(scaled_RV, num_tokens=window)
        rank_W = torch.arange(window, device=scaled_RV.device)
        inside_RW = (rank_W < top_k_R1) & (values_RW > -math.inf)
        num_kept_R1 = inside_RW.sum(dim=-1, keepdim=True)
        if nucleus:
            probs_RW = values_RW.double().exp_()
            total_R1 = (probs_RW * inside_RW).sum(dim=-1, keepdim=True)
            if whole:
                whole_R1 = scaled_RV.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
                total_R1 = torch.where(top_k_R1 == vocab_size, whole_R1, total_R1)
            probs_RW /= total_R1
            before_RW = probs_RW.cumsum(dim=-1) - probs_RW  # the mass of the tokens ahead
            reached_RW = (before_RW < top_p_R1) | (top_p_R1 == 1.0)
            num_kept_R1 = (inside_RW & reached_RW).sum(dim=-1, keepdim=True)
        num_kept_R1.clamp_(min=1)
        kept_RW = torch.where(rank_W < num_kept_R1, values_RW, -math.inf)
        if window == vocab_size:
            yield Candidates(rows=rows, logits_RW=kept_RW, token_ids_RW=token_ids_RW)
            return
        # Which of several equal tokens are kept is known only if the window holds all of them.
        boundary_R1 = values_RW.gather(-1, num_kept_R1 - 1)
        decided = (boundary_R1 > values_RW[:, -1:]).flatten().tolist()
        if all(decided):
            yield Candidates(rows=rows, logits_RW=kept_RW, token_ids_RW=token_ids_RW)
            return
        done = [i for i, settled in enumerate(decided) if settled]
        if done:
            yield Candidates(
                rows=[rows[i] for i in done],
                logits_RW=select_rows(kept_RW, done),
                token_ids_RW=select_rows(token_ids_RW, done),
            )
        left = [i for i, settled in enumerate(decided) if not settled]
        rows = [rows[i] for i in left]
        scaled_RV, top_k_R1, top_p_R1 = (
            select_rows(x, left) for x in (scaled_RV, top_k_R1, top_p_R1)
        )
        window *= 16


def most_probable(logits_RV: Tensor, *, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The largest values and their token ids [R, W], in order of falling value, then of rising id.

    Where the last values are equal to others left out, which ids are in is not defined.
    """
    if num_tokens == logits_RV.shape[-1]:
        values_RW, token_ids_RW = logits_RV.sort(dim=-1, descending=True, stable=True)
        return values_RW, token_ids_RW
    # topk leaves the order of equal values open: put the ids in order first, then sort stably.
    token_ids_RW = logits_RV.topk(num_tokens, dim=-1, sorted=False).indices.sort(dim=-1).values
    values_RW, order_RW = logits_RV.gather(-1, token_ids_RW).sort(
        dim=-1, descending=True, stable=True
    )
    return values_RW, token_ids_RW.gather(-1, order_RW)


def select_rows(x: Tensor, rows: list[int]) -> Tensor:
    """These rows of a tensor, which are in rising order; all of them without a copy."""
    if len(rows) == x.shape[0]:
        return x
    return x.index_select(0, torch.tensor(rows, device=x.device))


def _column(values: list[float], like: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device).unsqueeze(1)

"""Log-probabilities of chosen tokens under the model itself, before any sampling parameter.

Letters: R rows, V vocabulary, W most probable tokens that are reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.runtime.sampling.filters import most_probable
from paceline.runtime.types import TokenLogprobs

# Elements worked on at once: a prompt's rows may be many.
_CHUNK = 2**22


def token_logprobs(
    logits_RV: Tensor, token_ids: Sequence[int], *, num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """For each row what to report of its token, with the `num_top[r]` most probable ones.

    `logits_RV` are raw and are not modified. Among equally probable tokens the lower id ranks first,
    so a greedy token always has rank 1.
    """
    assert len(token_ids) == len(num_top) == len(logits_RV), (
        f"one token and one number per row, found {len(token_ids)} and {len(num_top)} "
        f"for {len(logits_RV)} rows"
    )
    rows = max(1, _CHUNK // logits_RV.shape[1])
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), rows):
        end = start + rows
        found += _chunk(logits_RV[start:end].float(), token_ids[start:end], num_top[start:end])
    return found


def _chunk(
    logits_RV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    vocab_size = logits_RV.shape[1]
    ids_R1 = torch.tensor(token_ids, dtype=torch.int64, device=logits_RV.device).unsqueeze(1)
    total_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    chosen_R1 = logits_RV.gather(1, ids_R1)
    ids_V = torch.arange(vocab_size, device=logits_RV.device)
    ahead_RV = (logits_RV > chosen_R1) | ((logits_RV == chosen_R1) & (ids_V < ids_R1))
    logprobs = (chosen_R1 - total_R1).flatten().tolist()
    ranks = (1 + ahead_RV.sum(dim=-1)).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    window = min(max(num_top), vocab_size)
    if window:
        values_RW, top_ids_RW = most_probable(logits_RV, num_tokens=window)
        values, top_ids = (values_RW - total_R1).tolist(), top_ids_RW.tolist()
        tops = [
            tuple(zip(top_ids[row][:most], values[row][:most], strict=True))
            for row, most in enumerate(num_top)
        ]
    return [
        TokenLogprobs(token_id=token_id, logprob=logprob, rank=rank, top=top)
        for token_id, logprob, rank, top in zip(token_ids, logprobs, ranks, tops, strict=True)
    ]

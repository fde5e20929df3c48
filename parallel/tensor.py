"""Logits over a vocabulary that is split over ranks.

Letters: P rows, V vocabulary entries here, R ranks of the axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.parallel.mesh import Axis


def best(logits_PV: Tensor, *, offset: int, axis: Axis) -> Tensor:
    """The best token of every row over the whole vocabulary, `[P]` int64, the same on every rank.

    Ranks exchange only their own best (value, id) pairs; equal logits go to the lowest id,
    whichever rank holds it.
    """
    assert 0 < logits_PV.shape[1] < 2**24, "expected ids that float32 can carry"
    # argmax names the lowest id among equals
    values_P, ids_P = logits_PV.max(dim=1)
    if axis.size == 1:
        return ids_P + offset
    mine = torch.stack((values_P.float(), (ids_P + offset).float()))  # [2, P]
    all_R = axis.collectives.all_gather(mine)  # [R, 2, P]
    # ranks hold ascending ids, so the first rank among equals holds the lowest id
    rank_P = all_R[:, 0].argmax(dim=0, keepdim=True)  # [1, P]
    return all_R[:, 1].gather(0, rank_P)[0].long()


def gather_vocabulary(logits_PV: Tensor, *, axis: Axis, widths: list[int]) -> Tensor:
    """Full rows from the ranks' parts: `[P, V]` here to float32 `[P, sum(widths)]` on every
    rank."""
    if axis.size == 1:
        return logits_PV.float()
    widest = max(widths)
    padded = torch.zeros(logits_PV.shape[0], widest, device=logits_PV.device)
    padded[:, : logits_PV.shape[1]] = logits_PV
    parts_R = axis.collectives.all_gather(padded)  # [R, P, widest]
    return torch.cat([parts_R[r, :, :width] for r, width in enumerate(widths)], dim=1)

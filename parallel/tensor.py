"""Logits over a vocabulary that is split over ranks.

Letters: P rows, V vocabulary entries here, R ranks of the axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.parallel.mesh import Axis


def best_two(logits_PV: Tensor, *, offset: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """The best token of every row over the whole vocabulary, and by how much its logit leads the
    next one.

    Ranks exchange only their own two best (value, id) pairs; equal logits go to the lowest id,
    whichever rank holds it. Returns ids [P] int64 and margins [P] float32, the same on every rank.
    """
    num_here = logits_PV.shape[1]
    assert 0 < num_here < 2**24, "expected ids that float32 can carry"
    # argmax names the lowest id among equals, which topk does not promise
    values_P, ids_P = logits_PV.max(dim=1)
    if num_here > 1:
        seconds_P = logits_PV.topk(2, dim=1).values[:, 1]
    else:
        seconds_P = torch.full_like(values_P, -torch.inf)
    if axis.size == 1:
        return ids_P + offset, (values_P - seconds_P).float()
    mine = torch.stack(
        (values_P.float(), (ids_P + offset).float(), seconds_P.float()), dim=1
    )  # [P, 3]
    all_R = axis.collectives.all_gather(mine)  # [R, P, 3]
    # ranks hold ascending ids, so the first rank among equals holds the lowest id
    rank_P = all_R[:, :, 0].argmax(dim=0, keepdim=True)  # [1, P]
    best = all_R[:, :, 0].gather(0, rank_P)[0]
    ids = all_R[:, :, 1].gather(0, rank_P)[0].long()
    others = all_R[:, :, 0].scatter(
        0, rank_P, all_R[:, :, 2].gather(0, rank_P)
    )  # the winner's own second
    return ids, best - others.amax(dim=0)


def best_one(logits_1V: Tensor, *, offset: int, axis: Axis) -> Tensor:
    """The best token of a single row, `[1]` int64, the same on every rank: `best_two` without margins.

    It stands between two drafting passes, where every kernel counts.
    """
    value_1, id_1 = logits_1V.max(dim=1)
    if axis.size == 1:
        return id_1 + offset
    all_R = axis.collectives.all_gather(torch.cat((value_1, (id_1 + offset).float())))  # [R, 2]
    return all_R[all_R[:, 0].argmax(), 1:].long()


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

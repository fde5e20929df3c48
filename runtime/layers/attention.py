"""Attention of some rows of one request over its KV region.

Letters: T rows of this pass, S positions they may see, U attention units here, G query heads per
unit, D head width.

The query heads of a unit share a key, so they are folded into rows: one batched product over units,
whatever the number of layers the units come from. That is what lets a group of layers run as one
wide layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 32
"""Up to here masks are cached and scores formed in full; above, as in prompts, the library's fused
kernel."""


class Masks:
    """Additive causal masks, cached by shape: a pass over any position is a slice of one
    template."""

    def __init__(self, *, max_len: int, device: torch.device) -> None:
        self._max_len = max_len
        self._device = device
        self._templates: dict[tuple[int, int, int | None], Tensor] = {}

    def few(self, num_rows: int, *, queries: int, seen: int, window: int | None) -> Tensor | None:
        """`[G*T, S]` for the last `num_rows` of `seen` positions, or None where every row sees
        everything."""
        if num_rows == 1 and (window is None or seen <= window):
            return None
        key = (num_rows, queries, window)
        template = self._templates.get(key)
        if template is None:
            # column c stands for the position c - max_len relative to the first row
            mask = _causal(num_rows, self._max_len + num_rows, window=window, device=self._device)
            template = self._templates[key] = mask.repeat(queries, 1)
        return template[:, template.shape[1] - seen :]

    def many(self, num_rows: int, *, seen: int, window: int | None) -> Tensor:
        """`[T, S]`, made for the occasion."""
        return _causal(num_rows, seen, window=window, device=self._device)


def _causal(num_rows: int, seen: int, *, window: int | None, device: torch.device) -> Tensor:
    """0 where row t, standing at position `seen - num_rows + t`, may look; minus infinity
    elsewhere."""
    row = torch.arange(seen - num_rows, seen, device=device)[:, None]
    column = torch.arange(seen, device=device)[None, :]
    hidden = column > row
    if window is not None:
        hidden = hidden | (column <= row - window)
    return torch.zeros(num_rows, seen, device=device).masked_fill_(hidden, -torch.inf)


def attend(queries_TUGD: Tensor, kv_US2D: Tensor, *, masks: Masks, window: int | None) -> Tensor:
    """Context of every query head, `[U, G, T, D]`. Queries come scaled and rotated; the rows are
    the last T of S."""
    T, U, G, D = queries_TUGD.shape
    keys, values = kv_US2D[:, :, 0], kv_US2D[:, :, 1]  # [U, S, D]
    seen = kv_US2D.shape[1]
    if T <= FEW_ROWS:
        folded = queries_TUGD.permute(1, 2, 0, 3).reshape(U, G * T, D)
        mask = masks.few(T, queries=G, seen=seen, window=window)
        if mask is None:
            scores = torch.bmm(folded, keys.transpose(1, 2))  # [U, G*T, S]
        else:
            scores = torch.baddbmm(mask.to(folded.dtype), folded, keys.transpose(1, 2))
        return torch.bmm(torch.softmax(scores, dim=-1), values).view(U, G, T, D)
    context = F.scaled_dot_product_attention(
        queries_TUGD.permute(1, 2, 0, 3).reshape(1, U * G, T, D),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=masks.many(T, seen=seen, window=window).to(queries_TUGD.dtype),
        scale=1.0,
        enable_gqa=G > 1,
    )
    return context.view(U, G, T, D)

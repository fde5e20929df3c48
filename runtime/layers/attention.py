"""Attention of a packed pass over its paged KV cache: rotate, write, attend.

Letters: T rows of the pass, B segments, R rows of a segment, S positions they may see, U attention
units here, G query heads per unit, D head width, N blocks, I tiles of sixteen tokens in each.

The query heads of a unit share a key, so they are folded into rows: one batched product over units,
whatever the number of layers the units come from. That is what lets a group of layers run as one
wide layer.

Three forms of one computation: a compiled kernel on CPUs; FlashAttention on GPUs, which reads the
pages (`flash.py`); and torch operations over keys and values that are gathered, which serve every
device and every mask and are what the others are tested against. There segments of equally many rows
go together, padded to the longest (`sight.py`). On a device nothing asks the host or tells it
anything, so that a pass may be recorded and played again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.runtime.inputs import Rows
from paceline.runtime.layers.cpu_kernels import load_kernels
from paceline.runtime.layers.flash import attend_pages
from paceline.runtime.layers.fused import fused
from paceline.runtime.layers.rope import Rotation, rotate
from paceline.runtime.layers.sight import Seen, Sight


def attend(
    heads: Tensor,  # [T, U, G+2, D]: query heads, key, value of every unit, not yet rotated
    *,
    rows: Rows,
    group: int,
    units: range,
    window: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Context of every query head, `[T, U*G*D]` in `dtype`. Writes the rows' keys and values.

    `window` is the layers' own sliding window; a segment may bring a narrower one.
    """
    if rows.native is not None:
        kernels = load_kernels()
        assert kernels is not None, "expected compiled kernels behind a native pass"
        return kernels.attend(
            rows.native,
            heads,
            rows.pool.groups[group][:, :, units.start : units.stop],
            queries=heads.shape[2] - 2,
            window=window,
            scale=rows.scale,
            dtype=dtype,
        )
    assert rows.sight is not None, "expected what the rows see, on their device"
    return _attend_torch(heads, rows, rows.sight, group=group, units=units, window=window).to(dtype)


def _attend_torch(
    heads: Tensor, rows: Rows, sight: Sight, *, group: int, units: range, window: int | None
) -> Tensor:
    T, U, G, D = heads.shape[0], heads.shape[1], heads.shape[2] - 2, heads.shape[3]
    pool = rows.pool
    keys, values = (
        pool.keys(group)[units.start : units.stop],
        pool.values(group)[units.start : units.stop],
    )
    # [T, U, G, D] and [T, U, D]
    queries, key = _turned(heads, sight.rotation.cos, sight.rotation.sin, keys.dtype)
    blocks_T, tiles_T, lanes_T = sight.blocks_T, sight.tiles_T, sight.lanes_T
    keys[:, blocks_T, tiles_T, :, lanes_T] = key  # advanced indices apart: [T, U, D]
    values[:, blocks_T, tiles_T, lanes_T] = heads[:, :, G + 1].transpose(0, 1).to(values.dtype)
    if sight.pages is not None:
        keys, values = (part[:, :, units.start : units.stop] for part in pool.pages(group))
        context = attend_pages(
            queries.flatten(1, 2), keys, values, sight.pages, window=window, scale=rows.scale
        )
        return context.flatten(1)
    at_sinks = None
    if sight.sink_rotation is not None:
        at_sinks = rotate(heads[:, :, :G], sight.sink_rotation).to(keys.dtype)
    parts = []
    for seen in sight.batches:
        B, R = seen.shape
        read = (_folded(queries, seen), *_read(keys, values, seen.blocks_BN))
        allowed = seen.allowed(window, queries=G)
        if at_sinks is None:
            mixed = F.scaled_dot_product_attention(*read, attn_mask=allowed, scale=rows.scale)
        else:
            mixed = _mix_with_sinks(
                *read,
                _folded(at_sinks, seen),
                sinks_BS=seen.sinks_BS,
                allowed=allowed,
                scale=rows.scale,
            )
        # [B, U, G*R, D] to [B*R, U, G, D]
        parts.append(mixed.view(B, U, G, R, D).permute(0, 3, 1, 2, 4).reshape(B * R, U * G * D))
    if len(parts) == 1:
        return parts[0]
    context = torch.empty(T, U * G * D, dtype=keys.dtype, device=heads.device)
    for seen, part in zip(sight.batches, parts, strict=True):
        assert seen.rows_BR is not None
        context[seen.rows_BR.flatten()] = part
    return context


def _folded(queries: Tensor, seen: Seen) -> Tensor:
    """`[T, U, G, D]` to `[B, U, G*R, D]`."""
    _, U, G, D = queries.shape
    B, R = seen.shape
    rows = queries.view(B, R, U, G, D) if seen.rows_BR is None else queries[seen.rows_BR]
    return rows.permute(0, 2, 3, 1, 4).reshape(B, U, G * R, D)


def _mix_with_sinks(
    queries: Tensor,  # [B, U, G*R, D]
    keys: Tensor,  # [B, U, S, D]
    values: Tensor,
    at_sinks: Tensor,  # [B, U, G*R, D]
    *,
    sinks_BS: Tensor,
    allowed: Tensor,
    scale: float,
) -> Tensor:
    """Where sinks are looked at by queries that are turned otherwise."""
    turned = keys.transpose(2, 3)
    scores = torch.where(sinks_BS[:, None, None, :], at_sinks @ turned, queries @ turned)
    scores = (scores.float() * scale).masked_fill(~allowed, -torch.inf)
    return torch.softmax(scores, dim=-1).to(values.dtype) @ values


@fused
def _turned(heads: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Query heads and key of `[T, U, G+2, D]`."""
    turned = rotate(heads[:, :, :-1], Rotation(cos=cos, sin=sin)).to(dtype)
    return turned[:, :, :-1].contiguous(), turned[:, :, -1]


@fused
def _read(keys: Tensor, values: Tensor, blocks_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Those of some blocks, `[B, U, S, D]` each: keys `[U, blocks, I, D, 16]` and values
    `[U, blocks, I, 16, D]` at `[B, N]`."""
    key = keys[:, blocks_BN].permute(1, 0, 2, 3, 5, 4)  # from [U, B, N, I, D, 16]
    value = values[:, blocks_BN].transpose(0, 1)
    return key.flatten(2, 4), value.flatten(2, 4)

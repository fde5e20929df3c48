"""Attention of a packed pass over its paged KV cache: rotate, write, attend.

Letters: T rows of the pass, B segments, R rows of a segment, S positions they may see, U attention
units here, G query heads per unit, D head width, N blocks, I tiles of sixteen tokens in each.

The query heads of a unit share a key, so they are folded into rows: one batched product over units,
whatever the number of layers the units come from. That is what lets a group of layers run as one
wide layer.

Two forms of one computation: a compiled kernel on CPUs, and torch operations, which serve every
device and are what the kernel is tested against. Segments of equally many rows go through torch
together, padded to the longest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.runtime.inputs import MOST_NODES, Rows, Segment
from paceline.runtime.kv.pool import TILE, KvPool
from paceline.runtime.layers.cpu_kernels import load_kernels
from paceline.runtime.layers.rope import rotate


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
    return _attend_torch(heads, rows=rows, group=group, units=units, window=window).to(dtype)


def _attend_torch(
    heads: Tensor, *, rows: Rows, group: int, units: range, window: int | None
) -> Tensor:
    T, U, G, D = heads.shape[0], heads.shape[1], heads.shape[2] - 2, heads.shape[3]
    pool, device = rows.pool, heads.device
    keys, values = (
        pool.keys(group)[units.start : units.stop],
        pool.values(group)[units.start : units.stop],
    )
    turned = rotate(heads[:, :, : G + 1], rows.rotation)  # [T, U, G+1, D]
    blocks_T, tiles_T, lanes_T = _slots(rows)
    key = turned[:, :, G].to(keys.dtype)  # [T, U, D]
    keys[:, blocks_T, tiles_T, :, lanes_T] = key  # advanced indices apart: [T, U, D]
    values[:, blocks_T, tiles_T, lanes_T] = heads[:, :, G + 1].transpose(0, 1).to(values.dtype)
    queries = turned[:, :, :G] * rows.scale
    at_sinks = None
    if rows.sink_rotation is not None:
        at_sinks = rotate(heads[:, :, :G], rows.sink_rotation) * rows.scale
    context = torch.empty(T, U, G, D, device=device)
    for num_rows, found in _alike(rows.segments).items():
        starts = torch.tensor([start for start, _ in found], device=device)
        rows_BR = starts[:, None] + torch.arange(num_rows, device=device)  # [B, R]
        segments = [segment for _, segment in found]
        blocks_BN = _gathered(segments, pool, device)  # [B, N]
        key_BUDS, value_BUSD = _read_keys(keys, blocks_BN), _read_values(values, blocks_BN)
        here = queries[rows_BR].permute(0, 2, 3, 1, 4).reshape(len(found), U, G * num_rows, D)
        scores = here.to(keys.dtype) @ key_BUDS  # [B, U, G*R, S]
        hidden, sinks = _hidden(segments, rows.positions[rows_BR], key_BUDS.shape[-1], window)
        if at_sinks is not None:
            there = at_sinks[rows_BR].permute(0, 2, 3, 1, 4).reshape(len(found), U, G * num_rows, D)
            scores = torch.where(sinks[:, None, None, :], there.to(keys.dtype) @ key_BUDS, scores)
        scores = scores.masked_fill(hidden.repeat(1, G, 1)[:, None], -torch.inf)
        mixed = torch.softmax(scores.float(), dim=-1).to(values.dtype) @ value_BUSD
        context[rows_BR] = mixed.float().view(len(found), U, G, num_rows, D).permute(0, 3, 1, 2, 4)
    return context.view(T, -1)


def _slots(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Block, tile in it and place in that of every row, `[T]` each."""
    size, device = rows.pool.block_size, rows.positions.device
    slots = [torch.arange(segment.start, segment.end) for segment in rows.segments]
    blocks = [
        segment.table.ids()[each // size]
        for segment, each in zip(rows.segments, slots, strict=True)
    ]
    offsets_T = torch.cat(slots).to(device) % size
    return torch.cat(blocks).to(device), offsets_T // TILE, offsets_T % TILE


def _alike(segments: Sequence[Segment]) -> dict[int, list[tuple[int, Segment]]]:
    """Segments with the row each begins at, by their number of rows."""
    found: dict[int, list[tuple[int, Segment]]] = defaultdict(list)
    start = 0
    for segment in segments:
        found[segment.num_rows].append((start, segment))
        start += segment.num_rows
    return found


def _gathered(segments: list[Segment], pool: KvPool, device: torch.device) -> Tensor:
    """Block ids `[B, blocks]`, padded with a block that is hidden anyway."""
    width = max(-(-segment.end // pool.block_size) for segment in segments)
    ids = torch.zeros(len(segments), width, dtype=torch.int64)
    for b, segment in enumerate(segments):
        used = -(-segment.end // pool.block_size)
        ids[b, :used] = segment.table.ids()[:used]
    return ids.to(device)


def _read_keys(keys: Tensor, blocks_BN: Tensor) -> Tensor:
    """`[U, blocks, I, D, 16]` at `[B, N]` to `[B, U, D, S]`."""
    found = keys[:, blocks_BN]  # [U, B, N, I, D, 16]
    return found.permute(1, 0, 4, 2, 3, 5).flatten(3)


def _read_values(values: Tensor, blocks_BN: Tensor) -> Tensor:
    """`[U, blocks, I, 16, D]` at `[B, N]` to `[B, U, S, D]`."""
    return values[:, blocks_BN].permute(1, 0, 2, 3, 4, 5).flatten(2, 4)


def _hidden(
    segments: list[Segment], positions_BR: Tensor, num_seen: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """What each row must not see, `[B, R, S]`; and which positions are sinks, `[B, S]`."""
    device = positions_BR.device
    column = torch.arange(num_seen, device=device)
    own = torch.tensor([s.window or num_seen + 1 for s in segments], device=device)[:, None, None]
    sinks = torch.tensor([s.sinks for s in segments], device=device)[:, None]
    if window is not None:
        own = own.clamp(max=window)
    row = positions_BR[..., None]
    far = (column <= row - own) & (column >= sinks[:, None])
    hidden = (column > row) | far
    for b, segment in enumerate(segments):
        if segment.masks:
            latest = min(each for each in (segment.window, window, MOST_NODES) if each)
            masks = [_latest(mask, latest) for mask in segment.masks]
            tree = hidden[b, -len(masks) :, segment.tree_start :]
            tree.copy_(~_bits(masks, width=tree.shape[1], device=device))
    return hidden, column < sinks


def _bits(masks: list[int], *, width: int, device: torch.device) -> Tensor:
    """Bit i of each mask, `[masks, width]`."""
    signed = [mask - (mask >> 63 << 64) for mask in masks]
    words = torch.tensor(signed, dtype=torch.int64, device=device)[:, None]
    column = torch.arange(width, device=device)
    return (words >> column.clamp(max=63) & 1).bool() & (column < 64)


def _latest(mask: int, count: int) -> int:
    """A node's mask without the ancestors that a window of `count` hides: the lowest bits."""
    for _ in range(mask.bit_count() - count):
        mask &= mask - 1
    return mask

"""After a tree was verified, the KV of its accepted path moves to where that of a chain would lie.

    slots       root | a | b | c | d | e        accepted: a, c, d
    after       root | a | c | d | .  .         free space behind them

Keys are stored turned to their position in the text, which for a node is that of the root plus its
depth: the slot it moves to. So a copy is all there is to do, and a node that lies there already,
like every node of a chain, is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.runtime.kv.pool import TILE, BlockTable, KvPool
from paceline.runtime.layers.cpu_kernels import load_kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPath:
    """The rows of one request's tree that stay."""

    table: BlockTable
    tree_start: int
    """The slot of the tree's first row."""
    rows: Sequence[int]
    """Which rows of the tree stay, rising: the first goes to `tree_start`, and so on."""


def compact(pool: KvPool, paths: Sequence[KeptPath], *, native: bool) -> None:
    """Move the kept rows of all requests, in all groups of layers; with the compiled kernel if
    `native`."""
    source: list[int] = []
    target: list[int] = []
    for path in paths:
        moved = [(row, place) for place, row in enumerate(path.rows) if row != place]
        if moved:
            first, end = path.tree_start, path.tree_start + path.rows[-1] + 1
            slots = path.table.slots(first, end, block_size=pool.block_size)
            source += [slots[row] for row, _ in moved]
            target += [slots[place] for _, place in moved]
    if not source:
        return
    if native:
        _move_native(pool, source, target)
    else:
        _move_torch(pool, source, target)


def _move_native(pool: KvPool, source: list[int], target: list[int]) -> None:
    kernels = load_kernels()
    assert kernels is not None, "expected compiled kernels behind a native model"
    source_M, target_M = (torch.tensor(each, dtype=torch.int32) for each in (source, target))
    for blocks in pool.groups:
        kernels.move_rows(
            blocks,
            head_dim=pool.head_dim,
            block_size=pool.block_size,
            source=source_M,
            target=target_M,
        )


def _move_torch(pool: KvPool, source: list[int], target: list[int]) -> None:
    device = pool.groups[0].device
    (a, b, c), (x, y, z) = (
        (slots // pool.block_size, slots % pool.block_size // TILE, slots % TILE)
        for slots in (torch.tensor(each, device=device) for each in (source, target))
    )
    for group in range(len(pool.groups)):
        keys, values = pool.keys(group), pool.values(group)
        # the right-hand sides are copies: a row may move to where another came from
        keys[:, x, y, :, z] = keys[:, a, b, :, c]
        values[:, x, y, z] = values[:, a, b, c]

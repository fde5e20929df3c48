"""The KV cache of one model on one rank: pages, and the table that says which are whose.

    group 0   [blocks, tiles, units, 2*16*D]      one tensor per group of layers
    group 1   [blocks, tiles, units, 2*16*D]
    tile of a unit           | key [D, 16] | value [16, D] |       keys transposed: sixteen of them are one vector
    table of a request       position p lies in block table[p // P], in tile p % P // 16, at p % 16

Sixteen tokens of all units lie side by side, so that a request's KV is read in runs as long as its
blocks.

Letters: P tokens of a block, D head width, U units, I tiles of a block (P / 16).

Rows past a request's length are free space: rejected drafts are forgotten by moving a length, never
by copying.
"""

from __future__ import annotations

import array
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

TILE = 16
"""Tokens that lie transposed together: one vector of float32."""


class KvPool:
    """Tensors for `num_blocks` blocks of `block_size` tokens."""

    def __init__(
        self,
        units: list[int],
        *,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`units[g]` is how many (layer, KV head) pairs group g has on this rank."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.head_dim = head_dim
        assert block_size % TILE == 0, f"expected blocks of whole tiles, found {block_size}"
        shape = (num_blocks, block_size // TILE)
        width = 2 * TILE * head_dim
        self.groups = [
            _zeros((*shape, count, width), dtype=dtype, device=device) for count in units
        ]

    def keys(self, group: int) -> Tensor:
        """`[U, blocks, I, D, 16]`: a view, to read and to write."""
        pages = self.groups[group]
        part = pages[..., : TILE * self.head_dim]
        return part.view(*pages.shape[:3], self.head_dim, TILE).permute(2, 0, 1, 3, 4)

    def values(self, group: int) -> Tensor:
        """`[U, blocks, I, 16, D]`: a view."""
        pages = self.groups[group]
        part = pages[..., TILE * self.head_dim :]
        return part.view(*pages.shape[:3], TILE, self.head_dim).permute(2, 0, 1, 3, 4)

    @property
    def num_bytes(self) -> int:
        return sum(group.numel() * group.element_size() for group in self.groups)


def _zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU, memory that the system hands out page by page when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)


def block_bytes(units: list[int], *, head_dim: int, block_size: int, dtype: torch.dtype) -> int:
    """What one block costs on this rank, over all groups of layers."""
    return sum(units) * 2 * block_size * head_dim * dtype.itemsize


class BlockTable:
    """The blocks of one request, in the order of its positions. It only grows."""

    def __init__(self) -> None:
        self._ids = array.array("i")

    def extend(self, block_ids: Iterable[int]) -> None:
        self._ids.extend(block_ids)

    def __len__(self) -> int:
        return len(self._ids)

    def address(self) -> int:
        """Where its int32 entries lie; until it is extended."""
        return self._ids.buffer_info()[0]

    def ids(self) -> Tensor:
        """`[blocks]` int64."""
        return torch.tensor(self._ids, dtype=torch.int64)

"""KV blocks for tests, scattered over the pool.

A mix-up of positions, blocks and requests would go unnoticed in blocks that are handed out in
order:

    request a   blocks 5, 0, 3        request b   blocks 1, 4        free: 2
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from paceline.runtime.inputs import Segment
from paceline.runtime.kv.pool import BlockTable, KvPool


class ScatteredBlocks:
    """Hands out blocks in an order of its own, each once."""

    def __init__(self, num_blocks: int, *, seed: int = 0) -> None:
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)

    def take(self, count: int) -> list[int]:
        assert 0 <= count <= len(self.free), f"expected {count} free blocks, found {self.free}"
        taken, self.free = self.free[:count], self.free[count:]
        return taken


class Place:
    """Where one request's KV lies: a table that grows with it."""

    def __init__(
        self, blocks: ScatteredBlocks, *, block_size: int = 16, sinks: int = 0, window: int = 0
    ) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._sinks, self._window = sinks, window
        self.table = BlockTable()

    def segment(self, *, start: int, num_rows: int) -> Segment:
        """Rows from position `start` on, with blocks for them."""
        end = start + num_rows
        missing = -(-end // self._block_size) - len(self.table)
        self.table.extend(self._blocks.take(max(0, missing)))
        return Segment(
            num_rows=num_rows, end=end, table=self.table, sinks=self._sinks, window=self._window
        )


def read_kv(pool: KvPool, group: int, table: BlockTable, *, num_rows: int) -> Tensor:
    """Keys and values of the first positions of a request, `[2, units, num_rows, head width]`."""
    blocks_N = table.ids()
    keys = pool.keys(group)[:, blocks_N].transpose(3, 4).flatten(1, 3)  # [U, N*P, D]
    values = pool.values(group)[:, blocks_N].flatten(1, 3)
    return torch.stack((keys, values))[:, :, :num_rows].clone()

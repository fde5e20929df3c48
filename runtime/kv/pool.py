"""The KV cache of one model on one rank.

    group 0   [units, slots, 2, D]       one tensor per group of layers: key and value side by side
    group 1   [units, slots, 2, D]
    slots     |-- region 0 --|-- region 1 --| ...     a request owns one region, position p in its p-th slot

Rows past a request's length are free space: rejected drafts are forgotten by moving a length, never
by copying.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KvPool:
    """Tensors for `num_regions` requests of up to `max_len` tokens."""

    def __init__(
        self,
        units: list[int],
        *,
        head_dim: int,
        num_regions: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`units[g]` is how many (layer, KV head) pairs group g has on this rank."""
        self.max_len = max_len
        self.num_regions = num_regions
        self._groups = [
            torch.zeros(count, num_regions * max_len, 2, head_dim, dtype=dtype, device=device)
            for count in units
        ]

    def region(self, group: int, region: int) -> Tensor:
        """The slots of one request in one group, `[U, max_len, 2, D]`: a view, to read and to
        write."""
        assert 0 <= region < self.num_regions, f"region {region} of {self.num_regions}"
        start = region * self.max_len
        return self._groups[group][:, start : start + self.max_len]

    @property
    def num_bytes(self) -> int:
        return sum(group.numel() * group.element_size() for group in self._groups)

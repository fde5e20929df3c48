"""The KV cache of one model on one rank: pages, and the table that says which are whose.

    group 0   [blocks, tiles, units, 2*16*D]      one tensor per group of layers
    group 1   [blocks, tiles, units, 2*16*D]
    tile of a unit           | key [D, 16] | value [16, D] |       keys transposed: sixteen of them are one vector
    table of a request       position p lies in block table[p // P], in tile p % P // 16, at p % 16

Sixteen tokens of all units lie side by side, so that a request's KV is read in runs as long as its
blocks. That is for CPUs; on GPUs, where libraries read the pages, blocks lie as those expect them:

    group 0   [blocks, 2, P, units, D]            keys, then values

Letters: P tokens of a block, D head width, U units, I tiles of a block (P / 16).

Rows past a request's length are free space: rejected drafts are forgotten by moving a length, never
by copying. Only what is kept of a tree is moved (compact.py).
"""

from __future__ import annotations

import array
import contextlib
import math
import mmap
import os
import weakref
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from paceline.runtime.errors import ConfigError

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
        shared: bool = False,
        scratch: bool = False,
        tiled: bool = True,
    ) -> None:
        """`units[g]` is how many (layer, KV head) pairs group g has on this rank. With `scratch` there
        is one block more, for rows that nobody reads. `tiled` false lays them out for libraries.

        A `shared` pool lies in a memfd, for other processes to map. Raises ConfigError where there
        is none to be had.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.head_dim = head_dim
        assert block_size % TILE == 0, f"expected blocks of whole tiles, found {block_size}"
        assert tiled or not shared, "expected tiles where another engine reads them"
        self.tiled = tiled
        total, num_tiles, width = num_blocks + scratch, block_size // TILE, 2 * TILE * head_dim
        shapes: list[tuple[int, ...]] = [
            (total, num_tiles, count, width) if tiled else (total, 2, block_size, count, head_dim)
            for count in units
        ]
        self.shared: SharedMemory | None = None
        if shared:
            self.shared = SharedMemory([math.prod(s) * dtype.itemsize for s in shapes], device)
            self.groups = [
                torch.from_numpy(part).view(dtype).view(s)
                for part, s in zip(self.shared.parts, shapes, strict=True)
            ]
        else:
            self.groups = [_zeros(s, dtype=dtype, device=device) for s in shapes]

    def keys(self, group: int) -> Tensor:
        """`[U, blocks, I, D, 16]`: a view, to read and to write."""
        if not self.tiled:
            return _in_tiles(self.pages(group)[0]).transpose(3, 4)
        pages = self.groups[group]
        part = pages[..., : TILE * self.head_dim]
        return part.view(*pages.shape[:3], self.head_dim, TILE).permute(2, 0, 1, 3, 4)

    def values(self, group: int) -> Tensor:
        """`[U, blocks, I, 16, D]`: a view."""
        if not self.tiled:
            return _in_tiles(self.pages(group)[1])
        pages = self.groups[group]
        part = pages[..., TILE * self.head_dim :]
        return part.view(*pages.shape[:3], TILE, self.head_dim).permute(2, 0, 1, 3, 4)

    def pages(self, group: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a pool without tiles, `[blocks, P, U, D]` each: views."""
        assert not self.tiled, "expected blocks as libraries read them"
        keys, values = self.groups[group].unbind(1)
        return keys, values

    @property
    def scratch_slot(self) -> int:
        """The first of the scratch block, of a pool that has one."""
        assert len(self.groups[0]) > self.num_blocks, "expected a pool with a scratch block"
        return self.num_blocks * self.block_size

    @property
    def memfd(self) -> int:
        """Of a shared pool. Whoever maps it needs `mapped_bytes` of it, and `shared.offsets`."""
        assert self.shared is not None, "expected a shared pool"
        return self.shared.fd

    @property
    def mapped_bytes(self) -> int:
        assert self.shared is not None, "expected a shared pool"
        return self.shared.num_bytes

    @property
    def num_bytes(self) -> int:
        return sum(group.numel() * group.element_size() for group in self.groups)


def _in_tiles(pages: Tensor) -> Tensor:
    """`[blocks, P, U, D]` as `[U, blocks, I, 16, D]`: a view."""
    blocks, size, units, width = pages.shape
    return pages.view(blocks, size // TILE, TILE, units, width).permute(3, 0, 1, 2, 4)


class SharedMemory:
    """A pool's memory as a memfd: a file that no file system has, gone with the last process that
    maps it."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        """One part for each group of so many bytes, each on pages of its own."""
        if device.type != "cpu":
            raise ConfigError(
                f"KV in the memory of {device} cannot be sent to another engine: nothing copies it to "
                "shared memory yet; run with device cpu, or without kv_transfer_config"
            )
        self.offsets: list[int] = []
        self.num_bytes = 0
        for size in sizes:
            self.offsets.append(self.num_bytes)
            self.num_bytes += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if not hasattr(os, "memfd_create"):
            raise ConfigError(
                "KV can be sent to another engine from Linux only: there is no memfd here"
            )
        self.fd = os.memfd_create("paceline-kv", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        self.num_bytes = max(self.num_bytes, mmap.PAGESIZE)  # a rank may hold nothing
        os.ftruncate(self.fd, self.num_bytes)
        memory = mmap.mmap(self.fd, self.num_bytes)
        with contextlib.suppress(OSError):  # kernels without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(memory, dtype=np.uint8)
        self.parts = [whole[at : at + size] for at, size in zip(self.offsets, sizes, strict=True)]


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

    def slots(self, start: int, end: int, *, block_size: int) -> list[int]:
        """Where in the pool its positions from `start` to `end` lie: block times `block_size` plus
        place in it."""
        assert 0 <= start <= end <= len(self._ids) * block_size, (
            f"expected positions within {len(self._ids)} blocks, found {start} to {end}"
        )
        return [
            self._ids[position // block_size] * block_size + position % block_size
            for position in range(start, end)
        ]

    def first(self, count: int) -> list[int]:
        """The ids of its first blocks."""
        return self._ids[:count].tolist()

    def ids(self) -> Tensor:
        """`[blocks]` int64."""
        return torch.tensor(self._ids, dtype=torch.int64)

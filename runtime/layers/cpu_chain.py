"""From token to token of a small model on a CPU: its ends around its layers in one call, and drafts
that follow one another in one: `cpu_chain.h`.

Between two drafts of a small model, Python takes longer than the model does. What is drawn here is the
best token, or the winner of a race at some temperature, with the noise of `sampling/sampler.py` but for
the last bits of its logarithms: drafts may be off by that, texts may not.
"""

from __future__ import annotations

import ctypes
import dataclasses
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paceline.runtime.layers.cpu_kernels import load_kernels
from paceline.runtime.layers.cpu_pass import FORMS, Form, SmallPasses
from paceline.runtime.sampling.sampler import row_keys

if TYPE_CHECKING:
    from paceline.runtime.kv.pool import BlockTable, KvPool
    from paceline.runtime.layers.rope import RopeTable


class _Chain(ctypes.Structure):
    _fields_ = (
        ("num_requests", ctypes.c_int32),
        ("num_depths", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("form", ctypes.c_int32),
        ("counts", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
    )


STRUCT_BYTES = ctypes.sizeof(_Chain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """How a request's tokens are drawn."""

    seed: int
    temperature: float
    """0 for the best token."""
    position: int
    """Of the first that is drawn."""

    def after(self) -> Drawn:
        """How the next one is."""
        return dataclasses.replace(self, position=self.position + 1)


BEST = Drawn(seed=0, temperature=0.0, position=0)
"""The best token."""


class SmallChains:
    """Tokens from a model whose passes are one call."""

    def __init__(self, passes: SmallPasses, pool: KvPool, rope: RopeTable) -> None:
        kernels = load_kernels()
        assert kernels is not None, "expected compiled kernels behind packed weights"
        dtypes = (passes.dtype, pool.groups[0].dtype)
        self._choose, self._chain = kernels.form("choose", *dtypes), kernels.form("chain", *dtypes)
        self._team = kernels.team
        self._passes, self._pool, self._rope = passes, pool, rope

    @property
    def most_rows(self) -> int:
        return self._passes.most_rows

    def reaches(self, position: int) -> bool:
        """Whether a token at this position can be fed."""
        return position < self._rope.num_ready

    def choose(self, h_BE: Tensor, draws: Sequence[Drawn]) -> list[int]:
        """The token that each row draws, the same on every rank; `h_BE`, before the final norm, is
        changed."""
        factors, keys = _factors(draws), _keys(draws, num_depths=1)
        token_ids = array("i", bytes(4 * len(draws)))
        self._choose(
            self._team(),
            self._passes.address,
            self._passes.ends_address,
            len(draws),
            h_BE.data_ptr(),
            _address(factors),
            keys.data_ptr(),
            _address(token_ids),
        )
        self._passes.check()
        return token_ids.tolist()

    def draft_on(
        self,
        token_ids: Sequence[int],
        draws: Sequence[Drawn],
        tables: Sequence[BlockTable],
        counts: Sequence[int],
        form: Form,
    ) -> list[list[int]]:
        """From each request's latest draft `counts` more, by request, the same on every rank. Draft i
        is fed at the position at which it was drawn, `draws[i].position` - 1. Requests that want fewer
        come later."""
        num, most = len(token_ids), counts[0]
        for table, draw, count in zip(tables, draws, counts, strict=True):
            assert draw.position - 1 + count <= len(table) * self._pool.block_size, (
                f"expected rows within the blocks, found {count} from {draw.position - 1} in {len(table)}"
            )
        positions = array("i", [draw.position - 1 for draw in draws])
        wanted, addresses = array("i", counts), array("Q", [table.address() for table in tables])
        factors, keys = _factors(draws), _keys(draws, num_depths=most)
        told = array("i", [*token_ids, *[0] * (most * num)])
        ready = self._rope.ready
        chain = _Chain(
            num,
            most,
            self._pool.block_size,
            self._pool.head_dim,
            FORMS[form],
            _address(wanted),
            _address(positions),
            _address(addresses),
            ready.cos.data_ptr(),
            ready.sin.data_ptr(),
            _address(factors),
            keys.data_ptr(),
            _address(told),
        )
        self._chain(
            self._team(), self._passes.address, self._passes.ends_address, ctypes.addressof(chain)
        )
        self._passes.check()
        return [
            [told[num * depth + i] for depth in range(1, 1 + count)]
            for i, count in enumerate(counts)
        ]


def _factors(draws: Sequence[Drawn]) -> array[float]:
    return array("f", [1.0 / draw.temperature if draw.temperature else 0.0 for draw in draws])


def _keys(draws: Sequence[Drawn], *, num_depths: int) -> Tensor:
    """`[depths, requests, 2]`."""
    if not any(draw.temperature for draw in draws):
        return torch.zeros(num_depths * len(draws) * 2, dtype=torch.int32)
    return row_keys(
        [draw.seed for _ in range(num_depths) for draw in draws],
        [draw.position + depth for depth in range(num_depths) for draw in draws],
        torch.device("cpu"),
    )


def _address(values: array[int] | array[float]) -> int:
    return values.buffer_info()[0]

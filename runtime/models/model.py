"""A decoder together with what its passes need: KV pool, rotations, masks."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.runtime.inputs import Rows
from paceline.runtime.kv.pool import KvPool
from paceline.runtime.layers.attention import Masks
from paceline.runtime.layers.rope import RopeTable
from paceline.runtime.models.llama import Decoder


class Model:
    """One model on one rank, ready to run rows of requests."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_regions: int,
        max_len: int,
        kv_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.decoder = decoder
        self.device = device
        self.pool = KvPool(
            [len(group.shard.units) for group in decoder.groups],
            head_dim=decoder.arch.head_dim,
            num_regions=num_regions,
            max_len=max_len,
            dtype=kv_dtype,
            device=device,
        )
        self._table = RopeTable(decoder.arch, max_len=max_len, device=device)
        self._masks = Masks(max_len=max_len, device=device)
        self._queries = {group.queries for group in decoder.groups}

    def describe(self) -> str:
        """Data type and memory, for a person."""
        dtype = str(self.decoder.groups[0].dtype).removeprefix("torch.")
        return f"{dtype}, KV {self.pool.num_bytes / 2**20:.0f} MiB"

    def tokens(self, token_ids: list[int]) -> Tensor:
        """`[T]` int64 on the model's device."""
        return torch.tensor(token_ids, dtype=torch.int64, device=self.device)

    def rows(self, token_ids_T: Tensor, *, start: int, region: int) -> Rows:
        """Consecutive tokens of one request, the first at position `start`."""
        num_tokens = token_ids_T.shape[0]
        assert start + num_tokens <= self.pool.max_len, (
            f"expected rows within {self.pool.max_len}, found {start}+{num_tokens}"
        )
        rotations = {
            queries: self._table.rotation(start, num_tokens=num_tokens, queries=queries)
            for queries in self._queries
        }
        return Rows(
            token_ids=token_ids_T,
            start=start,
            region=region,
            rotations=rotations,
            masks=self._masks,
            pool=self.pool,
        )

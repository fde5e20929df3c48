"""A decoder together with what its passes need: a KV pool and rotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paceline.runtime.inputs import Rows, Segment, pack
from paceline.runtime.kv.compact import KeptPath, compact
from paceline.runtime.kv.pool import KvPool
from paceline.runtime.layers.cpu_chain import SmallChains
from paceline.runtime.layers.cpu_kernels import load_kernels, supports
from paceline.runtime.layers.cpu_pass import SmallPasses
from paceline.runtime.layers.rope import RopeTable
from paceline.runtime.models.graphs import GraphedPasses, Recorder
from paceline.runtime.models.llama import Decoder


class Model:
    """One model on one rank, ready to run rows of requests."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        max_len: int,
        kv_dtype: torch.dtype,
        device: torch.device,
        use_kernels: bool = True,
        shared: bool = False,
        record: Recorder | None = None,
        attention: str = "",
    ) -> None:
        """`use_kernels` false computes with torch alone, on a CPU too. With `shared`, other processes
        may map the pool. `record` is what records passes of few rows, to play them again. `attention`
        names a library that reads pages (`layers/flash.py`); none, and keys and values are gathered."""
        self.decoder = decoder
        self.device = device
        self.attention = attention
        self.pool = KvPool(
            units_of(decoder),
            head_dim=decoder.arch.head_dim,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=kv_dtype,
            device=device,
            shared=shared,
            scratch=record is not None,
            tiled=shared or (device.type == "cpu" and not attention),
        )
        dtypes = {group.dtype for group in decoder.groups}
        self._native = (
            use_kernels
            and not attention
            and supports(device, kv_dtype, *dtypes, head_dim=decoder.arch.head_dim)
            and load_kernels() is not None
        )
        self._rope = RopeTable(decoder.arch, max_len=max_len, device=device)
        self._scale = decoder.arch.head_dim**-0.5
        self.graphs: GraphedPasses | None = None
        """Passes that were recorded."""
        if record is not None and not self._native:
            self.graphs = GraphedPasses(
                self.pool,
                rope=self._rope,
                scale=self._scale,
                device=device,
                record=record,
                pages=bool(attention),
            )
        packed = [group.packed for group in decoder.groups if group.packed is not None]
        self._small = None
        self.chains: SmallChains | None = None
        """What drafts several tokens in one call, where a pass is one."""
        if self._native and packed:
            self._small = SmallPasses(
                packed,
                self.pool,
                ends=decoder.packed_ends(),
                axis=decoder.axis,
                width=decoder.arch.hidden_size,
                eps=decoder.arch.norm_eps,
                scale=self._scale,
            )
            if self._small.runs_whole:
                self.chains = SmallChains(self._small, self.pool, self._rope)

    @property
    def is_small(self) -> bool:
        """Whether passes are one call, and leave torch little to do."""
        return self._small is not None

    def describe(self) -> str:
        """Data type and memory, for a person."""
        dtype = str(self.decoder.groups[0].dtype).removeprefix("torch.")
        attention = f", attention {self.attention}" if self.attention else ""
        return f"{dtype}, KV {self.pool.num_bytes / 2**20:.0f} MiB{attention}"

    def tokens(self, token_ids: list[int]) -> Tensor:
        """`[T]` int64 on the model's device."""
        return torch.tensor(token_ids, dtype=torch.int64, device=self.device)

    def rows(
        self,
        token_ids_T: Tensor,
        segments: Sequence[Segment],
        *,
        written: Callable[[int], None] | None = None,
    ) -> Rows:
        """A packed pass over `token_ids_T`, segment after segment. `written` is told of each layer
        whose keys and values are in the pool."""
        play = None
        if self.graphs is not None and written is None:
            play = self.graphs.fit(segments)
        return pack(
            token_ids_T,
            segments,
            pool=self.pool,
            rope=self._rope,
            scale=self._scale,
            native=self._native,
            pages=bool(self.attention),
            small=self._small,
            play=play,
            written=written,
        )

    def keep(self, paths: Sequence[KeptPath]) -> None:
        """Of trees that were verified, keep these rows' keys and values, as if they had been
        chains."""
        compact(self.pool, paths, native=self._native)


def units_of(decoder: Decoder) -> list[int]:
    """(layer, KV head) pairs of each group on this rank."""
    return [len(group.shard.units) for group in decoder.groups]

"""KV links for tests: ranks with pools of random KV and a board, in memory that can be shared.

produced = Side(num_ranks=2, seed=1)      what a prompt's KV shall be, and its ranks' pools
produced.raise_marks(...)                 as model loops would
consumer side.read(r)                     what lies in rank r's blocks, in wire order
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.runtime.config import KvTransferConfig
from paceline.runtime.tls import TlsFiles
from paceline.runtime.transfer.board import Board
from paceline.runtime.transfer.consumer import Consumer
from paceline.runtime.transfer.layout import (
    PAGE,
    GroupPlace,
    Held,
    ModelLayout,
    ModelName,
    PoolPlace,
    UnitPlace,
)
from paceline.runtime.transfer.messages import Complete, Ended, Fetch, Offer
from paceline.runtime.transfer.pages import Pages
from paceline.runtime.transfer.process import LinkSpec, PoolSpec
from paceline.runtime.transfer.producer import Producer
from paceline.runtime.transfer.shm import advertise
from paceline.runtime.transfer.wire import num_pages, pool_pages
from paceline.runtime.types import Handover

Bytes = NDArray[np.uint8]

NUM_SLOTS = 8
FINGERPRINT = {"protocol": "1", "weights": "abc", "draft.weights": "def"}
WAIT_S = 20.0
"""What any single thing may take in a test."""


def heads_of(rank: int, num_ranks: int, num_heads: int) -> tuple[int, int]:
    """As tensor parallelism splits them: evenly, or one head on several ranks."""
    if num_ranks <= num_heads:
        each = num_heads // num_ranks
        return rank * each, (rank + 1) * each
    head = rank * num_heads // num_ranks
    return head, head + 1


class Rank:
    """One rank's pools and board, in memfds."""

    def __init__(
        self,
        layouts: Mapping[ModelName, ModelLayout],
        *,
        block_size: int = 16,
        num_blocks: int = 64,
        use_kernels: bool = True,
    ) -> None:
        self.layouts = layouts
        self.specs: list[PoolSpec] = []
        self.pools: dict[ModelName, Pages] = {}
        for name, layout in layouts.items():
            place, num_bytes = _place(layout, block_size, num_blocks)
            fd = _memfd(num_bytes)
            self.specs.append(PoolSpec(layout=layout, place=place, fd=fd, num_bytes=num_bytes))
            self.pools[name] = Pages(
                mmap.mmap(fd, num_bytes), layout, place, use_kernels=use_kernels
            )
        self.geometry = {
            "num_slots": NUM_SLOTS,
            "num_layers": layouts["target"].num_layers,
            "num_draft_layers": layouts["draft"].num_layers if "draft" in layouts else 0,
        }
        self.board_fd = _memfd(Board.nbytes(**self.geometry))
        memory = mmap.mmap(self.board_fd, Board.nbytes(**self.geometry))
        self.board = Board(memory, **self.geometry)
        self.board.nonce = os.urandom(16)
        self.wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.place = self.pools["target"].place

    def spec(
        self,
        *,
        rank: int,
        num_ranks: int,
        control: str,
        host: str = "127.0.0.1",
        tls: TlsFiles | None = None,
        **config: Any,
    ) -> LinkSpec:
        return LinkSpec(
            engine_id="engine",
            rank=rank,
            num_ranks=num_ranks,
            control=control,
            host=host,
            tls=tls,
            config=KvTransferConfig(**config),
            fingerprint=FINGERPRINT,
            pools=tuple(self.specs),
            board_fd=self.board_fd,
            wakeup_fd=self.wakeup_fd,
            **self.geometry,
        )

    def pass_fds(self) -> tuple[int, ...]:
        return (self.board_fd, self.wakeup_fd, *(spec.fd for spec in self.specs))

    def fill(self, kv: Mapping[ModelName, Bytes], block_ids: tuple[int, ...], tokens: int) -> None:
        """Write what this rank holds of `kv[model]`, `[layers, pages, heads, bytes]`."""
        for name, pool in self.pools.items():
            where = pool_pages(block_ids, pool.place, tokens)
            for held in pool.layout.held:
                part = kv[name][held.layer, :, held.head_start : held.head_stop]
                data = np.ascontiguousarray(part).reshape(len(where), -1)
                pool.scatter(held.layer, held.head_start, held.head_stop, where, data)

    def read(self, name: ModelName, block_ids: tuple[int, ...], tokens: int) -> list[Bytes]:
        """`[pages, heads, bytes]` of each range held."""
        pool = self.pools[name]
        where = pool_pages(block_ids, pool.place, tokens)
        found = []
        for held in pool.layout.held:
            out = np.empty((len(where), pool.layout.page_bytes(held.num_heads)), dtype=np.uint8)
            pool.gather(held.layer, held.head_start, held.head_stop, where, out)
            found.append(out.reshape(len(where), held.num_heads, -1))
        return found

    def close(self) -> None:
        for fd in self.pass_fds():
            os.close(fd)


def layout(
    name: ModelName = "target",
    *,
    rank: int = 0,
    num_ranks: int = 1,
    num_layers: int = 3,
    num_heads: int = 4,
    head_dim: int = 8,
    dtype: str = "float32",
) -> ModelLayout:
    start, stop = heads_of(rank, num_ranks, num_heads)
    return ModelLayout(
        name=name,
        num_layers=num_layers,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        dtype=dtype,  # type: ignore[arg-type]
        held=tuple(
            Held(layer=layer, head_start=start, head_stop=stop) for layer in range(num_layers)
        ),
    )


def ranks(num_ranks: int, *, draft: bool = False, **pool: Any) -> list[Rank]:
    """An engine's, its drafter (one layer fewer, two heads) split as its target."""
    made = []
    for rank in range(num_ranks):
        layouts: dict[ModelName, ModelLayout] = {"target": layout(rank=rank, num_ranks=num_ranks)}
        if draft:
            layouts["draft"] = layout(
                "draft", rank=rank, num_ranks=num_ranks, num_layers=2, num_heads=2
            )
        made.append(Rank(layouts, **pool))
    return made


def random_kv(layouts: Mapping[ModelName, ModelLayout], tokens: int, seed: int = 0) -> Any:
    """`[layers, pages, heads, bytes]` of finite small numbers, by model."""
    rng = np.random.default_rng(seed)
    made: dict[ModelName, Bytes] = {}
    for name, each in layouts.items():
        numbers = rng.standard_normal(
            (each.num_layers, num_pages(tokens), each.num_kv_heads, 2 * PAGE * each.head_dim)
        ).astype(np.float32)
        if each.dtype == "bfloat16":
            made[name] = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            made[name] = numbers.astype(each.dtype).view(np.uint8)
    return made


def blocks(rank: Rank, tokens: int, *, seed: int = 0) -> tuple[int, ...]:
    """Some blocks for so many tokens, in no order."""
    count = -(-tokens // rank.place.block_size)
    chosen = np.random.default_rng(seed).permutation(rank.place.num_blocks)[:count]
    return tuple(chosen.tolist())


class Endings(asyncio.Queue[Ended]):
    """What links tell the engine loop."""

    async def next(self) -> Ended:
        async with asyncio.timeout(WAIT_S):
            return await self.get()


@asynccontextmanager
async def producing(
    engine: list[Rank],
    endings: Endings,
    *,
    share_memory: bool = False,
    tamper: Callable[[bytes], bytes] | None = None,
    fingerprint: Mapping[str, str] = FINGERPRINT,
    tls: TlsFiles | None = None,
    host: str = "127.0.0.1",
    **config: Any,
) -> AsyncIterator[tuple[list[Producer], tuple[str, ...]]]:
    """Producers of all ranks, and their addresses."""
    made: list[Producer] = []
    addresses = []
    for r, rank in enumerate(engine):
        spec = rank.spec(rank=r, num_ranks=len(engine), control="", **config)
        producer = Producer(
            pools=rank.pools,
            board=rank.board,
            engine_id="prefill",
            rank=r,
            num_ranks=len(engine),
            boot_id=1000 + r,
            fingerprint=fingerprint,
            config=spec.config,
            on_ended=endings.put_nowait,
            shared_memory=advertise(spec, rank.board.nonce) if share_memory else None,
            tamper=tamper,
            tls=tls,
        )
        addresses.append(f"{host}:{await producer.start(host)}")
        made.append(producer)
    try:
        yield made, tuple(addresses)
    finally:
        await asyncio.gather(*(each.stop() for each in made))


@asynccontextmanager
async def consuming(
    engine: list[Rank],
    endings: Endings,
    *,
    fingerprint: Mapping[str, str] = FINGERPRINT,
    pause_s: float = 0.0,
    engine_id: str = "decode",
    tls: TlsFiles | None = None,
    **config: Any,
) -> AsyncIterator[list[Consumer]]:
    made = [
        Consumer(
            pools=rank.pools,
            engine_id=engine_id,
            rank=r,
            num_ranks=len(engine),
            fingerprint=fingerprint,
            config=KvTransferConfig(**config),
            on_ended=endings.put_nowait,
            pause_s=pause_s,
            tls=tls,
        )
        for r, rank in enumerate(engine)
    ]
    try:
        yield made
    finally:
        await asyncio.gather(*(each.stop() for each in made))


def an_offer(block_ids: tuple[int, ...], tokens: int, **changes: Any) -> Offer:
    fields = {
        "transfer_id": "t",
        "slot": 1,
        "generation": 7,
        "block_ids": block_ids,
        "num_tokens": tokens,
        "lease_s": 10.0,
    }
    return Offer(**{**fields, **changes})


def a_fetch(
    addresses: tuple[str, ...], block_ids: tuple[int, ...], tokens: int, **changes: Any
) -> Fetch:
    fields = {
        "transfer_id": "t",
        "addresses": addresses,
        "block_ids": block_ids,
        "num_tokens": tokens,
        "num_cached": 0,
        "num_draft_cached": 0,
        "want_draft": False,
        "lease_s": 10.0,
        "timeout_s": WAIT_S,
    }
    return Fetch(**{**fields, **changes})


def complete(tokens: int, *, transfer_id: str = "t", draft_exact: int = 0) -> Complete:
    handover = Handover(token_ids=(42,), seed=9, position=tokens, draft_exact=draft_exact)
    return Complete(transfer_id=transfer_id, handover=handover)


async def until(condition: Callable[[], bool]) -> None:
    """A look at every turn of the event loop. Raises TimeoutError."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.001)


def _place(layout: ModelLayout, block_size: int, num_blocks: int) -> tuple[PoolPlace, int]:
    """All layers in one group, after some bytes that are nobody's."""
    offset = 4096
    units, first = [], 0
    for held in layout.held:
        units.append(UnitPlace(group=0, first_unit=first))
        first += held.num_heads
    place = PoolPlace(
        block_size=block_size,
        num_blocks=num_blocks,
        groups=(GroupPlace(offset_bytes=offset, num_units=first),),
        units=tuple(units),
    )
    return place, offset + place.num_pages * first * layout.page_bytes(1)


def _memfd(num_bytes: int) -> int:
    fd = os.memfd_create("paceline-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd

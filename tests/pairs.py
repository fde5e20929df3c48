"""Two engines' links of one event loop, with one request's KV on its way between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from tests import links
from tests.links import Endings, a_fetch, an_offer, blocks, complete, consuming, producing

from paceline.runtime.transfer.consumer import Consumer
from paceline.runtime.transfer.layout import ModelName
from paceline.runtime.transfer.producer import Producer
from paceline.runtime.transfer.wire import SERVICE

TOKENS = 75
"""Ends inside a page, and inside a block of either size."""


class Pair:
    """A producing and a consuming engine, and one request's blocks on both."""

    def __init__(
        self, num_producers: int = 1, num_consumers: int = 1, *, tokens: int = TOKENS
    ) -> None:
        self.prefill = links.ranks(num_producers, draft=True, block_size=32)
        self.decode = links.ranks(num_consumers, draft=True, block_size=16)
        self.tokens = tokens
        layouts = {name: pool.layout for name, pool in self.prefill[0].pools.items()}
        self.kv = links.random_kv(layouts, tokens)
        self.theirs = blocks(self.prefill[0], tokens, seed=1)
        self.ours = blocks(self.decode[0], tokens, seed=2)
        self.produced, self.consumed = Endings(), Endings()

    def offer(self, producers: Sequence[Producer], **changes: Any) -> None:
        """With KV there and nothing marked."""
        for producer, rank in zip(producers, self.prefill, strict=True):
            rank.fill(self.kv, self.theirs, self.tokens)
            rank.board.begin(1, 7)
            producer.offer(an_offer(self.theirs, self.tokens, **changes))

    def compute(self, producers: Sequence[Producer], *, tokens: int | None = None) -> None:
        """Mark all layers written up to there."""
        for producer, rank in zip(producers, self.prefill, strict=True):
            rank.board.marks[1] = self.tokens if tokens is None else tokens
            producer.progressed()

    def finish(self, producers: Sequence[Producer], *, draft_exact: int = 0) -> None:
        self.compute(producers)
        for producer, rank in zip(producers, self.prefill, strict=True):
            rank.board.draft_marks[1] = draft_exact
            producer.complete(complete(self.tokens, draft_exact=draft_exact))

    def fetch(self, consumers: Sequence[Consumer], addresses: Any, **changes: Any) -> None:
        for consumer in consumers:
            consumer.fetch(a_fetch(addresses, self.ours, self.tokens, **changes))

    def missing(self, name: ModelName = "target", *, first_page: int = 0) -> int:
        """Pages of consumer ranks that are not what they should be."""
        count = 0
        for rank in self.decode:
            held = rank.pools[name].layout.held
            for each, found in zip(held, rank.read(name, self.ours, self.tokens), strict=True):
                wanted = self.kv[name][each.layer, :, each.head_start : each.head_stop]
                differs = (found != wanted).any(axis=(1, 2))
                count += int(differs[first_page:].sum())
        return count


@asynccontextmanager
async def both(
    pair: Pair,
    *,
    plane: str = "grpc",
    producer: dict[str, Any] | None = None,
    consumer: dict[str, Any] | None = None,
) -> AsyncIterator[tuple[list[Producer], tuple[str, ...], list[Consumer]]]:
    shared = plane == "shm"
    async with (
        producing(pair.prefill, pair.produced, share_memory=shared, **producer or {}) as made,
        consuming(pair.decode, pair.consumed, data_plane=plane, **consumer or {}) as consumers,
    ):
        yield *made, consumers


def run(coroutine: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * links.WAIT_S):
            await coroutine

    asyncio.run(bounded())


async def call(channel: Any, method: str, request: Any) -> bytes:
    body = request if isinstance(request, bytes) else request.SerializeToString()
    return bytes(await channel.unary_unary(f"/{SERVICE}/{method}")(body, timeout=5))

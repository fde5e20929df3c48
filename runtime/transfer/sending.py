"""What one consumer rank still has to get of one transfer, and the streams it gets it by.

    marks on the board ──> Ticket.peek: pages that are ready, of one layer     ──> frame ──> any lane
    layer 0  ######....    pages of a layer, by position: sent, ready, not yet
    layer 1  ####......    lanes take turns; none sends more than it has credit for

Frames are made on the event loop, in one go from looking whether the transfer still runs to having
copied the pages: once a transfer has ended nobody reads its blocks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime.transfer.bell import Bell
from paceline.runtime.transfer.board import Board
from paceline.runtime.transfer.codec import BY_ID, Codec
from paceline.runtime.transfer.frames import HEADER_BYTES, Digest, new_frame, seal_pages
from paceline.runtime.transfer.layout import PAGE, ModelName
from paceline.runtime.transfer.messages import Offer
from paceline.runtime.transfer.pages import Pages
from paceline.runtime.transfer.wire import model_name, num_pages
from paceline.runtime.types import Handover


@dataclass(slots=True, kw_only=True)
class Lane:
    """One stream of a ticket."""

    number: int
    credit: int = 0
    """Bytes that may still be sent."""
    sequence: int = 0
    digest: Digest = field(default_factory=Digest)


@dataclass(slots=True, kw_only=True)
class Run:
    """One range of heads of one layer, and its pages that are still to be sent."""

    model: int
    layer: int
    head_start: int
    head_stop: int
    left: list[tuple[int, int]]
    """By position, half open, in their order."""


class Chunk(NamedTuple):
    """Pages to send next."""

    run: Run
    first: int
    stop: int


class Ticket:
    """One consumer rank's opening of one transfer."""

    def __init__(
        self,
        request: pb.OpenRequest,
        *,
        number: int,
        host: str,
        offer: Offer,
        pools: Mapping[ModelName, Pages],
        pool_pages: Mapping[ModelName, NDArray[np.int64]],
        board: Board,
        chunk_bytes: int,
        num_lanes: int,
    ) -> None:
        """Raises ValueError where the request asks for what is not here."""
        self.number = number
        self.host = host
        """Where it is of use, as gRPC writes addresses."""
        self.consumer = (request.consumer_id, request.consumer_rank)
        self.num_consumers = request.num_consumers
        self.offer = offer
        self.num_lanes = num_lanes
        self.lanes: dict[int, asyncio.Task[None]] = {}
        """Streams that run, by lane."""
        self.bell = Bell()
        self.codec: Codec = BY_ID[request.codec]
        self.over: str | None = None
        """Why nothing is sent any more."""
        self.num_bytes = 0
        self.handover: Handover | None = None
        self._pools = pools
        self._pool_pages = pool_pages
        self._board = board
        self.chunk_bytes = chunk_bytes
        self._runs = list(_runs(request, pools, num_pages(offer.num_tokens)))
        self._stalled_since: float | None = None
        self._stall_s = 0.0

    def peek(self) -> Chunk | None:
        """Ready pages of one layer, as many as one frame holds; None while there are none."""
        stops: dict[int, list[int]] = {}
        for run in self._runs:
            ready = stops.get(run.model)
            if ready is None:
                ready = stops[run.model] = self._ready(run.model)
            if not ready:
                continue
            first, stop = run.left[0]
            stop = min(stop, ready[run.layer])
            if stop > first:
                pool = self._pools[model_name(run.model)]
                heads = run.head_stop - run.head_start
                most = self.chunk_bytes // self.codec.encoded_bytes(1, heads, pool.layout)
                return Chunk(run, first, min(stop, first + max(most, 1)))
        return None

    def finished(self) -> bool:
        """Whether everything asked for has been sent, and nothing can follow."""
        if self.handover is not None:
            self._cut(num_pages(min(self.handover.draft_exact, self.offer.num_tokens)))
        return not self._runs

    def frame_bytes(self, chunk: Chunk) -> int:
        run = chunk.run
        layout = self._pools[model_name(run.model)].layout
        heads = run.head_stop - run.head_start
        return HEADER_BYTES + self.codec.encoded_bytes(chunk.stop - chunk.first, heads, layout)

    def make_frame(self, chunk: Chunk, lane: Lane, *, boot_id: int) -> bytes:
        """The chunk's frame, which counts as sent. Raises CodecError where it cannot be encoded."""
        run, first, stop = chunk
        name = model_name(run.model)
        pool = self._pools[name]
        heads, count = run.head_stop - run.head_start, stop - first
        size = self.frame_bytes(chunk)
        body, payload = new_frame(size - HEADER_BYTES)
        room = np.frombuffer(payload, dtype=np.uint8)
        where = self._pool_pages[name][first:stop]
        place = (run.layer, run.head_start, run.head_stop, where)
        if self.codec.id == pb.NONE:
            pool.gather(*place, room.reshape(count, -1))
        else:
            pages = np.empty((count, pool.layout.page_bytes(heads)), dtype=np.uint8)
            pool.gather(*place, pages)
            self.codec.encode(pages, heads, pool.layout, room)
        seal_pages(
            body,
            boot_id=boot_id,
            ticket=self.number,
            lane=lane.number,
            sequence=lane.sequence,
            model=run.model,
            codec=self.codec.id,
            layer=run.layer,
            head_start=run.head_start,
            num_heads=heads,
            first_page=first,
            num_pages=count,
        )
        lane.sequence += 1
        lane.credit -= size
        lane.digest.add(body)
        self.num_bytes += size
        self._take(chunk)
        return body

    def stalled(self, is_stalled: bool) -> None:
        """Whether pages are ready and no lane has the credit to send them."""
        if is_stalled and self._stalled_since is None:
            self._stalled_since = time.monotonic()
        elif not is_stalled and self._stalled_since is not None:
            self._stall_s += time.monotonic() - self._stalled_since
            self._stalled_since = None

    @property
    def stall_s(self) -> float:
        self.stalled(False)
        return self._stall_s

    def _ready(self, model: int) -> list[int]:
        """How many pages of each layer may be read; empty if the board says nothing of it yet."""
        offer, draft = self.offer, model == pb.DRAFT
        marks = self._board.read(offer.slot, offer.generation, draft=draft)
        if marks is None:
            return []
        end = offer.num_tokens
        if draft:
            if self.handover is None:  # where its exact part ends inside a page is not known yet
                whole: list[int] = (np.minimum(marks, end) // PAGE).tolist()
                return whole
            end = min(end, self.handover.draft_exact)
        ready: list[int] = np.where(marks >= end, num_pages(end), marks // PAGE).tolist()
        return ready

    def _take(self, chunk: Chunk) -> None:
        run = chunk.run
        _, stop = run.left[0]
        if chunk.stop < stop:
            run.left[0] = (chunk.stop, stop)
            return
        run.left.pop(0)
        if not run.left:
            self._runs.remove(run)

    def _cut(self, draft_pages: int) -> None:
        """The drafter's KV ends there."""
        for run in self._runs:
            if run.model == pb.DRAFT:
                run.left = [(a, min(b, draft_pages)) for a, b in run.left if a < draft_pages]
        self._runs = [run for run in self._runs if run.left]


def _runs(
    request: pb.OpenRequest, pools: Mapping[ModelName, Pages], num_pages: int
) -> Iterator[Run]:
    seen: set[tuple[int, int, int]] = set()
    for want in request.wants:
        name = model_name(want.model)
        pool = pools.get(name)
        if pool is None:
            raise ValueError(f"this rank holds nothing of the {name}")
        if want.first_page > num_pages:
            raise ValueError(f"from page {want.first_page} of {num_pages}")
        if want.received and len(want.received) != len(want.ranges):
            raise ValueError(f"{len(want.received)} bitmaps for {len(want.ranges)} ranges")
        bitmaps = want.received or [b""] * len(want.ranges)
        for heads, received in zip(want.ranges, bitmaps, strict=True):
            held = pool.layout.holding(heads.layer)
            inside = (
                held is not None
                and held.head_start <= heads.head_start < heads.head_stop <= held.head_stop
            )
            if not inside:
                raise ValueError(
                    f"{name} layer {heads.layer} heads {heads.head_start} to {heads.head_stop}: "
                    "not held by this rank"
                )
            key = (want.model, heads.layer, heads.head_start)
            if key in seen:
                raise ValueError(f"{name} layer {heads.layer} is asked for twice")
            seen.add(key)
            left = _missing(received, want.first_page, num_pages)
            if left:
                yield Run(
                    model=want.model,
                    layer=heads.layer,
                    head_start=heads.head_start,
                    head_stop=heads.head_stop,
                    left=left,
                )


def _missing(received: bytes, first: int, stop: int) -> list[tuple[int, int]]:
    """Runs of zero bits from page `first` on."""
    if first == stop:
        return []
    if not received:
        return [(first, stop)]
    bits = np.unpackbits(np.frombuffer(received, dtype=np.uint8), bitorder="little")
    if len(bits) < stop - first:
        raise ValueError(f"a bitmap of {len(bits)} pages for {stop - first}")
    edges = np.flatnonzero(np.diff(bits[: stop - first], prepend=1, append=1)) + first
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]

"""How pages come from a producer rank: as frames over gRPC, or out of its memory where that is this
host's.

    GrpcPlane   lanes:  control ──>  <── frames, verified one by one, then END with their digest
    ShmPlane    marks on its board ──> its pool ──> our pool           no frame, no copy in between

A plane's `receive` returns when the producer has no more to send, or all is in place; what is
missing then is asked for again. It raises BrokenError where the same producer may be tried again.
Its caller sets the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime.errors import EngineError
from paceline.runtime.transfer.frames import (
    HEADER_BYTES,
    Digest,
    Frame,
    FrameError,
    Kind,
    decode_frame,
)
from paceline.runtime.transfer.layout import MODELS, PAGE, ModelName, Share
from paceline.runtime.transfer.pages import Pages
from paceline.runtime.transfer.peers import BrokenError, TransferError
from paceline.runtime.transfer.receiving import Part
from paceline.runtime.transfer.shm import SharedPools
from paceline.runtime.transfer.wire import num_pages

POLL_S = 0.001
"""Between two looks at another process's board."""
COPY_BYTES = 1 << 20
"""Copied before other tasks get their turn."""


class Plane(Protocol):
    name: str
    kind: pb.Plane

    async def receive(self, part: Part, opened: pb.OpenResponse, *, left_s: float) -> None: ...


class GrpcPlane:
    name = "grpc"
    kind = pb.GRPC

    def __init__(self, *, credit_bytes: int, pause_s: Callable[[], float] = lambda: 0.0) -> None:
        """`pause_s` is for tests: how long to wait before each message is read."""
        self._credit_bytes = credit_bytes
        self._pause_s = pause_s

    async def receive(self, part: Part, opened: pb.OpenResponse, *, left_s: float) -> None:
        async with asyncio.TaskGroup() as lanes:
            for number in range(opened.num_lanes):
                lanes.create_task(self._receive_lane(part, opened, number, left_s))

    async def _receive_lane(
        self, part: Part, opened: pb.OpenResponse, number: int, left_s: float
    ) -> None:
        call = part.peer.stream(number, left_s)
        try:
            await _Lane(part, opened, number, call).run(self._credit_bytes, self._pause_s)
        finally:
            call.cancel()


class _Lane:
    """One stream, read to its end."""

    def __init__(self, part: Part, opened: pb.OpenResponse, number: int, call: Any) -> None:
        self._part = part
        self._opened = opened
        self._number = number
        self._call = call
        self._digest = Digest()
        self._num_bodies = 0
        self._num_placed = 0
        self._is_damaged = False
        self._placed: list[tuple[NDArray[np.bool_], int, int]] = []

    async def run(self, credit_bytes: int, pause_s: Callable[[], float]) -> None:
        # two frames at least, so that one can be under way while another is read
        window = max(credit_bytes, 2 * (self._frame_bytes() + HEADER_BYTES))
        await self._grant(window)
        owed = 0
        reading = asyncio.create_task(self._call.read())
        try:
            while True:
                if wait_s := pause_s():
                    await asyncio.sleep(wait_s)
                body = await reading
                if body is grpc.aio.EOF:
                    raise BrokenError("a stream ended without its last frame")
                reading = asyncio.create_task(self._call.read())  # comes while this one is placed
                await asyncio.sleep(0)
                self._part.progress.num_bytes += len(body)
                if self._take(body):
                    return
                owed += len(body)
                if owed * 4 >= window:
                    await self._grant(owed)
                    owed = 0
        finally:
            reading.cancel()

    def _frame_bytes(self) -> int:
        """The most that one carries: a chunk, or one page where that is more."""
        pages = [
            self._part.progress.pools[name].layout.page_bytes(share.head_stop - share.head_start)
            for name, share, *_ in self._part.missing()
        ]
        return max(self._opened.chunk_bytes, *pages, 0)

    def _take(self, body: bytes) -> bool:
        """Whether this was the last frame. What is not right is not written, and asked for again."""
        self._num_bodies += 1
        try:
            frame = decode_frame(body)
            if frame.kind == Kind.PAGES:
                self._check(frame)
                self._digest.add(body)
                self._placed.append(self._part.place(frame))
                self._num_placed += 1
                return False
            if frame.kind == Kind.END and not self._is_damaged:
                self._check_end(frame)
        except FrameError:
            self._part.progress.num_corrupt += 1
            self._is_damaged = True
            return False
        if frame.kind == Kind.ERROR:
            raise BrokenError(f"the producer ended the stream: {frame.text}")
        return True

    def _check(self, frame: Frame) -> None:
        found = (frame.boot_id, frame.ticket, frame.lane, frame.sequence)
        opened = self._opened
        expected = (opened.boot_id, opened.ticket, self._number, self._num_bodies - 1)
        if found != expected:
            raise FrameError(f"boot id, ticket, lane, sequence {found} where {expected} is due")

    def _check_end(self, frame: Frame) -> None:
        """Each frame was right by itself; if they are not those that were sent, none counts."""
        try:
            self._digest.check(frame)
        except FrameError as error:
            self._part.progress.num_corrupt += 1
            for have, first, stop in self._placed:
                have[first:stop] = False
            raise BrokenError(str(error)) from None

    async def _grant(self, num_bytes: int) -> None:
        control = pb.StreamControl(
            ticket=self._opened.ticket,
            lane=self._number,
            credit_bytes=num_bytes,
            acked_frames=self._num_placed,
        )
        with contextlib.suppress(asyncio.InvalidStateError):  # over: what lies there is read first
            await self._call.write(control.SerializeToString())


class ShmPlane:
    name = "shm"
    kind = pb.SHARED_MEMORY

    def __init__(self, shared: SharedPools) -> None:
        self._shared = shared

    async def receive(self, part: Part, opened: pb.OpenResponse, *, left_s: float) -> None:  # noqa: ARG002
        """Done when all is in place and the producer's word is there. That the pages were still held
        when they were read, the answer to Release tells."""
        theirs = np.array(opened.target_pages, dtype=np.int64)
        if len(theirs) != num_pages(part.progress.fetch.num_tokens):
            raise TransferError(f"{len(theirs)} pages for {part.progress.fetch.num_tokens} tokens")
        while not part.complete:
            if not await self._copy_ready(part, opened, theirs):
                await asyncio.sleep(POLL_S)

    async def _copy_ready(
        self, part: Part, opened: pb.OpenResponse, theirs: NDArray[np.int64]
    ) -> bool:
        """Copy what can be copied; whether there was any."""
        found = False
        for name, share, have, first, stop in list(part.missing()):
            ready = self._ready(part, opened, name, share)
            at = first + int(np.argmin(have[first:stop]))
            width = self._pool(name).layout.page_bytes(share.head_stop - share.head_start)
            step = max(COPY_BYTES // width, 1)
            for begin in range(at, min(ready, stop), step):
                end = min(begin + step, ready, stop)
                pages = np.empty((end - begin, width), dtype=np.uint8)
                heads = (share.layer, share.head_start, share.head_stop)
                try:
                    self._pool(name).gather(*heads, theirs[begin:end], pages)
                except EngineError as error:
                    raise TransferError(str(error)) from None
                part.put(name, share, have, begin, pages)
                part.progress.num_bytes += pages.nbytes
                found = True
                await asyncio.sleep(0)
        return found

    def _pool(self, name: ModelName) -> Pages:
        """Not to be kept: a frame that an exception keeps alive would keep the memory. Raises
        BrokenError once the producer has ended."""
        if self._shared.is_closed:
            raise BrokenError("the producer's process has ended")
        return self._shared.pools[name]

    def _ready(self, part: Part, opened: pb.OpenResponse, name: ModelName, share: Share) -> int:
        """Pages of a share that are written."""
        draft = name == MODELS[1]
        marks = self._shared.marks(opened.slot, opened.generation, draft=draft)
        if marks is None or share.layer >= len(marks):
            return 0
        mark, end = int(marks[share.layer]), part.progress.fetch.num_tokens
        if draft:
            if part.progress.handover is None:
                return min(mark, end) // PAGE
            end = min(end, part.progress.handover.draft_exact)
        return num_pages(end) if mark >= end else mark // PAGE

"""Fetches a rank's KV from the links of another engine, into blocks reserved for it.

    Fetch ──> Describe each producer rank ──> who gives which heads ──> Open each ──┐
                                                                                    │ again while it breaks
    Ended <── Release each <── all in place, and the handover there <── lanes, Await ┘
    Cancel ──> streams closed, Release(ABORT) ──> Ended

Every consumer rank opens at every producer rank, even where it needs nothing of it: a producer gives
its blocks back when all have released. `on_ended` is called exactly once for each Fetch, and
after it nothing is written to its blocks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import grpc
import grpc.aio
import msgspec

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime.config import KvTransferConfig
from paceline.runtime.errors import EngineError
from paceline.runtime.tls import TlsFiles
from paceline.runtime.transfer.codec import BY_NAME
from paceline.runtime.transfer.layout import (
    KvMismatchError,
    ModelName,
    differences,
)
from paceline.runtime.transfer.messages import Cancel, Ended, Fetch, TransferStats
from paceline.runtime.transfer.pages import Pages
from paceline.runtime.transfer.peers import (
    AGAIN,
    BrokenError,
    Description,
    Patience,
    Peer,
    Peers,
    TransferError,
    readable,
)
from paceline.runtime.transfer.planes import GrpcPlane, Plane, ShmPlane
from paceline.runtime.transfer.receiving import Part, Progress, share_out
from paceline.runtime.transfer.shm import SharedPools
from paceline.runtime.transfer.wire import code_of, handover_from_pb

logger = logging.getLogger(__name__)

CALL_S = 5.0
LATE_S = 1.0
"""Calls outlive the fetch's own deadline by so much, so that it is the one that says so."""
ABORT_S = 0.5
"""How long an abort waits for the producers' answers; a producer that gives none has its lease."""


class _StaleError(EngineError):
    """What was remembered of a producer is of one that is gone."""


class Consumer:
    """All calls are of one event loop's thread."""

    def __init__(
        self,
        *,
        pools: Mapping[ModelName, Pages],
        engine_id: str,
        rank: int,
        num_ranks: int,
        fingerprint: Mapping[str, str],
        config: KvTransferConfig,
        on_ended: Callable[[Ended], None],
        tls: TlsFiles | None = None,
        pause_s: float = 0.0,
    ) -> None:
        """`num_ranks` are this engine's. `pause_s` is for tests: a reader that slow, until it
        is set to another value."""
        self._pools = pools
        self._engine_id = engine_id
        self._rank = rank
        self._num_ranks = num_ranks
        self._fingerprint = dict(fingerprint)
        self._config = config
        self._on_ended = on_ended
        self.pause_s = pause_s
        self._peers = Peers(tls)
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._releases: set[asyncio.Task[None]] = set()

    def fetch(self, fetch: Fetch) -> None:
        if fetch.transfer_id in self._fetches:
            self._end(fetch, None, time.monotonic(), error="this transfer is being fetched already")
            return
        task = asyncio.create_task(self._run(fetch))
        self._fetches[fetch.transfer_id] = task

    def cancel(self, cancel: Cancel) -> None:
        """Of no effect on a fetch that has ended."""
        task = self._fetches.get(cancel.transfer_id)
        if task is not None:
            _cancel(task)

    async def stop(self) -> None:
        tasks = [*self._fetches.values()]
        for task in tasks:
            _cancel(task)
        if tasks or self._releases:
            await asyncio.wait((*tasks, *self._releases), timeout=2 * ABORT_S)
        await self._peers.close()

    # ------------------------------------------------------------------------------------ one fetch

    async def _run(self, fetch: Fetch) -> None:
        began_s = time.monotonic()
        progress: Progress | None = None
        peers: list[Peer] = []
        error: str | None = "cancelled"
        try:
            progress = Progress.of(fetch, self._pools)
            async with asyncio.timeout(fetch.timeout_s):
                for address in fetch.addresses:
                    peers.append(await self._peers.at(address))
                parts = await self._receive(progress, peers, began_s)
                await self._commit(progress, parts)
            error = None
        except TimeoutError:
            error = f"not complete after {fetch.timeout_s:g} s"
        except (EngineError, ValueError, grpc.aio.AioRpcError) as failure:
            error = readable(failure)
        except BaseExceptionGroup as failures:
            error = readable(_first(failures))
        except asyncio.CancelledError:
            pass  # the task ends with this fetch: nobody awaits it
        except Exception as failure:
            logger.exception("fetch %s failed", fetch.transfer_id)
            error = f"{type(failure).__name__}: {failure}"
        finally:
            await self._finish(fetch, progress, peers, began_s, error)

    async def _finish(
        self,
        fetch: Fetch,
        progress: Progress | None,
        peers: Sequence[Peer],
        began_s: float,
        error: str | None,
    ) -> None:
        """Nothing is written from here on. Its streams are closed."""
        if progress is not None:
            progress.over = True
        task = self._fetches[fetch.transfer_id]
        told = progress is not None and progress.released
        releasing = asyncio.create_task(self._release_all(fetch, peers, error, told=told))
        self._releases.add(releasing)
        releasing.add_done_callback(self._releases.discard)
        if error is not None:  # the blocks stay reserved until the producers know
            try:
                await asyncio.wait({releasing}, timeout=ABORT_S)
            except asyncio.CancelledError:
                task.uncancel()  # cancelled twice, or while failing: it ends now
        del self._fetches[fetch.transfer_id]
        self._end(fetch, progress, began_s, error=error)

    async def _release_all(
        self, fetch: Fetch, peers: Sequence[Peer], error: str | None, *, told: bool
    ) -> None:
        """Best effort: a producer that cannot be told has its lease."""
        timeout_s = min(CALL_S, fetch.lease_s) if error is None else ABORT_S
        if not told:
            await asyncio.gather(
                *(self._release(fetch, peer, error, timeout_s) for peer in peers),
                return_exceptions=True,
            )
        for peer in peers:
            await self._peers.release(peer, gone=error is not None and peer.description is None)

    async def _release(
        self, fetch: Fetch, peer: Peer, error: str | None, timeout_s: float
    ) -> pb.ReleaseResponse:
        request = pb.ReleaseRequest(
            transfer_id=fetch.transfer_id,
            consumer_id=self._engine_id,
            consumer_rank=self._rank,
            outcome=pb.DONE if error is None else pb.ABORT,
            reason=error or "",
        )
        return await peer.call("Release", request, pb.ReleaseResponse, timeout_s)

    def _end(
        self, fetch: Fetch, progress: Progress | None, began_s: float, *, error: str | None
    ) -> None:
        stats = TransferStats(seconds=time.monotonic() - began_s)
        handover = None
        if progress is not None:
            late_s = progress.last_page_s - progress.handover_s
            stats = msgspec.structs.replace(
                stats,
                num_bytes=progress.num_bytes,
                unoverlapped_s=max(late_s, 0.0) if progress.handover is not None else 0.0,
                num_resumed=progress.num_resumed,
                num_corrupt=progress.num_corrupt,
                plane="+".join(sorted(progress.planes)),
            )
            handover = progress.handover
            if handover is not None and not progress.draft_wanted:
                handover = msgspec.structs.replace(handover, draft_exact=0)
        self._on_ended(
            Ended(
                rank=self._rank,
                transfer_id=fetch.transfer_id,
                producing=False,
                error=error,
                handover=handover if error is None else None,
                stats=stats,
            )
        )

    # ------------------------------------------------------------------------------ until it is here

    async def _receive(
        self, progress: Progress, peers: Sequence[Peer], began_s: float
    ) -> list[Part]:
        """All parts, in place."""
        for is_last in (False, True):
            parts = await self._plan(progress, peers)
            try:
                async with asyncio.TaskGroup() as group:
                    renewing = group.create_task(self._renew(progress.fetch, parts))
                    async with asyncio.TaskGroup() as driving:
                        for part in parts:
                            driving.create_task(self._drive(part, began_s))
                    renewing.cancel()
            except BaseExceptionGroup as failures:
                if is_last or not isinstance(_first(failures), _StaleError):
                    raise
                continue
            return parts
        raise AssertionError("unreachable")

    async def _plan(self, progress: Progress, peers: Sequence[Peer]) -> list[Part]:
        """Ask who is there, and decide who gives what. Raises KvMismatchError."""
        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(self._describe(peer, progress.fetch)) for peer in peers]
        told = [each.result() for each in asking]
        for address, each in zip(progress.fetch.addresses, told, strict=True):
            differing = differences(self._fingerprint, each.fingerprint)
            if differing:
                raise KvMismatchError(f"{address}: {'; '.join(differing)}")
        shares, progress.draft_wanted = share_out(
            progress, told, rank=self._rank, fingerprint=self._fingerprint
        )
        return [Part(progress, peer, share) for peer, share in zip(peers, shares, strict=True)]

    async def _describe(self, peer: Peer, fetch: Fetch) -> Description:
        patience = Patience(peer, fetch.lease_s)
        while True:
            try:
                return await peer.describe(self._engine_id)
            except grpc.aio.AioRpcError as error:
                if error.code() not in AGAIN:
                    raise
                await patience.after(error)

    async def _drive(self, part: Part, began_s: float) -> None:
        """Open one producer rank and take what it has, again and again until all is in place."""
        fetch = part.progress.fetch
        patience = Patience(part.peer, fetch.lease_s)
        while not part.complete:
            left_s = began_s + fetch.timeout_s - time.monotonic() + LATE_S
            plane = await self._plane(part)
            try:
                opened = await self._open(part, plane, left_s)
                patience.answered()
                await self._take(part, plane, opened, left_s)
                if not part.complete:
                    raise BrokenError("frames were damaged or are missing")
            except (grpc.aio.AioRpcError, BrokenError, BaseExceptionGroup) as failure:
                error = _first(failure)
                again = isinstance(error, BrokenError) or (
                    isinstance(error, grpc.aio.AioRpcError) and error.code() in AGAIN
                )
                if not again:
                    raise error from None
                part.progress.num_resumed += part.ticket != 0
                await patience.after(error)

    async def _open(self, part: Part, plane: Plane, left_s: float) -> pb.OpenResponse:
        fetch, peer = part.progress.fetch, part.peer
        description = await self._describe(peer, fetch)
        request = pb.OpenRequest(
            transfer_id=fetch.transfer_id,
            consumer_id=self._engine_id,
            consumer_rank=self._rank,
            num_consumers=self._num_ranks,
            fingerprint=self._fingerprint,
            wants=part.wants(),
            codec=pb.Codec.ValueType(BY_NAME[self._config.codec].id),
            plane=plane.kind,
            num_lanes=self._config.lanes,
            max_chunk_bytes=self._config.chunk_bytes,
            lease_s=fetch.lease_s,
            boot_id=description.boot_id,
        )
        try:
            opened = await peer.call("Open", request, pb.OpenResponse, left_s)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.ABORTED and not part.ticket:
                peer.forget()
                raise _StaleError(code_of(error)) from None
            raise
        if opened.num_tokens != fetch.num_tokens:
            raise TransferError(f"{fetch.num_tokens} tokens here, {opened.num_tokens} there")
        part.ticket = opened.ticket
        part.progress.planes.add(plane.name)
        return opened

    async def _take(self, part: Part, plane: Plane, opened: pb.OpenResponse, left_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            if not part.handed_over:
                group.create_task(self._await(part, opened, left_s))
            if any(True for _ in part.missing()):
                group.create_task(plane.receive(part, opened, left_s=left_s))

    async def _await(self, part: Part, opened: pb.OpenResponse, left_s: float) -> None:
        request = pb.AwaitRequest(ticket=opened.ticket)
        answer = await part.peer.call("Await", request, pb.AwaitResponse, left_s)
        part.progress.hand_over(handover_from_pb(answer.handover))
        part.handed_over = True
        part.bell.ring()

    async def _renew(self, fetch: Fetch, parts: Sequence[Part]) -> None:
        """Say that all is still wanted. Where nobody hears it the streams break too."""
        while True:
            await asyncio.sleep(fetch.lease_s / 3)
            await asyncio.gather(*(self._renew_part(fetch, part) for part in parts if part.ticket))

    async def _renew_part(self, fetch: Fetch, part: Part) -> None:
        ticket = part.ticket
        request = pb.RenewRequest(tickets=[ticket])
        try:
            answer = await part.peer.call(
                "Renew", request, pb.RenewResponse, min(CALL_S, fetch.lease_s)
            )
        except grpc.aio.AioRpcError as error:
            logger.debug("%s could not be renewed: %s", fetch.transfer_id, code_of(error))
            return
        if ticket in answer.lost and ticket == part.ticket and not part.complete:
            raise TransferError(f"{part.peer.address} does not hold the transfer any more")

    async def _plane(self, part: Part) -> Plane:
        grpc_plane = GrpcPlane(credit_bytes=self._config.credit_bytes, pause_s=lambda: self.pause_s)
        if self._config.data_plane == "grpc":
            return grpc_plane
        description = await self._describe(part.peer, part.progress.fetch)
        told = description.message
        if pb.SHARED_MEMORY in told.planes and part.peer.shared is None:
            try:
                part.peer.share(SharedPools(told.shared_memory, description.layouts))
            except (OSError, ValueError, EngineError) as error:
                logger.debug("%s is out of reach of shared memory: %s", part.peer.address, error)
        if part.peer.shared is not None:
            return ShmPlane(part.peer.shared)
        if self._config.data_plane == "shm":
            raise TransferError(f"{part.peer.address} shares no memory with this process")
        return grpc_plane

    async def _commit(self, progress: Progress, parts: Sequence[Part]) -> None:
        """Pages that were read out of another process's memory count only if they were held until
        then. Raises TransferError where they were not."""
        if ShmPlane.name not in progress.planes:
            return
        fetch = progress.fetch
        for part in parts:
            answer = await self._release(fetch, part.peer, None, min(CALL_S, fetch.lease_s))
            if not answer.known:
                raise TransferError(f"{part.peer.address} let the pages go while they were read")
        progress.released = True


def _cancel(task: asyncio.Task[None]) -> None:
    """After its first step: a task that is cancelled before never runs, and its end is never told."""
    asyncio.get_running_loop().call_soon(task.cancel)


def _first(failure: BaseException) -> BaseException:
    """The first error of nested groups."""
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure

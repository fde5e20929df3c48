"""The transfers a rank has been told to serve: their leases, who takes part, and their ends.

    Offer ──> transfer ── Open of each consumer rank ──> ticket ── Release of each ──> Ended
                 │ lease: any sign of a consumer renews it; when it runs out the blocks are let go

A ticket is a number that nobody can guess, for one rank of the engine that the offer is for, of use on
the host that opened it, until the transfer is over: when all have released it, when the lease runs
out, and at the latest when no fetch can be under way any more.

An id is used once: a transfer that is over is remembered for a while, so that a call that comes late,
or an offer that comes after its consumer has left, is answered at once.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import grpc
import numpy as np
from numpy.typing import NDArray

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime.transfer.bell import Bell
from paceline.runtime.transfer.board import Board
from paceline.runtime.transfer.layout import ModelName
from paceline.runtime.transfer.messages import Complete, Ended, Offer, TransferStats, Withdraw
from paceline.runtime.transfer.pages import Pages
from paceline.runtime.transfer.sending import Ticket
from paceline.runtime.transfer.wire import MAX_CHUNK_BYTES, MAX_LANES, pool_pages
from paceline.runtime.types import Handover

MAX_LEASE_S = 600.0
MAX_WAITING = 4096
"""Opens that wait for their offer."""
MAX_REMEMBERED = 4096
REMEMBER_S = 600.0
"""How long it is known of a transfer that it is over."""
LAST_WRITE_S = 1.0
"""What a stream's last message gets once its transfer is over."""
DELIVERED = "delivered"
"""Why a ticket is over that went well."""


@dataclass(slots=True, kw_only=True)
class Transfer:
    """An offer that has not ended."""

    offer: Offer
    pages: Mapping[ModelName, NDArray[np.int64]]
    lease_s: float
    began_s: float
    heard_s: float
    """When a consumer was last heard of."""
    handover: Handover | None = None
    tickets: dict[tuple[str, int], Ticket] = field(default_factory=dict)
    released: set[tuple[str, int]] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None
    num_bytes: int = 0
    stall_s: float = 0.0
    num_resumed: int = 0
    plane: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Past:
    """A transfer that is over, or that will be when it is offered."""

    why: str
    until_s: float
    done: frozenset[tuple[str, int]] = frozenset()
    """Consumer ranks that had everything in time."""


class Refusal(Exception):  # noqa: N818  it is no error here
    """What a caller is told, as a status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Offers:
    """All calls are of one event loop's thread. `on_ended` is called exactly once for each Offer, and
    after it nobody here reads the transfer's blocks."""

    def __init__(
        self,
        pools: Mapping[ModelName, Pages],
        board: Board,
        *,
        rank: int,
        chunk_bytes: int,
        fetch_s: float,
        on_ended: Callable[[Ended], None],
    ) -> None:
        """`chunk_bytes` is for consumers who do not care; `fetch_s` is how long a fetch may take."""
        self._pools = pools
        self._board = board
        self._rank = rank
        self._chunk_bytes = chunk_bytes
        self._fetch_s = fetch_s
        self._on_ended = on_ended
        self._transfers: dict[str, Transfer] = {}
        self._tickets: dict[int, Ticket] = {}
        self._closed: OrderedDict[int, str] = OrderedDict()
        """Why tickets are not valid any more, the latest of them."""
        self._past: OrderedDict[str, _Past] = OrderedDict()
        self._arrivals = Bell()
        """Rings when a transfer is offered, or will not be."""
        self._num_waiting = 0

    # --------------------------------------------------------------------------- the engine's side

    def offer(self, offer: Offer) -> None:
        """Ends at once where the blocks are none of the pool's, or where it is withdrawn already."""
        now_s = time.monotonic()
        if offer.transfer_id in self._transfers:
            self._refuse(offer, "this transfer is offered already")
            return
        past = self._remembered(offer.transfer_id)
        if past is not None:
            self._refuse(offer, past.why)
            return
        try:
            if not 0 <= offer.slot < len(self._board.marks):
                raise ValueError(f"slot {offer.slot} of a board of {len(self._board.marks)}")
            pages = {
                name: pool_pages(offer.block_ids, pool.place, offer.num_tokens)
                for name, pool in self._pools.items()
            }
        except ValueError as error:
            self._remember(offer.transfer_id, str(error))
            self._refuse(offer, str(error))
            return
        self._transfers[offer.transfer_id] = Transfer(
            offer=offer,
            pages=pages,
            lease_s=min(offer.lease_s, MAX_LEASE_S),
            began_s=now_s,
            heard_s=now_s,
        )
        self._arm(offer.transfer_id)
        self._arrivals.ring()

    def complete(self, complete: Complete) -> None:
        transfer = self._transfers.get(complete.transfer_id)
        if transfer is None:
            return
        transfer.handover = complete.handover
        for ticket in transfer.tickets.values():
            ticket.handover = complete.handover
            ticket.bell.ring()

    def withdraw(self, withdraw: Withdraw) -> None:
        why = f"withdrawn: {withdraw.reason}"
        if withdraw.transfer_id in self._transfers:
            self._end(withdraw.transfer_id, why)
        else:
            self._remember(withdraw.transfer_id, why)

    def progressed(self) -> None:
        """Marks have risen."""
        for ticket in self._tickets.values():
            ticket.bell.ring()

    def end_all(self, why: str) -> None:
        for transfer_id in list(self._transfers):
            self._end(transfer_id, why)

    # -------------------------------------------------------------------------- the consumers' side

    async def open(
        self, request: pb.OpenRequest, *, host: str, wait_s: float
    ) -> tuple[Transfer, Ticket]:
        """A ticket for one consumer rank on `host`, which voids the one it had. Waits for the offer.
        Raises TimeoutError, Refusal, and ValueError for what is not here."""
        transfer = await self._offered(request.transfer_id, wait_s)
        _check_consumer(transfer.offer, request.consumer_id)
        consumer = (request.consumer_id, request.consumer_rank)
        if consumer in transfer.released:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "this consumer has released it")
        ticket = Ticket(
            request,
            number=secrets.randbits(64) or 1,
            host=host,
            offer=transfer.offer,
            pools=self._pools,
            pool_pages=transfer.pages,
            board=self._board,
            chunk_bytes=min(request.max_chunk_bytes or self._chunk_bytes, MAX_CHUNK_BYTES),
            num_lanes=max(1, min(request.num_lanes, MAX_LANES)),
        )
        earlier = transfer.tickets.pop(consumer, None)
        if earlier is not None:
            transfer.num_resumed += 1
            self._close(transfer, earlier, "opened again")
        ticket.handover = transfer.handover
        transfer.tickets[consumer] = self._tickets[ticket.number] = ticket
        self.renew(ticket)
        return transfer, ticket

    def ticket(self, number: int, *, host: str) -> Ticket:
        """Raises Refusal where it is not valid, not any more, or not on this host."""
        ticket = self._tickets.get(number)
        if ticket is None:
            raise Refusal(grpc.StatusCode.NOT_FOUND, self._closed.get(number, "no such ticket"))
        if ticket.host != host:
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED, "this ticket was opened on another host"
            )
        return ticket

    def renew(self, ticket: Ticket) -> None:
        """A consumer was heard of."""
        transfer = self._transfers.get(ticket.offer.transfer_id)
        if transfer is not None:
            transfer.heard_s = time.monotonic()

    def release(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        """`known` says whether this rank's transfer was held until it was released. Raises Refusal."""
        consumer = (request.consumer_id, request.consumer_rank)
        transfer = self._transfers.get(request.transfer_id)
        if transfer is None:
            past = self._remembered(request.transfer_id)
            if past is None and request.outcome == pb.ABORT:
                self._remember(request.transfer_id, _aborted(request))
            return pb.ReleaseResponse(known=past is not None and consumer in past.done)
        _check_consumer(transfer.offer, request.consumer_id)
        if request.outcome == pb.ABORT:
            self._end(request.transfer_id, _aborted(request))
            return pb.ReleaseResponse(known=True, freed=True)
        ticket = transfer.tickets.pop(consumer, None)
        if ticket is None:
            return pb.ReleaseResponse(known=consumer in transfer.released)
        transfer.heard_s = time.monotonic()
        transfer.released.add(consumer)
        self._close(transfer, ticket, DELIVERED)
        num_released = sum(name == consumer[0] for name, _ in transfer.released)
        freed = num_released >= ticket.num_consumers
        if freed:
            self._end(request.transfer_id, None)
        return pb.ReleaseResponse(known=True, freed=freed)

    async def _offered(self, transfer_id: str, wait_s: float) -> Transfer:
        """Waits for the offer as long as the caller does."""
        if self._num_waiting >= MAX_WAITING:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WAITING} calls wait for their offers"
            )
        self._num_waiting += 1
        try:
            async with asyncio.timeout(wait_s):
                while (transfer := self._transfers.get(transfer_id)) is None:
                    past = self._remembered(transfer_id)
                    if past is not None:
                        raise Refusal(grpc.StatusCode.NOT_FOUND, past.why)
                    await self._arrivals.wait()
        finally:
            self._num_waiting -= 1
        return transfer

    # ----------------------------------------------------------------------------------- their end

    def _refuse(self, offer: Offer, why: str) -> None:
        self._on_ended(
            Ended(rank=self._rank, transfer_id=offer.transfer_id, producing=True, error=why)
        )

    def _arm(self, transfer_id: str) -> None:
        """Look again when the lease would run out."""
        transfer = self._transfers[transfer_id]
        now_s = time.monotonic()
        most_s = transfer.lease_s + self._fetch_s
        if now_s - transfer.began_s >= most_s:
            self._end(transfer_id, f"lease expired: nothing is held for more than {most_s:g} s")
            return
        left_s = min(transfer.heard_s + transfer.lease_s, transfer.began_s + most_s) - now_s
        if left_s <= 0:
            self._end(
                transfer_id,
                f"lease expired: nothing was heard of the consumer for {transfer.lease_s:g} s",
            )
            return
        loop = asyncio.get_running_loop()
        transfer.timer = loop.call_later(left_s, self._arm, transfer_id)

    def _end(self, transfer_id: str, error: str | None) -> None:
        transfer = self._transfers.pop(transfer_id)
        if transfer.timer is not None:
            transfer.timer.cancel()
        self._remember(transfer_id, error or DELIVERED, frozenset(transfer.released))
        for ticket in transfer.tickets.values():
            self._close(transfer, ticket, error or DELIVERED)
        self._arrivals.ring()
        self._on_ended(
            Ended(
                rank=self._rank,
                transfer_id=transfer_id,
                producing=True,
                error=error,
                stats=TransferStats(
                    num_bytes=transfer.num_bytes,
                    seconds=time.monotonic() - transfer.began_s,
                    stall_s=transfer.stall_s,
                    num_resumed=transfer.num_resumed,
                    plane=transfer.plane,
                ),
            )
        )

    def _close(self, transfer: Transfer, ticket: Ticket, why: str) -> None:
        """From here on no frame of it is made."""
        ticket.over = why
        transfer.num_bytes += ticket.num_bytes
        transfer.stall_s += ticket.stall_s
        self._tickets.pop(ticket.number, None)
        self._closed[ticket.number] = why
        if len(self._closed) > MAX_REMEMBERED:
            self._closed.popitem(last=False)
        ticket.bell.ring()
        loop = asyncio.get_running_loop()
        for task in ticket.lanes.values():
            loop.call_later(LAST_WRITE_S, task.cancel)  # of no effect on one that is done

    def _remember(
        self, transfer_id: str, why: str, done: frozenset[tuple[str, int]] = frozenset()
    ) -> None:
        now_s = time.monotonic()
        self._past[transfer_id] = _Past(why=why, until_s=now_s + REMEMBER_S, done=done)
        self._past.move_to_end(transfer_id)
        while self._past:
            oldest = next(iter(self._past.values()))
            if len(self._past) <= MAX_REMEMBERED and oldest.until_s > now_s:
                break
            self._past.popitem(last=False)
        self._arrivals.ring()

    def _remembered(self, transfer_id: str) -> _Past | None:
        past = self._past.get(transfer_id)
        return past if past is not None and past.until_s > time.monotonic() else None


def _check_consumer(offer: Offer, consumer_id: str) -> None:
    if offer.consumer_id not in ("", consumer_id):
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "this transfer is for another consumer")


def _aborted(request: pb.ReleaseRequest) -> str:
    return f"aborted by consumer: {request.reason or 'no reason given'}"

"""Serves a rank's KV: `paceline.kv.v1.KvTransfer`.

    Offer ──> transfer ──> Open ──> ticket of each consumer rank ──> Stream x lanes ──> Release
                 │ lease: any sign of a consumer renews it; when it runs out the blocks are let go
    Complete ──> └──> Await: the first token, and how much of the drafter is exact

One event loop. `on_ended` is called exactly once for each Offer, and after it nobody here reads the
transfer's blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime.config import KvTransferConfig
from paceline.runtime.errors import ConfigError, EngineError
from paceline.runtime.transfer.bell import Bell
from paceline.runtime.transfer.board import Board
from paceline.runtime.transfer.codec import BY_ID
from paceline.runtime.transfer.frames import encode_end
from paceline.runtime.transfer.layout import (
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    ModelName,
    differences,
)
from paceline.runtime.transfer.messages import Complete, Ended, Offer, TransferStats, Withdraw
from paceline.runtime.transfer.pages import Pages
from paceline.runtime.transfer.sending import Lane, Ticket
from paceline.runtime.transfer.wire import (
    BASE_OPTIONS,
    MAX_CHUNK_BYTES,
    MAX_CREDIT_BYTES,
    MAX_LANES,
    SERVICE,
    handover_to_pb,
    layout_to_pb,
    parse,
    pool_pages,
)
from paceline.runtime.types import Handover

logger = logging.getLogger(__name__)

OPTIONS = [
    *BASE_OPTIONS,
    ("grpc.so_reuseport", 0),  # two servers on one port would share its callers at random
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
]
MAX_WAIT_S = 3600.0
"""Of a call whose caller sets no deadline."""
MAX_LEASE_S = 600.0
MAX_WAITING = 4096
"""Opens that wait for their offer."""
MAX_REMEMBERED = 4096
REMEMBER_S = 600.0
"""How long it is known of a transfer that it is over: an Open that comes then is refused at once."""
FIRST_CONTROL_S = 10.0
LAST_WRITE_S = 1.0
"""What a stream's last message gets once its transfer is over."""
STOP_S = 1.0


@dataclass(slots=True, kw_only=True)
class _Transfer:
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


class Producer:
    """All calls are of one event loop's thread."""

    def __init__(
        self,
        *,
        pools: Mapping[ModelName, Pages],
        board: Board,
        engine_id: str,
        rank: int,
        num_ranks: int,
        boot_id: int,
        fingerprint: Mapping[str, str],
        config: KvTransferConfig,
        on_ended: Callable[[Ended], None],
        shared_memory: pb.SharedMemory | None = None,
        tamper: Callable[[bytes], bytes] | None = None,
    ) -> None:
        """`shared_memory` tells processes on this host where the pools are; None keeps them to this
        process. `tamper` is for tests: what it makes of a frame is sent instead."""
        self._pools = pools
        self._board = board
        self._rank = rank
        self._boot_id = boot_id
        self._fingerprint = dict(fingerprint)
        self._config = config
        self._on_ended = on_ended
        self._tamper = tamper
        planes = [pb.GRPC] if shared_memory is None else [pb.GRPC, pb.SHARED_MEMORY]
        self._description = pb.DescribeResponse(
            protocol_major=PROTOCOL_MAJOR,
            protocol_minor=PROTOCOL_MINOR,
            engine_id=engine_id,
            boot_id=boot_id,
            rank=rank,
            num_ranks=num_ranks,
            fingerprint=self._fingerprint,
            layouts=[layout_to_pb(pool.layout) for pool in pools.values()],
            limits=pb.Limits(
                max_chunk_bytes=MAX_CHUNK_BYTES,
                max_lanes=MAX_LANES,
                max_credit_bytes=MAX_CREDIT_BYTES,
                max_lease_s=MAX_LEASE_S,
            ),
            planes=planes,
            codecs=[pb.Codec.ValueType(number) for number in BY_ID],
            shared_memory=shared_memory,
        )
        self._transfers: dict[str, _Transfer] = {}
        self._tickets: dict[int, Ticket] = {}
        self._past: OrderedDict[str, _Past] = OrderedDict()
        self._arrivals = Bell()
        """Rings when a transfer is offered, or will not be."""
        self._num_waiting = 0
        self._server: grpc.aio.Server | None = None

    # --------------------------------------------------------------------------- the engine's side

    async def start(self, host: str) -> int:
        """Listen on a free port, and return it. Raises ConfigError if `host` is not this machine's."""
        self._server = grpc.aio.server(options=OPTIONS)
        self._server.add_generic_rpc_handlers((self._handlers(),))
        try:
            port = self._server.add_insecure_port(f"[{host}]:0" if ":" in host else f"{host}:0")
        except RuntimeError:
            raise ConfigError(
                f"cannot listen on {host}: not this machine's? Set host in kv_transfer_config"
            ) from None
        await self._server.start()
        return int(port)

    async def stop(self) -> None:
        for transfer_id in list(self._transfers):
            self._end(transfer_id, "the producer's link is being stopped")
        if self._server is not None:
            await self._server.stop(STOP_S)

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
        self._transfers[offer.transfer_id] = _Transfer(
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

    def _refuse(self, offer: Offer, why: str) -> None:
        self._on_ended(
            Ended(rank=self._rank, transfer_id=offer.transfer_id, producing=True, error=why)
        )

    # ----------------------------------------------------------------------------------- their end

    def _arm(self, transfer_id: str) -> None:
        """Look again when the lease would run out."""
        transfer = self._transfers[transfer_id]
        left_s = transfer.heard_s + transfer.lease_s - time.monotonic()
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
        self._remember(transfer_id, error or "delivered", frozenset(transfer.released))
        for ticket in transfer.tickets.values():
            self._close(transfer, ticket, error or "delivered")
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

    def _close(self, transfer: _Transfer, ticket: Ticket, why: str) -> None:
        """From here on no frame of it is made."""
        ticket.over = why
        transfer.num_bytes += ticket.num_bytes
        transfer.stall_s += ticket.stall_s
        self._tickets.pop(ticket.number, None)
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

    # ------------------------------------------------------------------------ the consumer's calls

    def _handlers(self) -> grpc.GenericRpcHandler:
        def unary(kind: type[Message], call: Callable[[Any, Any], Awaitable[Message]]) -> Any:
            async def handle(body: bytes, context: Any) -> bytes:
                try:
                    answer = await call(parse(kind, body), context)
                except (ValueError, Refusal) as error:
                    await context.abort(_code(error), str(error))
                except TimeoutError:
                    await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "waited in vain")
                return bytes(answer.SerializeToString())

            return grpc.unary_unary_rpc_method_handler(handle)

        methods = {
            "Describe": unary(pb.DescribeRequest, self._describe),
            "Open": unary(pb.OpenRequest, self._open),
            "Await": unary(pb.AwaitRequest, self._await),
            "Renew": unary(pb.RenewRequest, self._renew),
            "Release": unary(pb.ReleaseRequest, self._release),
            "Stream": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def _describe(self, _: pb.DescribeRequest, __: Any) -> pb.DescribeResponse:
        return self._description

    async def _open(self, request: pb.OpenRequest, context: Any) -> pb.OpenResponse:
        if request.boot_id not in (0, self._boot_id):
            raise Refusal(
                grpc.StatusCode.ABORTED, "this link was started again: what it had is gone"
            )
        differing = differences(request.fingerprint, self._fingerprint)
        if differing:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "; ".join(differing))
        if request.codec not in BY_ID:
            raise ValueError(f"codec {request.codec} is not known here")
        if request.plane not in self._description.planes:
            raise ValueError(f"data plane {request.plane} is not to be had here")
        if not request.consumer_rank < request.num_consumers:
            raise ValueError(
                f"consumer rank {request.consumer_rank} of {request.num_consumers} consumers"
            )
        transfer = await self._offered(request.transfer_id, context)
        consumer = (request.consumer_id, request.consumer_rank)
        if consumer in transfer.released:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "this consumer has released it")
        ticket = Ticket(
            request,
            number=secrets.randbits(63) | 1,
            offer=transfer.offer,
            pools=self._pools,
            pool_pages=transfer.pages,
            board=self._board,
            chunk_bytes=min(request.max_chunk_bytes or self._config.chunk_bytes, MAX_CHUNK_BYTES),
            num_lanes=max(1, min(request.num_lanes, MAX_LANES)),
        )
        earlier = transfer.tickets.pop(consumer, None)
        if earlier is not None:
            transfer.num_resumed += 1
            self._close(transfer, earlier, "opened again")
        ticket.handover = transfer.handover
        transfer.tickets[consumer] = self._tickets[ticket.number] = ticket
        self._renewed(ticket)
        answer = pb.OpenResponse(
            boot_id=self._boot_id,
            ticket=ticket.number,
            num_tokens=transfer.offer.num_tokens,
            lease_s=transfer.lease_s,
            num_lanes=ticket.num_lanes,
            chunk_bytes=ticket.chunk_bytes,
        )
        transfer.plane = "grpc"
        if request.plane == pb.SHARED_MEMORY:
            transfer.plane = "shm"
            answer.target_pages.extend(transfer.pages["target"].tolist())
            answer.slot, answer.generation = transfer.offer.slot, transfer.offer.generation
        return answer

    async def _offered(self, transfer_id: str, context: Any) -> _Transfer:
        """Waits for the offer as long as the caller does."""
        if self._num_waiting >= MAX_WAITING:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WAITING} calls wait for their offers"
            )
        self._num_waiting += 1
        try:
            async with asyncio.timeout(_left_s(context)):
                while (transfer := self._transfers.get(transfer_id)) is None:
                    past = self._remembered(transfer_id)
                    if past is not None:
                        raise Refusal(grpc.StatusCode.NOT_FOUND, past.why)
                    await self._arrivals.wait()
        finally:
            self._num_waiting -= 1
        return transfer

    async def _await(self, request: pb.AwaitRequest, context: Any) -> pb.AwaitResponse:
        ticket = self._ticket(request.ticket)
        self._renewed(ticket)
        async with asyncio.timeout(_left_s(context)):
            while ticket.handover is None:
                await ticket.bell.wait()
                _check_open(ticket)
        return pb.AwaitResponse(
            num_tokens=ticket.offer.num_tokens, handover=handover_to_pb(ticket.handover)
        )

    async def _renew(self, request: pb.RenewRequest, _: Any) -> pb.RenewResponse:
        lost = []
        for number in request.tickets:
            ticket = self._tickets.get(number)
            if ticket is None:
                lost.append(number)
            else:
                self._renewed(ticket)
        return pb.RenewResponse(lost=lost)

    async def _release(self, request: pb.ReleaseRequest, _: Any) -> pb.ReleaseResponse:
        consumer = (request.consumer_id, request.consumer_rank)
        transfer = self._transfers.get(request.transfer_id)
        if transfer is None:
            past = self._remembered(request.transfer_id)
            if past is None and request.outcome == pb.ABORT:
                self._remember(request.transfer_id, _aborted(request))
            return pb.ReleaseResponse(known=past is not None and consumer in past.done)
        if request.outcome == pb.ABORT:
            self._end(request.transfer_id, _aborted(request))
            return pb.ReleaseResponse(known=True, freed=True)
        ticket = transfer.tickets.pop(consumer, None)
        if ticket is None:
            return pb.ReleaseResponse(known=consumer in transfer.released)
        transfer.heard_s = time.monotonic()
        transfer.released.add(consumer)
        self._close(transfer, ticket, "delivered")
        num_released = sum(name == consumer[0] for name, _ in transfer.released)
        freed = num_released >= ticket.num_consumers
        if freed:
            self._end(request.transfer_id, None)
        return pb.ReleaseResponse(known=True, freed=freed)

    async def _stream(self, _: Any, context: Any) -> None:
        """One lane of one ticket: controls come in, frames go out."""
        try:
            async with asyncio.timeout(FIRST_CONTROL_S):
                body = await context.read()
            if body is grpc.aio.EOF:
                raise ValueError("a stream without a word")
            control = parse(pb.StreamControl, body)
            ticket = self._ticket(control.ticket)
            if control.lane >= ticket.num_lanes or control.lane in ticket.lanes:
                raise ValueError(f"lane {control.lane}, of {ticket.num_lanes}, or in use")
            task = asyncio.current_task()
            assert task is not None
            ticket.lanes[control.lane] = task
            lane = Lane(number=control.lane)
            self._credit(ticket, lane, control)
            reading = asyncio.create_task(self._read(ticket, lane, context))
            try:
                await self._send(ticket, lane, context)
                # a stream that is closed while the consumer grants more would lose what it has not read
                while not reading.done() and ticket.over is None:
                    rung = asyncio.ensure_future(ticket.bell.wait())
                    await asyncio.wait({reading, rung}, return_when=asyncio.FIRST_COMPLETED)
                    rung.cancel()
            finally:
                reading.cancel()
                del ticket.lanes[control.lane]
        except (ValueError, Refusal, EngineError) as error:
            await context.abort(_code(error), str(error))
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no first message came")

    async def _send(self, ticket: Ticket, lane: Lane, context: Any) -> None:
        """All that is ready, until there will be no more. The lease is its deadline."""
        async with Writer(context) as writer:
            while True:
                if ticket.over == "delivered":
                    return
                _check_open(ticket)
                chunk = ticket.peek()
                if chunk is not None and ticket.frame_bytes(chunk) <= lane.credit:
                    ticket.stalled(False)
                    body = ticket.make_frame(chunk, lane, boot_id=self._boot_id)
                    await writer.write(body if self._tamper is None else self._tamper(body))
                elif chunk is None and ticket.finished():
                    break
                else:
                    ticket.stalled(chunk is not None)
                    await ticket.bell.wait()
            end = encode_end(
                lane.digest, boot_id=self._boot_id, ticket=ticket.number, lane=lane.number
            )
            await writer.write(end)

    async def _read(self, ticket: Ticket, lane: Lane, context: Any) -> None:
        """Credit, until the consumer has no more to say."""
        with contextlib.suppress(grpc.aio.UsageError, asyncio.InvalidStateError):
            while (body := await context.read()) is not grpc.aio.EOF:
                try:
                    self._credit(ticket, lane, parse(pb.StreamControl, body))
                except ValueError as error:
                    logger.warning("ignored a message on lane %d: %s", lane.number, error)

    def _credit(self, ticket: Ticket, lane: Lane, control: pb.StreamControl) -> None:
        lane.credit = min(lane.credit + control.credit_bytes, MAX_CREDIT_BYTES)
        self._renewed(ticket)
        ticket.bell.ring()

    def _ticket(self, number: int) -> Ticket:
        ticket = self._tickets.get(number)
        if ticket is None:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "no such ticket, or not any more")
        return ticket

    def _renewed(self, ticket: Ticket) -> None:
        transfer = self._transfers.get(ticket.offer.transfer_id)
        if transfer is not None:
            transfer.heard_s = time.monotonic()


class Writer:
    """Sends one message while the next one is made."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Writer:
        return self

    async def write(self, body: bytes) -> None:
        """Returns when the one before is sent, and raises what became of it."""
        if self._writing is not None:
            await self._writing
        self._writing = asyncio.create_task(self._context.write(body))
        await asyncio.sleep(0)  # it starts

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writing is None:
            return
        if kind is None:
            await self._writing
        else:
            self._writing.cancel()


def _check_open(ticket: Ticket) -> None:
    if ticket.over is not None:
        raise Refusal(grpc.StatusCode.NOT_FOUND, ticket.over)


def _aborted(request: pb.ReleaseRequest) -> str:
    return f"aborted by consumer: {request.reason or 'no reason given'}"


def _code(error: Exception) -> grpc.StatusCode:
    if isinstance(error, Refusal):
        return error.code
    if isinstance(error, ValueError):
        return grpc.StatusCode.INVALID_ARGUMENT
    return grpc.StatusCode.FAILED_PRECONDITION  # KV that cannot be sent as was asked for


def _left_s(context: Any) -> float:
    """How long the caller waits; a little less, so that it still hears why."""
    left = context.time_remaining()
    return MAX_WAIT_S if left is None else float(min(max(left - 0.05, 0.0), MAX_WAIT_S))

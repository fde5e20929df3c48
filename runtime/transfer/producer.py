"""Serves a rank's KV: `paceline.kv.v1.KvTransfer`.

    Offer ──> transfer ──> Open ──> ticket of each consumer rank ──> Stream x lanes ──> Release
                 │ lease: any sign of a consumer renews it; when it runs out the blocks are let go
    Complete ──> └──> Await: the first token, and how much of the drafter is exact

With TLS nobody is heard who does not show a link's certificate, and a ticket is of use only on the
host that opened it.

One event loop. `on_ended` is called exactly once for each Offer, and after it nobody here reads the
transfer's blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime.config import KvTransferConfig
from paceline.runtime.errors import ConfigError, EngineError
from paceline.runtime.tls import LINK_NAME, TlsFiles, server_credentials
from paceline.runtime.transfer.board import Board
from paceline.runtime.transfer.codec import BY_ID
from paceline.runtime.transfer.frames import encode_end
from paceline.runtime.transfer.layout import (
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    ModelName,
    differences,
)
from paceline.runtime.transfer.messages import Ended
from paceline.runtime.transfer.offers import DELIVERED, MAX_LEASE_S, Offers, Refusal
from paceline.runtime.transfer.pages import Pages
from paceline.runtime.transfer.sending import Lane, Ticket
from paceline.runtime.transfer.wire import (
    BASE_OPTIONS,
    MAX_CHUNK_BYTES,
    MAX_CREDIT_BYTES,
    MAX_LANES,
    MAX_REQUEST_BYTES,
    SERVICE,
    handover_to_pb,
    layout_to_pb,
    parse,
)

logger = logging.getLogger(__name__)

OPTIONS = [
    *BASE_OPTIONS,
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.so_reuseport", 0),  # two servers on one port would share its callers at random
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
]
MAX_WAIT_S = 3600.0
"""Of a call whose caller sets no deadline."""
FIRST_CONTROL_S = 10.0
STOP_S = 1.0


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
        tls: TlsFiles | None = None,
        shared_memory: pb.SharedMemory | None = None,
        tamper: Callable[[bytes], bytes] | None = None,
    ) -> None:
        """`shared_memory` tells processes on this host where the pools are; None keeps them to this
        process. `tamper` is for tests: what it makes of a frame is sent instead."""
        self._boot_id = boot_id
        self._fingerprint = dict(fingerprint)
        self._tls = tls
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
        self._offers = Offers(
            pools,
            board,
            rank=rank,
            chunk_bytes=config.chunk_bytes,
            fetch_s=config.timeout_s,
            on_ended=on_ended,
        )
        self.offer = self._offers.offer
        self.complete = self._offers.complete
        self.withdraw = self._offers.withdraw
        self.progressed = self._offers.progressed
        self._server: grpc.aio.Server | None = None

    # --------------------------------------------------------------------------- the engine's side

    async def start(self, host: str) -> int:
        """Listen on a free port of `host` alone, and return it. Raises ConfigError if that is not this
        machine's."""
        self._server = grpc.aio.server(options=OPTIONS)
        self._server.add_generic_rpc_handlers((self._handlers(),))
        address = f"[{host}]:0" if ":" in host else f"{host}:0"
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, server_credentials(self._tls))
        except RuntimeError:
            raise ConfigError(
                f"cannot listen on {host}: not this machine's? Set host in kv_transfer_config"
            ) from None
        await self._server.start()
        return int(port)

    async def stop(self) -> None:
        self._offers.end_all("the producer's link is being stopped")
        if self._server is not None:
            await self._server.stop(STOP_S)

    # ------------------------------------------------------------------------ the consumer's calls

    def _handlers(self) -> grpc.GenericRpcHandler:
        def unary(kind: type[Message], call: Callable[[Any, Any], Awaitable[Message]]) -> Any:
            async def handle(body: bytes, context: Any) -> bytes:
                try:
                    self._check_peer(context)
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

    def _check_peer(self, context: Any) -> None:
        """Raise Refusal unless the caller's certificate is a link's. That its authority is ours, the
        handshake has seen to; but that may vouch for others too."""
        if self._tls is None:
            return
        names = context.auth_context().get("x509_subject_alternative_name", ())
        if LINK_NAME.encode() not in names:
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED, f"your certificate has no name {LINK_NAME}"
            )

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
        transfer, ticket = await self._offers.open(
            request, host=_host(context), wait_s=_left_s(context)
        )
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

    async def _await(self, request: pb.AwaitRequest, context: Any) -> pb.AwaitResponse:
        ticket = self._offers.ticket(request.ticket, host=_host(context))
        self._offers.renew(ticket)
        async with asyncio.timeout(_left_s(context)):
            while ticket.handover is None:
                await ticket.bell.wait()
                _check_open(ticket)
        return pb.AwaitResponse(
            num_tokens=ticket.offer.num_tokens, handover=handover_to_pb(ticket.handover)
        )

    async def _renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        lost = []
        for number in request.tickets:
            try:
                self._offers.renew(self._offers.ticket(number, host=_host(context)))
            except Refusal:
                lost.append(number)
        return pb.RenewResponse(lost=lost)

    async def _release(self, request: pb.ReleaseRequest, _: Any) -> pb.ReleaseResponse:
        return self._offers.release(request)

    async def _stream(self, _: Any, context: Any) -> None:
        """One lane of one ticket: controls come in, frames go out."""
        try:
            self._check_peer(context)
            async with asyncio.timeout(FIRST_CONTROL_S):
                body = await context.read()
            if body is grpc.aio.EOF:
                raise ValueError("a stream without a word")
            control = parse(pb.StreamControl, body)
            ticket = self._offers.ticket(control.ticket, host=_host(context))
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
                if ticket.over == DELIVERED:
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
        self._offers.renew(ticket)
        ticket.bell.ring()


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


def _code(error: Exception) -> grpc.StatusCode:
    if isinstance(error, Refusal):
        return error.code
    if isinstance(error, ValueError):
        return grpc.StatusCode.INVALID_ARGUMENT
    return grpc.StatusCode.FAILED_PRECONDITION  # KV that cannot be sent as was asked for


def _host(context: Any) -> str:
    """The caller's address, of `ipv4:10.0.0.1:50000`: its port is another for each connection."""
    return str(context.peer()).rpartition(":")[0]


def _left_s(context: Any) -> float:
    """How long the caller waits; a little less, so that it still hears why."""
    left = context.time_remaining()
    return MAX_WAIT_S if left is None else float(min(max(left - 0.05, 0.0), MAX_WAIT_S))

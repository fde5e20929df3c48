"""The links of other engines, as a consumer knows them: their connections and what they said of
themselves.

    Peer ── control channel ──>  Describe, Open, Await, Renew, Release
         ── channel per lane ──> Stream              each a TCP connection of its own

With TLS each connection shows our certificate and wants to see one of the same authority. Once the
certificate is replaced, fetches that begin make connections of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime.errors import EngineError
from paceline.runtime.tls import LINK_NAME, TlsFiles, channel_credentials
from paceline.runtime.transfer.layout import (
    PROTOCOL_MAJOR,
    KvMismatchError,
    ModelLayout,
    ModelName,
)
from paceline.runtime.transfer.shm import SharedPools
from paceline.runtime.transfer.wire import (
    BASE_OPTIONS,
    MAX_CREDIT_BYTES,
    SERVICE,
    code_of,
    layout_from_pb,
    parse,
)

OPTIONS = [
    *BASE_OPTIONS,
    ("grpc.max_receive_message_length", MAX_CREDIT_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
AGAIN = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
    )
)
"""What a cut connection looks like. Other codes are answers."""
BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0
DESCRIBE_S = 5.0
PROBE_S = 1.0
MAX_PEERS = 64

M = TypeVar("M", bound=Message)


class TransferError(EngineError):
    """A fetch that cannot succeed any more."""


class BrokenError(EngineError):
    """A stream that ended before its time. The transfer may be taken up again."""


class Description:
    """What a peer says of itself, checked."""

    def __init__(self, message: pb.DescribeResponse) -> None:
        """Raises KvMismatchError for another protocol, ValueError for what cannot be."""
        if message.protocol_major != PROTOCOL_MAJOR:
            raise KvMismatchError(f"protocol {PROTOCOL_MAJOR} here, {message.protocol_major} there")
        self.message = message
        self.boot_id: int = message.boot_id
        self.fingerprint = dict(message.fingerprint)
        layouts = [layout_from_pb(each) for each in message.layouts]
        self.layouts: dict[ModelName, ModelLayout] = {each.name: each for each in layouts}
        if "target" not in self.layouts:
            raise ValueError("a link that holds nothing of a target")


class Peer:
    """One address. Belongs to the event loop."""

    def __init__(self, address: str, tls: TlsFiles | None) -> None:
        self.address = address
        self.num_users = 0
        self._tls = tls
        self.description: Description | None = None
        """As of the last time it was asked; forgotten when it may have been started again."""
        self.shared: SharedPools | None = None
        """Its pools, where they are in this host's memory, as long as it lives."""
        self._control: grpc.aio.Channel | None = None
        self._lanes: dict[int, grpc.aio.Channel] = {}

    async def describe(self, consumer_id: str) -> Description:
        if self.description is None:
            request = pb.DescribeRequest(consumer_id=consumer_id)
            answer = await self.call("Describe", request, pb.DescribeResponse, DESCRIBE_S)
            self.description = Description(answer)
        return self.description

    async def call(self, method: str, request: Message, kind: type[M], timeout_s: float) -> M:
        """Raises AioRpcError as gRPC does, ValueError for an answer that is none."""
        if self._control is None:
            self._control = self._channel(-1)
        method_of = self._control.unary_unary(f"/{SERVICE}/{method}")
        return parse(kind, await method_of(request.SerializeToString(), timeout=timeout_s))

    def stream(self, lane: int, timeout_s: float) -> Any:
        """A call of `Stream` on the lane's own connection: bytes both ways."""
        channel = self._lanes.get(lane)
        if channel is None:
            channel = self._lanes[lane] = self._channel(lane)
        return channel.stream_stream(f"/{SERVICE}/Stream")(timeout=timeout_s)

    async def is_gone(self) -> bool:
        """Whether its host says that nobody listens there. A link listens as long as it lives and is
        never started again on the same port, so then it is dead."""
        host, _, port = self.address.rpartition(":")
        try:
            async with asyncio.timeout(PROBE_S):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except ConnectionRefusedError:
            return True
        except (OSError, TimeoutError, ValueError):
            return False
        writer.close()
        return False

    def share(self, pools: SharedPools) -> None:
        """Read its memory; until it ends, whether anybody fetches from it then or not."""
        self.shared = pools
        asyncio.get_running_loop().add_reader(pools.process, self.forget)

    def forget(self) -> None:
        """It may have been started again."""
        self.description = None
        if self.shared is not None:
            asyncio.get_running_loop().remove_reader(self.shared.process)
            self.shared.close()
            self.shared = None

    async def close(self) -> None:
        self.forget()
        channels = [*self._lanes.values(), self._control]
        self._lanes, self._control = {}, None
        for channel in channels:
            if channel is not None:
                with contextlib.suppress(Exception):
                    await channel.close()

    def _channel(self, lane: int) -> grpc.aio.Channel:
        options: list[tuple[str, int | str]] = [
            *OPTIONS,
            ("paceline.lane", lane),
        ]  # channels of equal options share a connection
        if self._tls is None:
            return grpc.aio.insecure_channel(self.address, options=options)
        options.append(("grpc.ssl_target_name_override", LINK_NAME))
        credentials = channel_credentials(self._tls)
        return grpc.aio.secure_channel(self.address, credentials, options=options)


class Peers:
    """Those that were last talked to."""

    def __init__(self, tls: TlsFiles | None) -> None:
        self._tls = tls
        self._watched = None if tls is None else tls.watched()
        self._peers: OrderedDict[str, Peer] = OrderedDict()

    async def at(self, address: str) -> Peer:
        """In use until `release`."""
        if self._watched is not None and self._watched.changed():
            await self._forget_all()
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = Peer(address, self._tls)
        self._peers.move_to_end(address)
        peer.num_users += 1
        idle = [each for each in self._peers.values() if not each.num_users]
        for each in idle[: max(0, len(self._peers) - MAX_PEERS)]:
            del self._peers[each.address]
            await each.close()
        return peer

    async def release(self, peer: Peer, *, gone: bool = False) -> None:
        peer.num_users -= 1
        forgotten = self._peers.get(peer.address) is not peer
        if peer.num_users or not (gone or forgotten):
            return
        if not forgotten:
            del self._peers[peer.address]
        await peer.close()

    async def _forget_all(self) -> None:
        """Forget all; those in use are closed by whoever releases them last."""
        forgotten, self._peers = self._peers, OrderedDict()
        for each in forgotten.values():
            if not each.num_users:
                await each.close()

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer.close()
        self._peers.clear()


class Patience:
    """How long a producer that breaks off is tried again: until its lease has run out anyway, or its
    host says that it is dead."""

    def __init__(self, peer: Peer, lease_s: float) -> None:
        self._peer = peer
        self._lease_s = lease_s
        self._since: float | None = None
        self._pause_s = BACKOFF_S

    def answered(self) -> None:
        self._since = None

    async def after(self, error: BaseException) -> None:
        """Wait before the next try. Raises TransferError where there is no use."""
        now_s = time.monotonic()
        if self._since is None:
            self._since = now_s
        unreachable = isinstance(error, grpc.aio.AioRpcError)
        if unreachable and (now_s - self._since > self._lease_s or await self._peer.is_gone()):
            self._peer.forget()
            raise TransferError(f"{self._peer.address} is gone: {readable(error)}") from None
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, MAX_BACKOFF_S)


def readable(error: BaseException) -> str:
    return code_of(error) if isinstance(error, grpc.aio.AioRpcError) else str(error)

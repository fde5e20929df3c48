"""The engine loop's end of its ranks' KV links: orders out, ends of transfers back.

    scheduler ── Offer, Fetch, ... ──> KvControl ── ROUTER ──> link of each rank
    scheduler <── TransferEnd ─────── KvControl <── Ended ──── one from each rank

A transfer has ended when every rank's link has said so, or has died: its successor's `LinkReady`
tells, and a dead process touches no memory. One rank's failure is everybody's: the others are told
to stop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import zmq

from paceline.runtime.errors import DeadlineError, ShardError
from paceline.runtime.schedule.transfers import TransferEnd
from paceline.runtime.transfer.messages import (
    Cancel,
    Command,
    Ended,
    Fetch,
    LinkReady,
    News,
    Offer,
    TransferStats,
    Withdraw,
)
from paceline.runtime.types import WIRE_VERSION, Handover, KvLinks

logger = logging.getLogger(__name__)

GRACE_S = 60.0
"""How much longer than it may take a transfer can stay unended before the engine gives up."""

_news_in = msgspec.msgpack.Decoder(News)
_out = msgspec.msgpack.Encoder()


@dataclass(slots=True, kw_only=True, eq=False)
class _Open:
    """A transfer that not all ranks have ended."""

    producing: bool
    waiting: set[int]
    """Ranks whose links have it in hand."""
    error: str | None = None
    handover: Handover | None = None
    ended: list[TransferStats] = field(default_factory=list)
    due_s: float | None = None
    """When a fetch must have ended, well or not."""


class KvControl:
    """One per engine with KV links. For the engine loop's thread alone."""

    def __init__(self, address: str, *, num_ranks: int) -> None:
        """Binds `address`, such as `ipc:///tmp/x` or `tcp://10.0.0.1:*`; `self.address` is what links
        connect to."""
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, 1 << 26)
        self.socket.bind(address)
        self.address = str(self.socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._num_ranks = num_ranks
        self._links: dict[int, tuple[bytes, LinkReady]] = {}
        self._open: dict[str, _Open] = {}
        self._ends: list[TransferEnd] = []

    def wait_ready(self, *, timeout_s: float, check: Callable[[], None]) -> None:
        """Until every rank's link serves. Raises DeadlineError, or what `check` raises."""
        deadline = time.monotonic() + timeout_s
        while len(self._links) < self._num_ranks:
            if not self.socket.poll(500):
                check()
                if time.monotonic() > deadline:
                    missing = sorted(set(range(self._num_ranks)) - set(self._links))
                    raise DeadlineError(f"waited {timeout_s:.0f} s for KV links of ranks {missing}")
            self._receive()

    @property
    def links(self) -> KvLinks:
        """Where this engine's KV is to be had; empty before all ranks' links serve."""
        if len(self._links) < self._num_ranks:
            return KvLinks()
        ready = [self._links[rank][1] for rank in range(self._num_ranks)]
        return KvLinks(
            addresses=tuple(each.address for each in ready), fingerprint=ready[0].fingerprint
        )

    def send(self, orders: Iterable[Command]) -> None:
        """Pass the scheduler's orders on to every rank."""
        for order in orders:
            if isinstance(order, Offer | Fetch):
                due_s = None
                if isinstance(order, Fetch):
                    due_s = time.monotonic() + order.timeout_s + GRACE_S
                self._open[order.transfer_id] = _Open(
                    producing=isinstance(order, Offer),
                    waiting=set(range(self._num_ranks)),
                    due_s=due_s,
                )
            self._tell(order, range(self._num_ranks))

    def receive(self) -> list[TransferEnd]:
        """Transfers that have ended on all ranks since the last call. Waits for nothing. Raises
        ShardError if a rank's link has been silent for too long."""
        self._receive()
        now_s = time.monotonic()
        for transfer_id, each in self._open.items():
            if each.due_s is not None and now_s > each.due_s:
                raise ShardError(
                    f"KV links of ranks {sorted(each.waiting)} do not end transfer {transfer_id}"
                )
        ends, self._ends = self._ends, []
        return ends

    def lose_all(self) -> None:
        """The ranks were ended, and their links with them: wait for others. Nothing of theirs that
        still comes is heard."""
        self._receive()
        self._links.clear()
        self._open.clear()
        self._ends.clear()

    def close(self) -> None:
        self.socket.close()
        self._context.term()

    def _receive(self) -> None:
        while True:
            try:
                identity, body = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                news = _news_in.decode(body)
            except (msgspec.DecodeError, ValueError) as error:
                logger.warning("ignored a KV link's word that is none: %s", error)
                continue
            if not 0 <= news.rank < self._num_ranks:
                logger.warning("ignored a KV link of rank %d, of %d", news.rank, self._num_ranks)
            elif isinstance(news, LinkReady):
                self._ready(identity, news)
            elif (known := self._links.get(news.rank)) is not None and known[0] == identity:
                self._ended(news)

    def _ready(self, identity: bytes, ready: LinkReady) -> None:
        if ready.version != WIRE_VERSION:
            raise ShardError(
                f"a KV link speaks version {ready.version}, this engine {WIRE_VERSION}: mixed installations"
            )
        again = ready.rank in self._links
        self._links[ready.rank] = (identity, ready)
        if again:
            logger.warning("the KV link of rank %d died and was started again", ready.rank)
        for transfer_id in [key for key, each in self._open.items() if ready.rank in each.waiting]:
            self._ended(
                Ended(
                    rank=ready.rank,
                    transfer_id=transfer_id,
                    producing=self._open[transfer_id].producing,
                    error=f"the KV link of rank {ready.rank} died",
                )
            )

    def _ended(self, news: Ended) -> None:
        each = self._open.get(news.transfer_id)
        if each is None or news.rank not in each.waiting:
            return
        each.waiting.discard(news.rank)
        each.ended.append(news.stats)
        if news.error is not None and each.error is None:
            each.error = news.error
            stop: Command = Cancel(transfer_id=news.transfer_id)
            if each.producing:
                stop = Withdraw(transfer_id=news.transfer_id, reason=news.error)
            self._tell(stop, each.waiting)
        if news.rank == 0:
            each.handover = news.handover
        if not each.waiting:
            del self._open[news.transfer_id]
            self._ends.append(
                TransferEnd(
                    transfer_id=news.transfer_id,
                    error=each.error,
                    handover=each.handover,
                    stats=_together(each.ended),
                )
            )

    def _tell(self, command: Command, ranks: Iterable[int]) -> None:
        body = _out.encode(command)
        for rank in ranks:
            if (known := self._links.get(rank)) is not None:
                self.socket.send_multipart((known[0], body), zmq.DONTWAIT)


def _together(stats: list[TransferStats]) -> TransferStats:
    """Counts summed over ranks, times of the slowest."""
    return TransferStats(
        num_bytes=sum(each.num_bytes for each in stats),
        num_resumed=sum(each.num_resumed for each in stats),
        num_corrupt=sum(each.num_corrupt for each in stats),
        seconds=max(each.seconds for each in stats),
        unoverlapped_s=max(each.unoverlapped_s for each in stats),
        stall_s=max(each.stall_s for each in stats),
        plane=stats[0].plane,
    )

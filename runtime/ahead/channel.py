"""Orders out to every draft rank, tails back from the first: MessagePack over ZMQ.

    engine loop   ROUTER  ── orders ──>  DEALER   draft ranks 0, 1, ..
                          <─ hello ────           once per rank, as over the channel of plans
                          <─ tails ────           draft rank 0

Neither end waits for an answer of the other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import msgspec
import zmq

from paceline.runtime.ahead.messages import Order, Orders, Tails, shutdown
from paceline.runtime.channel import Hello, RankReceiver, RankSender
from paceline.runtime.errors import DeadlineError, ShardError
from paceline.runtime.types import WIRE_VERSION

_orders_in = msgspec.msgpack.Decoder(Orders)
_out = msgspec.msgpack.Encoder()


class OrderSender(RankSender):
    """The engine loop's end."""

    _name = "draft rank"
    _words_in = msgspec.msgpack.Decoder(Hello | Tails)
    _last_word = shutdown()

    def send(self, orders: list[Order]) -> None:
        """Say the same to every draft rank. Raises ShardError if one is gone."""
        body = _out.encode(Orders(orders=tuple(orders)))
        self._say(body, what="orders", flags=zmq.DONTWAIT)

    def take(self) -> list[Tails]:
        """What has come since the last call. Waits for nothing. Raises ShardError with a rank's own
        words if it failed."""
        found = []
        while self._socket.poll(0):
            tails = self._receive(time.monotonic(), waiting_for="tails")
            if isinstance(tails, Hello):
                raise ShardError(f"draft rank {tails.rank} started again by itself")
            if tails.error is not None:
                raise ShardError(f"draft rank {tails.rank}: {tails.error}")
            found.append(tails)
        return found


class OrderReceiver(RankReceiver):
    """A draft rank's end."""

    def wait(self, wait_s: float) -> bool:
        """Whether orders are there, for so long at most."""
        return bool(self._socket.poll(int(wait_s * 1e3)))

    def orders(self, *, wait_s: float, alive: Callable[[], bool]) -> Orders:
        """The next ones. Raises DeadlineError if none come."""
        deadline = time.monotonic() + wait_s
        while not self.wait(min(0.5, wait_s)):
            if not alive():
                return Orders(shutdown=True)
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"waited {wait_s:.0f} s for orders that draft rank 0 has had already"
                )
        found = _orders_in.decode(self._socket.recv())
        if found.version != WIRE_VERSION:
            raise ShardError(
                f"the engine speaks version {found.version}, this draft rank {WIRE_VERSION}: mixed "
                "installations"
            )
        return found

    def tell(self, tails: Tails) -> None:
        """Draft rank 0 to the engine loop."""
        self._socket.send(_out.encode(tails))

    def beat(self) -> None:
        """That there is nothing to say. Not said where earlier words still wait to be heard."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(_out.encode(Tails(rank=self._rank)), zmq.DONTWAIT)

    def failed_at_work(self, error: Exception) -> None:
        """Why this rank ends."""
        words = f"{type(error).__name__}: {error}"
        self.tell(Tails(rank=self._rank, error=words))

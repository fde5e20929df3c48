"""A rank's KV link: the process that serves its KV to other engines and fetches theirs.

    rank ── LinkSpec, as JSON on standard input ──>  python -m paceline.runtime.transfer.process
         ── memfds of pools and board, eventfd ──>     (inherited)
         <── heartbeat on the board ────
    engine loop  <── ZMQ: LinkReady, Ended ──      ── Offer, Complete, Withdraw, Fetch, Cancel ──>

The link dies with its parent, and on SIGTERM. It imports neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import mmap
import os
import secrets
import select
import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import zmq
import zmq.asyncio
from msgspec import Meta

from paceline.runtime.config import KvTransferConfig
from paceline.runtime.logs import configure_child
from paceline.runtime.tls import TlsFiles
from paceline.runtime.transfer.board import Board
from paceline.runtime.transfer.layout import ModelLayout, ModelName, PoolPlace
from paceline.runtime.transfer.messages import (
    Cancel,
    Command,
    Complete,
    Fetch,
    LinkReady,
    News,
    Offer,
)
from paceline.runtime.transfer.pages import Pages
from paceline.runtime.types import WireType

if TYPE_CHECKING:
    from paceline.runtime.transfer.consumer import Consumer

logger = logging.getLogger(__name__)

HEARTBEAT_EVERY_S = 0.2
MAX_COMMAND_BYTES = 1 << 26
FAULTS = "PACELINE_KV_FAULTS"
"""Names an environment variable with `Faults` as JSON; for tests and the fault benchmark."""
SLOW_READ_S, SLOW_FOR_S = 0.1, 2.0
"""How long a reader that was slowed down waits before each frame, and until when."""


class PoolSpec(WireType, frozen=True, kw_only=True):
    """One model's pool: a memfd and what lies where in it."""

    layout: ModelLayout
    place: PoolPlace
    fd: int
    num_bytes: int
    """To map, from the file's start."""


class LinkSpec(WireType, frozen=True, kw_only=True):
    """All that a link has to know. File descriptors are those of the link: passed with `pass_fds`,
    they have the same numbers on both sides."""

    engine_id: str
    rank: int
    num_ranks: int
    """Of this engine: as many consumers open each transfer that it fetches."""
    control: str
    """ZMQ address of the engine loop's ROUTER; the link connects as `kv-RANK-BOOTID`."""
    host: str
    """To listen on, and under which other engines reach this rank."""
    config: KvTransferConfig
    fingerprint: dict[str, str]
    pools: Annotated[tuple[PoolSpec, ...], Meta(min_length=1, max_length=2)]
    """The target's, and the drafter's where this rank holds part of one."""
    board_fd: int
    """A memfd of `Board.nbytes` at least, its nonce drawn; the link raises its heartbeat."""
    num_slots: int
    num_layers: int
    num_draft_layers: int
    wakeup_fd: int
    """An eventfd, non-blocking: the rank adds to it whenever it has raised marks."""
    tls: TlsFiles | None = None
    """Without, links are open to whoever reaches `host`."""


class Faults(WireType, frozen=True, kw_only=True):
    """What a link does wrong on purpose. Nothing, unless the environment says so."""

    flip_byte_every: int = 0
    """One byte of every n-th frame that is sent; 0 for none."""
    slow_reader_s: float = 0.0
    """Waited before each frame that is read."""
    on_signals: bool = False
    """SIGUSR1: a byte of the next frame that is sent. SIGUSR2: a slow reader for `SLOW_FOR_S`."""


class Saboteur:
    """Does to a link what `Faults` says."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._num_frames = 0
        self._flip_next = False

    @property
    def tampers(self) -> bool:
        return bool(self._faults.flip_byte_every) or self._faults.on_signals

    def tamper(self, body: bytes) -> bytes:
        """What is sent instead of a frame."""
        self._num_frames += 1
        every = self._faults.flip_byte_every
        if not self._flip_next and (not every or self._num_frames % every):
            return body
        self._flip_next = False
        # the highest bit of an exponent: a frame that was used all the same would change the text
        at = min(secrets.randbelow(len(body)) | 3, len(body) - 1)
        return body[:at] + bytes([body[at] ^ 0x40]) + body[at + 1 :]

    def obey_signals(self, loop: asyncio.AbstractEventLoop, consumer: Consumer) -> None:
        if not self._faults.on_signals:
            return

        def flip() -> None:
            self._flip_next = True

        def slow_down() -> None:
            consumer.pause_s = SLOW_READ_S
            loop.call_later(SLOW_FOR_S, speed_up)

        def speed_up() -> None:
            consumer.pause_s = self._faults.slow_reader_s

        loop.add_signal_handler(signal.SIGUSR1, flip)
        loop.add_signal_handler(signal.SIGUSR2, slow_down)


class _Link:
    """Producer and consumer of one rank, and their line to the engine loop."""

    def __init__(self, spec: LinkSpec, faults: Faults) -> None:
        # here, so that a rank, which imports LinkSpec, needs none of grpc
        from paceline.runtime.transfer.consumer import Consumer
        from paceline.runtime.transfer.producer import Producer
        from paceline.runtime.transfer.shm import advertise

        self._spec = spec
        self._saboteur = Saboteur(faults)
        self._boot_id = secrets.randbits(63) | 1
        self._commands = msgspec.msgpack.Decoder(Command)
        self._encoder = msgspec.msgpack.Encoder()
        geometry = {
            "num_slots": spec.num_slots,
            "num_layers": spec.num_layers,
            "num_draft_layers": spec.num_draft_layers,
        }
        self._board = Board(mmap.mmap(spec.board_fd, Board.nbytes(**geometry)), **geometry)
        pools: dict[ModelName, Pages] = {
            pool.layout.name: Pages(mmap.mmap(pool.fd, pool.num_bytes), pool.layout, pool.place)
            for pool in spec.pools
        }
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"kv-%d-%d" % (spec.rank, self._boot_id))
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_COMMAND_BYTES)
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self._producer = Producer(
            pools=pools,
            board=self._board,
            engine_id=spec.engine_id,
            rank=spec.rank,
            num_ranks=spec.num_ranks,
            boot_id=self._boot_id,
            fingerprint=spec.fingerprint,
            config=spec.config,
            tls=spec.tls,
            on_ended=self._news.put_nowait,
            shared_memory=advertise(spec, self._board.nonce),
            tamper=self._saboteur.tamper if self._saboteur.tampers else None,
        )
        self._consumer = Consumer(
            pools=pools,
            engine_id=spec.engine_id,
            rank=spec.rank,
            num_ranks=spec.num_ranks,
            fingerprint=spec.fingerprint,
            config=spec.config,
            tls=spec.tls,
            on_ended=self._news.put_nowait,
            pause_s=faults.slow_reader_s,
        )

    async def run(self) -> None:
        """Until SIGTERM."""
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stopping.set)
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # of a terminal: the rank decides
        loop.add_reader(self._spec.wakeup_fd, self._woken)
        self._saboteur.obey_signals(loop, self._consumer)
        self._socket.connect(self._spec.control)
        port = await self._producer.start(self._spec.host)
        host = f"[{self._spec.host}]" if ":" in self._spec.host else self._spec.host
        self._news.put_nowait(
            LinkReady(
                rank=self._spec.rank,
                boot_id=self._boot_id,
                address=f"{host}:{port}",
                fingerprint=self._spec.fingerprint,
            )
        )
        loops = (self._beat(), self._obey(), self._tell(), stopping.wait())
        tasks = [asyncio.create_task(each) for each in loops]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks[:2]:
            task.cancel()
        await self._consumer.stop()
        await self._producer.stop()
        for task in tasks:
            task.cancel()
        while not self._news.empty():
            await self._socket.send(self._encoder.encode(self._news.get_nowait()))
        self._socket.close()
        for task in done:
            task.result()  # raises what ended it, if not a signal

    def _woken(self) -> None:
        try:
            os.eventfd_read(self._spec.wakeup_fd)
        except BlockingIOError:
            return
        self._producer.progressed()

    async def _beat(self) -> None:
        while True:
            self._board.beat()
            await asyncio.sleep(HEARTBEAT_EVERY_S)

    async def _tell(self) -> None:
        while True:
            await self._socket.send(self._encoder.encode(await self._news.get()))

    async def _obey(self) -> None:
        while True:
            body: Any = await self._socket.recv()
            try:
                command = self._commands.decode(body)
            except msgspec.DecodeError as error:
                logger.warning("ignored a command that is none: %s", error)
                continue
            if isinstance(command, Offer):
                self._producer.offer(command)
            elif isinstance(command, Complete):
                self._producer.complete(command)
            elif isinstance(command, Fetch):
                self._consumer.fetch(command)
            elif isinstance(command, Cancel):
                self._consumer.cancel(command)
            else:
                self._producer.withdraw(command)


def _watch_parent() -> None:
    """End with the process that started this one, whatever else this one is doing."""
    parent = os.getppid()
    try:
        watched = os.pidfd_open(parent)
    except OSError:  # it is gone already
        os._exit(1)

    def wait() -> None:
        poller = select.poll()
        poller.register(watched, select.POLLIN)
        while os.getppid() == parent:
            poller.poll(1000)
        os._exit(1)

    threading.Thread(target=wait, name="watch-parent", daemon=True).start()


def keep_memory() -> None:
    """Have the allocator keep what frames have used for the next ones: a page that is given back costs
    a fault when it is wanted again, which would be most of the time that sending takes."""
    with contextlib.suppress(AttributeError):  # not glibc
        tune = ctypes.CDLL(None).mallopt
        tune(_M_MMAP_THRESHOLD, 1 << 26)
        tune(_M_TRIM_THRESHOLD, 1 << 28)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def main() -> None:
    keep_memory()
    _watch_parent()
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=LinkSpec)
    configure_child(role=f"{spec.engine_id}/link {spec.rank}")
    faults = msgspec.json.decode(os.environ.get(FAULTS, "{}"), type=Faults)
    if faults != Faults():
        logger.warning("this KV link fails on purpose: %s", faults)
    asyncio.run(_run(spec, faults))


async def _run(spec: LinkSpec, faults: Faults) -> None:
    await _Link(spec, faults).run()


if __name__ == "__main__":
    main()

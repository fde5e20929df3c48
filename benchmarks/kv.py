"""KV between two processes of this machine: GB/s by lanes and chunk size, beside what could carry it bare.

    links         our producer and consumer: pool -> frames with checksums -> pool
    shared memory the same, where the consumer reads the producer's pool in place
    bare gRPC     the same bytes over and over in a raw gRPC stream, thrown away on arrival
    TCP           likewise through plain sockets

and, between two engines, how much of a transfer is left when the prompt has been read
(`kv_overlap.py`).

Each round measures all of them once, one after the other. Ratios are of the medians over rounds, best
shape over best shape.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import grpc
import grpc.aio
import msgspec
import numpy as np

from benchmarks import report
from benchmarks.kv_overlap import LENGTHS, overlap
from paceline.runtime.config import KvTransferConfig
from paceline.runtime.transfer.board import Board
from paceline.runtime.transfer.consumer import Consumer
from paceline.runtime.transfer.layout import (
    GroupPlace,
    Held,
    ModelLayout,
    ModelName,
    PoolPlace,
    UnitPlace,
)
from paceline.runtime.transfer.messages import Complete, Ended, Fetch, Offer
from paceline.runtime.transfer.pages import Pages
from paceline.runtime.transfer.peers import OPTIONS as CLIENT_OPTIONS
from paceline.runtime.transfer.process import LinkSpec, PoolSpec, keep_memory
from paceline.runtime.transfer.producer import OPTIONS as SERVER_OPTIONS
from paceline.runtime.transfer.producer import Producer
from paceline.runtime.transfer.shm import advertise
from paceline.runtime.types import Handover

EXPECTED = {"over_bare_grpc": (">=", 0.8), "unoverlapped_share": ("<=", 0.15)}
LANES = (1, 2, 4)
CHUNKS = (1 << 18, 1 << 20, 1 << 22)
NUM_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 128, 16
"""Of Llama 3 8B, in bfloat16: 128 KiB for each token of its 32 layers."""
NUM_SLOTS = 4
WAIT_S = 120.0
METHOD = "/bench.Bare/Stream"


class Shape(msgspec.Struct, frozen=True):
    num_layers: int
    num_tokens: int

    @property
    def layout(self) -> ModelLayout:
        return ModelLayout(
            name="target",
            num_layers=self.num_layers,
            num_kv_heads=NUM_HEADS,
            head_dim=HEAD_DIM,
            dtype="bfloat16",
            held=tuple(
                Held(layer=layer, head_start=0, head_stop=NUM_HEADS)
                for layer in range(self.num_layers)
            ),
        )

    @property
    def num_bytes(self) -> int:
        return self.layout.page_bytes(NUM_HEADS) * self.num_tokens // 16 * self.num_layers

    @property
    def place(self) -> PoolPlace:
        return PoolPlace(
            block_size=BLOCK_SIZE,
            num_blocks=self.num_tokens // BLOCK_SIZE,
            groups=(GroupPlace(offset_bytes=0, num_units=self.num_layers * NUM_HEADS),),
            units=tuple(
                UnitPlace(group=0, first_unit=layer * NUM_HEADS) for layer in range(self.num_layers)
            ),
        )

    @property
    def block_ids(self) -> tuple[int, ...]:
        """In no order."""
        return tuple(np.random.default_rng(0).permutation(self.place.num_blocks).tolist())


class Memory:
    """One side's pool and board."""

    def __init__(self, shape: Shape) -> None:
        import mmap
        import os

        self.shape = shape
        self.fd = os.memfd_create("paceline-bench")
        os.ftruncate(self.fd, shape.num_bytes)
        self.buffer = mmap.mmap(self.fd, shape.num_bytes)
        self.pages = Pages(self.buffer, shape.layout, shape.place)
        self.geometry = {
            "num_slots": NUM_SLOTS,
            "num_layers": shape.num_layers,
            "num_draft_layers": 0,
        }
        self.board_fd = os.memfd_create("paceline-bench-board")
        os.ftruncate(self.board_fd, Board.nbytes(**self.geometry))
        self.board = Board(mmap.mmap(self.board_fd, Board.nbytes(**self.geometry)), **self.geometry)
        self.board.nonce = os.urandom(16)

    def spec(self) -> LinkSpec:
        return LinkSpec(
            engine_id="bench",
            rank=0,
            num_ranks=1,
            control="",
            host="127.0.0.1",
            config=KvTransferConfig(),
            fingerprint={},
            pools=(
                PoolSpec(
                    layout=self.shape.layout,
                    place=self.shape.place,
                    fd=self.fd,
                    num_bytes=self.shape.num_bytes,
                ),
            ),
            board_fd=self.board_fd,
            wakeup_fd=-1,
            **self.geometry,
        )


# ------------------------------------------------------------------------------ the serving process


def serve_links(told: Connection, shape: Shape) -> None:
    """A producer with everything computed: each message from the other end is an offer to make."""
    keep_memory()
    memory = Memory(shape)
    rng = np.random.default_rng(1)
    numbers = np.frombuffer(memory.buffer, dtype=np.uint8)
    for start in range(0, len(numbers), 1 << 24):
        numbers[start : start + (1 << 24)] = np.frombuffer(
            rng.bytes(min(1 << 24, len(numbers) - start)), dtype=np.uint8
        )
    memory.board.begin(0, 1)
    memory.board.marks[0] = shape.num_tokens

    async def run() -> None:
        pools: dict[ModelName, Pages] = {"target": memory.pages}
        producer = Producer(
            pools=pools,
            board=memory.board,
            engine_id="prefill",
            rank=0,
            num_ranks=1,
            boot_id=1,
            fingerprint={},
            config=KvTransferConfig(),
            on_ended=lambda _: None,
            shared_memory=advertise(memory.spec(), memory.board.nonce),
        )

        def offer() -> None:
            try:
                name = told.recv()
            except EOFError:
                stopped.set()
                return
            block_ids = shape.block_ids
            producer.offer(
                Offer(
                    transfer_id=name,
                    slot=0,
                    generation=1,
                    block_ids=block_ids,
                    num_tokens=shape.num_tokens,
                    lease_s=WAIT_S,
                )
            )
            handover = Handover(token_ids=(1,), seed=0, position=shape.num_tokens)
            producer.complete(Complete(transfer_id=name, handover=handover))

        stopped = asyncio.Event()
        told.send(await producer.start("127.0.0.1"))
        asyncio.get_running_loop().add_reader(told.fileno(), offer)
        await stopped.wait()
        await producer.stop()

    asyncio.run(run())


class Messages:
    """As many bytes as a pool has, cut into messages beforehand."""

    def __init__(self, shape: Shape) -> None:
        self._content = np.random.default_rng(1).bytes(shape.num_bytes)
        self._cut: dict[int, list[bytes]] = {}
        self._at = 0

    def take(self, count: int, size: int) -> list[bytes]:
        """So many, other ones than last time while there are any."""
        if size not in self._cut:
            content = self._content
            self._cut = {size: [content[at : at + size] for at in range(0, len(content), size)]}
        cut = self._cut[size]
        self._at = (self._at + count) % len(cut)
        return (cut[self._at :] + cut[: self._at])[:count]


def serve_grpc(told: Connection, shape: Shape) -> None:
    """Raw streams: a request says how many messages of how many bytes to send."""
    keep_memory()
    messages = Messages(shape)

    async def stream(requests: AsyncIterator[bytes], context: Any) -> None:
        async for request in requests:
            count, size = msgspec.json.decode(request)
            for body in messages.take(count, size):
                await context.write(body)
            return

    async def run() -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        service, method = METHOD.strip("/").split("/")
        handlers = {method: grpc.stream_stream_rpc_method_handler(stream)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        told.send(port)
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_reader(told.fileno(), stopped.set)
        await stopped.wait()
        await server.stop(0)

    asyncio.run(run())


def serve_tcp(told: Connection, shape: Shape) -> None:
    """Plain sockets, one thread each; the same request as over gRPC."""
    messages = Messages(shape)

    def send(connection: socket.socket) -> None:
        with connection:
            count, size = msgspec.json.decode(connection.recv(256))
            for body in messages.take(count, size):
                connection.sendall(body)

    def accept() -> None:
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=send, args=(connection,), daemon=True).start()

    listening = socket.create_server(("127.0.0.1", 0))
    told.send(listening.getsockname()[1])
    threading.Thread(target=accept, daemon=True).start()
    with ExitStack() as stack:
        stack.callback(listening.close)
        try:
            told.recv()
        except EOFError:
            return


# ----------------------------------------------------------------------------- the measuring process


@contextmanager
def serving(serve: Any, shape: Shape) -> Iterator[tuple[Connection, int]]:
    """A process that serves, and its port."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, shape), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(WAIT_S):
            raise TimeoutError(f"{serve.__name__} did not start in {WAIT_S:g} s")
        yield here, here.recv()
    finally:
        here.close()
        process.join(5)
        if process.is_alive():
            process.kill()


class Links:
    """Fetches the whole pool, again and again."""

    def __init__(self, told: Connection, port: int, shape: Shape, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.memory = Memory(shape)
        self.told = told
        self.address = f"127.0.0.1:{port}"
        self.count = 0
        self.consumers: dict[tuple[str, int, int], Consumer] = {}
        self.endings: asyncio.Queue[Ended] = asyncio.Queue()
        np.frombuffer(self.memory.buffer, dtype=np.uint8)[:] = 0  # pages that are there

    def seconds(self, *, plane: str, lanes: int, chunk: int) -> float:
        return self.runner.run(self._seconds(plane, lanes, chunk))

    def close(self) -> None:
        for consumer in self.consumers.values():
            self.runner.run(consumer.stop())

    def _consumer(self, plane: str, lanes: int, chunk: int) -> Consumer:
        """One of each kind, so that connections are there already, as between engines that serve."""
        key = (plane, lanes, chunk)
        if key not in self.consumers:
            pools: dict[ModelName, Pages] = {"target": self.memory.pages}
            config = {"data_plane": plane, "lanes": lanes, "chunk_bytes": chunk}
            self.consumers[key] = Consumer(
                pools=pools,
                engine_id="decode",
                rank=0,
                num_ranks=1,
                fingerprint={},
                config=msgspec.convert(config, KvTransferConfig),
                on_ended=self.endings.put_nowait,
            )
        return self.consumers[key]

    async def _seconds(self, plane: str, lanes: int, chunk: int) -> float:
        consumer = self._consumer(plane, lanes, chunk)
        self.count += 1
        shape = self.memory.shape
        name = f"transfer-{self.count}"
        self.told.send(name)
        start = time.perf_counter()
        consumer.fetch(
            Fetch(
                transfer_id=name,
                addresses=(self.address,),
                block_ids=shape.block_ids,
                num_tokens=shape.num_tokens,
                num_cached=0,
                num_draft_cached=0,
                want_draft=False,
                lease_s=WAIT_S,
                timeout_s=WAIT_S,
            )
        )
        async with asyncio.timeout(WAIT_S):
            ended = await self.endings.get()
        took = time.perf_counter() - start
        if ended.error is not None:
            raise RuntimeError(ended.error)
        return took


class Bare:
    """Reads a raw gRPC stream and keeps nothing."""

    def __init__(self, port: int, shape: Shape, runner: asyncio.Runner) -> None:
        self.address = f"127.0.0.1:{port}"
        self.shape = shape
        self.runner = runner
        self.channels: dict[int, grpc.aio.Channel] = {}

    def seconds(self, *, lanes: int, chunk: int) -> float:
        return self.runner.run(self._seconds(lanes, chunk))

    def close(self) -> None:
        for channel in self.channels.values():
            self.runner.run(channel.close())

    async def _seconds(self, lanes: int, chunk: int) -> float:
        count = self.shape.num_bytes // chunk // lanes
        start = time.perf_counter()
        await asyncio.gather(*(self._lane(number, count, chunk) for number in range(lanes)))
        return time.perf_counter() - start

    async def _lane(self, number: int, count: int, chunk: int) -> None:
        if number not in self.channels:
            options = [*CLIENT_OPTIONS, ("paceline.lane", number)]
            self.channels[number] = grpc.aio.insecure_channel(self.address, options=options)
        call = self.channels[number].stream_stream(METHOD)(timeout=WAIT_S)
        await call.write(msgspec.json.encode((count, chunk)))
        while await call.read() is not grpc.aio.EOF:
            pass


def bare_tcp(port: int, shape: Shape, *, lanes: int, chunk: int) -> float:
    def lane(count: int) -> None:
        room = bytearray(chunk)
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
            connection.sendall(msgspec.json.encode((count, chunk)))
            while connection.recv_into(room):
                pass

    count = shape.num_bytes // chunk // lanes
    threads = [threading.Thread(target=lane, args=(count,)) for _ in range(lanes)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def throughput(made: report.Report, *, shape: Shape, rounds: int) -> None:
    """Rows of GB/s, and over_bare_grpc."""
    with (
        asyncio.Runner() as runner,
        serving(serve_links, shape) as (told, links_port),
        serving(serve_grpc, shape) as (_, grpc_port),
        serving(serve_tcp, shape) as (_, tcp_port),
        ExitStack() as stack,
    ):
        links = stack.enter_context(closing(Links(told, links_port, shape, runner)))
        bare = stack.enter_context(closing(Bare(grpc_port, shape, runner)))
        for each in range(-1, rounds):  # the first one warms up
            report.say(f"round {each + 1} of {rounds}")
            for lanes in LANES:
                for chunk in CHUNKS:
                    took = {
                        "links": links.seconds(plane="grpc", lanes=lanes, chunk=chunk),
                        "bare gRPC": bare.seconds(lanes=lanes, chunk=chunk),
                    }
                    if chunk == CHUNKS[1]:
                        took["TCP"] = bare_tcp(tcp_port, shape, lanes=lanes, chunk=chunk)
                    if chunk == CHUNKS[1] and lanes == 1:
                        took["shared memory"] = links.seconds(plane="shm", lanes=1, chunk=chunk)
                    if each < 0:
                        continue
                    for what, seconds in took.items():
                        made.rows.append(
                            {
                                "what": what,
                                "lanes": lanes,
                                "chunk_kib": chunk >> 10,
                                "round": each,
                                "seconds": seconds,
                                "gb_per_s": shape.num_bytes / seconds / 1e9,
                            }
                        )
    rates = medians(made.rows)
    best = {
        what: max(rate for (name, *_), rate in rates.items() if name == what)
        for what in ("links", "bare gRPC", "TCP", "shared memory")
    }
    made.ratios["over_bare_grpc"] = best["links"] / best["bare gRPC"]
    made.ratios["over_tcp"] = best["links"] / best["TCP"]
    made.ratios["shared_memory_over_bare_grpc"] = best["shared memory"] / best["bare gRPC"]


def medians(rows: list[report.Row]) -> dict[tuple[str, int, int], float]:
    """GB/s by what, lanes and KiB of a chunk."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        if "gb_per_s" not in row:
            continue
        key = (row["what"], row["lanes"], row["chunk_kib"])
        found.setdefault(key, []).append(row["gb_per_s"])
    return {key: median(rates) for key, rates in found.items()}


def main() -> None:
    parser = report.parser(__doc__)
    args = parser.parse_args()
    keep_memory()
    shape = Shape(16, 4096) if args.quick else Shape(32, 4096)
    rounds = 3 if args.quick else 7
    settings = {
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "bfloat16",
        "num_layers": shape.num_layers,
        "num_tokens": shape.num_tokens,
        "bytes_per_run": shape.num_bytes,
        "rounds": rounds,
    }
    made = report.Report("kv", settings, expected=EXPECTED)
    throughput(made, shape=shape, rounds=rounds)
    overlap(made, rounds=2 if args.quick else 5, lengths=LENGTHS[:3] if args.quick else LENGTHS)
    table = [
        {"what": what, "lanes": lanes, "chunk KiB": chunk, "GB/s": rate}
        for (what, lanes, chunk), rate in sorted(medians(made.rows).items())
    ]
    made.print(("what", "lanes", "chunk KiB", "GB/s"), table)
    made.write(args.output)


if __name__ == "__main__":
    main()

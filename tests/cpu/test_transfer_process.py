"""Links as processes of their own: started as a rank starts them, told what an engine loop tells."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from tests import links
from tests.certificates import Authority
from tests.links import Rank, a_fetch, an_offer, blocks, complete

from paceline.runtime.config import EngineConfig
from paceline.runtime.tls import LINK_NAME, link_tls
from paceline.runtime.transfer.messages import Cancel, Ended, LinkReady, News
from paceline.runtime.transfer.process import FAULTS

COMMAND = [sys.executable, "-m", "paceline.runtime.transfer.process"]
TOKENS = 75


class Line:
    """An engine loop's end, for links of rank 0."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self._link = b""

    def news(self, wait_s: float = links.WAIT_S) -> LinkReady | Ended:
        assert self._socket.poll(int(wait_s * 1e3)), f"no news in {wait_s} s"
        self._link, body = self._socket.recv_multipart()
        return msgspec.msgpack.decode(body, type=News)  # type: ignore[no-any-return]

    def ended(self) -> Ended:
        news = self.news()
        assert isinstance(news, Ended)
        return news

    def ready(self) -> LinkReady:
        news = self.news()
        assert isinstance(news, LinkReady)
        return news

    def tell(self, command: msgspec.Struct) -> None:
        self._socket.send_multipart((self._link, msgspec.msgpack.encode(command)))

    def close(self) -> None:
        self._socket.close()


class Link:
    """One rank with its link."""

    def __init__(self, context: zmq.Context[Any], rank: Rank, **config: Any) -> None:
        self.rank = rank
        self.line = Line(context)
        self._spec = rank.spec(rank=0, num_ranks=1, control=self.line.address, **config)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> LinkReady:
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            pass_fds=self.rank.pass_fds(),
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(self._spec))
        self.process.stdin.close()
        return self.line.ready()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(links.WAIT_S)
        self.line.close()
        self.rank.close()


MakeLink = Callable[..., Link]


@pytest.fixture
def make_link() -> Iterator[MakeLink]:
    made: list[Link] = []
    with zmq.Context() as context:

        def make(*, block_size: int = 16, **config: Any) -> Link:
            rank = links.ranks(1, draft=True, block_size=block_size)[0]
            made.append(Link(context, rank, **config))
            return made[-1]

        yield make
        for link in made:
            link.close()


class Transfer:
    """One prompt's KV, from one link to another."""

    def __init__(self, producer: Link, consumer: Link) -> None:
        self.producer, self.consumer = producer, consumer
        layouts = producer.rank.layouts
        self.kv = links.random_kv(layouts, TOKENS)
        self.theirs = blocks(producer.rank, TOKENS, seed=1)
        self.ours = blocks(consumer.rank, TOKENS, seed=2)

    def offer(self, **changes: Any) -> None:
        self.producer.rank.fill(self.kv, self.theirs, TOKENS)
        self.producer.rank.board.begin(1, 7)
        self.producer.line.tell(an_offer(self.theirs, TOKENS, **changes))

    def compute(self, tokens: int = TOKENS) -> None:
        self.producer.rank.board.marks[1] = tokens
        os.eventfd_write(self.producer.rank.wakeup_fd, 1)

    def finish(self) -> None:
        self.compute()
        self.producer.line.tell(complete(TOKENS))

    def num_missing(self) -> int:
        found = self.consumer.rank.read("target", self.ours, TOKENS)
        return sum(
            int((layer != self.kv["target"][at]).any(axis=(1, 2)).sum())
            for at, layer in enumerate(found)
        )

    def wait_for(self, num_missing: int) -> None:
        deadline = time.monotonic() + links.WAIT_S
        while self.num_missing() != num_missing:
            assert time.monotonic() < deadline, f"{self.num_missing()} pages are missing"
            time.sleep(0.002)


@pytest.mark.parametrize(("plane", "secure"), [("grpc", False), ("shm", False), ("grpc", True)])
def test_kv_moves_from_process_to_process_as_it_is_computed(
    make_link: MakeLink, tmp_path: Path, plane: str, secure: bool
) -> None:
    authority = Authority(tmp_path)
    signed = authority.sign("link", LINK_NAME)
    config = EngineConfig(
        link_certfile=signed.cert, link_keyfile=signed.key, link_ca_certs=authority.path
    )
    tls = link_tls(config) if secure else None
    producer = make_link(block_size=32, tls=tls)
    consumer = make_link(data_plane=plane, tls=tls)
    address = producer.start().address
    consumer.start()
    transfer = Transfer(producer, consumer)
    consumer.line.tell(a_fetch((address,), transfer.ours, TOKENS))
    transfer.offer()
    transfer.compute(32)
    transfer.wait_for(3 * 3)
    transfer.finish()
    ended = consumer.line.ended()
    assert ended.error is None
    assert ended.handover is not None
    assert ended.stats.plane == plane
    assert transfer.num_missing() == 0
    assert producer.line.ended().error is None


@pytest.mark.parametrize("plane", ["grpc", "shm"])
def test_a_killed_producer_fails_the_fetch_and_its_successor_serves(
    make_link: MakeLink, plane: str
) -> None:
    producer, consumer = make_link(), make_link(data_plane=plane)
    first = producer.start()
    consumer.start()
    transfer = Transfer(producer, consumer)
    consumer.line.tell(a_fetch((first.address,), transfer.ours, TOKENS))
    transfer.offer()
    transfer.compute(32)
    transfer.wait_for(3 * 3)
    assert producer.process is not None
    producer.process.kill()
    started = time.monotonic()
    assert consumer.line.ended().error is not None
    assert time.monotonic() - started < 5
    producer.process.wait()
    second = producer.start()
    assert second.boot_id != first.boot_id
    transfer.offer(transfer_id="again")
    transfer.compute()
    producer.line.tell(complete(TOKENS, transfer_id="again"))
    fetch = a_fetch((second.address,), transfer.ours, TOKENS, transfer_id="again")
    consumer.line.tell(fetch)
    assert consumer.line.ended().error is None
    assert transfer.num_missing() == 0


@pytest.mark.parametrize("fetching", [False, True])
def test_memory_of_a_producer_that_died_is_let_go_whether_somebody_fetches_or_not(
    make_link: MakeLink, fetching: bool
) -> None:
    producer, consumer = make_link(), make_link(data_plane="shm")
    address = producer.start().address
    consumer.start()
    assert producer.process is not None
    assert consumer.process is not None
    transfer = Transfer(producer, consumer)
    transfer.offer()
    consumer.line.tell(a_fetch((address,), transfer.ours, TOKENS))
    if fetching:
        transfer.compute(32)
        transfer.wait_for(3 * 3)
    else:
        transfer.finish()
        assert consumer.line.ended().error is None
    theirs = {os.fstat(fd).st_ino for fd in producer.rank.pass_fds()}

    def is_mapped() -> bool:
        maps = Path(f"/proc/{consumer.process.pid}/maps").read_text()  # type: ignore[union-attr]
        return any(int(line.split()[4]) in theirs for line in maps.splitlines())

    assert is_mapped()
    producer.process.kill()
    deadline = time.monotonic() + links.WAIT_S
    while is_mapped():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_consumer_costs_the_producer_its_lease_and_no_more(make_link: MakeLink) -> None:
    producer, consumer = make_link(), make_link()
    address = producer.start().address
    consumer.start()
    transfer = Transfer(producer, consumer)
    consumer.line.tell(a_fetch((address,), transfer.ours, TOKENS, lease_s=0.5))
    transfer.offer(lease_s=0.5)
    transfer.compute(32)
    transfer.wait_for(3 * 3)
    assert consumer.process is not None
    consumer.process.kill()
    started = time.monotonic()
    assert "lease expired" in str(producer.line.ended().error)
    assert time.monotonic() - started < 5


def test_flipped_bytes_are_found_on_the_way(make_link: MakeLink) -> None:
    producer, consumer = make_link(), make_link(data_plane="grpc")
    address = producer.start(**{FAULTS: '{"flip_byte_every": 3}'}).address
    consumer.start()
    transfer = Transfer(producer, consumer)
    transfer.offer()
    consumer.line.tell(a_fetch((address,), transfer.ours, TOKENS))
    transfer.finish()
    ended = consumer.line.ended()
    assert ended.error is None
    assert ended.stats.num_corrupt >= 1
    assert transfer.num_missing() == 0


def test_the_heart_beats_and_stops_with_the_process(make_link: MakeLink) -> None:
    link = make_link()
    link.start()
    beat = link.rank.board.heartbeat
    deadline = time.monotonic() + links.WAIT_S
    while link.rank.board.heartbeat < beat + 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert link.process is not None
    os.kill(link.process.pid, signal.SIGTERM)
    assert link.process.wait(links.WAIT_S) == 0


def test_nonsense_on_the_line_is_ignored_and_a_cancel_of_nothing_too(make_link: MakeLink) -> None:
    link = make_link()
    link.start()
    link.line._socket.send_multipart((link.line._link, b"\xc1 no message"))
    link.line.tell(Cancel(transfer_id="never heard of"))
    link.line.tell(a_fetch((), (), 16))
    assert "cannot hold" in str(link.line.ended().error)


def test_a_link_ends_with_its_parent(make_link: MakeLink) -> None:
    """A parent in between starts the link and dies without a word."""
    link = make_link()
    spec = msgspec.json.encode(link._spec)
    program = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen({COMMAND!r}, stdin=subprocess.PIPE, pass_fds={link.rank.pass_fds()!r})\n"
        "p.stdin.write(sys.stdin.buffer.read()); p.stdin.close()\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=link.rank.pass_fds(),
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(spec)
    parent.stdin.close()
    pid = int(parent.stdout.readline())
    watched = os.pidfd_open(pid)
    try:
        link.line.ready()
        parent.kill()
        parent.wait()
        assert select.select([watched], [], [], links.WAIT_S)[0], "the link outlives its parent"
    finally:
        os.close(watched)
        parent.stdout.close()


def test_links_need_neither_torch_nor_ray() -> None:
    modules = "process consumer producer control messages"
    program = (
        "import importlib, sys\n"
        f"for name in {modules.split()!r}:\n"
        "    importlib.import_module('paceline.runtime.transfer.' + name)\n"
        "assert not {'torch', 'ray'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

"""The engine loop and its ranks' KV links: a transfer has ended when every link has said so or is
dead, and one rank's failure stops the others."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
import zmq

from paceline.runtime.errors import DeadlineError, ShardError
from paceline.runtime.schedule.transfers import TransferEnd
from paceline.runtime.transfer.control import KvControl
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
from paceline.runtime.types import WIRE_VERSION, Handover

LONG_MS = 5000
HANDOVER = Handover(token_ids=(7,), seed=1, position=9)


class Link:
    """A rank's link, played by the test."""

    def __init__(self, control: KvControl, rank: int, *, boot_id: int = 1) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"kv-%d-%d" % (rank, boot_id))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(control.address)
        self._control, self.rank, self.boot_id = control, rank, boot_id

    def say(self, news: News) -> None:
        self.say_bytes(msgspec.msgpack.encode(news))

    def say_bytes(self, body: bytes) -> None:
        """Returns when the engine loop's socket holds it: words said before are taken out first, or
        one of those would be what is waited for."""
        self._control._receive()
        self._socket.send(body)
        assert self._control.socket.poll(LONG_MS)

    def ready(self, *, version: int = WIRE_VERSION) -> None:
        self.say(
            LinkReady(
                rank=self.rank,
                boot_id=self.boot_id,
                address=f"host:{self.rank}{self.boot_id}",
                fingerprint={"dtype": "float32"},
                version=version,
            )
        )

    def end(self, transfer_id: str = "t", *, error: str | None = None, **stats: float) -> None:
        self.say(
            Ended(
                rank=self.rank,
                transfer_id=transfer_id,
                producing=False,
                error=error,
                handover=None if error else HANDOVER,
                stats=msgspec.convert(stats, TransferStats),
            )
        )

    def hear(self) -> Command:
        assert self._socket.poll(LONG_MS), "nothing was said"
        return msgspec.msgpack.decode(self._socket.recv(), type=Command)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def wanted(transfer_id: str = "t", *, timeout_s: float = 60.0) -> Fetch:
    return Fetch(
        transfer_id=transfer_id,
        addresses=("there:1",),
        block_ids=(1, 2),
        num_tokens=20,
        num_cached=0,
        num_draft_cached=0,
        want_draft=False,
        lease_s=10.0,
        timeout_s=timeout_s,
    )


OFFER = Offer(transfer_id="t", slot=0, generation=1, block_ids=(1,), num_tokens=8, lease_s=9.0)


class Two:
    """An engine loop and the links of its two ranks."""

    def __init__(self) -> None:
        self.control = KvControl("tcp://127.0.0.1:*", num_ranks=2)
        self.links = [Link(self.control, rank) for rank in (0, 1)]
        self._others: list[Link] = []

    def ready(self) -> None:
        for link in self.links:
            link.ready()
        self.control.wait_ready(timeout_s=5.0, check=lambda: None)

    def successor(self, rank: int) -> Link:
        self._others.append(Link(self.control, rank, boot_id=2))
        return self._others[-1]

    def close(self) -> None:
        for link in (*self.links, *self._others):
            link.close()
        self.control.close()


@pytest.fixture
def two() -> Iterator[Two]:
    both = Two()
    yield both
    both.close()


def test_a_transfer_ends_when_every_rank_has_ended_it(two: Two) -> None:
    two.ready()
    two.control.send([wanted()])
    assert [link.hear() for link in two.links] == [wanted(), wanted()]
    two.links[1].end(num_bytes=5, seconds=2.0)
    assert two.control.receive() == []
    two.links[0].end(num_bytes=7, seconds=1.0)
    (end,) = two.control.receive()
    assert end == TransferEnd(
        transfer_id="t", handover=HANDOVER, stats=TransferStats(num_bytes=12, seconds=2.0)
    )
    assert two.control.receive() == []


@pytest.mark.parametrize(("order", "stop"), [(wanted(), Cancel), (OFFER, Withdraw)])
def test_one_ranks_failure_stops_the_others(two: Two, order: Command, stop: type) -> None:
    two.ready()
    two.control.send([order])
    for link in two.links:
        link.hear()
    two.links[1].end(error="cut")
    assert two.control.receive() == [], "rank 0 may still be writing"
    assert isinstance(two.links[0].hear(), stop)
    two.links[0].end(error="cancelled")
    (end,) = two.control.receive()
    assert end.error == "cut", "the first failure is the reason"
    assert end.handover is None or end.error


def test_a_dead_links_transfers_have_ended_when_its_successor_comes(two: Two) -> None:
    two.ready()
    two.control.send([wanted("a"), wanted("b")])
    two.links[0].end("a")
    two.control.receive()
    two.successor(1).ready()
    (end,) = two.control.receive()
    assert (end.transfer_id, end.error) == ("a", "the KV link of rank 1 died")
    two.links[0].end("b", error="cancelled")
    (end,) = two.control.receive()
    assert end.transfer_id == "b"
    assert two.control.links.addresses == ("host:01", "host:12"), "the new address"


def test_a_dead_links_last_words_come_too_late(two: Two) -> None:
    two.ready()
    two.control.send([wanted()])
    two.successor(1).ready()
    two.control.receive()
    two.control.send([wanted("u")])
    two.links[1].end("u")
    two.links[0].end("u")
    assert [end.transfer_id for end in two.control.receive()] == [], "rank 1 has not ended it"


def test_nonsense_is_ignored(two: Two) -> None:
    two.ready()
    two.control.send([wanted()])
    two.links[0].say_bytes(b"nonsense")
    two.links[0].say(Ended(rank=9, transfer_id="t", producing=False))
    two.links[0].end("unknown")
    two.links[0].end()
    two.links[0].end()
    assert two.control.receive() == []
    two.links[1].end()
    assert [end.transfer_id for end in two.control.receive()] == ["t"]


def test_links_are_known_when_all_serve(two: Two) -> None:
    assert two.control.links.addresses == ()
    two.links[0].ready()
    with pytest.raises(DeadlineError, match=r"KV links of ranks \[1\]"):
        two.control.wait_ready(timeout_s=0.1, check=lambda: None)
    two.ready()
    assert two.control.links.addresses == ("host:01", "host:11")
    assert two.control.links.fingerprint == {"dtype": "float32"}


def test_a_rank_that_dies_while_its_link_is_waited_for_is_told(two: Two) -> None:
    def check() -> None:
        raise ShardError("rank 1 is gone")

    with pytest.raises(ShardError, match="rank 1 is gone"):
        two.control.wait_ready(timeout_s=60.0, check=check)


def test_a_link_of_another_version_is_refused(two: Two) -> None:
    two.links[0].ready(version=WIRE_VERSION + 1)
    with pytest.raises(ShardError, match="mixed installations"):
        two.control.receive()


def test_a_link_that_never_ends_a_transfer_is_an_error_in_the_end(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.runtime.transfer.control.GRACE_S", 0.0)
    two.ready()
    two.control.send([wanted(timeout_s=0.0)])
    two.links[0].end()
    with pytest.raises(ShardError, match=r"ranks \[1\] do not end transfer t"):
        two.control.receive()

"""Producers and consumers of one event loop, over loopback: what arrives, when, and what becomes of
failures."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from tests import links
from tests.links import a_fetch, an_offer, complete, consuming, producing
from tests.pairs import TOKENS, Pair, both, call, run

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime.transfer.messages import Cancel, Withdraw
from paceline.runtime.transfer.wire import SERVICE

# --------------------------------------------------------------------------------- what arrives


@pytest.mark.parametrize("plane", ["grpc", "shm"])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (2, 2), (8, 2), (2, 8)])
def test_every_head_arrives_whatever_the_sizes(sizes: tuple[int, int], plane: str) -> None:
    async def check() -> None:
        pair = Pair(*sizes)
        async with both(pair, plane=plane) as (producers, addresses, consumers):
            pair.fetch(consumers, addresses, want_draft=True)
            pair.offer(producers)
            pair.finish(producers, draft_exact=70)
            for _ in consumers:
                ended = await pair.consumed.next()
                assert ended.error is None
                assert ended.handover is not None
                assert (ended.handover.token_ids, ended.handover.draft_exact) == ((42,), 70)
                assert ended.stats.plane == plane
            assert [(await pair.produced.next()).error for _ in producers] == [None] * sizes[0]
        assert pair.missing("target") == pair.missing("draft") == 0

    run(check())


def test_more_than_the_credit_arrives_in_one_go() -> None:
    async def check() -> None:
        pair = Pair(tokens=62 * 16)
        config = {"credit_bytes": 1 << 16, "chunk_bytes": 1 << 16}
        async with both(pair, consumer=config) as (producers, addresses, consumers):
            pair.offer(producers)
            pair.finish(producers)
            pair.fetch(consumers, addresses)
            ended = await pair.consumed.next()
        assert ended.error is None
        assert ended.stats.num_resumed == 0
        assert ended.stats.num_bytes > 8 * config["credit_bytes"]
        assert pair.missing() == 0

    run(check())


def test_replicated_heads_travel_once() -> None:
    async def check() -> None:
        pair = Pair(8, 1)  # four heads, each on two ranks
        async with both(pair) as (producers, addresses, consumers):
            pair.offer(producers)
            pair.finish(producers)
            pair.fetch(consumers, addresses)
            ended = await pair.consumed.next()
        payload = pair.kv["target"].nbytes
        assert payload < ended.stats.num_bytes < 1.1 * payload + 3000

    run(check())


@pytest.mark.parametrize("plane", ["grpc", "shm"])
def test_a_layer_arrives_while_the_next_is_not_computed(plane: str) -> None:
    async def check() -> None:
        pair = Pair()
        async with both(pair, plane=plane) as (producers, addresses, consumers):
            pair.offer(producers)
            pair.fetch(consumers, addresses)
            rank = pair.prefill[0]
            total, pages = pair.missing(), links.num_pages(TOKENS)
            rank.board.marks[1, 0] = 40  # two whole pages
            producers[0].progressed()
            await links.until(lambda: pair.missing() == total - 2)
            rank.board.marks[1, 0] = TOKENS
            producers[0].progressed()
            await links.until(lambda: pair.missing() == total - pages)
            assert pair.consumed.empty()
            pair.finish(producers)
            assert (await pair.consumed.next()).error is None
        assert pair.missing() == 0

    run(check())


@pytest.mark.parametrize("plane", ["grpc", "shm"])
def test_what_the_consumer_has_cached_is_neither_sent_nor_written(plane: str) -> None:
    async def check() -> None:
        pair = Pair()
        before = pair.decode[0].read("target", pair.ours, TOKENS)[0][:2].copy()
        async with both(pair, plane=plane) as (producers, addresses, consumers):
            pair.offer(producers)
            pair.finish(producers, draft_exact=TOKENS)
            pair.fetch(consumers, addresses, num_cached=32, num_draft_cached=48, want_draft=True)
            assert (await pair.consumed.next()).error is None
        assert pair.missing("target", first_page=2) == pair.missing("draft", first_page=3) == 0
        after = pair.decode[0].read("target", pair.ours, TOKENS)[0][:2]
        assert np.array_equal(after, before)

    run(check())


def test_blocks_of_others_are_not_touched() -> None:
    async def check() -> None:
        pair = Pair()
        rank = pair.decode[0]
        others = tuple(set(range(rank.place.num_blocks)) - set(pair.ours))
        tokens = len(others) * 16
        rank.fill(links.random_kv(rank.layouts, tokens, seed=5), others, tokens)
        before = rank.read("target", others, tokens)
        async with both(pair) as (producers, addresses, consumers):
            pair.offer(producers)
            pair.finish(producers)
            pair.fetch(consumers, addresses)
            assert (await pair.consumed.next()).error is None
        after = rank.read("target", others, tokens)
        assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))

    run(check())


def test_int8_arrives_nearly_as_it_was_and_half_as_long() -> None:
    async def check() -> None:
        pair = Pair()
        async with both(pair, consumer={"codec": "int8"}) as (producers, addresses, consumers):
            pair.offer(producers)
            pair.finish(producers)
            pair.fetch(consumers, addresses)
            ended = await pair.consumed.next()
        assert ended.error is None
        assert ended.stats.num_bytes < 0.5 * pair.kv["target"].nbytes
        for layer, found in enumerate(pair.decode[0].read("target", pair.ours, TOKENS)):
            wanted = np.ascontiguousarray(pair.kv["target"][layer]).view(np.float32)
            assert np.allclose(found.view(np.float32), wanted, atol=np.abs(wanted).max() / 127)

    run(check())


def test_a_drafter_of_other_weights_is_left_out() -> None:
    async def check() -> None:
        pair = Pair()
        other = {**links.FINGERPRINT, "draft.weights": "other"}
        async with both(pair, producer={"fingerprint": other}) as (producers, addresses, consumers):
            pair.offer(producers)
            pair.finish(producers, draft_exact=70)
            pair.fetch(consumers, addresses, want_draft=True)
            ended = await pair.consumed.next()
        assert ended.error is None
        assert ended.handover is not None
        assert ended.handover.draft_exact == 0
        assert pair.missing("target") == 0

    run(check())


# --------------------------------------------------------------------------------- refusals, ends


def test_another_model_is_refused_with_the_difference_and_nothing_is_written() -> None:
    async def check() -> None:
        pair = Pair()
        other = {**links.FINGERPRINT, "weights": "xyz"}
        total = pair.missing()
        async with both(pair, producer={"fingerprint": other}) as (producers, addresses, consumers):
            pair.offer(producers)
            pair.finish(producers)
            pair.fetch(consumers, addresses)
            error = (await pair.consumed.next()).error
        assert error is not None
        assert "weights: abc here, xyz there" in error
        assert pair.missing() == total

    run(check())


@pytest.mark.parametrize("plane", ["grpc", "shm"])
def test_nobody_touches_blocks_once_a_cancel_has_ended(plane: str) -> None:
    async def check() -> None:
        pair = Pair()
        async with both(pair, plane=plane) as (producers, addresses, consumers):
            pair.offer(producers)
            pair.fetch(consumers, addresses)
            pair.compute(producers, tokens=32)
            await links.until(lambda: pair.missing() == 3 * 3)
            consumers[0].cancel(Cancel(transfer_id="t"))
            assert (await pair.consumed.next()).error == "cancelled"
            error = (await pair.produced.next()).error
            assert error is not None
            assert "aborted by consumer" in error
            pair.finish(producers)  # too late
            async with grpc.aio.insecure_channel(addresses[0]) as channel:
                await call(channel, "Describe", pb.DescribeRequest())  # they had their turn
            assert pair.missing() == 3 * 3
            assert pair.consumed.empty()
            assert pair.produced.empty()

    run(check())


def test_an_abort_that_overtakes_its_offer_ends_it() -> None:
    async def check() -> None:
        pair = Pair()
        async with both(pair) as (producers, addresses, consumers):
            pair.fetch(consumers, addresses)
            consumers[0].cancel(Cancel(transfer_id="t"))
            assert (await pair.consumed.next()).error == "cancelled"
            pair.offer(producers)
            assert "aborted by consumer" in str((await pair.produced.next()).error)

    run(check())


@pytest.mark.parametrize("plane", ["grpc", "shm"])
@pytest.mark.parametrize("is_offered", [True, False])
def test_a_withdrawn_transfer_fails_at_once_and_says_why(plane: str, is_offered: bool) -> None:
    async def check() -> None:
        pair = Pair()
        async with both(pair, plane=plane) as (producers, addresses, consumers):
            pair.fetch(consumers, addresses)
            if is_offered:
                pair.offer(producers)
                pair.compute(producers, tokens=32)
                await links.until(lambda: pair.missing() == 3 * 3)
            producers[0].withdraw(Withdraw(transfer_id="t", reason="out of paper"))
            ended = await pair.consumed.next()
            assert "out of paper" in str(ended.error)
            assert ended.stats.seconds < links.WAIT_S / 2
            if is_offered:
                assert "out of paper" in str((await pair.produced.next()).error)

    run(check())


def test_a_lease_that_nobody_renews_ends_and_one_in_use_does_not() -> None:
    async def check() -> None:
        pair = Pair()
        lease_s = 1.0
        async with both(pair) as (producers, addresses, consumers):
            pair.offer(producers, lease_s=lease_s)
            ended = await pair.produced.next()
            assert "lease expired" in str(ended.error)
            pair.offer(producers, transfer_id="used", lease_s=lease_s)
            pair.fetch(consumers, addresses, transfer_id="used", lease_s=lease_s)
            await asyncio.sleep(2.5 * lease_s)  # time is what this is about
            assert pair.produced.empty()
            pair.compute(producers)
            producers[0].complete(complete(TOKENS, transfer_id="used"))
            assert (await pair.consumed.next()).error is None
            assert (await pair.produced.next()).error is None

    run(check())


def test_pages_that_were_let_go_while_they_were_read_do_not_count() -> None:
    async def check() -> None:
        pair = Pair()
        async with both(pair, plane="shm") as (producers, addresses, consumers):
            commit = consumers[0]._commit

            async def late(*args: Any) -> None:
                producers[0].withdraw(Withdraw(transfer_id="t", reason="sold"))
                await commit(*args)

            consumers[0]._commit = late  # type: ignore[method-assign]
            pair.offer(producers)
            pair.finish(producers)
            pair.fetch(consumers, addresses)
            assert "let the pages go" in str((await pair.consumed.next()).error)

    run(check())


def test_pages_read_after_their_lease_do_not_count() -> None:
    async def check() -> None:
        pair = Pair()
        async with both(pair, plane="shm") as (producers, addresses, consumers):
            pair.offer(producers, lease_s=0.3)
            pair.compute(producers)
            pair.fetch(consumers, addresses, lease_s=60.0)  # renews too late
            assert "lease expired" in str((await pair.produced.next()).error)
            assert (await pair.consumed.next()).error is not None

    run(check())


def test_blocks_that_are_not_there_are_refused_on_both_sides() -> None:
    async def check() -> None:
        pair = Pair()
        async with both(pair) as (producers, addresses, consumers):
            producers[0].offer(an_offer((0, 1, 64), TOKENS))
            assert "block id" in str((await pair.produced.next()).error)
            consumers[0].fetch(a_fetch(addresses, (0, 1), TOKENS))
            assert "cannot hold" in str((await pair.consumed.next()).error)

    run(check())


def test_a_fetch_that_takes_too_long_fails() -> None:
    async def check() -> None:
        pair = Pair()
        async with both(pair) as (_, addresses, consumers):
            pair.fetch(consumers, addresses, timeout_s=0.2)
            assert "not complete after 0.2 s" in str((await pair.consumed.next()).error)

    run(check())


# ------------------------------------------------------------------------------------- bad weather


@pytest.mark.parametrize("where", ["header", "payload", "lost", "twice"])
def test_a_damaged_frame_is_never_used_and_asked_for_again(where: str) -> None:
    count = 0

    def tamper(body: bytes) -> bytes:
        nonlocal count
        count += 1
        if count not in (2, 5):
            return body
        if where == "lost":
            return body[:40]
        if where == "twice":
            return last[0]
        at = 20 if where == "header" else len(body) - 3
        return body[:at] + bytes([body[at] ^ 4]) + body[at + 1 :]

    last = [b""]

    def remember(body: bytes) -> bytes:
        sent = tamper(body)
        last[0] = body
        return sent

    async def check() -> None:
        pair = Pair()
        async with both(pair, producer={"tamper": remember}, consumer={"lanes": 1}) as (
            producers,
            addresses,
            consumers,
        ):
            pair.offer(producers)
            pair.fetch(consumers, addresses)
            for tokens in (16, 32, 48, TOKENS):
                pair.compute(producers, tokens=tokens)
                await asyncio.sleep(0)
            pair.finish(producers)
            ended = await pair.consumed.next()
        assert ended.error is None
        assert ended.stats.num_corrupt >= 1
        assert ended.stats.num_resumed >= 1
        assert pair.missing() == 0

    run(check())


class Proxy:
    """A wire that can be cut."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._writers: list[asyncio.StreamWriter] = []
        self.num_connections = 0
        self.is_cut = False

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self.is_cut = True
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connected(self, reader: Any, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.transport.abort()
            return
        self.num_connections += 1
        there, back = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, back]
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))

    async def _pump(self, reader: Any, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


def test_a_cut_connection_is_taken_up_where_it_broke() -> None:
    async def check() -> None:
        pair = Pair()
        async with both(pair) as (producers, addresses, consumers):
            wire = Proxy(addresses[0])
            pair.offer(producers)
            pair.fetch(consumers, (await wire.start(),))
            pair.compute(producers, tokens=32)
            await links.until(lambda: pair.missing() == 3 * 3)
            before = producers[0]
            wire.cut()
            pair.compute(producers)
            wire.is_cut = False
            pair.finish(producers)
            ended = await pair.consumed.next()
            assert ended.error is None
            assert ended.stats.num_resumed >= 1
            assert ended.stats.num_bytes < 1.2 * pair.kv["target"].nbytes + 3000
            assert (await pair.produced.next()).error is None
            assert before is producers[0]
        assert pair.missing() == 0

    run(check())


@pytest.mark.parametrize("plane", ["grpc", "shm"])
def test_a_producer_that_dies_fails_the_fetch_soon(plane: str) -> None:
    async def check() -> None:
        pair = Pair()
        async with consuming(pair.decode, pair.consumed, data_plane=plane) as consumers:
            async with producing(pair.prefill, pair.produced, share_memory=plane == "shm") as (
                producers,
                addresses,
            ):
                pair.offer(producers)
                pair.fetch(consumers, addresses)
                pair.compute(producers, tokens=32)
                await links.until(lambda: pair.missing() == 3 * 3)
            ended = await pair.consumed.next()
            assert ended.error is not None
            assert ended.stats.seconds < 5

    run(check())


def test_a_slow_reader_is_sent_no_more_than_its_credit_and_slows_nobody_else() -> None:
    tokens = 64 * 16

    async def check() -> None:
        slow, fast = Pair(tokens=tokens), Pair(tokens=tokens)
        fast.prefill = slow.prefill
        produced = slow.produced
        page = slow.prefill[0].pools["target"].layout.page_bytes(4)
        async with (
            producing(slow.prefill, produced) as (producers, addresses),
            consuming(
                slow.decode,
                slow.consumed,
                pause_s=3600.0,
                credit_bytes=1 << 16,
                chunk_bytes=1 << 16,
                lanes=1,
                engine_id="slow",
            ) as sluggish,
            consuming(fast.decode, fast.consumed) as quick,
        ):
            slow.offer(producers)
            slow.finish(producers)
            slow.fetch(sluggish, addresses)
            producers[0].offer(an_offer(slow.theirs, tokens, transfer_id="fast"))
            producers[0].complete(complete(tokens, transfer_id="fast"))
            fast.fetch(quick, addresses, transfer_id="fast")
            assert (await fast.consumed.next()).error is None
            assert (await produced.next()).transfer_id == "fast"
            sluggish[0].cancel(Cancel(transfer_id="t"))
            ended = await produced.next()
            assert ended.transfer_id == "t"
            assert ended.stats.num_bytes <= 2 * ((1 << 16) + page + 64)
            assert ended.stats.stall_s > 0
        assert fast.missing() == 0

    run(check())


# ----------------------------------------------------------------------------- what comes from peers


def _want(**changes: Any) -> pb.Want:
    fields: dict[str, Any] = {"model": pb.TARGET, "ranges": [pb.HeadRange(head_stop=4)]}
    return pb.Want(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"wants": [_want(ranges=[pb.HeadRange(layer=3, head_stop=1)])]},
        {"wants": [_want(ranges=[pb.HeadRange(head_stop=5)])]},
        {"wants": [_want(ranges=[pb.HeadRange(head_start=2, head_stop=2)])]},
        {"wants": [_want(first_page=6)]},
        {"wants": [_want(received=[b"", b""])]},
        {"wants": [_want(), _want()]},
        {"wants": [_want(model=7)]},
        {"codec": 9},
        {"plane": 1},
        {"plane": 5},
        {"consumer_rank": 1},
        {"num_consumers": 0},
    ],
)
def test_an_open_that_asks_for_what_is_not_there_is_refused(changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "transfer_id": "t",
        "consumer_id": "c",
        "num_consumers": 1,
        "fingerprint": links.FINGERPRINT,
        "wants": [_want()],
    }

    async def check() -> None:
        pair = Pair()
        async with (
            producing(pair.prefill, pair.produced) as (producers, addresses),
            grpc.aio.insecure_channel(addresses[0]) as channel,
        ):
            pair.offer(producers)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(channel, "Open", pb.OpenRequest(**{**fields, **changes}))
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            opened = pb.OpenResponse.FromString(
                await call(channel, "Open", pb.OpenRequest(**fields))
            )
            assert opened.ticket

    run(check())


def test_bytes_that_are_no_message_are_refused_and_the_server_goes_on() -> None:
    async def check() -> None:
        pair = Pair()
        async with (
            producing(pair.prefill, pair.produced) as (_, addresses),
            grpc.aio.insecure_channel(addresses[0]) as channel,
        ):
            for method in ("Open", "Await", "Renew", "Release"):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call(channel, method, b"\xff\xff\xff\xff")
                assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            stream = channel.stream_stream(f"/{SERVICE}/Stream")(timeout=5)
            await stream.write(b"\xff\xff\xff\xff")
            assert await stream.code() == grpc.StatusCode.INVALID_ARGUMENT
            await call(channel, "Describe", pb.DescribeRequest())

    run(check())


def test_a_release_may_come_twice_or_before_anything_else() -> None:
    async def check() -> None:
        pair = Pair()
        async with (
            producing(pair.prefill, pair.produced) as (producers, addresses),
            grpc.aio.insecure_channel(addresses[0]) as channel,
        ):
            release = pb.ReleaseRequest(transfer_id="t", consumer_id="c", outcome=pb.DONE)

            async def released() -> tuple[bool, bool]:
                answer = pb.ReleaseResponse.FromString(await call(channel, "Release", release))
                return answer.known, answer.freed

            assert await released() == (False, False)
            pair.offer(producers)
            request = pb.OpenRequest(
                transfer_id="t",
                consumer_id="c",
                num_consumers=1,
                fingerprint=links.FINGERPRINT,
            )
            await call(channel, "Open", request)
            assert await released() == (True, True)
            assert (await pair.produced.next()).error is None
            assert await released() == (True, False)
            assert pair.produced.empty()

    run(check())


def test_a_rank_serves_and_fetches_at_once() -> None:
    """Two engines that are both: each fetches from the other in the same event loop."""

    async def check() -> None:
        one, two = Pair(), Pair()
        async with (
            both(one) as (first, one_at, first_fetches),
            both(two) as (second, two_at, second_fetches),
        ):
            one.fetch(first_fetches, one_at)
            two.fetch(second_fetches, two_at)
            for pair, producers in ((one, first), (two, second)):
                pair.offer(producers)
                pair.finish(producers)
            assert (await one.consumed.next()).error is None
            assert (await two.consumed.next()).error is None
        assert one.missing() == two.missing() == 0

    run(check())

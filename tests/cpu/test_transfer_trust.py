"""Who may fetch KV: with which certificate, with which ticket, from where, and for how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import psutil
import pytest
from tests import links
from tests.certificates import Authority, Signed
from tests.links import complete, producing
from tests.pairs import Pair, both, call, run

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime import tls
from paceline.runtime.config import EngineConfig, KvTransferConfig
from paceline.runtime.errors import ConfigError
from paceline.runtime.loading import Loaded
from paceline.runtime.tls import LINK_NAME, NEEDED, TlsFiles
from paceline.runtime.transfer import peers
from paceline.runtime.transfer.rank import KvLink
from paceline.runtime.transfer.wire import SERVICE

Code = grpc.StatusCode
QUICK = {"lease_s": 0.3}
"""A consumer that does not get through says so after that."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"))


def files(signed: Signed, authority: Authority) -> TlsFiles:
    return TlsFiles(
        prefix="link",
        certfile=signed.cert,
        keyfile=signed.key,
        ca_certs=authority.path,
        client_certs=NEEDED,
    )


def link(authority: Authority, name: str = "link") -> TlsFiles:
    return files(authority.sign(name, LINK_NAME), authority)


# -------------------------------------------------------------------------------------- certificates


@pytest.mark.parametrize("plane", ["grpc", "shm"])
def test_kv_arrives_between_links_of_one_authority(authority: Authority, plane: str) -> None:
    async def check() -> None:
        pair, ends = Pair(2, 1), {"tls": link(authority)}
        async with both(pair, plane=plane, producer=ends, consumer=ends) as (made, at, consumers):
            pair.fetch(consumers, at)
            pair.offer(made)
            pair.finish(made)
            ended = await pair.consumed.next()
            assert (ended.error, ended.stats.plane) == (None, plane)
        assert pair.missing() == 0

    run(check())


@pytest.mark.parametrize("stranger", ["plain", "other authority", "other name"])
def test_a_stranger_gets_nothing_of_a_producer(
    authority: Authority, other: Authority, stranger: str
) -> None:
    """One that signed its own certificate, and one that the same authority vouches for as something
    else than a link."""
    theirs = {
        "plain": None,
        "other authority": files(other.sign("link", LINK_NAME), authority),
        "other name": files(authority.sign("webserver", "web.example"), authority),
    }[stranger]

    async def check() -> None:
        pair = Pair()
        async with both(pair, producer={"tls": link(authority)}, consumer={"tls": theirs}) as (
            producers,
            addresses,
            consumers,
        ):
            pair.offer(producers)
            pair.finish(producers)
            pair.fetch(consumers, addresses, **QUICK)
            ended = await pair.consumed.next()
            assert ended.error is not None
            assert (stranger == "other name") == ("PERMISSION_DENIED" in ended.error)
            assert ended.stats.num_bytes == 0

    run(check())


@pytest.mark.parametrize("stranger", ["plain", "other authority", "other name"])
def test_nothing_is_asked_of_a_stranger(
    authority: Authority, other: Authority, stranger: str
) -> None:
    theirs = {
        "plain": None,
        "other authority": files(other.sign("link", LINK_NAME), other),
        "other name": files(authority.sign("webserver", "web.example"), authority),
    }[stranger]

    async def check() -> None:
        pair = Pair()
        async with both(pair, producer={"tls": theirs}, consumer={"tls": link(authority)}) as (
            producers,
            addresses,
            consumers,
        ):
            pair.offer(producers)
            pair.fetch(consumers, addresses, **QUICK)
            ended = await pair.consumed.next()
            assert "UNAVAILABLE" in str(ended.error)

    run(check())


def test_a_rank_whose_node_has_other_files_says_so_before_its_link_starts(
    authority: Authority, other: Authority
) -> None:
    signed = authority.sign("link", LINK_NAME)
    config = EngineConfig(
        kv_transfer_config=KvTransferConfig(),
        link_certfile=signed.cert,
        link_keyfile=signed.key,
        link_ca_certs=other.path,
    )
    with pytest.raises(ConfigError, match=r"link_certfile .*issuer"):
        KvLink(config, cast(Loaded, None), rank=0, control="", host="127.0.0.1")


def test_a_certificate_that_is_replaced_is_shown_by_the_next_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one is of another authority, so that the producer has to have read its files again too."""
    shown: list[bytes] = []

    def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
        shown.append(files.read().cert)
        return tls.channel_credentials(files)

    monkeypatch.setattr(peers, "channel_credentials", channel_credentials)
    names = {name: tmp_path / name for name in ("certfile", "keyfile", "ca_certs")}

    def replace(number: int) -> bytes:
        """The certificate that is there from now on."""
        (folder := tmp_path / str(number)).mkdir()
        authority = Authority(folder)
        signed = authority.sign("link", LINK_NAME)
        for name, made in (
            ("certfile", signed.cert),
            ("keyfile", signed.key),
            ("ca_certs", authority.path),
        ):
            names[name].write_bytes(Path(made).read_bytes())
        return names["certfile"].read_bytes()

    async def check() -> None:
        pair, first = Pair(), replace(1)
        ours = TlsFiles(prefix="link", client_certs=NEEDED, **{k: str(v) for k, v in names.items()})
        ends = {"tls": ours}
        async with both(pair, producer=ends, consumer=ends) as (producers, addresses, consumers):

            async def fetch(name: str) -> None:
                shown.clear()
                pair.offer(producers, transfer_id=name)
                pair.compute(producers)
                producers[0].complete(complete(pair.tokens, transfer_id=name))
                pair.fetch(consumers, addresses, transfer_id=name)
                assert (await pair.consumed.next()).error is None

            await fetch("before")
            assert set(shown) == {first}
            second = replace(2)
            await fetch("after")
            assert set(shown) == {second}

    run(check())


# -------------------------------------------------------------------------------------------- tickets


@asynccontextmanager
async def offered(
    pair: Pair, *, config: dict[str, Any] | None = None, **offer: Any
) -> AsyncIterator[tuple[grpc.aio.Channel, str]]:
    """A channel to a producer whose offer waits for the consumer "decode"; and its address."""
    async with (
        producing(pair.prefill, pair.produced, **(config or {})) as (producers, addresses),
        grpc.aio.insecure_channel(addresses[0]) as channel,
    ):
        pair.offer(producers, consumer_id="decode", **offer)
        yield channel, addresses[0]


async def open_it(channel: Any, **changes: Any) -> int:
    fields: dict[str, Any] = {
        "transfer_id": "t",
        "consumer_id": "decode",
        "num_consumers": 1,
        "fingerprint": links.FINGERPRINT,
    }
    answer = await call(channel, "Open", pb.OpenRequest(**{**fields, **changes}))
    return int(pb.OpenResponse.FromString(answer).ticket)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code(), str(refused.value.details())


async def ask_for_frames(channel: Any, ticket: int) -> tuple[grpc.StatusCode, str]:
    stream = channel.stream_stream(f"/{SERVICE}/Stream")(timeout=5)
    control = pb.StreamControl(ticket=ticket, credit_bytes=1 << 20)
    await stream.write(control.SerializeToString())
    return await stream.code(), str(await stream.details())


def test_a_transfer_opens_for_the_consumer_it_is_for_and_nobody_else() -> None:
    async def check() -> None:
        pair = Pair()
        async with offered(pair) as (channel, _):
            code, why = await refusal(open_it(channel, consumer_id="thief"))
            assert (code, why) == (
                Code.PERMISSION_DENIED,
                "this transfer is for another consumer",
            )
            abort = pb.ReleaseRequest(transfer_id="t", consumer_id="thief", outcome=pb.ABORT)
            code, _ = await refusal(call(channel, "Release", abort))
            assert code is Code.PERMISSION_DENIED
            assert await open_it(channel)
            assert pair.produced.empty()

    run(check())


@asynccontextmanager
async def another_host(address: str) -> AsyncIterator[str]:
    """An address that leads to `address` from another one than ours."""
    host, _, port = address.rpartition(":")
    pumps: list[asyncio.Task[None]] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(port), local_addr=("127.0.0.3", 0))
        for way in (pump(reader, there[1]), pump(there[0], writer)):
            pumps.append(asyncio.create_task(way))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def test_a_stolen_ticket_is_of_no_use_on_another_host() -> None:
    async def check() -> None:
        pair = Pair()
        async with (
            offered(pair) as (channel, address),
            another_host(address) as elsewhere,
            grpc.aio.insecure_channel(elsewhere) as thief,
        ):
            ticket = await open_it(channel)
            expected = (Code.PERMISSION_DENIED, "this ticket was opened on another host")
            assert await ask_for_frames(thief, ticket) == expected
            asked = call(thief, "Await", pb.AwaitRequest(ticket=ticket))
            assert await refusal(asked) == expected
            renewed = await call(thief, "Renew", pb.RenewRequest(tickets=[ticket]))
            assert pb.RenewResponse.FromString(renewed).lost == [ticket]
            kept = await call(channel, "Renew", pb.RenewRequest(tickets=[ticket]))
            assert not pb.RenewResponse.FromString(kept).lost

    run(check())


def test_a_ticket_nobody_was_given_opens_nothing() -> None:
    async def check() -> None:
        async with offered(Pair()) as (channel, _):
            ticket = await open_it(channel)
            for guess in (0, 1, ticket ^ 1):
                assert await ask_for_frames(channel, guess) == (Code.NOT_FOUND, "no such ticket")

    run(check())


def test_tickets_are_drawn_anew_each_time_from_numbers_too_many_to_guess() -> None:
    async def check() -> None:
        async with offered(Pair()) as (channel, _):
            tickets = [await open_it(channel) for _ in range(32)]
            assert len(set(tickets)) == 32
            assert max(tickets) > 1 << 60
            assert min(tickets) < 1 << 63
            assert (await ask_for_frames(channel, tickets[0]))[1] == "opened again"

    run(check())


def test_a_ticket_is_of_no_use_once_its_lease_has_run_out() -> None:
    async def check() -> None:
        pair = Pair()
        async with offered(pair, lease_s=0.1) as (channel, _):
            ticket = await open_it(channel)
            assert "lease expired" in str((await pair.produced.next()).error)
            code, why = await ask_for_frames(channel, ticket)
            assert code is Code.NOT_FOUND
            assert "lease expired" in why
            assert (await refusal(open_it(channel)))[0] is Code.NOT_FOUND

    run(check())


def test_no_renewing_holds_blocks_for_longer_than_a_fetch_may_take() -> None:
    async def check() -> None:
        pair = Pair()
        began_s = time.monotonic()
        async with offered(pair, config={"timeout_s": 0.3}, lease_s=0.2) as (channel, _):
            ticket = await open_it(channel)
            while pair.produced.empty():
                assert time.monotonic() - began_s < links.WAIT_S, "held for ever"
                await call(channel, "Renew", pb.RenewRequest(tickets=[ticket]))
                await asyncio.sleep(0.02)
            assert "more than 0.5 s" in str((await pair.produced.next()).error)
            assert time.monotonic() - began_s >= 0.5

    run(check())


# ------------------------------------------------------------------------------------------ addresses


def test_links_listen_on_the_address_they_are_given_and_on_no_other() -> None:
    async def check() -> None:
        pair = Pair()
        async with producing(pair.prefill, pair.produced, host="127.0.0.2") as (_, addresses):
            port = int(addresses[0].rpartition(":")[2])
            listening = [
                each.laddr.ip.removeprefix("::ffff:")
                for each in psutil.Process().net_connections(kind="tcp")
                if each.status == psutil.CONN_LISTEN and each.laddr.port == port
            ]
            assert listening == ["127.0.0.2"]

    run(check())


def test_links_that_cannot_be_had_under_their_address_say_so() -> None:
    async def check() -> None:
        pair = Pair()
        with pytest.raises(ConfigError, match=r"not this machine's\? Set host"):
            async with producing(pair.prefill, pair.produced, host="192.0.2.1"):
                pass

    run(check())

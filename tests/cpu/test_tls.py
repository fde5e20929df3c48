"""TLS from files: what is refused before anything listens, and who is let in by what listens."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from tests.certificates import Authority, Signed
from tests.doors import Doors, eventually
from tests.engines import FakeEngine

from paceline.actors.frontends import http as http_door
from paceline.runtime.client import AsyncClient, Client, ClientError, ConnectionFailed
from paceline.runtime.config import EngineConfig, ServerConfig
from paceline.runtime.errors import ConfigError
from paceline.runtime.tls import LINK_NAME, check_tls, link_tls, server_tls


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"))


def ssl_of(signed: Signed, **more: Any) -> dict[str, Any]:
    return {"ssl_certfile": signed.cert, "ssl_keyfile": signed.key, **more}


def refusal(server: dict[str, Any] | None = None, links: dict[str, Any] | None = None) -> str:
    """The one line that refuses these files."""
    with pytest.raises(ConfigError) as refused:
        check_tls(ServerConfig(**(server or {})), EngineConfig(**(links or {})))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Before anything listens


def test_nothing_is_checked_where_nothing_is_asked_for() -> None:
    check_tls(ServerConfig(), EngineConfig())
    assert server_tls(ServerConfig()) is link_tls(EngineConfig()) is None


def test_good_files_pass_with_the_key_in_a_file_of_its_own_or_the_same(
    authority: Authority, tmp_path: Path
) -> None:
    signed = authority.sign("good")
    check_tls(ServerConfig(**ssl_of(signed)), EngineConfig())
    both = tmp_path / "both.pem"
    both.write_text(Path(signed.key).read_text() + Path(signed.cert).read_text())
    check_tls(ServerConfig(ssl_certfile=str(both)), EngineConfig())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ssl_keyfile": "k"}, "ssl_keyfile needs ssl_certfile"),
        ({"ssl_ca_certs": "c"}, "ssl_ca_certs needs ssl_certfile"),
        ({"ssl_cert_reqs": 2}, "ssl_cert_reqs needs ssl_certfile"),
        ({"ssl_certfile": "c", "ssl_cert_reqs": 2}, "ssl_cert_reqs 2 needs ssl_ca_certs"),
        ({"ssl_certfile": "c", "ssl_ca_certs": "a"}, "asks nobody: set ssl_cert_reqs to 2"),
        ({"ssl_certfile": "/no/such"}, "cannot read ssl_certfile /no/such: No such file"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], words: str) -> None:
    assert words in refusal(settings)


@pytest.mark.parametrize(
    "links", [{"link_certfile": "c"}, {"link_keyfile": "k", "link_ca_certs": "a"}]
)
def test_links_need_all_three_files(links: dict[str, str]) -> None:
    assert (
        refusal(links=links) == "link_certfile, link_keyfile and link_ca_certs: all three or none"
    )


def test_files_that_no_client_could_accept_are_named(authority: Authority, tmp_path: Path) -> None:
    good, another = authority.sign("a"), authority.sign("b")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nothing of the kind")
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_bytes(
        load_pem_private_key(Path(good.key).read_bytes(), None).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"passphrase")
        )
    )
    mixed = Signed(good.cert, another.key)
    assert f"{another.key} is not the key of {good.cert}" in refusal(ssl_of(mixed))
    assert "no certificate and key in PEM" in refusal(ssl_of(Signed(str(nonsense), good.key)))
    assert "no certificate and key in PEM" in refusal(ssl_of(Signed(good.cert, str(nonsense))))
    assert "is encrypted" in refusal(ssl_of(Signed(good.cert, str(encrypted))))
    assert "has expired" in refusal(ssl_of(authority.expired("old")))
    wanted = {"ssl_cert_reqs": 2, "ssl_ca_certs": str(nonsense)}
    assert "ssl_ca_certs" in refusal(ssl_of(good, **wanted))


def links_of(signed: Signed, authority: Authority) -> dict[str, str]:
    return {
        "link_certfile": signed.cert,
        "link_keyfile": signed.key,
        "link_ca_certs": authority.path,
    }


def test_links_files_are_tried_on_each_other(authority: Authority, other: Authority) -> None:
    good = authority.sign("link", LINK_NAME)
    check_tls(ServerConfig(), EngineConfig(**links_of(good, authority)))
    nameless = authority.sign("nameless", "10.0.0.1")
    assert LINK_NAME in refusal(links=links_of(nameless, authority))
    assert "issuer" in refusal(links=links_of(good, other))
    expired = authority.expired("expired-link", LINK_NAME)
    assert "has expired" in refusal(links=links_of(expired, authority))


# Both doors

Open = Callable[..., Doors]


@pytest.fixture
def open_doors(tmp_path: Path) -> Iterator[Open]:
    made: list[Doors] = []

    def start(**server: Any) -> Doors:
        made.append(Doors(tmp_path, FakeEngine(), EngineConfig(), **server))
        return made[-1]

    yield start
    for each in made:
        each.stop()


@pytest.fixture(params=["http", "grpc"])
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def url_of(doors: Doors, door: str) -> str:
    return doors.http_url if door == "http" else doors.grpc_url


def text_from(url: str, **how: Any) -> str:
    with Client(url, max_retries=0, timeout_s=10.0, **how) as client:
        return client.generate("hi", max_tokens=3).text


def test_a_client_that_trusts_the_authority_is_served(
    open_doors: Open, authority: Authority, other: Authority, door: str
) -> None:
    doors = open_doors(**ssl_of(authority.sign("server")), key="s3cret")
    url = url_of(doors, door)
    assert url.startswith(("https://", "grpcs://"))
    assert text_from(url, ca_certs=authority.path, api_key="s3cret") == "the"
    for untrusting in ({}, {"ca_certs": other.path}):
        with pytest.raises(ConnectionFailed):
            text_from(url, **untrusting)  # type: ignore[arg-type]
    with pytest.raises(ClientError):
        text_from(url.replace("s://", "://"))
    assert doors.settles()


async def _text_from(url: str, **how: Any) -> str:
    async with AsyncClient(url, max_retries=0, timeout_s=10.0, **how) as client:
        return (await client.generate("hi", max_tokens=3)).text


def test_where_client_certificates_are_needed_nobody_comes_in_without(
    open_doors: Open, authority: Authority, other: Authority, door: str
) -> None:
    wanted = {"ssl_ca_certs": authority.path, "ssl_cert_reqs": 2}
    doors = open_doors(**ssl_of(authority.sign("server"), **wanted))
    url, ours, theirs = url_of(doors, door), authority.sign("c"), other.sign("c")
    own = {"ca_certs": authority.path, "client_cert": (ours.cert, ours.key)}
    assert text_from(url, **own) == "the"
    assert doors.do(_text_from(url, **own)) == "the"
    for stranger in ({}, {"client_cert": (theirs.cert, theirs.key)}):
        with pytest.raises(ConnectionFailed):
            text_from(url, ca_certs=authority.path, **stranger)


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://h:1", "need an https:// or grpcs:// URL, found http://"),
        ("grpc://h:1", "need an https:// or grpcs:// URL, found grpc://"),
        ("https://h:1", "'/no/such'.*No such file"),
        ("grpcs://h:1", "'/no/such'.*No such file"),
    ],
)
def test_clients_refuse_files_that_are_of_no_use(client: Any, url: str, words: str) -> None:
    with pytest.raises(ClientError, match=words):
        client(url, ca_certs="/no/such")
    with pytest.raises(ClientError, match=words):
        client(url, client_cert="/no/such")


def serial(port: int, authority: Authority) -> str:
    """Of the certificate that is served there."""
    context = ssl.create_default_context(cafile=authority.path)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        shown = connection.getpeercert()
    assert shown is not None
    return str(shown["serialNumber"])


def test_a_certificate_that_is_replaced_is_served_without_a_restart_and_a_bad_one_is_not(
    open_doors: Open,
    authority: Authority,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_door, "TLS_REFRESH_S", 0.02)
    doors = open_doors(**ssl_of(authority.sign("rotating")))
    assert doors.http is not None
    ports = (doors.http.port, doors.grpc.port)
    before = {serial(port, authority) for port in ports}
    assert len(before) == 1
    signed = authority.sign("rotating")
    assert eventually(lambda: not before & {serial(port, authority) for port in ports})
    after = serial(ports[0], authority)
    with caplog.at_level(logging.ERROR):
        Path(signed.cert).write_text("half a file")
        assert eventually(lambda: "from before" in caplog.text)
        assert {serial(port, authority) for port in ports} == {after}


def test_a_client_that_does_not_shake_hands_does_not_hold_others_up(
    open_doors: Open, authority: Authority
) -> None:
    doors = open_doors(**ssl_of(authority.sign("server")))
    assert doors.http is not None
    with socket.create_connection(("127.0.0.1", doors.http.port)) as silent:
        silent.send(b"\x16\x03")
        assert text_from(doors.http_url, ca_certs=authority.path) == "the"

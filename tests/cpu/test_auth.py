"""Who may ask and whose answers they get: keys, tenants, and both doors that ask for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tests.doors import TIMEOUT_S, Doors
from tests.engines import FakeEngine, fake_facts

from paceline.actors.frontends import http
from paceline.actors.frontends.auth import MAX_KEYS, Keys, check_access, load_keys
from paceline.actors.frontends.tenants import TenantLLM
from paceline.proto import inference_pb2 as pb
from paceline.runtime.async_llm import AsyncLLM
from paceline.runtime.config import EngineConfig, ServerConfig, make_config
from paceline.runtime.errors import ConfigError, PromptError
from paceline.runtime.local import connect
from paceline.runtime.preflight import examine
from paceline.runtime.types import SamplingParams

Clock = list[float]


def keys_of(*, environ: dict[str, str] | None = None, **server: Any) -> Keys:
    keys = load_keys(ServerConfig(**server), environ=environ or {})
    assert keys is not None
    return keys


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


# Keys


def test_nobody_is_asked_for_a_key_where_none_is_set() -> None:
    assert load_keys(ServerConfig(), environ={}) is None


def test_keys_of_flag_environment_and_file_all_open(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nacme:from-file\n\n  plain-one  # also ours\n")
    keys = keys_of(
        api_key="one,two", api_key_file=str(file), environ={"PACELINE_API_KEY": "beta:three"}
    )
    found = {name: keys.tenant_of(bearer(name)) for name in ("one", "two", "three", "from-file")}
    assert None not in found.values()
    assert (found["three"], found["from-file"]) == ("beta", "acme")
    assert keys.tenant_of(bearer("plain-one")) is not None


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer on",
        b"Bearer onee",
        b"Bearer one two",
        b"Basic one",
        b"one",
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 100_000,
    ],
)
def test_anything_but_a_whole_key_behind_bearer_is_nobodys(header: bytes) -> None:
    assert keys_of(api_key="one,two").tenant_of(header) is None


def test_the_scheme_may_be_in_any_case_and_blanks_around_a_key_are_none_of_it() -> None:
    assert keys_of(api_key=" one , two").tenant_of(b"bEaReR  two ") is not None


def test_every_key_without_a_name_is_a_tenant_of_its_own_and_the_same_after_a_restart() -> None:
    first, again = keys_of(api_key="one,two"), keys_of(api_key="two,one")
    assert first.tenant_of(bearer("one")) != first.tenant_of(bearer("two"))
    assert first.tenant_of(bearer("one")) == again.tenant_of(bearer("one"))


def test_a_tenants_name_does_not_tell_its_key() -> None:
    assert "secret-one" not in str(keys_of(api_key="secret-one").tenant_of(bearer("secret-one")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected KEY"),
        ("one,,two", "key 2: expected KEY"),
        ("with space", "expected KEY"),
        ("ten ant:key", "expected KEY"),
        ("a:b:c", "expected KEY"),
        ("a:one,b:one", "two tenants"),
        (",".join(f"k{i}" for i in range(MAX_KEYS + 1)), f"{MAX_KEYS} API keys"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_without_telling_them(text: str, words: str) -> None:
    for how in ({"api_key": text}, {"environ": {"PACELINE_API_KEY": text}}):
        with pytest.raises(ConfigError, match=words) as refused:
            keys_of(**how)  # type: ignore[arg-type]
        assert "\n" not in str(refused.value)
        assert not text or text not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# nobody yet\n", "has no key"),
        (b"good\nbad one\n", "line 2: expected KEY"),
        (b"\xff\xfe", "is no text"),
        (b"k" * ((1 << 20) + 1), "is larger than"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as refused:
        keys_of(api_key_file=str(file))
    assert "bad one" not in str(refused.value)


@pytest.fixture
def rotating(tmp_path: Path) -> tuple[Keys, Callable[[str], None]]:
    """Keys of a file, and how to replace that as Kubernetes does; a second passes with it."""
    now = [0.0]
    (tmp_path / "first").write_text("acme:old\n")
    file = tmp_path / "keys"
    file.symlink_to(tmp_path / "first")

    def replace(text: str) -> None:
        after = tmp_path / f"at-{now[0]:.0f}"
        after.write_text(text)
        link = tmp_path / "link"
        link.symlink_to(after)
        link.replace(file)
        now[0] += 1.5

    return Keys((), file=str(file), clock=lambda: now[0]), replace


def test_a_file_that_is_replaced_counts_within_seconds(
    rotating: tuple[Keys, Callable[[str], None]],
) -> None:
    keys, replace = rotating
    assert keys.tenant_of(bearer("old")) == "acme"
    replace("acme:new\n")
    assert keys.tenant_of(bearer("new")) == "acme"
    assert keys.tenant_of(bearer("old")) is None


@pytest.mark.parametrize("text", ["", "half a line"])
def test_a_file_that_is_replaced_by_nonsense_changes_nothing_and_is_logged(
    rotating: tuple[Keys, Callable[[str], None]], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys, replace = rotating
    replace(text)
    assert keys.tenant_of(bearer("old")) == "acme"
    assert "keys from before are kept" in caplog.text
    replace("acme:new\n")
    assert keys.tenant_of(bearer("new")) == "acme"


@pytest.mark.parametrize(
    ("mode", "server", "words"),
    [
        (0o600, {}, ""),
        (0o640, {}, ""),
        (0o644, {}, "can be read by everybody"),
        (0o620, {}, "changed by others"),
        (0o600, {"host": "0.0.0.0"}, "cross the network as they are"),
        (0o600, {"host": "0.0.0.0", "ssl_certfile": "c"}, ""),
        (None, {"host": "0.0.0.0"}, "no API key is asked for"),
        (None, {"host": "127.0.0.1"}, ""),
    ],
)
def test_a_server_that_lies_open_says_so_once(
    tmp_path: Path,
    mode: int | None,
    server: dict[str, str],
    words: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PACELINE_API_KEY", raising=False)
    if mode is not None:
        file = tmp_path / "keys"
        file.write_text("secret-one")
        file.chmod(mode)
        server = {**server, "api_key_file": str(file)}
    with caplog.at_level(logging.WARNING):
        check_access(ServerConfig(**server))  # type: ignore[arg-type]
    assert words in caplog.text
    assert bool(words) == bool(caplog.records)
    assert "secret-one" not in caplog.text


# Both doors


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """Two tenants and an administrator."""
    server = Doors(
        tmp_path_factory.mktemp("tokenizer"),
        FakeEngine(step_s=0.005),
        EngineConfig(),
        key="acme:one,beta:two,admin:root",
    )
    yield server
    server.stop()


def ask_http(doors: Doors, key: str | None, path: str, **how: Any) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    headers |= how.pop("headers", {})
    method = how.pop("method", "POST" if "json" in how else "GET")
    return httpx.request(method, doors.http_url + path, headers=headers, timeout=TIMEOUT_S, **how)


@pytest.mark.parametrize("path", sorted(http.OPEN_PATHS))
def test_probes_and_scrapers_need_no_key(doors: Doors, path: str) -> None:
    assert ask_http(doors, None, path).status_code in (200, 404, 503)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/live/status", "/engines", "/openapi.json", "/no/such/path", "//health"]
)
def test_all_else_does(doors: Doors, path: str) -> None:
    for key in (None, "wrong"):
        refused = ask_http(doors, key, path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert "one" not in refused.text.split()
    assert ask_http(doors, "one", path).status_code in (200, 404)


@pytest.mark.parametrize(("method", "path"), [("POST", "/engines"), ("DELETE", "/engines/x")])
def test_only_an_administrators_key_changes_engines_where_there_is_one(
    doors: Doors, method: str, path: str
) -> None:
    refused = ask_http(doors, "one", path, method=method)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "admin_needed"
    assert ask_http(doors, "root", path, method=method).status_code == 404, "one engine alone"


def test_where_there_is_no_administrator_every_key_may() -> None:
    keys = keys_of(api_key="acme:one")
    assert keys.is_admin("acme")


def test_pages_of_other_sites_cannot_post_to_a_server_without_a_key(tmp_path: Path) -> None:
    server = Doors(tmp_path, FakeEngine(), EngineConfig())
    try:
        for site, status in (("cross-site", 403), ("same-origin", 200), ("none", 200)):
            headers = {"sec-fetch-site": site}
            body = {"prompt": "hi", "max_tokens": 1}
            found = ask_http(server, None, "/v1/completions", json=body, headers=headers)
            assert found.status_code == status
    finally:
        server.stop()


def call(doors: Doors, key: str, body: pb.GenerateRequest, channel: grpc.Channel) -> grpc.Call:
    return channel.unary_stream("/paceline.v1.Engine/Generate")(
        body.SerializeToString(),
        timeout=TIMEOUT_S,
        metadata=(("authorization", f"Bearer {key}"),),
    )


def test_tenants_may_use_one_request_id_at_once_and_abort_only_their_own(doors: Doors) -> None:
    params = pb.SamplingParams(max_tokens=500)
    body = pb.GenerateRequest(text="hi", request_id="r1", stream=True, sampling_params=params)
    with grpc.insecure_channel(f"127.0.0.1:{doors.grpc.port}") as channel:
        running = {key: call(doors, key, body, channel) for key in ("one", "two")}
        for each in running.values():
            first = pb.GenerateResponse.FromString(next(each))
            assert first.request_id == "r1", "as the client named it"
        with pytest.raises(grpc.RpcError) as refused:
            next(call(doors, "one", body, channel))
        assert refused.value.details() == "request_id 'r1' is in use"
        abort = channel.unary_unary("/paceline.v1.Engine/Abort")
        ids = pb.AbortRequest(request_ids=["r1"]).SerializeToString()
        abort(ids, timeout=TIMEOUT_S, metadata=(("authorization", "Bearer one"),))
        ends = [pb.GenerateResponse.FromString(each) for each in running["one"]]
        assert ends[-1].complete.finish_reason == "abort"
        with pytest.raises(grpc.RpcError) as missing:
            abort(ids, timeout=TIMEOUT_S, metadata=(("authorization", "Bearer root"),))
        assert missing.value.code() is grpc.StatusCode.NOT_FOUND
        assert pb.GenerateResponse.FromString(next(running["two"])).chunk.token_ids
        running["two"].cancel()
    assert doors.settles()


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_salts_and_sessions_inside_are_the_tenants_whichever_the_door(
    doors: Doors, door: str
) -> None:
    found = {}
    for key in ("one", "two"):
        if door == "http":
            body = {"prompt": "hi", "max_tokens": 1, "cache_salt": "s", "session_id": "n"}
            answer = ask_http(doors, key, "/v1/completions", json=body)
            assert answer.json()["id"].startswith("cmpl-"), "without the tenant's prefix"
        else:
            request = pb.GenerateRequest(
                text="hi", cache_salt="s", sampling_params=pb.SamplingParams(max_tokens=1)
            )
            with grpc.insecure_channel(f"127.0.0.1:{doors.grpc.port}") as channel:
                list(call(doors, key, request, channel))
        last = doors.engine.submitted[-1]
        found[key] = (last.cache_salt, last.session_id)
    assert found["one"][0] != found["two"][0]
    assert all(salt.endswith("/s") for salt, _ in found.values())
    if door == "http":
        assert found["one"][1] != found["two"][1]
    else:
        assert found["one"][1] == "", "no session stays none"


def test_both_doors_mean_the_same_tenant(doors: Doors) -> None:
    ask_http(doors, "one", "/v1/completions", json={"prompt": "hi", "max_tokens": 1})
    over_http = doors.engine.submitted[-1].cache_salt
    request = pb.GenerateRequest(text="hi", sampling_params=pb.SamplingParams(max_tokens=1))
    with grpc.insecure_channel(f"127.0.0.1:{doors.grpc.port}") as channel:
        list(call(doors, "one", request, channel))
    assert doors.engine.submitted[-1].cache_salt == over_http != ""


@pytest.mark.parametrize(
    ("name", "room"), [("request_id", 239), ("cache_salt", 1007), ("session_id", 1007)]
)
def test_names_are_bounded_by_what_the_tenants_prefix_leaves_of_them(
    tmp_path: Path, name: str, room: int
) -> None:
    async def main() -> None:
        llm = AsyncLLM(FakeEngine(), fake_facts(tmp_path), EngineConfig())

        async def submit(**named: str) -> None:
            names = {"request_id": "r", "cache_salt": "", "session_id": "", **named}
            asked = TenantLLM(llm, "acme")
            params = SamplingParams(max_tokens=1)
            stream = await asked.submit("hi", params, num_draft_tokens=None, priority=0, **names)
            stream.close()

        with pytest.raises(PromptError, match=f"{name} may have {room} characters"):
            await submit(**{name: "x" * (room + 1)})
        await submit(**{name: "x" * room})
        await llm.close()

    asyncio.run(main())


# The prefix cache of a real engine


def test_nobodys_prefix_cache_answers_somebody_else(tiny: Callable[..., Path]) -> None:
    config = make_config(
        {
            "model": str(tiny(seed=0)),
            "dtype": "float32",
            "distributed_executor_backend": "uni",
            "kv_cache_memory": "16MiB",
        }
    )
    facts = examine(config)
    client = connect(config, facts)
    prompt = [3 + i % 50 for i in range(40)]

    def cached(answer: httpx.Response) -> int:
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def main() -> None:
        llm = AsyncLLM(client, facts, config)
        app = http.make_app(llm, facts, config, ServerConfig(api_key="acme:one,acme:uno,beta:two"))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://test", timeout=TIMEOUT_S
        ) as asker:

            async def ask(key: str, **more: Any) -> int:
                body = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, **more}
                headers = {"authorization": f"Bearer {key}"}
                return cached(await asker.post("/v1/completions", json=body, headers=headers))

            assert await ask("one") == 0
            assert await ask("one") == 32
            assert await ask("uno") == 32, "another key of the same tenant"
            assert await ask("two") == 0, "another tenant"
            assert await ask("two") == 32
            assert await ask("one", cache_salt="mine") == 0, "a salt of its own within the tenant"
            assert await ask("two", cache_salt="mine") == 0, "the same salt, another tenant"
        await llm.close()

    try:
        asyncio.run(main())
    finally:
        client.close()

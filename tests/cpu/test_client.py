"""The client: what it sends, what it makes of answers, when it tries again; then against real doors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import types
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.doors import Doors, eventually
from tests.engines import REPLY, FakeEngine, ids_of

from paceline.proto import inference_pb2 as pb
from paceline.runtime import client as paceline_client
from paceline.runtime.client import (
    AsyncClient,
    Client,
    ClientError,
    Completion,
    ConnectionFailed,
    DeadlineExceeded,
    Health,
    NotFound,
    Overloaded,
    Piece,
    RequestRejected,
    ServerFailed,
    StreamBroken,
    TokenLogprob,
    Unauthorized,
    Unavailable,
    Usage,
    clients,
)
from paceline.runtime.client.calls import MAX_BACKOFF_S, Attempts, Wire
from paceline.runtime.client.clients import DEFAULT_MAX_RETRIES
from paceline.runtime.client.errors import PUSHBACK, grpc_error, http_error
from paceline.runtime.client.http import AsyncHttpTransport, EventReader, HttpTransport
from paceline.runtime.config import EngineConfig
from paceline.runtime.types import SamplingParams, StructuredOutputs

URL = "http://server"


class Blocking:
    """A client under test, whichever kind: here the blocking one."""

    kind = "blocking"

    def __init__(self, url: str = URL, **how: Any) -> None:
        self.client = Client(url, **how)

    def call(self, name: str, *args: Any, **how: Any) -> Any:
        return getattr(self.client, name)(*args, **how)

    def pieces(
        self, *args: Any, take: int | None = None, name: str = "stream", **how: Any
    ) -> list[Piece]:
        """The pieces of a stream, or the first few, after which it is left."""
        with contextlib.closing(getattr(self.client, name)(*args, **how)) as stream:
            return [piece for _, piece in zip(range(take or 10**6), stream, strict=False)]

    def close(self) -> None:
        self.client.close()


class Awaited:
    """The same with the other kind, run to the end of each call."""

    kind = "awaited"

    def __init__(self, url: str = URL, **how: Any) -> None:
        self._runner = asyncio.Runner()
        self.client = self._runner.run(self._make(url, how))

    async def _make(self, url: str, how: dict[str, Any]) -> AsyncClient:
        return AsyncClient(url, **how)

    def call(self, name: str, *args: Any, **how: Any) -> Any:
        async def work() -> Any:
            return await getattr(self.client, name)(*args, **how)

        return self._runner.run(work())

    def pieces(
        self, *args: Any, take: int | None = None, name: str = "stream", **how: Any
    ) -> list[Piece]:
        async def work() -> list[Piece]:
            found: list[Piece] = []
            stream = getattr(self.client, name)(*args, **how)
            async with contextlib.aclosing(stream):
                async for piece in stream:
                    found.append(piece)
                    if len(found) == take:
                        break
            return found

        return self._runner.run(work())

    def close(self) -> None:
        self._runner.run(self.client.close())
        self._runner.close()


Asker = Blocking | Awaited
Step = bytes | ClientError


class Script:
    """A transport that plays what is written down: per attempt, messages and maybe an error."""

    def __init__(self, *attempts: list[Step]) -> None:
        self._attempts = list(attempts)
        self.wires: list[Wire] = []
        self.timeouts: list[float] = []
        self.closed = 0

    def play(self, wire: Wire, timeout_s: float) -> Iterator[bytes]:
        self.wires.append(wire)
        self.timeouts.append(timeout_s)
        for step in self._attempts.pop(0):
            if isinstance(step, ClientError):
                raise step
            yield step

    @property
    def body(self) -> Any:
        return json.loads(self.wires[-1].body)


class BlockingScript(Script):
    def open(self, wire: Wire, *, timeout_s: float) -> Generator[bytes, None, None]:
        yield from self.play(wire, timeout_s)

    def close(self) -> None:
        self.closed += 1


class AwaitedScript(Script):
    async def open(self, wire: Wire, *, timeout_s: float) -> AsyncGenerator[bytes, None]:
        for message in self.play(wire, timeout_s):
            yield message

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long clients slept, which they do not really."""
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)

    monkeypatch.setattr(clients, "time", types.SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(
        clients, "asyncio", types.SimpleNamespace(sleep=sleep, timeout=asyncio.timeout)
    )
    return slept


@pytest.fixture(params=[Blocking, Awaited], ids=lambda kind: kind.kind)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def scripted(kind: Any) -> Iterator[Callable[..., tuple[Asker, Script]]]:
    """`scripted(attempt, ..., **how)`: a client of each kind and the script it talks to."""
    made: list[Asker] = []

    def make(*attempts: list[Step], **how: Any) -> tuple[Asker, Script]:
        script = (BlockingScript if kind is Blocking else AwaitedScript)(*attempts)
        made.append(kind(transport=script, **how))
        return made[-1], script

    yield make
    for asker in made:
        asker.close()


Scripted = Callable[..., tuple[Asker, Script]]
Respond = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def answered(kind: Any) -> Iterator[Callable[..., Asker]]:
    """`answered(respond, **how)`: a client over httpx whose requests a function answers."""
    made: list[Asker] = []

    def make(respond: Respond, *, api_key: str | None = None, **how: Any) -> Asker:
        network = httpx.MockTransport(respond)
        transport = HttpTransport if kind is Blocking else AsyncHttpTransport
        made.append(kind(transport=transport(URL, api_key=api_key, network=network), **how))
        return made[-1]

    yield make
    for asker in made:
        asker.close()


Answered = Callable[..., Asker]


def completion(text: str = "hello", **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "token_ids": ids_of(text), "finish_reason": "stop"}
    return json.dumps({"id": "cmpl-1", "choices": [choice | more]}).encode()


def chunk(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "token_ids": ids_of(text), "finish_reason": None}
    return json.dumps({"id": "cmpl-1", "choices": [choice | more]}).encode()


def events(*data: bytes, end: bool = True) -> bytes:
    return b"".join(b"data: %b\n\n" % item for item in (*data, *((b"[DONE]",) if end else ())))


# Imports


def test_the_client_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from paceline.runtime.client import AsyncClient, Client\n"
        "Client('grpc://h:1').close(); Client('http://h').close()\n"
        "print(*(m for m in ('torch', 'ray', 'numpy', 'transformers', 'tokenizers') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == []


def test_http_works_without_grpcio() -> None:
    code = (
        "import sys; sys.modules['grpc'] = None\n"
        "from paceline.runtime.client import Client, ClientError\n"
        "Client('http://h').close()\n"
        "try: Client('grpc://h:1')\n"
        "except ClientError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert "need grpcio" in done.stdout


def test_public_names_change_only_on_purpose() -> None:
    assert set(paceline_client.__all__) <= set(dir(paceline_client))
    assert {"Client", "AsyncClient", "ClientError", "Overloaded"} <= set(paceline_client.__all__)


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)


# URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:8000", ("http", "h:8000")),
        ("http://h:8000/v1/", ("http", "h:8000")),
        ("https://h/proxy/v1", ("https", "h/proxy")),
        ("grpc://h:50051", ("grpc", "h:50051")),
        ("grpcs://[::1]:5", ("grpcs", "[::1]:5")),
    ],
)
def test_a_url_says_which_transport(url: str, expected: tuple[str, str]) -> None:
    assert clients.split_url(url) == expected


@pytest.mark.parametrize("url", ["h:8000", "ftp://h", "grpc://h", "http://", "", "http://h:99999"])
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(ClientError, match="URL"):
        clients.split_url(url)


# Errors


@pytest.mark.parametrize(
    ("status", "kind_"),
    [
        (400, RequestRejected),
        (401, Unauthorized),
        (403, Unauthorized),
        (404, NotFound),
        (405, RequestRejected),
        (408, DeadlineExceeded),
        (413, RequestRejected),
        (422, RequestRejected),
        (429, Overloaded),
        (500, ServerFailed),
        (502, ServerFailed),
        (503, Unavailable),
        (504, DeadlineExceeded),
    ],
)
def test_every_http_status_has_one_error(status: int, kind_: type[ClientError]) -> None:
    error = http_error(status, {"retry-after": "3"}, b'{"error": {"message": "why"}}')
    assert type(error) is kind_
    assert str(error) == f"why (HTTP {status})"
    if isinstance(error, Unavailable):
        assert error.retry_after_s == 3.0


@pytest.mark.parametrize(
    ("code", "metadata", "kind_"),
    [
        ("INVALID_ARGUMENT", {}, RequestRejected),
        ("UNIMPLEMENTED", {}, RequestRejected),
        ("UNAUTHENTICATED", {}, Unauthorized),
        ("NOT_FOUND", {}, NotFound),
        ("RESOURCE_EXHAUSTED", {PUSHBACK: "1500"}, Overloaded),
        ("RESOURCE_EXHAUSTED", {}, RequestRejected),
        ("UNAVAILABLE", {PUSHBACK: "1500"}, Unavailable),
        ("UNAVAILABLE", {}, ConnectionFailed),
        ("DEADLINE_EXCEEDED", {}, DeadlineExceeded),
        ("INTERNAL", {}, ServerFailed),
        ("UNKNOWN", {}, ServerFailed),
        ("CANCELLED", {}, ServerFailed),
    ],
)
def test_every_grpc_status_has_one_error(
    code: str, metadata: dict[str, str], kind_: type[ClientError]
) -> None:
    error = grpc_error(code, "why", metadata)
    assert type(error) is kind_
    assert str(error) == f"why ({code})"
    if metadata and isinstance(error, Unavailable):
        assert error.retry_after_s == 1.5


@given(st.integers(400, 599), st.binary(max_size=50), st.text(max_size=10))
def test_an_error_is_made_of_any_answer(status: int, body: bytes, retry_after: str) -> None:
    assert isinstance(http_error(status, {"retry-after": retry_after}, body), ClientError)


@pytest.mark.parametrize("told", ["soon", "-1", "nan", "inf", "", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_retry_after_that_is_no_number_of_seconds_is_not_heeded(told: str) -> None:
    error = http_error(429, {"retry-after": told}, b"")
    assert isinstance(error, Overloaded)
    assert error.retry_after_s is None


# Attempts


steps = st.tuples(
    st.sampled_from(
        [
            ConnectionFailed("x"),
            Overloaded("x", retry_after_s=0.5),
            Overloaded("x", retry_after_s=20.0),
            Overloaded("x"),
            Unavailable("x"),
            ServerFailed("x"),
            RequestRejected("x"),
            DeadlineExceeded("x"),
        ]
    ),
    st.floats(0, 5),
)


@given(
    st.lists(steps, min_size=1, max_size=12),
    st.integers(0, 5),
    st.floats(0.1, 60),
    st.floats(0, 1),
)
def test_attempts_stay_within_their_number_and_their_time(
    errors: list[tuple[ClientError, float]], max_retries: int, timeout_s: float, drawn: float
) -> None:
    now = [100.0]
    attempts = Attempts(
        timeout_s=timeout_s, max_retries=max_retries, clock=lambda: now[0], draw=lambda: drawn
    )
    retries = 0
    for error, took_s in errors:
        now[0] += took_s
        try:
            delay_s = attempts.delay_after(error)
        except type(error):
            break
        retries += 1
        told_s = error.retry_after_s if isinstance(error, Unavailable) else None
        assert type(error) is ConnectionFailed or told_s is not None
        assert (told_s or 0.25) <= delay_s <= 1.5 * max(told_s or 0.0, MAX_BACKOFF_S)
        now[0] += delay_s
        assert now[0] < 100.0 + timeout_s, "slept past the deadline"
    assert retries <= max_retries


def test_delays_grow_and_are_jittered() -> None:
    def delays(drawn: float) -> list[float]:
        attempts = Attempts(timeout_s=1e6, max_retries=8, draw=lambda: drawn)
        return [attempts.delay_after(ConnectionFailed("x")) for _ in range(8)]

    assert delays(0.0) == [0.25, 0.5, 1, 2, 4, 8, 8, 8]
    assert delays(1.0) == [1.5 * delay for delay in delays(0.0)]


# Trying again, by both clients


def test_what_is_unavailable_is_tried_again(scripted: Scripted, sleeps: list[float]) -> None:
    asker, script = scripted(
        [ConnectionFailed("nobody")], [Overloaded("full", retry_after_s=2.0)], [completion()]
    )
    assert asker.call("generate", "p").text == "hello"
    assert len(script.wires) == 3
    assert 0.25 <= sleeps[0] <= 0.375
    assert 2.0 <= sleeps[1] <= 3.0
    assert script.timeouts[0] <= 600.0


@pytest.mark.parametrize(
    "error", [RequestRejected("no"), ServerFailed("no"), Unavailable("no"), NotFound("no")]
)
def test_what_would_fail_again_is_not_tried_again(
    scripted: Scripted, sleeps: list[float], error: ClientError
) -> None:
    asker, script = scripted([error])
    with pytest.raises(type(error)) as caught:
        asker.call("generate", "p")
    assert caught.value is error
    assert len(script.wires) == 1
    assert sleeps == []


def test_retries_have_an_end(scripted: Scripted, sleeps: list[float]) -> None:
    asker, script = scripted(*[[ConnectionFailed("nobody")]] * 3, max_retries=2)
    with pytest.raises(ConnectionFailed):
        asker.call("models")
    assert len(script.wires) == 3


def test_a_stream_whose_connection_is_lost_goes_on_with_none_of_it_lost_or_repeated(
    scripted: Scripted, sleeps: list[float]
) -> None:
    asker, script = scripted(
        [chunk("ab"), chunk("c"), ConnectionFailed("reset")],
        [chunk("a"), ConnectionFailed("reset")],
        [chunk("abcd"), chunk("e")],
    )
    assert [piece.text for piece in asker.pieces("p")] == ["ab", "c", "d", "e"]
    keys = {wire.headers["Idempotency-Key"] for wire in script.wires}
    assert len(script.wires) == 3
    assert len(keys) == 1, "so that the server writes the same text"


def test_a_stream_that_was_lost_waits_for_a_server_that_says_when_to_come_back(
    scripted: Scripted, sleeps: list[float]
) -> None:
    asker, _ = scripted(
        [chunk("ab"), ConnectionFailed("reset")],
        [Overloaded("all who lost theirs are here", retry_after_s=1.0)],
        [chunk("abc")],
    )
    assert [piece.text for piece in asker.pieces("p")] == ["ab", "c"]
    asker, _ = scripted([chunk("ab"), ConnectionFailed("reset")], [Unavailable("for ever")])
    with pytest.raises(StreamBroken, match="for ever"):
        asker.pieces("p")


def test_a_text_that_has_become_another_is_not_patched_together(
    scripted: Scripted, sleeps: list[float]
) -> None:
    asker, _ = scripted([chunk("ab"), ConnectionFailed("reset")], [chunk("ac")])
    with pytest.raises(StreamBroken, match="another text"):
        asker.pieces("p")


def test_a_stream_that_only_ever_repeats_itself_is_given_up(
    scripted: Scripted, sleeps: list[float]
) -> None:
    asker, script = scripted(*[[chunk("a"), ConnectionFailed("reset")]] * 20)
    with pytest.raises(StreamBroken, match="reset"):
        asker.pieces("p")
    assert len(script.wires) == 1 + DEFAULT_MAX_RETRIES


def test_an_answer_that_failed_in_mid_text_is_not_asked_for_again(
    scripted: Scripted, sleeps: list[float]
) -> None:
    asker, script = scripted([chunk("a"), ServerFailed("the engine is lost")])
    with pytest.raises(StreamBroken, match="lost"):
        asker.pieces("p")
    assert len(script.wires) == 1


def test_a_stream_is_tried_again_before_its_first_piece(
    scripted: Scripted, sleeps: list[float]
) -> None:
    asker, script = scripted([ConnectionFailed("reset")], [chunk("a"), chunk("b")])
    assert "".join(piece.text for piece in asker.pieces("p")) == "ab"
    assert len(script.wires) == 2


def test_a_deadline_bounds_all_attempts_together(scripted: Scripted, sleeps: list[float]) -> None:
    asker, script = scripted([Overloaded("full", retry_after_s=30.0)])
    with pytest.raises(Overloaded):
        asker.call("generate", "p", timeout_s=10.0)
    assert sleeps == []
    assert script.timeouts[0] <= 10.0


def test_a_deadline_that_has_passed_sends_nothing(scripted: Scripted) -> None:
    asker, script = scripted()
    with pytest.raises(DeadlineExceeded, match="timeout_s=0"):
        asker.call("generate", "p", timeout_s=0.0)
    assert script.wires == []


def test_a_transport_that_hangs_is_left_at_the_deadline() -> None:
    class Hanging(AwaitedScript):
        async def open(self, wire: Wire, *, timeout_s: float) -> AsyncGenerator[bytes, None]:
            await asyncio.sleep(30.0)
            yield b""

    async def work() -> None:
        async with AsyncClient(URL, transport=Hanging()) as client:
            with pytest.raises(DeadlineExceeded):
                await asyncio.wait_for(client.generate("p", timeout_s=0.05), 10.0)

    asyncio.run(work())


def test_health_is_asked_once_and_told_apart_from_absence(
    scripted: Scripted, sleeps: list[float]
) -> None:
    asker, _ = scripted(
        [b""], [Unavailable("no token (HTTP 503)", retry_after_s=1.0)], [ConnectionFailed("nobody")]
    )
    assert asker.call("health") == Health(ok=True)
    assert asker.call("health") == Health(ok=False, message="no token (HTTP 503)")
    with pytest.raises(ConnectionFailed):
        asker.call("health")
    assert sleeps == []


def test_closing_closes_the_transport(kind: Any) -> None:
    script = (BlockingScript if kind is Blocking else AwaitedScript)()
    kind(transport=script).close()
    assert script.closed == 1


def test_clients_close_at_the_end_of_their_with() -> None:
    blocking = BlockingScript()
    with Client(URL, transport=blocking):
        pass
    awaited = AwaitedScript()

    async def work() -> None:
        async with AsyncClient(URL, transport=awaited):
            pass

    asyncio.run(work())
    assert (blocking.closed, awaited.closed) == (1, 1)


# What is sent over HTTP


def test_parameters_are_sent_under_their_names(scripted: Scripted) -> None:
    asker, script = scripted([completion()])
    asker.call(
        "generate",
        [1, 2],
        SamplingParams(temperature=0.5, top_k=3, stop=("a", "b"), logit_bias={7: -1.0}, n=1),
        max_tokens=9,
        priority=2,
        cache_salt="mine",
        num_draft_tokens=0,
        request_id="r1",
        structured_outputs=StructuredOutputs(regex="a+"),
    )
    assert script.wires[0].method == "POST /v1/completions"
    assert script.wires[0].headers["X-Request-Id"] == "r1"
    assert script.body == {
        "prompt": [1, 2],
        "temperature": 0.5,
        "top_k": 3,
        "stop": ["a", "b"],
        "logit_bias": {"7": -1.0},
        "max_tokens": 9,
        "priority": 2,
        "cache_salt": "mine",
        "num_draft_tokens": 0,
        "structured_outputs": {"regex": "a+"},
        "return_token_ids": True,
        "return_metrics": True,
    }


def test_no_limit_is_sent_as_a_large_one(scripted: Scripted) -> None:
    """A null would be the server's default."""
    asker, script = scripted([completion()])
    asker.call("generate", "p", max_tokens=None)
    assert script.body["max_tokens"] == 2**31 - 1


def test_a_model_is_named_if_one_was_given(scripted: Scripted) -> None:
    asker, script = scripted([completion()], model="big")
    asker.call("generate", "p")
    assert script.body["model"] == "big"


def test_a_parameter_that_does_not_exist_is_a_type_error(scripted: Scripted) -> None:
    asker, _ = scripted()
    with pytest.raises(TypeError, match="temprature"):
        asker.call("generate", "p", temprature=1)


@pytest.mark.parametrize("value", [object(), float("nan"), float("inf"), "\ud800"])
def test_a_value_that_json_cannot_say_is_rejected_before_it_is_sent(value: object) -> None:
    script = BlockingScript()
    with pytest.raises(RequestRejected, match="cannot be sent"):
        Client(URL, transport=script).generate("p", temperature=value)
    assert script.wires == []


def test_a_number_outside_its_field_is_rejected_before_it_is_sent() -> None:
    script = BlockingScript()
    with pytest.raises(RequestRejected, match="cannot be sent"):
        Client("grpc://h:1", transport=script).generate("p", max_tokens=-1)
    assert script.wires == []


def test_a_chat_sends_messages_and_asks_for_log_probabilities_its_own_way(
    scripted: Scripted,
) -> None:
    message = {"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}
    asker, script = scripted([json.dumps({"id": "c", "choices": [message]}).encode()])
    answer = asker.call("chat", [{"role": "user", "content": "hi"}], logprobs=2)
    assert answer.text == "yes"
    assert script.wires[0].method == "POST /v1/chat/completions"
    assert script.body["messages"] == [{"role": "user", "content": "hi"}]
    assert (script.body["logprobs"], script.body["top_logprobs"]) == (True, 2)
    assert script.body["max_tokens"] == 2**31 - 1, "a chat has no limit of 16"


def test_http_has_no_abort_and_grpc_no_chat() -> None:
    with pytest.raises(RequestRejected, match="use a grpc:// URL"):
        Client(URL, transport=BlockingScript()).abort("a")
    over_grpc = Client("grpc://h:1", transport=BlockingScript())
    for call in (
        lambda: over_grpc.chat([{"role": "user", "content": "hi"}]),
        lambda: over_grpc.stream_chat([{"role": "user", "content": "hi"}]),
        lambda: over_grpc.tokenize("a"),
        lambda: over_grpc.detokenize([1]),
    ):
        with pytest.raises(RequestRejected, match="use an http:// URL"):
            call()


# What is read over HTTP


def test_a_whole_answer_is_read(answered: Answered) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer k"
        answer = json.loads(completion(num_accepted=3, stop_reason="x", unknown=1))
        answer["choices"][0]["logprobs"] = {
            "tokens": list("hello"),
            "token_logprobs": [-0.5] * 5,
            "top_logprobs": [{"h": -0.5, "j": -1.0}] + [None] * 4,
        }
        answer["usage"] = {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        answer["metrics"] = {
            "speculative_decoding": {
                "num_spec_steps": 2,
                "num_draft_tokens": 6,
                "num_accepted_draft_tokens": 3,
                "acceptance_histogram": [0, 1, 1],
            }
        }
        answer["kv_policy"] = "sink_window"
        return httpx.Response(200, json=answer)

    answer = answered(respond, api_key="k").call("generate", "abc", logprobs=2)
    assert isinstance(answer, Completion)
    assert (answer.text, answer.token_ids, answer.finish_reason) == (
        "hello",
        tuple(ids_of("hello")),
        "stop",
    )
    choice = answer.choices[0]
    assert (choice.stop_reason, choice.num_accepted, answer.kv_policy) == ("x", 3, "sink_window")
    assert answer.usage == Usage(prompt_tokens=3, completion_tokens=5, cached_tokens=2)
    assert choice.logprobs is not None
    assert choice.logprobs[0] == TokenLogprob(
        logprob=-0.5,
        token="h",
        token_id=ord("h"),
        top=(TokenLogprob(logprob=-0.5, token="h"), TokenLogprob(logprob=-1.0, token="j")),
    )
    assert answer.speculation is not None
    assert answer.speculation.acceptance_rate == 0.5
    assert answer.speculation.accepted_at == (0, 1, 1)


def test_a_stream_is_read_event_by_event(answered: Answered) -> None:
    usage = (
        b'{"id": "cmpl-1", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}'
    )
    body = b": a comment\n\n" + events(
        chunk("a", num_accepted=1), chunk("b", finish_reason="length"), usage
    )
    pieces = answered(lambda _: httpx.Response(200, content=body)).pieces("p")
    assert [(p.text, p.num_accepted, p.finish_reason) for p in pieces] == [
        ("a", 1, None),
        ("b", 0, "length"),
        ("", 0, None),
    ]
    assert pieces[-1].usage == Usage(prompt_tokens=1, completion_tokens=2)
    assert {piece.request_id for piece in pieces} == {"cmpl-1"}


@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=5),
    st.integers(1, 30),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_events_survive_however_they_are_cut_and_whatever_text_they_hold(
    given_texts: list[str], size: int, newline: bytes
) -> None:
    data = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in given_texts]
    sent = (b": hello\n" + events(*data)).replace(b"\n", newline)
    reader = EventReader()
    found = [
        event
        for start in range(0, len(sent), size)
        for event in reader.feed(sent[start : start + size])
    ]
    assert found == data
    assert reader.done


def test_a_text_may_hold_any_line_break(answered: Answered) -> None:
    text = "a\u2028b\x85c\x0bd\x1ee\r\nf"
    raw = json.dumps({"id": "c", "choices": [{"text": text}]}, ensure_ascii=False).encode()
    pieces = answered(lambda _: httpx.Response(200, content=events(raw))).pieces("p")
    assert [piece.text for piece in pieces] == [text]


@pytest.mark.parametrize(
    "body",
    [
        events(chunk("a"), end=False),
        events(chunk("a"), b'{"error": {"message": "the engine is lost"}}'),
    ],
    ids=["cut short", "an error event"],
)
def test_a_stream_that_does_not_end_well_is_broken(
    answered: Answered, sleeps: list[float], body: bytes
) -> None:
    with pytest.raises(StreamBroken):
        answered(lambda _: httpx.Response(200, content=body)).pieces("p")


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": 3}', b"\xff", b"[1]"])
def test_an_answer_that_is_not_understood_is_the_servers_fault(
    answered: Answered, body: bytes
) -> None:
    with pytest.raises(ServerFailed):
        answered(lambda _: httpx.Response(200, content=body)).call("generate", "p")


def test_an_overloaded_server_is_asked_again_when_it_says(
    answered: Answered, sleeps: list[float]
) -> None:
    replies = [
        httpx.Response(429, headers={"retry-after": "3"}, json={"error": {"message": "full"}}),
        httpx.Response(200, content=completion()),
    ]
    assert answered(lambda _: replies.pop(0)).call("generate", "p").text == "hello"
    assert 3.0 <= sleeps[0] <= 4.5


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (httpx.ConnectError("refused"), ConnectionFailed),
        (httpx.ConnectTimeout("slow"), ConnectionFailed),
        (httpx.ReadError("reset"), ConnectionFailed),
        (httpx.RemoteProtocolError("gone"), ConnectionFailed),
        (httpx.ReadTimeout("slow"), DeadlineExceeded),
    ],
)
def test_failures_of_the_network_have_our_names(
    answered: Answered, raised: Exception, expected: type[ClientError]
) -> None:
    def respond(_: httpx.Request) -> httpx.Response:
        raise raised

    with pytest.raises(expected):
        answered(respond, max_retries=0).call("generate", "p")


# Against real doors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def doors(folder: Path) -> Iterator[Doors]:
    served = Doors(folder, FakeEngine(), EngineConfig())
    yield served
    served.stop()


@pytest.fixture(params=["http", "grpc"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def connect(kind: Any, scheme: str) -> Iterator[Callable[..., Asker]]:
    """`connect(doors, **how)`: a client of each kind over each transport."""
    made: list[Asker] = []

    def make(served: Doors, **how: Any) -> Asker:
        made.append(kind(served.http_url if scheme == "http" else served.grpc_url, **how))
        return made[-1]

    yield make
    for asker in made:
        asker.close()


Connect = Callable[..., Asker]


def test_a_text_is_the_same_by_every_way(connect: Connect, doors: Doors) -> None:
    answer = connect(doors).call("generate", "hi", max_tokens=20, logprobs=2, request_id=None)
    assert answer.text == REPLY[:20]
    assert answer.token_ids == tuple(ids_of(REPLY[:20]))
    assert answer.finish_reason == "length"
    assert answer.usage == Usage(prompt_tokens=2, completion_tokens=20)
    assert answer.choices[0].num_accepted == 13
    assert [entry.logprob for entry in answer.choices[0].logprobs] == [-0.5] * 20
    assert [entry.token_id for entry in answer.choices[0].logprobs] == ids_of(REPLY[:20])
    assert [len(entry.top) for entry in answer.choices[0].logprobs] == [2] * 20
    told = answer.speculation
    assert (told.rounds, told.drafted, told.accepted) == (7, 14, 13)
    assert told.accepted_at == (0, 1, 6)


def test_pieces_add_up_by_every_way(connect: Connect, doors: Doors) -> None:
    pieces = connect(doors).pieces("hi", max_tokens=40, stop=["lazy"])
    assert "".join(piece.text for piece in pieces) == "the quick brown fox jumps over the "
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
    assert [piece.stop_reason for piece in pieces if piece.finish_reason] == ["lazy"]
    assert any(piece.num_accepted == 2 for piece in pieces)
    (usage,) = (piece.usage for piece in pieces if piece.usage is not None)
    assert usage.completion_tokens == sum(len(piece.token_ids) for piece in pieces) == 39


def test_many_texts_come_in_order_by_every_way(connect: Connect, doors: Doors) -> None:
    answer = connect(doors).call("generate", "hi", max_tokens=10, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.text for choice in answer.choices} == {REPLY[:10]}
    assert answer.usage.completion_tokens == 30


def test_a_stream_that_is_left_frees_its_blocks(connect: Connect, folder: Path) -> None:
    served = Doors(folder, FakeEngine(step_s=0.005), EngineConfig())
    try:
        (piece,) = connect(served).pieces("hi", take=1, max_tokens=500)
        assert piece.text == "the"
        assert served.settles()
        assert served.engine.aborted
    finally:
        served.stop()


def test_bad_parameters_are_rejected_by_name(connect: Connect, doors: Doors) -> None:
    with pytest.raises(RequestRejected, match="top_p must be"):
        connect(doors).call("generate", "hi", top_p=3.0)


def test_the_server_can_be_asked_about_itself(connect: Connect, doors: Doors) -> None:
    asker = connect(doors)
    (model,) = asker.call("models")
    assert (model.model_id, model.max_model_len) == ("embedded", 512)
    assert asker.call("health").ok
    assert eventually(lambda: bool(doors.llm.status().ranks))
    info = asker.call("server_info")
    assert info.ranks == ("rank 0 of 1: a fake on the cpu",)
    assert info.config["max_num_seqs"] == 128
    loads = asker.call("loads")
    assert loads.generated >= 0
    assert 0.0 <= loads.kv_usage <= 1.0


def test_a_key_is_sent(connect: Connect, folder: Path) -> None:
    served = Doors(folder, FakeEngine(), EngineConfig(), key="s3cret")
    try:
        with pytest.raises(Unauthorized):
            connect(served).call("generate", "hi")
        assert connect(served, api_key="s3cret").call("generate", "hi", max_tokens=3).text == "the"
        assert connect(served).call("health").ok
    finally:
        served.stop()


def test_a_full_server_is_overloaded(connect: Connect, folder: Path) -> None:
    config = EngineConfig(max_num_seqs=1, max_queued_requests=0)
    served = Doors(folder, FakeEngine(step_s=0.02), config)
    blocker = Client(served.grpc_url)
    try:
        running = blocker.stream("hi", max_tokens=500)
        next(running)
        with pytest.raises(Overloaded) as caught:
            connect(served, max_retries=0).call("generate", "hi")
        assert caught.value.retry_after_s is not None
        running.close()
        assert served.settles()
    finally:
        blocker.close()
        served.stop()


def test_a_lost_engine_is_unavailable_or_breaks_the_stream(connect: Connect, folder: Path) -> None:
    served = Doors(folder, FakeEngine(step_s=0.005), EngineConfig())
    try:
        asker = connect(served, max_retries=0)
        assert asker.pieces("hi", take=1, max_tokens=500)
        served.engine.fail("rank 0 died")
        assert eventually(lambda: served.llm.lost is not None)
        with pytest.raises(Unavailable, match="rank 0 died"):
            asker.call("generate", "hi")
        assert not asker.call("health").ok
    finally:
        served.stop()


def test_an_engine_lost_in_mid_text_breaks_the_stream(scheme: str, folder: Path) -> None:
    served = Doors(folder, FakeEngine(step_s=0.005), EngineConfig())
    try:
        with Client(served.http_url if scheme == "http" else served.grpc_url) as client:
            stream = client.stream("hi", max_tokens=500)
            next(stream)
            served.engine.fail("rank 0 died")
            with pytest.raises(StreamBroken, match="rank 0 died"):
                list(stream)
    finally:
        served.stop()


def test_a_slow_answer_passes_its_deadline(connect: Connect, folder: Path) -> None:
    served = Doors(folder, FakeEngine(step_s=0.02), EngineConfig())
    try:
        with pytest.raises(DeadlineExceeded):
            connect(served).call("generate", "hi", max_tokens=500, timeout_s=0.2)
        assert served.settles()
    finally:
        served.stop()


def test_nobody_there_is_a_failed_connection(kind: Any, scheme: str) -> None:
    asker = kind(f"{scheme}://127.0.0.1:9", max_retries=1)
    with pytest.raises(ConnectionFailed):
        asker.call("generate", "hi", timeout_s=10.0)
    asker.close()


def test_a_request_is_aborted_by_its_id_over_grpc(kind: Any, folder: Path) -> None:
    served = Doors(folder, FakeEngine(step_s=0.005), EngineConfig(), http=False)
    asker, other = kind(served.grpc_url), Client(served.grpc_url)
    try:
        stream = other.stream("hi", max_tokens=500)
        first = next(stream)
        asker.call("abort", first.request_id)
        assert list(stream)[-1].finish_reason == "abort"
        with pytest.raises(NotFound, match=first.request_id):
            asker.call("abort", first.request_id)
    finally:
        asker.close()
        other.close()
        served.stop()


def test_chats_and_tokens_over_http(kind: Any, doors: Doors) -> None:
    asker = kind(doors.http_url)
    assert asker.call("tokenize", "hi") == ids_of("hi")
    assert asker.call("detokenize", ids_of("hi")) == "hi"
    messages = [{"role": "user", "content": "hi"}]
    assert asker.call("chat", messages, max_tokens=9).text == REPLY[:9]
    pieces = asker.pieces(messages, max_tokens=9, name="stream_chat")
    assert "".join(piece.text for piece in pieces) == REPLY[:9]
    asker.close()


# Damaged gRPC answers


@given(st.binary(max_size=40))
def test_any_grpc_answer_is_read_or_the_servers_fault(message: bytes) -> None:
    client = Client("grpc://h:1", transport=BlockingScript([message], [message]))
    with contextlib.suppress(ServerFailed):
        client.generate("p")
    with contextlib.suppress(ServerFailed):
        list(client.stream("p"))


def test_an_answer_with_too_few_texts_is_the_servers_fault() -> None:
    one = pb.GenerateResponse(complete=pb.GenerateComplete(text="a")).SerializeToString()
    client = Client("grpc://h:1", transport=BlockingScript([one]))
    with pytest.raises(ServerFailed, match="expected 2 texts, found 1"):
        client.generate("p", n=2)

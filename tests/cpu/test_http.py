"""The OpenAI API over HTTP, as its clients see it. The engine is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engines import (
    BLOCK_SIZE,
    END,
    REPLY,
    FakeEngine,
    Served,
    endless,
    fake_facts,
    ids_of,
    saying,
    serving,
)
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from paceline.actors.frontends import bounds, http
from paceline.actors.frontends.openai import ApiError, ChatBody, CompletionBody, decode_body
from paceline.runtime import async_llm
from paceline.runtime.async_llm import AsyncLLM
from paceline.runtime.chat import ChatTemplate
from paceline.runtime.config import EngineConfig, ServerConfig, SpeculativeConfig
from paceline.runtime.errors import ConfigError
from paceline.runtime.preflight import Facts
from paceline.runtime.tokenizer import Tokenizer
from paceline.runtime.types import EngineStatus, Request

SOON_S = 5.0
CHAT = [{"role": "user", "content": "hi"}]
SPECULATING = EngineConfig(speculative_config=SpeculativeConfig(num_speculative_tokens=2))

Ask = Callable[..., httpx.Response]


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "POLL_S", 0.05)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return fake_facts(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def ask(facts: Facts) -> Ask:
    """`ask(path, body, ...)`: one request to an application of its own, without a socket."""

    def call(
        path: str,
        body: Any = None,
        *,
        engine: FakeEngine | None = None,
        config: EngineConfig | None = None,
        server: ServerConfig | None = None,
        headers: dict[str, str] | None = None,
        method: str | None = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        made = engine or FakeEngine()

        async def main() -> httpx.Response:
            chosen = config or EngineConfig()
            llm = AsyncLLM(made, facts, chosen)
            app = http.make_app(llm, facts, chosen, server or ServerConfig())
            transport = httpx.ASGITransport(app=app)
            try:
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                    kind = method or ("GET" if body is None and content is None else "POST")
                    response = await client.request(
                        kind, path, json=body, content=content, headers=headers
                    )
                    assert llm.num_in_flight == 0, "an answered request holds nothing"
                    return response
            finally:
                await llm.close()

        return asyncio.run(asyncio.wait_for(main(), SOON_S))

    return call


@pytest.fixture
def serve(facts: Facts) -> Iterator[Callable[..., Served]]:
    """`serve(engine, ...)`: a server on a real socket until the test ends."""
    with contextlib.ExitStack() as stack:

        def start(
            engine: FakeEngine,
            *,
            config: EngineConfig | None = None,
            server: ServerConfig | None = None,
        ) -> Served:
            return stack.enter_context(serving(engine, facts, config=config, server=server))

        yield start


def client_of(served: Served, **how: Any) -> openai.OpenAI:
    settings = {"api_key": "unused", "max_retries": 0, "timeout": SOON_S, **how}
    return openai.OpenAI(base_url=f"{served.url}/v1", **settings)


def events_of(text: str) -> list[Any]:
    """The JSON of a stream's events; the last must be [DONE]."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "expected it to happen soon"
        time.sleep(0.002)


# The unmodified client, over a socket


def test_the_openai_client_completes(serve: Callable[..., Served]) -> None:
    client = client_of(serve(FakeEngine(saying("hello. "))))
    done = client.completions.create(model="embedded", prompt="hi", max_tokens=50)
    assert done.id.startswith("cmpl-")
    assert done.object == "text_completion"
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("hello. ", "stop")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2, 8)
    assert done.usage.total_tokens == 10


def test_the_openai_client_streams_a_completion(serve: Callable[..., Served]) -> None:
    client = client_of(serve(FakeEngine(step_s=0.005)))
    chunks = list(
        client.completions.create(
            model="embedded",
            prompt="hi",
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *texts, last = chunks
    assert len(texts) >= 3
    assert "".join(chunk.choices[0].text for chunk in texts) == REPLY[:20]
    assert [chunk.choices[0].finish_reason for chunk in texts] == [
        *[None] * (len(texts) - 1),
        "length",
    ]
    assert all(chunk.usage is None for chunk in texts)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_openai_client_chats(serve: Callable[..., Served]) -> None:
    engine = FakeEngine(saying("hello"))
    client = client_of(serve(engine))
    done = client.chat.completions.create(
        model="embedded", messages=[{"role": "user", "content": "hi"}], temperature=0
    )
    assert done.id.startswith("chatcmpl-")
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content == "hello"
    assert done.choices[0].finish_reason == "stop"
    (request,) = engine.submitted
    assert bytes(request.prompt_token_ids).decode() == "# hi\n"
    assert request.max_tokens == 512 - 5, "a chat may fill the context"


def test_the_openai_client_streams_a_chat(serve: Callable[..., Served]) -> None:
    client = client_of(serve(FakeEngine(saying("hello there"), step_s=0.002)))
    chunks = list(
        client.chat.completions.create(
            model="embedded", messages=[{"role": "user", "content": "hi"}], stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello there"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_openai_client_passes_vllms_extra_fields(serve: Callable[..., Served]) -> None:
    engine = FakeEngine()
    extra: dict[str, Any] = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [200],
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "priority": 3,
        "cache_salt": "tenant",
        "num_draft_tokens": 1,
        "kv_policy": "sink_window",
        "request_id": "mine",
    }
    done = client_of(serve(engine)).completions.create(
        model="embedded",
        prompt="hi",
        max_tokens=5,
        seed=11,
        logit_bias={"65": 2},
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        top_p=0.9,
        user="somebody",
        extra_body=extra,
    )
    assert done.id == "cmpl-mine"
    assert done.model_extra == {"kv_policy": "sink_window"} | (done.model_extra or {})
    (request,) = engine.submitted
    params = request.params
    assert (params.top_k, params.min_p, params.top_p) == (5, 0.1, 0.9)
    assert (params.repetition_penalty, params.frequency_penalty) == (1.2, 0.5)
    assert (params.presence_penalty, params.logit_bias) == (-0.5, {65: 2.0})
    assert (params.min_tokens, params.ignore_eos, params.stop_token_ids) == (2, True, (200,))
    assert (params.skip_special_tokens, params.include_stop_str_in_output) == (False, True)
    assert (request.priority, request.cache_salt, request.num_draft_tokens) == (3, "tenant", 1)
    assert (request.seed, params.kv_policy) == (11, "sink_window")


def test_the_openai_client_understands_our_errors(serve: Callable[..., Served]) -> None:
    client = client_of(serve(FakeEngine()))
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="embedded", prompt="hi", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="hi")
    assert missing.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["embedded"]
    assert client.models.retrieve("embedded").id == "embedded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_an_overloaded_server_says_when_to_come_back(serve: Callable[..., Served]) -> None:
    engine = FakeEngine()
    engine.pause()
    config = EngineConfig(max_num_seqs=1, max_queued_requests=0)
    client = client_of(serve(engine, config=config))
    with client.completions.create(model="embedded", prompt="hi", stream=True):
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="embedded", prompt="hi")
        assert int(caught.value.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_blocks(
    serve: Callable[..., Served], stream: bool
) -> None:
    engine = FakeEngine(step_s=0.005)
    served = serve(engine)
    body = {"prompt": "hi", "n": 3, "max_tokens": 500, "stream": stream}
    raw = json.dumps(body).encode()
    with socket.create_connection(served.url.removeprefix("http://").split(":"), SOON_S) as sock:  # type: ignore[arg-type]
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)
        )
        until(lambda: not engine.idle and engine.status().generation_tokens > 0)
    until(lambda: engine.idle)
    status = engine.status()
    assert status.num_free_blocks == status.num_blocks
    assert status.generation_tokens < 3 * 500, "it was stopped, it did not end"
    assert served.llm.num_in_flight == 0


def test_an_engine_that_is_lost_within_a_stream_is_an_error_event(
    serve: Callable[..., Served],
) -> None:
    engine = FakeEngine(step_s=0.005)
    client = client_of(serve(engine))
    chunks = client.completions.create(model="embedded", prompt="hi", max_tokens=500, stream=True)
    next(iter(chunks))
    engine.fail("rank 0 died")
    with pytest.raises(openai.APIError, match="rank 0 died"):
        list(chunks)
    with pytest.raises(openai.InternalServerError, match="rank 0 died"):
        client.completions.create(model="embedded", prompt="hi")


def test_an_engine_that_is_lost_ends_a_stream_of_many_prompts_with_one_error(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(step_s=0.005)
    body = {"prompt": ["a", "b", "c"], "max_tokens": 500, "stream": True}
    url = f"{serve(engine).url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=SOON_S) as response:
        pieces = response.iter_text()
        next(pieces)
        engine.fail("rank 0 died")
        text = "".join(pieces)
    assert text.count("rank 0 died") == 1
    assert text.endswith("data: [DONE]\n\n")
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_many_clients_at_once_each_get_their_own_text(serve: Callable[..., Served]) -> None:
    def reply(request: Request) -> list[int]:
        return [*ids_of(f"re: {bytes(request.prompt_token_ids).decode()}"), END]

    served = serve(FakeEngine(reply))

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", timeout=SOON_S)

        async def one(i: int) -> str:
            chunks = await client.completions.create(
                model="embedded", prompt=f"number {i}", max_tokens=50, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in chunks])

        texts = await asyncio.gather(*(one(i) for i in range(50)))
        assert texts == [f"re: number {i}" for i in range(50)]
        await client.close()

    asyncio.run(main())


def test_draining_lets_streams_finish_and_refuses_new_ones(serve: Callable[..., Served]) -> None:
    engine = FakeEngine(step_s=0.01)
    served = serve(engine)
    client = client_of(served)
    chunks = client.completions.create(model="embedded", prompt="hi", max_tokens=90, stream=True)
    first = next(iter(chunks))
    drained = asyncio.run_coroutine_threadsafe(served.llm.drain(timeout_s=SOON_S), served.loop)
    until(lambda: served.llm.draining)
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(model="embedded", prompt="hi")
    assert refused.value.status_code == 503
    assert httpx.get(f"{served.url}/health").status_code == 503
    rest = "".join(chunk.choices[0].text for chunk in chunks)
    assert len(first.choices[0].text + rest) == 90
    assert drained.result(SOON_S)


def test_a_port_in_use_is_refused_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*--port"):
            http.bind("127.0.0.1", port)


# One request each, without a socket


def test_several_prompts_and_texts_are_numbered_through(ask: Ask) -> None:
    engine = FakeEngine(lambda r: [*r.prompt_token_ids, ids_of("!")[0]])
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 10}
    answer = ask("/v1/completions", body, engine=engine).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, "a!"),
        (1, "a!"),
        (2, "b!"),
        (3, "b!"),
    ]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 8
    engine = FakeEngine(lambda r: [*r.prompt_token_ids, ids_of("!")[0]])
    events = events_of(ask("/v1/completions", body | {"stream": True}, engine=engine).text)
    texts = dict.fromkeys(range(4), "")
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == ["a!", "a!", "b!", "b!"]


@pytest.mark.parametrize("prompt", [[104, 105], [[104, 105]]])
def test_prompts_may_be_token_ids(ask: Ask, prompt: list[Any]) -> None:
    engine = FakeEngine()
    ask("/v1/completions", {"prompt": prompt, "max_tokens": 1}, engine=engine)
    assert engine.submitted[0].prompt_token_ids == (104, 105)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("keep", "text"), [(False, "the quick "), (True, "the quick brown")])
def test_a_stop_string_ends_the_text(ask: Ask, stream: bool, keep: bool, text: str) -> None:
    body = {
        "prompt": "hi",
        "max_tokens": 300,
        "stop": ["cat", "brown"],
        "include_stop_str_in_output": keep,
        "stream": stream,
    }
    answer = ask("/v1/completions", body)
    choices = (
        [event["choices"][0] for event in events_of(answer.text)]
        if stream
        else answer.json()["choices"]
    )
    assert "".join(choice["text"] for choice in choices) == text
    assert choices[-1]["finish_reason"] == "stop"
    assert choices[-1]["stop_reason"] == "brown"


def test_echo_puts_the_prompt_before_every_text(ask: Ask) -> None:
    body = {"prompt": "hi ", "echo": True, "n": 2, "max_tokens": 3}
    answer = ask("/v1/completions", body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["hi the", "hi the"]
    events = events_of(ask("/v1/completions", body | {"stream": True}).text)
    for index in (0, 1):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "hi the"


def test_completions_report_log_probabilities(ask: Ask) -> None:
    body = {"prompt": "hi", "max_tokens": 3, "logprobs": 2}
    (choice,) = ask("/v1/completions", body).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["t", "h", "e"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"t": -0.5, "u": -1.5}, {"h": -0.5, "i": -1.5}, {"e": -0.5, "f": -1.5}],
        "text_offset": [0, 1, 2],
    }
    engine = FakeEngine(tokens_per_step=2)
    events = events_of(ask("/v1/completions", body | {"stream": True}, engine=engine).text)
    offsets = [event["choices"][0]["logprobs"]["text_offset"] for event in events]
    assert [offset for part in offsets for offset in part] == [0, 1, 2]


def test_an_echo_has_the_prompts_log_probabilities(ask: Ask) -> None:
    body = {"prompt": "hi", "max_tokens": 1, "logprobs": 1, "echo": True}
    (choice,) = ask("/v1/completions", body).json()["choices"]
    assert choice["logprobs"]["tokens"] == ["h", "i", "t"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


def test_chats_report_log_probabilities(ask: Ask) -> None:
    body = {"messages": CHAT, "max_tokens": 1, "logprobs": True, "top_logprobs": 2}
    (choice,) = ask("/v1/chat/completions", body).json()["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("t", -0.5, [116])
    assert [top["token"] for top in entry["top_logprobs"]] == ["t", "u"]
    plain = ask("/v1/chat/completions", {"messages": CHAT, "max_tokens": 1, "logprobs": True})
    assert plain.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_prompt_log_probabilities_are_keyed_by_token_id(ask: Ask) -> None:
    body = {"prompt": "hi", "max_tokens": 1, "prompt_logprobs": 1}
    (choice,) = ask("/v1/completions", body).json()["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second["105"] == {"logprob": -0.5, "rank": 1, "decoded_token": "i"}


def test_token_ids_are_returned_on_request_with_what_was_accepted(ask: Ask) -> None:
    body = {"prompt": "hi", "max_tokens": 7, "return_token_ids": True}
    (choice,) = ask("/v1/completions", body).json()["choices"]
    assert choice["token_ids"] == ids_of(REPLY[:7])
    assert choice["prompt_token_ids"] == ids_of("hi")
    assert choice["num_accepted"] == 4, "of 3, 3 and 1 tokens all but the last of each"
    events = events_of(ask("/v1/completions", body | {"stream": True}).text)
    choices = [event["choices"][0] for event in events]
    assert [(c["token_ids"], c["num_accepted"]) for c in choices] == [
        (ids_of("the"), 2),
        (ids_of(" qu"), 2),
        (ids_of("i"), 0),
    ]
    assert "prompt_token_ids" in choices[0]
    assert "prompt_token_ids" not in choices[1]


def test_usage_names_cached_and_predicted_tokens(ask: Ask) -> None:
    answer = ask("/v1/completions", {"prompt": "x" * 20, "max_tokens": 7}).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": BLOCK_SIZE}
    details = answer["usage"]["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (4, 2)


def test_usage_comes_with_every_chunk_on_request(ask: Ask) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "hi", "max_tokens": 7, "stream": True, "stream_options": options}
    events = events_of(ask("/v1/completions", body).text)
    assert [event["usage"]["completion_tokens"] for event in events] == [3, 6, 7, 7]


@pytest.mark.parametrize("stream", [True, False])
def test_speculation_is_reported_on_request_or_always(ask: Ask, stream: bool) -> None:
    body = {"prompt": "hi", "max_tokens": 7, "stream": stream}
    expected = {
        "mean_acceptance_length": 1 + 4 / 3,
        "draft_acceptance_rate": 4 / 6,
        "acceptance_histogram": [1, 0, 2],
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 4,
        "num_draft_tokens": 6,
        "num_spec_tokens": 2,
    }

    def metrics(response: httpx.Response) -> Any:
        answer = events_of(response.text)[-1] if stream else response.json()
        return answer.get("metrics")

    always = ServerConfig(per_request_spec_decode_metrics=True)
    asked = ask("/v1/completions", body | {"return_metrics": True}, config=SPECULATING)
    assert metrics(asked) == {"speculative_decoding": expected}
    assert metrics(ask("/v1/completions", body, config=SPECULATING, server=always)) == {
        "speculative_decoding": expected
    }
    assert metrics(ask("/v1/completions", body, config=SPECULATING)) is None


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "object"}},
                }
            },
            {"json": '{"type":"object"}'},
        ),
        ({"structured_outputs": {"regex": "[ab]+"}}, {"regex": "[ab]+"}),
        ({"guided_choice": ["yes", "no"]}, {"choice": ("yes", "no")}),
        ({"guided_json": '{"type":"object"}'}, {"json": '{"type":"object"}'}),
    ],
)
def test_the_shape_of_a_text_may_be_asked_for_in_three_ways(
    ask: Ask, how: dict[str, Any], wanted: dict[str, Any]
) -> None:
    engine = FakeEngine(saying("{}"))
    response = ask("/v1/chat/completions", {"messages": CHAT, **how}, engine=engine)
    assert response.status_code == 200, response.text
    outputs = engine.submitted[0].params.structured_outputs
    assert {name: getattr(outputs, name) for name in wanted} == wanted


def test_chat_parts_and_roles_reach_the_template(ask: Ask) -> None:
    engine = FakeEngine()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
        },
        {"role": "assistant", "content": "x = 1"},
    ]
    ask("/v1/chat/completions", {"messages": messages, "max_tokens": 1}, engine=engine)
    prompt = bytes(engine.submitted[0].prompt_token_ids).decode()
    assert prompt == "# Be brief.\n# one\n# two\nx = 1\n\n"


def test_a_chat_template_may_be_given_and_told_things(ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{% generation %}{{ eos_token }}{% endgeneration %}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.content | tojson }}]{% endfor %}{{ mood }}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    server = ServerConfig(chat_template=str(file))
    body: dict[str, Any] = {"messages": CHAT, "chat_template_kwargs": {"mood": "kind"}}
    tokens = ask("/tokenize", body, server=server).json()["tokens"]
    assert tokens == [END, *ids_of('["hi"]kind>')], "special tokens are read, none are added"
    refused = ask("/tokenize", {"messages": [{"role": "system", "content": "x"}]}, server=server)
    assert refused.status_code == 400
    assert "no system" in refused.json()["error"]["message"]
    reserved = ask("/tokenize", body | {"chat_template_kwargs": {"messages": []}}, server=server)
    assert reserved.status_code == 400
    file.write_text("{% if %}")
    with pytest.raises(ConfigError, match="is no Jinja template"):
        ask("/health", server=server)


def test_a_chat_begins_with_one_beginning(facts: Facts, tmp_path: Path) -> None:
    assert facts.tokenizer is not None
    fast = FastTokenizer.from_str(facts.tokenizer.fast.to_str())
    fast.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", END)])
    fast.save(str(tmp_path / "tokenizer.json"))
    plain = ChatTemplate(Tokenizer(tmp_path))
    assert plain.encode(plain.render(CHAT)) == [END, *ids_of("# hi\n")]
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|end|>"}}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    own = ChatTemplate(Tokenizer(tmp_path))
    assert own.encode(own.render(CHAT)) == [END, *ids_of("hi")]


def test_a_template_cannot_reach_out_of_its_sandbox(ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    response = ask("/tokenize", {"messages": CHAT}, server=ServerConfig(chat_template=str(file)))
    assert response.status_code == 400
    assert "unsafe" in response.json()["error"]["message"]


def test_tokens_and_text_go_both_ways(ask: Ask) -> None:
    answer = ask("/tokenize", {"prompt": "hé", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": 512,
        "tokens": ids_of("hé"),
        "token_strs": ["h", "Ã", "©"],
    }
    assert ask("/detokenize", {"tokens": [*ids_of("hé"), END]}).json() == {"prompt": "hé<|end|>"}


# What is refused


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "hi", "temperatur": 1}, "temperatur", "did you mean temperature?"),
        ({"prompt": "hi", "zzz": 1}, "zzz", "unknown field"),
        ({"prompt": "hi", "temperature": "hot"}, "temperature", "expected `float"),
        ({"prompt": "hi", "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"prompt": "hi", "n": 0}, "n", "from 1 to"),
        ({"prompt": "hi", "logprobs": 99}, "logprobs", "from 0 to 20"),
        ({"prompt": "hi", "suffix": "x"}, "suffix", "not supported"),
        ({"prompt": "hi", "best_of": 3}, "best_of", "not supported"),
        ({"prompt": "hi", "use_beam_search": True}, "use_beam_search", "not supported"),
        ({"prompt": "hi", "stream_options": {"usage": 1}}, "stream_options", "unknown field"),
        ({"prompt": "hi", "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"prompt": "hi", "logit_bias": {"999": 1}}, "logit_bias", "found 999"),
        ({"prompt": "hi", "kv_policy": "lru"}, "kv_policy", "invalid enum value"),
        ({"prompt": "hi", "request_id": "a b"}, "request_id", "visible ASCII"),
        ({"prompt": "hi", "guided_regex": "(["}, None, "cannot be used"),
        ({"prompt": "hi", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "streamed"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [1, "a"]}, "prompt", "mixes"),
        ({"prompt": [999]}, "prompt", "outside the vocabulary"),
        ({"prompt": "x" * 600}, None, "the context holds 512"),
        ({"prompt": ["x"] * 257}, "prompt", "256 prompts"),
        ({}, None, "prompt"),
    ],
)
def test_a_bad_completion_is_refused_by_name(
    ask: Ask, body: dict[str, Any], param: str | None, words: str
) -> None:
    response = ask("/v1/completions", body)
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert "\n" not in error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role must be one of"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "only parts of type text",
        ),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools is not supported"),
        ({"messages": CHAT, "top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"messages": CHAT, "response_format": {"type": "json_schema"}}, "schema is missing"),
        ({"messages": CHAT, "echo": True}, "echo is not supported"),
    ],
)
def test_a_bad_chat_is_refused_readably(ask: Ask, body: dict[str, Any], words: str) -> None:
    response = ask("/v1/chat/completions", body)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


def test_what_changes_nothing_is_accepted(ask: Ask) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "tools": [],
        "tool_choice": "none",
        "temperature": None,
        "logprobs": None,
        "length_penalty": 1.0,
        "bad_words": [],
    }
    body = {"messages": CHAT, "max_tokens": 1, **harmless}
    assert ask("/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"prompt": "\\ud800 "}', ""),
        (b'{"prompt": "\xff"}', ""),
        (b'{"a":' * 20000 + b"1" + b"}" * 20000, "nested too deeply"),
        (b'{"prompt":"hi","temperature":1e999}', ""),
        (b'{"prompt":"hi","seed":123456789012345678901234567890}', ""),
    ],
)
def test_a_body_that_is_no_json_is_refused(ask: Ask, content: bytes, words: str) -> None:
    response = ask("/v1/completions", content=content)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_BODY_BYTES", 1000)
    content = json.dumps({"prompt": "x" * 2000}).encode()
    response = ask("/v1/completions", content=content)
    assert response.status_code == 413
    chunked = ask("/v1/completions", content=content, headers={"content-length": "10"})
    assert chunked.status_code == 413, "whatever length is announced"


def test_unknown_paths_and_methods_answer_in_openais_shape(ask: Ask) -> None:
    assert ask("/v1/nothing").status_code == 404
    response = ask("/v1/completions", method="GET")
    assert response.status_code == 405
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_for_everywhere_but_at_the_probes(ask: Ask) -> None:
    server = ServerConfig(api_key="s3cret")
    for path in ("/v1/models", "/v1/completions", "/tokenize", "/live/status", "/openapi.json"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            response = ask(path, server=server, headers=headers)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
    right = {"authorization": "Bearer s3cret"}
    assert ask("/v1/models", server=server, headers=right).status_code == 200
    for path in ("/", "/health", "/version", "/load"):
        assert ask(path, server=server).status_code == 200, path


def test_every_response_carries_the_request_id(ask: Ask) -> None:
    given = {"x-request-id": "abc"}
    response = ask("/v1/completions", {"prompt": "hi", "max_tokens": 1}, headers=given)
    assert response.headers["x-request-id"] == "abc"
    assert response.json()["id"] == "cmpl-abc"
    assert ask("/nothing", headers=given).headers["x-request-id"] == "abc"
    made_up = ask("/v1/models", headers={"x-request-id": "two words"}).headers["x-request-id"]
    assert made_up not in ("", "two words")


def test_requests_that_share_a_header_run_side_by_side(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine(step_s=0.005))
    client = client_of(served, default_headers={"x-request-id": "trace"})
    with client.completions.create(
        model="embedded", prompt="hi", max_tokens=400, stream=True
    ) as one:
        assert next(iter(one)).id == "cmpl-trace"
        other = client.completions.create(model="embedded", prompt="hi", max_tokens=3)
        assert other.id.startswith("cmpl-trace-")
        with pytest.raises(openai.BadRequestError, match="in use"):
            client.completions.create(
                model="embedded", prompt="hi", extra_body={"request_id": "trace"}
            )


# The server's own routes


def test_health_fails_while_the_engine_hangs(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEALTH_TIMEOUT_S", 0.1)
    engine = FakeEngine()
    assert ask("/health", engine=engine).status_code == 200
    assert engine.submitted, "it generated something"
    hung = FakeEngine()
    hung.pause()
    response = ask("/health", engine=hung)
    assert response.status_code == 503
    assert "no token came within 0.1 s" in response.json()["error"]["message"]
    lost = FakeEngine()
    lost.fail("rank 0 died")
    assert ask("/ping", engine=lost).status_code == 503


class StartedAnew(FakeEngine):
    """Its ranks are being started again."""

    def status(self) -> EngineStatus:
        return msgspec.structs.replace(super().status(), restarting=True)


@pytest.mark.parametrize(
    ("state", "live", "ready"),
    [
        ("serves", 200, 200),
        ("hangs", 503, 200),
        ("is lost", 503, 503),
        ("drains", 200, 503),
        ("is started anew", 200, 503),
    ],
)
def test_live_fails_where_only_a_restart_helps_and_ready_where_others_should_be_asked(
    facts: Facts, monkeypatch: pytest.MonkeyPatch, state: str, live: int, ready: int
) -> None:
    monkeypatch.setattr(http, "HEALTH_TIMEOUT_S", 0.1)
    engine = StartedAnew() if state == "is started anew" else FakeEngine()
    if state in ("hangs", "is started anew"):
        engine.pause()

    async def verdicts() -> tuple[int, int]:
        llm = AsyncLLM(engine, facts, EngineConfig())
        app = http.make_app(llm, facts, EngineConfig(), ServerConfig())
        try:
            llm.start()
            if state == "is lost":
                engine.fail("rank 0 died")
                await llm.wait_lost()
            if state == "drains":
                assert await llm.drain(timeout_s=1.0)
            while state == "is started anew" and not llm.status().restarting:
                await asyncio.sleep(0.01)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                answers = [await client.get(path) for path in ("/live", "/ready")]
            return answers[0].status_code, answers[1].status_code
        finally:
            await llm.close()

    assert asyncio.run(asyncio.wait_for(verdicts(), SOON_S)) == (live, ready)


def test_the_page_may_run_its_own_script_and_nothing_else(ask: Ask) -> None:
    response = ask("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_live_status_tells_what_the_page_shows(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine(step_s=0.002), config=SPECULATING)
    client_of(served).completions.create(model="embedded", prompt="hi", max_tokens=30)

    def live() -> Any:
        return httpx.get(f"{served.url}/live/status").json()

    until(lambda: bool(live()["status"]["generation_tokens"] == 30))
    shown = live()
    assert shown["model"] == "embedded"
    assert shown["status"]["ranks"] == ["rank 0 of 1: a fake on the cpu"]
    assert shown["status"]["steps"][0]["times"]["verify_ms"] == 0.5
    assert shown["config"]["speculative_config"]["num_speculative_tokens"] == 2
    assert "api_key" not in json.dumps(shown)
    assert shown["uptime_s"] > 0


def test_metrics_version_and_load_answer(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine())
    client_of(served).completions.create(model="embedded", prompt="hi", max_tokens=5)
    text = httpx.get(f"{served.url}/metrics").text
    assert "paceline:time_to_first_token_seconds" in text
    assert httpx.get(f"{served.url}/version").json() == {"version": http.version()}
    assert httpx.get(f"{served.url}/load").json() == {"server_load": 0}


def test_the_openapi_description_has_every_body(ask: Ask) -> None:
    described = ask("/openapi.json").json()
    assert {"CompletionBody", "ChatBody", "TokenizeBody"} <= described["components"][
        "schemas"
    ].keys()
    body = described["paths"]["/v1/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("/CompletionBody")


def test_every_sampling_parameter_can_be_asked_for() -> None:
    from paceline.runtime.types import SamplingParams

    for kind in (CompletionBody, ChatBody):
        assert set(SamplingParams.__struct_fields__) <= set(kind.__struct_fields__)


# Whatever comes in, no 5xx and nothing held

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
)
json_values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
)
names = st.sampled_from(
    [*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__, "suffix", "tools", "user"]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Anybodys:
    """One server and one connection for all the bodies."""

    served: Served
    client: httpx.Client


@pytest.fixture(scope="module")
def anybodys(facts: Facts) -> Iterator[Anybodys]:
    with (
        serving(FakeEngine(), facts) as served,
        httpx.Client(base_url=served.url, timeout=SOON_S) as client,
    ):
        yield Anybodys(served=served, client=client)


bodies = st.dictionaries(names, json_values, max_size=5)


@given(chat=st.booleans(), fields=bodies, sound=st.booleans())
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_no_body_makes_the_server_fail(
    anybodys: Anybodys, chat: bool, fields: dict[str, Any], sound: bool
) -> None:
    prompt: dict[str, Any] = {"messages": CHAT} if chat else {"prompt": "hi"}
    # a sound body is one that may well be served; its prompt is not in question
    body = fields | prompt | {"max_tokens": 3, "n": 2} if sound else prompt | fields
    path = "/v1/chat/completions" if chat else "/v1/completions"
    response = anybodys.client.post(path, content=json.dumps(body))  # which may say Infinity
    assert response.status_code in (200, 400, 404), response.text
    until(lambda: anybodys.served.llm.num_in_flight == 0)


@given(raw=st.binary(max_size=40))
def test_no_bytes_make_the_decoder_fail(raw: bytes) -> None:
    with contextlib.suppress(ApiError):
        decode_body(raw, CompletionBody)


def test_a_stream_costs_one_write_per_step(facts: Facts) -> None:
    engine = FakeEngine(endless, tokens_per_step=3)

    async def main() -> list[bytes]:
        llm = AsyncLLM(engine, facts, EngineConfig())
        app = http.make_app(llm, facts, EngineConfig(), ServerConfig())
        body = json.dumps({"prompt": "hi", "max_tokens": 30, "stream": True, "n": 4}).encode()
        sent: list[bytes] = []
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:
                await asyncio.sleep(SOON_S)
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sent.append(message["body"])

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [],
            "query_string": b"",
        }
        await app(scope, receive, send)
        await llm.close()
        return sent

    sent = asyncio.run(main())
    assert sum(body.count(b"data: {") for body in sent) == 40
    assert len(sent) <= 10 + 2, "ten steps, [DONE], and the end"


# Bounds


def nested(depth: int, *, what: str) -> bytes:
    """A body in which the field is that deep, itself included."""
    opening, closing = {"list": (b"[", b"]"), "object": (b'{"a":', b"}")}[what]
    deep = opening * (depth - 1) + b"1" + closing * (depth - 1)
    return b'{"prompt": "[[[[hi", "max_tokens": 1, "user": ' + deep + b"}"


@pytest.mark.parametrize("what", ["list", "object"])
@pytest.mark.parametrize(("depth", "status"), [(100, 200), (101, 400), (5000, 400), (200_000, 400)])
def test_a_body_may_be_nested_so_deep(ask: Ask, what: str, depth: int, status: int) -> None:
    answer = ask("/v1/completions", content=nested(depth, what=what))
    assert answer.status_code == status
    assert status == 200 or "nested too deeply" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "field",
    ["guided_json", "structured_outputs", "response_format", "tools", "metadata", "logit_bias"],
)
@pytest.mark.parametrize("depth", [80, 400])
def test_deep_values_are_refused_in_every_field_and_never_an_error_of_ours(
    ask: Ask, field: str, depth: int
) -> None:
    deep: Any = {"type": "string"}
    for _ in range(depth):
        deep = {"properties": {"a": deep}}
    wrapped = {
        "structured_outputs": {"json": deep},
        "response_format": {"type": "json_schema", "json_schema": {"schema": deep}},
        "tools": [deep],
    }
    answer = ask(
        "/v1/completions", {"prompt": "hi", "max_tokens": 1, field: wrapped.get(field, deep)}
    )
    assert answer.status_code == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_deep_messages_and_template_settings_are_refused(ask: Ask, path: str) -> None:
    for field in ("messages", "chat_template_kwargs"):
        deep = b'{"messages": [], "%b": %b%b}' % (
            field.encode(),
            b'[{"a":' * 300,
            b"1" + b"}]" * 300,
        )
        assert ask(path, content=deep).status_code == 400


def test_many_brackets_that_are_not_deep_pass(ask: Ask) -> None:
    body = {"prompt": [[104, 105]] * 150, "max_tokens": 1}
    assert ask("/v1/completions", body).status_code == 200
    assert ask("/v1/completions", {"prompt": "[{" * 500, "max_tokens": 1}).status_code in (200, 400)


def test_headers_that_are_complete_and_too_large_are_refused(ask: Ask) -> None:
    answer = ask("/version", headers={"x-filler": "x" * bounds.MAX_HEAD_BYTES})
    assert answer.status_code == 431
    assert ask("/version", headers={"x-filler": "x" * 60_000}).status_code == 200


def converse(served: Served, *parts: bytes) -> bytes:
    """All that is answered to these bytes, until the server closes the connection."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SOON_S) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while received := connection.recv(1 << 16):
                answer += received
        return answer


def test_a_head_without_end_is_not_kept(serve: Callable[..., Served]) -> None:
    served = serve(FakeEngine())
    endless_header = b"GET /version HTTP/1.1\r\nx: " + b"x" * (2 * bounds.MAX_HEAD_BYTES)
    assert converse(served, endless_header, *[b"x" * 65536] * 16).startswith(b"HTTP/1.1 431 ")
    endless_path = b"GET /" + b"x" * (2 * bounds.MAX_HEAD_BYTES)
    assert converse(served, endless_path, *[b"x" * 65536] * 16).startswith(b"HTTP/1.1 431 ")


def test_a_head_that_does_not_come_in_time_is_not_waited_for(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "HEAD_TIMEOUT_S", 0.1)
    served = serve(FakeEngine())
    whole = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    assert converse(served, b"GET /vers").startswith(b"HTTP/1.1 408 ")
    assert converse(served).startswith(b"HTTP/1.1 408 ")
    answers = converse(served, whole, b"GET /version HTTP/1.1\r\nx:")
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in answers


def test_a_body_that_does_not_come_in_time_is_not_waited_for(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "BODY_TIMEOUT_S", 0.1)
    served = serve(FakeEngine())
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 500\r\n\r\n"
    assert converse(served, head, b'{"prompt"').startswith(b"HTTP/1.1 408 ")


def test_a_long_answer_outlives_the_time_for_a_head(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "HEAD_TIMEOUT_S", 0.1)
    served = serve(FakeEngine(step_s=0.02))
    body = {"prompt": "hi", "max_tokens": 60}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=SOON_S)
    assert answer.json()["usage"]["completion_tokens"] == 60

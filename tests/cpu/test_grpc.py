"""The gRPC door, asked by a real client over a real socket, with a fake engine behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.doors import TIMEOUT_S, Doors, eventually
from tests.engines import REPLY, FakeEngine, ids_of, saying

from paceline.actors.frontends import grpc as door
from paceline.proto import inference_pb2 as pb
from paceline.runtime.client.errors import PUSHBACK
from paceline.runtime.client.grpc import GrpcApi
from paceline.runtime.config import EngineConfig, ServerConfig
from paceline.runtime.errors import (
    ConfigError,
    DeadlineError,
    OverloadedError,
    PromptError,
    ShardError,
)
from paceline.runtime.types import SamplingParams, StructuredOutputs

ENGINE = "paceline.v1.Engine"
VLLM = "vllm.grpc.engine.VllmEngine"
Code = grpc.StatusCode


class Served(Doors):
    """A server and a channel to it."""

    def __init__(self, folder: Path, engine: FakeEngine, config: EngineConfig, key: str | None):
        super().__init__(folder, engine, config, key=key, http=False)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc.port}")

    def stop(self) -> None:
        self.channel.close()
        super().stop()

    def send(self, method: str, body: Message | bytes, **how: Any) -> bytes:
        raw = body if isinstance(body, bytes) else body.SerializeToString()
        reply: bytes = self.channel.unary_unary(method)(raw, **({"timeout": TIMEOUT_S} | how))
        return reply

    def call(self, body: Message | bytes, *, service: str = ENGINE, **how: Any) -> Any:
        """A Generate whose messages are not read yet."""
        raw = body if isinstance(body, bytes) else body.SerializeToString()
        return self.channel.unary_stream(f"/{service}/Generate")(
            raw, **({"timeout": TIMEOUT_S} | how)
        )

    def generate(self, body: Message | bytes, **how: Any) -> list[pb.GenerateResponse]:
        return [pb.GenerateResponse.FromString(raw) for raw in self.call(body, **how)]


def ask(text: str = "hi", *, stream: bool = False, **params: Any) -> pb.GenerateRequest:
    own = ("request_id", "priority", "cache_salt", "num_draft_tokens")
    fields = {name: params.pop(name) for name in own if name in params}
    return pb.GenerateRequest(
        text=text, stream=stream, sampling_params=pb.SamplingParams(**params), **fields
    )


@contextlib.contextmanager
def refused(code: grpc.StatusCode, match: str = "") -> Iterator[pytest.ExceptionInfo[Any]]:
    with pytest.raises(grpc.RpcError) as caught:
        yield caught
    assert caught.value.code() is code, caught.value.details()
    assert match in caught.value.details()


Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    """`serve(engine, key=None, **config)`: a door that is closed after the test."""
    made: list[Served] = []

    def start(engine: FakeEngine | None = None, *, key: str | None = None, **config: Any) -> Served:
        made.append(Served(folder, engine or FakeEngine(), EngineConfig(**config), key))
        return made[-1]

    yield start
    for served in made:
        served.stop()


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Served]:
    """One door for all tests that leave nothing behind."""
    served = Served(folder, FakeEngine(tokens_per_step=32), EngineConfig(), None)
    yield served
    served.stop()


# Texts


def test_a_text_comes_whole_when_it_is_not_streamed(shared: Served) -> None:
    (reply,) = shared.generate(ask(max_tokens=7))
    assert reply.complete.text == REPLY[:7]
    assert list(reply.complete.output_ids) == ids_of(REPLY[:7])
    assert reply.complete.finish_reason == "length"
    assert (reply.complete.prompt_tokens, reply.complete.completion_tokens) == (2, 7)


def test_chunks_of_a_stream_add_up_to_its_complete(serve: Serve) -> None:
    replies = serve(FakeEngine(tokens_per_step=3)).generate(ask(stream=True, max_tokens=40))
    chunks = [reply.chunk for reply in replies if reply.HasField("chunk")]
    (complete,) = (reply.complete for reply in replies if reply.HasField("complete"))
    assert len(chunks) == 14
    assert "".join(chunk.text for chunk in chunks) == complete.text == (REPLY * 2)[:40]
    assert [i for chunk in chunks for i in chunk.token_ids] == list(complete.output_ids)
    assert [chunk.completion_tokens for chunk in chunks] == [*range(3, 40, 3), 40]
    assert [chunk.accepted_tokens for chunk in chunks] == [2] * 13 + [0]
    assert complete.accepted_tokens == complete.spec_accepted_tokens == 26
    assert complete.spec_draft_tokens == 28
    assert complete.metrics.rounds == 14
    assert list(complete.metrics.accepted_at) == [1, 0, 13]
    assert complete.metrics.decode_s > 0


def test_every_one_of_n_texts_has_its_own_complete(shared: Served) -> None:
    replies = shared.generate(ask(stream=True, max_tokens=50, n=3))
    texts = {0: "", 1: "", 2: ""}
    for reply in replies:
        texts[reply.chunk.index] += reply.chunk.text
    completes = [reply.complete for reply in replies if reply.HasField("complete")]
    assert sorted(complete.index for complete in completes) == [0, 1, 2]
    assert {c.index: c.text for c in completes} == texts
    assert set(texts.values()) == {(REPLY * 2)[:50]}


def test_token_ids_are_a_prompt_too(shared: Served) -> None:
    request = ask(max_tokens=1)
    request.tokenized.input_ids.extend([5, 6, 7])
    shared.generate(request)
    assert shared.engine.submitted[-1].prompt_token_ids == (5, 6, 7)


def test_a_stop_string_ends_the_text_and_is_named(serve: Serve) -> None:
    served = serve(FakeEngine())
    (reply,) = served.generate(ask(max_tokens=100, stop=["brown"]))
    assert reply.complete.text == "the quick "
    assert reply.complete.finish_reason == "stop"
    assert reply.complete.matched_stop_str == "brown"
    assert served.settles()


def test_a_stop_token_is_named(shared: Served) -> None:
    (reply,) = shared.generate(ask(max_tokens=100, stop_token_ids=[ord("q")]))
    assert reply.complete.matched_token_id == ord("q")
    assert reply.complete.text == "the "


def test_log_probabilities_come_with_their_tokens(serve: Serve) -> None:
    replies = serve(FakeEngine(saying("ab"))).generate(
        ask("xyz", stream=True, logprobs=2, prompt_logprobs=1, max_tokens=2)
    )
    chunk = replies[0].chunk
    assert list(chunk.output_logprobs.token_ids) == ids_of("ab")
    assert list(chunk.output_logprobs.token_logprobs) == [-0.5, -0.5]
    assert [list(top.token_ids) for top in chunk.output_logprobs.top_logprobs] == [
        [97, 98],
        [98, 99],
    ]
    told = chunk.input_logprobs
    assert list(told.token_ids) == ids_of("xyz")
    assert [entry.HasField("value") for entry in told.token_logprobs] == [False, True, True]
    assert [list(top.token_ids) for top in told.top_logprobs] == [[], [121], [122]]
    complete = replies[-1].complete
    assert not complete.HasField("output_logprobs"), "the chunks had them"


def test_a_text_that_is_not_streamed_brings_its_log_probabilities_itself(shared: Served) -> None:
    (reply,) = shared.generate(ask("xyz", logprobs=0, prompt_logprobs=0, max_tokens=3))
    assert list(reply.complete.output_logprobs.token_ids) == ids_of("the")
    assert [list(t.token_ids) for t in reply.complete.output_logprobs.top_logprobs] == [[], [], []]
    assert list(reply.complete.input_logprobs.token_ids) == ids_of("xyz")


def test_a_lossy_policy_is_named_in_the_answer(shared: Served) -> None:
    (lossy,) = shared.generate(ask(max_tokens=1, kv_policy="sink_window"))
    (exact,) = shared.generate(ask(max_tokens=1))
    assert (lossy.complete.kv_policy, exact.complete.kv_policy) == ("sink_window", "")


# Parameters


def test_absent_parameters_have_their_defaults() -> None:
    expected = SamplingParams(max_tokens=None)
    assert door.sampling_params(pb.SamplingParams()) == expected


@pytest.mark.parametrize("value", [0.7, 0.95, 0.000986, 1e-5, -1.99999, 100.0, 0.0])
def test_a_number_arrives_as_it_was_written(value: float) -> None:
    single = pb.SamplingParams.FromString(pb.SamplingParams(temperature=value).SerializeToString())
    assert door.sampling_params(single).temperature == value


@given(st.floats(width=32))
def test_a_number_of_many_digits_arrives_as_near_as_single_precision_has_it(value: float) -> None:
    found = door.sampling_params(pb.SamplingParams(temperature=value)).temperature
    again = pb.SamplingParams(temperature=found).temperature
    assert again == value or math.isnan(value)


short = st.text(st.characters(codec="utf-8"), max_size=8)
decimals = st.integers(0, 10**6).map(lambda i: i / 10**6)
valid_params = st.builds(
    SamplingParams,
    n=st.integers(1, 128),
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    min_tokens=st.integers(0, 2**31 - 1),
    temperature=decimals | st.integers(0, 100).map(float),
    top_k=st.integers(0, 2**31 - 1),
    top_p=decimals,
    min_p=decimals,
    repetition_penalty=decimals,
    presence_penalty=decimals.map(lambda x: 4 * round(x, 5) - 2).map(lambda x: round(x, 5)),
    frequency_penalty=decimals,
    logit_bias=st.none() | st.dictionaries(st.integers(0, 2**31 - 1), decimals, min_size=1),
    stop=st.lists(short, max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3).map(tuple),
    include_stop_str_in_output=st.booleans(),
    ignore_eos=st.booleans(),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    skip_special_tokens=st.booleans(),
    structured_outputs=st.none()
    | st.builds(StructuredOutputs, json=short)
    | st.builds(StructuredOutputs, json_object=st.just(True))
    | st.builds(StructuredOutputs, regex=short.filter(bool))
    | st.builds(StructuredOutputs, grammar=short.filter(bool))
    | st.builds(StructuredOutputs, choice=st.lists(short, min_size=1).map(tuple)),
    kv_policy=st.sampled_from(["full", "sink_window"]),
)


@given(valid_params)
def test_parameters_cross_the_wire_unchanged(params: SamplingParams) -> None:
    sent = GrpcApi()._params(params).SerializeToString()
    assert door.sampling_params(pb.SamplingParams.FromString(sent)) == params


def test_every_parameter_has_a_field() -> None:
    shapes = {"structured_outputs"}  # a oneof
    fields = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert set(SamplingParams.__struct_fields__) - shapes <= fields
    constraints = {f.name for f in pb.SamplingParams.DESCRIPTOR.oneofs_by_name["constraint"].fields}
    ours = {
        name.replace("json", "json_schema") if name == "json" else name
        for name in StructuredOutputs.__struct_fields__
    }
    assert ours <= constraints


def test_what_is_not_in_the_parameters_reaches_the_engine_as_well(shared: Served) -> None:
    shared.generate(
        ask(max_tokens=1, request_id="mine", priority=-3, cache_salt="s", num_draft_tokens=0)
    )
    request = shared.engine.submitted[-1]
    assert (request.priority, request.cache_salt, request.num_draft_tokens) == (-3, "s", 0)
    assert request.request_id == "mine-0"


def test_draft_tokens_are_the_engines_choice_unless_given(shared: Served) -> None:
    shared.generate(ask(max_tokens=1))
    assert shared.engine.submitted[-1].num_draft_tokens is None


# Refusals


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (ask(top_p=3), "top_p"),
        (ask(temperature=math.nan), "temperature"),
        (ask(n=2**32 - 1), "n must"),
        (ask(max_tokens=2**32 - 1), "max_tokens"),
        (ask(""), "empty"),
        (ask("x" * 600), "600 tokens"),
        (ask(kv_policy="best"), "kv_policy"),
        (ask(structural_tag="x"), "structural_tag is not supported"),
        (ask(truncate_prompt_tokens=5), "truncate_prompt_tokens is not supported"),
        (ask(priority=-(2**31)), "priority"),
        (ask(num_draft_tokens=65), "num_draft_tokens"),
        (pb.GenerateRequest(), "no input"),
        (pb.GenerateRequest(text="x", mm_inputs=b""), "mm_inputs is not supported"),
        (pb.GenerateRequest(text="x", extra_mm_inputs=[b""]), "extra_mm_inputs"),
        (pb.GenerateRequest(text="x", kv_transfer_params_json="{}"), "KV transfer"),
        (pb.GenerateRequest(text="x", data_parallel_rank=1), "data_parallel_rank"),
        (pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[1, 999])), "token id 999"),
        (pb.GenerateRequest(tokenized=pb.TokenizedInput()), "empty"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    shared: Served, request_: pb.GenerateRequest, match: str
) -> None:
    with refused(Code.INVALID_ARGUMENT, match):
        shared.generate(request_)


def test_an_id_in_use_is_refused(serve: Serve) -> None:
    served = serve(FakeEngine(step_s=0.01))
    running = served.call(ask(request_id="a", stream=True, max_tokens=400))
    next(running)
    with refused(Code.INVALID_ARGUMENT, "'a' is in use"):
        served.generate(ask(request_id="a"))
    running.cancel()


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    served = serve(FakeEngine(step_s=0.01), max_num_seqs=1, max_queued_requests=0)
    running = served.call(ask(stream=True, max_tokens=400))
    next(running)
    with refused(Code.RESOURCE_EXHAUSTED, "try again later") as caught:
        served.generate(ask())
    assert int(dict(caught.value.trailing_metadata())[PUSHBACK]) >= 1000
    running.cancel()


def test_a_message_above_the_limit_is_refused_without_a_time_to_come_back(shared: Served) -> None:
    with refused(Code.RESOURCE_EXHAUSTED) as caught:
        shared.generate(b"\0" * (door.MAX_MESSAGE_BYTES + 1))
    assert PUSHBACK not in dict(caught.value.trailing_metadata() or ())


@pytest.mark.parametrize(
    ("error", "code", "pushback"),
    [
        (PromptError("x"), Code.INVALID_ARGUMENT, None),
        (ConfigError("x"), Code.INVALID_ARGUMENT, None),
        (OverloadedError("x", retry_after_s=1.25), Code.RESOURCE_EXHAUSTED, "1250"),
        (ShardError("x"), Code.UNAVAILABLE, "1000"),
        (DeadlineError("x"), Code.UNAVAILABLE, "1000"),
        (door.Refusal(Code.NOT_FOUND, "x"), Code.NOT_FOUND, None),
    ],
)
def test_every_error_has_one_status(
    error: Exception, code: grpc.StatusCode, pushback: str | None
) -> None:
    found, message, metadata = door.status_of(error)
    assert (found, message) == (code, "x")
    assert dict(metadata).get(PUSHBACK) == pushback


def test_a_mistake_of_ours_is_logged_and_its_text_kept_from_the_caller(
    caplog: pytest.LogCaptureFixture,
) -> None:
    code, message, _ = door.status_of(KeyError("secret"))
    assert code is Code.INTERNAL
    assert "secret" not in message
    assert "secret" in caplog.text


def test_a_field_nobody_knows_is_ignored_with_one_line_in_the_log(
    shared: Served, caplog: pytest.LogCaptureFixture
) -> None:
    unknown = ask(max_tokens=1).SerializeToString() + b"\xb8\x3e\x01"  # field 999
    with caplog.at_level(logging.WARNING, logger=door.__name__):
        shared.generate(unknown)
        shared.generate(unknown)
    assert caplog.text.count("field 999 is unknown") == 1


# Ends


def test_a_cancelled_call_frees_its_blocks(serve: Serve) -> None:
    served = serve(FakeEngine(step_s=0.005))
    call = served.call(ask(request_id="gone", stream=True, max_tokens=400))
    next(call)
    call.cancel()
    assert served.settles()
    assert served.engine.aborted == ["gone-0"]


def test_a_call_that_waits_for_its_whole_text_can_be_cancelled(serve: Serve) -> None:
    served = serve(FakeEngine(step_s=0.005))
    call = served.call(ask(request_id="gone", max_tokens=400))
    assert eventually(lambda: bool(served.engine.submitted))
    call.cancel()
    assert served.settles()
    assert served.engine.aborted == ["gone-0"]


def test_a_call_past_its_deadline_frees_its_blocks(serve: Serve) -> None:
    served = serve(FakeEngine(step_s=0.02))
    with refused(Code.DEADLINE_EXCEEDED):
        served.generate(ask(max_tokens=500), timeout=0.2)
    assert served.settles()
    assert served.engine.aborted


def test_a_connection_that_is_closed_frees_its_blocks(serve: Serve) -> None:
    served = serve(FakeEngine(step_s=0.005))
    channel = grpc.insecure_channel(f"127.0.0.1:{served.grpc.port}")
    call = channel.unary_stream(f"/{ENGINE}/Generate")(
        ask(stream=True, max_tokens=400).SerializeToString(), timeout=TIMEOUT_S
    )
    next(call)
    channel.close()
    assert served.settles()
    assert served.engine.aborted


def test_an_aborted_request_ends_with_what_there_is(serve: Serve) -> None:
    served = serve(FakeEngine(step_s=0.005))
    call = served.call(ask(request_id="a", stream=True, max_tokens=500))
    next(call)
    served.send(f"/{ENGINE}/Abort", pb.AbortRequest(request_ids=["a"]))
    last = [pb.GenerateResponse.FromString(raw) for raw in call][-1]
    assert last.complete.finish_reason == "abort"
    assert 0 < len(last.complete.output_ids) < 500
    assert served.settles()


def test_aborting_what_is_not_running_names_it_and_ends_the_rest(serve: Serve) -> None:
    served = serve(FakeEngine(step_s=0.005))
    call = served.call(ask(request_id="a", stream=True, max_tokens=500))
    next(call)
    with refused(Code.NOT_FOUND, "no such request is running: b, c"):
        served.send(f"/{ENGINE}/Abort", pb.AbortRequest(request_ids=["b", "a", "c"]))
    assert served.settles()
    call.cancel()


def test_a_lost_engine_ends_running_calls_and_refuses_new_ones(serve: Serve) -> None:
    served = serve(FakeEngine(step_s=0.005))
    call = served.call(ask(stream=True, max_tokens=500))
    next(call)
    served.engine.fail("rank 0 died")
    with refused(Code.UNAVAILABLE, "rank 0 died"):
        list(call)
    with refused(Code.UNAVAILABLE, "rank 0 died"):
        served.generate(ask())


def test_a_stopped_server_gives_calls_their_time_and_then_ends_them(serve: Serve) -> None:
    served = serve(FakeEngine(tokens_per_step=1, step_s=0.01))
    short, long = served.call(ask(max_tokens=10)), served.call(ask(max_tokens=500))
    assert eventually(lambda: len(served.engine.submitted) == 2)
    served.do(served.grpc.stop(1.0))
    assert len(list(short)) == 1
    with pytest.raises(grpc.RpcError):
        list(long)
    assert served.settles()


def test_a_port_in_use_is_said_in_one_line(serve: Serve) -> None:
    served = serve()
    settings_ = ServerConfig(grpc_port=served.grpc.port)
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:\d+"):
        served.do(door.start(served.llm, served.llm.facts, EngineConfig(), settings_))


# Malformed


METHODS = ("Generate", "Abort", "HealthCheck", "GetModelInfo", "GetServerInfo", "GetLoads")
EXPECTED = {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.RESOURCE_EXHAUSTED}


def code_of(served: Served, path: str, body: bytes) -> grpc.StatusCode:
    call = served.channel.unary_stream(path)(body, timeout=TIMEOUT_S)
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return Code.OK


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_message_are_refused(shared: Served, method: str) -> None:
    with refused(Code.INVALID_ARGUMENT, "these 2 bytes are no paceline.v1."):
        shared.send(f"/{ENGINE}/{method}", b"\x0a\xff")


def test_text_that_is_no_utf8_is_refused(shared: Served) -> None:
    with refused(Code.INVALID_ARGUMENT):
        shared.generate(b"\x1a\x01\xff")


numbers = st.integers(0, 2**32 - 1) | st.integers(0, 300)
signed = st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 30)
floats = st.floats(width=32) | st.sampled_from([0.0, 0.5, 1.0, 2.0])
texts = st.text(st.characters(codec="utf-8"), max_size=30)
WILD_PARAMS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": numbers,
    "temperature": floats,
    "top_p": floats,
    "top_k": numbers,
    "min_p": floats,
    "frequency_penalty": floats,
    "presence_penalty": floats,
    "repetition_penalty": floats,
    "min_tokens": numbers,
    "stop": st.lists(texts, max_size=20),
    "stop_token_ids": st.lists(numbers, max_size=5),
    "skip_special_tokens": st.booleans(),
    "ignore_eos": st.booleans(),
    "n": numbers | st.integers(0, 4),
    "logprobs": signed,
    "prompt_logprobs": signed,
    "seed": st.integers(-(2**63), 2**63 - 1),
    "include_stop_str_in_output": st.booleans(),
    "logit_bias": st.dictionaries(signed, floats, max_size=4),
    "truncate_prompt_tokens": signed,
    "kv_policy": st.sampled_from(["full", "sink_window", "none", ""]),
    "json_schema": texts | st.just('{"type": "object"}'),
    "regex": texts | st.just("a+"),
    "grammar": texts,
    "structural_tag": texts,
    "json_object": st.booleans(),
    "choice": st.lists(texts).map(lambda choices: pb.ChoiceConstraint(choices=choices)),
}
WILD_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "text": texts | st.integers(0, 2000).map(lambda n: "x" * n),
    "tokenized": st.lists(numbers).map(lambda ids: pb.TokenizedInput(input_ids=ids)),
    "stream": st.booleans(),
    "request_id": texts | st.integers(0, 400).map(lambda n: "r" * n),
    "priority": signed,
    "cache_salt": texts | st.integers(0, 2000).map(lambda n: "s" * n),
    "num_draft_tokens": numbers,
    "data_parallel_rank": signed,
    "mm_inputs": st.binary(max_size=3),
}


@st.composite
def wild_requests(draw: st.DrawFn) -> bytes:
    """A request that could be served, of which a few fields are not what they were: were all of
    them wild, the first check would catch every one."""
    names = st.lists(st.sampled_from([*WILD_PARAMS, *WILD_FIELDS]), max_size=4, unique=True)
    fields: dict[str, Any] = {"text": "hi"}
    params: dict[str, Any] = {"max_tokens": draw(st.integers(1, 20))}
    for name in draw(names):
        if name in WILD_PARAMS:
            params[name] = draw(WILD_PARAMS[name])
        else:
            if name == "tokenized":
                fields.pop("text", None)
            fields[name] = draw(WILD_FIELDS[name])
    request = pb.GenerateRequest(**fields, sampling_params=pb.SamplingParams(**params))
    return bytes(request.SerializeToString())


@st.composite
def damaged_requests(draw: st.DrawFn) -> bytes:
    body = bytearray(draw(wild_requests()))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(body) - 1)))
        body[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(body)


FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(body=wild_requests() | damaged_requests() | st.binary(max_size=64))
def test_no_request_whatever_is_in_it_breaks_the_server(shared: Served, body: bytes) -> None:
    assert code_of(shared, f"/{ENGINE}/Generate", body) in EXPECTED
    assert shared.settles()
    assert shared.llm.lost is None


@settings(FUZZ, max_examples=100)
@given(method=st.sampled_from(METHODS[1:]), body=st.binary(max_size=32))
def test_no_other_call_breaks_the_server_either(shared: Served, method: str, body: bytes) -> None:
    assert code_of(shared, f"/{ENGINE}/{method}", body) in EXPECTED


# Management


def test_the_model_is_described(shared: Served) -> None:
    info = pb.GetModelInfoResponse.FromString(shared.send(f"/{ENGINE}/GetModelInfo", b""))
    assert (info.model_path, info.served_model_name) == ("embedded", "embedded")
    assert (info.vocab_size, info.max_context_length, info.max_req_input_len) == (257, 512, 511)
    assert list(info.eos_token_ids) == [256]
    assert info.is_generation


def test_the_server_describes_itself(serve: Serve) -> None:
    served = serve(FakeEngine(step_s=0.005), max_num_seqs=7)
    call = served.call(ask(stream=True, max_tokens=400))
    next(call)
    assert eventually(lambda: bool(served.llm.status().ranks))
    info = pb.GetServerInfoResponse.FromString(served.send(f"/{ENGINE}/GetServerInfo", b""))
    assert info.active_requests == 1
    assert info.server_type == "paceline"
    assert list(info.ranks) == ["rank 0 of 1: a fake on the cpu"]
    assert msgspec.json.decode(info.config_json)["max_num_seqs"] == 7
    assert abs(info.last_receive_timestamp - time.time()) < 60
    call.cancel()


def test_loads_count_requests_blocks_and_tokens(serve: Serve) -> None:
    served = serve(FakeEngine(step_s=0.02, num_seqs=1), max_num_seqs=4)
    calls = [served.call(ask("x" * 40, stream=True, max_tokens=400)) for _ in range(2)]
    assert eventually(lambda: served.llm.status().num_waiting == 1)
    answer = pb.GetLoadsResponse.FromString(served.send(f"/{ENGINE}/GetLoads", b""))
    (load,) = answer.loads
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (1, 1, 2)
    assert (load.utilization, load.max_running_requests) == (0.25, 4)
    assert load.num_used_tokens >= 48
    assert load.token_usage == pytest.approx(load.num_used_tokens / load.max_total_num_tokens)
    assert load.generated > 0
    assert load.gen_throughput > 0
    with refused(Code.NOT_FOUND, "dp_rank 1"):
        served.send(f"/{ENGINE}/GetLoads", pb.GetLoadsRequest(dp_rank=1))
    for call in calls:
        call.cancel()


# Health and reflection


def check(served: Served, service: str = "") -> int:
    raw = served.send(
        "/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service=service)
    )
    return int(health_pb2.HealthCheckResponse.FromString(raw).status)


@pytest.mark.parametrize("service", ["", ENGINE, VLLM])
def test_health_is_asked_of_the_engine(shared: Served, service: str) -> None:
    assert check(shared, service) == health_pb2.HealthCheckResponse.SERVING


def test_the_health_of_an_unknown_service_is_not_found(shared: Served) -> None:
    with refused(Code.NOT_FOUND, "no service 'other'"):
        check(shared, "other")


def test_an_engine_that_hangs_is_not_well(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HEALTH_TIMEOUT_S", 0.1)
    served = serve()
    served.engine.pause()
    assert check(served) == health_pb2.HealthCheckResponse.NOT_SERVING
    health = pb.HealthCheckResponse.FromString(served.send(f"/{ENGINE}/HealthCheck", b""))
    assert not health.healthy
    assert health.message == "no token within 0.1 s"


def test_a_lost_engine_is_not_well_and_says_why(serve: Serve) -> None:
    served = serve()
    served.engine.fail("rank 1 died")
    assert eventually(lambda: served.llm.lost is not None)
    health = pb.HealthCheckResponse.FromString(served.send(f"/{ENGINE}/HealthCheck", b""))
    assert (health.healthy, health.message) == (False, "rank 1 died")


def test_a_server_that_is_shutting_down_is_no_longer_well_and_takes_nothing(serve: Serve) -> None:
    served = serve()
    assert served.do(served.llm.drain(timeout_s=1.0))
    assert check(served) == health_pb2.HealthCheckResponse.NOT_SERVING
    with refused(Code.UNAVAILABLE, "shutting down") as caught:
        served.generate(ask())
    assert dict(caught.value.trailing_metadata())[PUSHBACK] == "1000"


def test_a_watcher_is_told_of_changes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "WATCH_PERIOD_S", 0.0)
    found = [True, True, False, False, True]

    class Patient:
        draining = False

        async def check_health(self, *, timeout_s: float) -> bool:
            return found.pop(0)

    async def watch() -> list[int]:
        told = []
        replies = door.HealthService(Patient()).Watch(health_pb2.HealthCheckRequest())  # type: ignore[arg-type]
        async for reply in replies:
            told.append(reply.status)
            if not found:
                return told
        return told

    answer = health_pb2.HealthCheckResponse
    assert asyncio.run(watch()) == [answer.SERVING, answer.NOT_SERVING, answer.SERVING]


def test_a_watcher_hears_of_a_lost_engine(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "WATCH_PERIOD_S", 0.01)
    served = serve()
    call = served.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=TIMEOUT_S)
    answer = health_pb2.HealthCheckResponse
    assert answer.FromString(next(call)).status == answer.SERVING
    served.engine.fail()
    assert any(answer.FromString(raw).status == answer.NOT_SERVING for raw in call)
    call.cancel()


def test_reflection_shows_the_services_and_their_messages(shared: Served) -> None:
    database = ProtoReflectionDescriptorDatabase(shared.channel)
    services = set(database.get_services())
    assert {ENGINE, VLLM, "grpc.health.v1.Health"} <= services
    pool = descriptor_pool.DescriptorPool(database)
    generate = pool.FindServiceByName(VLLM).FindMethodByName("Generate")
    assert generate.input_type.full_name == "paceline.v1.GenerateRequest"


# Keys


def test_a_key_is_asked_for_where_there_is_one(serve: Serve) -> None:
    served = serve(key="s3cret")
    for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "s3cret"),)):
        with refused(Code.UNAUTHENTICATED, "API key"):
            served.generate(ask(), metadata=metadata)
        with refused(Code.UNAUTHENTICATED, "API key"):
            served.send(f"/{ENGINE}/GetServerInfo", b"", metadata=metadata)
    assert not served.engine.submitted
    assert served.generate(ask(max_tokens=1), metadata=(("authorization", "Bearer s3cret"),))


def test_probes_need_no_key(serve: Serve) -> None:
    served = serve(key="s3cret")
    assert check(served) == health_pb2.HealthCheckResponse.SERVING
    assert served.send(f"/{ENGINE}/HealthCheck", b"")


def test_reflection_needs_the_key(serve: Serve) -> None:
    served = serve(key="s3cret")
    database = ProtoReflectionDescriptorDatabase(served.channel)
    with refused(Code.UNAUTHENTICATED):
        database.get_services()


def test_metadata_that_is_too_large_is_refused(shared: Served) -> None:
    filler = (("x-filler", "x" * (2 * door.MAX_METADATA_BYTES)),)
    with refused(Code.RESOURCE_EXHAUSTED):
        shared.generate(ask(), metadata=filler)


# vLLM's name

VLLM_FIELDS = {
    "SamplingParams": {
        "temperature": (1, "FLOAT"),
        "top_p": (2, "FLOAT"),
        "top_k": (3, "UINT32"),
        "max_tokens": (8, "UINT32"),
        "stop": (10, "STRING*"),
        "skip_special_tokens": (12, "BOOL"),
        "n": (15, "UINT32"),
        "seed": (24, "INT32"),
    },
    "TokenizedInput": {"original_text": (1, "STRING"), "input_ids": (2, "UINT32*")},
    "GenerateRequest": {
        "request_id": (1, "STRING"),
        "tokenized": (2, "TokenizedInput"),
        "sampling_params": (4, "SamplingParams"),
        "stream": (5, "BOOL"),
    },
    "GenerateStreamChunk": {
        "token_ids": (1, "UINT32*"),
        "prompt_tokens": (2, "UINT32"),
        "completion_tokens": (3, "UINT32"),
        "cached_tokens": (4, "UINT32"),
        "index": (7, "UINT32"),
    },
    "GenerateComplete": {
        "output_ids": (1, "UINT32*"),
        "finish_reason": (2, "STRING"),
        "prompt_tokens": (3, "UINT32"),
        "completion_tokens": (4, "UINT32"),
        "index": (8, "UINT32"),
        "matched_token_id": (10, "UINT32"),
        "matched_stop_str": (11, "STRING"),
        "spec_accepted_tokens": (13, "UINT32"),
        "spec_draft_tokens": (14, "UINT32"),
    },
    "GenerateResponse": {
        "chunk": (1, "GenerateStreamChunk"),
        "complete": (2, "GenerateComplete"),
    },
}
"""What a gateway knows of the messages that matter most: numbers and types, in vLLM's package."""


def peer_messages() -> dict[str, type[Message]]:
    """The messages as a gateway would have them generated."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="peer.proto", package="peer", syntax="proto3")
    for message_name, fields in VLLM_FIELDS.items():
        message = file.message_type.add(name=message_name)
        for name, (number, kind) in fields.items():
            field = message.field.add(name=name, number=number)
            field.label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            if kind in VLLM_FIELDS:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".peer.{kind}"
            else:
                field.type = kinds.Type.Value(f"TYPE_{kind.rstrip('*')}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"peer.{name}"))
        for name in VLLM_FIELDS
    }


def test_a_gateway_that_speaks_to_vllm_is_served_under_that_name(shared: Served) -> None:
    peer: dict[str, Any] = dict(peer_messages())
    request = peer["GenerateRequest"](
        request_id="gateway",
        tokenized=peer["TokenizedInput"](original_text="hi", input_ids=ids_of("hi")),
        sampling_params=peer["SamplingParams"](
            temperature=0.7, top_p=0.9, max_tokens=40, stop=["jumps"], n=1, seed=-5
        ),
        stream=True,
    )
    raw = list(shared.call(request.SerializeToString(), service=VLLM))
    answers = [peer["GenerateResponse"].FromString(message) for message in raw]
    ids = [i for answer in answers for i in answer.chunk.token_ids]
    assert bytes(ids).decode() == "the quick brown fox jumps"
    assert list(answers[-1].complete.output_ids) == ids
    assert answers[-1].complete.finish_reason == "stop"
    assert answers[-1].complete.matched_stop_str == "jumps"
    assert answers[-1].complete.spec_draft_tokens > 0
    sent = shared.engine.submitted[-1].params
    assert (sent.temperature, sent.top_p, sent.max_tokens, sent.seed) == (0.7, 0.9, 40, -5)
    assert sent.skip_special_tokens


def test_calls_that_are_not_served_say_so(shared: Served) -> None:
    with refused(Code.UNIMPLEMENTED):
        shared.send(f"/{VLLM}/Embed", b"")

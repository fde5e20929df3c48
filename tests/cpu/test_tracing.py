"""One trace per request, with the caller's id, that a real collector can read; and a collector that
is not there costs nobody anything."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.engines import FakeEngine, fake_facts, saying, serving

from paceline.runtime.async_llm import RequestRecord
from paceline.runtime.caller import Caller
from paceline.runtime.config import ServerConfig
from paceline.runtime.errors import ConfigError
from paceline.runtime.tracing import OtlpTarget, RequestTracer, open_tracer, otlp_target
from paceline.runtime.types import (
    Event,
    FinishReason,
    Hop,
    Request,
    RequestMetrics,
    SamplingParams,
    StageTimes,
)

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
SOON_S = 10.0
BODY = {"prompt": "a secret prompt", "max_tokens": 24, "temperature": 0.5, "seed": 3}


class Memory(NamedTuple):
    tracer: RequestTracer
    exporter: InMemorySpanExporter

    def spans(self) -> list[ReadableSpan]:
        """The root, then its children in their order."""
        found = list(self.exporter.get_finished_spans())
        return sorted(found, key=lambda span: (span.name != "llm_request", span.start_time))


@pytest.fixture
def memory() -> Memory:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Memory(RequestTracer(provider, model="m"), exporter)


def write(
    tracer: RequestTracer,
    *,
    num_texts: int = 1,
    caller: Caller | None = None,
    reason: FinishReason = "stop",
    **more: Any,
) -> None:
    """A request's life, as a tracer is told of it."""
    now_s = time.monotonic()
    params = SamplingParams(n=num_texts, temperature=0.5, seed=3, max_tokens=9)
    caller = caller or Caller()
    records = [
        RequestRecord(
            request_id=f"cmpl-a-{index}", num_prompt_tokens=7, arrived_s=now_s - 1, caller=caller
        )
        for index in range(num_texts)
    ]
    for record in records:
        request = Request(
            request_id=record.request_id,
            prompt_token_ids=(1,) * 7,
            params=params,
            seed=3,
            max_tokens=9,
            session_id="s",
        )
        tracer.on_admitted(record, request)
    for record in records:
        record.first_token_s, record.finished_s, record.num_tokens = now_s - 0.5, now_s, 5
        record.finish_reason = reason
        for name, value in more.items():
            setattr(record, name, value)
        tracer.on_finished(record)


def account(*events: tuple[Event, float]) -> RequestMetrics:
    return RequestMetrics(
        num_prompt_tokens=7,
        num_tokens=5,
        num_cached_tokens=2,
        rounds=3,
        drafted=4,
        accepted=2,
        accepted_at=(),
        times=StageTimes(),
        events=events,
    )


WHOLE = account(
    (Event.QUEUED, 1.0),
    (Event.SCHEDULED, 1.1),
    (Event.FIRST_TOKEN, 1.4),
    (Event.PREEMPTED, 1.5),
    (Event.FINISHED, 1.9),
)


def test_the_stages_are_children_of_one_root_that_says_what_was_asked_and_used(
    memory: Memory,
) -> None:
    write(memory.tracer, metrics=WHOLE)
    root, *children = memory.spans()
    facts = dict(root.attributes or {})
    assert facts["gen_ai.request.model"] == "m"
    assert facts["gen_ai.request.temperature"] == 0.5
    assert facts["gen_ai.request.seed"] == 3
    assert facts["gen_ai.response.id"] == "cmpl-a"
    assert facts["session.id"] == "s"
    assert facts["gen_ai.usage.input_tokens"] == 7
    assert facts["gen_ai.usage.output_tokens"] == 5
    assert facts["gen_ai.response.finish_reasons"] == ("stop",)
    assert facts["paceline.speculation.accepted_tokens"] == 2
    assert facts["gen_ai.response.time_to_first_chunk"] == pytest.approx(0.5)
    assert [each.name for each in children] == ["queue", "prefill", "decode"]
    assert [event.name for event in children[-1].events] == ["preempted"]
    for child in children:
        assert child.parent is not None
        assert child.parent.span_id == root.context.span_id
        assert child.context.trace_id == root.context.trace_id


def test_the_callers_trace_goes_on_with_its_state(memory: Memory) -> None:
    caller = Caller(traceparent=TRACEPARENT, tracestate="vendor=1")
    write(memory.tracer, caller=caller, metrics=WHOLE)
    root, *_ = memory.spans()
    assert format(root.context.trace_id, "032x") == TRACE_ID == caller.trace_id
    assert root.parent is not None
    assert format(root.parent.span_id, "016x") == PARENT_ID
    assert root.context.trace_state.get("vendor") == "1"


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT_ID}-01", "é" * 40])
def test_a_header_that_is_none_begins_a_trace_of_its_own(memory: Memory, header: str) -> None:
    caller = Caller(traceparent=header)
    write(memory.tracer, caller=caller, metrics=WHOLE)
    root, *_ = memory.spans()
    assert root.parent is None
    assert root.context.trace_id != 0


def test_a_caller_that_does_not_sample_is_not_traced(memory: Memory) -> None:
    write(memory.tracer, caller=Caller(traceparent=TRACEPARENT[:-2] + "00"), metrics=WHOLE)
    assert memory.spans() == []


def test_texts_of_one_prompt_share_a_trace(memory: Memory) -> None:
    write(memory.tracer, num_texts=2, metrics=WHOLE)
    root, *children = memory.spans()
    assert [each.name for each in children].count("decode") == 2
    assert {each.context.trace_id for each in children} == {root.context.trace_id}
    assert dict(root.attributes or {})["gen_ai.usage.output_tokens"] == 10


def test_an_engine_that_fails_a_request_marks_its_trace(memory: Memory) -> None:
    hops = (
        Hop(engine_id="d-0", asked_s=1.0, chosen_s=1.0, ended_s=2.0),
        Hop(engine_id="d-1", asked_s=2.0, chosen_s=2.0, ended_s=2.0),
    )
    write(memory.tracer, reason="error", hops=hops)
    root, *_ = memory.spans()
    assert not root.status.is_ok
    (resumed,) = [event for event in root.events if event.name == "resumed"]
    assert dict(resumed.attributes or {}) == {
        "paceline.resumed.from": "d-0",
        "paceline.resumed.to": "d-1",
    }


# ------------------------------------------------------------------------------------- where to, and how


@pytest.mark.parametrize(
    ("endpoint", "protocol", "target"),
    [
        ("http://c:4317", "grpc", OtlpTarget("http://c:4317", "grpc")),
        ("grpc://c:4317", "grpc", OtlpTarget("http://c:4317", "grpc")),
        ("https://c:4317", "grpc", OtlpTarget("https://c:4317", "grpc")),
        ("http://c:4318", "http/protobuf", OtlpTarget("http://c:4318/v1/traces", "http/protobuf")),
        ("http://c/otlp", "http/protobuf", OtlpTarget("http://c/otlp", "http/protobuf")),
    ],
)
def test_an_endpoint_may_be_written_as_people_write_it(
    endpoint: str, protocol: Any, target: OtlpTarget
) -> None:
    server = ServerConfig(otlp_traces_endpoint=endpoint, otlp_traces_protocol=protocol)
    assert otlp_target(server) == target


@pytest.mark.parametrize("endpoint", ["localhost:4317", "http://", "ftp://c", "http://[bad"])
def test_an_endpoint_that_is_no_url_is_refused_in_a_line(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint must be a URL like"):
        otlp_target(ServerConfig(otlp_traces_endpoint=endpoint))


def test_the_environment_says_what_flags_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert otlp_target(ServerConfig()) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    assert otlp_target(ServerConfig()) == OtlpTarget("http://c:1/v1/traces", "http/protobuf")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")
    with pytest.raises(ConfigError, match="must be grpc or http/protobuf"):
        otlp_target(ServerConfig())


def test_nothing_of_opentelemetry_is_loaded_before_traces_are_asked_for() -> None:
    code = (
        "import sys, paceline.runtime.tracing as t, paceline.runtime.async_llm\n"
        "from paceline.runtime.config import ServerConfig\n"
        "assert t.otlp_target(ServerConfig()) is None\n"
        "print(*(m for m in sys.modules if m.startswith('opentelemetry')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "", done.stderr


# -------------------------------------------------------------------------------------------- collectors


class Collector:
    """What came in."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []

    def take(self, request: otlp.ExportTraceServiceRequest) -> None:
        for each in request.resource_spans:
            values = {a.key: a.value.string_value for a in each.resource.attributes}
            self.resources.append(values)
            self.spans += itertools.chain.from_iterable(scope.spans for scope in each.scope_spans)

    def root(self) -> Span:
        (root,) = [span for span in self.spans if span.name == "llm_request"]
        return root


@contextlib.contextmanager
def over_grpc(collector: Collector) -> Iterator[str]:
    class Service(otlp_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            collector.take(request)
            return otlp.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    otlp_grpc.add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(0)


@contextlib.contextmanager
def over_http(collector: Collector) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.take(otlp.ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("protocol", "listen"), [("grpc", over_grpc), ("http/protobuf", over_http)]
)
def test_a_request_over_http_arrives_at_a_collector_whole(
    tmp_path: Path,
    protocol: Any,
    listen: Callable[[Collector], contextlib.AbstractContextManager[str]],
) -> None:
    collector = Collector()
    with listen(collector) as url:
        server = ServerConfig(otlp_traces_endpoint=url, otlp_traces_protocol=protocol)
        target = otlp_target(server)
        assert target is not None
        tracer = open_tracer(target, model="m", version="1.2", instance="frontend-0")
        engine = FakeEngine(saying("a secret text, written slowly"), step_s=0.01)
        with serving(engine, fake_facts(tmp_path), observer=tracer) as served:
            headers = {"traceparent": TRACEPARENT, "x-request-id": "abc"}
            url = f"{served.url}/v1/completions"
            answer = httpx.post(url, json=BODY, headers=headers, timeout=SOON_S)
        assert answer.status_code == 200
        tracer.close()
    root = collector.root()
    assert root.trace_id.hex() == TRACE_ID
    assert root.parent_span_id.hex() == PARENT_ID
    assert {span.trace_id for span in collector.spans} == {root.trace_id}
    children = sorted(
        (span for span in collector.spans if span is not root),
        key=lambda span: span.start_time_unix_nano,
    )
    assert [span.name for span in children] == ["queue", "prefill", "decode"]
    assert {span.parent_span_id for span in children} == {root.span_id}
    edges = [root.start_time_unix_nano]
    for span in children:
        edges += [span.start_time_unix_nano, span.end_time_unix_nano]
    edges.append(root.end_time_unix_nano)
    assert edges == sorted(edges)
    total_s = (edges[-1] - edges[0]) / 1e9
    assert abs(edges[-1] / 1e9 - time.time()) < SOON_S, "in the time of day"
    staged_s = sum(s.end_time_unix_nano - s.start_time_unix_nano for s in children) / 1e9
    assert staged_s == pytest.approx(total_s, abs=0.05)
    assert collector.resources[0]["service.name"] == "paceline"
    assert collector.resources[0]["service.instance.id"] == "frontend-0"
    told = "".join(str(span) for span in collector.spans)
    assert "abc" in told
    assert "secret" not in told, "a trace must not have the prompt or the text"


def test_a_collector_that_is_not_there_costs_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.5")  # seconds
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    tracer = open_tracer(
        OtlpTarget(f"http://127.0.0.1:{port}/v1/traces", "http/protobuf"), model="m", version="1"
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            write(tracer, metrics=WHOLE)
            tracer._provider.force_flush(1000)
        began_s = time.monotonic()
        tracer.close()
    assert time.monotonic() - began_s < SOON_S
    (line,) = [each for each in caplog.messages if "traces" in each]
    assert "requests are served all the same" in line

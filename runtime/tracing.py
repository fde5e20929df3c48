"""OpenTelemetry traces: one per request, made by the frontend from what router and engines told it.

    llm_request                           ── the caller's traceparent, or a trace of its own
      ├─ route       which engines, and why
      ├─ queue       in the engine that reads the prompt
      ├─ prefill
      ├─ transfer    of the prompt's KV, where another engine writes
      └─ decode      rounds, drafts, what was accepted; preemptions as events

Engines export nothing: their moments come with a request's last delta, and `stages.py` puts them on
the frontend's clock. Names of attributes are those of OpenTelemetry's semantic conventions for
generative AI where these have one, `paceline.` otherwise. No prompt and no text is in a trace.

The SDK and its exporters are imported only where traces are asked for. Spans are made when a request
ends, in well under a millisecond, and sent by the SDK's own thread; a collector that cannot be
reached costs a warning and those spans.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

from paceline.runtime.config import ServerConfig
from paceline.runtime.errors import ConfigError
from paceline.runtime.requests import job_id
from paceline.runtime.stages import Stage, Value, accounts, resumptions, stages

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

    from paceline.runtime.async_llm import RequestRecord
    from paceline.runtime.caller import Caller
    from paceline.runtime.types import EngineStatus, Request

logger = logging.getLogger(__name__)

OtlpProtocol = Literal["grpc", "http/protobuf"]
TRACES_PATH = "/v1/traces"
"""Where a collector takes traces over HTTP."""
CLOSE_S = 3.0
"""How long the last spans may take to be sent when the server ends."""


class OtlpTarget(NamedTuple):
    """Where traces go."""

    endpoint: str
    protocol: OtlpProtocol


def otlp_target(server: ServerConfig) -> OtlpTarget | None:
    """From the config, else from OpenTelemetry's environment variables; None for no traces. Raises
    ConfigError."""
    endpoint = server.otlp_traces_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not endpoint:
        return None
    protocol = _protocol(server)
    try:
        parts = urlsplit(endpoint)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https", "grpc") or not parts.hostname:
        raise ConfigError(
            f"otlp_traces_endpoint must be a URL like http://localhost:4317, found {endpoint!r:.200}"
        )
    if protocol == "grpc":
        secure = "https" if parts.scheme == "https" else "http"
        return OtlpTarget(parts._replace(scheme=secure).geturl(), protocol)
    if parts.scheme == "grpc":
        raise ConfigError(f"{endpoint!r:.200} is a gRPC endpoint, the protocol is {protocol}")
    path = TRACES_PATH if parts.path in ("", "/") else parts.path
    return OtlpTarget(parts._replace(path=path).geturl(), protocol)


def _protocol(server: ServerConfig) -> OtlpProtocol:
    if server.otlp_traces_protocol is not None:
        return server.otlp_traces_protocol
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        found = os.environ.get(name, "")
        for protocol in get_args(OtlpProtocol):
            if found == protocol:
                return protocol  # type: ignore[no-any-return]
        if found:
            raise ConfigError(f"{name} must be grpc or http/protobuf, found {found!r:.80}")
    return "grpc"


def open_tracer(
    target: OtlpTarget, *, model: str, version: str, instance: str = ""
) -> RequestTracer:
    """Traces to a collector, sampled as OTEL_TRACES_SAMPLER says. `instance` is this process among
    those of the server. Close it."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    _say_once(target)
    facts: dict[str, AttributeValue] = {"service.name": "paceline", "service.version": version}
    if instance:
        facts["service.instance.id"] = instance
    # what the environment says comes last: it knows the deployment
    resource = Resource.create(facts).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_exporter(target)))
    return RequestTracer(provider, model=model)


def _exporter(target: OtlpTarget) -> SpanExporter:
    if target.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc(endpoint=target.endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

    return Http(endpoint=target.endpoint)


@dataclass(slots=True, kw_only=True)
class _Open:
    """A request that has not ended, and the texts of it that have not."""

    span: Span
    clock_ns: int
    """From the frontend's monotonic clock to the time of day."""
    num_left: int = 0
    records: list[RequestRecord] = field(default_factory=list)
    """Texts that have ended."""

    def ns(self, at_s: float) -> int:
        return int(at_s * 1e9) + self.clock_ns


class RequestTracer:
    """Satisfies `Observer`: a trace of each request."""

    def __init__(
        self,
        provider: TracerProvider,
        *,
        model: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("paceline")
        self._model = model
        self._clock = clock
        self._open: dict[str, _Open] = {}

    def on_admitted(self, record: RequestRecord, request: Request) -> None:
        """Satisfies `Observer`. The texts of one prompt share a trace."""
        job = job_id(record.request_id)
        if job not in self._open:
            self._open[job] = self._begin(job, record, request)
        self._open[job].num_left += 1

    def on_delta(self, record: RequestRecord, *, num_tokens: int, now_s: float) -> None:
        """Satisfies `Observer`."""

    def on_status(self, status: EngineStatus) -> None:
        """Satisfies `Observer`."""

    def on_finished(self, record: RequestRecord) -> None:
        """Satisfies `Observer`."""
        job = job_id(record.request_id)
        trace = self._open[job]
        trace.num_left -= 1
        trace.records.append(record)
        if trace.span.is_recording():
            self._add_stages(trace, record)
        if not trace.num_left:
            del self._open[job]
            self._end(trace)

    def close(self) -> None:
        """Send what is left, within `CLOSE_S`."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(CLOSE_S)

    def _begin(self, job: str, record: RequestRecord, request: Request) -> _Open:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        clock_ns = time.time_ns() - int(self._clock() * 1e9)
        caller = record.caller
        headers = {"traceparent": caller.traceparent, "tracestate": caller.tracestate}
        given = {name: value for name, value in headers.items() if value}
        span = self._tracer.start_span(
            "llm_request",
            context=TraceContextTextMapPropagator().extract(given, context=Context()),
            kind=SpanKind.SERVER,
            start_time=int(record.arrived_s * 1e9) + clock_ns,
            attributes=_asked(job, caller, request, model=self._model),
        )
        caller.trace_id = caller.trace_id or format(span.get_span_context().trace_id, "032x")
        return _Open(span=span, clock_ns=clock_ns)

    def _add_stages(self, trace: _Open, record: RequestRecord) -> None:
        for stage in stages(record):
            self._add(trace, stage)
        if record.first_token_s is not None:
            trace.span.add_event("first_token", timestamp=trace.ns(record.first_token_s))
        for each in resumptions(record):
            where = {
                "paceline.resumed.from": each.from_engine,
                "paceline.resumed.to": each.to_engine,
            }
            trace.span.add_event("resumed", where, timestamp=trace.ns(each.at_s))

    def _add(self, trace: _Open, stage: Stage) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        span = self._tracer.start_span(
            stage.name,
            context=set_span_in_context(trace.span),
            start_time=trace.ns(stage.start_s),
            attributes=stage.facts,
        )
        for name, at_s in stage.events:
            span.add_event(name, timestamp=trace.ns(at_s))
        if stage.error is not None:
            span.set_status(Status(StatusCode.ERROR, stage.error))
        span.end(trace.ns(stage.end_s))

    def _end(self, trace: _Open) -> None:
        from opentelemetry.trace import Status, StatusCode

        records = trace.records
        if trace.span.is_recording():
            trace.span.set_attributes(_used(records))
            reasons = [record.finish_reason or "error" for record in records]
            trace.span.set_attribute("gen_ai.response.finish_reasons", reasons)
            if "error" in reasons:
                trace.span.set_attribute("error.type", "engine")
                trace.span.set_status(Status(StatusCode.ERROR))
        trace.span.end(trace.ns(max(record.finished_s or record.arrived_s for record in records)))


def _asked(job: str, caller: Caller, request: Request, *, model: str) -> dict[str, Value]:
    """What is known of a request when it comes."""
    params = request.params
    facts: dict[str, Value] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "paceline",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": job,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
    }
    optional: dict[str, Value | None] = {
        "gen_ai.request.top_k": params.top_k if params.top_k > 0 else None,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.choice.count": params.n if params.n > 1 else None,
        "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        "gen_ai.request.presence_penalty": params.presence_penalty or None,
        "session.id": request.session_id or None,
        "paceline.request.id": caller.request_id or None,
        "paceline.request.priority": request.priority or None,
    }
    return facts | {name: value for name, value in optional.items() if value is not None}


def _used(records: list[RequestRecord]) -> dict[str, Value]:
    """What a request's texts took together; they share its prompt."""
    first = records[0]
    told = [account for record in records for account in accounts(record)]
    facts: dict[str, Value] = {
        "gen_ai.usage.input_tokens": first.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": first.num_cached_tokens,
        "gen_ai.usage.output_tokens": sum(record.num_tokens for record in records),
        "paceline.speculation.drafted_tokens": sum(account.drafted for account in told),
        "paceline.speculation.accepted_tokens": sum(account.accepted for account in told),
    }
    waits = [r.first_token_s - r.arrived_s for r in records if r.first_token_s is not None]
    if waits:
        facts["gen_ai.response.time_to_first_chunk"] = min(waits)
    return facts


def _say_once(target: OtlpTarget) -> None:
    """Have one warning of ours instead of the exporter's, which come with every batch that fails."""
    exporters = logging.getLogger("opentelemetry.exporter")
    exporters.propagate = False
    exporters.handlers = [_Once(target.endpoint)]


class _Once(logging.Handler):
    """Passes the first failure on, as a warning."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(level=logging.WARNING)
        self._endpoint = endpoint
        self._said = False

    def emit(self, record: logging.LogRecord) -> None:
        if self._said:
            return
        self._said = True
        logger.warning(
            "traces do not reach %s: %.300s; requests are served all the same, and this is said once",
            self._endpoint,
            record.getMessage(),
        )

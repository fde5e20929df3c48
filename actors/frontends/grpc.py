"""The gRPC door to an engine: `paceline.v1.Engine`, and the same calls under vLLM's name.

    bytes ──parse──> EngineService.Generate ──> TenantLLM.submit ──> RequestStream ──> messages
            │ INVALID_ARGUMENT      │ errors become statuses, in one place      │ cancelled: aborted

Messages are parsed here rather than by grpcio, which answers a malformed one with UNKNOWN. Beside
it: standard health (which generates a token to know) and reflection.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
import msgspec
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

import paceline
from paceline.actors.frontends.auth import Keys, load_keys
from paceline.actors.frontends.tenants import NOBODY, TenantLLM
from paceline.proto import inference_pb2 as pb
from paceline.proto import vllm_engine_pb2
from paceline.runtime import caller
from paceline.runtime.async_llm import AsyncLLM, RequestStream
from paceline.runtime.client.errors import PUSHBACK
from paceline.runtime.config import EngineConfig, ServerConfig
from paceline.runtime.errors import (
    ConfigError,
    EngineError,
    OverloadedError,
    PromptError,
    UserError,
)
from paceline.runtime.events import prefill_s, queue_s
from paceline.runtime.outputs import CompletionOutput, Position, RequestOutput, empty_output
from paceline.runtime.preflight import Facts
from paceline.runtime.requests import Prompt
from paceline.runtime.tls import server_credentials, server_tls
from paceline.runtime.types import RequestMetrics, SamplingParams, StructuredOutputs

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 * 2**20
"""Of a request, as over HTTP. Replies have no limit."""
MAX_METADATA_BYTES = 16 * 2**10
MAX_CALLS = 4096
"""At a time on one connection: a gateway may have all its callers on one."""
HEALTH_TIMEOUT_S = 5.0
WATCH_PERIOD_S = 5.0
RETRY_LOST_S = 1.0
"""What a caller is told when this engine is gone or going: another may be there by then."""
SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),  # from here on refused now and then,
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),  # and from here on always
    ("grpc.max_concurrent_streams", MAX_CALLS),
    ("grpc.server_handshake_timeout_ms", 20_000),
]
SERVICES: tuple[ServiceDescriptor, ...] = (
    pb.DESCRIPTOR.services_by_name["Engine"],
    vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"],
)
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcServer:
    """A server that runs. `stop` lets calls finish for so many seconds, then cancels them."""

    server: grpc.aio.Server
    port: int

    async def stop(self, grace_s: float) -> None:
        await self.server.stop(grace_s)


def reserve(host: str, port: int) -> socket.socket:
    """Keep a port for frontends that share it, however often they are started again. Raises
    ConfigError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as alone:  # nobody else may have it
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            address = alone.getsockname()
        held = socket.socket(family, kind, protocol)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError:
        raise _cannot_listen(f"{host}:{port}") from None
    return held


def _cannot_listen(address: str) -> ConfigError:
    return ConfigError(
        f"cannot listen on {address}: in use or not this machine's; choose another --grpc-port or --host"
    )


async def start(
    async_llm: AsyncLLM,
    facts: Facts,
    config: EngineConfig,
    server_config: ServerConfig,
    *,
    shares_port: bool = False,
) -> GrpcServer:
    """Listen on `server_config.grpc_port`, one of several that do if it `shares_port`. Raises
    ConfigError if the address cannot be had, and for keys or TLS that cannot be used."""
    assert server_config.grpc_port is not None, "expected a grpc_port to listen on"
    keys = load_keys(server_config)
    # unless that is meant, two servers on one port would share its callers at random
    options = [*SERVER_OPTIONS, ("grpc.so_reuseport", int(shares_port))]
    server = grpc.aio.server(
        options=options, interceptors=() if keys is None else (KeyInterceptor(keys),)
    )
    engine = EngineService(async_llm, facts, config, server_config)
    health = HealthService(async_llm)
    server.add_generic_rpc_handlers(
        (*(_handlers(service, engine) for service in SERVICES), _handlers(HEALTH, health))
    )
    names = [service.full_name for service in (*SERVICES, HEALTH)]
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
    host = f"[{server_config.host}]" if ":" in server_config.host else server_config.host
    address = f"{host}:{server_config.grpc_port}"
    tls = server_tls(server_config)
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            tls.check()
            port = server.add_secure_port(address, server_credentials(tls))
    except RuntimeError:
        raise _cannot_listen(address) from None
    await server.start()
    return GrpcServer(server=server, port=port)


# --------------------------------------------------------------------------------- from and to bytes


class Refusal(Exception):  # noqa: N818  it is no error here
    """What a caller is told, as a status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def status_of(error: Exception) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Code, message and trailing metadata: every error is mapped here, once."""
    code, message, retry_s = grpc.StatusCode.INTERNAL, str(error), None
    if isinstance(error, Refusal):
        code = error.code
    elif isinstance(error, UserError):
        code = grpc.StatusCode.INVALID_ARGUMENT
    elif isinstance(error, OverloadedError):
        code, retry_s = grpc.StatusCode.RESOURCE_EXHAUSTED, error.retry_after_s
    elif isinstance(error, EngineError):
        code, retry_s = grpc.StatusCode.UNAVAILABLE, RETRY_LOST_S
    else:
        logger.error("a call failed", exc_info=error)
        message = f"{type(error).__name__} in the server; its log says more"
    return code, message, () if retry_s is None else ((PUSHBACK, str(round(retry_s * 1e3))),)


def _handlers(service: ServiceDescriptor, target: object) -> grpc.GenericRpcHandler:
    """A service's methods, each served by the target's method of the same name."""
    return grpc.method_handlers_generic_handler(
        service.full_name,
        {method.name: _handler(method, getattr(target, method.name)) for method in service.methods},
    )


def _handler(method: MethodDescriptor, function: Callable[..., Any]) -> grpc.RpcMethodHandler:
    """A handler that is given bytes."""
    kind = GetMessageClass(method.input_type)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(
            functools.partial(_serve_stream, kind, function),
            response_serializer=_serialise,
        )
    return grpc.unary_unary_rpc_method_handler(
        functools.partial(_serve, kind, function), response_serializer=_serialise
    )


async def _serve(
    kind: type[Message],
    function: Callable[[Any], Awaitable[Message]],
    body: bytes,
    context: grpc.aio.ServicerContext[bytes, Message],
) -> Message:
    try:
        return await function(_parse(kind, body))
    except Exception as error:
        failure = error
    return await context.abort(*status_of(failure))


async def _serve_stream(
    kind: type[Message],
    function: Callable[[Any], AsyncIterator[Message]],
    body: bytes,
    context: grpc.aio.ServicerContext[bytes, Message],
) -> None:
    """Closing the replies, whichever way the call ends, is what aborts a request."""
    _session_id.set(_metadata(context, "x-session-id"))
    _retry_key.set(_metadata(context, "idempotency-key"))
    caller.enter("", _metadata(context, "traceparent"), _metadata(context, "tracestate"))
    try:
        replies = function(_parse(kind, body))
        try:
            async for reply in replies:
                await context.write(reply)
        finally:
            await replies.aclose()  # type: ignore[attr-defined]
        return
    except Exception as error:
        failure = error
    await context.abort(*status_of(failure))


_session_id: ContextVar[str] = ContextVar("session_id", default="")
_retry_key: ContextVar[str] = ContextVar("retry_key", default="")
_tenant: ContextVar[str] = ContextVar("tenant", default=NOBODY)
"""All of the call that is being served: each is a task of its own."""


def _metadata(context: grpc.aio.ServicerContext[bytes, Message], name: str) -> str:
    """What a call's metadata has under a name; empty if nothing."""
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else value.decode("latin-1")
    return ""


def _parse(kind: type[Message], body: bytes) -> Message:
    try:
        return kind.FromString(body)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT, f"these {len(body)} bytes are no {name}"
        ) from None


def _serialise(message: Message) -> bytes:
    return bytes(message.SerializeToString())


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # no types
    """Lets calls through that bring `authorization: Bearer KEY`, and notes their tenant; and health
    checks, which probes make without. Reflection needs a key as all else does."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None or self._admits(handler_call_details):
            return handler
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(_refuse)

    def _admits(self, call: grpc.HandlerCallDetails) -> bool:
        if call.method.startswith(f"/{HEALTH.full_name}/") or call.method.endswith("/HealthCheck"):
            return True
        for key, value in call.invocation_metadata:
            if key == "authorization":
                given = value.encode() if isinstance(value, str) else value
                tenant = self._keys.tenant_of(given)
                if tenant is not None:
                    _tenant.set(tenant)
                    return True
        return False


async def _refuse(_request: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "the API key is missing or wrong: send metadata authorization: Bearer KEY",
    )


# ---------------------------------------------------------------------------------------- services


class EngineService:
    """Serves `paceline.v1.Engine`. Methods are named like the calls."""

    def __init__(
        self, async_llm: AsyncLLM, facts: Facts, config: EngineConfig, server_config: ServerConfig
    ) -> None:
        self._llm = async_llm
        self._facts = facts
        self._config = config
        self._name = server_config.served_model_name or config.model
        self._started_s = time.monotonic()
        self._last_receive_s = 0.0
        self._warned: set[tuple[str, int]] = set()
        self._sample = (self._started_s, 0)
        """When loads were asked for last, and the tokens generated by then."""

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest
    ) -> AsyncIterator[pb.GenerateResponse]:
        self._last_receive_s = time.time()
        _check_served(request, warned=self._warned)
        request_id = request.request_id or uuid.uuid4().hex
        caller.current().request_id = request_id
        stream = await TenantLLM(self._llm, _tenant.get()).submit(
            _prompt(request),
            sampling_params(request.sampling_params),
            request_id=request_id,
            num_draft_tokens=request.num_draft_tokens
            if request.HasField("num_draft_tokens")
            else None,
            priority=request.priority,
            cache_salt=request.cache_salt,
            session_id=_session_id.get(),
            retry_key=request.request_id or _retry_key.get() or None,
        )
        async with stream:
            writer = _Writer(stream, request_id, stream_chunks=request.stream)
            async for output in stream:
                for message in writer.messages(output):
                    yield message

    async def Abort(self, request: pb.AbortRequest) -> pb.AbortResponse:  # noqa: N802
        llm = TenantLLM(self._llm, _tenant.get())
        unknown = [name for name in request.request_ids if not llm.abort(name)]
        if unknown:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND, f"no such request is running: {', '.join(unknown):.500}"
            )
        return pb.AbortResponse()

    async def HealthCheck(  # noqa: N802
        self, _request: pb.HealthCheckRequest
    ) -> pb.HealthCheckResponse:
        healthy = await self._llm.check_health(timeout_s=HEALTH_TIMEOUT_S)
        lost = self._llm.lost
        why = f"no token within {HEALTH_TIMEOUT_S:g} s" if lost is None else str(lost)
        return pb.HealthCheckResponse(healthy=healthy, message="" if healthy else why)

    async def GetModelInfo(  # noqa: N802
        self, _request: pb.GetModelInfoRequest
    ) -> pb.GetModelInfoResponse:
        facts = self._facts
        reply = pb.GetModelInfoResponse(
            model_path=self._config.model,
            is_generation=True,
            max_context_length=facts.max_model_len,
            vocab_size=facts.arch.vocab_size,
            served_model_name=self._name,
            model_type=facts.arch.family,
            eos_token_ids=facts.eos_token_ids,
            max_req_input_len=facts.max_model_len - 1,
        )
        if facts.tokenizer is not None:
            reply.tokenizer_path = str(facts.tokenizer.folder)
            for name in ("bos", "pad"):
                token = facts.tokenizer.special_token(f"{name}_token")
                token_id = None if token is None else facts.tokenizer.fast.token_to_id(token)
                if token_id is not None:
                    setattr(reply, f"{name}_token_id", token_id)
        return reply

    async def GetServerInfo(  # noqa: N802
        self, _request: pb.GetServerInfoRequest
    ) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(
            active_requests=self._llm.num_in_flight,
            is_paused=self._llm.draining,
            last_receive_timestamp=self._last_receive_s,
            uptime_seconds=time.monotonic() - self._started_s,
            server_type="paceline",
            data_parallel_size=1,
            version=paceline.__version__,
            config_json=msgspec.json.encode(self._config).decode(),
            ranks=self._llm.status().ranks,
        )

    async def GetLoads(self, request: pb.GetLoadsRequest) -> pb.GetLoadsResponse:  # noqa: N802
        if request.dp_rank != 0:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND, f"no dp_rank {request.dp_rank}: there is only 0"
            )
        status = self._llm.status()
        used = (status.num_blocks - status.num_free_blocks) * status.block_size
        total = status.num_blocks * status.block_size
        now_s = time.monotonic()
        (then_s, then), self._sample = self._sample, (now_s, status.generation_tokens)
        load = pb.SchedulerLoad(
            num_running_reqs=status.num_running,
            num_waiting_reqs=status.num_waiting,
            num_total_reqs=status.num_running + status.num_waiting,
            num_used_tokens=used,
            max_total_num_tokens=total,
            token_usage=used / max(total, 1),
            gen_throughput=(status.generation_tokens - then) / max(now_s - then_s, 1e-3),
            cache_hit_rate=status.prefix_hits / max(status.prefix_queries, 1),
            utilization=status.num_running / self._config.max_num_seqs,
            max_running_requests=self._config.max_num_seqs,
            drafted=status.drafted,
            accepted=status.accepted,
            generated=status.generation_tokens,
        )
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=paceline.__version__,
            dp_rank_count=1,
            loads=[load],
        )


class HealthService:
    """Serves `grpc.health.v1.Health`. One engine serves all names: they are well together."""

    def __init__(self, async_llm: AsyncLLM) -> None:
        self._llm = async_llm
        self._names = {"", *(service.full_name for service in SERVICES)}

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r:.200}")
        return health_pb2.HealthCheckResponse(status=await self._status())

    async def List(  # noqa: N802
        self, _request: health_pb2.HealthListRequest
    ) -> health_pb2.HealthListResponse:
        reply = health_pb2.HealthCheckResponse(status=await self._status())
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._names, reply))

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state, and then every change, until the caller leaves."""
        told = None
        while True:
            known = request.service in self._names
            status = (
                await self._status() if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            )
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            await asyncio.sleep(WATCH_PERIOD_S)

    async def _status(self) -> int:
        """A server that is shutting down takes no new calls, well as it may be."""
        well = not self._llm.draining and await self._llm.check_health(timeout_s=HEALTH_TIMEOUT_S)
        answer = health_pb2.HealthCheckResponse
        return int(answer.SERVING if well else answer.NOT_SERVING)


# ---------------------------------------------------------------------------------------- requests

_REFUSED_REQUEST = {
    "kv_transfer_params": "KV transfer is not served here",
    "kv_transfer_params_json": "KV transfer is not served here",
    "mm_inputs": "this server reads text only",
    "media_refs": "this server reads text only",
    "extra_mm_inputs": "this server reads text only",
}
_REFUSED_PARAMS = {
    "structural_tag": "use json_schema, regex, grammar or choice",
    "truncate_prompt_tokens": "truncate the prompt before it is sent",
}
MAX_WARNINGS = 100
"""Unknown fields are named in the log once each, and no more of them than this."""


def _check_served(request: pb.GenerateRequest, *, warned: set[tuple[str, int]]) -> None:
    """Refuse by name what would change the answer and is not done. Adds to `warned` the fields
    that nobody here knows."""
    for message, refused in (
        (request, _REFUSED_REQUEST),
        (request.sampling_params, _REFUSED_PARAMS),
    ):
        for field, _ in message.ListFields():
            if field.name in refused:
                raise PromptError(f"{field.name} is not supported: {refused[field.name]}")
        for unknown in UnknownFieldSet(message):
            seen = (message.DESCRIPTOR.name, unknown.field_number)
            if seen not in warned and len(warned) < MAX_WARNINGS:
                warned.add(seen)
                logger.warning("%s: field %d is unknown to this server and ignored", *seen)
    if request.data_parallel_rank != 0:
        raise PromptError(f"data_parallel_rank must be 0, found {request.data_parallel_rank}")


def _prompt(request: pb.GenerateRequest) -> Prompt:
    which = request.WhichOneof("input")
    if which is None:
        raise PromptError("the request has no input: set text or tokenized")
    if which == "text":
        return {"prompt": request.text}
    return {"prompt_token_ids": list(request.tokenized.input_ids)}


def sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """The parameters of a message; fields that are absent have the proto's defaults. Bounds are
    checked later, for all front ends alike."""
    values: dict[str, Any] = {"max_tokens": None}
    for field, value in message.ListFields():
        if field.name in _AS_THEY_ARE:
            values[field.name] = value
        elif field.name in _FLOATS:
            values[field.name] = _as_written(value)
    if message.logit_bias:
        values["logit_bias"] = {i: _as_written(bias) for i, bias in message.logit_bias.items()}
    values["stop"] = tuple(message.stop)
    values["stop_token_ids"] = tuple(message.stop_token_ids)
    which = message.WhichOneof("constraint")
    if which == "json_schema":
        values["structured_outputs"] = StructuredOutputs(json=message.json_schema)
    elif which == "choice":
        choices = tuple(message.choice.choices)
        values["structured_outputs"] = StructuredOutputs(choice=choices)
    elif which is not None and getattr(message, which):
        values["structured_outputs"] = StructuredOutputs(**{which: getattr(message, which)})
    return SamplingParams(**values)


_FLOATS = frozenset(
    (
        "temperature",
        "top_p",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
    )
)
_AS_THEY_ARE = frozenset(
    (
        "top_k",
        "max_tokens",
        "min_tokens",
        "skip_special_tokens",
        "ignore_eos",
        "n",
        "logprobs",
        "prompt_logprobs",
        "seed",
        "include_stop_str_in_output",
        "kv_policy",
    )
)


def _as_written(value: float) -> float:
    """The decimal number a caller wrote: 0.7, not the 0.699999988 that single precision makes of
    it. So a seed gives the same text over gRPC and over HTTP.

    Six digits are always the ones that were written; more are taken where it needs them.
    """
    for digits in (6, 7, 8):
        written = float(f"{value:.{digits}g}")
        if struct.unpack("f", struct.pack("f", written))[0] == value:
            return written
    return value


# ----------------------------------------------------------------------------------------- replies


class _Writer:
    """Turns the outputs of one stream into messages."""

    def __init__(self, stream: RequestStream, request_id: str, *, stream_chunks: bool) -> None:
        self._stream_chunks = stream_chunks
        self._whole = empty_output(stream.job)
        self._request_id = request_id
        self._params = stream.job.params

    def messages(self, output: RequestOutput) -> list[pb.GenerateResponse]:
        """The new messages. Raises Refusal where a text failed."""
        messages: list[pb.GenerateResponse] = []
        whole = self._whole
        for part in output.outputs:
            if part.finish_reason == "error":
                raise Refusal(grpc.StatusCode.INTERNAL, part.error or "the request failed")
            first = not whole.outputs[part.index].token_ids
            whole.add(
                RequestOutput(
                    request_id=output.request_id,
                    prompt=output.prompt,
                    prompt_token_ids=output.prompt_token_ids,
                    outputs=[part],
                    prompt_logprobs=output.prompt_logprobs,
                    num_cached_tokens=output.num_cached_tokens,
                )
            )
            if self._stream_chunks and (part.token_ids or part.text):
                chunk = self._chunk(part, first=first)
                messages.append(pb.GenerateResponse(chunk=chunk, request_id=self._request_id))
            if part.finish_reason is not None:
                complete = self._complete(whole.outputs[part.index])
                messages.append(pb.GenerateResponse(complete=complete, request_id=self._request_id))
        return messages

    def _chunk(self, part: CompletionOutput, *, first: bool) -> pb.GenerateStreamChunk:
        whole = self._whole
        chunk = pb.GenerateStreamChunk(
            token_ids=part.token_ids,
            prompt_tokens=len(whole.prompt_token_ids),
            completion_tokens=len(whole.outputs[part.index].token_ids),
            cached_tokens=whole.num_cached_tokens,
            index=part.index,
            text=part.text,
            accepted_tokens=part.num_accepted,
        )
        self._add_logprobs(chunk, part, prompt=first)
        return chunk

    def _complete(self, output: CompletionOutput) -> pb.GenerateComplete:
        whole = self._whole
        complete = pb.GenerateComplete(
            output_ids=output.token_ids,
            finish_reason=output.finish_reason,
            prompt_tokens=len(whole.prompt_token_ids),
            completion_tokens=len(output.token_ids),
            cached_tokens=whole.num_cached_tokens,
            index=output.index,
            text=output.text,
            kv_policy="" if self._params.kv_policy == "full" else self._params.kv_policy,
            accepted_tokens=output.num_accepted,
        )
        if isinstance(output.stop_reason, str):
            complete.matched_stop_str = output.stop_reason
        elif output.stop_reason is not None:
            complete.matched_token_id = output.stop_reason
        if output.metrics is not None:
            complete.spec_accepted_tokens = output.metrics.accepted
            complete.spec_draft_tokens = output.metrics.drafted
            complete.metrics.CopyFrom(_metrics(output.metrics))
        if not self._stream_chunks:  # streamed ones have been sent
            self._add_logprobs(complete, output, prompt=True)
        return complete

    def _add_logprobs(
        self,
        message: pb.GenerateStreamChunk | pb.GenerateComplete,
        output: CompletionOutput,
        *,
        prompt: bool,
    ) -> None:
        if output.logprobs is not None:
            told = message.output_logprobs
            tops = _tops(output.logprobs, self._params.logprobs)
            for token_id, position, top in zip(
                output.token_ids, output.logprobs, tops, strict=True
            ):
                told.token_ids.append(token_id)
                told.token_logprobs.append(position[token_id].logprob)
                told.top_logprobs.append(top)
        if prompt and self._whole.prompt_logprobs is not None:
            self._add_prompt_logprobs(message.input_logprobs, self._whole.prompt_logprobs)

    def _add_prompt_logprobs(
        self, told: pb.InputLogProbs, positions: Sequence[Position | None]
    ) -> None:
        tops = _tops(positions, self._params.prompt_logprobs)
        for token_id, position, top in zip(
            self._whole.prompt_token_ids, positions, tops, strict=True
        ):
            told.token_ids.append(token_id)
            value = None if position is None else position[token_id].logprob
            told.token_logprobs.append(pb.InputTokenLogProb(value=value))
            told.top_logprobs.append(top)


def _tops(positions: Sequence[Position | None], count: int | None) -> list[pb.TopLogProbs]:
    """The `count` most probable tokens of each position, best first."""
    tops = []
    for position in positions:
        ranked = sorted(
            (entry.rank, token_id, entry.logprob)
            for token_id, entry in (position or {}).items()
            if entry.rank is not None and entry.rank <= (count or 0)
        )
        tops.append(
            pb.TopLogProbs(
                token_ids=[token_id for _, token_id, _ in ranked],
                values=[logprob for _, _, logprob in ranked],
            )
        )
    return tops


def _metrics(metrics: RequestMetrics) -> pb.RequestMetrics:
    return pb.RequestMetrics(
        rounds=metrics.rounds,
        accepted_at=metrics.accepted_at,
        calibrate_ms=metrics.times.calibrate_ms,
        draft_ms=metrics.times.draft_ms,
        verify_ms=metrics.times.verify_ms,
        queued_s=queue_s(metrics) or 0.0,
        prefill_s=prefill_s(metrics) or 0.0,
        decode_s=metrics.decode_s,
    )

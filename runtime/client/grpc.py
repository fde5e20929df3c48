"""gRPC: `paceline.v1.Engine`, for which see proto/inference.proto, carried by grpcio."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from paceline.proto import inference_pb2
from paceline.runtime.client.answers import (
    Choice,
    Completion,
    Health,
    Loads,
    Model,
    Piece,
    ServerInfo,
    Speculation,
    TokenLogprob,
    Usage,
)
from paceline.runtime.client.calls import Ask, Call, Stream, Wire, decode
from paceline.runtime.client.errors import (
    ClientError,
    RequestRejected,
    ServerFailed,
    grpc_error,
)
from paceline.runtime.client.trust import Trust
from paceline.runtime.types import SamplingParams

T = TypeVar("T")

SERVICE = "paceline.v1.Engine"
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


class GrpcApi:
    """`paceline.v1.Engine`, for which see proto/inference.proto."""

    def generate(self, ask: Ask) -> Call[Completion]:
        def read(messages: list[bytes]) -> Completion:
            answers = [self._parse(m, inference_pb2.GenerateResponse) for m in messages]
            ends = sorted(
                (a.complete for a in answers if a.HasField("complete")), key=lambda c: c.index
            )
            if len(ends) != ask.params.n:
                raise ServerFailed(f"expected {ask.params.n} texts, found {len(ends)}")
            usages = [_grpc_usage(end) for end in ends]
            drafting = [_grpc_speculation(end) for end in ends]
            return Completion(
                request_id=answers[0].request_id,
                choices=tuple(_grpc_choice(end) for end in ends),
                usage=Usage(
                    prompt_tokens=usages[0].prompt_tokens,
                    completion_tokens=sum(usage.completion_tokens for usage in usages),
                    cached_tokens=max(usage.cached_tokens for usage in usages),
                ),
                speculation=Speculation(
                    rounds=sum(told.rounds for told in drafting),
                    drafted=sum(told.drafted for told in drafting),
                    accepted=sum(told.accepted for told in drafting),
                    accepted_at=tuple(
                        sum(counts)
                        for counts in itertools.zip_longest(
                            *(told.accepted_at for told in drafting), fillvalue=0
                        )
                    ),
                ),
                kv_policy=ends[0].kv_policy or "full",
            )

        return Call(wire=self._generate(ask, stream=False), read=read)

    def stream(self, ask: Ask) -> Stream:
        def read(message: bytes) -> list[Piece]:
            return [_grpc_piece(self._parse(message, inference_pb2.GenerateResponse))]

        return Stream(wire=self._generate(ask, stream=True), read=read)

    def chat(self, _ask: Ask) -> Call[Completion]:
        raise _only_http("chat")

    def stream_chat(self, _ask: Ask) -> Stream:
        raise _only_http("chat")

    def tokenize(self, _text: str) -> Call[list[int]]:
        raise _only_http("tokenize")

    def detokenize(self, _token_ids: Sequence[int]) -> Call[str]:
        raise _only_http("detokenize")

    def abort(self, request_ids: Sequence[str]) -> Call[None]:
        body = inference_pb2.AbortRequest(request_ids=request_ids).SerializeToString()
        return Call(wire=Wire(method="Abort", body=body), read=lambda _: None)

    def models(self) -> Call[list[Model]]:
        def read(messages: list[bytes]) -> list[Model]:
            info = self._parse(messages[0], inference_pb2.GetModelInfoResponse)
            return [
                Model(
                    model_id=info.served_model_name or info.model_path,
                    max_model_len=info.max_context_length,
                )
            ]

        return Call(wire=Wire(method="GetModelInfo"), read=read)

    def health(self) -> Call[Health]:
        def read(messages: list[bytes]) -> Health:
            health = self._parse(messages[0], inference_pb2.HealthCheckResponse)
            return Health(ok=health.healthy, message=health.message)

        return Call(wire=Wire(method="HealthCheck"), read=read)

    def server_info(self) -> Call[ServerInfo]:
        def read(messages: list[bytes]) -> ServerInfo:
            info = self._parse(messages[0], inference_pb2.GetServerInfoResponse)
            config = decode(info.config_json or "{}", dict[str, Any])
            return ServerInfo(version=info.version, ranks=tuple(info.ranks), config=config)

        return Call(wire=Wire(method="GetServerInfo"), read=read)

    def loads(self) -> Call[Loads]:
        def read(messages: list[bytes]) -> Loads:
            answer = self._parse(messages[0], inference_pb2.GetLoadsResponse)
            if not answer.loads:
                raise ServerFailed("the answer has no loads")
            load = answer.loads[0]
            return Loads(
                num_running=load.num_running_reqs,
                num_waiting=load.num_waiting_reqs,
                kv_usage=load.token_usage,
                prefix_hit_rate=load.cache_hit_rate,
                drafted=load.drafted,
                accepted=load.accepted,
                generated=load.generated,
            )

        return Call(wire=Wire(method="GetLoads"), read=read)

    def _generate(self, ask: Ask, *, stream: bool) -> Wire:
        try:
            request = inference_pb2.GenerateRequest(
                request_id=ask.request_id or "",
                sampling_params=self._params(ask.params),
                stream=stream,
                priority=ask.priority,
                cache_salt=ask.cache_salt,
                num_draft_tokens=ask.num_draft_tokens,
            )
            if isinstance(ask.prompt, str):
                request.text = ask.prompt
            else:
                request.tokenized.CopyFrom(inference_pb2.TokenizedInput(input_ids=ask.prompt))
            return Wire(
                method="Generate",
                body=request.SerializeToString(),
                streaming=True,
                headers={"idempotency-key": ask.retry_key},
            )
        except (TypeError, ValueError) as error:  # out of a field's range, or not a number at all
            raise RequestRejected(f"a value cannot be sent: {error}") from None

    def _params(self, params: SamplingParams) -> inference_pb2.SamplingParams:
        message = inference_pb2.SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=0 if params.top_k == -1 else params.top_k,
            min_p=params.min_p,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            repetition_penalty=params.repetition_penalty,
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            stop=params.stop_strings,
            stop_token_ids=params.stop_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            ignore_eos=params.ignore_eos,
            n=params.n,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            seed=params.seed,
            include_stop_str_in_output=params.include_stop_str_in_output,
            logit_bias=params.logit_bias,
            kv_policy=params.kv_policy,
        )
        shape = params.structured_outputs
        if shape is not None:
            if shape.json is not None:
                message.json_schema = shape.json
            if shape.regex is not None:
                message.regex = shape.regex
            if shape.grammar is not None:
                message.grammar = shape.grammar
            if shape.json_object:
                message.json_object = True
            if shape.choice is not None:
                message.choice.choices.extend(shape.choice)
        return message

    def _parse(self, message: bytes, kind: type[T]) -> T:
        try:
            return cast("T", kind.FromString(message))  # type: ignore[attr-defined]
        except DecodeError as error:
            raise ServerFailed(f"the answer is not understood: {error}") from None


def _only_http(what: str) -> RequestRejected:
    return RequestRejected(f"{what} is served over HTTP only: use an http:// URL")


def _grpc_usage(part: Any) -> Usage:
    return Usage(
        prompt_tokens=part.prompt_tokens,
        completion_tokens=part.completion_tokens,
        cached_tokens=part.cached_tokens,
    )


def _grpc_logprobs(part: Any) -> tuple[TokenLogprob, ...] | None:
    if not part.HasField("output_logprobs"):
        return None
    told = part.output_logprobs
    tops = [
        tuple(
            TokenLogprob(token_id=token_id, logprob=value)
            for token_id, value in zip(top.token_ids, top.values, strict=False)
        )
        for top in told.top_logprobs
    ]
    return tuple(
        TokenLogprob(token_id=token_id, logprob=logprob, top=tops[i] if i < len(tops) else ())
        for i, (token_id, logprob) in enumerate(
            zip(told.token_ids, told.token_logprobs, strict=False)
        )
    )


def _grpc_stop_reason(end: Any) -> int | str | None:
    which = end.WhichOneof("matched_stop")
    return None if which is None else cast("int | str", getattr(end, which))


def _grpc_speculation(end: Any) -> Speculation:
    return Speculation(
        rounds=end.metrics.rounds,
        drafted=end.spec_draft_tokens,
        accepted=end.spec_accepted_tokens,
        accepted_at=tuple(end.metrics.accepted_at),
    )


def _grpc_choice(end: Any) -> Choice:
    return Choice(
        index=end.index,
        text=end.text,
        token_ids=tuple(end.output_ids),
        finish_reason=end.finish_reason,
        stop_reason=_grpc_stop_reason(end),
        logprobs=_grpc_logprobs(end),
        num_accepted=end.accepted_tokens,
    )


def _grpc_piece(answer: Any) -> Piece:
    """Of a chunk, what is new; of a `complete`, only what the chunks before it did not say."""
    if answer.HasField("complete"):
        end = answer.complete
        return Piece(
            request_id=answer.request_id,
            index=end.index,
            finish_reason=end.finish_reason,
            stop_reason=_grpc_stop_reason(end),
            speculation=_grpc_speculation(end),
            usage=_grpc_usage(end),
        )
    chunk = answer.chunk
    return Piece(
        request_id=answer.request_id,
        index=chunk.index,
        text=chunk.text,
        token_ids=tuple(chunk.token_ids),
        num_accepted=chunk.accepted_tokens,
        logprobs=_grpc_logprobs(chunk),
    )


class GrpcTransport:
    """gRPC with grpcio. Messages stay bytes."""

    def __init__(
        self, address: str, *, trust: Trust | None = None, api_key: str | None = None
    ) -> None:
        """With TLS if there is `trust`."""
        self._channel = _channel(grpc, address, trust)
        self._metadata = _metadata(api_key)

    def open(self, wire: Wire, *, timeout_s: float) -> Generator[bytes, None, None]:
        path = f"/{SERVICE}/{wire.method}"
        try:
            if not wire.streaming:
                invoke = self._channel.unary_unary(path)
                yield invoke(
                    wire.body,
                    timeout=timeout_s,
                    metadata=self._metadata + tuple(wire.headers.items()),
                )
                return
            call = self._channel.unary_stream(path)(
                wire.body,
                timeout=timeout_s,
                metadata=self._metadata + tuple(wire.headers.items()),
            )
            with contextlib.closing(_Cancelled(call)):
                yield from call
        except grpc.RpcError as error:
            raise _from_rpc_error(error) from error

    def close(self) -> None:
        self._channel.close()


class AsyncGrpcTransport:
    """The same, without blocking."""

    def __init__(
        self, address: str, *, trust: Trust | None = None, api_key: str | None = None
    ) -> None:
        self._channel = _channel(grpc.aio, address, trust)
        self._metadata = _metadata(api_key)

    async def open(self, wire: Wire, *, timeout_s: float) -> AsyncGenerator[bytes, None]:
        path = f"/{SERVICE}/{wire.method}"
        try:
            if not wire.streaming:
                invoke = self._channel.unary_unary(path)
                yield await invoke(
                    wire.body,
                    timeout=timeout_s,
                    metadata=self._metadata + tuple(wire.headers.items()),
                )
                return
            call = self._channel.unary_stream(path)(
                wire.body,
                timeout=timeout_s,
                metadata=self._metadata + tuple(wire.headers.items()),
            )
            with contextlib.closing(_Cancelled(call)):
                async for message in call:
                    yield message
        except grpc.RpcError as error:
            raise _from_rpc_error(error) from error

    async def close(self) -> None:
        await self._channel.close()


def _channel(module: Any, address: str, trust: Trust | None) -> Any:
    """Of grpc or grpc.aio."""
    if trust is None:
        return module.insecure_channel(address, options=OPTIONS)
    return module.secure_channel(address, trust.credentials(), options=OPTIONS)


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


@dataclass(frozen=True, slots=True)
class _Cancelled:
    """A call that is cancelled when whoever reads it leaves. Does nothing to one that has ended."""

    call: Any

    def close(self) -> None:
        self.call.cancel()


def _from_rpc_error(error: Any) -> ClientError:
    metadata = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
    return grpc_error(error.code().name, error.details() or "no message", metadata)

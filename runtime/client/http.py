"""HTTP: OpenAI's routes and shapes, carried by httpx."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import httpx
import msgspec

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
    ConnectionFailed,
    DeadlineExceeded,
    RequestRejected,
    ServerFailed,
    StreamBroken,
    http_error,
    message_of,
)
from paceline.runtime.client.trust import Trust

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
MAX_TOKENS = 2**31 - 1
"""As many as the context holds: servers lower it to that."""


class _HttpUsageDetails(msgspec.Struct):
    cached_tokens: int = 0


class _HttpUsage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _HttpUsageDetails | None = None

    def value(self) -> Usage:
        details = self.prompt_tokens_details
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=0 if details is None else details.cached_tokens,
        )


class _HttpTopLogprob(msgspec.Struct):
    token: str
    logprob: float


class _HttpChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: list[_HttpTopLogprob] = []


class _HttpLogprobs(msgspec.Struct):
    """Of a completion, or of a chat, which has `content` instead."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    content: list[_HttpChatLogprob] | None = None

    def value(self, token_ids: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        tops: Sequence[Sequence[tuple[str, float]]]
        if self.content is not None:
            tokens = [(entry.token, entry.logprob) for entry in self.content]
            tops = [[(top.token, top.logprob) for top in e.top_logprobs] for e in self.content]
        else:
            tokens = [
                (token, 0.0 if logprob is None else logprob)
                for token, logprob in zip(self.tokens, self.token_logprobs, strict=False)
            ]
            tops = [list((top or {}).items()) for top in self.top_logprobs or []]
        # Without a stop token's id or with an echoed prompt the lists differ in length.
        ids: Sequence[int | None] = token_ids if len(token_ids) == len(tokens) else ()
        return tuple(
            TokenLogprob(
                token=token,
                token_id=ids[i] if ids else None,
                logprob=logprob,
                top=tuple(
                    TokenLogprob(token=name, logprob=value)
                    for name, value in (tops[i] if i < len(tops) else ())
                ),
            )
            for i, (token, logprob) in enumerate(tokens)
        )


class _HttpMessage(msgspec.Struct):
    content: str | None = None


class _HttpSpeculation(msgspec.Struct):
    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    acceptance_histogram: list[int] = []


class _HttpMetrics(msgspec.Struct):
    speculative_decoding: _HttpSpeculation | None = None


class _HttpChoice(msgspec.Struct):
    """Of a completion (`text`), a chat (`message`) or a chunk of one (`delta`)."""

    index: int = 0
    text: str | None = None
    message: _HttpMessage | None = None
    delta: _HttpMessage | None = None
    token_ids: list[int] | None = None
    num_accepted: int = 0
    logprobs: _HttpLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def words(self) -> str:
        message = self.message or self.delta
        return (message.content if message else self.text) or ""

    def ids(self) -> tuple[int, ...]:
        return tuple(self.token_ids or ())


class _HttpAnswer(msgspec.Struct):
    id: str = ""
    choices: list[_HttpChoice] = []
    usage: _HttpUsage | None = None
    metrics: _HttpMetrics | None = None
    kv_policy: str = "full"
    error: Any = None

    def speculation(self) -> Speculation | None:
        told = None if self.metrics is None else self.metrics.speculative_decoding
        if told is None:
            return None
        return Speculation(
            rounds=told.num_spec_steps,
            drafted=told.num_draft_tokens,
            accepted=told.num_accepted_draft_tokens,
            accepted_at=tuple(told.acceptance_histogram),
        )


class _HttpModel(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _HttpModels(msgspec.Struct):
    data: list[_HttpModel]


class _HttpCounts(msgspec.Struct):
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafted: int = 0
    accepted: int = 0
    generation_tokens: int = 0
    ranks: list[str] = []


class _HttpStatus(msgspec.Struct):
    status: _HttpCounts
    config: dict[str, Any] = {}
    version: str = ""


class _HttpTokens(msgspec.Struct):
    tokens: list[int]


class _HttpText(msgspec.Struct):
    prompt: str


class HttpApi:
    """OpenAI's routes, with the extra fields of vLLM and our own."""

    def __init__(self, *, model: str | None = None) -> None:
        self._model = model

    def generate(self, ask: Ask) -> Call[Completion]:
        body = self._body(ask) | {"prompt": _prompt(ask)}
        return Call(wire=_post("/v1/completions", body, ask), read=_read_completion)

    def stream(self, ask: Ask) -> Stream:
        body = self._body(ask, stream=True) | {"prompt": _prompt(ask)}
        return Stream(wire=_post("/v1/completions", body, ask), read=_read_pieces)

    def chat(self, ask: Ask) -> Call[Completion]:
        body = self._body(ask) | _chat(ask)
        return Call(wire=_post("/v1/chat/completions", body, ask), read=_read_completion)

    def stream_chat(self, ask: Ask) -> Stream:
        body = self._body(ask, stream=True) | _chat(ask)
        return Stream(wire=_post("/v1/chat/completions", body, ask), read=_read_pieces)

    def abort(self, request_ids: Sequence[str]) -> Call[None]:
        raise RequestRejected(
            f"HTTP cannot abort {', '.join(request_ids)}: close the stream, or use a grpc:// URL"
        )

    def models(self) -> Call[list[Model]]:
        def read(messages: list[bytes]) -> list[Model]:
            found = decode(messages[0], _HttpModels).data
            return [Model(model_id=model.id, max_model_len=model.max_model_len) for model in found]

        return Call(wire=Wire(method="GET /v1/models"), read=read)

    def health(self) -> Call[Health]:
        return Call(wire=Wire(method="GET /health"), read=lambda _: Health(ok=True))

    def server_info(self) -> Call[ServerInfo]:
        def read(messages: list[bytes]) -> ServerInfo:
            info = decode(messages[0], _HttpStatus)
            return ServerInfo(
                version=info.version, ranks=tuple(info.status.ranks), config=info.config
            )

        return Call(wire=Wire(method="GET /live/status"), read=read)

    def loads(self) -> Call[Loads]:
        def read(messages: list[bytes]) -> Loads:
            status = decode(messages[0], _HttpStatus).status
            used = status.num_blocks - status.num_free_blocks
            return Loads(
                num_running=status.num_running,
                num_waiting=status.num_waiting,
                kv_usage=used / max(status.num_blocks, 1),
                prefix_hit_rate=status.prefix_hits / max(status.prefix_queries, 1),
                drafted=status.drafted,
                accepted=status.accepted,
                generated=status.generation_tokens,
            )

        return Call(wire=Wire(method="GET /live/status"), read=read)

    def tokenize(self, text: str) -> Call[list[int]]:
        return Call(
            wire=_post("/tokenize", {"prompt": text}),
            read=lambda messages: decode(messages[0], _HttpTokens).tokens,
        )

    def detokenize(self, token_ids: Sequence[int]) -> Call[str]:
        return Call(
            wire=_post("/detokenize", {"tokens": list(token_ids)}),
            read=lambda messages: decode(messages[0], _HttpText).prompt,
        )

    def _body(self, ask: Ask, *, stream: bool = False) -> dict[str, Any]:
        """Everything but the prompt."""
        params = ask.params
        try:
            body = cast("dict[str, Any]", msgspec.to_builtins(params, str_keys=True))
        except TypeError as error:
            raise RequestRejected(f"a value cannot be sent: {error}") from None
        # Said even where they are our defaults: a server's may be others, and are where it is null.
        most = MAX_TOKENS if params.max_tokens is None else params.max_tokens
        body |= {"max_tokens": most, "temperature": params.temperature}
        body |= {"return_token_ids": True, "return_metrics": True}
        if self._model is not None:
            body["model"] = self._model
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        extras = {
            "priority": ask.priority,
            "cache_salt": ask.cache_salt,
            "num_draft_tokens": ask.num_draft_tokens,
        }
        defaults = {"priority": 0, "cache_salt": "", "num_draft_tokens": None}
        return body | {key: value for key, value in extras.items() if value != defaults[key]}


def _prompt(ask: Ask) -> str | list[int]:
    return ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt)


def _chat(ask: Ask) -> dict[str, Any]:
    """Chats ask for log-probabilities by a flag and a number."""
    fields: dict[str, Any] = {"messages": [dict(message) for message in ask.messages]}
    if ask.params.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": ask.params.logprobs}
    return fields


def _post(path: str, body: Mapping[str, Any], ask: Ask | None = None) -> Wire:
    try:
        # not by msgspec, which would make null, and so the default, of a number that is none
        content = json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise RequestRejected(f"a value cannot be sent: {error}") from None
    headers = {"Content-Type": "application/json"}
    if ask is not None:
        headers["Idempotency-Key"] = ask.retry_key
    if ask is not None and ask.request_id is not None:
        headers["X-Request-Id"] = ask.request_id
    return Wire(
        method=f"POST {path}", body=content, headers=headers, streaming=bool(body.get("stream"))
    )


def _read_completion(messages: list[bytes]) -> Completion:
    answer = decode(messages[0], _HttpAnswer)
    if not answer.choices:
        raise ServerFailed("the answer has no choices")
    return Completion(
        request_id=answer.id,
        choices=tuple(
            Choice(
                index=choice.index,
                text=choice.words(),
                token_ids=choice.ids(),
                finish_reason=choice.finish_reason or "",
                stop_reason=choice.stop_reason,
                logprobs=None if choice.logprobs is None else choice.logprobs.value(choice.ids()),
                num_accepted=choice.num_accepted,
            )
            for choice in answer.choices
        ),
        usage=(answer.usage or _HttpUsage()).value(),
        speculation=answer.speculation(),
        kv_policy=answer.kv_policy,
    )


def _read_pieces(message: bytes) -> list[Piece]:
    answer = decode(message, _HttpAnswer)
    if answer.error is not None:
        raise StreamBroken(f"the stream broke: {message_of(message)}")
    pieces = [
        Piece(
            request_id=answer.id,
            index=choice.index,
            text=choice.words(),
            token_ids=choice.ids(),
            num_accepted=choice.num_accepted,
            logprobs=None if choice.logprobs is None else choice.logprobs.value(choice.ids()),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )
        for choice in answer.choices
    ]
    if answer.usage is None and answer.metrics is None:
        return pieces
    usage = None if answer.usage is None else answer.usage.value()
    last = pieces.pop() if pieces else Piece(request_id=answer.id)
    return [*pieces, replace(last, usage=usage, speculation=answer.speculation())]


class EventReader:
    """Splits a stream of server-sent events into their data, however it was cut up on the way.

    Not by httpx's lines: they end at every character that Unicode calls a line break, and texts
    have such.
    """

    def __init__(self) -> None:
        self._rest = b""
        self.done = False
        """Whether the stream said that it has ended."""

    def feed(self, received: bytes) -> list[bytes]:
        """The data of the events that are complete now."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        found = []
        for line in lines:
            data = line[5:].strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                self.done = True
            elif data and not self.done:
                found.append(data)
        return found


class HttpTransport:
    """HTTP with httpx."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        trust: Trust | None = None,
        network: httpx.BaseTransport | None = None,
    ) -> None:
        self._client = httpx.Client(
            base_url=url,
            headers=_authorization(api_key),
            verify=(trust or Trust()).context(),
            transport=network,
        )

    def open(self, wire: Wire, *, timeout_s: float) -> Generator[bytes, None, None]:
        verb, path = wire.method.split(" ", 1)
        request = self._client.build_request(
            verb, path, content=wire.body, headers=wire.headers, timeout=_timeout(timeout_s)
        )
        with _httpx_errors(), contextlib.closing(self._client.send(request, stream=True)) as reply:
            if reply.status_code >= 400:
                raise http_error(reply.status_code, reply.headers, reply.read())
            if not wire.streaming:
                yield reply.read()
                return
            events = EventReader()
            for received in reply.iter_bytes():
                yield from events.feed(received)
                if events.done:
                    return
            raise ConnectionFailed("the connection ended before the stream did")

    def close(self) -> None:
        self._client.close()


class AsyncHttpTransport:
    """The same, without blocking."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        trust: Trust | None = None,
        network: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._client = httpx.AsyncClient(
            base_url=url,
            headers=_authorization(api_key),
            verify=(trust or Trust()).context(),
            transport=network,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
        )

    async def open(self, wire: Wire, *, timeout_s: float) -> AsyncGenerator[bytes, None]:
        verb, path = wire.method.split(" ", 1)
        request = self._client.build_request(
            verb, path, content=wire.body, headers=wire.headers, timeout=_timeout(timeout_s)
        )
        with _httpx_errors():
            reply = await self._client.send(request, stream=True)
            try:
                if reply.status_code >= 400:
                    raise http_error(reply.status_code, reply.headers, await reply.aread())
                if not wire.streaming:
                    yield await reply.aread()
                    return
                events = EventReader()
                async for received in reply.aiter_bytes():
                    for data in events.feed(received):
                        yield data
                    if events.done:
                        return
                raise ConnectionFailed("the connection ended before the stream did")
            finally:
                await reply.aclose()

    async def close(self) -> None:
        await self._client.aclose()


def _authorization(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _timeout(timeout_s: float) -> httpx.Timeout:
    """httpx has no deadline for a whole reply: a stream that stalls late may take as long again."""
    return httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))


@contextlib.contextmanager
def _httpx_errors() -> Iterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ConnectionFailed(f"no connection: {error or type(error).__name__}") from error
    except httpx.TimeoutException as error:
        raise DeadlineExceeded(f"no answer in time ({type(error).__name__})") from error
    except httpx.TransportError as error:
        raise ConnectionFailed(f"the connection failed: {error or type(error).__name__}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerFailed(f"the answer is not understood: {error}") from error

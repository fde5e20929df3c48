"""`Client` and `AsyncClient`, which differ in nothing but waiting."""

from __future__ import annotations

import asyncio
import contextlib
import time
import types
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping, Sequence
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import msgspec

from paceline.runtime.client.answers import Completion, Health, Loads, Model, Piece, ServerInfo
from paceline.runtime.client.calls import (
    Api,
    Ask,
    AsyncTransport,
    Attempts,
    Call,
    Messages,
    Replay,
    Stream,
    Transport,
    Wire,
)
from paceline.runtime.client.errors import (
    ClientError,
    ConnectionFailed,
    DeadlineExceeded,
    ServerFailed,
    Unavailable,
)
from paceline.runtime.client.trust import Trust
from paceline.runtime.types import SamplingParams

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 600.0
DEFAULT_MAX_RETRIES = 4
HEALTH_TIMEOUT_S = 10.0
ASK_OPTIONS = ("request_id", "priority", "cache_salt", "num_draft_tokens")


class _Base:
    """What both clients are made from."""

    def __init__(
        self, url: str, *, trust: Trust, timeout_s: float, max_retries: int, model: str | None
    ) -> None:
        self.scheme, self.address = split_url(url)
        if not trust.is_default and self.scheme not in ("https", "grpcs"):
            raise ClientError(
                f"ca_certs and client_cert need an https:// or grpcs:// URL, found {self.scheme}://"
            )
        self._trust = trust
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._api = self._make_api(model)

    def _make_api(self, model: str | None) -> Api:
        """Imports only what the scheme needs: HTTP works where grpcio is not installed."""
        if self.scheme in ("http", "https"):
            from paceline.runtime.client.http import HttpApi

            return HttpApi(model=model)
        try:
            from paceline.runtime.client.grpc import GrpcApi
        except ImportError as error:
            raise ClientError(f"grpc:// URLs need grpcio and protobuf: {error}") from error
        return GrpcApi()

    def _attempts(
        self, timeout_s: float | None, max_retries: int | None = None, *, resumes: bool = False
    ) -> Attempts:
        return Attempts(
            timeout_s=self._timeout_s if timeout_s is None else timeout_s,
            max_retries=self._max_retries if max_retries is None else max_retries,
            resumes=resumes,
        )


class Client(_Base):
    """A server's client that blocks. May be used from several threads.

    with Client("http://127.0.0.1:8000") as client:
        print(client.generate("def add(", max_tokens=20, temperature=0).text)

    With https:// and grpcs:// URLs, `ca_certs` is a file of authorities to trust instead of the usual
    ones, and `client_cert` one with a certificate and its key, or a pair of files, for servers that ask
    who calls. `timeout_s` bounds a whole call with all its attempts, and each method takes another; over
    HTTP a stream that stalls late may take as long again. `model` is for servers that hold several.
    `transport` takes the network's place in tests. Methods raise ClientError.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        ca_certs: str | None = None,
        client_cert: str | tuple[str, str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        model: str | None = None,
        transport: Transport | None = None,
    ) -> None:
        super().__init__(
            url,
            trust=Trust(ca_certs=ca_certs, client_cert=client_cert),
            timeout_s=timeout_s,
            max_retries=max_retries,
            model=model,
        )
        self._transport = transport or self._connect(api_key)

    def _connect(self, api_key: str | None) -> Transport:
        if self.scheme in ("http", "https"):
            from paceline.runtime.client.http import HttpTransport

            url = f"{self.scheme}://{self.address}"
            return HttpTransport(url, api_key=api_key, trust=self._trust)
        from paceline.runtime.client.grpc import GrpcTransport

        trust = self._trust if self.scheme == "grpcs" else None
        return GrpcTransport(self.address, trust=trust, api_key=api_key)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **changes: Any,
    ) -> Completion:
        """Continue a text or token ids.

        `changes` are fields of `SamplingParams`, which go before `params`, and `request_id`,
        `priority`, `cache_salt`, `num_draft_tokens`. Raises TypeError for any other.
        """
        return self._answer(self._api.generate(make_ask(params, changes, prompt=prompt)), timeout_s)

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **changes: Any,
    ) -> Generator[Piece, None, None]:
        """`generate`, piece by piece. Closing the iterator ends the request on the server.

        A stream whose connection is lost is asked for again: the server writes the same text once more,
        and what had come is left out.
        """
        return self._pieces(self._api.stream(make_ask(params, changes, prompt=prompt)), timeout_s)

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **changes: Any,
    ) -> Completion:
        """Answer a chat, of which the model's template makes a prompt. HTTP only."""
        return self._answer(self._api.chat(make_ask(params, changes, messages=messages)), timeout_s)

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **changes: Any,
    ) -> Generator[Piece, None, None]:
        """`chat`, piece by piece."""
        ask = make_ask(params, changes, messages=messages)
        return self._pieces(self._api.stream_chat(ask), timeout_s)

    def abort(self, *request_ids: str, timeout_s: float | None = None) -> None:
        """End requests that others wait for: they get what there is, with finish reason `abort`.
        gRPC only. Raises NotFound if one is not running; the others are ended all the same."""
        self._answer(self._api.abort(request_ids), timeout_s)

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """What is served."""
        return self._answer(self._api.models(), timeout_s)

    def health(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> Health:
        """Whether tokens are generated; asked once. Raises ConnectionFailed where nobody answers."""
        try:
            return self._answer(self._api.health(), timeout_s, max_retries=0)
        except (Unavailable, ServerFailed) as error:
            return _unhealthy(error)

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """What the server is and how it is set."""
        return self._answer(self._api.server_info(), timeout_s)

    def loads(self, *, timeout_s: float | None = None) -> Loads:
        """How busy the server is."""
        return self._answer(self._api.loads(), timeout_s)

    def tokenize(self, text: str, *, timeout_s: float | None = None) -> list[int]:
        """A text's token ids, with the special ones that begin a prompt. HTTP only."""
        return self._answer(self._api.tokenize(text), timeout_s)

    def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """The text of token ids. HTTP only."""
        return self._answer(self._api.detokenize(token_ids), timeout_s)

    def close(self) -> None:
        """Close the connections. Safe to call twice."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    def _answer(
        self, call: Call[T], timeout_s: float | None, *, max_retries: int | None = None
    ) -> T:
        return call.read(list(self._messages(call.wire, self._attempts(timeout_s, max_retries))))

    def _pieces(self, stream: Stream, timeout_s: float | None) -> Generator[Piece, None, None]:
        attempts, replay = self._attempts(timeout_s, resumes=True), Replay()
        with contextlib.closing(self._messages(stream.wire, attempts)) as messages:
            for message in messages:
                if new := replay.read(stream.read(message), attempt=attempts.number):
                    attempts.on_news()
                    yield from new

    def _messages(self, wire: Wire, attempts: Attempts) -> Generator[bytes, None, None]:
        while True:
            try:
                reply = self._transport.open(wire, timeout_s=attempts.remaining_s())
                with contextlib.closing(reply):
                    for message in reply:
                        attempts.on_message()
                        yield message
                        attempts.remaining_s()
                return
            except ClientError as error:
                delay_s = attempts.delay_after(error)
            time.sleep(delay_s)


class AsyncClient(_Base):
    """`Client` for an event loop: the same methods, to be awaited or iterated asynchronously.

    async with AsyncClient("grpc://127.0.0.1:50051") as client:
        async for piece in client.stream("def add(", max_tokens=20):
            print(piece.text, end="")

    A stream that is left early is best used within `contextlib.aclosing`: Python closes an
    abandoned asynchronous iterator only some time later.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        ca_certs: str | None = None,
        client_cert: str | tuple[str, str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        model: str | None = None,
        transport: AsyncTransport | None = None,
    ) -> None:
        super().__init__(
            url,
            trust=Trust(ca_certs=ca_certs, client_cert=client_cert),
            timeout_s=timeout_s,
            max_retries=max_retries,
            model=model,
        )
        self._transport = transport or self._connect(api_key)

    def _connect(self, api_key: str | None) -> AsyncTransport:
        if self.scheme in ("http", "https"):
            from paceline.runtime.client.http import AsyncHttpTransport

            url = f"{self.scheme}://{self.address}"
            return AsyncHttpTransport(url, api_key=api_key, trust=self._trust)
        from paceline.runtime.client.grpc import AsyncGrpcTransport

        trust = self._trust if self.scheme == "grpcs" else None
        return AsyncGrpcTransport(self.address, trust=trust, api_key=api_key)

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **changes: Any,
    ) -> Completion:
        """See `Client.generate`."""
        call = self._api.generate(make_ask(params, changes, prompt=prompt))
        return await self._answer(call, timeout_s)

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **changes: Any,
    ) -> AsyncGenerator[Piece, None]:
        """See `Client.stream`."""
        return self._pieces(self._api.stream(make_ask(params, changes, prompt=prompt)), timeout_s)

    async def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **changes: Any,
    ) -> Completion:
        """See `Client.chat`."""
        call = self._api.chat(make_ask(params, changes, messages=messages))
        return await self._answer(call, timeout_s)

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        timeout_s: float | None = None,
        **changes: Any,
    ) -> AsyncGenerator[Piece, None]:
        """See `Client.stream_chat`."""
        ask = make_ask(params, changes, messages=messages)
        return self._pieces(self._api.stream_chat(ask), timeout_s)

    async def abort(self, *request_ids: str, timeout_s: float | None = None) -> None:
        """See `Client.abort`."""
        await self._answer(self._api.abort(request_ids), timeout_s)

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """See `Client.models`."""
        return await self._answer(self._api.models(), timeout_s)

    async def health(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> Health:
        """See `Client.health`."""
        try:
            return await self._answer(self._api.health(), timeout_s, max_retries=0)
        except (Unavailable, ServerFailed) as error:
            return _unhealthy(error)

    async def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """See `Client.server_info`."""
        return await self._answer(self._api.server_info(), timeout_s)

    async def loads(self, *, timeout_s: float | None = None) -> Loads:
        """See `Client.loads`."""
        return await self._answer(self._api.loads(), timeout_s)

    async def tokenize(self, text: str, *, timeout_s: float | None = None) -> list[int]:
        """See `Client.tokenize`."""
        return await self._answer(self._api.tokenize(text), timeout_s)

    async def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """See `Client.detokenize`."""
        return await self._answer(self._api.detokenize(token_ids), timeout_s)

    async def close(self) -> None:
        """Close the connections. Safe to call twice."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        await self.close()

    async def _answer(
        self, call: Call[T], timeout_s: float | None, *, max_retries: int | None = None
    ) -> T:
        attempts = self._attempts(timeout_s, max_retries)
        async with contextlib.aclosing(self._messages(call.wire, attempts)) as messages:
            return call.read([message async for message in messages])

    async def _pieces(self, stream: Stream, timeout_s: float | None) -> AsyncGenerator[Piece, None]:
        attempts, replay = self._attempts(timeout_s, resumes=True), Replay()
        async with contextlib.aclosing(self._messages(stream.wire, attempts)) as messages:
            async for message in messages:
                if new := replay.read(stream.read(message), attempt=attempts.number):
                    attempts.on_news()
                    for piece in new:
                        yield piece

    async def _messages(self, wire: Wire, attempts: Attempts) -> AsyncGenerator[bytes, None]:
        while True:
            try:
                reply = self._transport.open(wire, timeout_s=attempts.remaining_s())
                async with contextlib.aclosing(reply):
                    while (message := await _next(reply, attempts)) is not None:
                        attempts.on_message()
                        yield message
                return
            except ClientError as error:
                delay_s = attempts.delay_after(error)
            await asyncio.sleep(delay_s)


async def _next(reply: AsyncIterator[bytes], attempts: Attempts) -> bytes | None:
    """The next message; None at the end."""
    try:
        async with asyncio.timeout(attempts.remaining_s()):
            return await anext(reply, None)
    except TimeoutError:
        attempts.remaining_s()
        raise DeadlineExceeded("no answer in time") from None


def split_url(url: str) -> tuple[str, str]:
    """A URL's scheme and address. Raises ClientError for what no client here can speak to."""
    form = f"the URL must look like http://HOST:PORT or grpc://HOST:PORT (with TLS: https, grpcs), found {url!r}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ClientError(form) from None
    if parts.scheme in ("http", "https") and parts.hostname:
        path = parts.path.rstrip("/").removesuffix("/v1")  # as people write it for OpenAI's client
        return parts.scheme, parts.netloc + path
    if parts.scheme in ("grpc", "grpcs") and parts.hostname:
        if port is None:
            raise ClientError(
                f"a gRPC URL needs a port, like {parts.scheme}://{parts.hostname}:50051"
            )
        return parts.scheme, parts.netloc
    raise ClientError(form)


def make_ask(
    params: SamplingParams | None,
    changes: Mapping[str, Any],
    *,
    prompt: str | Sequence[int] = "",
    messages: Messages = (),
) -> Ask:
    """A request for text from a method's arguments. Raises TypeError for one that does not
    exist."""
    options = {name: changes[name] for name in ASK_OPTIONS if name in changes}
    changed = {name: value for name, value in changes.items() if name not in ASK_OPTIONS}
    # Without a limit an answer to a chat may be as long as it likes, as in OpenAI's API.
    start = params or (SamplingParams(max_tokens=None) if messages else SamplingParams())
    changed_params = msgspec.structs.replace(start, **changed)
    return Ask(prompt=prompt, messages=messages, params=changed_params, **options)


def _unhealthy(error: ClientError) -> Health:
    if isinstance(error, ConnectionFailed):
        raise error
    return Health(ok=False, message=str(error))

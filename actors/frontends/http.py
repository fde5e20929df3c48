"""The HTTP front: OpenAI's routes and vLLM's, on one `AsyncLLM`.

    request ──> Gate: key, tenant, request id ──> route ──> decode_body ──> TenantLLM.submit
    response <── JSON, or one write per step of the engine as server-sent events <── RequestStream

A client that goes away is noticed by its connection, whatever is being waited for; its requests are
aborted and their blocks are free within a step.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib.metadata
import logging
import math
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import uvicorn
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.actors.engine_set import EngineInfo, FleetError, UnknownEngineError
from paceline.actors.frontends.auth import ADMIN, Keys, load_keys
from paceline.actors.frontends.bounds import MAX_HEAD_BYTES, BoundedProtocol
from paceline.actors.frontends.openai import (
    DONE,
    ApiError,
    ChatBody,
    ChatFormat,
    ChunkFrame,
    CompletionBody,
    CompletionFormat,
    DetokenizeBody,
    EngineBody,
    Format,
    TokenizeBody,
    api_error,
    completion_prompts,
    decode_body,
    error_event,
    field,
    plain_logprobs,
    sampling_params,
    speculation,
    usage,
)
from paceline.actors.frontends.tenants import NOBODY, TenantLLM
from paceline.runtime import caller
from paceline.runtime.async_llm import AsyncLLM, RequestStream
from paceline.runtime.chat import ChatTemplate
from paceline.runtime.config import EngineConfig, ServerConfig
from paceline.runtime.errors import ConfigError, EngineError, PromptError
from paceline.runtime.logs import log_refusal
from paceline.runtime.outputs import CompletionOutput, RequestOutput, empty_output
from paceline.runtime.preflight import Facts
from paceline.runtime.requests import Prompt
from paceline.runtime.tls import TlsFiles
from paceline.runtime.types import EngineRole, EngineStatus, RequestMetrics, SamplingParams

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 2**20
BODY_TIMEOUT_S = 60.0
"""How long a body may take to come."""
BACKLOG = 2048
MAX_PROMPTS = 256
"""Prompts of one body."""
HEALTH_TIMEOUT_S = 5.0
TRACE_HEADERS = (b"traceparent", b"tracestate")
LARGE_BODY_BYTES = 64 * 2**10
"""Larger chats and texts are rendered and tokenised beside the event loop."""
OPEN_PATHS = frozenset(
    {"/", "/health", "/live", "/ready", "/ping", "/metrics", "/version", "/load"}
)
"""What needs no key: those who ask these, probes, scrapers and balancers, have none to send, and learn nothing of
anybody's texts. The page at / asks for the key itself."""
TLS_REFRESH_S = 30.0
"""How often it is looked whether the certificate was replaced."""
BODIES = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, EngineBody)

Exposition = Callable[[str], tuple[bytes, str]]
"""From an Accept header to what /metrics answers and its content type."""
Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class Engines(Protocol):
    """Engines that serve together, and may be changed meanwhile. Satisfied by `Fleet`."""

    def engines(self) -> list[EngineInfo]:
        """All there are."""

    def add_engine(self, role: EngineRole, /) -> str:
        """Start one more; its name. Raises FleetError."""

    def remove_engine(self, engine_id: str, /) -> None:
        """Drain and end one. Raises UnknownEngineError and FleetError."""


class ClientGoneError(Exception):
    """Nobody is left to answer."""


def model_name(config: EngineConfig, server: ServerConfig) -> str:
    """The model's name in the API."""
    return server.served_model_name or config.model


def make_app(
    llm: AsyncLLM,
    facts: Facts,
    config: EngineConfig,
    server: ServerConfig,
    *,
    exposition: Exposition | None = None,
    fleet: Engines | None = None,
) -> ASGIApp:
    """The ASGI application. `exposition` says what /metrics answers, `fleet` are the engines that
    serve together, where several may. Raises ConfigError or ModelError for a chat template that cannot
    be read, or keys that cannot be used."""
    api = _Api(llm, facts, config, server, exposition, fleet)
    app = FastAPI(title="Paceline", version=version(), docs_url=None, redoc_url=None)
    for method, path, endpoint, body, summary in api.routes():
        app.add_api_route(
            path,
            _guarded(endpoint),
            methods=[method],
            response_model=None,
            summary=summary,
            operation_id=f"{method} {path}",
            openapi_extra=_openapi_body(body),
        )
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return Gate(app, keys=load_keys(server))


class HttpServer:
    """An application on a socket."""

    def __init__(
        self, server: uvicorn.Server, listener: socket.socket, tls: TlsFiles | None
    ) -> None:
        self.port: int = listener.getsockname()[1]
        self._server = server
        self._task = asyncio.create_task(server.serve(sockets=[listener]))
        self._refreshing = None if tls is None else asyncio.create_task(self._refresh(tls))

    async def _refresh(self, tls: TlsFiles) -> None:
        """Serve the certificate that is there, whoever replaces it."""
        watched, context = tls.watched(), self._server.config.ssl
        assert context is not None, "expected a server with TLS"
        while True:
            await asyncio.sleep(TLS_REFRESH_S)
            if watched.changed():
                tls.reload(context)

    async def stop(self, grace_s: float) -> None:
        """Close idle connections at once, busy ones after `grace_s`."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        self._server.should_exit = True
        done, _ = await asyncio.wait({self._task}, timeout=grace_s)
        if not done:
            self._server.force_exit = True
            await asyncio.wait({self._task}, timeout=1.0)


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet: who connects before the engine is up is refused.

    Raises ConfigError where the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    listener.setblocking(False)
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    reason = error.strerror or error
    return ConfigError(
        f"cannot listen on {host}:{port}: {reason}; choose another --port, 0 for any"
    )


async def start(
    app: ASGIApp, listener: socket.socket, *, tls: TlsFiles | None = None
) -> HttpServer:
    """Serve an application on a bound socket. Signals are the caller's business. Raises ConfigError
    where somebody else listens there by now, or for TLS that cannot work."""
    if tls is not None:
        tls.check()
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _cannot_listen(host, port, error) from None
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=65,
        ssl_certfile=None if tls is None else tls.certfile,
        ssl_keyfile=None if tls is None else tls.keyfile,
        ssl_ca_certs=None if tls is None else tls.ca_certs,
        ssl_cert_reqs=0 if tls is None else tls.client_certs,
    )
    config.load()
    server = HttpServer(_Server(config), listener, tls)
    while not server._server.started and not server._task.done():
        await asyncio.sleep(0.005)
    if server._task.done():
        raise EngineError("the HTTP server did not start")
    return server


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # they are the command's


class Gate:
    """Before every route: who asks, and under which request id. Every response carries that id."""

    def __init__(self, app: ASGIApp, *, keys: Keys | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        named = re.fullmatch(r"[\x21-\x7e]{1,200}", given) is not None
        scope["request_id_given"] = named
        scope["request_id"] = given if named else uuid.uuid4().hex
        trace = (headers.get(name, b"").decode("latin-1") for name in TRACE_HEADERS)
        caller.enter(scope["request_id"], *trace)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                log_refusal(scope, message["status"])
                request_id = scope["request_id"].encode()
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            scope["tenant"] = self._admit(scope, headers)
        except ApiError as refusal:
            await _error_response(refusal)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Whose request it is. Raises ApiError for one that is nobody's, or must not be answered."""
        parts = (
            scope["path"].encode(),
            scope["query_string"],
            *(b for h in scope["headers"] for b in h),
        )
        if sum(map(len, parts)) > MAX_HEAD_BYTES:
            raise ApiError(431, f"path and headers may have {MAX_HEAD_BYTES} bytes")
        if headers.get(b"sec-fetch-site") == b"cross-site" and scope["method"] != "GET":
            # a server on a developer's own machine needs no key, and any page may post there
            raise ApiError(403, "pages of other sites may not ask this server", code="cross_site")
        if self._keys is None or scope["path"] in OPEN_PATHS:
            return NOBODY
        tenant = self._keys.tenant_of(headers.get(b"authorization", b""))
        if tenant is None:
            message = "a valid API key is needed as a bearer token"
            raise ApiError(401, message, code="invalid_api_key")
        changes_engines = scope["path"].startswith("/engines") and scope["method"] != "GET"
        if changes_engines and not self._keys.is_admin(tenant):
            message = f"only keys of the tenant {ADMIN} may change engines"
            raise ApiError(403, message, code="admin_needed")
        return tenant


@dataclass(slots=True, kw_only=True)
class _Call:
    """One body on its way: its prompts, and how to say what comes of them."""

    id: str
    created: int
    form: Format
    body: CompletionBody | ChatBody
    streams: list[RequestStream]
    echoes: list[str]
    num_texts: int
    """Per prompt."""

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    def index(self, prompt: int, text: int) -> int:
        return prompt * self.num_texts + text


class _Api:
    """The routes."""

    def __init__(
        self,
        llm: AsyncLLM,
        facts: Facts,
        config: EngineConfig,
        server: ServerConfig,
        exposition: Exposition | None,
        fleet: Engines | None,
    ) -> None:
        self._llm = llm
        self._facts = facts
        self._config = config
        self._server = server
        self._exposition = exposition
        self._fleet = fleet
        self._name = model_name(config, server)
        self._started = time.time()
        self._started_s = time.monotonic()
        spec = config.speculative_config
        self._num_spec_tokens = 0 if spec is None else spec.num_speculative_tokens
        self._chat = (
            None
            if facts.tokenizer is None
            else ChatTemplate(facts.tokenizer, file=server.chat_template)
        )
        page = Path(__file__).with_name("page.html").read_text()
        self._page = HTMLResponse(page, headers=_page_headers(page))

    def routes(self) -> list[tuple[str, str, Endpoint, type[msgspec.Struct] | None, str]]:
        """Method, path, endpoint, body, and what it is."""
        return [
            ("POST", "/v1/completions", self.completions, CompletionBody, "Continue prompts."),
            ("POST", "/v1/chat/completions", self.chat, ChatBody, "Answer a chat."),
            ("GET", "/v1/models", self.models, None, "The one model that is served."),
            ("GET", "/v1/models/{model:path}", self.model, None, "What is known of a model."),
            ("POST", "/tokenize", self.tokenize, TokenizeBody, "Token ids of a text or a chat."),
            ("POST", "/detokenize", self.detokenize, DetokenizeBody, "The text of token ids."),
            ("GET", "/health", self.health, None, "200 while tokens can be generated."),
            (
                "GET",
                "/live",
                self.live,
                None,
                "200 while tokens come, or engines that do come back.",
            ),
            ("GET", "/ready", self.ready, None, "200 while new requests would be served."),
            ("GET", "/ping", self.health, None, "The same as /health."),
            ("POST", "/ping", self.health, None, "The same."),
            ("GET", "/metrics", self.metrics, None, "Prometheus' exposition."),
            ("GET", "/version", self.version, None, "Paceline's version."),
            ("GET", "/load", self.load, None, "Requests in flight, and how they are drafted for."),
            ("GET", "/engines", self.engines, None, "The engines that serve together."),
            ("POST", "/engines", self.add_engine, EngineBody, "Start one more engine."),
            (
                "DELETE",
                "/engines/{engine_id}",
                self.remove_engine,
                None,
                "Drain and end an engine.",
            ),
            ("GET", "/live/status", self.live_status, None, "The engine, for the page."),
            ("GET", "/", self.page, None, "The page."),
        ]

    async def completions(self, request: Request) -> Response:
        body = decode_body(await _read_body(request), CompletionBody)
        self._check_model(body.model)
        params = sampling_params(body)
        prompts = completion_prompts(body)
        if len(prompts) > MAX_PROMPTS:
            raise ApiError(400, f"prompt may have {MAX_PROMPTS} prompts", param="prompt")
        given: list[Prompt] = [
            p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts
        ]
        form = CompletionFormat(
            self._facts.tokenizer, token_ids=body.return_token_ids, num_top=params.logprobs
        )
        call = await self._submit(request, body, params, given, form)
        if body.echo:
            call.echoes = [self._prompt_text(stream) for stream in call.streams]
        return await self._answer(request, call)

    async def chat(self, request: Request) -> Response:
        raw = await _read_body(request)
        body = decode_body(raw, ChatBody)
        self._check_model(body.model)
        params = sampling_params(body)

        def prompt() -> list[int]:
            return self._chat_tokens(
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                settings=body.chat_template_kwargs,
            )

        token_ids = await _beside(prompt, large=len(raw) > LARGE_BODY_BYTES)
        form = ChatFormat(
            self._facts.tokenizer, token_ids=body.return_token_ids, num_top=params.logprobs
        )
        call = await self._submit(request, body, params, [{"prompt_token_ids": token_ids}], form)
        return await self._answer(request, call)

    async def models(self, request: Request) -> Response:  # noqa: ARG002
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return _json(self._card())

    async def tokenize(self, request: Request) -> Response:
        raw = await _read_body(request)
        body = decode_body(raw, TokenizeBody)
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt or messages: exactly one of them", param="prompt")
        if self._facts.tokenizer is None:
            raise ApiError(400, f"{self._name} has no tokenizer")
        tokenizer = self._facts.tokenizer

        def tokens() -> list[int]:
            if body.messages is not None:
                return self._chat_tokens(
                    body.messages,
                    add_generation_prompt=body.add_generation_prompt,
                    settings=body.chat_template_kwargs,
                )
            assert body.prompt is not None, "checked above"
            return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)

        token_ids = await _beside(tokens, large=len(raw) > LARGE_BODY_BYTES)
        strings = [tokenizer.token(i) for i in token_ids] if body.return_token_strs else None
        return _json(
            {
                "count": len(token_ids),
                "max_model_len": self._facts.max_model_len,
                "tokens": token_ids,
                "token_strs": strings,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        body = decode_body(await _read_body(request), DetokenizeBody)
        self._check_model(body.model)
        if self._facts.tokenizer is None:
            raise ApiError(400, f"{self._name} has no tokenizer")
        vocab_size = self._facts.arch.vocab_size
        bad = next((i for i in body.tokens if not 0 <= i < vocab_size), None)
        if bad is not None:
            message = f"tokens: id {bad} is outside the vocabulary of {vocab_size}"
            raise ApiError(400, message, param="tokens")
        text = self._facts.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return _json({"prompt": text})

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        if self._llm.draining:
            raise ApiError(503, "the server is shutting down", code="engine_unavailable")
        if not await self._llm.check_health(timeout_s=HEALTH_TIMEOUT_S):
            reason = self._llm.lost or f"no token came within {HEALTH_TIMEOUT_S:g} s"
            raise ApiError(503, f"the engine is not well: {reason}", code="engine_unavailable")
        return Response(status_code=200)

    async def live(self, request: Request) -> Response:  # noqa: ARG002
        """Whether there is a point in this process going on: for those who would end it if not."""
        llm = self._llm
        if llm.draining or await llm.check_health(timeout_s=HEALTH_TIMEOUT_S):
            return Response(status_code=200)
        if llm.lost is None and not self._serving():
            return _json({"status": "engines are being started"})
        raise ApiError(503, "no token comes", code="engine_unavailable")

    async def ready(self, request: Request) -> Response:  # noqa: ARG002
        """Whether new requests shall come here."""
        if self._llm.draining:
            raise ApiError(503, "the server is shutting down", code="engine_unavailable")
        if self._llm.lost is not None or not self._serving():
            raise ApiError(503, "no engine serves", code="engine_unavailable", retry_after_s=1.0)
        return Response(status_code=200)

    def _serving(self) -> bool:
        """Whether some engine writes texts and has all of its ranks."""
        status = self._llm.status()
        engines = status.members if self._fleet is not None else (status,)
        return any(not each.restarting and each.role != "prefill" for each in engines)

    async def metrics(self, request: Request) -> Response:
        if self._exposition is None:
            raise ApiError(404, "this server exposes no metrics")
        body, content_type = self._exposition(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def version(self, request: Request) -> Response:  # noqa: ARG002
        return _json({"version": version()})

    async def load(self, request: Request) -> Response:  # noqa: ARG002
        ways = self._llm.status().ways
        drafting = {"drafting": ways} if ways else {}
        return _json({"server_load": self._llm.num_in_flight, **drafting})

    async def engines(self, request: Request) -> Response:  # noqa: ARG002
        fleet, members = self._engines(), self._members()
        infos = await asyncio.to_thread(fleet.engines)
        listed = [_engine_card(each, members.get(each.engine_id)) for each in infos]
        return _json({"object": "list", "data": listed})

    async def add_engine(self, request: Request) -> Response:
        fleet = self._engines()
        body = decode_body(await _read_body(request), EngineBody)
        self._check_not_draining()
        engine_id = await asyncio.to_thread(self._conflicting, fleet.add_engine, body.role)
        return _json({"engine_id": engine_id, "role": body.role, "state": "starting"}, status=202)

    async def remove_engine(self, request: Request) -> Response:
        fleet, engine_id = self._engines(), request.path_params["engine_id"]
        self._check_not_draining()
        await asyncio.to_thread(self._conflicting, fleet.remove_engine, engine_id)
        return _json({"engine_id": engine_id, "state": "draining"}, status=202)

    async def live_status(self, request: Request) -> Response:  # noqa: ARG002
        status = msgspec.structs.replace(self._llm.status(), steps=tuple(self._llm.recent_steps))
        engines = [] if self._fleet is None else await asyncio.to_thread(self._fleet.engines)
        return _json(
            {
                "model": self._name,
                "engines": [_engine_card(each, None) for each in engines],
                "config": self._config,
                "status": status,
                "uptime_s": time.monotonic() - self._started_s,
            }
        )

    async def page(self, request: Request) -> Response:  # noqa: ARG002
        return self._page

    # Parts of the above

    def _engines(self) -> Engines:
        if self._fleet is None:
            raise ApiError(
                404,
                "one engine serves alone here: start the server with prefill_replicas, decode_replicas or "
                "a kv_transfer_config to have several",
            )
        return self._fleet

    def _members(self) -> dict[str, EngineStatus]:
        return {each.engine_id: each for each in self._llm.status().members}

    def _check_not_draining(self) -> None:
        if self._llm.draining:
            raise ApiError(503, "the server is shutting down", code="engine_unavailable")

    def _conflicting(self, change: Callable[[Any], T], what: Any) -> T:
        """Change the fleet. Raises ApiError for what it does not have or will not do."""
        try:
            return change(what)
        except UnknownEngineError as error:
            raise ApiError(404, str(error), param="engine_id", code="engine_not_found") from None
        except FleetError as error:
            raise ApiError(409, str(error), code="engine_needed") from None

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": int(self._started),
            "owned_by": "paceline",
            "root": self._config.model,
            "parent": None,
            "max_model_len": self._facts.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._name:
            message = f"the model {name[:200]!r} does not exist; served is {self._name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _chat_tokens(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        settings: dict[str, Any] | None,
    ) -> list[int]:
        if self._chat is None:
            raise PromptError(f"messages need a tokenizer, and {self._name} has none")
        text = self._chat.render(
            messages, add_generation_prompt=add_generation_prompt, settings=settings
        )
        return self._chat.encode(text)

    def _prompt_text(self, stream: RequestStream) -> str:
        job = stream.job
        if job.prompt is not None or self._facts.tokenizer is None:
            return job.prompt or ""
        return self._facts.tokenizer.decode(job.prompt_token_ids)

    async def _submit(
        self,
        request: Request,
        body: CompletionBody | ChatBody,
        params: SamplingParams,
        prompts: Sequence[Prompt],
        form: Format,
    ) -> _Call:
        """Admit all prompts of a body, or none."""
        llm = TenantLLM(self._llm, request.scope["tenant"])
        name = self._request_id(request, body, form, llm)
        retry_key = body.request_id or request.headers.get("idempotency-key")
        streams: list[RequestStream] = []
        try:
            for i, prompt in enumerate(prompts):
                stream = await llm.submit(
                    prompt,
                    params,
                    request_id=name if len(prompts) == 1 else f"{name}-{i}",
                    num_draft_tokens=body.num_draft_tokens,
                    priority=body.priority,
                    cache_salt=body.cache_salt,
                    session_id=_session_id(request, body),
                    retry_key=None if retry_key is None else f"{retry_key}-{i}",
                )
                streams.append(stream)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return _Call(
            id=name,
            created=int(time.time()),
            form=form,
            body=body,
            streams=streams,
            echoes=[""] * len(streams),
            num_texts=params.n,
        )

    def _request_id(
        self, request: Request, body: CompletionBody | ChatBody, form: Format, llm: TenantLLM
    ) -> str:
        """The body's, which must be free, or the header's. Several requests of one trace may share a
        header, so one that is in use is only taken as a beginning."""
        if body.request_id is not None:
            if not re.fullmatch(r"[\x21-\x7e]{1,200}", body.request_id):
                message = "request_id must be 1 to 200 visible ASCII characters"
                raise ApiError(400, message, param="request_id")
            request.scope["request_id"] = caller.current().request_id = body.request_id
            return form.id_prefix + body.request_id
        name: str = form.id_prefix + request.scope["request_id"]
        return f"{name}-{uuid.uuid4().hex[:8]}" if llm.knows(name) else name

    async def _answer(self, request: Request, call: _Call) -> Response:
        if call.body.stream:
            return _EventStream(self._events(call), close=call.close)
        try:
            wholes = await _unless_gone(request, _gather(call))
        finally:
            call.close()
        choices = []
        for prompt, whole in enumerate(wholes):
            for output in whole.outputs:
                if output.finish_reason == "error":
                    raise ApiError(500, output.error or "the engine could not go on")
                index = call.index(prompt, output.index)
                echo = call.echoes[prompt]
                choices.append(call.form.choice(index, output, whole, echo=echo))
        metrics = [o.metrics for whole in wholes for o in whole.outputs if o.metrics is not None]
        answer = {
            "id": call.id,
            "object": call.form.kind,
            "created": call.created,
            "model": self._name,
            **self._extra(call.body),
            "choices": choices,
            "usage": usage(
                num_prompt_tokens=sum(len(whole.prompt_token_ids) for whole in wholes),
                num_tokens=sum(len(o.token_ids) for whole in wholes for o in whole.outputs),
                num_cached_tokens=sum(whole.num_cached_tokens for whole in wholes),
                metrics=metrics,
            ),
        }
        if isinstance(call.form, ChatFormat) and wholes[0].prompt_logprobs is not None:
            answer["prompt_logprobs"] = plain_logprobs(wholes[0].prompt_logprobs)
        if self._wants_metrics(call.body):
            answer["metrics"] = self._speculation(metrics)
        return _json(answer)

    async def _events(self, call: _Call) -> AsyncIterator[bytes]:
        """Server-sent events, one item per step of the engine."""
        body, form = call.body, call.form
        options = body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        every_usage = with_usage and options is not None and bool(options.continuous_usage_stats)
        no_usage = b',"usage":null' if with_usage and not every_usage else b""
        frame = ChunkFrame(
            form,
            response_id=call.id,
            created=call.created,
            model=self._name,
            extra=self._extra(body),
        )
        silent = not body.return_token_ids  # a part without text then says nothing
        unopened = {
            call.index(p, t) for p in range(len(call.streams)) for t in range(call.num_texts)
        }
        num_tokens, metrics = 0, list[RequestMetrics]()
        try:
            async for prompt, output in _merge(call.streams):
                events = []
                for part in output.outputs:
                    num_tokens += len(part.token_ids)
                    if part.metrics is not None:
                        metrics.append(part.metrics)
                    if part.finish_reason == "error":
                        raise ApiError(500, part.error or "the engine could not go on")
                    if silent and _says_nothing(part):
                        continue
                    index = call.index(prompt, part.index)
                    first = None
                    if index in unopened:
                        unopened.discard(index)
                        first = call.streams[prompt].job
                    choice = form.chunk(index, part, first=first, echo=call.echoes[prompt])
                    tail = no_usage
                    if every_usage:
                        tail = field("usage", self._usage(call, num_tokens, []))
                    events.append(frame.event(choice, tail=tail))
                if events:
                    yield b"".join(events)
        except Exception as error:
            yield error_event(_as_api_error(error, call.id)) + DONE
            return
        tail = field("usage", self._usage(call, num_tokens, metrics)) if with_usage else b""
        if self._wants_metrics(body):
            tail += field("metrics", self._speculation(metrics))
        yield (frame.event(b"", tail=tail) if tail else b"") + DONE

    def _usage(
        self, call: _Call, num_tokens: int, metrics: Sequence[RequestMetrics]
    ) -> dict[str, Any]:
        return usage(
            num_prompt_tokens=sum(len(s.job.prompt_token_ids) for s in call.streams),
            num_tokens=num_tokens,
            num_cached_tokens=sum(s.num_cached_tokens for s in call.streams),
            metrics=metrics,
        )

    def _extra(self, body: CompletionBody | ChatBody) -> dict[str, Any]:
        """What changes the text is named in the response."""
        policy = body.kv_policy
        return {} if policy in (None, "full") else {"kv_policy": policy}

    def _wants_metrics(self, body: CompletionBody | ChatBody) -> bool:
        return body.return_metrics or self._server.per_request_spec_decode_metrics

    def _speculation(self, metrics: Sequence[RequestMetrics]) -> dict[str, Any] | None:
        return speculation(metrics, num_spec_tokens=self._num_spec_tokens)


class _EventStream(Response):
    """Server-sent events, written as they come; `close` is called when the client is gone and at the
    end."""

    def __init__(self, events: AsyncIterator[bytes], *, close: Callable[[], None]) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        watcher = asyncio.create_task(self._close_when_gone(receive))
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for events in self._events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            watcher.cancel()
            self._close()

    async def _close_when_gone(self, receive: Receive) -> None:
        await _gone(receive)
        self._close()


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGoneError."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()


async def _gather(call: _Call) -> list[RequestOutput]:
    """The whole outputs of all prompts."""

    async def whole(stream: RequestStream) -> RequestOutput:
        total = empty_output(stream.job)
        async for part in stream:
            total.add(part)
        return total

    return list(await asyncio.gather(*(whole(stream) for stream in call.streams)))


async def _merge(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Outputs of all streams as they come, each with its stream's number."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = waiting.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    output = task.result()
                    waiting[asyncio.ensure_future(anext(streams[i]))] = i
                    yield i, output
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)  # several may have failed at once


def _engine_card(info: EngineInfo, status: EngineStatus | None) -> dict[str, Any]:
    """An engine, and how it is where that is known."""
    card: dict[str, Any] = {
        "object": "engine",
        "id": info.engine_id,
        "role": info.role,
        "state": info.state,
        "error": info.error or None,
    }
    if status is not None:
        card |= {
            "num_running": status.num_running,
            "num_waiting": status.num_waiting,
            "num_blocks": status.num_blocks,
            "num_free_blocks": status.num_free_blocks,
            "links": list(status.links.addresses),
            "transfers": msgspec.structs.asdict(status.transfers),
        }
    return card


def _says_nothing(part: CompletionOutput) -> bool:
    return not (part.text or part.finish_reason or part.logprobs)


def _guarded(endpoint: Endpoint) -> Endpoint:
    """The endpoint with every error it can raise as a response."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except (ClientGoneError, ClientDisconnect):
            return _error_response(ApiError(499, "the client closed the connection"))
        except Exception as error:
            return _error_response(_as_api_error(error, request.scope["request_id"]))

    return guarded


def _as_api_error(error: Exception, request_id: str) -> ApiError:
    try:
        return api_error(error)
    except Exception:
        logger.exception("request %s", request_id)
        return ApiError(500, "internal error; the server's log says more")


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, or not with this method."""
    assert isinstance(error, HTTPException), "registered for these"
    message = {
        404: f"no such path: {request.url.path[:200]}",
        405: f"{request.method} is not allowed for {request.url.path[:200]}",
    }.get(error.status_code, str(error.detail))
    response = _error_response(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


def _error_response(error: ApiError) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return _json(error.body, status=error.status, headers=headers)


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = msgspec.json.encode(value)
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def _session_id(request: Request, body: CompletionBody | ChatBody) -> str:
    """The body's own word for it, or the header's, or OpenAI's."""
    header = request.headers.get("x-session-id")
    return body.session_id or header or body.prompt_cache_key or ""


async def _read_body(request: Request) -> bytes:
    """The body, within its limits. Raises ApiError beyond them."""
    error = ApiError(413, f"the body may have {MAX_BODY_BYTES} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise error
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise error
    except TimeoutError:
        raise ApiError(408, f"the body may take {BODY_TIMEOUT_S:g} s to come") from None
    return bytes(body)


async def _beside(function: Callable[[], T], *, large: bool) -> T:
    """Call what takes long for large bodies in a thread, so that the event loop goes on."""
    return await asyncio.to_thread(function) if large else function()


def version() -> str:
    """Paceline's own."""
    return importlib.metadata.version("paceline")


def _page_headers(page: str) -> dict[str, str]:
    """The page may run its own script and style, and talk to this server alone."""

    def allowed(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests) or "'none'"

    policy = {
        "default-src": "'none'",
        "script-src": allowed("script"),
        "style-src": allowed("style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {"content-security-policy": "; ".join(f"{k} {v}" for k, v in policy.items())}


def _openapi_body(body: type[msgspec.Struct] | None) -> dict[str, Any]:
    error = {"description": "An error in OpenAI's shape.", "content": {"application/json": {}}}
    extra: dict[str, Any] = {"responses": {"200": {"description": "Done."}, "default": error}}
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        extra["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return extra


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with our bodies in it."""
    described = FastAPI.openapi(app)
    _, components = msgspec.json.schema_components(
        BODIES, ref_template="#/components/schemas/{name}"
    )
    described.setdefault("components", {}).setdefault("schemas", {}).update(components)
    return described

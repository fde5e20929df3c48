"""A client of OpenAI-compatible servers that costs little: it shares the machine with what it measures.

Client ──> Connection ──bytes──> HTTP parser ──body──> Answer
           kept alive            within one callback   events, each with its time
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import httptools
import msgspec

IDLE_S = 2.0
"""A connection idle for longer is not used again: servers close theirs after about five seconds."""


# What a server says


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def shown(self) -> str:
        if self.delta is None:
            return self.text or ""
        return self.delta.content or self.delta.reasoning or self.delta.reasoning_content or ""


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0


class _Speculation(msgspec.Struct):
    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    acceptance_histogram: list[int] = []


class _Metrics(msgspec.Struct):
    speculative_decoding: _Speculation | None = None


class _Chunk(msgspec.Struct):
    """The fields that matter; the decoder skips all others."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    metrics: _Metrics | None = None
    error: msgspec.Raw | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """How drafting went: of some requests, or of a server since it started."""

    drafts: int = 0
    """Rounds that drafted."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: tuple[int, ...] = ()
    """Entry i counts the rounds in which the i-th draft was accepted."""

    def plus(self, other: Acceptance, *, sign: int = 1) -> Acceptance:
        longest = max(len(self.accepted_at), len(other.accepted_at))
        mine, its = (a.accepted_at + (0,) * (longest - len(a.accepted_at)) for a in (self, other))
        return Acceptance(
            drafts=self.drafts + sign * other.drafts,
            draft_tokens=self.draft_tokens + sign * other.draft_tokens,
            accepted_tokens=self.accepted_tokens + sign * other.accepted_tokens,
            accepted_at=tuple(a + sign * b for a, b in zip(mine, its, strict=True)),
        )

    def row(self) -> dict[str, Any]:
        """vLLM's keys; none where nothing was drafted."""
        if self.drafts <= 0 or self.draft_tokens <= 0:
            return {}
        return {
            "spec_decode_acceptance_rate": 100 * self.accepted_tokens / self.draft_tokens,
            "spec_decode_acceptance_length": 1 + self.accepted_tokens / self.drafts,
            "spec_decode_num_drafts": self.drafts,
            "spec_decode_draft_tokens": self.draft_tokens,
            "spec_decode_accepted_tokens": self.accepted_tokens,
            "spec_decode_per_position_acceptance_rates": [
                count / self.drafts for count in self.accepted_at
            ],
        }


_COUNTER = re.compile(
    r"^(?P<prefix>\w+):spec_decode_num_(?P<what>drafts|draft_tokens|accepted_tokens)"
    r"(?P<per_pos>_per_pos)?(?:_total)?(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)",
    re.MULTILINE,
)


def read_counters(exposition: str) -> Acceptance | None:
    """The speculation counters of a server's /metrics, vLLM's or ours, summed over engines; None
    where it has none.

    A server that exposes them under two prefixes is read under the first.
    """
    found, at, prefix = Counter[str](), Counter[int](), None
    for match in _COUNTER.finditer(exposition):
        prefix = prefix or match["prefix"]
        if match["prefix"] != prefix:
            continue
        value = int(float(match["value"]))
        if match["per_pos"] is None:
            found[match["what"]] += value
        else:
            position = re.search(r'position="(\d+)"', match["labels"] or "")
            if position is not None:
                at[int(position[1])] += value
    if prefix is None:
        return None
    return Acceptance(
        drafts=found["drafts"],
        draft_tokens=found["draft_tokens"],
        accepted_tokens=found["accepted_tokens"],
        accepted_at=tuple(at[i] for i in range(max(at, default=-1) + 1)),
    )


class Answer:
    """One request's answer, read and timed as it arrives.

    An event counts as a token's arrival where it shows text: some servers open a chat with the role
    alone, before anything is generated. How many tokens there are the usage says, never the events.
    """

    def __init__(self) -> None:
        self.start_s = 0.0
        self.end_s = 0.0
        """When the last event with a choice came."""
        self.closed_s = 0.0
        """When the body was complete."""
        self.arrivals_s: list[float] = []
        self.text: list[str] = []
        self.usage: _Usage | None = None
        self.speculation: _Speculation | None = None
        self.error: str | None = None
        self.status: int | None = None
        """None where no whole answer came."""
        self.retry_after_s: float | None = None
        """When the server would rather be asked again."""
        self.num_chunks = 0
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Some bytes of the body, cut anywhere."""
        now = time.perf_counter()
        if b"\r" in data:  # JSON has none unescaped
            data = data.replace(b"\r", b"")
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._take(line[5:].strip(), now)

    def _take(self, body: bytes, now: float) -> None:
        if body == b"[DONE]":
            return
        try:
            chunk = _decode(body)
        except msgspec.DecodeError as error:
            self.error = f"an event that is not a chunk ({error}): {_short(body)}"
            return
        self.num_chunks += 1
        if chunk.error is not None:
            self.error = _short(bytes(chunk.error))
        if chunk.choices:
            self.end_s = now
            shown = chunk.choices[0].shown
            if shown:
                self.arrivals_s.append(now)
                self.text.append(shown)
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.metrics is not None:
            self.speculation = chunk.metrics.speculative_decoding

    def close(self, status: int) -> None:
        """The body is complete: say what is wrong with it, if anything is."""
        self.status, self.closed_s = status, time.perf_counter()
        if status != 200:
            self.error = f"HTTP {status}: {_short(self._rest)}"
        elif self.error is None and not self.end_s:
            self.error = "the answer had no choices"
        elif self.error is None and self.usage is None:
            self.error = "no usage in the answer: the server ignores stream_options.include_usage"

    @property
    def num_tokens(self) -> int:
        return 0 if self.usage is None else self.usage.completion_tokens

    @property
    def ttft_s(self) -> float:
        """To the first text; to the end where tokens show none."""
        return (self.arrivals_s[0] if self.arrivals_s else self.end_s) - self.start_s

    @property
    def e2el_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first; None where there is none."""
        more = self.num_tokens - 1
        return (self.e2el_s - self.ttft_s) / more if more > 0 else None

    @property
    def itl_s(self) -> list[float]:
        """Between events that show text. An event may hold several tokens."""
        return [b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


def _seconds(header: bytes) -> float | None:
    """Of a Retry-After; None for a date, which our servers never send."""
    try:
        return float(header)
    except ValueError:
        return None


def _short(body: bytes) -> str:
    return " ".join(body.decode(errors="replace").split())[:300]


# How it is asked


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one exchange at a time.

    Bytes go from the socket through the parser into `on_body` within one callback of the event
    loop: no task wakes per event, which is most of what a general client costs.
    """

    def __init__(self) -> None:
        self.idle_since_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._done: asyncio.Future[int] | None = None
        self._keep = True
        self.retry_after: bytes | None = None
        """That header of the last answer."""
        self.on_body: Callable[[bytes], None] = lambda _: None

    async def exchange(self, request: bytes, on_body: Callable[[bytes], None]) -> int:
        """Send a request and pass its answer's body on, piece by piece; the answer's status.

        Raises ConnectionError where the answer is not complete.
        """
        assert self._transport is not None, "a connection is made before it is used"
        self.on_body = on_body  # before the parser, which looks its callbacks up once
        self.retry_after = None
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(request)
            status = await self._done
            self.idle_since_s = time.perf_counter()
            return status
        except BaseException:  # whatever is still on the way would be taken for the next answer
            self._transport.abort()
            raise
        finally:
            self._parser = self._done = None

    @property
    def usable(self) -> bool:
        assert self._transport is not None, "a connection is made before it is used"
        recent = time.perf_counter() - self.idle_since_s < IDLE_S
        return recent and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # The transport calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by shape alone

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            self.close()  # bytes that nobody asked for
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the answer is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc}" if exc else ""
        self._fail(ConnectionError(f"the server closed the connection within an answer{reason}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.retry_after = value

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._keep = self._parser.should_keep_alive()

    def on_message_complete(self) -> None:
        assert self._parser is not None
        assert self._transport is not None
        if not self._keep:
            self._transport.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(self._parser.get_status_code())

    def _fail(self, error: ConnectionError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class Client:
    """Connections to one server, used again where they can be."""

    def __init__(self, base_url: str, *, api_key: str | None, timeout_s: float) -> None:
        url = urllib.parse.urlsplit(base_url)
        if url.scheme not in ("http", "https") or url.hostname is None:
            raise SystemExit(f"--base-url must look like http://127.0.0.1:8000, found {base_url}")
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if url.scheme == "https" else None
        self._path = url.path.rstrip("/")
        self._timeout_s = timeout_s
        self._idle: list[Connection] = []
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {url.netloc.rpartition('@')[2]}\r\n{key}"

    async def ask(self, path: str, body: bytes) -> Answer:
        """One streamed answer. What goes wrong is in its `error`: a failure is a result."""
        head = (
            f"POST {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        answer = Answer()
        answer.start_s = time.perf_counter()
        try:
            connection, status = await self._exchange(head.encode() + body, answer.feed)
            answer.close(status)
            if connection.retry_after is not None:
                answer.retry_after_s = _seconds(connection.retry_after)
        except TimeoutError:
            answer.error = f"no complete answer within {self._timeout_s:g} s"
        except OSError as error:
            answer.error = str(error) or type(error).__name__
        return answer

    async def get(self, path: str) -> str:
        """A whole body. Raises OSError, which TimeoutError is too, for any status but 200."""
        head = f"GET {self._path}{path} HTTP/1.1\r\n{self._headers}\r\n"
        return await self._whole(head.encode(), path)

    async def post(self, path: str, body: bytes) -> str:
        """Likewise."""
        head = (
            f"POST {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return await self._whole(head.encode() + body, path)

    async def _whole(self, request: bytes, path: str) -> str:
        parts: list[bytes] = []
        _, status = await self._exchange(request, parts.append)
        if status != 200:
            raise ConnectionError(f"HTTP {status} for {path}: {_short(b''.join(parts))}")
        return b"".join(parts).decode()

    async def _exchange(
        self, request: bytes, on_body: Callable[[bytes], None]
    ) -> tuple[Connection, int]:
        """The connection, at rest again, and the answer's status."""
        async with asyncio.timeout(self._timeout_s):
            connection = await self._connection()
            status = await connection.exchange(request, on_body)
        self._idle.append(connection)
        return connection, status

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(Connection, self._host, self._port, ssl=self._ssl)
        return made

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

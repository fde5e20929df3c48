"""What a client asks, before and after it has a wire format, and whether it asks again.

Ask ──Api──> Call or Stream: a Wire, and how to read the messages of the reply (pure)
              │
Attempts ──> Transport.open(wire) ──> messages
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from paceline.runtime.client.answers import Completion, Health, Loads, Model, Piece, ServerInfo
from paceline.runtime.client.errors import (
    ClientError,
    ConnectionFailed,
    DeadlineExceeded,
    ServerFailed,
    StreamBroken,
    Unavailable,
)
from paceline.runtime.types import SamplingParams

T = TypeVar("T")

MAX_BACKOFF_S = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What a transport sends."""

    method: str
    """An HTTP verb and path, or the name of a gRPC method."""
    body: bytes = b""
    streaming: bool = False
    """Whether the reply has several messages."""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """A question and how to read the messages of its answer."""

    wire: Wire
    read: Callable[[list[bytes]], T]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The same for an answer that is read while it comes. `read` is called once per message, in
    order."""

    wire: Wire
    read: Callable[[bytes], list[Piece]]


Messages = Sequence[Mapping[str, Any]]
"""Of a chat: each has `role` and `content`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request for text, before it has a wire format."""

    prompt: str | Sequence[int] = ""
    messages: Messages = ()
    """Of a chat, instead of a prompt."""
    params: SamplingParams
    request_id: str | None = None
    priority: int = 0
    cache_salt: str = ""
    num_draft_tokens: int | None = None
    retry_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Whoever asks again under it gets the same text."""


class Api(Protocol):
    """Says what to send for each question, and how to read the answer. Pure: builds values, does
    nothing. Raises RequestRejected for what it cannot carry."""

    def generate(self, ask: Ask, /) -> Call[Completion]: ...
    def stream(self, ask: Ask, /) -> Stream: ...
    def chat(self, ask: Ask, /) -> Call[Completion]: ...
    def stream_chat(self, ask: Ask, /) -> Stream: ...
    def abort(self, request_ids: Sequence[str], /) -> Call[None]: ...
    def models(self) -> Call[list[Model]]: ...
    def health(self) -> Call[Health]: ...
    def server_info(self) -> Call[ServerInfo]: ...
    def loads(self) -> Call[Loads]: ...
    def tokenize(self, text: str, /) -> Call[list[int]]: ...
    def detokenize(self, token_ids: Sequence[int], /) -> Call[str]: ...


class Transport(Protocol):
    """Carries a call. Raises ClientError, and nothing else."""

    def open(self, wire: Wire, *, timeout_s: float) -> Generator[bytes, None, None]:
        """The reply's messages as they come. Closing the iterator cancels the call."""

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """The same, without blocking."""

    def open(self, wire: Wire, *, timeout_s: float) -> AsyncGenerator[bytes, None]: ...

    async def close(self) -> None: ...


class Attempts:
    """Decides whether one call is tried again, and when.

    open ──error──> delay_after ──sleep──> open ──first message──> no more attempts, but of a call that
                                                                   `resumes` when its connection is lost
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        max_retries: int,
        resumes: bool = False,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._clock = clock
        self._draw = draw
        self._resumes = resumes
        self._timeout_s = timeout_s
        self._deadline = clock() + timeout_s
        self._retries_left = max_retries
        self._backoff_s = 0.25
        self._answered = False
        """Whether this attempt brought something."""
        self._begun = False
        """Whether any did."""
        self._max_retries = max_retries
        self.number = 0
        """Of this attempt."""

    def on_message(self) -> None:
        """Something came."""
        self._answered = self._begun = True

    def on_news(self) -> None:
        """Something came that had not come before: whatever is lost next has all its retries."""
        self._retries_left = self._max_retries

    def remaining_s(self) -> float:
        """Until the deadline. Raises DeadlineExceeded when it has passed."""
        left = self._deadline - self._clock()
        if left <= 0:
            raise DeadlineExceeded(f"no complete answer within timeout_s={self._timeout_s:g}")
        return left

    def delay_after(self, error: ClientError) -> float:
        """Seconds to wait before the next attempt. Raises the error if there must not be one."""
        if self._answered and not (self._resumes and isinstance(error, ConnectionFailed)):
            if isinstance(error, (Unavailable, ServerFailed)):
                raise StreamBroken(f"the stream broke: {error}") from error
            raise error
        if not _may_retry(error) or self._retries_left == 0:
            if self._begun:
                raise StreamBroken(f"the stream broke: {error}") from error
            raise error
        self._retries_left -= 1
        self._answered = False
        self.number += 1
        asked_s = error.retry_after_s if isinstance(error, Unavailable) else None
        delay_s = max(asked_s or 0.0, self._backoff_s) * (1.0 + 0.5 * self._draw())
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
        if delay_s >= self._deadline - self._clock():
            raise error
        return delay_s


class Replay:
    """A stream that broke and is asked for again comes from its beginning: what was passed on already
    is held back, and must be the same."""

    def __init__(self) -> None:
        self._attempt = 0
        self._passed: dict[int, _Text] = {}
        """Of each text, what the caller has."""
        self._heard: dict[int, tuple[int, int]] = {}
        """How much of its text and how many of its tokens this attempt has brought."""

    def read(self, pieces: list[Piece], *, attempt: int) -> list[Piece]:
        """Those parts of pieces that are new. Raises StreamBroken where another text comes."""
        if attempt != self._attempt:
            self._attempt, self._heard = attempt, {}
        return [new for piece in pieces if (new := self._new(piece)) is not None]

    def _new(self, piece: Piece) -> Piece | None:
        passed = self._passed.setdefault(piece.index, _Text())
        if self._attempt:
            start_text, start_token = self._heard.get(piece.index, (0, 0))
            end_text, end_token = start_text + len(piece.text), start_token + len(piece.token_ids)
            self._heard[piece.index] = end_text, end_token
            old_text, old_tokens = passed.since(start_text, start_token)
            if not (
                piece.text.startswith(old_text[: len(piece.text)])
                and list(piece.token_ids[: len(old_tokens)]) == old_tokens[: len(piece.token_ids)]
            ):
                raise StreamBroken("the stream broke, and asking again gave another text")
            piece = replace(
                piece,
                text=piece.text[len(old_text) :],
                token_ids=piece.token_ids[len(old_tokens) :],
                num_accepted=max(0, piece.num_accepted - len(old_tokens)),
                logprobs=piece.logprobs and piece.logprobs[len(old_tokens) :],
            )
            if not (piece.text or piece.token_ids or piece.finish_reason or piece.usage):
                return None
        passed.texts.append(piece.text)
        passed.token_ids += piece.token_ids
        return piece


@dataclass(slots=True)
class _Text:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def since(self, text: int, token: int) -> tuple[str, list[int]]:
        """What follows so many characters, and so many tokens."""
        self.texts = ["".join(self.texts)]
        return self.texts[0][text:], self.token_ids[token:]


def _may_retry(error: ClientError) -> bool:
    """A server that answers without saying when to come back may mean never."""
    return isinstance(error, ConnectionFailed) or (
        isinstance(error, Unavailable) and error.retry_after_s is not None
    )


def decode(message: bytes | str, kind: type[T]) -> T:
    """A reply's JSON. Raises ServerFailed for anything but the kind; unknown fields are ignored."""
    try:
        return msgspec.json.decode(message, type=kind)
    except msgspec.DecodeError as error:
        raise ServerFailed(f"the answer is not understood: {error}") from None

"""What can go wrong when a server is asked, each with the statuses it stands for.

ClientError
├── RequestRejected     the request's fault        HTTP 4xx      INVALID_ARGUMENT, UNIMPLEMENTED, ...
│   ├── Unauthorized    the API key                HTTP 401 403  UNAUTHENTICATED, PERMISSION_DENIED
│   └── NotFound        no such model or request   HTTP 404      NOT_FOUND
├── Unavailable         not now, perhaps soon      HTTP 503      UNAVAILABLE
│   ├── ConnectionFailed  nobody answers there
│   └── Overloaded      the queue is full          HTTP 429      RESOURCE_EXHAUSTED
├── ServerFailed        the server's fault         HTTP 5xx      INTERNAL, UNKNOWN, ...
├── StreamBroken        it ended in mid-text: what came is valid, the rest is lost
└── DeadlineExceeded    no answer in `timeout_s`   HTTP 408 504  DEADLINE_EXCEEDED
"""

# ruff: noqa: N818  named like the statuses they stand for

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from paceline.runtime.errors import PacelineError

PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata in which a gRPC server says when to come back; the name is gRPC's own."""


class ClientError(PacelineError):
    """Base of all errors a client raises."""


class RequestRejected(ClientError):
    """The server will not do this, however often it is asked."""


class Unauthorized(RequestRejected):
    """The API key is missing or wrong."""


class NotFound(RequestRejected):
    """There is no such model, request or route."""


class Unavailable(ClientError):
    """The server cannot answer now. `retry_after_s` says when to come back, if it said so."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ConnectionFailed(Unavailable):
    """Nobody answers at the address, or the connection ended before an answer."""


class Overloaded(Unavailable):
    """More requests wait than may."""


class ServerFailed(ClientError):
    """The server failed, or answered what this client does not understand."""


class StreamBroken(ClientError):
    """The answer ended in mid-text. What had come is valid; ask again for the rest."""


class DeadlineExceeded(ClientError):
    """No answer within `timeout_s`."""


def http_error(status: int, headers: Mapping[str, str], body: bytes) -> ClientError:
    """What a status of 400 or more means."""
    message = f"{message_of(body)} (HTTP {status})"
    retry_after_s = _seconds(headers.get("retry-after"))
    if status == 429:
        return Overloaded(message, retry_after_s=retry_after_s)
    if status == 503:
        return Unavailable(message, retry_after_s=retry_after_s)
    known: dict[int, type[ClientError]] = {
        401: Unauthorized,
        403: Unauthorized,
        404: NotFound,
        408: DeadlineExceeded,
        504: DeadlineExceeded,
    }
    return known.get(status, RequestRejected if status < 500 else ServerFailed)(message)


def grpc_error(code: str, details: str, metadata: Mapping[str, str]) -> ClientError:
    """What a status code, by its name, means."""
    message = f"{details} ({code})"
    pushback_ms = _seconds(metadata.get(PUSHBACK))
    retry_after_s = None if pushback_ms is None else pushback_ms / 1e3
    if code == "UNAVAILABLE":
        if retry_after_s is None:  # a server of ours says when; this is the channel's own
            return ConnectionFailed(message)
        return Unavailable(message, retry_after_s=retry_after_s)
    if code == "RESOURCE_EXHAUSTED":
        if retry_after_s is None:  # a message above the size limit, which no retry makes smaller
            return RequestRejected(message)
        return Overloaded(message, retry_after_s=retry_after_s)
    known: dict[str, type[ClientError]] = {
        "INVALID_ARGUMENT": RequestRejected,
        "OUT_OF_RANGE": RequestRejected,
        "FAILED_PRECONDITION": RequestRejected,
        "ALREADY_EXISTS": RequestRejected,
        "UNIMPLEMENTED": RequestRejected,
        "UNAUTHENTICATED": Unauthorized,
        "PERMISSION_DENIED": Unauthorized,
        "NOT_FOUND": NotFound,
        "DEADLINE_EXCEEDED": DeadlineExceeded,
    }
    return known.get(code, ServerFailed)(message)


def message_of(body: bytes) -> str:
    """The message in an OpenAI-shaped error, or the beginning of whatever came instead."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return " ".join(body[:300].decode(errors="replace").split()) or "no message"
    error = value.get("error", value) if isinstance(value, dict) else value
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)


def _seconds(text: str | None) -> float | None:
    """A non-negative number, or None for anything else, dates among it."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None

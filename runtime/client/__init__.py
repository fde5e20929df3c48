"""Ask a server for text, over HTTP or gRPC by the URL's scheme, from any program.

    Client ──┐                ┌── HttpApi, GrpcApi: what to send, how to read it (pure)
             ├── Call, Stream ┤
    AsyncClient               └── Attempts: whether to try again, and when (pure)
       │
       └── transport: one call out, the reply's messages in. Four of them: HTTP or gRPC, blocking or not

What is unavailable is tried again, at most `max_retries` times and within `timeout_s`, as long as
not a single message of the reply has come. Imports neither torch, numpy nor ray.
"""

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
from paceline.runtime.client.clients import AsyncClient, Client
from paceline.runtime.client.errors import (
    ClientError,
    ConnectionFailed,
    DeadlineExceeded,
    NotFound,
    Overloaded,
    RequestRejected,
    ServerFailed,
    StreamBroken,
    Unauthorized,
    Unavailable,
)

__all__ = [
    "AsyncClient",
    "Choice",
    "Client",
    "ClientError",
    "Completion",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Health",
    "Loads",
    "Model",
    "NotFound",
    "Overloaded",
    "Piece",
    "RequestRejected",
    "ServerFailed",
    "ServerInfo",
    "Speculation",
    "StreamBroken",
    "TokenLogprob",
    "Unauthorized",
    "Unavailable",
    "Usage",
]

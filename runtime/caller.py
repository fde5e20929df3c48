"""On whose behalf something happens: set by a door for each call, read by logs and traces.

    HTTP headers, gRPC metadata ──enter──> Caller ──current──> log lines, request records

It travels in a context variable, so every task of a call knows it, and nobody has to hand it on.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass, field

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
"""W3C Trace Context, section 3.2: version, trace id, parent id, flags, and what later versions add."""


@dataclass(slots=True, kw_only=True)
class Caller:
    """One call from outside."""

    request_id: str = ""
    """As its client knows it."""
    traceparent: str = ""
    """W3C's header as it came; empty if none did."""
    tracestate: str = ""
    trace_id: str = field(init=False)
    """32 hexadecimal digits: the caller's, or that of the trace that was begun here; empty if there is
    none."""

    def __post_init__(self) -> None:
        match = _TRACEPARENT.fullmatch(self.traceparent)
        self.trace_id = match[1] if match else ""


_current: ContextVar[Caller | None] = ContextVar("caller", default=None)


def enter(request_id: str, traceparent: str = "", tracestate: str = "") -> None:
    """Everything in this task, and in those it starts, is for this caller."""
    _current.set(Caller(request_id=request_id, traceparent=traceparent, tracestate=tracestate))


def current() -> Caller:
    """A nameless one for what the server does on its own account."""
    return _current.get() or Caller()

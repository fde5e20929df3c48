"""Log lines: one form for every process of a server, for people or as JSON, with request ids.

    paceline's loggers ──────────┐
    libraries' from warning on ──┼──> one handler on the root ──> stderr
    warnings, lost exceptions ───┘      adds process, request id, trace id

A line is about the request of the call it is written in, or of `extra={"request_id": ...}`; more to
be told of it goes into `extra={"facts": {...}}`, which JSON has as keys of their own. Prompts, texts
and keys are in no line.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, get_args

from paceline.runtime.caller import current
from paceline.runtime.config import EngineConfig, LogLevel

if TYPE_CHECKING:
    from paceline.runtime.async_llm import RequestRecord
    from paceline.runtime.types import EngineStatus, Request

LEVEL_VARIABLE, FORMAT_VARIABLE = "PACELINE_LOG_LEVEL", "PACELINE_LOG_FORMAT"
"""Of the environment: how processes know that get no config, such as KV links."""

MOST_PATH_CHARS = 200

_root = logging.getLogger("paceline")
requests = logging.getLogger("paceline.requests")
"""What becomes of requests: a line each."""


def configure(
    config: EngineConfig, *, role: str, log_requests: bool = True, stream: IO[str] | None = None
) -> None:
    """Log as the config says, and have child processes do so too. `role` names this process among
    those of the server, such as `decode-0/rank 1`. Replaces what was configured before."""
    os.environ[LEVEL_VARIABLE] = config.log_level
    os.environ[FORMAT_VARIABLE] = config.log_format
    requests.disabled = not log_requests
    _configure(config.log_level, as_json=config.log_format == "json", role=role, stream=stream)


def configure_child(*, role: str) -> None:
    """Log as the process does that started this one."""
    level = os.environ.get(LEVEL_VARIABLE, "")
    as_json = os.environ.get(FORMAT_VARIABLE) == "json"
    known: tuple[LogLevel, ...] = get_args(LogLevel)
    _configure(level if level in known else "info", as_json=as_json, role=role, stream=None)


def engine_role(config: EngineConfig, part: str) -> str:
    """The name of a part of an engine, such as its coordinator."""
    transfer = config.kv_transfer_config
    engine_id = None if transfer is None else transfer.engine_id
    return f"{engine_id or 'engine'}/{part}"


def _configure(level: str, *, as_json: bool, role: str, stream: IO[str] | None) -> None:
    number = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines(role) if as_json else TextLines(role))
    # libraries have much to tell that is nobody's business while all is well
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
    _root.setLevel(number)
    logging.captureWarnings(True)
    sys.excepthook = _on_lost_exception
    threading.excepthook = _on_lost_thread


class JsonLines(logging.Formatter):
    """One JSON object per line: time (RFC 3339, UTC), level, logger, message, process, pid, and where
    there are any request_id, trace_id, facts, exception and stack."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        caller = current()
        line: dict[str, Any] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": self._role,
            "pid": record.process,
        }
        optional = {
            "request_id": getattr(record, "request_id", caller.request_id),
            "trace_id": getattr(record, "trace_id", caller.trace_id),
            "exception": self.formatException(record.exc_info) if record.exc_info else "",
            "stack": record.stack_info,
        }
        facts: Mapping[str, Any] = getattr(record, "facts", {})
        line |= {name: value for name, value in optional.items() if value}
        line |= {name: value for name, value in facts.items() if name not in line}
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """`TIME LEVEL PROCESS: message [request ID]`, an exception's lines below it."""

    def __init__(self, role: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {role.replace('%', '%%')}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        text = super().formatMessage(record)
        request_id: str = getattr(record, "request_id", current().request_id)
        return f"{text} [request {request_id}]" if request_id not in text else text


class RequestLog:
    """Satisfies `Observer`: a line for each text that ends."""

    def on_admitted(self, record: RequestRecord, request: Request) -> None:
        """Satisfies `Observer`."""

    def on_delta(self, record: RequestRecord, *, num_tokens: int, now_s: float) -> None:
        """Satisfies `Observer`."""

    def on_status(self, status: EngineStatus) -> None:
        """Satisfies `Observer`."""

    def on_finished(self, record: RequestRecord) -> None:
        """Satisfies `Observer`."""
        if not requests.isEnabledFor(logging.INFO):
            return
        first_s = _between(record.arrived_s, record.first_token_s)
        total_s = _between(record.arrived_s, record.finished_s)
        first = "no token" if first_s is None else f"the first after {first_s:.3f} s"
        requests.info(
            "%s: %d tokens for %d of prompt (%d cached), %s, %.3f s in all",
            record.finish_reason,
            record.num_tokens,
            record.num_prompt_tokens,
            record.num_cached_tokens,
            first,
            total_s or 0.0,
            extra={
                "request_id": record.caller.request_id or record.request_id,
                "trace_id": record.caller.trace_id,
                "facts": {
                    "text_id": record.request_id,
                    "finish_reason": record.finish_reason,
                    "prompt_tokens": record.num_prompt_tokens,
                    "cached_tokens": record.num_cached_tokens,
                    "tokens": record.num_tokens,
                    "first_token_s": first_s,
                    "total_s": total_s,
                    "engines": [hop.engine_id for hop in record.hops],
                },
            },
        )


def log_refusal(scope: Mapping[str, Any], status: int) -> None:
    """A line for an ASGI request that was answered with an error; at debug level, for there may be more
    of them than of any others."""
    if status >= 400 and requests.isEnabledFor(logging.DEBUG):
        method, path = scope["method"], scope["path"][:MOST_PATH_CHARS]
        facts = {"method": method, "path": path, "status": status}
        requests.debug("%s %s: %d", method, path, status, extra={"facts": facts})


def _between(start_s: float, end_s: float | None) -> float | None:
    return None if end_s is None else round(end_s - start_s, 6)


def _on_lost_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    _root.critical("this process ends", exc_info=(kind, error, trace))


def _on_lost_thread(lost: threading.ExceptHookArgs) -> None:
    if lost.exc_value is None or issubclass(lost.exc_type, SystemExit):
        return
    name = "a thread" if lost.thread is None else f"thread {lost.thread.name}"
    _root.error("%s ends", name, exc_info=(lost.exc_type, lost.exc_value, lost.exc_traceback))

"""A fleet in a process of its own, so that it can be on another host than the test.

    test ── Serve, once; Ask, again and again ──>  stdin   │ python -m tests.fleet_process
         <── Report, one for each ───────────────  stdout  │     Fleet ──> engines, wherever they are

One JSON object a line. It ends when its input does. Whatever else is printed here, by Ray for
example, goes to stderr.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, BinaryIO

import msgspec

from paceline.actors.fleet import Fleet, open_fleet
from paceline.runtime.config import make_config, make_fleet
from paceline.runtime.preflight import examine
from paceline.runtime.types import EngineRole, EngineStatus, FinishReason, Request, WireType

POLL_S = 0.05


class Serve(WireType, frozen=True, kw_only=True):
    """Which fleet."""

    config: dict[str, Any]
    fleet: dict[str, Any]
    then: tuple[EngineRole, ...] = ()
    """Engines to add once the first serve: which of several starts first is nobody's to say."""


class Ask(WireType, frozen=True, kw_only=True):
    """Texts to write, or none; then say how the engines are."""

    requests: tuple[Request, ...] = ()
    timeout_s: float = 60.0


class Report(WireType, frozen=True, kw_only=True):
    """What came of it."""

    texts: dict[str, list[int]]
    reasons: dict[str, FinishReason]
    """Why each text ended; none for those that had not in time."""
    first_s: dict[str, float]
    """From asking to the first token."""
    members: tuple[EngineStatus, ...]


def write(fleet: Fleet, ask: Ask) -> Report:
    began_s = time.monotonic()
    texts: dict[str, list[int]] = {each.request_id: [] for each in ask.requests}
    reasons: dict[str, FinishReason] = {}
    first_s: dict[str, float] = {}
    fleet.submit(list(ask.requests))
    while True:
        for delta in fleet.poll(POLL_S):
            texts[delta.request_id] += delta.token_ids
            if delta.token_ids:
                first_s.setdefault(delta.request_id, time.monotonic() - began_s)
            if delta.finish_reason is not None:
                reasons[delta.request_id] = delta.finish_reason
        if len(reasons) == len(texts) or time.monotonic() - began_s > ask.timeout_s:
            members = fleet.status().members
            return Report(texts=texts, reasons=reasons, first_s=first_s, members=members)


def add(fleet: Fleet, role: EngineRole, *, timeout_s: float = 90.0) -> None:
    """One engine more, which serves and has said so."""
    engine_id = fleet.add_engine(role)
    deadline_s = time.monotonic() + timeout_s
    while not any(
        each.engine_id == engine_id and each.num_blocks for each in fleet.status().members
    ):
        assert time.monotonic() < deadline_s, fleet.engines()
        fleet.poll(POLL_S)


def main() -> None:
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve = msgspec.json.decode(sys.stdin.buffer.readline(), type=Serve)
    config = make_config(serve.config)
    fleet = open_fleet(config, examine(config), make_fleet(serve.fleet))
    try:
        for role in serve.then:
            add(fleet, role)
        _say(write(fleet, Ask()), to=reports)
        while line := sys.stdin.buffer.readline():
            _say(write(fleet, msgspec.json.decode(line, type=Ask)), to=reports)
    finally:
        fleet.close()


def _say(report: Report, *, to: BinaryIO) -> None:
    to.write(msgspec.json.encode(report) + b"\n")
    to.flush()


if __name__ == "__main__":
    main()

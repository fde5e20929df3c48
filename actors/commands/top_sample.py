"""What a server says of itself at one moment, and what happened between two."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from paceline.runtime.errors import EngineError, UserError

FIRST_TOKEN = "paceline:time_to_first_token_seconds"
BETWEEN_TOKENS = "paceline:inter_token_latency_seconds"

Histogram = Mapping[float, float]
"""From upper edge to how many values are not above it."""


class Transfers(msgspec.Struct, frozen=True):
    """Of `TransferTotals`, what is shown."""

    fetched: int = 0
    failed: int = 0
    num_bytes: int = 0
    unoverlapped_s: float = 0.0


class Counts(msgspec.Struct, frozen=True):
    """Of `EngineStatus`, what is shown. A server of another version may say more, or less."""

    engine_id: str = ""
    role: str = "both"
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafted: int = 0
    accepted: int = 0
    num_restarts: int = 0
    restarting: bool = False
    transfers: Transfers = Transfers()
    members: tuple[Counts, ...] = ()


class Card(msgspec.Struct, frozen=True):
    """An engine, as the server keeps it."""

    id: str
    role: str
    state: str
    error: str | None = None


class Live(msgspec.Struct, frozen=True):
    """The answer of `/live/status`."""

    model: str
    status: Counts
    uptime_s: float
    engines: tuple[Card, ...] = ()


class Sample(NamedTuple):
    """One moment."""

    at_s: float
    live: Live
    num_in_flight: int
    histograms: Mapping[str, Histogram]


def take(client: httpx.Client) -> Sample:
    """Ask a server. Raises UserError where it will not tell, EngineError where it answers nonsense, and
    httpx's errors where it cannot be reached."""
    body = _get(client, "/live/status")
    load = _get(client, "/load")
    try:
        live = msgspec.json.decode(body, type=Live)
        num_in_flight = msgspec.json.decode(load, type=dict[str, int])["server_load"]
        histograms = _histograms(_get(client, "/metrics").decode())
    except (msgspec.DecodeError, KeyError, ValueError) as error:
        raise EngineError(f"{client.base_url} does not speak as Paceline does: {error}") from None
    return Sample(time.monotonic(), live, num_in_flight, histograms)


def _get(client: httpx.Client, path: str) -> bytes:
    answer = client.get(path)
    if answer.status_code in (401, 403):
        raise UserError(
            f"{client.base_url} wants a key: give --api-key, or set PACELINE_API_KEY in the environment"
        )
    if answer.status_code == 404:
        raise UserError(f"{client.base_url} has no {path}: is it a Paceline server?")
    if answer.status_code != 200:
        raise EngineError(f"{client.base_url} answers {answer.status_code} to GET {path}")
    return answer.content


def _histograms(text: str) -> Mapping[str, Histogram]:
    found: dict[str, dict[float, float]] = {}
    for family in text_string_to_metric_families(text):
        if family.name in (FIRST_TOKEN, BETWEEN_TOKENS):
            edges = found.setdefault(family.name, {})
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    edge = float(sample.labels["le"])
                    edges[edge] = edges.get(edge, 0.0) + sample.value
    return found


def quantile(before: Histogram, now: Histogram, part: float) -> float | None:
    """The value, in the histogram's unit, that `part` of those in between do not exceed, as near as the
    edges tell; None where there were none."""
    counts = [(edge, count - before.get(edge, 0.0)) for edge, count in sorted(now.items())]
    total = counts[-1][1] if counts else 0.0
    if total <= 0:
        return None
    wanted, low, below = part * total, 0.0, 0.0
    for edge, count in counts:
        if count >= wanted:
            if math.isinf(edge):
                return low
            return low + (edge - low) * (wanted - below) / max(count - below, 1e-9)
        low, below = edge, count
    return low


class Row(NamedTuple):
    """One engine, or all of them, as a line of the table: rates per second since the last sample."""

    name: str
    role: str
    state: str
    error: str
    running: int
    waiting: int
    kv_used: float | None
    written: float | None
    read: float | None
    acceptance: float | None
    prefix_hits: float | None
    transfers: float | None
    """Bytes per second."""
    failed_transfers: int
    preemptions: int
    restarts: int

    @property
    def known(self) -> bool:
        """Whether the engine has said anything yet."""
        return self.kv_used is not None


class Between(NamedTuple):
    """What happened between two samples, and how it is now."""

    rows: list[Row]
    total: Row
    queued: int
    """Requests that wait for an engine to take them."""
    first_token: tuple[float | None, float | None]
    """Seconds, of half of the requests and of 19 in 20; None where there were none."""
    between_tokens: tuple[float | None, float | None]


def between(before: Sample | None, now: Sample) -> Between:
    """Without a sample before, rates are not known, and shares are of all since the start."""
    status = now.live.status
    seconds = None if before is None else now.at_s - before.at_s
    earlier = {} if before is None else {each.engine_id: each for each in _members(before.live)}
    cards = {card.id: card for card in now.live.engines}
    members = _members(now.live)
    rows = [
        _row(each, earlier.get(each.engine_id), seconds, cards.pop(each.engine_id, None))
        for each in members
    ]
    rows += [_row(Counts(engine_id=c.id, role=c.role), None, None, c) for c in cards.values()]
    total = _row(status, None if before is None else before.live.status, seconds, None)
    return Between(
        rows=rows,
        total=total._replace(name="all", role="", state=""),
        queued=max(0, status.num_waiting - sum(each.num_waiting for each in members)),
        first_token=_quantiles(before, now, FIRST_TOKEN),
        between_tokens=_quantiles(before, now, BETWEEN_TOKENS),
    )


def _members(live: Live) -> tuple[Counts, ...]:
    alone = msgspec.structs.replace(live.status, engine_id=live.status.engine_id or "engine")
    return live.status.members or (() if live.engines else (alone,))


def _quantiles(before: Sample | None, now: Sample, name: str) -> tuple[float | None, float | None]:
    earlier = {} if before is None else before.histograms.get(name, {})
    found = now.histograms.get(name, {})
    return quantile(earlier, found, 0.5), quantile(earlier, found, 0.95)


def _row(now: Counts, before: Counts | None, seconds: float | None, card: Card | None) -> Row:
    if before is not None and now.generation_tokens < before.generation_tokens:
        before, seconds = None, None  # it was started anew, and counts from zero
    earlier = before or Counts()

    def rate(new: float, old: float) -> float | None:
        return None if before is None or not seconds else (new - old) / seconds

    return Row(
        name=now.engine_id,
        role=now.role,
        state="restarting" if now.restarting else "serving" if card is None else card.state,
        error="" if card is None else card.error or "",
        running=now.num_running,
        waiting=now.num_waiting,
        kv_used=1 - now.num_free_blocks / now.num_blocks if now.num_blocks else None,
        written=rate(now.generation_tokens, earlier.generation_tokens),
        read=rate(now.prompt_tokens, earlier.prompt_tokens),
        acceptance=_share(now.accepted - earlier.accepted, now.drafted - earlier.drafted),
        prefix_hits=_share(
            now.prefix_hits - earlier.prefix_hits, now.prefix_queries - earlier.prefix_queries
        ),
        transfers=rate(now.transfers.num_bytes, earlier.transfers.num_bytes),
        failed_transfers=now.transfers.failed,
        preemptions=now.num_preemptions,
        restarts=now.num_restarts,
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None

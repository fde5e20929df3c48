"""The stages of a request's life, all on the frontend's clock.

    frontend   arrived ── route ──┐                                              ┌── finished
    prefill                       └─ queue ─ prefill ─┐                          │
    decode                        └─ queue ─ transfer ┴──────── decode ──────────┘

Engines tell of their moments in seconds of their own clocks, on whatever host. Each engine's account
ends with the request, and that end is put where the router heard of it: then every moment lies
between the router's choice and that, and each is late by what the last message took to arrive,
whatever the hosts think the time is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from paceline.runtime.types import Event, FetchAccount, Hop, RequestMetrics

if TYPE_CHECKING:
    from paceline.runtime.async_llm import RequestRecord

StageName = Literal["route", "queue", "prefill", "transfer", "decode", "lost"]
Value = str | int | float


@dataclass(slots=True, kw_only=True)
class Stage:
    """A stretch of time, in seconds of the frontend's monotonic clock."""

    name: StageName
    start_s: float
    end_s: float
    facts: dict[str, Value]
    """What is worth knowing of it, under OpenTelemetry's attribute names."""
    events: list[tuple[str, float]] = field(default_factory=list)
    """What happened meanwhile, such as a preemption."""
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """A request went on elsewhere after its engine was lost."""

    at_s: float
    from_engine: str
    to_engine: str


def stages(record: RequestRecord) -> list[Stage]:
    """Of a request that has ended. None of its engine where that told nothing, as where the client
    left first."""
    if record.hops:
        return [stage for hop in record.hops for stage in _of_hop(hop)]
    if record.metrics is None or record.finished_s is None:
        return []
    placed = _Account(record.metrics, engine_id="", from_s=record.arrived_s, to_s=record.finished_s)
    return list(placed.stages(fetches=record.metrics.fetch is not None))


def resumptions(record: RequestRecord) -> list[Resumption]:
    """Each time it was taken up by another engine."""
    return [
        Resumption(at_s=hop.chosen_s, from_engine=before.engine_id, to_engine=hop.engine_id)
        for before, hop in zip(record.hops, record.hops[1:], strict=False)
    ]


def accounts(record: RequestRecord) -> list[RequestMetrics]:
    """What each engine that wrote some of the text says of it, lost ones left out."""
    if record.hops:
        return [hop.metrics for hop in record.hops if hop.metrics is not None]
    return [] if record.metrics is None else [record.metrics]


def _of_hop(hop: Hop) -> Iterator[Stage]:
    yield Stage(name="route", start_s=hop.asked_s, end_s=hop.chosen_s, facts=_choice(hop))
    if hop.read is not None and hop.read_s is not None:
        reader = _Account(hop.read, engine_id=hop.reader_id, from_s=hop.chosen_s, to_s=hop.read_s)
        yield from (each for each in reader.stages(fetches=False) if each.name != "decode")
    if hop.ended_s is None:
        return
    if hop.metrics is None:
        error = f"engine {hop.engine_id} was lost, and what it knew of the request with it"
        facts: dict[str, Value] = {"paceline.engine.id": hop.engine_id}
        yield Stage(name="lost", start_s=hop.chosen_s, end_s=hop.ended_s, facts=facts, error=error)
        return
    writer = _Account(
        hop.metrics, engine_id=hop.engine_id, from_s=hop.chosen_s, to_s=hop.ended_s, hop=hop
    )
    yield from writer.stages(fetches=bool(hop.reader_id))


def _choice(hop: Hop) -> dict[str, Value]:
    facts: dict[str, Value] = {
        "paceline.route.policy": hop.policy,
        "paceline.route.engine": hop.engine_id,
        "paceline.route.expected_cached_tokens": hop.num_cached_tokens,
    }
    if hop.reader_id:
        facts["paceline.route.prefill_engine"] = hop.reader_id
        facts["paceline.route.moved_tokens"] = hop.num_moved_tokens
    return facts


class _Account:
    """One engine's account of a request, placed between two moments of the frontend's clock."""

    def __init__(
        self,
        metrics: RequestMetrics,
        *,
        engine_id: str,
        from_s: float,
        to_s: float,
        hop: Hop | None = None,
    ) -> None:
        self._metrics = metrics
        self._engine: dict[str, Value] = {"paceline.engine.id": engine_id} if engine_id else {}
        self._hop = hop
        last_s = metrics.events[-1][1] if metrics.events else 0.0
        self._events = [
            (event, min(max(at_s - last_s + to_s, from_s), to_s)) for event, at_s in metrics.events
        ]

    def stages(self, *, fetches: bool) -> Iterator[Stage]:
        """One after the other. With `fetches` it waits for KV before it may run."""
        stage: Stage | None = None
        for event, at_s in self._events:
            following = self._after(event, stage, fetches=fetches)
            if following is None:
                if stage is not None and event is not Event.FINISHED:
                    stage.events.append((str(event), at_s))
                continue
            if stage is not None:
                stage.end_s = at_s
                yield stage
            fetches = fetches and event is not Event.FETCHED
            error = self._fetch_error() if following == "transfer" else None
            stage = Stage(
                name=following,
                start_s=at_s,
                end_s=at_s,
                facts=self._engine | self._facts(following),
                error=error,
            )
        if stage is not None:
            stage.end_s = self._events[-1][1]
            yield stage

    def _after(self, event: Event, stage: Stage | None, *, fetches: bool) -> StageName | None:
        """The stage that an event begins; None for one that happens within a stage."""
        if event is Event.QUEUED:
            return "queue"
        if event is Event.SCHEDULED and stage is not None and stage.name == "queue":
            return "transfer" if fetches else "prefill"
        if event is Event.FETCHED and self._fetch_error() is not None:
            return "queue"
        if event is Event.FIRST_TOKEN:
            return "decode"
        return None

    def _fetch_error(self) -> str | None:
        fetch = self._metrics.fetch
        return None if fetch is None else fetch.error

    def _facts(self, name: StageName) -> dict[str, Value]:
        metrics = self._metrics
        if name == "prefill":
            return {
                "gen_ai.usage.input_tokens": metrics.num_prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": metrics.num_cached_tokens,
            }
        if name == "transfer":
            return self._route() | _moved(metrics.fetch)
        if name == "decode":
            return {
                "gen_ai.usage.output_tokens": metrics.num_tokens,
                "paceline.speculation.rounds": metrics.rounds,
                "paceline.speculation.drafted_tokens": metrics.drafted,
                "paceline.speculation.accepted_tokens": metrics.accepted,
                "paceline.step.calibrate_ms": metrics.times.calibrate_ms,
                "paceline.step.draft_ms": metrics.times.draft_ms,
                "paceline.step.verify_ms": metrics.times.verify_ms,
            }
        return {}

    def _route(self) -> dict[str, Value]:
        hop = self._hop
        if hop is None:
            return {}
        return {"paceline.transfer.from": hop.reader_id, "paceline.transfer.to": hop.engine_id}


def _moved(fetch: FetchAccount | None) -> dict[str, Value]:
    if fetch is None:  # it was stopped before it ended
        return {}
    return {
        "paceline.transfer.tokens": fetch.num_tokens,
        "paceline.transfer.bytes": fetch.num_bytes,
        "paceline.transfer.seconds": fetch.seconds,
        "paceline.transfer.unoverlapped_seconds": fetch.unoverlapped_s,
    }

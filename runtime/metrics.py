"""What Prometheus scrapes: the counters, gauges and histograms of a server.

    on_status(EngineStatus) ──┐                             ┌──> paceline:NAME
    on_delta, on_finished ────┴──> Counts ── on a scrape ───┤
                                                            └──> vllm:NAME, if asked

Names, labels and edges are those of vLLM, whose dashboards and autoscalers people already have: the
edges as in vLLM 0.11, where inter_token_latency_seconds got its name, and the same since. Where
vLLM's finest bucket holds nearly all that Paceline does, ours adds edges below it; each of vLLM's
is also one of ours, so both names are views of one set of counts.

Where several engines serve together, gauges and KV transfers are told of each under its own name as
label `engine`, so that their sum is the server's; all else is the server's as a whole, engine "0".
Once two engines have been there at a time, they keep their names: a series does not change its label
because an engine is lost.

The frontends of a server count into one memory, `counts.py`, and a scrape of any tells of all. What
was counted becomes metric families when somebody scrapes: to record a value is a bisection and an
addition, with no lock. All `on_` methods belong to one thread; `exposition` may be called from any.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from operator import sub
from typing import TYPE_CHECKING, get_args

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from paceline.runtime.counts import MOST_TOTALS, Counts
from paceline.runtime.events import decode_s, prefill_s, queue_s, time_per_output_token_s
from paceline.runtime.types import EngineStatus, FinishReason, Request, StepStats, TransferTotals

if TYPE_CHECKING:
    from paceline.runtime.async_llm import RequestRecord

PREFIX, VLLM_PREFIX = "paceline:", "vllm:"
LABELS = ("model_name", "engine")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# seconds
FIRST_TOKEN_EDGES = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_EDGES = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_EDGES = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
FINE_TOKEN_EDGES = (0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.004, 0.005, 0.006, 0.0075)
FINE_REQUEST_EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
STAGE_EDGES = (
    *(0.0001, 0.0002, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01),
    *(0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
# counts
POWERS_OF_TWO = tuple(2.0**power for power in range(15))
DRAFT_LENGTH_EDGES = (*map(float, range(17)), 20.0, 24.0, 32.0, 48.0, 64.0)


@dataclass(frozen=True, kw_only=True)
class Total:
    """A counter that follows one of the engine's totals."""

    name: str
    field: str
    """Of `EngineStatus`, or of `TransferTotals`."""
    text: str


TOTALS = (
    Total(name="num_preemptions", field="num_preemptions", text="Requests preempted."),
    Total(name="prompt_tokens", field="prompt_tokens", text="Prompt tokens computed."),
    Total(name="generation_tokens", field="generation_tokens", text="Tokens generated."),
    Total(
        name="prefix_cache_queries",
        field="prefix_queries",
        text="Prompt tokens looked up in the prefix cache.",
    ),
    Total(
        name="prefix_cache_hits",
        field="prefix_hits",
        text="Prompt tokens found in the prefix cache.",
    ),
    Total(name="spec_decode_num_drafts", field="num_drafts", text="Rounds that drafted."),
    Total(name="spec_decode_num_draft_tokens", field="drafted", text="Tokens drafted."),
    Total(
        name="spec_decode_num_accepted_tokens", field="accepted", text="Drafted tokens accepted."
    ),
)

TRANSFER_TOTALS = (
    Total(name="kv_transfers", field="fetched", text="Prompts whose KV came from another engine."),
    Total(name="kv_transfer_tokens", field="fetched_tokens", text="Tokens of these prompts."),
    Total(name="kv_transfer_bytes", field="num_bytes", text="Bytes of KV received."),
    Total(name="kv_transfer_seconds", field="seconds", text="Time that transfers took, summed."),
    Total(
        name="kv_transfer_unoverlapped_seconds",
        field="unoverlapped_s",
        text="Time of transfers after their prompts had been read.",
    ),
    Total(
        name="kv_transfer_stall_seconds",
        field="stall_s",
        text="Time that transfers waited for a consumer to take what had come.",
    ),
    Total(
        name="kv_transfer_failed", field="failed", text="Transfers that failed: computed instead."
    ),
    Total(
        name="kv_transfer_resumed",
        field="num_resumed",
        text="Transfers that went on after a break.",
    ),
    Total(
        name="kv_transfer_corrupt",
        field="num_corrupt",
        text="Pieces that came with a wrong checksum.",
    ),
    Total(
        name="kv_lease_expired",
        field="expired",
        text="Prompts held for a consumer that never came.",
    ),
)
TRANSFER_GAUGES = (
    Total(
        name="kv_transfers_producing", field="producing", text="Prompts read or held for others."
    ),
    Total(name="kv_transfers_fetching", field="fetching", text="Prompts being fetched."),
)
VLLM_TRANSFER_SUMS = (
    Total(name="nixl_xfer_time_seconds", field="seconds", text="Time of a KV transfer."),
    Total(name="nixl_bytes_transferred", field="num_bytes", text="Bytes of a KV transfer."),
)
"""Histograms in vLLM; here their sums and counts, all in one bucket."""
VLLM_TRANSFER_TOTALS = (
    Total(name="nixl_num_failed_transfers", field="failed", text="KV transfers that failed."),
    Total(
        name="nixl_num_kv_expired_reqs",
        field="expired",
        text="Requests whose KV was held for a consumer that never came.",
    ),
)
ROUTER = "router"
"""The engine label of requests that wait for an engine."""

FOLLOWED = ("num_steps", *(total.field for total in TOTALS))
"""Totals of `EngineStatus` that only grow, until the engine is started anew."""
MOST_POSITIONS = 64
"""As many as `num_speculative_tokens` may be."""
TOLD = tuple(total.field for total in TRANSFER_TOTALS)
"""Totals of `TransferTotals`."""
REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
assert len(FOLLOWED) + MOST_POSITIONS <= MOST_TOTALS, "expected a row to have room for all totals"


class Distribution:
    """A histogram: cell i of the tally counts values in (edges[i-1], edges[i]], the last but one those
    above, and the last is their sum."""

    __slots__ = ("_tally", "coarse", "edges", "name", "text")

    def __init__(
        self,
        name: str,
        counts: Counts,
        *,
        edges: Iterable[float],
        text: str,
        coarse: tuple[float, ...] | None = None,
    ) -> None:
        """`coarse` are those of the edges that vLLM has, where vLLM has this histogram."""
        self.name, self.text, self.coarse = name, text, coarse
        self.edges = tuple(edges)
        assert all(low < high for low, high in pairwise(self.edges)), f"expected {name} to ascend"
        assert set(coarse or ()) <= set(self.edges), f"expected vLLM's edges among those of {name}"
        self._tally = counts.tally(len(self.edges) + 2)

    def observe(self, value: float, *, times: int = 1) -> None:
        cells = self._tally.own
        cells[bisect_left(self.edges, value)] += times
        cells[-1] += value * times

    def family(self, prefix: str, labels: Sequence[str]) -> HistogramMetricFamily:
        edges = self.coarse if prefix == VLLM_PREFIX and self.coarse else self.edges
        *counts, value_sum = self._tally.sums()
        *below, total = accumulate(counts)
        up_to = dict(zip(self.edges, below, strict=True))
        buckets = [(repr(edge), up_to[edge]) for edge in edges] + [("+Inf", total)]
        family = HistogramMetricFamily(prefix + self.name, self.text, labels=LABELS)
        family.add_metric(labels, buckets, value_sum)
        return family


class Metrics(Collector):
    """What one frontend counts and tells, in a registry of its own: several may live in one
    process."""

    def __init__(
        self,
        model_name: str,
        *,
        version: str,
        engine: str = "0",
        num_speculative_tokens: int = 0,
        vllm_names: bool = False,
        counts: Counts | None = None,
    ) -> None:
        """`num_speculative_tokens` positions exist from the start, so that a rate over the first
        acceptance is right. `counts` are those of all frontends of the server; without them this is
        the only one."""
        self._labels = (model_name, engine)
        self._version = version
        self._prefixes = (PREFIX, VLLM_PREFIX) if vllm_names else (PREFIX,)
        self._num_positions = num_speculative_tokens
        self._counts = counts or Counts.private()
        self._engines = self._counts.engines
        self._status = EngineStatus()
        self._left = _totals(self._status)
        """Of the last status, the totals of engines that are gone."""
        self._ended = self._counts.tally(len(REASONS))
        self._held = self._counts.tally(1)
        """Requests that wait for an engine."""
        self._distributions: list[Distribution] = []
        fine = (*FINE_TOKEN_EDGES, *TOKEN_EDGES)
        self.first_token = self._distribution(
            "time_to_first_token_seconds",
            edges=FIRST_TOKEN_EDGES,
            coarse=FIRST_TOKEN_EDGES,
            text="From a request's arrival to its first token.",
        )
        self.inter_token = self._distribution(
            "inter_token_latency_seconds",
            edges=fine,
            coarse=TOKEN_EDGES,
            text="Between two deltas of a request; a delta holds every token of its round.",
        )
        self.output_token = self._distribution(
            "request_time_per_output_token_seconds",
            edges=fine,
            coarse=TOKEN_EDGES,
            text="A request's decode time over its tokens after the first.",
        )
        self.e2e = self._request_latency(
            "e2e_request_latency_seconds", text="From a request's arrival to its end."
        )
        self.queue = self._request_latency(
            "request_queue_time_seconds", text="From a request's arrival in the engine to a step."
        )
        self.prefill = self._request_latency(
            "request_prefill_time_seconds", text="From a request's first step to its first token."
        )
        self.decode = self._request_latency(
            "request_decode_time_seconds", text="From a request's first token to its end."
        )
        self.step = self._distribution(
            "step_seconds", edges=STAGE_EDGES, text="From a step's plan to its result."
        )
        self.calibration = self._distribution(
            "calibration_seconds",
            edges=STAGE_EDGES,
            text="The exact drafting pass of a step, which also gives the first draft.",
        )
        self.draft_step = self._distribution(
            "draft_step_seconds", edges=STAGE_EDGES, text="All other drafting passes of a step."
        )
        self.verify = self._distribution(
            "verify_seconds", edges=STAGE_EDGES, text="The target's pass of a step, and its check."
        )
        self.batch_size = self._distribution(
            "step_batch_size", edges=POWERS_OF_TWO, text="Requests of a step."
        )
        self.rows = self._distribution(
            "step_rows", edges=POWERS_OF_TWO, text="Rows of a step's target pass."
        )
        self.draft_length = self._distribution(
            "draft_length",
            edges=DRAFT_LENGTH_EDGES,
            text="Drafts chosen for a request that drafted.",
        )
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def _distribution(
        self,
        name: str,
        *,
        edges: Iterable[float],
        text: str,
        coarse: tuple[float, ...] | None = None,
    ) -> Distribution:
        made = Distribution(name, self._counts, edges=edges, text=text, coarse=coarse)
        self._distributions.append(made)
        return made

    def _request_latency(self, name: str, *, text: str) -> Distribution:
        edges = (*FINE_REQUEST_EDGES, *REQUEST_EDGES)
        return self._distribution(name, edges=edges, coarse=REQUEST_EDGES, text=text)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:  # noqa: ARG002
        """What `/metrics` answers, and its content type.

        Prometheus' text, whatever `accept` prefers: in OpenMetrics, prometheus_client 0.26 turns
        the colon of a sample's name into an underscore, and nobody's dashboard finds it.
        """
        return generate_latest(self.registry), CONTENT_TYPE

    def collect(self) -> Iterator[Metric]:
        """Every family, once per prefix. Called by the registry."""
        build = GaugeMetricFamily(
            f"{PREFIX}build_info", "Always 1; says which version runs.", labels=(*LABELS, "version")
        )
        build.add_metric((*self._labels, self._version), 1)
        yield build
        for prefix in self._prefixes:
            yield from self._gauges(prefix)
            yield from self._counters(prefix)
            yield from self._transfers(prefix)
            for distribution in self._distributions:
                if prefix == PREFIX or distribution.coarse:
                    yield distribution.family(prefix, self._labels)

    def _gauges(self, prefix: str) -> Iterator[Metric]:
        running, waiting, usage = (
            GaugeMetricFamily(prefix + name, text, labels=LABELS)
            for name, text in (
                ("num_requests_running", "Requests that take part in steps."),
                ("num_requests_waiting", "Requests that wait for their turn."),
                ("kv_cache_usage_perc", "Part of the KV blocks in use; 1 is all."),
            )
        )
        [held] = self._held.sums()
        for labels, status in self._by_engine():
            running.add_metric(labels, status.num_running)
            waiting.add_metric(labels, status.num_waiting + (0 if self._has_names else held))
            used = status.num_blocks - status.num_free_blocks
            usage.add_metric(labels, used / status.num_blocks if status.num_blocks else 0.0)
        if self._has_names:
            waiting.add_metric((self._labels[0], ROUTER), held)
        yield from (running, waiting, usage)

    @property
    def _has_names(self) -> bool:
        """Whether engines are told apart."""
        return self._engines.most_at_once > 1

    def _by_engine(self) -> list[tuple[tuple[str, str], EngineStatus]]:
        """Labels and status of each engine."""
        model, _ = self._labels
        members = self._status.members
        if self._has_names:
            return [((model, each.engine_id), each) for each in members]
        if not self._engines.most_at_once:  # an engine without a router
            return [(self._labels, self._status)]
        return [(self._labels, members[0] if members else EngineStatus())]

    def _transfers(self, prefix: str) -> Iterator[Metric]:
        """Of engines whose KV can travel."""
        engines = [
            (labels, self._told(status))
            for labels, status in self._by_engine()
            if status.links.addresses or status.transfers != TransferTotals()
        ]
        if not engines:
            return
        ours = prefix == PREFIX
        for total in TRANSFER_TOTALS if ours else VLLM_TRANSFER_TOTALS:
            counter = CounterMetricFamily(prefix + total.name, total.text, labels=LABELS)
            for labels, transfers in engines:
                counter.add_metric(labels, getattr(transfers, total.field))
            yield counter
        for total in TRANSFER_GAUGES if ours else ():
            gauge = GaugeMetricFamily(prefix + total.name, total.text, labels=LABELS)
            for labels, transfers in engines:
                gauge.add_metric(labels, getattr(transfers, total.field))
            yield gauge
        for total in () if ours else VLLM_TRANSFER_SUMS:
            family = HistogramMetricFamily(prefix + total.name, total.text, labels=LABELS)
            for labels, transfers in engines:
                count = float(transfers.fetched)
                family.add_metric(labels, [("+Inf", count)], getattr(transfers, total.field))
            yield family

    def _told(self, status: EngineStatus) -> TransferTotals:
        """How an engine's transfers are now, and their totals as all frontends tell them."""
        totals = zip(TOLD, self._engines.latest(status.engine_id), strict=False)
        return msgspec.structs.replace(status.transfers, **dict(totals))

    def _counters(self, prefix: str) -> Iterator[Metric]:
        sums = self._engines.sums()
        totals = dict(zip(FOLLOWED, sums, strict=False))
        for total in TOTALS:
            counter = CounterMetricFamily(prefix + total.name, total.text, labels=LABELS)
            counter.add_metric(self._labels, totals[total.field])
            yield counter
        counter = CounterMetricFamily(
            f"{prefix}spec_decode_num_accepted_tokens_per_pos",
            "Rounds in which the draft at this position was accepted.",
            labels=(*LABELS, "position"),
        )
        positions = sums[len(FOLLOWED) :][:MOST_POSITIONS]
        most = max((i for i, accepted in enumerate(positions, start=1) if accepted), default=0)
        for i, accepted in enumerate(positions[: max(most, self._num_positions)]):
            counter.add_metric((*self._labels, str(i)), accepted)
        yield counter
        counter = CounterMetricFamily(
            f"{prefix}request_success",
            "Requests that ended, by how.",
            labels=(*LABELS, "finished_reason"),
        )
        for reason, ended in zip(REASONS, self._ended.sums(), strict=True):
            counter.add_metric((*self._labels, reason), ended)
        yield counter

    def on_admitted(self, record: RequestRecord, request: Request) -> None:
        """Satisfies `Observer`. What is in flight is the engine's to count."""

    def on_delta(self, record: RequestRecord, *, num_tokens: int, now_s: float) -> None:  # noqa: ARG002
        """Satisfies `Observer`. The tokens themselves are counted by the engine."""
        if record.last_token_s is None:
            self.first_token.observe(now_s - record.arrived_s)
        else:
            self.inter_token.observe(now_s - record.last_token_s)

    def on_finished(self, record: RequestRecord) -> None:
        """Satisfies `Observer`. What never happened to a request is not timed."""
        self._ended.own[REASONS.index(record.finish_reason or "error")] += 1
        if record.finished_s is not None:
            self.e2e.observe(record.finished_s - record.arrived_s)
        if record.metrics is None:
            return
        for distribution, seconds in (
            (self.queue, queue_s(record.metrics)),
            (self.prefill, prefill_s(record.metrics)),
            (self.decode, decode_s(record.metrics)),
            (self.output_token, time_per_output_token_s(record.metrics)),
        ):
            if seconds is not None:
                distribution.observe(seconds)

    def on_status(self, status: EngineStatus) -> None:
        """Follow the engines' totals and steps. All frontends hear of the same, so one counts it."""
        engines = self._engines
        engines.note_at_once(len(status.members))
        if engines.most_at_once:
            self._held.own[0] = status.num_waiting - sum(e.num_waiting for e in status.members)
        before, self._status = self._status, status
        if self._counts.slot:
            return
        self._observe_steps(status.steps)
        now_s = time.monotonic()
        self._follow_gone(before, status, now_s=now_s)
        for each in status.members or (() if engines.most_at_once else (status,)):
            told = [getattr(each.transfers, field) for field in TOLD]
            engines.follow(each.engine_id, _totals(each), told, now_s=now_s)

    def _follow_gone(self, before: EngineStatus, status: EngineStatus, *, now_s: float) -> None:
        """Count what engines said after the last status and before they went. It is left in the sum
        over all, the router's, which knows of nobody who went before it came."""
        members = [_totals(each) for each in status.members]
        left = [whole - sum(parts) for whole, *parts in zip(_totals(status), *members, strict=True)]
        there = {each.engine_id for each in status.members}
        gone = [each.engine_id for each in before.members if each.engine_id not in there]
        if gone:
            final = list(map(sub, left, self._left))
            for name in gone[1:]:  # what they said in the end goes to the first's account
                final = list(map(sub, final, self._engines.said(name)))
            self._engines.follow(gone[0], final, now_s=now_s)
        self._left = left

    def _observe_steps(self, steps: Iterable[StepStats]) -> None:
        for step in steps:
            times = step.times
            self.step.observe(step.seconds)
            self.batch_size.observe(step.num_requests)
            self.rows.observe(step.num_rows)
            if times.verify_ms:
                self.verify.observe(times.verify_ms / 1e3)
            if times.calibrate_ms:
                self.calibration.observe(times.calibrate_ms / 1e3)
            if times.draft_ms:
                self.draft_step.observe(times.draft_ms / 1e3)
        lengths = Counter(chain.from_iterable(step.draft_lengths for step in steps))
        for length, times_chosen in lengths.items():
            self.draft_length.observe(length, times=times_chosen)


def _totals(status: EngineStatus) -> list[float]:
    """The row of an engine."""
    accepted_at = status.accepted_at_position[:MOST_POSITIONS]
    padding = [0] * (MOST_POSITIONS - len(accepted_at))
    return [*(getattr(status, field) for field in FOLLOWED), *accepted_at, *padding]

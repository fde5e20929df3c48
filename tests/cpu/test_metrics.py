"""What Prometheus is told of an engine, against what was put in."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as parse_text
from tests.engines import FakeEngine, fake_facts

from paceline.runtime.async_llm import AsyncLLM, RequestRecord
from paceline.runtime.config import EngineConfig
from paceline.runtime.counts import Counts, CountsMemory
from paceline.runtime.metrics import FINE_TOKEN_EDGES, FOLLOWED, TOKEN_EDGES, Metrics
from paceline.runtime.types import (
    EngineStatus,
    Event,
    KvLinks,
    RequestMetrics,
    SamplingParams,
    StageTimes,
    StepStats,
    TransferTotals,
)

Sample = tuple[str, frozenset[tuple[str, str]]]

VLLM_NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
)
OUR_NAMES = (
    "step_seconds_bucket",
    "calibration_seconds_bucket",
    "draft_step_seconds_bucket",
    "verify_seconds_bucket",
    "step_batch_size_bucket",
    "step_rows_bucket",
    "draft_length_bucket",
    "build_info",
)
VLLM_TOKEN_EDGES = (
    "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 +Inf"
)
VLLM_FIRST_TOKEN_EDGES = (
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 "
    "640.0 2560.0 +Inf"
)
VLLM_REQUEST_EDGES = (
    "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 "
    "7680.0 +Inf"
)


def make_metrics(
    *, vllm_names: bool = True, model_name: str = "m", counts: Counts | None = None
) -> Metrics:
    return Metrics(
        model_name,
        version="1.2.3",
        num_speculative_tokens=3,
        vllm_names=vllm_names,
        counts=counts,
    )


def scrape(metrics: Metrics) -> dict[Sample, float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    wanted = frozenset({"model_name": "m", "engine": "0", **labels}.items())
    return scrape(metrics)[name, wanted]


def edges(metrics: Metrics, name: str) -> str:
    found = [dict(labels)["le"] for sample, labels in scrape(metrics) if sample == f"{name}_bucket"]
    return " ".join(sorted(found, key=float))


def record(
    *events: tuple[Event, float], num_tokens: int = 5, reason: str | None = "stop"
) -> RequestRecord:
    """A request that arrived at 0 s of the front end's clock and ended at 5 s."""
    return RequestRecord(
        request_id="a",
        num_prompt_tokens=3,
        arrived_s=0.0,
        finished_s=5.0,
        finish_reason=reason,  # type: ignore[arg-type]
        metrics=RequestMetrics(
            num_prompt_tokens=3,
            num_tokens=num_tokens,
            num_cached_tokens=0,
            rounds=2,
            drafted=4,
            accepted=3,
            accepted_at=(0, 1, 1),
            times=StageTimes(),
            events=events,
        ),
    )


def step(*, draft_lengths: tuple[int, ...] = (2, 3), calibrate_ms: float = 1.0) -> StepStats:
    return StepStats(
        seconds=0.012,
        times=StageTimes(calibrate_ms=calibrate_ms, draft_ms=2.0, verify_ms=4.0),
        num_requests=3,
        num_rows=9,
        draft_lengths=draft_lengths,
    )


@pytest.mark.parametrize("prefix", ["paceline:", "vllm:"])
def test_every_name_people_query_is_there_with_model_and_engine(prefix: str) -> None:
    series = scrape(make_metrics())
    for name in VLLM_NAMES:
        labels = [dict(labels) for sample, labels in series if sample == prefix + name]
        assert labels, f"no {prefix}{name}"
        assert all(one["model_name"] == "m" and one["engine"] == "0" for one in labels)


def test_vllm_names_are_there_only_when_asked_for_and_only_for_what_vllm_has() -> None:
    asked = {name for name, _ in scrape(make_metrics()) if name.startswith("vllm:")}
    assert not any(f"vllm:{name}" in asked for name in OUR_NAMES)
    silent = {name for name, _ in scrape(make_metrics(vllm_names=False))}
    assert {f"paceline:{name}" for name in OUR_NAMES} <= silent
    assert not any(name.startswith("vllm:") for name in silent)


def test_vllm_histograms_have_vllm_edges_and_ours_are_finer() -> None:
    metrics = make_metrics()
    for name, expected in (
        ("inter_token_latency_seconds", VLLM_TOKEN_EDGES),
        ("request_time_per_output_token_seconds", VLLM_TOKEN_EDGES),
        ("time_to_first_token_seconds", VLLM_FIRST_TOKEN_EDGES),
        ("e2e_request_latency_seconds", VLLM_REQUEST_EDGES),
        ("request_queue_time_seconds", VLLM_REQUEST_EDGES),
        ("request_prefill_time_seconds", VLLM_REQUEST_EDGES),
        ("request_decode_time_seconds", VLLM_REQUEST_EDGES),
    ):
        assert edges(metrics, f"vllm:{name}") == expected
        assert set(expected.split()) <= set(edges(metrics, f"paceline:{name}").split())
    ours = edges(metrics, "paceline:inter_token_latency_seconds").split()
    assert sum(float(edge) < 0.01 for edge in ours) >= 8


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 100) | st.sampled_from([*FINE_TOKEN_EDGES, *TOKEN_EDGES]), max_size=40)
)
def test_a_bucket_counts_the_values_up_to_its_edge_under_both_names(values: list[float]) -> None:
    metrics = make_metrics()
    for gap in values:
        metrics.inter_token.observe(gap)
    series = scrape(metrics)
    for (name, labels), found in series.items():
        if name.endswith(":inter_token_latency_seconds_bucket"):
            edge = float(dict(labels)["le"])
            assert found == sum(gap <= edge for gap in values), f"at {edge}"
        if name.endswith(":inter_token_latency_seconds_count"):
            assert found == len(values)
        if name.endswith(":inter_token_latency_seconds_sum"):
            assert found == pytest.approx(sum(values))


Work = tuple[int, int, bool]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.booleans()), max_size=30))
def test_counters_never_fall_and_lose_nothing_when_the_engine_starts_anew(work: list[Work]) -> None:
    metrics = make_metrics()
    steps = tokens = 0
    total, before = 0, 0.0
    for num_steps, num_tokens, restart in work:
        # a restart shows where a total falls; this one does by its steps
        if restart and steps > num_steps:
            steps = tokens = 0
        steps, tokens, total = steps + num_steps, tokens + num_tokens, total + num_tokens
        metrics.on_status(
            EngineStatus(
                num_steps=steps,
                generation_tokens=tokens,
                accepted=tokens,
                accepted_at_position=(tokens, tokens // 2),
            )
        )
        now = value(metrics, "paceline:generation_tokens_total")
        assert now >= before
        before = now
    assert before == total
    assert value(metrics, "vllm:generation_tokens_total") == total
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == total
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert value(metrics, name, position="0") == total


def test_a_status_becomes_gauges_counters_and_histograms() -> None:
    metrics = make_metrics()
    metrics.on_status(
        EngineStatus(
            num_running=3,
            num_waiting=2,
            num_blocks=80,
            num_free_blocks=60,
            num_steps=2,
            num_preemptions=4,
            prompt_tokens=100,
            generation_tokens=50,
            prefix_queries=90,
            prefix_hits=30,
            num_drafts=20,
            drafted=60,
            accepted=40,
            accepted_at_position=(20, 12, 5, 3),
            steps=(step(), step(draft_lengths=(), calibrate_ms=0.0)),
        )
    )
    for name, expected in (
        ("num_requests_running", 3),
        ("num_requests_waiting", 2),
        ("kv_cache_usage_perc", 0.25),
        ("num_preemptions_total", 4),
        ("prompt_tokens_total", 100),
        ("generation_tokens_total", 50),
        ("prefix_cache_queries_total", 90),
        ("prefix_cache_hits_total", 30),
        ("spec_decode_num_drafts_total", 20),
        ("spec_decode_num_draft_tokens_total", 60),
        ("spec_decode_num_accepted_tokens_total", 40),
    ):
        assert value(metrics, f"paceline:{name}") == value(metrics, f"vllm:{name}") == expected
    positions = "paceline:spec_decode_num_accepted_tokens_per_pos_total"
    accepted = [value(metrics, positions, position=str(i)) for i in range(4)]
    assert accepted == [20, 12, 5, 3]
    for name, count, total in (
        ("step_seconds", 2, 0.024),
        ("calibration_seconds", 1, 0.001),
        ("draft_step_seconds", 2, 0.004),
        ("verify_seconds", 2, 0.008),
        ("step_batch_size", 2, 6),
        ("step_rows", 2, 18),
        ("draft_length", 2, 5),
    ):
        assert value(metrics, f"paceline:{name}_count") == count, name
        assert value(metrics, f"paceline:{name}_sum") == pytest.approx(total), name
    assert value(metrics, "paceline:draft_length_bucket", le="2.0") == 1
    assert value(metrics, "paceline:build_info", version="1.2.3") == 1


def test_positions_count_from_zero_before_anything_was_accepted() -> None:
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [value(make_metrics(), name, position=str(i)) for i in range(3)] == [0, 0, 0]


def test_an_engine_without_blocks_uses_none() -> None:
    assert value(make_metrics(), "vllm:kv_cache_usage_perc") == 0.0


def test_a_finished_request_is_timed_by_its_events() -> None:
    metrics = make_metrics()
    metrics.on_finished(
        record(
            (Event.QUEUED, 11.0),
            (Event.SCHEDULED, 11.5),
            (Event.PREEMPTED, 11.7),
            (Event.SCHEDULED, 11.8),
            (Event.FIRST_TOKEN, 12.75),
            (Event.FINISHED, 14.75),
        )
    )
    for name, expected in (
        ("request_queue_time_seconds", 0.5),
        ("request_prefill_time_seconds", 1.25),
        ("request_decode_time_seconds", 2.0),
        ("request_time_per_output_token_seconds", 0.5),
        ("e2e_request_latency_seconds", 5.0),
    ):
        assert value(metrics, f"vllm:{name}_count") == 1
        assert value(metrics, f"vllm:{name}_sum") == pytest.approx(expected), name
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 0


def test_what_never_happened_to_a_request_is_not_timed() -> None:
    metrics = make_metrics()
    metrics.on_finished(record((Event.QUEUED, 1.0), (Event.FINISHED, 2.0), reason="abort"))
    lost = record(reason=None)
    lost.metrics = None
    metrics.on_finished(lost)
    metrics.on_finished(
        record(
            (Event.QUEUED, 1.0),
            (Event.SCHEDULED, 1.0),
            (Event.FIRST_TOKEN, 1.0),
            (Event.FINISHED, 1.0),
            num_tokens=1,
            reason="length",
        )
    )
    counts = {
        name: value(metrics, f"vllm:{name}_count")
        for name in (
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_time_per_output_token_seconds",
            "e2e_request_latency_seconds",
        )
    }
    assert list(counts.values()) == [1, 1, 1, 0, 3]
    ended = {
        reason: value(metrics, "vllm:request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    }
    assert ended == {"stop": 0, "length": 1, "abort": 1, "error": 1}


def test_engines_that_serve_together_are_told_of_each_and_their_sum_is_the_servers() -> None:
    links = KvLinks(addresses=("10.0.0.1:1",))
    prefill = EngineStatus(
        engine_id="prefill-0",
        num_running=2,
        num_waiting=1,
        num_blocks=10,
        num_free_blocks=5,
        links=links,
        transfers=TransferTotals(producing=2, produced=9, expired=1),
    )
    totals = TransferTotals(
        fetching=1, fetched=4, failed=2, num_bytes=4096, seconds=2.0, unoverlapped_s=0.5
    )
    decode = EngineStatus(
        engine_id="decode-0", num_running=7, num_waiting=0, links=links, transfers=totals
    )
    metrics = make_metrics()
    status = EngineStatus(num_running=9, num_waiting=4, members=(prefill, decode))
    metrics.on_status(status)
    running, waiting = "paceline:num_requests_running", "paceline:num_requests_waiting"
    found = [v for (name, _), v in scrape(metrics).items() if name == running]
    assert sorted(found) == [2, 7], "engine 0 would count them twice"
    assert value(metrics, "paceline:kv_cache_usage_perc", engine="prefill-0") == 0.5
    assert value(metrics, waiting, engine="prefill-0") == 1
    assert value(metrics, waiting, engine="router") == 3
    for name, engine, expected in (
        ("kv_transfers_total", "decode-0", 4),
        ("kv_transfer_bytes_total", "decode-0", 4096),
        ("kv_transfer_seconds_total", "decode-0", 2.0),
        ("kv_transfer_unoverlapped_seconds_total", "decode-0", 0.5),
        ("kv_transfer_stall_seconds_total", "decode-0", 0),
        ("kv_transfer_failed_total", "decode-0", 2),
        ("kv_transfer_corrupt_total", "decode-0", 0),
        ("kv_lease_expired_total", "prefill-0", 1),
        ("kv_transfers_producing", "prefill-0", 2),
        ("kv_transfers_fetching", "decode-0", 1),
    ):
        assert value(metrics, f"paceline:{name}", engine=engine) == expected
    for name, expected in (
        ("nixl_xfer_time_seconds_sum", 2.0),
        ("nixl_xfer_time_seconds_count", 4),
        ("nixl_bytes_transferred_sum", 4096),
        ("nixl_num_failed_transfers_total", 2),
        ("nixl_num_kv_expired_reqs_total", 0),
    ):
        assert value(metrics, f"vllm:{name}", engine="decode-0") == expected


class Frontends:
    """Two, each with a router of its own, over engines that say the same to both."""

    def __init__(self) -> None:
        self.memory = CountsMemory(num_slots=2)
        self.counts = self.memory.counts(slot=1)
        self.metrics = [self._make(slot) for slot in range(2)]
        self.left = [0, 0]
        """Tokens of engines that are gone, as each router knows of them."""
        self.engines = {"engine-0": 0}
        """Tokens written so far."""
        self.unseen = False
        """Whether an engine has gone since the first heard a status."""

    def _make(self, slot: int) -> Metrics:
        return make_metrics(vllm_names=False, counts=self.memory.counts(slot=slot))

    def hear(self, slot: int) -> None:
        members = tuple(
            EngineStatus(engine_id=name, num_steps=tokens, generation_tokens=tokens, num_waiting=1)
            for name, tokens in self.engines.items()
        )
        total = self.left[slot] + sum(self.engines.values())
        self.metrics[slot].on_status(
            EngineStatus(
                num_steps=total,
                generation_tokens=total,
                num_waiting=len(members) + slot,
                members=members,
            )
        )
        if slot == 0:
            self.unseen = False

    def lose(self, name: str) -> None:
        tokens = self.engines.pop(name)
        self.left = [left + tokens for left in self.left]
        self.unseen = True

    def die(self, slot: int) -> None:
        """Another takes its place, and hears of engines as they come to be known."""
        self.metrics[slot] = self._make(slot)
        self.left[slot] = 0
        self.metrics[slot].on_status(EngineStatus())

    def tokens(self) -> float:
        """As any frontend would tell."""
        return self.counts.engines.sums()[FOLLOWED.index("generation_tokens")]


def test_requests_of_all_frontends_are_told_by_each_and_outlive_it() -> None:
    frontends = Frontends()
    for slot, seconds in ((0, 0.002), (1, 0.004), (1, 3.0)):
        frontends.metrics[slot].first_token.observe(seconds)
        frontends.metrics[slot].on_finished(record(reason="length"))
    frontends.die(1)
    frontends.metrics[1].first_token.observe(0.001)
    for each in frontends.metrics:
        name = "paceline:time_to_first_token_seconds"
        assert value(each, f"{name}_count") == 4
        assert value(each, f"{name}_sum") == pytest.approx(3.007)
        assert value(each, f"{name}_bucket", le="0.005") == 3
        assert value(each, "paceline:request_success_total", finished_reason="length") == 3
        assert value(each, "paceline:e2e_request_latency_seconds_sum") == 15


def test_what_engines_say_to_all_frontends_is_counted_once() -> None:
    frontends = Frontends()
    transfers = TransferTotals(fetched=2, num_bytes=5)
    engine = EngineStatus(engine_id="engine-0", num_steps=2, drafted=8, transfers=transfers)
    whole = EngineStatus(num_steps=2, drafted=8, steps=(step(), step()), members=(engine,))
    later = EngineStatus(
        num_steps=3,
        drafted=9,
        steps=(step(),),
        members=(
            EngineStatus(
                engine_id="engine-0",
                num_steps=3,
                drafted=9,
                transfers=TransferTotals(fetched=3, num_bytes=6),
            ),
        ),
    )
    first, second = frontends.metrics
    for each in (first, second):
        each.on_status(whole)
    second.on_status(later)  # told before the first has heard it: what is scraped must not fall
    for each in (first, second):
        assert value(each, "paceline:spec_decode_num_draft_tokens_total") == 8
        assert value(each, "paceline:step_seconds_count") == 2
        assert value(each, "paceline:kv_transfer_bytes_total") == 5


Happening = tuple[str, int]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "hear", "hear other", "come", "lose", "die", "die other"]),
            st.integers(0, 9),
        ),
        max_size=25,
    )
)
def test_whatever_dies_counters_neither_fall_nor_count_twice(happenings: list[Happening]) -> None:
    frontends = Frontends()
    written, before, num_engines = 0, 0.0, 1
    for what, number in happenings:
        names = list(frontends.engines)
        name = names[number % len(names)] if names else None
        if what == "write" and name is not None:
            frontends.engines[name] += number
            written += number
        elif what == "come":
            frontends.engines[f"engine-{num_engines}"] = 0
            num_engines += 1
        elif what == "lose" and name is not None:
            frontends.hear(0)  # an engine nobody had heard of is not missed
            frontends.engines[name] += number
            written += number
            frontends.lose(name)
        elif what == "hear":
            frontends.hear(0)
            assert frontends.tokens() == written
        elif what == "hear other":
            frontends.hear(1)
        elif what == "die":
            if frontends.unseen:  # its successor would have nobody to hear it from
                frontends.hear(0)
            frontends.die(0)
        elif what == "die other":
            frontends.die(1)
        assert before <= frontends.tokens() <= written
        before = frontends.tokens()
    frontends.hear(0)
    assert frontends.tokens() == written
    told = [value(each, "paceline:generation_tokens_total") for each in frontends.metrics]
    assert told == [written] * 2


def test_an_engine_alone_has_no_name_and_two_keep_theirs() -> None:
    frontends = Frontends()
    waiting = "paceline:num_requests_waiting"

    def labels() -> list[set[str]]:
        for slot in range(2):
            frontends.hear(slot)
        return [
            {dict(found)["engine"] for name, found in scrape(each) if name == waiting}
            for each in frontends.metrics
        ]

    assert labels() == [{"0"}] * 2
    # what waits in the second's router waits for all
    assert [value(each, waiting) for each in frontends.metrics] == [2, 2]
    frontends.engines["engine-1"] = 0
    labels()
    assert labels() == [{"engine-0", "engine-1", "router"}] * 2
    frontends.lose("engine-0")
    frontends.die(1)
    assert labels() == [{"engine-1", "router"}] * 2
    assert [value(each, waiting, engine="router") for each in frontends.metrics] == [1, 1]


def test_positions_past_all_that_can_be_drafted_do_no_harm() -> None:
    metrics = make_metrics()
    metrics.on_status(EngineStatus(num_steps=1, accepted_at_position=(2,) * 100))
    name = "paceline:spec_decode_num_accepted_tokens_per_pos_total"
    found = [v for (sample, _), v in scrape(metrics).items() if sample == name]
    assert found == [2] * 64


def test_an_engine_without_links_has_no_transfers_to_tell_of() -> None:
    names = {name for name, _ in scrape(make_metrics())}
    assert not [name for name in names if "kv_transfer" in name or "nixl" in name]


def test_two_servers_in_one_process_count_apart() -> None:
    one, other = make_metrics(model_name="one"), make_metrics(model_name="other")
    one.on_status(EngineStatus(num_steps=1, generation_tokens=7))
    for metrics, name, expected in ((one, "one", 7), (other, "other", 0)):
        wanted = frozenset({("model_name", name), ("engine", "0")})
        assert scrape(metrics)["paceline:generation_tokens_total", wanted] == expected
        assert {dict(labels)["model_name"] for _, labels in scrape(metrics)} == {name}


def test_what_is_scraped_reads_back_as_what_was_counted() -> None:
    metrics = make_metrics(model_name='a "quoted"\nname')
    metrics.on_status(EngineStatus(num_steps=1, generation_tokens=7, steps=(step(),)))
    text, content_type = metrics.exposition(
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    )
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = list(parse_text(text.decode()))
    assert len({family.name for family in families}) == len(families)
    read = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    assert read == scrape(metrics)


def test_requests_of_a_server_are_counted_as_their_clients_saw_them(tmp_path: Path) -> None:
    metrics = make_metrics()

    async def serve() -> None:
        engine = FakeEngine(tokens_per_step=3)
        llm = AsyncLLM(engine, fake_facts(tmp_path), EngineConfig(), observer=metrics)
        params = SamplingParams(max_tokens=7)

        async def read() -> int:
            return sum(
                [
                    len(part.token_ids)
                    async for out in llm.generate("hi", params)
                    for part in out.outputs
                ]
            )

        assert await asyncio.gather(*(read() for _ in range(4))) == [7] * 4
        wanted = asyncio.get_running_loop().time() + 10
        while value(metrics, "vllm:generation_tokens_total") < 28:
            assert asyncio.get_running_loop().time() < wanted, "no status within 10 s"
            await asyncio.sleep(0.05)
        await llm.close()

    asyncio.run(serve())
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 4
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 4
    # 3, 3 and 1 tokens
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 8
    assert value(metrics, "vllm:request_decode_time_seconds_count") == 4
    assert value(metrics, "vllm:prompt_tokens_total") == 8
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total") == 24
    assert value(metrics, "paceline:step_seconds_count") > 0

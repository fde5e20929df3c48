"""The overload benchmark: what counts as good, who comes back when, and what the curves are made of."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks import overload, plot, serve
from benchmarks.client import Answer, Client
from benchmarks.overload import Limits, Wanted
from tests.engines import FakeEngine, fake_facts, serving

from paceline.runtime.config import EngineConfig, ServerConfig

LIMITS = Limits(ttft_s=1.0, tpot_s=0.1)
CHUNKS: list[dict[str, Any]] = [
    {"choices": [{"text": "a"}]},
    {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}},
]
STREAM = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS).encode()


def answer_of(
    *,
    status: int = 200,
    start_s: float = 0.0,
    first_s: float = 0.1,
    tokens: int = 11,
    end_s: float = 1.0,
) -> Answer:
    answer = Answer()
    answer.feed(STREAM if status == 200 else b"no")
    answer.close(status)
    answer.start_s, answer.arrivals_s, answer.end_s = start_s, [start_s + first_s], end_s
    answer.closed_s = end_s
    if answer.usage is not None:
        answer.usage.completion_tokens = tokens
    return answer


def wanted_of(*answers: Answer, asked_s: float = 0.0) -> Wanted:
    return Wanted(asked_s=asked_s, answers=list(answers))


def test_good_is_what_keeps_both_limits() -> None:
    assert LIMITS.keeps(answer_of())
    assert not LIMITS.keeps(answer_of(first_s=1.1, end_s=1.2))
    assert not LIMITS.keeps(answer_of(end_s=1.2)), "0.11 s per token"
    assert LIMITS.keeps(answer_of(tokens=1)), "one token has no time per further one"
    assert not LIMITS.keeps(answer_of(status=429))


def test_rates_count_what_ends_between_the_rise_and_the_last_arrival() -> None:
    ends = [1.0, 3.0, 9.0, 11.0]
    done = [wanted_of(answer_of(start_s=end - 0.5, end_s=end)) for end in ends]
    slow = wanted_of(answer_of(start_s=3.0, end_s=8.0))
    row = overload.summary([*done, slow], limits=LIMITS, begin_s=0.0, seconds=10.0)
    assert row["throughput"] == pytest.approx(3 / 8)
    assert row["goodput"] == pytest.approx(2 / 8)
    assert row["completed"] == 5
    assert row["offered"] == pytest.approx(0.5)


def test_refusals_are_no_errors_and_everything_else_is() -> None:
    refused = answer_of(status=429, end_s=0.02)
    late = wanted_of(refused, answer_of(start_s=3.0, end_s=4.0), asked_s=0.0)
    row = overload.summary(
        [late, wanted_of(refused), wanted_of(answer_of(status=503))],
        limits=LIMITS,
        begin_s=0.0,
        seconds=10.0,
    )
    assert (row["asked"], row["refusals"], row["given_up"]) == (4, 2, 1)
    assert row["refused_share"] == 0.5
    assert row["errors"] == 1
    assert "HTTP 503" in next(iter(row["error_texts"]))
    assert row["p50_waited_s"] == pytest.approx(3.0)
    assert row["p99_refusal_s"] == pytest.approx(0.02)


def point(clients: str, multiple: float, goodput: float, **more: Any) -> dict[str, Any]:
    names = ("offered", "throughput", "refused_share", "p50_ttft_s", "p50_waited_s")
    names += ("p99_ttft_s", "p99_refusal_s")
    figures = dict.fromkeys(names, 0.0)
    return {
        **figures,
        "clients": clients,
        "multiple": multiple,
        "goodput": goodput,
        "errors": 0,
        **more,
    }


def test_rounds_are_pooled_and_the_last_point_is_compared_with_the_peak() -> None:
    rows = [
        point("raw", 3.0, 16.0, refused_share=0.6, p99_ttft_s=1.0),
        point("raw", 1.0, 20.0),
        point("patient", 3.0, 10.0),
        point("raw", 3.0, 20.0, refused_share=0.7, p99_ttft_s=1.5, errors=1),
        point("raw", 1.0, 20.0),
    ]
    points = overload.pooled(rows)
    assert [(p["clients"], p["multiple"]) for p in points] == [
        ("raw", 1.0),
        ("raw", 3.0),
        ("patient", 3.0),
    ]
    found = overload.ratios(points)
    assert found["goodput_at_3x_over_peak"] == pytest.approx(0.9)
    assert found["refused_share_at_3x"] == pytest.approx(0.65)
    assert found["p99_ttft_at_3x_s"] == 1.5
    assert found["errors"] == 1.0


class Refusing:
    """A server that refuses so many requests, and then answers."""

    def __init__(self, *, refusals: int, retry_after: str = "0.05") -> None:
        self.refusals, self.retry_after = refusals, retry_after
        self.bodies: list[bytes] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [x for x in head.split(b"\r\n") if x.lower().startswith(b"content-l")]
                self.bodies.append(await reader.readexactly(int(lengths[0].split(b":")[1])))
                if len(self.bodies) <= self.refusals:
                    start = f"429 Too Many Requests\r\nRetry-After: {self.retry_after}"
                    body = b"{}"
                else:
                    start, body = "200 OK", STREAM
                writer.write(
                    f"HTTP/1.1 {start}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
                )
        except asyncio.IncompleteReadError:
            writer.close()


def ask_patiently(server: Refusing, *, patience_s: float) -> Wanted:
    async def main() -> Wanted:
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        client = Client(f"http://127.0.0.1:{port}", api_key=None, timeout_s=5.0)
        ask = serve.Ask(token_ids=[1], max_tokens=2)
        asker = overload.Asker(client, serve.Form(model="m"), [ask])
        try:
            until_s = time.perf_counter() + patience_s
            return await asker.patient(until_s=until_s, choices=random.Random(0))
        finally:
            client.close()
            listening.close()

    return asyncio.run(main())


def test_a_patient_client_comes_back_when_it_is_told_to() -> None:
    server = Refusing(refusals=2)
    wanted = ask_patiently(server, patience_s=5.0)
    assert [answer.status for answer in wanted.answers] == [429, 429, 200]
    assert len(set(server.bodies)) == 1, "the same request each time"
    starts = [answer.start_s for answer in wanted.answers]
    assert all(0.03 < b - a < 1.0 for a, b in itertools.pairwise(starts))


def test_a_patient_client_gives_up_rather_than_come_too_late() -> None:
    wanted = ask_patiently(Refusing(refusals=9, retry_after="3"), patience_s=0.5)
    assert [answer.status for answer in wanted.answers] == [429]
    assert wanted.was_refused


def test_a_retry_after_that_is_a_date_is_as_if_there_were_none() -> None:
    server = Refusing(refusals=9, retry_after="Fri, 21 Nov 2026 12:00:00 GMT")
    wanted = ask_patiently(server, patience_s=0.0)
    assert wanted.last.retry_after_s is None


def test_the_command_measures_our_front_end_and_the_curve_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = fake_facts(tmp_path)
    assert facts.tokenizer is not None
    monkeypatch.setattr(overload, "MULTIPLES", (1.0, 3.0))
    output = tmp_path / "overload.json"
    flags = ["--model", str(facts.tokenizer.folder), "--served-model-name", "m"]
    flags += ["--seconds", "0.8", "--rounds", "1", "--max-num-seqs", "4", "--input-len", "16"]
    flags += ["--output-len", "9", "--output", str(output)]
    config = EngineConfig(max_queued_requests=4, max_num_seqs=4)
    engine = FakeEngine(step_s=0.02, num_seqs=4)
    server = ServerConfig(served_model_name="m")
    with serving(engine, facts, config=config, server=server) as served:
        monkeypatch.setattr(sys, "argv", ["overload", "--base-url", served.url, *flags])
        overload.main()
    made = json.loads(output.read_text())
    assert [row["clients"] for row in made["rows"]] == ["raw", "raw", "patient", "patient"]
    assert made["ratios"]["errors"] == 0
    assert made["rows"][1]["refusals"] > 0
    assert made["notes"]["capacity, requests/s"] > 0
    salts = [request.cache_salt for request in engine.submitted]
    assert len(set(salts)) == len(salts)
    monkeypatch.setattr(sys, "argv", ["plot", str(output)])
    plot.main()
    assert output.with_suffix(".png").stat().st_size > 10_000

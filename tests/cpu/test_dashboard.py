"""Every query of the Grafana dashboard, answered by a real Prometheus that scrapes our metrics."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from paceline.runtime.async_llm import RequestRecord
from paceline.runtime.metrics import Metrics
from paceline.runtime.types import (
    EngineStatus,
    Event,
    RequestMetrics,
    StageTimes,
    StepStats,
)

PROMETHEUS = shutil.which("prometheus")
DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/paceline.json"
SCRAPE_S = 0.2
WINDOW = "2s"
"""Stands for Grafana's `$__rate_interval`: several scrapes."""
ANSWER_S = 30.0


class Traffic:
    """An engine under load, one moment further at every scrape."""

    def __init__(self) -> None:
        self.metrics = Metrics("org/model-1.5B", version="1.2.3", num_speculative_tokens=3)
        self._moments = 0

    def advance(self) -> None:
        self._moments += 1
        rounds = 20 * self._moments
        step = StepStats(
            seconds=0.011,
            times=StageTimes(calibrate_ms=2.0, draft_ms=3.0, verify_ms=5.0),
            num_requests=4,
            num_rows=14,
            draft_lengths=(3, 3, 2, 1),
        )
        self.metrics.on_status(
            EngineStatus(
                num_running=4,
                num_waiting=2,
                num_blocks=100,
                num_free_blocks=70,
                num_steps=5 * self._moments,
                num_preemptions=self._moments,
                prompt_tokens=30 * self._moments,
                generation_tokens=3 * rounds,
                prefix_queries=40 * self._moments,
                prefix_hits=10 * self._moments,
                num_drafts=rounds,
                drafted=3 * rounds,
                accepted=2 * rounds,
                accepted_at_position=(rounds, rounds // 2, rounds // 2),
                steps=(step,) * 5,
            )
        )
        events = ((Event.QUEUED, 0.0), (Event.SCHEDULED, 0.1), (Event.FIRST_TOKEN, 0.2))
        record = RequestRecord(
            request_id="a", num_prompt_tokens=3, arrived_s=0.0, finished_s=1.0, finish_reason="stop"
        )
        self.metrics.on_delta(record, num_tokens=1, now_s=0.2)
        record.last_token_s = 0.2
        self.metrics.on_delta(record, num_tokens=3, now_s=0.204)
        record.metrics = RequestMetrics(
            num_prompt_tokens=3,
            num_tokens=4,
            num_cached_tokens=0,
            rounds=2,
            drafted=3,
            accepted=2,
            accepted_at=(0, 0, 1),
            times=StageTimes(),
            events=(*events, (Event.FINISHED, 0.9)),
        )
        self.metrics.on_finished(record)


@pytest.fixture(scope="module")
def metrics_port() -> Iterator[int]:
    traffic = Traffic()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            traffic.advance()
            body, content_type = traffic.metrics.exposition(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def prometheus(metrics_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has scraped for longer than a rate's window."""
    if PROMETHEUS is None:
        pytest.skip("no prometheus on this machine")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "prometheus.yml").write_text(
        json.dumps(
            {
                "scrape_configs": [
                    {
                        "job_name": "paceline",
                        "scrape_interval": f"{int(SCRAPE_S * 1000)}ms",
                        "scrape_timeout": f"{int(SCRAPE_S * 1000)}ms",
                        "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}],
                    }
                ]
            }
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=stream,
            stderr=stream,
        )
    try:
        _wait_for_scrapes(address, process, log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)


def _wait_for_scrapes(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"prometheus ended: {log.read_text()}"
        try:
            found = query(address, "count_over_time(paceline:num_requests_running[1m])")
        except OSError:
            found = []
        if found and found[0] >= 3 / SCRAPE_S:
            return
        time.sleep(0.2)
    raise AssertionError(f"prometheus has not scraped within {ANSWER_S:g} s: {log.read_text()}")


def query(address: str, expression: str) -> list[float]:
    """What an expression yields now, one value per series."""
    url = f"{address}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{expression}: {json.load(error)['error']}") from None
    return [float(series["value"][1]) for series in answer["data"]["result"]]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def targets() -> list[tuple[str, str]]:
    """Every panel's title and expression."""
    return [
        (panel["title"], target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]


def ask(address: str, expression: str, *, model_name: str) -> list[float]:
    """The finite values of a dashboard's expression, as Grafana would send it."""
    sent = expression.replace("$model_name", model_name).replace("$__rate_interval", WINDOW)
    assert "$" not in sent, f"an unknown variable in {expression}"
    return [value for value in query(address, sent) if math.isfinite(value)]


@pytest.mark.parametrize(("title", "expression"), targets())
def test_every_query_of_the_dashboard_returns_data(
    prometheus: str, title: str, expression: str
) -> None:
    for chosen in (".*", "org/model-1.5B"):
        assert ask(prometheus, expression, model_name=chosen), f"no data for {title}: {expression}"


def test_every_query_follows_the_model_chosen(prometheus: str) -> None:
    for title, expression in targets():
        assert ask(prometheus, expression, model_name="another") == [], title


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Requests", [4, 2]),
        ("Acceptance rate", [2 / 3]),
        ("Acceptance by position", [1, 0.5, 0.5]),
        ("Tokens per drafting round", [3]),
        ("Requests per step", [4]),
        ("Stages of a step (mean)", [0.002, 0.003, 0.005]),
        ("Where a request's time goes (mean)", [0.1, 0.1, 0.7]),
        ("KV cache in use", [0.3]),
        ("Prefix cache hits", [0.25]),
    ],
)
def test_a_panel_shows_what_was_put_in(prometheus: str, title: str, expected: list[float]) -> None:
    found = [
        value
        for panel, expression in targets()
        if panel == title
        for value in ask(prometheus, expression, model_name=".*")
    ]
    assert found[: len(expected)] == pytest.approx(expected)


def test_the_dashboard_can_be_imported_anywhere() -> None:
    loaded = dashboard()
    assert {one["name"]: one["type"] for one in loaded["templating"]["list"]} == {
        "datasource": "datasource",
        "model_name": "query",
    }
    panels = loaded["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Speculation", "KV cache", "Preemptions"]
    for panel in panels:
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}", panel["title"]


def test_panels_do_not_overlap_and_stay_within_the_grid() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells


def test_every_series_we_add_is_on_the_dashboard() -> None:
    shown = " ".join(expression for _, expression in targets())
    families = {family.name for family in Traffic().metrics.registry.collect()}
    names = {re.sub(r"^paceline:", "", name) for name in families}
    assert {name for name in names if f"paceline:{name}" not in shown} == set()

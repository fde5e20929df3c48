"""`paceline top` shows what a server says, at any width, and outlives it."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from rich.console import Console
from tests.engines import FakeEngine, Served, fake_facts, serving

from paceline.actors.cli import main
from paceline.actors.commands import reach
from paceline.actors.commands.top import Watcher
from paceline.actors.commands.top_frame import View, duration, frame, sparkline
from paceline.actors.commands.top_sample import (
    BETWEEN_TOKENS,
    FIRST_TOKEN,
    Card,
    Counts,
    Live,
    Sample,
    Transfers,
    between,
    quantile,
)
from paceline.runtime.config import ServerConfig

SOON_S = 20.0
INF = math.inf


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(FakeEngine(step_s=0.002), fake_facts(tmp_path)) as server:
        yield server


def reaching(url: str, **more: Any) -> httpx.Client:
    given = {"api_key": None, "ca_certs": None, "client_cert": None, **more}
    return reach.client(argparse.Namespace(url=url, **given), timeout_s=SOON_S)


def drawn(view: View, *, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(frame(view, width=width))
    return out.getvalue()


def member(name: str, role: str, k: int, **more: Any) -> Counts:
    return Counts(
        engine_id=name,
        role=role,
        num_running=3,
        num_waiting=1,
        num_blocks=100,
        num_free_blocks=25,
        generation_tokens=1000 * k,
        prompt_tokens=500 * k,
        drafted=100 * k,
        accepted=75 * k,
        transfers=Transfers(num_bytes=2_000_000 * k),
        **more,
    )


def sample(k: int, *members: Counts, cards: tuple[Card, ...] = ()) -> Sample:
    members = members or (member("prefill-0", "prefill", k), member("decode-0", "decode", k))
    total = Counts(
        num_running=6,
        num_waiting=5,
        generation_tokens=2000 * k,
        prompt_tokens=1000 * k,
        members=members,
    )
    histograms = {
        FIRST_TOKEN: {0.1: 5.0 * k, 0.2: 10.0 * k, INF: 10.0 * k},
        BETWEEN_TOKENS: {0.001: 0.0, 0.002: 100.0 * k, INF: 100.0 * k},
    }
    live = Live(model="m", status=total, uptime_s=60.0 * k, engines=cards)
    return Sample(float(2 * k), live, 7, histograms)


# --------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("before", "now", "part", "value"),
    [
        ({}, {}, 0.5, None),
        ({0.1: 4.0, INF: 4.0}, {0.1: 4.0, INF: 4.0}, 0.5, None),
        ({}, {0.1: 0.0, 0.2: 10.0, INF: 10.0}, 0.5, 0.15),
        ({0.1: 9.0, 0.2: 9.0, INF: 9.0}, {0.1: 9.0, 0.2: 19.0, INF: 19.0}, 0.5, 0.15),
        ({}, {0.1: 1.0, 0.2: 1.0, INF: 4.0}, 0.9, 0.2),
    ],
)
def test_a_quantile_lies_within_its_bucket(
    before: dict[float, float], now: dict[float, float], part: float, value: float | None
) -> None:
    assert quantile(before, now, part) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0:00"), (61, "1:01"), (3661, "1:01:01"), (90_000, "1 d 1 h")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("values", "cells", "line"),
    [((), 5, ""), ((0.0, 0.0), 5, ""), ((1, 8), 5, "▁█"), ((8, 0, 4), 2, " █"), ((1,), 0, "")],
)
def test_the_highest_bar_is_a_full_one(values: Any, cells: int, line: str) -> None:
    assert sparkline(values, cells=cells) == line


def test_rates_are_those_between_two_samples() -> None:
    found = between(sample(1), sample(2))
    decode = found.rows[1]
    assert (decode.written, decode.read, decode.transfers) == (500.0, 250.0, 1e6)
    assert (decode.acceptance, decode.kv_used) == (0.75, 0.75)
    assert (found.total.written, found.queued) == (1000.0, 3)
    assert found.first_token == (0.1, pytest.approx(0.19))


def test_an_engine_that_counts_anew_has_no_rate_rather_than_a_wrong_one() -> None:
    found = between(sample(2), sample(3, member("prefill-0", "prefill", 0)))
    assert found.rows[0].written is None


def test_engines_that_have_not_spoken_are_shown_with_their_state_and_why() -> None:
    cards = (
        Card("decode-0", "decode", "draining"),
        Card("decode-1", "decode", "failed", "no room"),
    )
    found = between(sample(1), sample(2, cards=cards))
    states = {row.name: row.state for row in found.rows}
    assert states == {"prefill-0": "serving", "decode-0": "draining", "decode-1": "failed"}
    text = drawn(View(url="u", between=found))
    assert "decode-1: no room" in text


# --------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    view = View(
        url="http://127.0.0.1:8000",
        model="a/very-long-model-name",
        uptime_s=1e6,
        between=between(sample(1), sample(2)),
        history=[float(i) for i in range(100)],
        trouble="cannot ask http://127.0.0.1:8000: nobody is there",
    )
    lines = drawn(view, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.startswith("decode-0") for line in lines)


def test_what_matters_least_goes_first_where_it_is_narrow() -> None:
    view = View(url="u", between=between(sample(1), sample(2)))
    wide, narrow = drawn(view, width=120), drawn(view, width=50)
    assert all(title in wide for title in ("ROLE", "READ/s", "ACCEPT", "KV IN/s", "WRITE/s"))
    assert all(title in narrow for title in ("ENGINE", "RUN", "WAIT", "WRITE/s"))
    assert "ACCEPT" not in narrow


def test_columns_of_what_never_happened_are_left_out() -> None:
    quiet = View(url="u", between=between(None, sample(1)))
    assert "RESTARTS" not in drawn(quiet)
    restarted = member("decode-0", "decode", 1, num_restarts=2, restarting=True)
    text = drawn(View(url="u", between=between(None, sample(1, restarted))))
    assert "RESTARTS" in text
    assert "restarting" in text


# ---------------------------------------------------------------------------------------------- servers


def test_a_server_of_another_version_may_say_more_or_less() -> None:
    body = b'{"model":"m","uptime_s":1.0,"news":1,"status":{"num_running":2,"stored_blocks":[]}}'
    live = msgspec.json.decode(body, type=Live)
    assert (live.status.num_running, live.status.num_blocks) == (2, 0)


def test_one_frame_of_a_real_server(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    httpx.post(f"{served.url}/v1/completions", json={"prompt": "hi", "max_tokens": 9})
    assert main(["top", "--once", "--interval", "0.1", "--url", served.url]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text, "no colours where there is no terminal"
    assert served.url in text
    assert "engine" in text
    assert "serving" in text


def test_a_server_that_goes_away_is_shown_as_it_was_and_asked_again(tmp_path: Path) -> None:
    facts = fake_facts(tmp_path)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(FakeEngine(), facts))
        client = stack.enter_context(reaching(server.url))
        watcher = Watcher(client)
        assert not watcher.look().trouble
        other = stack.enter_context(serving(FakeEngine(), facts))
        client.base_url = httpx.URL("http://127.0.0.1:1")
        gone = watcher.look()
        assert gone.between is not None, "as it was"
        assert "trying again" in drawn(gone)
        client.base_url = httpx.URL(other.url)
        assert not watcher.look().trouble


def test_a_key_that_is_missing_ends_it_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PACELINE_API_KEY", raising=False)
    server = ServerConfig(api_key="k1,k2")
    with serving(FakeEngine(), fake_facts(tmp_path), server=server) as served:
        assert main(["top", "--once", "--url", served.url]) == 2
        assert "wants a key" in capsys.readouterr().err
        monkeypatch.setenv("PACELINE_API_KEY", "k1,k2")
        assert main(["top", "--once", "--interval", "0.1", "--url", served.url]) == 0


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--url", "nonsense"], 2, "--url must be like http://127.0.0.1:8000"),
        (["--url", "ftp://host", "--once"], 2, "--url must be like http://127.0.0.1:8000"),
        (["--interval", "0"], 2, "must be 0.1 to 3600 seconds"),
        (["--interval", "soon"], 2, "must be 0.1 to 3600 seconds"),
        (["--url", "http://127.0.0.1:1", "--once", "--interval", "0.1"], 1, "cannot ask"),
        (["--ca-certs", "/nowhere"], 1, "TLS cannot be set up"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(
    flags: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", *flags]) == code
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_an_interrupt_ends_it_well_and_nothing_heavy_is_loaded(served: Served) -> None:
    code = (
        "import sys\nfrom paceline.actors.cli import main\n"
        f"code = main(['top', '--interval', '0.1', '--url', {served.url!r}])\n"
        "print('heavy:', *(m for m in ('torch', 'ray', 'numpy') if m in sys.modules))\n"
        "sys.exit(code)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("paceline")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=SOON_S)
    finally:
        process.kill()
    assert process.returncode == 0
    assert out.splitlines()[-1].strip() == "heavy:"

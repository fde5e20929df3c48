"""`paceline serve` as a process: it says when it is ready, drains when it is told to stop. The engine
is a fake."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from paceline.actors.throughput import throughput
from paceline.runtime.types import EngineStatus, TransferTotals

ROOT = Path(__file__).parents[2]
SOON_S = 20.0

PROGRAM = """
import sys, tempfile, threading
from pathlib import Path
from paceline.actors import cli
from paceline.actors.commands import serve
from tests.engines import FakeEngine, LinkedFake, fake_facts

engines = []
lose = "--lose" in sys.argv

def connect(config, facts, **how):
    engine = FakeEngine(step_s=0.03)
    engines.append(engine)
    if lose and engine is engines[0]:
        threading.Timer(4.0, engine.fail, ["rank 0 died"]).start()
    return LinkedFake(engine)

if lose:
    sys.argv.remove("--lose")
from paceline.runtime import local
local.connect = connect
sys.argv += ["--distributed-executor-backend", "mp"]
facts = fake_facts(Path(tempfile.mkdtemp()))
serve.examine = lambda config: facts
code = cli.main(["serve", *sys.argv[1:]])
assert all(each.closed for each in engines), "every engine must be closed"
sys.exit(code)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(*flags)`: the command as a process, which does not outlive the test."""
    with contextlib.ExitStack() as stack:

        def call(*flags: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT / '.src'}{os.pathsep}{ROOT}"},
            )
            stack.callback(process.kill)
            return process

        yield call


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    ready = re.match(r"paceline: embedded is ready at (http://\S+)", line)
    assert ready, f"{line!r} {process.communicate(timeout=SOON_S)}"
    return ready[1]


def test_it_finishes_what_runs_and_exits_with_0(start: Start) -> None:
    process = start("--port", "0")
    url = url_of(process)
    body = {"prompt": "hi", "max_tokens": 300, "stream": True}  # longer than the doors wait
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=SOON_S) as response:
        pieces = response.iter_text()
        text = next(pieces)
        process.send_signal(signal.SIGTERM)
        text += "".join(pieces)
    assert text.count("data: {") == 100
    assert text.rstrip().endswith("[DONE]")
    out, err = process.communicate(timeout=SOON_S)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err


def test_while_it_drains_new_requests_get_503(start: Start) -> None:
    process = start("--port", "0")
    url = url_of(process)
    body = {"prompt": "hi", "max_tokens": 400, "stream": True}
    with (
        httpx.Client(base_url=url, timeout=SOON_S) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        pieces = (
            response.iter_text()
        )  # kept: without it the stream is closed, and nothing is left to drain
        next(pieces)
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + SOON_S
        while client.get("/health").status_code != 503:
            assert time.monotonic() < deadline
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        process.send_signal(signal.SIGINT)  # at once: the same signal, from two places
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        assert process.wait(SOON_S) == 130, "a second signal ends it at once"


def test_what_outlasts_the_timeout_is_aborted(start: Start) -> None:
    process = start("--port", "0", "--shutdown-timeout", "0.1")
    body = {"prompt": "hi", "max_tokens": 500, "stream": True}
    url = url_of(process)
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=SOON_S) as response:
        pieces = response.iter_text()
        next(pieces)
        process.send_signal(signal.SIGTERM)
        assert '"finish_reason":"abort"' in "".join(pieces)
    assert process.wait(SOON_S) == 0


def frontends_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """That of slot 0 first, until one is replaced."""
    children = psutil.Process(process.pid).children()
    found = [each for each in children if "--multiprocessing-fork" in each.cmdline()]
    return sorted(found, key=lambda each: each.create_time())


@contextlib.contextmanager
def only(one: psutil.Process, frontends: list[psutil.Process]) -> Iterator[None]:
    """Have one of them answer whatever comes."""
    others = [each for each in frontends if each != one]
    for each in others:
        each.suspend()
    try:
        yield
    finally:
        for each in others:
            each.resume()


Series = tuple[str, frozenset[tuple[str, str]]]


def counters(url: str) -> dict[Series, float]:
    families = parse_text(httpx.get(f"{url}/metrics", timeout=SOON_S).text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


def test_every_frontend_tells_what_all_have_counted_even_those_that_died(start: Start) -> None:
    process = start("--port", "0", "--api-server-count", "2")
    url = url_of(process)
    frontends = frontends_of(process)
    labels = frozenset({("engine", "0"), ("model_name", "embedded")})
    tokens = ("paceline:generation_tokens_total", labels)
    ended = ("paceline:e2e_request_latency_seconds_count", labels)

    def ask() -> None:
        body = {"prompt": "hi", "max_tokens": 6}
        httpx.post(f"{url}/v1/completions", json=body, timeout=SOON_S).raise_for_status()

    def wait_for(num_requests: int) -> dict[Series, float]:
        deadline = time.monotonic() + SOON_S
        before: dict[Series, float] = {}
        while True:
            found = counters(url)
            assert all(found[name] >= was for name, was in before.items()), "a counter fell"
            if found[tokens] == 6 * num_requests:
                return found
            assert time.monotonic() < deadline, found
            before = found
            time.sleep(0.05)

    for one in frontends:
        with only(one, frontends):
            ask()
    told = [wait_for(2)]
    for one in frontends:
        with only(one, frontends):
            told.append(counters(url))
    assert told[0] == told[1] == told[2]
    assert told[0][ended] == 2
    frontends[0].kill()  # that which writes down what the engine says
    ask()
    after = wait_for(3)
    assert all(after[name] >= was for name, was in told[0].items())
    assert after[ended] == 3


def test_a_lost_engine_ends_it_with_1_and_a_line(start: Start) -> None:
    process = start("--port", "0", "--lose", "--no-restart-engines")
    url_of(process)
    _, err = process.communicate(timeout=SOON_S)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "paceline: the engine is lost: rank 0 died"


def test_engines_that_serve_together_are_named_when_they_are_ready_and_one_lost_ends_nothing(
    start: Start,
) -> None:
    flags = ("--distributed-executor-backend", "mp", "--prefill-replicas", "1")
    process = start("--port", "0", "--lose", *flags)
    assert process.stdout is not None
    line = process.stdout.readline()
    ready = re.fullmatch(
        r"paceline: embedded is ready at (http://\S+), served by prefill-0 and decode-0\n", line
    )
    assert ready, f"{line!r} {process.communicate(timeout=SOON_S)}"
    with httpx.Client(base_url=ready[1], timeout=SOON_S) as client:
        deadline = time.monotonic() + SOON_S
        names = {"prefill-0", "decode-0"}
        while names == {"prefill-0", "decode-0"}:
            assert time.monotonic() < deadline
            names = {each["id"] for each in client.get("/engines").json()["data"]}
        assert names in ({"prefill-1", "decode-0"}, {"prefill-0", "decode-1"})
        answer = client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 5})
        assert answer.status_code == 200
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=SOON_S)
    assert process.returncode == 0, err
    assert "is lost: rank 0 died" in err


def test_what_moved_between_engines_is_in_the_log_line_where_anything_did() -> None:
    before, quiet = EngineStatus(), EngineStatus(num_blocks=2, num_free_blocks=1)
    moved = TransferTotals(fetched=4, num_bytes=12_500_000, unoverlapped_s=0.02, failed=1)
    busy = EngineStatus(num_blocks=2, num_free_blocks=1, transfers=moved)
    line = throughput(before, quiet, 10.0)
    assert line.endswith("KV 50% used")
    assert throughput(before, busy, 10.0) == (
        f"{line}; 4 prompts fetched, 12.5 MB, 5 ms of each not overlapped; 1 fetches failed"
    )


def test_a_port_in_use_ends_it_with_2_before_anything_is_loaded(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = start("--port", str(other.getsockname()[1]))
        _, err = process.communicate(timeout=SOON_S)
    assert process.returncode == 2
    assert re.fullmatch(r"paceline: cannot listen on 127.0.0.1:\d+: .*\n", err), err


def test_the_model_may_be_named_either_way_but_not_differently(start: Start) -> None:
    process = start("some/model", "--model", "another/model")
    _, err = process.communicate(timeout=SOON_S)
    assert process.returncode == 2
    assert "two models are named" in err

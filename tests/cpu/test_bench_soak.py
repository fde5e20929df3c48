"""The soak benchmark: it sees memory that grows, files that stay open, texts that are wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from benchmarks import serve, soak
from benchmarks.client import Client
from benchmarks.process_tree import ProcessTree, Sample, slope

ASK = serve.Ask(token_ids=[1], max_tokens=2)
KNOWN = soak.Known(ask=ASK, extra={}, text="right")


def samples_of(values: list[float], *, every_s: float = 10.0) -> list[Sample]:
    return [Sample(i * every_s, value, value, value, 10, 2) for i, value in enumerate(values)]


# ---------------------------------------------------------------------------------------- the processes


def test_the_slope_of_a_line_is_its_own_and_certain() -> None:
    found = slope(samples_of([100 + 0.1 * i for i in range(361)]), "own_mb")
    assert found.per_hour == pytest.approx(36.0)
    assert found.standard_error == pytest.approx(0.0, abs=1e-6)


def test_noise_around_no_slope_is_within_its_standard_error() -> None:
    noise = random.Random(3)
    found = slope(samples_of([100 + noise.gauss(0, 1) for _ in range(361)]), "own_mb")
    assert found.standard_error == pytest.approx(1 / math.sqrt(361 / 12), rel=0.15)
    assert abs(found.per_hour) < 3 * found.standard_error


def test_two_samples_have_no_slope() -> None:
    assert slope(samples_of([1.0, 9.0]), "own_mb") == (0.0, None)


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that listens and has a child; each line it reads makes it hold more."""
    code = (
        "import socket, subprocess, sys, threading\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()', 'paceline.runtime.transfer.process'],"
        " stdin=subprocess.PIPE)\n"
        "print(server.getsockname()[1], flush=True)\n"
        "kept = []\n"
        "for line in sys.stdin:\n"
        "    kept += [bytearray(b'x' * 30_000_000), open('/dev/null')]\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "    print('more', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()


def test_what_a_process_holds_is_seen_to_grow(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    assert process.stdin is not None
    assert process.stdout is not None
    tree = ProcessTree(process.pid, port=port)
    before = tree.look()
    process.stdin.write("more\n")
    process.stdin.flush()
    process.stdout.readline()
    after = tree.look()
    assert [each.name for each in tree.watched] == ["supervisor", "link"]
    root = process.pid
    assert 29 < after[root].own_mb - before[root].own_mb < 40
    assert after[root].num_fds == before[root].num_fds + 1
    assert after[root].num_threads == before[root].num_threads + 1
    assert len(tree.watched[0].samples) == 2
    assert [at_s for at_s, _ in tree.shared_bytes] == [
        each.at_s for each in tree.watched[0].samples
    ]


def test_a_child_that_listens_where_clients_knock_is_a_frontend() -> None:
    code = (
        "import socket\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "print(server.getsockname()[1], flush=True)\n"
        "input()"
    )
    argv = [sys.executable, "-c", code, "spawn_main"]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        tree = ProcessTree(os.getpid(), port=int(child.stdout.readline()))
        assert child.pid in tree.look()
        names = {each.pid: each.name for each in tree.watched}
        assert names[child.pid] == "frontend"
        child.kill()


# --------------------------------------------------------------------------------------------- the load


class Scripted:
    """Answers every completion with one text, or refuses it."""

    def __init__(self, text: str, *, status: str = "200 OK", delay_s: float = 0.0) -> None:
        self.text, self.status, self.delay_s = text, status, delay_s
        self.bodies: list[dict[str, Any]] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [x for x in head.split(b"\r\n") if x.lower().startswith(b"content-l")]
                body = json.loads(await reader.readexactly(int(lengths[0].split(b":")[1])))
                self.bodies.append(body)
                await asyncio.sleep(self.delay_s)
                choice = {"choices": [{"text": self.text}]}
                usage = {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}
                said = json.dumps({**choice, **usage})
                if body["stream"]:
                    said = f"data: {json.dumps(choice)}\n\ndata: {json.dumps({'choices': [], **usage})}\n\n"
                start = f"HTTP/1.1 {self.status}\r\nContent-Length: {len(said)}\r\n\r\n"
                writer.write((start + said).encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


def load_of(scripted: Scripted, *, count: int = 40, known: soak.Known = KNOWN) -> soak.Load:
    async def main() -> soak.Load:
        listening = await asyncio.start_server(scripted.handle, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        client = Client(f"http://127.0.0.1:{port}", api_key=None, timeout_s=5.0)
        load = soak.Load(client, serve.Form(model="m"), seed=0)
        try:
            await soak.steady(load, [known], rate=count / 0.3, seconds=0.3, seed=0)
        finally:
            client.close()
            listening.close()
        return load

    return asyncio.run(main())


def test_texts_are_asked_for_in_every_way_and_compared() -> None:
    scripted = Scripted("right")
    load = load_of(scripted)
    assert set(load.ends) <= {"ok", "left"}
    assert load.ends["ok"] > 20
    assert {body["stream"] for body in scripted.bodies} == {True, False}
    salts = [body["cache_salt"] for body in scripted.bodies if "cache_salt" in body]
    assert len(set(salts)) == len(salts) > 5
    assert len(salts) < len(scripted.bodies)


def test_a_text_that_is_another_is_wrong_and_a_failure_an_error() -> None:
    assert set(load_of(Scripted("wrong")).ends) <= {"wrong", "left"}
    failed = load_of(Scripted("right", status="503 Unavailable"))
    assert set(failed.ends) <= {"errors", "left"}
    assert "HTTP 503" in next(iter(failed.failures))


def test_clients_that_leave_are_owed_nothing() -> None:
    load = load_of(Scripted("right", delay_s=0.6), count=60)
    assert load.ends["left"] > 0
    assert load.ends["errors"] == 0


# ------------------------------------------------------------------------------------------- the figures


def report_of(
    values: list[float], *, after: Sample | None = None, blocks: float = 0.0, **ends: int
) -> Any:
    """As if one process had been watched."""
    tree = ProcessTree(os.getpid(), port=1)
    tree.look()
    (mine,) = (each for each in tree.watched if each.pid == os.getpid())
    for each in tree.watched[1:]:  # whatever other children pytest has
        each.is_rays = True
    samples = samples_of(values)
    mine.samples = samples
    load = soak.Load(
        Client("http://127.0.0.1:1", api_key=None, timeout_s=1), serve.Form(model="m"), seed=0
    )
    load.ends.update(ends)
    first, last = ({mine.pid: sample} for sample in (samples[0], after or samples[-1]))
    return soak._report(
        argparse.Namespace(quick=False),
        load,
        tree,
        soak.Idle(samples=first, blocks=0.0),
        soak.Idle(samples=last, blocks=blocks),
        span=(0.0, samples[-1].at_s),
        rate=1.0,
    )


def test_what_grows_only_at_first_is_flat() -> None:
    made = report_of([min(100.0, 10.0 * i) for i in range(200)], ok=9)
    assert made.ratios["steepest_slope_mb_per_hour"] == pytest.approx(0.0)
    assert (
        made.ratios["leaked_fds"] == made.ratios["wrong"] == made.ratios["processes_replaced"] == 0
    )
    json.dumps(made.rows, allow_nan=False)


def test_what_leaks_is_counted() -> None:
    values = [100 + 0.05 * i for i in range(200)]
    last = replace_fds(samples_of(values)[-1], 13)
    made = report_of(values, after=last, blocks=0.25, errors=2, wrong=1)
    assert made.ratios["steepest_slope_mb_per_hour"] == pytest.approx(18.0)
    assert made.ratios["leaked_fds"] == 3
    assert made.ratios["leaked_blocks"] == 0.25
    assert (made.ratios["errors"], made.ratios["wrong"]) == (2, 1)


def replace_fds(sample: Sample, number: int) -> Sample:
    return sample._replace(num_fds=number)

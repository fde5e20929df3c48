"""`paceline serve` outlives its parts: frontends that die or hang are replaced, engines too, and nobody's
text is torn. The engines are fakes in the supervisor's process."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from tests.engines import REPLY

from paceline import Client, SamplingParams

ROOT = Path(__file__).parents[2]
SOON_S = 30.0
NUM_TOKENS = 240

PROGRAM = """
import signal, sys, tempfile, threading, time
from pathlib import Path
from paceline.actors import cli, supervisor
from paceline.actors.commands import serve
from paceline.runtime import local
from tests.engines import FakeEngine, LinkedFake, endless, fake_facts

supervisor.SILENT_S = 2.0
silent = threading.Event()
engines = []

class Engine(FakeEngine):
    def poll(self, wait_s=1.0):
        while silent.is_set():
            time.sleep(0.02)
        return super().poll(wait_s)

def connect(config, facts, **how):
    engines.append(Engine(lambda asked: endless(asked)[len(asked.output_token_ids):], step_s=0.02))
    return LinkedFake(engines[-1])

def lose(*_):
    engines[-1].fail("rank 0 died")

signal.signal(signal.SIGUSR1, lose)
signal.signal(signal.SIGRTMIN, lambda *_: silent.set())
local.connect = connect
facts = fake_facts(Path(tempfile.mkdtemp()))
serve.examine = lambda config: facts
sys.exit(cli.main(["serve", "--distributed-executor-backend", "mp", "--port", "0", *sys.argv[1:]]))
"""


class Server:
    """The command as a process."""

    def __init__(self, log: Path, *flags: str) -> None:
        self._log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *flags],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT / '.src'}{os.pathsep}{ROOT}"},
            )

    @functools.cached_property
    def url(self) -> str:
        """Once it serves."""
        assert self.process.stdout is not None
        ready = re.match(
            r"paceline: \S+ is ready at (http://[^\s,]+)", self.process.stdout.readline()
        )
        assert ready, self.log()
        return ready[1]

    def frontends(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [each for each in children if "spawn_main" in command(each)]

    def log(self) -> str:
        return self._log.read_text()

    def tell(self, number: int) -> None:
        self.process.send_signal(number)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With two frontends, for several tests: the last ends it."""
    server = Server(
        tmp_path_factory.mktemp("pair") / "log",
        "--api-server-count",
        "2",
        "--shutdown-timeout",
        "30",
    )
    yield server
    server.process.kill()


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With one frontend, that was killed before it served; for several tests, of which the last ends it."""
    server = Server(tmp_path_factory.mktemp("lone") / "log")
    wait_until(lambda: len(server.frontends()) == 1)
    server.frontends()[0].kill()
    yield server
    server.process.kill()


class Streams:
    """Texts that clients read at the same time, in threads."""

    def __init__(self, url: str, count: int) -> None:
        self._url = url
        self.texts = [""] * count
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._read, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: all(self.texts) or bool(self._failures))

    def _read(self, index: int) -> None:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8)
        try:
            with Client(self._url, timeout_s=SOON_S) as client:
                for piece in client.stream("hi", params):
                    self.texts[index] += piece.text
        except BaseException as error:
            self._failures.append(error)

    def check(self) -> None:
        """All came to their end, with no token lost or repeated."""
        for thread in self._threads:
            thread.join(SOON_S)
        assert self._failures == []
        whole = (REPLY * NUM_TOKENS)[:NUM_TOKENS]
        assert self.texts == [whole] * len(self.texts)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):  # it has just ended
        return " ".join(process.cmdline())
    return ""


def pids(processes: list[psutil.Process]) -> set[int]:
    return {each.pid for each in processes}


def test_an_engine_lost_under_streams_is_replaced_and_they_go_on(pair: Server) -> None:
    streams = Streams(pair.url, 4)
    assert len(pair.frontends()) == 2
    pair.tell(signal.SIGUSR1)
    streams.check()
    assert "engine-1 starts in place of engine-0" in pair.log()


def test_a_frontend_killed_in_mid_stream_is_replaced_and_its_clients_go_on(pair: Server) -> None:
    streams = Streams(pair.url, 4)
    killed = pair.frontends()[0]
    killed.kill()
    streams.check()
    wait_until(lambda: killed.pid not in pids(pair.frontends()) and len(pair.frontends()) == 2)


def test_a_frontend_that_hangs_is_replaced_and_the_log_tells_where_it_hung(pair: Server) -> None:
    hanging = pair.frontends()[0]
    hanging.suspend()
    wait_until(lambda: hanging.pid not in pids(pair.frontends()) and len(pair.frontends()) == 2)
    assert re.search(r"frontend-\d hangs:\nprocess \d+ says nothing: it is stopped", pair.log())


def test_it_drains_and_exits_with_0_even_if_its_engine_is_lost_meanwhile(pair: Server) -> None:
    streams = Streams(pair.url, 2)
    pair.tell(signal.SIGTERM)
    wait_until(lambda: pair.log().count("requests may finish") == 2)
    pair.tell(signal.SIGUSR1)
    streams.check()
    assert pair.process.wait(SOON_S) == 0
    assert "Traceback" not in pair.log()


def test_a_frontend_killed_before_it_serves_is_replaced_too(lone: Server) -> None:
    assert httpx.get(f"{lone.url}/v1/models").status_code == 200
    assert "ended with exit code -9" in lone.log()


def test_a_supervisor_that_stood_still_itself_takes_no_frontend_for_hung(lone: Server) -> None:
    assert lone.url
    frontends = pids(lone.frontends())
    lone.tell(signal.SIGSTOP)
    time.sleep(3.0)
    lone.tell(signal.SIGCONT)
    time.sleep(0.5)
    assert pids(lone.frontends()) == frontends
    assert "hangs" not in lone.log()


def test_a_frontend_opens_its_doors_though_the_engine_says_nothing(lone: Server) -> None:
    assert lone.url
    lone.tell(signal.SIGRTMIN)  # as while its ranks are started anew
    lone.frontends()[0].kill()
    assert httpx.get(f"{lone.url}/v1/models", timeout=SOON_S).status_code == 200
    assert "opens without engine-0" in lone.log()


def test_a_supervisor_that_is_killed_leaves_no_process(lone: Server) -> None:
    assert lone.url
    children = psutil.Process(lone.process.pid).children(recursive=True)
    assert children
    lone.process.kill()
    wait_until(lambda: not any(each.is_running() for each in children))

"""The fault benchmark can find what it looks for: wrong texts, hung requests, what is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import psutil
import pytest
from benchmarks.census import MARK, Census, EngineTree, Rank, cut, ports
from benchmarks.faults import KINDS, Fault
from benchmarks.known_texts import Asked, Known, Load
from benchmarks.kv_faults import FULL, QUICK, _attribute, _shares
from hypothesis import given
from hypothesis import strategies as st

from paceline.runtime.transfer.consumer import Consumer
from paceline.runtime.transfer.process import SLOW_FOR_S, SLOW_READ_S, Faults, Saboteur
from paceline.runtime.types import EngineStatus, Request, SamplingParams, TokenDelta

SOON_S = 10.0
TEXT = (5, 6, 7)
KNOWN = Known(
    Request(request_id="0", prompt_token_ids=(1, 2), params=SamplingParams(), seed=0, max_tokens=3),
    TEXT,
)


def eventually(done: Callable[[], Any]) -> bool:
    deadline_s = time.monotonic() + SOON_S
    while not done():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.005)
    return True


# ---------------------------------------------------------------------------------------------- the load


class Scripted:
    """Answers every request with the same deltas, once; ends what is aborted."""

    def __init__(self, *script: dict[str, Any]) -> None:
        self._script = script
        self._deltas: list[TokenDelta] = []

    def submit(self, requests: list[Request]) -> None:
        for each in requests:
            self._deltas += [TokenDelta(request_id=each.request_id, **d) for d in self._script]

    def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:
        if not self._deltas:
            time.sleep(min(wait_s, 0.005))
        deltas, self._deltas = self._deltas, []
        return deltas

    def abort(self, request_ids: list[str]) -> None:
        self._deltas += [TokenDelta(request_id=r, finish_reason="abort") for r in request_ids]

    def status(self) -> EngineStatus:
        return EngineStatus()

    def close(self) -> None:
        pass


END = {"finish_reason": "length"}


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ([{"token_ids": TEXT[:2]}, {"token_ids": TEXT[2:], **END}], "ok"),
        ([{"token_ids": TEXT[:2], **END}], "wrong"),
        ([{"token_ids": (5, 7, 7), **END}], "wrong"),
        ([{"token_ids": (*TEXT, 8), **END}], "wrong"),
        ([{"token_ids": TEXT, **END}, {"token_ids": (8,)}], "wrong"),
        ([{"token_ids": TEXT, **END}, END], "wrong"),
        ([{"token_ids": TEXT[:1]}, {"finish_reason": "error", "error": "no"}], "error"),
        ([{"token_ids": (9,)}, {"finish_reason": "error", "error": "no"}], "wrong"),
        ([{"finish_reason": "abort"}], "error"),
        ([{"token_ids": TEXT}], "hung"),
        ([], "hung"),
    ],
)
def test_every_end_of_a_request_is_judged(script: list[dict[str, Any]], outcome: str) -> None:
    load = Load(Scripted(*script), [KNOWN], width=1, hung_s=0.05, rng=random.Random(0))
    load.start()
    try:
        assert eventually(lambda: len(load.ended) >= 2)
        assert load.ended[0].outcome == outcome
    finally:
        load.close()


def test_a_client_that_left_is_owed_no_text() -> None:
    load = Load(Scripted(), [KNOWN], width=2, hung_s=60.0, rng=random.Random(0))
    load.start()
    try:
        assert eventually(lambda: len(load.live()) == 2)
        load.stop()
        first, second = load.live()
        load.leave([first])
        assert eventually(lambda: load.ended == [first])
        assert first.outcome == "left"
    finally:
        load.close()
    assert second.outcome == "hung", "what is never ended is never forgotten"


# ---------------------------------------------------------------------------------------------- the form


def test_a_request_that_goes_wrong_is_laid_to_the_last_fault_that_met_it() -> None:
    asked = Asked(request=KNOWN.request, expected=TEXT, asked_s=0.0, outcome="wrong")
    other = Asked(request=KNOWN.request, expected=TEXT, asked_s=0.0, outcome="hung")
    faults = [
        Fault(kind="flip byte", victim="", at_s=float(at), in_flight=met, moving=0)
        for at, met in enumerate(([asked], [asked, other], [other], []))
    ]
    _attribute(faults, [asked, other])
    assert [each.wrong for each in faults] == [0, 1, 0, 0]
    assert [each.hung for each in faults] == [0, 0, 1, 0]


@given(st.integers(0, 1000))
def test_set_ups_share_all_faults(count: int) -> None:
    shares = _shares(FULL, count)
    assert sum(shares) == count
    assert min(shares) >= 0


def test_twenty_faults_have_all_kinds() -> None:
    (setup,) = QUICK
    assert set((setup.kinds * 20)[:20]) == set(KINDS)


# ----------------------------------------------------------------------------------------- the processes


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`started(code)`: an interpreter that runs it and then waits."""
    processes = []

    def start(code: str, **more: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{code}\nprint('ready', flush=True)\ninput()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **more,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=SOON_S)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_process_that_outlives_its_parent_is_found(
    started: Callable[..., subprocess.Popen[str]],
) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    parent = started(code, env={**os.environ, MARK: "ours"})
    child = psutil.Process(int(said(parent)))
    assert said(parent) == "ready"
    try:
        assert child in Census.take().strays("ours")
        parent.kill()
        parent.wait(SOON_S)
        assert Census.take().strays("ours") == [child]
        assert Census.take().strays("theirs") == []
    finally:
        child.kill()
    assert eventually(lambda: Census.take().strays("ours") == [])


def test_memory_that_a_link_maps_after_its_owner_died_is_found(
    started: Callable[..., subprocess.Popen[str]],
) -> None:
    fd = os.memfd_create("paceline-kv", 0)
    try:
        os.ftruncate(fd, 4096)
        inode = os.fstat(fd).st_ino
        mapping = f"import mmap; kept = mmap.mmap({fd}, 4096)"
        owner, link = (started(mapping, pass_fds=[fd]) for _ in range(2))
        stranger = started("")
        for each in (owner, link, stranger):
            assert said(each) == "ready"

        def unowned(rank: subprocess.Popen[str]) -> set[int]:
            process = psutil.Process(rank.pid)
            ranks = (Rank(process=process, links=(psutil.Process(link.pid),)),)
            return Census(engines=(EngineTree(process=process, ranks=ranks),)).unowned_memory()

        assert unowned(owner) == set()
        assert unowned(stranger) == {inode}
    finally:
        os.close(fd)


def test_connections_to_a_link_are_cut_and_no_others(
    started: Callable[..., subprocess.Popen[str]],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        link = started(
            "import socket\n"
            "server = socket.create_server(('127.0.0.1', 0))\n"
            f"out = socket.create_connection({elsewhere.getsockname()})\n"
            "print(server.getsockname()[1], flush=True)\n"
            "kept, _ = server.accept()"
        )
        port = int(said(link))
        elsewhere.settimeout(SOON_S)
        theirs, _ = elsewhere.accept()
        with theirs, socket.create_connection(("127.0.0.1", port), timeout=SOON_S) as ours:
            assert said(link) == "ready"
            process = psutil.Process(link.pid)
            assert ports(process) == {port}
            assert cut(process, port) == 1
            assert ours.recv(1) == b""
            theirs.setblocking(False)
            with pytest.raises(BlockingIOError):
                theirs.recv(1)
    assert link.poll() is None


# ------------------------------------------------------------------------------------- a link's own faults


class Loop:
    """Keeps handlers and timers for the test to call."""

    def __init__(self) -> None:
        self.handlers: dict[int, Callable[[], None]] = {}
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def add_signal_handler(self, number: int, handler: Callable[[], None]) -> None:
        self.handlers[number] = handler

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.timers.append((delay_s, call))


class Reader:
    pause_s = 0.0


def test_a_link_fails_on_signals_once_each_and_only_if_it_was_told_to() -> None:
    loop, reader = Loop(), Reader()
    innocent = Saboteur(Faults())
    innocent.obey_signals(cast(asyncio.AbstractEventLoop, loop), cast(Consumer, reader))
    assert not innocent.tampers
    assert not loop.handlers

    saboteur = Saboteur(Faults(on_signals=True))
    saboteur.obey_signals(cast(asyncio.AbstractEventLoop, loop), cast(Consumer, reader))
    frame = bytes(100)
    assert saboteur.tamper(frame) == frame
    loop.handlers[signal.SIGUSR1]()
    sent = [saboteur.tamper(frame) for _ in range(3)]
    assert sum(byte.bit_count() for byte in sent[0]) == 1
    assert sent[1:] == [frame, frame]

    loop.handlers[signal.SIGUSR2]()
    assert reader.pause_s == SLOW_READ_S
    ((delay_s, speed_up),) = loop.timers
    assert delay_s == SLOW_FOR_S
    speed_up()
    assert reader.pause_s == 0.0

"""The chaos benchmark sees what it looks for: texts that are not theirs, servers that do not come back, leaks."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from benchmarks import chaos
from benchmarks.census import MARK
from benchmarks.client import Client
from benchmarks.leaks import RAYS_SOCKETS, Holdings, Watch
from benchmarks.streams import Keyed, Load, Read, Reader, Text, Verdict, Wanted, verdict
from benchmarks.strikes import (
    KINDS,
    WHOLE_S,
    EngineAt,
    Kind,
    Look,
    Server,
    Strike,
    decks,
    engines_of,
    strike,
)

from paceline import SamplingParams
from paceline.runtime.client import ClientError
from paceline.runtime.client.calls import Wire

TEXT = Text((1, 2, 3, 4), "abcd", "length")
GREEDY = Wanted(prompt=(1, 2), params=SamplingParams(temperature=0.0))
SEEDLESS = Wanted(prompt=(1, 2), params=SamplingParams(temperature=0.9))
KILL_SHARD, KILL_COORDINATOR, KILL_FRONTEND = KINDS[:3]


# --------------------------------------------------------------------------------------------- the texts


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (TEXT, "ok"),
        (Text((1, 2), "ab", None), "lost"),  # it broke off
        (Text((1, 2, 4), "abd", "length"), "lost"),  # one in the midst
        (Text(), "lost"),
        (Text((1, 2, 2, 3, 4), "abbcd", "length"), "repeated"),
        (Text((1, 2, 3, 1, 2, 3, 4), "abcabcd", "length"), "repeated"),  # from the beginning
        (Text((1, 2, 9, 4), "abxd", "length"), "wrong"),
        (Text((1, 9), "ax", None), "wrong"),
        (Text((1, 2, 9, 4, 5), "abxde", "length"), "wrong"),
        (Text((1, 2, 3, 4), "abc", "length"), "wrong"),  # a character went missing
        (Text((1, 2, 3, 4), "abcd", "abort"), "wrong"),
    ],
)
def test_lost_repeated_and_wrong_tokens_are_told_apart(found: Text, expected: Verdict) -> None:
    assert verdict(found, TEXT) == expected


def read_of(wanted: Wanted = GREEDY, **values: Any) -> Read:
    return Read(wanted=wanted, scheme="http", streamed=True, key="k", **values)


def test_a_gap_is_the_longest_time_without_a_word_the_first_one_included() -> None:
    assert read_of(asked_s=10.0, told_s=[13.0, 13.5, 15.5]).longest_gap_s == 3.0
    assert read_of(asked_s=10.0, told_s=[10.1, 14.1, 14.2]).longest_gap_s == 4.0
    assert read_of(asked_s=10.0).longest_gap_s == 0.0


class Scripted(Reader):
    """Gives every request what a function says."""

    def __init__(self, scheme: str, say: Callable[[Read], Text | str]) -> None:
        super().__init__(f"{scheme}://127.0.0.1:1", timeout_s=1.0)
        self._say = say
        self.reads: list[Read] = []

    async def read(self, read: Read) -> None:
        await asyncio.sleep(0)
        self.reads.append(read)
        said = self._say(read)
        if isinstance(said, str):
            read.error = said
        else:
            read.text = said


def run_load(
    struck: Callable[[Read], Text | str],
    *,
    same: Callable[[Read], Text] = lambda _: TEXT,
    wanted: Wanted = GREEDY,
) -> tuple[Load, list[Scripted]]:
    """A load on a server that says something else while it is struck."""
    is_struck = False
    readers = [
        Scripted(scheme, lambda read: struck(read) if is_struck else same(read))
        for scheme in ("http", "grpc")
    ]
    load = Load(readers, [wanted], seed=0)

    async def main() -> None:
        nonlocal is_struck
        await load.learn()
        is_struck = True
        running = asyncio.ensure_future(load.run())
        while min(len(each.reads) for each in readers) < 20:
            await asyncio.sleep(0)
        load.stop()
        await running
        is_struck = False
        await load.settle()

    asyncio.run(main())
    return load, readers


@pytest.mark.parametrize("wanted", [GREEDY, SEEDLESS])
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (TEXT, "ok"),
        (Text((1, 2, 2, 3, 4), "abbcd", "length"), "repeated"),
        (Text((1, 2, 9, 4), "abxd", "length"), "wrong"),
        ("StreamBroken: it broke", "lost"),
    ],
)
def test_each_text_under_load_is_judged_by_what_its_request_gets_without(
    wanted: Wanted, said: Text | str, expected: Verdict
) -> None:
    load, _ = run_load(lambda _: said, wanted=wanted)
    assert set(load.verdicts.values()) == {expected}
    assert len(load.verdicts) >= 40


def test_an_error_after_the_whole_text_is_not_fine() -> None:
    def say(read: Read) -> Text | str:
        read.text = TEXT
        return "DeadlineExceeded: no end"

    assert set(run_load(say)[0].verdicts.values()) == {"lost"}


def test_a_text_without_a_seed_is_asked_for_again_under_its_key_at_the_same_door() -> None:
    def by_key(read: Read) -> Text:
        return Text((len(read.key), hash((read.key, read.scheme, read.salt))), read.key, "length")

    load, readers = run_load(by_key, same=by_key, wanted=SEEDLESS)
    assert set(load.verdicts.values()) == {"ok"}
    for reader in readers:
        asked = Counter((each.key, each.streamed, each.salt) for each in reader.reads)
        assert set(asked.values()) == {2}
        assert {each.scheme for each in reader.reads} == {reader.scheme}


def test_a_request_that_fails_while_nothing_is_struck_ends_the_benchmark() -> None:
    load = Load([Scripted("http", lambda _: "Unavailable: no")], [GREEDY], seed=0)
    with pytest.raises(ClientError, match="while nothing was struck: Unavailable: no"):
        asyncio.run(load.learn())


@pytest.mark.parametrize("header", ["Idempotency-Key", "idempotency-key"])
def test_every_call_of_a_request_goes_under_its_key(header: str) -> None:
    class Recorded:
        def __init__(self) -> None:
            self.wires: list[Wire] = []

        async def open(self, wire: Wire, *, timeout_s: float) -> AsyncGenerator[bytes, None]:
            assert timeout_s == 1.0
            self.wires.append(wire)
            yield b""

        async def close(self) -> None: ...

    async def main() -> None:
        transport = Keyed(recorded)
        transport.key = "mine"
        wire = Wire(method="POST /", headers={header: "its own", "other": "left alone"})
        for _ in range(2):
            assert [each async for each in transport.open(wire, timeout_s=1.0)] == [b""]
        assert transport.num_calls == 2

    recorded = Recorded()
    asyncio.run(main())
    assert [wire.headers for wire in recorded.wires] == [
        {header: "mine", "other": "left alone"}
    ] * 2


# ------------------------------------------------------------------------------------------- the strikes

NAMES = {
    1: "supervisor",
    2: "frontend",
    3: "frontend",
    4: "engine",
    5: "rank",
    6: "resource tracker",
}
BEFORE = Look(NAMES, (EngineAt("engine-0", 0, at_work=True),))


def look(*, gone: int = 0, engine: EngineAt = BEFORE.engines[0], **others: str) -> Look:
    """As before, but for a process that is gone, and others that have come."""
    names = {pid: name for pid, name in NAMES.items() if pid != gone}
    return Look(names | {100 + i: name for i, name in enumerate(others.values())}, (engine,))


BACK = EngineAt("engine-0", 1, at_work=True)


@pytest.mark.parametrize(
    ("kind", "pid", "now", "is_back"),
    [
        (KILL_SHARD, 5, look(gone=5, a="rank", engine=BACK), True),
        (KILL_SHARD, 5, look(gone=5, a="rank"), False),  # the engine does not know yet
        (KILL_SHARD, 5, look(gone=5, a="rank", engine=EngineAt("engine-0", 1, False)), False),
        (KILL_SHARD, 5, look(gone=5, engine=BACK), False),
        (KILL_SHARD, 5, look(engine=BACK), False),  # it hangs on
        (KILL_SHARD, 5, look(gone=5, a="rank", b="rank", engine=BACK), False),  # one too many
        (KILL_COORDINATOR, 4, look(gone=4, a="engine", engine=EngineAt("engine-1", 0, True)), True),
        (KILL_COORDINATOR, 4, look(gone=4, a="engine"), False),
        (KILL_FRONTEND, 3, look(gone=3, a="frontend"), True),
        (KILL_FRONTEND, 3, look(gone=3), False),
        (KILL_FRONTEND, 3, look(gone=3, a="engine"), False),  # its doors are not open yet
    ],
)
def test_a_server_is_whole_again_when_as_much_is_at_work_without_what_was_struck(
    kind: Kind, pid: int, now: Look, is_back: bool
) -> None:
    assert pid in BEFORE.victims(kind.role)
    assert (now.is_whole(BEFORE) and now.has_replaced(pid, kind.role, BEFORE)) == is_back
    if is_back:
        assert now.num_new(BEFORE) == 1


def test_engines_are_at_work_that_serve_with_all_their_ranks() -> None:
    def status(state: str, **member: Any) -> dict[str, Any]:
        members = [{"engine_id": "e", "num_blocks": 9, "num_restarts": 2, **member}]
        return {"engines": [{"id": "e", "state": state}], "status": {"members": members}}

    assert engines_of(status("serving")) == (EngineAt("e", 2, at_work=True),)
    for idle in (
        status("starting"),
        status("serving", restarting=True),
        status("serving", num_blocks=0),
        status("serving", engine_id="another"),
    ):
        assert not engines_of(idle)[0].at_work


def test_kinds_come_by_their_weights_in_an_order_of_the_seed() -> None:
    size = sum(kind.weight for kind in KINDS)
    first, second, other = (list(islice(decks(random.Random(s)), 3 * size)) for s in (0, 0, 1))
    assert first == second != other
    assert Counter(first[:size]) == {kind: kind.weight for kind in KINDS}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


class Replacing(Server):
    """Has one process, and another in its place some looks after it has ended."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(
            os.getpid(),
            Client("http://127.0.0.1:1", api_key=None, timeout_s=1),
            grpc_port=1,
            mark="",
        )
        self._process = process
        self._num_looks = 0

    async def look(self) -> Look:
        if self._process.poll() is None:
            return Look({self._process.pid: "frontend"}, ())
        self._num_looks += 1
        if self._num_looks == 1:
            raise ConnectionError("nobody answers")
        return Look({} if self._num_looks == 2 else {1: "frontend"}, ())


def test_a_strike_ends_when_the_server_is_whole_again(sleeper: subprocess.Popen[bytes]) -> None:
    server, rng = Replacing(sleeper), random.Random(0)

    async def main() -> Strike | None:
        first = await server.look()
        return await strike(server, first, KILL_FRONTEND, in_flight=7, rng=rng)

    dealt = asyncio.run(main())
    assert sleeper.returncode == -signal.SIGKILL
    assert dealt is not None
    assert dealt.whole_s is not None
    assert dealt.recovered
    assert (dealt.in_flight, dealt.num_replaced) == (7, 1)


# --------------------------------------------------------------------------------------------- the leaks


def holdings(fds: dict[tuple[str, int], int] | None = None, **values: Any) -> Holdings:
    usual = {"blocks": 0, "requests": 0, "shared": {}, "files": 1}
    return Holdings(fds=fds or {("supervisor", 1): 20, ("rank", 5): 15}, **{**usual, **values})


@pytest.mark.parametrize(
    ("after", "more"),
    [
        (holdings(), {}),
        (holdings({("supervisor", 1): 19, ("rank", 8): 15}), {}),  # another in its place
        (holdings({("supervisor", 1): 22, ("rank", 8): 18}), {"file descriptors": 5}),
        (holdings({("supervisor", 1): 20, ("rank", 5): 15, ("rank", 6): 15}), {"processes": 1}),
        (holdings(blocks=3, requests=1), {"KV blocks": 3, "requests": 1}),
        (holdings(shared={"/dev/shm/a": 9, "/dev/shm/b": 0}), {"shared memory": 2}),
        (holdings(files=3), {"temporary files": 2}),
    ],
)
def test_what_is_more_than_before_is_leaked(after: Holdings, more: dict[str, int]) -> None:
    assert after.beyond(holdings()) == more


def test_rays_own_files_are_its_business_and_its_connections_come_and_go() -> None:
    def on_ray(supervisor: int, raylet: int, num_idle: int) -> Holdings:
        idle = {("Ray: ray::IDLE", 10 + i): 40 for i in range(num_idle)}
        return holdings({("supervisor", 1): supervisor, ("Ray: raylet", 2): raylet, **idle})

    before = on_ray(50, 60, 1)
    assert on_ray(50 + RAYS_SOCKETS, 90, 3).beyond(before) == {}
    after = on_ray(50 + RAYS_SOCKETS + 1, 60, 0)
    assert after.more_fds(before) == {"supervisor": RAYS_SOCKETS + 1}


def test_what_outlives_a_server_is_found_and_ended(tmp_path: Path) -> None:
    mark = f"test-{os.getpid()}"
    watch = Watch(tmp_path, mark=mark)
    assert not watch.left(timeout_s=0)
    (tmp_path / "ray").mkdir()
    (tmp_path / "paceline-abc").mkdir()
    with subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: mark}) as process:
        assert watch.left(timeout_s=0) == {"processes": 1, "temporary files": 1}
        watch.end_the_rest()
    assert process.returncode == -signal.SIGKILL
    assert watch.left(timeout_s=0) == {"temporary files": 1}


# --------------------------------------------------------------------------------------------- the report


def dealt(kind: Kind, whole_s: float | None, num_replaced: int = 1) -> Strike:
    return Strike(kind=kind, at_s=5.0, in_flight=16, whole_s=whole_s, num_replaced=num_replaced)


def test_the_report_counts_what_was_seen() -> None:
    ends: list[Verdict] = ["ok", "ok", "ok", "wrong", "lost", "repeated", "repeated"]
    outcome = chaos.Outcome(
        began_s=1.0,
        verdicts={read_of(asked_s=0.0, told_s=[float(i)]): end for i, end in enumerate(ends)},
        strikes=[
            dealt(KILL_SHARD, 3.0, 2),
            dealt(KILL_FRONTEND, WHOLE_S + 1),
            dealt(KINDS[3], None),
        ],
        held=Counter({"KV blocks": 2, "temporary files": 1}),
        left=Counter({"temporary files": 1, "processes": 1}),
        exit_code=0,
    )
    made = chaos.make_report(argparse.Namespace(quick=False), outcome)
    assert made.ratios == {
        "requests": 3.0,
        "strikes": 3.0,
        "restarts": 4.0,
        "recovered": pytest.approx(1 / 3),
        "p99_gap_s": pytest.approx(6.0, rel=0.02),
        "wrong": 1.0,
        "lost": 1.0,
        "repeated": 2.0,
        "leaked": 4.0,  # what lay there when it was idle is not left anew
        "exit_code": 0.0,
    }
    rows = Counter(row["row"] for row in made.rows)
    assert rows == {"strike": 3, "request": 4, "leak": 4}
    json.dumps(made.rows, allow_nan=False)
    lines = [chaos._line(kind, outcome.strikes) for kind in KINDS]
    assert [line["count"] for line in lines] == [1, 0, 1, 1, 0]


def test_a_server_that_had_to_be_killed_did_not_end_well() -> None:
    for exit_code in (None, -signal.SIGKILL, 1):
        made = chaos.make_report(argparse.Namespace(), chaos.Outcome(exit_code=exit_code))
        assert made.ratios["exit_code"] > 0


def test_both_doors_are_read_from_what_a_server_says() -> None:
    said = "x\npaceline: m is ready at http://127.0.0.1:80 and grpc://127.0.0.1:81, served by a\n"
    assert chaos.both_doors(said) == "http://127.0.0.1:80 grpc://127.0.0.1:81"
    assert chaos.both_doors("paceline: m is ready at http://127.0.0.1:80\n") is None


# ---------------------------------------------------------------------------------------------- for real


def test_kills_and_a_hang_under_load_are_seen_by_no_client_and_leave_nothing(
    tmp_path: Path,
) -> None:
    output = tmp_path / "chaos.json"
    log = tmp_path / "server.log"
    command = [sys.executable, "-m", "benchmarks.chaos", "--quick", "--backend", "mp"]
    done = subprocess.run(
        [*command, "--log", str(log), "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(output.read_text())
    bad = {
        name: made["ratios"][name] for name in ("wrong", "lost", "repeated", "leaked", "exit_code")
    }
    assert not any(bad.values()), (bad, made["notes"], made["rows"], log.read_text()[-4000:])
    kinds = {row["kind"] for row in made["rows"] if row["row"] == "strike"}
    assert kinds == {kind.name for kind in chaos.QUICK_KINDS}
    assert made["ratios"]["recovered"] == 1.0
    assert made["ratios"]["requests"] >= 16

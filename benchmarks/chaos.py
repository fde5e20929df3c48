"""Kills at random under load: whether every text goes on as if nothing had happened, and nothing is left behind.

    16 clients, each asking again at once ──HTTP, gRPC──> frontends ──> engine: coordinator, shards
    every now and then: a process killed, or stopped for ever ──> until all is whole again

The clients are Paceline's own: they ask again where a connection breaks, under the key of the request, and
leave out what they have. Each text is compared, token by token, with what its request gets when nothing is
struck. What is idle is compared with what is idle; what has ended shall leave nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import secrets
import statistics
import tempfile
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvloop

from benchmarks import report, servers
from benchmarks.census import MARK
from benchmarks.client import Client
from benchmarks.leaks import Watch
from benchmarks.streams import Load, Read, Reader, Verdict, make_wanted
from benchmarks.strikes import KINDS, WHOLE_S, Kind, Server, Strike, decks, strike
from paceline.runtime.models.weights import find_model
from paceline.runtime.tokenizer import Tokenizer

EXPECTED = {
    "recovered": (">=", 1.0),
    "wrong": ("<=", 0.0),
    "lost": ("<=", 0.0),
    "repeated": ("<=", 0.0),
    "leaked": ("<=", 0.0),
    "exit_code": ("<=", 0.0),
}
GRPC_EVERY = 4
"""One in so many clients speaks gRPC, the others HTTP."""
PAUSE_S, QUICK_PAUSE_S = (6.0, 12.0), (0.5, 1.5)
"""Between two strikes, from when all is whole again."""
STEP_TIMEOUT_S, QUICK_STEP_TIMEOUT_S = 8.0, 6.0
QUICK_KINDS = KINDS[:4]
"""All but the one that takes a frontend's watchdog longest to see."""
STATUS_S = 10.0
"""What a frontend gets to say how the engines are. One that hangs never does."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """All that was seen."""

    began_s: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    """Of load."""
    verdicts: dict[Read, Verdict] = field(default_factory=dict)
    strikes: list[Strike] = field(default_factory=list)
    held: Counter[str] = field(default_factory=Counter)
    """Of what an idle server should not hold, how much is held after the load."""
    more_fds: dict[str, int] = field(default_factory=dict)
    """By process."""
    left: Counter[str] = field(default_factory=Counter)
    """When the server had ended."""
    exit_code: int | None = None


def main() -> None:
    args = _parser().parse_args()
    if args.backend == "ray" and "RAY_ADDRESS" in os.environ:
        raise SystemExit("unset RAY_ADDRESS: the server starts a Ray of its own, to strike at")
    args.tensor_parallel_size = args.tensor_parallel_size or (1 if args.quick else 2)
    if args.quick:
        args.known, args.longest_text = min(args.known, 12), min(args.longest_text, 64)
    mark, pids, outcome = secrets.token_hex(8), list[int](), Outcome()
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        watch = Watch(Path(folder), mark=mark)
        command = servers.paceline_command(*_flags(args))
        report.say(f"starting {' '.join(command[1:])}")
        try:
            with servers.serving(
                command,
                ready=both_doors,
                deadline_s=300,
                env={MARK: mark, "TMPDIR": folder, "RAY_TMPDIR": folder},
                on_start=pids.append,
                on_end=lambda code: setattr(outcome, "exit_code", code),
                log=args.log,
            ) as urls:
                uvloop.run(_load_and_strike(args, outcome, watch, urls.split(), pids[0], mark))
            outcome.left = watch.left()
        except servers.StartError as error:
            raise SystemExit(f"the server did not start: {error}") from None
        finally:
            watch.end_the_rest()
    made = make_report(args, outcome)
    table = [_line(kind, outcome.strikes) for kind in KINDS]
    made.print(list(table[0]), table)
    made.write(args.output)


def both_doors(said: str) -> str | None:
    """The URLs of HTTP and of gRPC, with a space between."""
    found = re.search(r"is ready at (http://[^\s,]+) and (grpc://[^\s,]+)", said)
    return f"{found[1]} {found[2]}" if found else None


def _flags(args: argparse.Namespace) -> list[str]:
    # float32, so that a text does not depend on what else is in a batch; Gloo, which sleeps while it
    # waits, and one thread, which waits for none: the clients have the same cores
    size = args.tensor_parallel_size
    flags = ["--model", args.model, "--dtype", "float32", "--kv-cache-memory", args.kv_cache_memory]
    flags += ["--tensor-parallel-size", f"{size}", "--disable-custom-all-reduce"]
    flags += ["--cpu-threads", "1"]
    flags += ["--distributed-executor-backend", args.backend]
    flags += ["--api-server-count", f"{args.api_server_count}", "--grpc-port", "0"]
    step_timeout_s = QUICK_STEP_TIMEOUT_S if args.quick else STEP_TIMEOUT_S
    flags += ["--step-timeout-s", f"{step_timeout_s:g}", "--disable-log-stats"]
    if args.speculative_model != "none":
        flags += ["--speculative-config", json.dumps({"model": args.speculative_model})]
    return [*flags, *args.server_args]


async def _load_and_strike(
    args: argparse.Namespace,
    outcome: Outcome,
    watch: Watch,
    urls: Sequence[str],
    pid: int,
    mark: str,
) -> None:
    client = Client(urls[0], api_key=None, timeout_s=STATUS_S)
    server = Server(pid, client, grpc_port=urllib.parse.urlsplit(urls[1]).port or 0, mark=mark)
    readers = [
        Reader(urls[number % GRPC_EVERY == GRPC_EVERY - 1], timeout_s=args.request_timeout)
        for number in range(args.width)
    ]
    wanted = make_wanted(
        Tokenizer(find_model(args.model)),
        count=args.known,
        longest_text=args.longest_text,
        seed=args.seed,
    )
    load = Load(readers, wanted, seed=args.seed)
    try:
        await load.learn()
        await load.close()
        before = await watch.settled(server)
        report.say(f"{len(wanted)} requests; idle: {dict(before.processes)}")
        outcome.began_s, running = time.monotonic(), asyncio.ensure_future(load.run())
        await _strike_often(args, outcome, server, load)
        load.stop()
        await running
        outcome.seconds = time.monotonic() - outcome.began_s
        await load.settle()
        await load.close()
        outcome.verdicts = load.verdicts
        after = await watch.settled(server, before)
        outcome.held, outcome.more_fds = after.beyond(before), after.more_fds(before)
    finally:
        await load.close()
        client.close()


async def _strike_often(
    args: argparse.Namespace, outcome: Outcome, server: Server, load: Load
) -> None:
    """Until the time is over, or the server does not come back."""
    rng, first = random.Random(args.seed), await server.look()
    end_s = time.monotonic() + 60 * args.minutes
    for kind in _kinds(args, rng):
        pause_s = rng.uniform(*(QUICK_PAUSE_S if args.quick else PAUSE_S))
        if time.monotonic() + pause_s >= end_s:
            break
        await asyncio.sleep(pause_s)
        dealt = await strike(server, first, kind, in_flight=load.num_in_flight, rng=rng)
        if dealt is not None:
            outcome.strikes.append(dealt)
        if dealt is None or dealt.whole_s is None:
            report.say(f"{len(outcome.strikes):4} {kind.name}: the server does not come back")
            return
        report.say(f"{len(outcome.strikes):4} {kind.name}: whole after {dealt.whole_s:.1f} s")
    await asyncio.sleep(max(0.0, end_s - time.monotonic()) if not args.quick else 0.0)


def _kinds(args: argparse.Namespace, rng: random.Random) -> Iterator[Kind]:
    """For ever; if it is to be quick, each of some once."""
    return iter(rng.sample(QUICK_KINDS, len(QUICK_KINDS))) if args.quick else decks(rng)


# The figures


def make_report(args: argparse.Namespace, outcome: Outcome) -> report.Report:
    made = report.Report(name="chaos", settings=dict(vars(args)), expected=dict(EXPECTED))
    gaps_s = [read.longest_gap_s for read in outcome.verdicts if read.streamed]
    ends = Counter(outcome.verdicts.values())
    made.ratios = {
        "requests": float(ends["ok"]),
        "strikes": float(len(outcome.strikes)),
        "restarts": float(sum(each.num_replaced for each in outcome.strikes)),
        "recovered": _share(outcome.strikes),
        "p99_gap_s": float(np.percentile(gaps_s, 99)) if gaps_s else 0.0,
        "wrong": float(ends["wrong"]),
        "lost": float(ends["lost"]),
        "repeated": float(ends["repeated"]),
        "leaked": float((outcome.held | outcome.left).total()),  # what lay there is not left anew
        "exit_code": float(abs(outcome.exit_code)) if outcome.exit_code is not None else 1.0,
    }
    made.rows = [each.row(since_s=outcome.began_s) for each in outcome.strikes]
    made.rows += [_wreck(read, end) for read, end in outcome.verdicts.items() if end != "ok"]
    made.rows += [
        {"row": "leak", "when": when, "what": what, "count": count}
        for when, found in (("idle", outcome.held), ("ended", outcome.left))
        for what, count in found.items()
    ]
    made.notes = {
        "seconds of load": round(outcome.seconds, 1),
        "requests": _ways(outcome.verdicts),
        "asked again": sum(read.num_calls > 1 for read in outcome.verdicts),
        "longest gap, s, median and most": [
            round(value, 3) for value in (statistics.median(gaps_s), max(gaps_s))
        ]
        if gaps_s
        else None,
        "idle, leaked": dict(outcome.held),
        "files that processes opened and did not close": outcome.more_fds,
        "ended, left": dict(outcome.left),
    }
    return made


def _share(strikes: Sequence[Strike]) -> float:
    return sum(each.recovered for each in strikes) / max(1, len(strikes))


def _ways(verdicts: dict[Read, Verdict]) -> dict[str, int]:
    return dict(
        Counter(
            f"{read.scheme}, {'streamed' if read.streamed else 'whole'}, {_sampling(read)}"
            for read in sorted(verdicts, key=lambda read: (read.scheme, not read.streamed))
        )
    )


def _sampling(read: Read) -> str:
    params = read.wanted.params
    if params.temperature == 0:
        return "greedy"
    return "seeded" if params.seed is not None else "no seed"


def _wreck(read: Read, end: Verdict) -> report.Row:
    return {
        "row": "request",
        "outcome": end,
        "error": read.error,
        "scheme": read.scheme,
        "streamed": read.streamed,
        "sampling": _sampling(read),
        "calls": read.num_calls,
        "tokens": len(read.text.token_ids),
        "wanted_tokens": read.wanted.params.max_tokens,
    }


def _line(kind: Kind, strikes: Sequence[Strike]) -> report.Row:
    found = [each for each in strikes if each.kind == kind]
    times = [each.whole_s for each in found if each.whole_s is not None]
    return {
        "strike": kind.name,
        "count": len(found),
        f"whole within {WHOLE_S:g} s": sum(each.recovered for each in found),
        "median s": statistics.median(times) if times else "-",
        "longest s": max(times, default="-"),
        "processes replaced": sum(each.num_replaced for each in found),
        "requests met": sum(each.in_flight for each in found),
    }


def _parser() -> argparse.ArgumentParser:
    made = report.parser(__doc__)
    made.add_argument("--minutes", type=float, default=15.0, help="Of load.")
    made.add_argument("--backend", default="ray", choices=("ray", "mp"))
    made.add_argument("--width", type=int, default=16, help="Clients at once.")
    made.add_argument("--known", type=int, default=32, help="Different requests.")
    made.add_argument("--longest-text", type=int, default=200, help="Tokens.")
    made.add_argument("--api-server-count", type=int, default=2, help="Of the server.")
    made.add_argument("--tensor-parallel-size", type=int, help="Of the server; 2, if quick 1.")
    made.add_argument("--kv-cache-memory", default="192MiB", help="Of the server.")
    made.add_argument("--request-timeout", type=float, default=240.0, metavar="SECONDS")
    made.add_argument("--log", metavar="FILE", help="Where the server writes.")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("server_args", nargs="*", metavar="-- SERVER_FLAGS")
    return made


if __name__ == "__main__":
    main()

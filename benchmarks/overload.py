"""What a server does that is asked for more than it can: completions in time, at up to three times its capacity.

    closed loop ──> capacity ──x 0.5 .. 3──> Poisson arrivals ──> raw clients: refused once, gone
                                                             └──> patient ones: come back after Retry-After

Capacity is what as many clients as the server runs at once complete per second, each asking again as soon as it is
answered. Good is a completion whose first token came within --ttft seconds of the request that was accepted, and the
others within --tpot seconds each on average. Nothing is asked twice: no prompt is in a prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import uvloop

from benchmarks import report, serve, servers
from benchmarks.client import Answer, Client
from paceline.runtime.models.weights import find_model
from paceline.runtime.tokenizer import Tokenizer

EXPECTED = {
    "goodput_at_3x_over_peak": (">=", 0.9),
    "refused_share_at_3x": (">=", 0.3),  # or it was no overload
    "errors": ("<=", 0.0),
}
MULTIPLES = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
QUICK_MULTIPLES = (1.0, 3.0)
RISE = 0.2
"""Of a measurement, what is not counted: the queue fills meanwhile."""
REFUSED = 429
LONGEST_PAUSE_S = 5.0
"""A patient client asks again after so long at the latest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a completion must keep to be good."""

    ttft_s: float
    tpot_s: float

    def keeps(self, answer: Answer) -> bool:
        if answer.error is not None:
            return False
        return answer.ttft_s <= self.ttft_s and (answer.tpot_s or 0.0) <= self.tpot_s


@dataclass(slots=True, kw_only=True)
class Wanted:
    """A text that somebody wanted, and how often they asked for it."""

    asked_s: float
    answers: list[Answer] = field(default_factory=list)

    @property
    def last(self) -> Answer:
        return self.answers[-1]

    @property
    def was_refused(self) -> bool:
        return self.last.status == REFUSED


class Asker:
    """Asks one server, every time for a text that it has not written yet."""

    def __init__(self, client: Client, form: serve.Form, asks: Sequence[serve.Ask]) -> None:
        self._client = client
        self._form = form
        self._asks = itertools.cycle(asks)
        self._salts = itertools.count()

    async def raw(self) -> Wanted:
        """Ask once, whatever comes of it."""
        wanted = Wanted(asked_s=time.perf_counter())
        wanted.answers.append(await self._client.ask(self._form.endpoint, self._body()))
        return wanted

    async def patient(self, *, until_s: float, choices: random.Random) -> Wanted:
        """Ask until it is not refused, when the server says, and no more after `until_s`."""
        wanted, body = Wanted(asked_s=time.perf_counter()), self._body()
        while True:
            wanted.answers.append(await self._client.ask(self._form.endpoint, body))
            wished_s = wanted.last.retry_after_s or 1.0
            # not all at once, who were refused at once
            pause_s = min(LONGEST_PAUSE_S, wished_s * choices.uniform(0.75, 1.25))
            if not wanted.was_refused or time.perf_counter() + pause_s > until_s:
                return wanted
            await asyncio.sleep(pause_s)

    def _body(self) -> bytes:
        extra = {**self._form.extra_body, "cache_salt": f"{next(self._salts)}"}
        return replace(self._form, extra_body=extra).body(next(self._asks))


async def closed_loop(ask: Callable[[], Awaitable[Wanted]], *, width: int, seconds: float) -> float:
    """Completions per second of `width` clients that ask again at once. Raises SystemExit where a request fails."""
    begin_s = time.perf_counter()
    ends_s: list[float] = []

    async def client() -> None:
        while time.perf_counter() < begin_s + seconds:
            wanted = await ask()
            if wanted.last.error is not None:
                raise SystemExit(f"a request failed below capacity: {wanted.last.error}")
            ends_s.append(wanted.last.end_s)

    await asyncio.gather(*(client() for _ in range(width)))
    counted = [end for end in ends_s if begin_s + RISE * seconds < end <= begin_s + seconds]
    return len(counted) / ((1 - RISE) * seconds)


async def open_loop(
    ask: Callable[[], Awaitable[Wanted]], *, rate: float, seconds: float, seed: int
) -> list[Wanted]:
    """Ask at random moments, `rate` times per second, whether or not earlier ones are answered."""
    pace = serve.Pace(request_rate=rate, seed=seed)
    arrivals_s = [at for at in pace.arrivals_s(int(1.5 * rate * seconds) + 20) if at < seconds]
    begin_s, tasks = time.perf_counter(), []
    for at_s in arrivals_s:
        wait_s = begin_s + at_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.ensure_future(ask()))
    return await asyncio.gather(*tasks)


def summary(
    wanted: Sequence[Wanted], *, limits: Limits, begin_s: float, seconds: float
) -> report.Row:
    """The figures of an open loop. Rates count what ended after the rise and before arrivals did."""
    done = [each.last for each in wanted if each.last.error is None]
    inside = [answer for answer in done if RISE * seconds < answer.end_s - begin_s <= seconds]
    counted_s = (1 - RISE) * seconds
    asked = sum(len(each.answers) for each in wanted)
    refusals = sum(answer.status == REFUSED for each in wanted for answer in each.answers)
    others = Counter(
        answer.error
        for each in wanted
        for answer in each.answers
        if answer.error is not None and answer.status != REFUSED
    )
    return {
        "offered": len(wanted) / seconds,
        "wanted": len(wanted),
        "completed": len(done),
        "given_up": sum(each.was_refused for each in wanted),
        "asked": asked,
        "refusals": refusals,
        "refused_share": refusals / max(1, asked),
        "errors": others.total(),
        "error_texts": dict(others.most_common(3)),
        "throughput": len(inside) / counted_s,
        "goodput": sum(limits.keeps(answer) for answer in inside) / counted_s,
        **_percentiles("ttft_s", [answer.ttft_s for answer in done]),
        **_percentiles("tpot_s", [a.tpot_s for a in done if a.tpot_s is not None]),
        **_percentiles("refusal_s", _refusal_times(wanted)),
        **_percentiles(
            "waited_s",
            [each.last.start_s - each.asked_s for each in wanted if each.last.error is None],
        ),
    }


def _refusal_times(wanted: Sequence[Wanted]) -> list[float]:
    return [a.closed_s - a.start_s for each in wanted for a in each.answers if a.status == REFUSED]


def _percentiles(name: str, values: Sequence[float]) -> report.Row:
    found = np.percentile(values, (50, 99)) if values else (0.0, 0.0)
    return {f"p50_{name}": float(found[0]), f"p99_{name}": float(found[1])}


def pooled(rows: Sequence[report.Row]) -> list[report.Row]:
    """A row per kind of clients and multiple: rounds averaged, the worst of their percentiles, errors summed."""
    points: dict[tuple[str, float], list[report.Row]] = {}
    for row in rows:
        points.setdefault((row["clients"], row["multiple"]), []).append(row)
    merged = []
    for (clients, multiple), found in sorted(
        points.items(), key=lambda each: (each[0][0] != "raw", each[0][1])
    ):
        line: report.Row = {"clients": clients, "multiple": multiple}
        for name in (
            "offered",
            "throughput",
            "goodput",
            "refused_share",
            "p50_ttft_s",
            "p50_waited_s",
        ):
            line[name] = float(np.mean([row[name] for row in found]))
        for name in ("p99_ttft_s", "p99_refusal_s"):
            line[name] = max(row[name] for row in found)
        line["errors"] = sum(row["errors"] for row in found)
        merged.append(line)
    return merged


def ratios(points: Sequence[report.Row]) -> dict[str, float]:
    """From pooled rows."""
    found = {"errors": float(sum(row["errors"] for row in points))}
    for clients, prefix in (("raw", ""), ("patient", "patient_")):
        curve = [row for row in points if row["clients"] == clients]
        peak = max((row["goodput"] for row in curve), default=0.0)
        if peak > 0:
            found[f"{prefix}goodput_at_3x_over_peak"] = curve[-1]["goodput"] / peak
            found[f"{prefix}refused_share_at_3x"] = curve[-1]["refused_share"]
            found[f"{prefix}p99_ttft_at_3x_s"] = curve[-1]["p99_ttft_s"]
    return found


# The command


def main() -> None:
    args = _parser().parse_args()
    if args.base_url is not None:
        if args.server_args:
            raise SystemExit("flags after -- are for a server that this command starts")
        _measure(args, args.base_url)
        return
    flags = ["--model", args.model, "--max-num-seqs", str(args.max_num_seqs)]
    flags += ["--max-queued-requests", str(args.max_queued_requests), "--disable-log-stats"]
    flags += ["--distributed-executor-backend", args.backend]
    if args.speculative_model != "none":
        flags += ["--speculative-config", json.dumps({"model": args.speculative_model})]
    command = servers.paceline_command(*flags, *args.server_args)
    report.say(f"starting {' '.join(command[1:])}")
    try:
        with servers.serving(command, ready=servers.ready_line, deadline_s=300) as url:
            _measure(args, url)
    except servers.StartError as error:
        raise SystemExit(f"the server did not start: {error}") from None


def _measure(args: argparse.Namespace, url: str) -> None:
    if args.quick:
        args.seconds, args.rounds = min(args.seconds, 6.0), 1
    made = report.Report(name="overload", settings=dict(vars(args)), expected=EXPECTED)
    capacity, made.rows = uvloop.run(_curves(args, url))
    points = pooled(made.rows)
    made.ratios = ratios(points)
    made.notes = {"capacity, requests/s": capacity}
    table = [_line(row) for row in points]
    made.print(list(table[0]), table)
    made.notes["points"] = points  # what is drawn
    made.write(args.output)


async def _curves(args: argparse.Namespace, url: str) -> tuple[float, list[report.Row]]:
    tokenizer = Tokenizer(find_model(args.tokenizer or args.model))
    asks = serve.held_out_asks(
        args.prompts_file,
        tokenizer,
        count=256,
        input_len=args.input_len,
        output_len=args.output_len,
        seed=args.seed,
    )
    name = args.served_model_name or args.model
    form = serve.Form(model=name, ignore_eos=True)
    client = Client(url, api_key=None, timeout_s=args.request_timeout)
    asker = Asker(client, form, asks)
    try:
        width = args.max_num_seqs
        await closed_loop(asker.raw, width=width, seconds=args.seconds / 3)  # warm
        capacity = await closed_loop(asker.raw, width=width, seconds=args.seconds)
        if not capacity:
            raise SystemExit(f"nothing was completed within {args.seconds:g} s: raise --seconds")
        report.say(f"capacity {capacity:.1f} requests/s")
        rows = []
        for number, clients, multiple in _order(args):
            figures = await _point(
                asker, clients, args=args, rate=multiple * capacity, seed=args.seed + number
            )
            rows.append({"clients": clients, "multiple": multiple, "round": number, **figures})
            report.say(f"  {clients} at {multiple:g}: {figures['goodput']:.1f} good per second")
        return capacity, rows
    finally:
        client.close()


def _order(args: argparse.Namespace) -> Iterator[tuple[int, str, float]]:
    """Round by round, every other one backwards: who shares the machine then meets all points alike."""
    multiples = QUICK_MULTIPLES if args.quick else MULTIPLES
    points = [(clients, multiple) for clients in ("raw", "patient") for multiple in multiples]
    for number in range(args.rounds):
        for clients, multiple in points[:: 1 if number % 2 == 0 else -1]:
            yield number, clients, multiple


async def _point(
    asker: Asker, clients: str, *, args: argparse.Namespace, rate: float, seed: int
) -> report.Row:
    begin_s, choices = time.perf_counter(), random.Random(seed)

    async def patient() -> Wanted:
        return await asker.patient(until_s=begin_s + args.seconds, choices=choices)

    ask = asker.raw if clients == "raw" else patient
    wanted = await open_loop(ask, rate=rate, seconds=args.seconds, seed=seed)
    limits = Limits(ttft_s=args.ttft, tpot_s=args.tpot)
    return summary(wanted, limits=limits, begin_s=begin_s, seconds=args.seconds)


def _line(row: report.Row) -> report.Row:
    return {
        "clients": row["clients"],
        "times": row["multiple"],
        "offered": row["offered"],
        "completed": row["throughput"],
        "good": row["goodput"],
        "refused": row["refused_share"],
        "errors": row["errors"],
        "ttft p50 s": row["p50_ttft_s"],
        "p99 s": row["p99_ttft_s"],
        "waited s": row["p50_waited_s"],
        "refusal p99 s": row["p99_refusal_s"],
    }


def _parser() -> argparse.ArgumentParser:
    made = report.parser(__doc__)
    made.add_argument("--base-url", help="The server; one of our own is started if not given.")
    made.add_argument("--served-model-name", help="--model if not given.")
    made.add_argument("--tokenizer", help="A folder, hub id or `embedded`; --model if not given.")
    made.add_argument("--backend", default="mp", choices=("mp", "ray", "uni"))
    made.add_argument("--seconds", type=float, default=30.0, help="Of each measurement.")
    made.add_argument("--rounds", type=int, default=2, help="Of all rates.")
    made.add_argument("--max-num-seqs", type=int, default=16, help="Of the server: run at once.")
    made.add_argument(
        "--max-queued-requests", type=int, default=16, help="Of the server: may wait."
    )
    made.add_argument("--input-len", type=int, default=64)
    made.add_argument("--output-len", type=int, default=48)
    made.add_argument("--ttft", type=float, default=2.0, help="Seconds; more is not good.")
    made.add_argument("--tpot", type=float, default=0.1, help="Seconds; more is not good.")
    made.add_argument("--request-timeout", type=float, default=120.0, metavar="SECONDS")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("server_args", nargs="*", metavar="-- SERVER_FLAGS")
    return made


if __name__ == "__main__":
    main()

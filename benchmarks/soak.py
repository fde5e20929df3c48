"""Hours of steady load: whether every process's memory stays flat, and nothing else grows.

    ask each once, alone ──> known texts
    load at a part of capacity, Poisson ──> streamed, whole, left in the midst ──> compared with the known ones
                              every few seconds: memory, files and threads of every process

What is idle is compared with what is idle: before and after the load all clients are gone, and files, threads and KV
blocks in use should be as many as before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import uvloop

from benchmarks import overload, prompts, report, serve, servers
from benchmarks.client import Client
from benchmarks.process_tree import ProcessTree, Sample, Watched, slope
from paceline.runtime.models.weights import find_model
from paceline.runtime.tokenizer import Tokenizer

EXPECTED = {
    "steepest_slope_mb_per_hour": ("<=", 10.0),
    "leaked_fds": ("<=", 0.0),
    "leaked_blocks": ("<=", 0.0),
    "errors": ("<=", 0.0),
    "wrong": ("<=", 0.0),
    "processes_replaced": ("<=", 0.0),
}
WARM_UP = 0.1
"""Of the time, what slopes leave out."""
IDLE_S = 7.0
"""After so long a server has closed the connections that nobody uses."""
SHORTEST, LONGEST = 16, 1024
"""Tokens of a prompt."""
FEW_S, MANY_S = 0.02, 0.4
"""When a client leaves, counted from its request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A request and the text it has."""

    ask: serve.Ask
    extra: dict[str, Any]
    text: str = ""


class Load:
    """Requests of one server, and what came of them."""

    def __init__(self, client: Client, form: serve.Form, *, seed: int) -> None:
        self.ends: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self._client = client
        self._form = form
        self._choices = random.Random(seed)
        self._salts = itertools.count()

    async def learn(self, known: Known) -> Known:
        """The text of a request, asked for alone."""
        answer = await self._client.ask(self._form.endpoint, self._body(known, salted=False))
        if answer.error is not None:
            raise SystemExit(f"a request failed before any load: {answer.error}")
        return replace(known, text="".join(answer.text))

    async def one(self, known: Known) -> None:
        """Ask in one of three ways: streamed, whole, or as a client that leaves."""
        body = self._body(known, salted=self._choices.random() < 0.5)
        way = self._choices.choices(("streamed", "whole", "leaves"), weights=(60, 30, 10))[0]
        if way == "whole":
            await self._whole(known, body)
        elif way == "streamed":
            await self._streamed(known, body)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._choices.uniform(FEW_S, MANY_S)):
                    await self._streamed(known, body)
                return
            self.ends["left"] += 1

    async def _streamed(self, known: Known, body: bytes) -> None:
        answer = await self._client.ask(self._form.endpoint, body)
        self._judge(known, "".join(answer.text), answer.error)

    async def _whole(self, known: Known, body: bytes) -> None:
        values = {**json.loads(body), "stream": False}
        del values["stream_options"]
        text, error = "", None
        try:
            found = await self._client.post(self._form.endpoint, json.dumps(values).encode())
            text = json.loads(found)["choices"][0]["text"]
        except (OSError, ValueError, LookupError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        self._judge(known, text, error)

    def _judge(self, known: Known, text: str, error: str | None) -> None:
        if error is not None:
            self.ends["errors"] += 1
            self.failures[error] += 1
        else:
            self.ends["ok" if text == known.text else "wrong"] += 1

    def _body(self, known: Known, *, salted: bool) -> bytes:
        # half of the prompts are new to the prefix cache
        salt = {"cache_salt": f"{next(self._salts)}"} if salted else {}
        extra = {**self._form.extra_body, **known.extra, **salt}
        return replace(self._form, extra_body=extra).body(known.ask)


def make_known(tokenizer: Tokenizer, *, count: int, seed: int) -> list[Known]:
    """Requests of all lengths, every other one sampled with a seed of its own."""
    choices = random.Random(seed)
    texts = prompts.held_out(tokenizer, count=count, length=LONGEST, seed=seed)
    made = []
    for number, token_ids in enumerate(texts):
        length = round(SHORTEST * (LONGEST / SHORTEST) ** (number / max(1, count - 1)))
        extra: dict[str, Any] = {"ignore_eos": True}
        if number % 2:
            extra |= {"temperature": 0.9, "top_p": 0.95, "seed": number}
        ask = serve.Ask(token_ids=token_ids[:length], max_tokens=choices.randint(8, 96))
        made.append(Known(ask=ask, extra=extra))
    return made


async def steady(
    load: Load, known: Sequence[Known], *, rate: float, seconds: float, seed: int
) -> None:
    """Ask at random moments for so long, and wait for all answers."""
    choices, running = random.Random(seed), set[asyncio.Task[None]]()
    end_s, at_s = time.perf_counter() + seconds, time.perf_counter()
    while True:
        at_s += choices.expovariate(rate)
        await asyncio.sleep(max(0.0, min(at_s, end_s) - time.perf_counter()))
        if at_s >= end_s:
            break
        task = asyncio.ensure_future(load.one(choices.choice(known)))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def watch(tree: ProcessTree, *, every_s: float) -> None:
    """Look at all processes for ever. In a thread: reading maps takes a while."""
    while True:
        await asyncio.to_thread(tree.look)
        await asyncio.sleep(every_s)


async def blocks_in_use(client: Client) -> float:
    """Part of the KV blocks that requests hold, summed over engines."""
    metrics = await client.get("/metrics")
    found = re.findall(r"^paceline:kv_cache_usage_perc(?:\{[^}]*\})? (\S+)", metrics, re.MULTILINE)
    return sum(float(value) for value in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """A server that nobody asks for anything."""

    samples: dict[int, Sample]
    blocks: float


async def idle(tree: ProcessTree, client: Client) -> Idle:
    client.close()
    await asyncio.sleep(IDLE_S)
    samples = await asyncio.to_thread(tree.look)
    return Idle(samples=samples, blocks=await blocks_in_use(client))


# The command


def main() -> None:
    args = _parser().parse_args()
    if args.quick:
        args.minutes, args.every = min(args.minutes, 0.25), min(args.every, 2.0)
        args.known = min(args.known, 6)
    # float32, so that a text does not depend on what else is in a batch; little KV, so that all of it
    # has been written to when the warm-up is over
    flags = ["--model", args.model, "--dtype", "float32", "--kv-cache-memory", args.kv_cache_memory]
    flags += ["--disable-log-stats"]
    flags += ["--distributed-executor-backend", args.backend]
    if args.speculative_model != "none":
        flags += ["--speculative-config", json.dumps({"model": args.speculative_model})]
    command = servers.paceline_command(*flags, *args.server_args)
    report.say(f"starting {' '.join(command[1:])}")
    pids: list[int] = []
    try:
        with servers.serving(
            command, ready=servers.ready_line, deadline_s=300, on_start=pids.append
        ) as url:
            made = uvloop.run(_soak(args, url, pids[0]))
    except servers.StartError as error:
        raise SystemExit(f"the server did not start: {error}") from None
    table = made.notes.pop("table")
    made.print(list(table[0]), table)
    made.write(args.output)


async def _soak(args: argparse.Namespace, url: str, pid: int) -> report.Report:
    tokenizer = Tokenizer(find_model(args.model))
    form = serve.Form(model=args.model)
    client = Client(url, api_key=None, timeout_s=args.request_timeout)
    tree = ProcessTree(pid, port=urllib.parse.urlsplit(url).port or 80)
    load = Load(client, form, seed=args.seed)
    try:
        asked = make_known(tokenizer, count=args.known, seed=args.seed)
        known = [await load.learn(each) for each in asked]
        rate = args.rate or args.share * await _capacity(client, form, asked)
        report.say(f"{rate:.2f} requests/s for {args.minutes:g} minutes")
        before = await idle(tree, client)
        began_s, watching = tree.now_s(), asyncio.ensure_future(watch(tree, every_s=args.every))
        await steady(load, known, rate=rate, seconds=60 * args.minutes, seed=args.seed)
        ended_s = tree.now_s()
        watching.cancel()
        after = await idle(tree, client)
    finally:
        client.close()
    return _report(args, load, tree, before, after, span=(began_s, ended_s), rate=rate)


async def _capacity(client: Client, form: serve.Form, known: Sequence[Known]) -> float:
    """Requests per second that 16 clients get out of it, each asking again at once."""
    asker = overload.Asker(client, replace(form, ignore_eos=True), [each.ask for each in known])
    found = await overload.closed_loop(asker.raw, width=16, seconds=8.0)
    if not found:
        raise SystemExit("nothing was completed within 8 s: give --rate")
    return found


def _report(
    args: argparse.Namespace,
    load: Load,
    tree: ProcessTree,
    before: Idle,
    after: Idle,
    *,
    span: tuple[float, float],
    rate: float,
) -> report.Report:
    made = report.Report(name="soak", settings=dict(vars(args)), expected=dict(EXPECTED))
    if args.quick:  # a minute says nothing about an hour
        del made.expected["steepest_slope_mb_per_hour"]
    begin_s = span[0] + WARM_UP * (span[1] - span[0])
    lines = [_line(each, begin_s, before, after) for each in tree.watched]
    ours = [line for line in lines if not line["rays"]]
    made.rows = [
        {**line, "samples": [_rounded(sample) for sample in each.samples]}
        for line, each in zip(lines, tree.watched, strict=True)
    ]
    made.ratios = {
        "steepest_slope_mb_per_hour": max(line["MB/hour"] for line in ours),
        "leaked_fds": float(sum(max(0, line["fds +"]) for line in ours)),
        "leaked_threads": float(sum(max(0, line["threads +"]) for line in ours)),
        "leaked_blocks": max(0.0, after.blocks - before.blocks),
        "processes_replaced": float(
            len({line["pid"] for line in ours} - (before.samples.keys() & after.samples.keys()))
        ),
        "errors": float(load.ends["errors"]),
        "wrong": float(load.ends["wrong"]),
    }
    made.notes = {
        "requests": dict(load.ends),
        "requests/s": rate,
        "failures": dict(load.failures.most_common(5)),
        "/dev/shm, MB, first and last": [tree.shared_bytes[i][1] / 1e6 for i in (0, -1)],
        "table": [{key: value for key, value in line.items() if key != "rays"} for line in lines],
    }
    return made


def _line(each: Watched, begin_s: float, before: Idle, after: Idle) -> report.Row:
    steady_samples = each.after(begin_s)
    own, shared = (slope(steady_samples, what) for what in ("own_mb", "pss_mb"))
    first, last = before.samples.get(each.pid), after.samples.get(each.pid)
    stayed = first is not None and last is not None
    return {
        "process": each.name,
        "pid": each.pid,
        "rays": each.is_rays,
        "own MB": each.samples[-1].own_mb,
        "PSS MB": each.samples[-1].pss_mb,
        "RSS MB": each.samples[-1].rss_mb,
        "MB/hour": own.per_hour,
        "+-": own.standard_error,
        "PSS MB/hour": shared.per_hour,
        "fds +": last.num_fds - first.num_fds if stayed else 0,
        "threads +": last.num_threads - first.num_threads if stayed else 0,
    }


def _rounded(sample: Sample) -> dict[str, float]:
    return {name: round(value, 3) for name, value in sample._asdict().items()}


def _parser() -> argparse.ArgumentParser:
    made = report.parser(__doc__)
    made.add_argument("--minutes", type=float, default=60.0, help="Of load.")
    made.add_argument("--every", type=float, default=10.0, help="Seconds between two looks.")
    made.add_argument("--backend", default="mp", choices=("mp", "ray", "uni"))
    made.add_argument("--kv-cache-memory", default="192MiB", help="Of the server.")
    made.add_argument("--rate", type=float, help="Requests per second, instead of --share.")
    made.add_argument("--share", type=float, default=0.4, help="Of capacity, measured before.")
    made.add_argument("--known", type=int, default=48, help="Different requests.")
    made.add_argument("--request-timeout", type=float, default=120.0, metavar="SECONDS")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("server_args", nargs="*", metavar="-- SERVER_FLAGS")
    return made


if __name__ == "__main__":
    main()

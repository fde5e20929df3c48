"""Load on an OpenAI server, ours or another's: latencies, throughput, acceptance, under vLLM's names.

    dataset ──> Ask ──arrivals──> gate ──> Client ──> Answer ──> summary
                      request     max                            vllm bench serve's keys
                      rate        concurrency                    and acceptance

Without --base-url it starts `paceline serve` itself; flags after `--` go to that server. The client shares the machine
with what it measures: an event costs it some microseconds, and every row says how many (`client_us_per_chunk`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop

from benchmarks import prompts, report, servers
from benchmarks.client import Acceptance, Answer, Client, read_counters
from paceline.runtime.models.weights import find_model
from paceline.runtime.tokenizer import Tokenizer

EXPECTED = {"client_us_per_chunk": ("<=", 50.0)}
LATENCIES = ("ttft", "tpot", "itl", "e2el")
"""Time to first token, time per output token after it, time between events, and the whole request."""
SETTLE_S = 1.0
"""Servers refresh their counters a few times per second."""


# What is asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A prompt, as token ids, and how many tokens may follow."""

    token_ids: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How asks become bodies."""

    model: str
    endpoint: str = "/v1/completions"
    temperature: float = 0.0
    ignore_eos: bool = False
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    """For chats, whose prompts are text."""

    def body(self, ask: Ask) -> bytes:
        values: dict[str, Any] = {
            "model": self.model,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint.endswith("/chat/completions"):
            assert self.tokenizer is not None, "chats need a tokenizer"
            text = self.tokenizer.decode(ask.token_ids)
            values["messages"] = [{"role": "user", "content": text}]
            values["max_completion_tokens"] = ask.max_tokens
        else:
            values["prompt"] = ask.token_ids
            values["max_tokens"] = ask.max_tokens
        if self.ignore_eos:  # not OpenAI's: only where it is asked for
            values["ignore_eos"] = True
        return msgspec.json.encode({**values, **self.extra_body})


def random_asks(
    tokenizer: Tokenizer, *, count: int, input_len: int, output_len: int, seed: int
) -> list[Ask]:
    """Token ids drawn at random, special ones left out."""
    choices = random.Random(seed)
    ids = sorted(set(tokenizer.vocabulary().values()) - tokenizer.special_ids)
    return [
        Ask(token_ids=choices.choices(ids, k=input_len), max_tokens=output_len)
        for _ in range(count)
    ]


def sharegpt_asks(
    path: str, tokenizer: Tokenizer, *, count: int, output_len: int | None, seed: int
) -> list[Ask]:
    """First questions of a ShareGPT-like file, and as many tokens as the answers in it have.

    The file is a JSON list of `{"conversations": [{"value": question}, {"value": answer}, ...]}`.
    Raises SystemExit where it holds none.
    """
    asks = []
    for entry in json.loads(Path(path).read_text()):
        turns = entry.get("conversations", [])
        if len(turns) < 2:
            continue
        prompt, answer = (tokenizer.encode(turn["value"]) for turn in turns[:2])
        if prompt and answer:
            asks.append(Ask(token_ids=prompt, max_tokens=output_len or len(answer)))
    if not asks:
        raise SystemExit(f"{path} holds no conversation of two turns")
    random.Random(seed).shuffle(asks)
    return [asks[i % len(asks)] for i in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Short chats, and now and then a long prompt with a short answer."""

    long_share: float = 0.15
    long_input_len: int = 1500
    long_output_len: int = 32
    input_len: int = 96
    output_len: int = 96
    """Of chats. All lengths vary by a third up and down."""


def mixed_asks(tokenizer: Tokenizer, mix: Mix, *, count: int, seed: int) -> list[Ask]:
    """Held-out texts cut to such lengths, in an order that the seed decides."""
    choices = random.Random(seed)
    long_texts = prompts.held_out(
        tokenizer, count=count, length=int(mix.long_input_len * 4 / 3), seed=seed
    )
    asks = []
    for token_ids in long_texts:
        is_long = choices.random() < mix.long_share
        lengths = (mix.long_input_len, mix.long_output_len)
        if not is_long:
            lengths = (mix.input_len, mix.output_len)
        num_input, num_output = (int(each * choices.uniform(2 / 3, 4 / 3)) for each in lengths)
        asks.append(Ask(token_ids=token_ids[:num_input], max_tokens=num_output))
    return asks


def held_out_asks(
    path: str | None,
    tokenizer: Tokenizer,
    *,
    count: int,
    input_len: int,
    output_len: int,
    seed: int,
) -> list[Ask]:
    """Prompts that the embedded pair has not seen, or those of a JSONL file."""
    if path is not None:
        found = prompts.from_file(path, tokenizer, length=input_len)
        given = [found[i % len(found)] for i in range(count)]
    else:
        given = prompts.held_out(tokenizer, count=count, length=input_len, seed=seed)
    return [Ask(token_ids=token_ids, max_tokens=output_len) for token_ids in given]


# When


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When requests are sent."""

    request_rate: float = math.inf
    """Per second; infinite sends all at once."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes in bursts."""
    max_concurrency: int | None = None
    """Most requests in flight; the others wait at the client, where their clock has not begun."""
    seed: int = 0

    def arrivals_s(self, count: int) -> list[float]:
        if math.isinf(self.request_rate):
            return [0.0] * count
        choices, at, arrivals = random.Random(self.seed), 0.0, []
        for _ in range(count):
            arrivals.append(at)
            at += choices.gammavariate(self.burstiness, 1 / (self.request_rate * self.burstiness))
        return arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What was measured, before any statistics."""

    answers: list[Answer]
    duration_s: float
    cpu_s: float
    """Of this process."""
    counters: Acceptance
    """What the server's own counters grew by."""


async def load(client: Client, form: Form, asks: Sequence[Ask], pace: Pace) -> Run:
    """Send all of them at their pace and wait for every answer."""
    bodies = [form.body(ask) for ask in asks]
    gate = asyncio.Semaphore(pace.max_concurrency or len(asks))
    before = await _counters(client)

    async def one(body: bytes) -> Answer:
        async with gate:
            return await client.ask(form.endpoint, body)

    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    tasks: list[asyncio.Task[Answer]] = []
    for body, at_s in zip(bodies, pace.arrivals_s(len(bodies)), strict=True):
        wait_s = start_s + at_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(one(body)))
    answers = await asyncio.gather(*tasks)
    duration_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    grown = Acceptance()
    if before is not None and not any(answer.speculation for answer in answers):
        await asyncio.sleep(SETTLE_S)
        grown = (await _counters(client) or before).plus(before, sign=-1)
    return Run(answers=answers, duration_s=duration_s, cpu_s=cpu_s, counters=grown)


async def _counters(client: Client) -> Acceptance | None:
    try:
        return read_counters(await client.get("/metrics"))
    except OSError:  # many servers have none
        return None


# What came of it


def summary(
    run: Run,
    *,
    goodput_ms: Mapping[str, float] | None = None,
    percentile_metrics: Sequence[str] = LATENCIES,
    percentiles: Sequence[float] = (99.0,),
) -> report.Row:
    """The figures of a run under `vllm bench serve`'s keys. Failed requests are in `failed` alone."""
    good = [answer for answer in run.answers if answer.error is None]
    num_input = sum(answer.usage.prompt_tokens for answer in good if answer.usage is not None)
    num_output = sum(answer.num_tokens for answer in good)
    num_chunks = sum(answer.num_chunks for answer in run.answers)
    row: report.Row = {
        "duration": run.duration_s,
        "completed": len(good),
        "failed": len(run.answers) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / run.duration_s,
        "request_goodput": None,
        "output_throughput": num_output / run.duration_s,
        "total_token_throughput": (num_input + num_output) / run.duration_s,
        "max_output_tokens_per_s": _peak_tokens_per_s(good),
        "max_concurrent_requests": _peak_concurrency(good),
    }
    if goodput_ms:
        kept = sum(_keeps(answer, goodput_ms) for answer in good)
        row["request_goodput"] = kept / run.duration_s
    for name in LATENCIES:
        values = [value for answer in good for value in _latency_ms(answer, name)]
        found = np.asarray(values or [0.0])
        row[f"mean_{name}_ms"] = float(found.mean())
        row[f"median_{name}_ms"] = float(np.median(found))
        row[f"std_{name}_ms"] = float(found.std())
        for percentile in percentiles if name in percentile_metrics else ():
            row[f"p{percentile:g}_{name}_ms"] = float(np.percentile(found, percentile))
    row |= _acceptance(run, good).row()
    row["num_chunks"] = num_chunks
    row["client_us_per_chunk"] = 1e6 * run.cpu_s / max(1, num_chunks)
    row["client_cpu_fraction"] = run.cpu_s / run.duration_s
    return row


def details(run: Run) -> report.Row:
    """Every request, as vLLM's --save-detailed has them."""
    begin_s = min((answer.start_s for answer in run.answers), default=0.0)
    return {
        "input_lens": [a.usage.prompt_tokens if a.usage else 0 for a in run.answers],
        "output_lens": [a.num_tokens for a in run.answers],
        "start_times": [a.start_s - begin_s for a in run.answers],
        "ttfts": [a.ttft_s if a.error is None else 0.0 for a in run.answers],
        "itls": [a.itl_s for a in run.answers],
        "latencies": [a.e2el_s if a.error is None else 0.0 for a in run.answers],
        "generated_texts": ["".join(a.text) for a in run.answers],
        "errors": [a.error or "" for a in run.answers],
    }


def _latency_ms(answer: Answer, name: str) -> list[float]:
    values: dict[str, list[float | None]] = {
        "ttft": [answer.ttft_s],
        "tpot": [answer.tpot_s],
        "itl": [*answer.itl_s],
        "e2el": [answer.e2el_s],
    }
    return [1e3 * value for value in values[name] if value is not None]


def _keeps(answer: Answer, limits_ms: Mapping[str, float]) -> bool:
    return all(
        value <= limit for name, limit in limits_ms.items() for value in _latency_ms(answer, name)
    )


def _acceptance(run: Run, good: Sequence[Answer]) -> Acceptance:
    """From the answers where they tell it, else from the server's counters."""
    told = [answer.speculation for answer in good if answer.speculation is not None]
    if not told:
        return run.counters
    total = Acceptance()
    for spec in told:
        histogram = spec.acceptance_histogram
        total = total.plus(
            Acceptance(
                drafts=spec.num_spec_steps,
                draft_tokens=spec.num_draft_tokens,
                accepted_tokens=spec.num_accepted_draft_tokens,
                accepted_at=tuple(sum(histogram[i + 1 :]) for i in range(len(histogram) - 1)),
            )
        )
    return total


def _peak_tokens_per_s(answers: Sequence[Answer]) -> float:
    """Tokens of the best whole second since the first request; an answer's events share them evenly."""
    if not answers:
        return 0.0
    begin_s = min(answer.start_s for answer in answers)
    tokens: defaultdict[int, float] = defaultdict(float)
    for answer in answers:
        arrivals = answer.arrivals_s or [answer.end_s]
        for at_s in arrivals:
            tokens[int(at_s - begin_s)] += answer.num_tokens / len(arrivals)
    return max(tokens.values())


def _peak_concurrency(answers: Sequence[Answer]) -> int:
    changes = [(answer.start_s, 1) for answer in answers]
    changes += [(answer.end_s, -1) for answer in answers]
    now = peak = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


# The command


def main() -> None:
    args = _parser().parse_args()
    if args.base_url is not None:
        if args.server_args:
            raise SystemExit("flags after -- are for a server that this command starts")
        _measure(args, args.base_url)
        return
    args.model = args.model or "embedded"
    flags = ["--model", args.model, "--per-request-spec-decode-metrics"]
    if args.speculative_model != "none":
        flags += ["--speculative-config", json.dumps({"model": args.speculative_model})]
    command = servers.paceline_command(*flags, *args.server_args)
    report.say(f"starting {' '.join(command[1:])}")
    try:
        with servers.serving(
            command, ready=servers.ready_line, deadline_s=args.ready_timeout
        ) as url:
            _measure(args, url)
    except servers.StartError as error:
        raise SystemExit(f"the server did not start: {error}") from None


def _measure(args: argparse.Namespace, base_url: str) -> None:
    name = args.served_model_name or _served_model(base_url, args.api_key)
    tokenizer = Tokenizer(find_model(args.tokenizer or args.model or "embedded"))
    form = Form(
        model=name,
        endpoint=args.endpoint,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        extra_body=args.extra_body,
        tokenizer=tokenizer,
    )
    if args.quick:
        args.num_prompts, args.random_output_len = min(args.num_prompts, 24), 32
    settings = {key: value for key, value in vars(args).items() if key != "api_key"}
    settings["request_rate"] = _or_inf(args.request_rate)
    made = report.Report(name="serve", settings=settings, expected=EXPECTED)
    for number, max_concurrency in enumerate(args.max_concurrency):
        # no prompt twice, so that no run finds the prefixes of another
        asks = _asks(args, tokenizer, seed=args.seed + number)
        pace = Pace(
            request_rate=args.request_rate,
            burstiness=args.burstiness,
            max_concurrency=max_concurrency,
            seed=args.seed,
        )
        run = uvloop.run(_warm_and_load(args, base_url, form, asks, pace))
        for error in sorted({answer.error for answer in run.answers if answer.error})[:3]:
            report.say(f"  failed: {error}")
        row = {
            "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": "openai-chat" if "chat" in args.endpoint else "openai",
            "backend": "openai-chat" if "chat" in args.endpoint else "openai",
            "model_id": name,
            "tokenizer_id": str(tokenizer.folder.name),
            "num_prompts": len(run.answers),
            "request_rate": _or_inf(args.request_rate),
            "burstiness": args.burstiness,
            "max_concurrency": max_concurrency,
            **summary(
                run,
                goodput_ms=dict(args.goodput),
                percentile_metrics=args.percentile_metrics,
                percentiles=args.metric_percentiles,
            ),
        }
        made.rows.append(row)
        if args.save_result:
            _save(args, row | (details(run) if args.save_detailed else {}))
    busiest = max(made.rows, key=lambda row: row["num_chunks"] / row["duration"])
    made.ratios["client_us_per_chunk"] = busiest["client_us_per_chunk"]
    table = [_line(row, args.metric_percentiles[-1]) for row in made.rows]
    made.print(list(table[0]), table)
    made.write(args.output)


async def _warm_and_load(
    args: argparse.Namespace, base_url: str, form: Form, asks: Sequence[Ask], pace: Pace
) -> Run:
    client = Client(base_url, api_key=args.api_key, timeout_s=args.request_timeout)
    try:
        if args.num_warmups:
            warm = await load(client, form, asks[: args.num_warmups], replace(pace, seed=1))
            if all(answer.error for answer in warm.answers):
                raise SystemExit(f"no request was answered: {warm.answers[0].error}")
        return await load(client, form, asks[args.num_warmups :], pace)
    finally:
        client.close()


def _asks(args: argparse.Namespace, tokenizer: Tokenizer, *, seed: int) -> list[Ask]:
    count = args.num_prompts + args.num_warmups
    shape = {"count": count, "output_len": args.random_output_len, "seed": seed}
    if args.dataset_name == "sharegpt":
        if args.dataset_path is None:
            raise SystemExit("--dataset-name sharegpt needs --dataset-path FILE.json")
        return sharegpt_asks(
            args.dataset_path,
            tokenizer,
            count=count,
            output_len=args.sharegpt_output_len,
            seed=seed,
        )
    if args.dataset_name == "mix":
        mix = Mix(input_len=args.random_input_len, output_len=args.random_output_len)
        return mixed_asks(tokenizer, mix, count=count, seed=seed)
    if args.dataset_name == "random":
        return random_asks(tokenizer, input_len=args.random_input_len, **shape)
    return held_out_asks(args.prompts_file, tokenizer, input_len=args.random_input_len, **shape)


def _served_model(base_url: str, api_key: str | None) -> str:
    """The first model a server names. Raises SystemExit where it names none."""
    request = urllib.request.Request(f"{base_url.rstrip('/')}/v1/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise SystemExit(
            f"{base_url} names no model ({error}); say which with --served-model-name"
        ) from None


def _or_inf(rate: float) -> float | str:
    """JSON knows no infinity."""
    return rate if math.isfinite(rate) else "inf"


def _save(args: argparse.Namespace, row: report.Row) -> None:
    name = args.result_filename or (
        f"{row['backend']}-{row['request_rate']}qps-concurrency{row['max_concurrency']}-{row['date']}.json"
    )
    path = Path(args.result_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row) + "\n")
    report.say(f"  saved {path}")


def _line(row: report.Row, percentile: float) -> report.Row:
    """What the table shows of a run."""
    return {
        "in flight": row["max_concurrency"] or "all",
        "done": f"{row['completed']}/{row['num_prompts']}",
        "tokens/s": row["output_throughput"],
        "ttft ms": row["mean_ttft_ms"],
        f"p{percentile:g}": row.get(f"p{percentile:g}_ttft_ms", ""),
        "tpot ms": row["mean_tpot_ms"],
        "itl ms": row["mean_itl_ms"],
        f"p{percentile:g} itl": row.get(f"p{percentile:g}_itl_ms", ""),
        "accepted": row.get("spec_decode_acceptance_length", 1.0) - 1,
        "client µs": row["client_us_per_chunk"],
    }


def _parser() -> argparse.ArgumentParser:
    made = report.parser(__doc__)
    made.set_defaults(model=None)
    made.add_argument("--base-url", help="The server; one of our own is started if not given.")
    made.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    made.add_argument("--endpoint", default="/v1/completions")
    made.add_argument("--served-model-name", help="The first one the server names if not given.")
    made.add_argument("--tokenizer", help="A folder, hub id or `embedded`; --model if not given.")
    made.add_argument(
        "--dataset-name", choices=("held-out", "random", "sharegpt", "mix"), default="held-out"
    )
    made.add_argument("--dataset-path", metavar="FILE.json", help="For sharegpt.")
    made.add_argument("--sharegpt-output-len", type=int, help="Instead of the answers' lengths.")
    made.add_argument("--num-prompts", type=int, default=128)
    made.add_argument("--num-warmups", type=int, default=8, help="Sent before, not counted.")
    made.add_argument("--random-input-len", "--input-len", type=int, default=128)
    made.add_argument("--random-output-len", "--output-len", type=int, default=128)
    made.add_argument("--request-rate", type=float, default=math.inf, help="Requests per second.")
    made.add_argument("--burstiness", type=float, default=1.0, help="1 is a Poisson process.")
    made.add_argument(
        "--max-concurrency", type=int, nargs="+", default=[None], help="Several: a run for each."
    )
    made.add_argument("--percentile-metrics", type=_metric_names, default=LATENCIES)
    made.add_argument("--metric-percentiles", type=_numbers, default=[50.0, 99.0])
    made.add_argument("--goodput", type=_goodput, nargs="+", metavar="ttft:MS", default=[])
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument("--ignore-eos", action="store_true")
    made.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON")
    made.add_argument("--save-result", action="store_true", help="As vllm bench serve does.")
    made.add_argument("--save-detailed", action="store_true", help="Every request in it too.")
    made.add_argument("--result-dir", default=".")
    made.add_argument("--result-filename")
    made.add_argument("--request-timeout", type=float, default=600.0, metavar="SECONDS")
    made.add_argument("--ready-timeout", type=float, default=300.0, metavar="SECONDS")
    made.add_argument("server_args", nargs="*", metavar="-- SERVER_FLAGS")
    return made


def _metric_names(text: str) -> list[str]:
    names = text.split(",")
    bad = next((name for name in names if name not in LATENCIES), None)
    if bad is not None:
        raise argparse.ArgumentTypeError(f"{bad} is none of {', '.join(LATENCIES)}")
    return names


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _goodput(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in ("ttft", "tpot", "e2el"):
        raise argparse.ArgumentTypeError(f"{name} is none of ttft, tpot, e2el")
    return name, float(limit)


if __name__ == "__main__":
    main()

"""Long prompts among short chats: one engine, prompts always read elsewhere, or only where it pays.

    python -m benchmarks.disaggregation [--request-rate 4 6] [--rounds 3]

Every set-up gets the same cores: one engine of two ranks, two engines side by side, or one engine that
reads and one that writes. Each is a server of its own, started in turn, round after round; all get
the same requests at the same moments. A request counts as good if its first token and the pace of
the others were within the limits: by default about twice what one idle rank here needs for the
longest prompt and for a token. Rows also have goodput at half and at twice those limits.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence

import uvloop

from benchmarks import report, servers
from benchmarks.client import Client
from benchmarks.serve import Ask, Form, Mix, Pace, Run, load, mixed_asks, summary
from paceline.runtime.models.weights import find_model
from paceline.runtime.tokenizer import Tokenizer

SETUPS: dict[str, tuple[str, ...]] = {
    "one engine": ("--tensor-parallel-size", "2"),
    "two engines": ("--decode-replicas", "2", "--routing-policy", "local"),
    "always": ("--prefill-replicas", "1", "--routing-policy", "always"),
    "conditional": ("--prefill-replicas", "1", "--routing-policy", "conditional"),
}
"""Flags of each, beside those of all."""
SCALES = (0.5, 1.0, 2.0)
"""Of the limits."""
EXPECTED = {
    "conditional_goodput_over_one_engine": (">=", 1.0),
    "conditional_goodput_over_always": (">=", 1.0),
    "conditional_itl_p99_over_one_engine": ("<=", 1.0),
    "conditional_itl_p99_over_always": ("<=", 1.0),
}


def main() -> None:
    args = _parser().parse_args()
    if args.quick:
        args.rounds, args.num_prompts, args.request_rate = 1, 40, args.request_rate[:1]
        args.setups = [name for name in args.setups if name != "two engines"]
    tokenizer = Tokenizer(find_model(args.model))
    mix = Mix(long_share=args.long_share, long_input_len=args.long_input_len)
    limits = {"ttft": args.ttft_ms, "tpot": args.tpot_ms}
    made = report.Report(
        name="disaggregation", settings=vars(args) | {"setups": args.setups}, expected=EXPECTED
    )
    for number in range(args.rounds):
        # every other round the other way round: what comes first finds a cooler machine
        names = args.setups if number % 2 == 0 else args.setups[::-1]
        for name in names:
            made.rows += _rounds(args, name, tokenizer, mix, limits, number)
    _compare(made, args.request_rate)
    made.notes["goodput by limits' scale"] = {
        f"{name} at {rate:g}/s": [
            round(_median(made.rows, rate, name, f"goodput_at_{scale:g}"), 3) for scale in SCALES
        ]
        for rate in args.request_rate
        for name in args.setups
    }
    table = [_line(made.rows, rate, name) for rate in args.request_rate for name in args.setups]
    made.print(list(table[0]), table)
    made.write(args.output)


def _rounds(
    args: argparse.Namespace,
    name: str,
    tokenizer: Tokenizer,
    mix: Mix,
    limits: dict[str, float],
    number: int,
) -> list[report.Row]:
    """One set-up at every request rate."""
    flags = ["--model", args.model, "--distributed-executor-backend", args.backend, *SETUPS[name]]
    if args.speculative_model != "none":
        flags += ["--speculative-config", json.dumps({"model": args.speculative_model})]
    report.say(f"round {number + 1}: {name}")
    rows = []
    command = servers.paceline_command(*flags)
    with servers.serving(command, ready=servers.ready_line, deadline_s=300.0) as url:
        uvloop.run(_run(args, url, mixed_asks(tokenizer, mix, count=24, seed=1), rate=8.0))
        for rate in args.request_rate:
            # no prompt twice, so that no run finds the prefixes of another
            seed = 100 + len(args.request_rate) * number + args.request_rate.index(rate)
            asks = mixed_asks(tokenizer, mix, count=args.num_prompts, seed=seed)
            run = uvloop.run(_run(args, url, asks, rate=rate))
            figures = summary(run, goodput_ms=limits, percentiles=(50.0, 99.0))
            for scale in SCALES:
                scaled = {key: scale * limit for key, limit in limits.items()}
                good = summary(run, goodput_ms=scaled)["request_goodput"]
                figures[f"goodput_at_{scale:g}"] = good
            rows.append({"setup": name, "round": number, "rate": rate, **figures})
    return rows


async def _run(args: argparse.Namespace, url: str, asks: Sequence[Ask], *, rate: float) -> Run:
    client = Client(url, api_key=None, timeout_s=300.0)
    form = Form(model=args.model, ignore_eos=True)
    try:
        return await load(client, form, asks, Pace(request_rate=rate, seed=7))
    finally:
        client.close()


def _compare(made: report.Report, rates: Sequence[float]) -> None:
    """Ratios of medians over rounds, the worst over all rates."""
    names = {row["setup"] for row in made.rows}
    for other in ("one engine", "two engines", "always"):
        if other not in names or "conditional" not in names:
            continue
        goodput = [
            _median(made.rows, rate, "conditional", "request_goodput")
            / max(1e-9, _median(made.rows, rate, other, "request_goodput"))
            for rate in rates
        ]
        itl = [
            _median(made.rows, rate, "conditional", "p99_itl_ms")
            / _median(made.rows, rate, other, "p99_itl_ms")
            for rate in rates
        ]
        key = other.replace(" ", "_")
        made.ratios[f"conditional_goodput_over_{key}"] = min(goodput)
        made.ratios[f"conditional_itl_p99_over_{key}"] = max(itl)


def _median(rows: Sequence[report.Row], rate: float, name: str, key: str) -> float:
    return statistics.median(
        row[key] for row in rows if (row["setup"], row["rate"]) == (name, rate)
    )


def _line(rows: Sequence[report.Row], rate: float, name: str) -> report.Row:
    def median(key: str) -> float:
        return _median(rows, rate, name, key)

    return {
        "set-up": name,
        "requests/s": rate,
        "goodput/s": median("request_goodput"),
        "ttft ms": median("median_ttft_ms"),
        "ttft p99": median("p99_ttft_ms"),
        "itl ms": median("median_itl_ms"),
        "itl p99": median("p99_itl_ms"),
        "tpot p99": median("p99_tpot_ms"),
        "tokens/s": median("output_throughput"),
        "failed": median("failed"),
    }


def _parser() -> argparse.ArgumentParser:
    made = report.parser(__doc__)
    made.set_defaults(speculative_model="none")
    made.add_argument("--request-rate", type=float, nargs="+", default=[4.0, 6.0])
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--num-prompts", type=int, default=100)
    made.add_argument("--long-share", type=float, default=0.15)
    made.add_argument("--long-input-len", type=int, default=1400)
    made.add_argument("--ttft-ms", type=float, default=2000.0, help="Limit of a good request.")
    made.add_argument("--tpot-ms", type=float, default=10.0, help="Likewise, for the others.")
    made.add_argument("--setups", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    made.add_argument("--backend", choices=("mp", "ray"), default="mp")
    return made


if __name__ == "__main__":
    main()

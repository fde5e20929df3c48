"""The schedules side by side on two ranks: tokens per second at batch 1, 8 and 32, and a time line of each.

    lockstep      both ranks draft, then verify          drafter on both ranks, or on the first
    interleaved   half of the requests draft while the other half is verified
    adaptive      whichever of these the controller finds best
    ahead         the target on one rank, the drafter on the other

Every setting writes the same texts. `best_schedule_over_lockstep` is the best of all over the better lockstep, each at
its median over the rounds, at the batch that its name ends with.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import prompts, report, timeline
from paceline.runtime.config import make_config
from paceline.runtime.engine import Engine
from paceline.runtime.local import local_engine
from paceline.runtime.models.weights import find_model
from paceline.runtime.preflight import examine
from paceline.runtime.tokenizer import Tokenizer
from paceline.runtime.types import EngineStatus, Request, SamplingParams, StepStats

BATCHES = (1, 8, 32)
EXPECTED = {"best_schedule_over_lockstep_1": (">=", 1.2)}
SETTINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "lockstep": {},
    "lockstep, drafter on one rank": {"draft_tensor_parallel_size": 1},
    "interleaved": {"schedule": "interleaved"},
    "adaptive": {"schedule": "adaptive"},
    "ahead": {"schedule": "ahead"},
}
LOCKSTEP = ("lockstep", "lockstep, drafter on one rank")
SHOWN_MS = 40.0
"""Of a time line."""


def start(args: argparse.Namespace, spec: dict[str, Any] | None, **engine: Any) -> Engine:
    """Two ranks, each with a core; the target has one of them where the drafter is ahead. `engine`
    goes before that."""
    ahead = spec is not None and spec.get("schedule") == "ahead"
    settings: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "device": "cpu",
        "kv_cache_memory": "256MiB",
        "tensor_parallel_size": 1 if ahead else 2,
        "cpu_threads": 1,
        "distributed_executor_backend": "mp",
        "enable_prefix_caching": False,
        **engine,
    }
    if spec is not None:
        settings["speculative_config"] = {
            "model": args.speculative_model,
            "num_speculative_tokens": args.num_speculative_tokens,
            **spec,
        }
    config = make_config(settings)
    return local_engine(config, examine(config))


def write(
    engine: Engine, texts: list[list[int]], args: argparse.Namespace
) -> tuple[report.Row, EngineStatus]:
    """Continue all of them at once. Tokens per second count from the moment when all are read."""
    params = SamplingParams(temperature=args.temperature, ignore_eos=True)
    engine.status()
    engine.submit(
        [
            Request(
                request_id=f"{index}",
                prompt_token_ids=tuple(token_ids),
                params=params,
                seed=index,
                max_tokens=args.max_tokens,
            )
            for index, token_ids in enumerate(texts)
        ]
    )
    written: dict[str, list[int]] = {}
    left, began_s, first = len(texts), 0.0, 0
    while left:
        for delta in engine.poll():
            written.setdefault(delta.request_id, []).extend(delta.token_ids)
            left -= delta.finish_reason is not None
        if began_s == 0.0 and len(written) == len(texts):
            began_s, first = time.perf_counter(), sum(map(len, written.values()))
    seconds = time.perf_counter() - began_s
    status = engine.status()
    row = {
        "tokens/s": (sum(map(len, written.values())) - first) / seconds,
        "seconds": seconds,
        "drafted": status.drafted,
        "accepted": status.accepted,
        "way": next((way.name for way in status.ways if way.chosen), ""),
        "token_ids": [written[f"{index}"] for index in range(len(texts))],
    }
    return row, status


def spans(status: EngineStatus) -> list[dict[str, Any]]:
    """The last `SHOWN_MS` of a time line, for `timeline.draw`."""
    rows = [row for step in status.steps for row in _spans_of(step)]
    if not rows:
        return []
    end_ms = max(row["end_ms"] for row in rows) - 5.0
    begin_ms = end_ms - SHOWN_MS
    return [
        {**row, "start_ms": row["start_ms"] - begin_ms, "end_ms": row["end_ms"] - begin_ms}
        for row in rows
        if begin_ms <= row["start_ms"] and row["end_ms"] <= end_ms
    ]


def _spans_of(step: StepStats) -> list[dict[str, Any]]:
    """Of one step. Ranks that share a model run in lockstep, so the first speaks for all."""
    spans = [("0", "verify", step.verify_span)]
    if step.draft_passes:
        spans += [("1", "draft", each.span) for each in step.draft_passes]
    else:
        spans.append(("0", "draft", step.draft_span))
    return [
        {"rank": rank, "stage": stage, "start_ms": span[0], "end_ms": span[1], "group": ""}
        for rank, stage, span in spans
        if span is not None
    ]


def main() -> None:
    flags = parser(__doc__, texts=4)
    flags.add_argument("--rounds", type=int, default=3)
    args = flags.parse_args()
    if args.quick:
        args.rounds, args.max_tokens = 1, min(args.max_tokens, 32)
    tokenizer = Tokenizer(find_model(args.model))
    count = (1 + args.texts) * max(BATCHES)
    texts = prompts.held_out(tokenizer, count=count, length=args.prompt_length, seed=0)
    made = report.Report(name="pipeline", settings=dict(vars(args)), expected=dict(EXPECTED))
    lines: dict[str, list[dict[str, Any]]] = {}
    known: dict[tuple[int, int], list[list[int]]] = {}
    for number in range(args.rounds):
        for name, spec in SETTINGS.items():
            engine = start(args, spec)
            try:
                for batch in BATCHES:
                    write(engine, texts[:batch], args)  # whatever is built or learnt first
                    for index in range(1, 1 + args.texts):
                        given = texts[index * batch : (index + 1) * batch]
                        row, status = write(engine, given, args)
                        mine = known.setdefault((batch, index), row["token_ids"])
                        row["same texts"] = sum(
                            a == b for a, b in zip(mine, row["token_ids"], strict=True)
                        )
                        del row["token_ids"]
                        if batch == 1 and name not in ("plain", LOCKSTEP[1]):
                            lines[name] = spans(status)
                        made.rows.append(
                            {"setting": name, "batch": batch, "round": number, "text": index, **row}
                        )
            finally:
                engine.close()
        report.say(f"  round {number + 1}/{args.rounds}")
    table = _table(made.rows)
    made.ratios = _ratios(table)
    made.print(list(table[0]), table)
    shown = made.notes["timelines"] = {name: rows for name, rows in lines.items() if rows}
    made.write(args.output)
    if args.output and shown:
        figure = timeline.draw(
            shown, title="Batch 1, embedded pair, two ranks: the last 40 ms", until_ms=SHOWN_MS
        )
        figure.savefig(Path(args.output).with_suffix(".png"), dpi=110)


def _table(rows: list[report.Row]) -> list[report.Row]:
    found = []
    for name in SETTINGS:
        line: report.Row = {"setting": name}
        for batch in BATCHES:
            mine = [row for row in rows if (row["setting"], row["batch"]) == (name, batch)]
            line[f"tokens/s, batch {batch}"] = statistics.median(row["tokens/s"] for row in mine)
            line[f"same texts {batch}"] = sum(row["same texts"] for row in mine) / (
                batch * len(mine)
            )
        found.append(line)
    return found


def _ratios(table: list[report.Row]) -> dict[str, float]:
    ratios = {}
    for batch in BATCHES:
        speeds = {row["setting"]: row[f"tokens/s, batch {batch}"] for row in table}
        lockstep = max(speeds[name] for name in LOCKSTEP)
        ratios[f"best_schedule_over_lockstep_{batch}"] = max(speeds.values()) / lockstep
        for name in ("interleaved", "adaptive", "ahead"):
            ratios[f"{name}_over_lockstep_{batch}"] = speeds[name] / lockstep
    return ratios


def parser(doc: str | None, *, texts: int) -> argparse.ArgumentParser:
    """The flags of benchmarks that continue batches of texts."""
    made = report.parser(doc)
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument("--num-speculative-tokens", type=int, default=5)
    made.add_argument("--prompt-length", type=int, default=128)
    made.add_argument("--max-tokens", type=int, default=128)
    made.add_argument("--texts", type=int, default=texts, help="Batches of texts, each once.")
    return made


if __name__ == "__main__":
    main()

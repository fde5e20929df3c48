"""What planning the next step before the last is answered saves, and what it costs where no core is left for it.

    a core left      one rank with one thread, in a process of its own, beside the engine's
    no core left     two ranks, which take both cores and add up over processes

Either with `--async-scheduling` and without, plain and drafting in lockstep; both engines are up at once and take
turns, text by text, so that what else the machine does falls on both. `gap` is the time between the end of a step
and the start of the next, as the ranks saw it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

from benchmarks import pipeline, prompts, report
from paceline.runtime.engine import Engine
from paceline.runtime.models.weights import find_model
from paceline.runtime.tokenizer import Tokenizer
from paceline.runtime.types import EngineStatus

PLACES = {"a core left": 1, "no core left": 2}
"""Ranks, with a thread each, on a machine of two cores."""
EXPECTED = {
    "a core left, plain, batch 1": (">=", 1.0),
    "a core left, drafting, batch 1": (">=", 1.0),
}


def gap_ms(status: EngineStatus) -> float:
    """Median from the end of a step to the start of the next."""
    gaps = []
    for before, after in itertools.pairwise(status.steps):
        begun = [span[0] for span in (after.draft_span, after.verify_span) if span is not None]
        if before.verify_span is not None and begun:
            gaps.append(min(begun) - before.verify_span[1])
    return statistics.median(gaps)


def main() -> None:
    args = pipeline.parser(__doc__, texts=9).parse_args()
    if args.quick:
        args.texts, args.max_tokens = 1, min(args.max_tokens, 32)
    tokenizer = Tokenizer(find_model(args.model))
    count = (1 + args.texts) * max(pipeline.BATCHES)
    texts = prompts.held_out(tokenizer, count=count, length=args.prompt_length, seed=0)
    made = report.Report(name="async_scheduling", settings=dict(vars(args)), expected=EXPECTED)
    for (place, ranks), drafts in itertools.product(PLACES.items(), (False, True)):
        name = f"{place}, {'drafting' if drafts else 'plain'}"
        spec: dict[str, Any] | None = {} if drafts else None
        engines = {
            overlaps: pipeline.start(
                args, spec, tensor_parallel_size=ranks, async_scheduling=overlaps
            )
            for overlaps in (False, True)
        }
        try:
            made.rows += _measured(engines, texts, args, name)
        finally:
            for engine in engines.values():
                engine.close()
        report.say(f"  {name}")
    table = _table(made.rows)
    made.ratios = {f"{row['setting']}, batch {row['batch']}": row["ratio"] for row in table}
    made.print(list(table[0]), table)
    made.write(args.output)


def _measured(
    engines: dict[bool, Engine], texts: list[list[int]], args: argparse.Namespace, name: str
) -> list[report.Row]:
    rows = []
    for batch in pipeline.BATCHES:
        for engine in engines.values():
            pipeline.write(engine, texts[:batch], args)  # whatever is built or learnt first
        for index in range(1, 1 + args.texts):
            given = texts[index * batch : (index + 1) * batch]
            found = []
            # who goes first changes
            for overlaps, engine in sorted(engines.items(), reverse=bool(index % 2)):
                row, status = pipeline.write(engine, given, args)
                found.append(row.pop("token_ids"))
                rows.append(
                    {
                        "setting": name,
                        "batch": batch,
                        "text": index,
                        "async": overlaps,
                        "gap_ms": gap_ms(status),
                        **row,
                    }
                )
            for row in rows[-2:]:
                row["same texts"] = sum(a == b for a, b in zip(*found, strict=True)) / batch
    return rows


def _table(rows: list[report.Row]) -> list[report.Row]:
    """Medians over the texts; the ratio is that of each pair, then the median."""
    found = []
    for name, batch in dict.fromkeys((row["setting"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["setting"], row["batch"]) == (name, batch)]
        off, on = ([row for row in mine if row["async"] == overlaps] for overlaps in (False, True))
        found.append(
            {
                "setting": name,
                "batch": batch,
                "tokens/s": statistics.median(row["tokens/s"] for row in off),
                "async": statistics.median(row["tokens/s"] for row in on),
                "ratio": statistics.median(
                    b["tokens/s"] / a["tokens/s"] for a, b in zip(off, on, strict=True)
                ),
                "gap, ms": statistics.median(row["gap_ms"] for row in off),
                "async gap, ms": statistics.median(row["gap_ms"] for row in on),
                "same texts": statistics.fmean(row["same texts"] for row in on),
            }
        )
    return found


if __name__ == "__main__":
    main()

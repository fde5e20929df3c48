"""Cost of deciding: microseconds of schedule and update, by requests that run and that wait.

There are no ranks: their answers are made up between the two calls, untimed. What is timed is all
that the scheduler does for a step in which every running request writes its text, in time of the
processor, so that what else the machine does is left out.
"""

from __future__ import annotations

import gc
import random
import time
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from paceline.runtime.schedule.scheduler import Limits, Scheduler, Speculation
from paceline.runtime.types import (
    Request,
    RequestResult,
    SamplingParams,
    StageTimes,
    StepPlan,
    StepResult,
)

EXPECTED = {
    "waiting_10000_over_10": ("<=", 1.2),
    "us_per_request_plain": ("<=", 5.0),
    "us_per_request_fixed": ("<=", 10.0),
    "us_per_request_adaptive": ("<=", 10.0),
}
RUNNING = (1, 4, 16, 64, 256)
WAITING = (10, 100, 1000, 10_000)
DRAFTS = {
    "plain": None,
    "fixed": Speculation(num_tokens=5),
    "adaptive": Speculation(num_tokens=5, adaptive=True),
    "ngram": Speculation(num_tokens=5, method="ngram"),
}
MAX_TOKENS = 8000
PROMPT_TOKENS = 64


class Engine:
    """A scheduler with so many requests running and waiting, and answers for its plans."""

    def __init__(self, *, drafts: str, running: int, waiting: int) -> None:
        limits = Limits(
            num_blocks=running * (MAX_TOKENS + PROMPT_TOKENS) // 16 + running,
            max_model_len=MAX_TOKENS + PROMPT_TOKENS,
            max_num_batched_tokens=8192,
            max_num_seqs=running,
        )
        # the steps are said to take 35 ms, whatever the benchmark takes
        moments = count()
        self.scheduler = Scheduler(
            limits, speculation=DRAFTS[drafts], clock=lambda: next(moments) * 0.035
        )
        self.rng = random.Random(0)
        for index in range(running + waiting):
            self.scheduler.add(self.request(f"{index}"))
        while self.scheduler.status().num_running < running:
            self.step()
        for _ in range(20):
            self.step()

    def request(self, name: str) -> Request:
        return Request(
            request_id=name,
            prompt_token_ids=tuple(self.rng.randrange(4096) for _ in range(PROMPT_TOKENS)),
            params=SamplingParams(ignore_eos=True),
            seed=0,
            max_tokens=MAX_TOKENS,
        )

    def step(self) -> float:
        """Microseconds of one step."""
        start = time.process_time()
        plan = self.scheduler.schedule()
        planned = time.process_time()
        result = self.answer(plan)
        answered = time.process_time()
        self.scheduler.update(plan, result)
        return (planned - start + time.process_time() - answered) * 1e6

    def answer(self, plan: StepPlan) -> StepResult:
        """What ranks would say that keep three drafts of four."""
        results = []
        for each in plan.scheduled:
            kept = 0
            while kept < each.num_draft_tokens and self.rng.random() < 0.75:
                kept += 1
            results.append(
                RequestResult(
                    request_id=each.request_id,
                    token_ids=tuple([self.rng.randrange(64) for _ in range(kept + 1)]),
                    num_drafted=each.num_draft_tokens,
                    num_accepted=kept,
                )
            )
        times = StageTimes(calibrate_ms=1.0, draft_ms=3.0, verify_ms=30.0)
        return StepResult(step=plan.step, results=tuple(results), times=times, num_rows=1)


def measure(made: report.Report, *, drafts: str, running: int, waiting: int, steps: int) -> None:
    engine = Engine(drafts=drafts, running=running, waiting=waiting)
    # a collection of the whole heap, which the queue fills, is not the scheduler's
    gc.collect()
    gc.freeze()
    for run in range(3):
        took = [engine.step() for _ in range(steps)]
        made.rows.append(
            {
                "drafts": drafts,
                "running": running,
                "waiting": waiting,
                "run": run,
                "median_us": median(took),
                "mean_us": sum(took) / steps,
                "p99_us": sorted(took)[int(0.99 * steps)],
            }
        )
    gc.unfreeze()
    report.say(f"  {drafts}, {running} run, {waiting} wait: {made.rows[-1]['median_us']:.0f} us")


def best(made: report.Report, drafts: str, running: int, waiting: int) -> float:
    """The least disturbed run's median."""
    return min(
        float(row["median_us"])
        for row in made.rows
        if (row["drafts"], row["running"], row["waiting"]) == (drafts, running, waiting)
    )


def draw(made: report.Report, path: Path) -> None:
    """Left: by running requests. Right: by waiting ones, 64 running."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for drafts in DRAFTS:
        left.plot(
            RUNNING,
            [best(made, drafts, running, 10) / running for running in RUNNING],
            marker="o",
            label=drafts,
        )
    left.set_xscale("log", base=2)
    left.set_yscale("log", base=2)
    left.set_xticks(RUNNING, [str(running) for running in RUNNING])
    left.set_yticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
    left.axhline(5.0, color="grey", linestyle=":", linewidth=1)
    left.axhline(10.0, color="grey", linestyle="--", linewidth=1)
    left.set_xlabel("running requests (dotted: 5, dashed: 10)")
    left.set_ylabel("µs per running request and step")
    left.legend()
    for drafts in ("plain", "adaptive"):
        right.plot(
            WAITING,
            [best(made, drafts, 64, waiting) for waiting in WAITING],
            marker="o",
            label=drafts,
        )
    right.set_xscale("log")
    right.set_ylim(bottom=0)
    right.set_xlabel("waiting requests, 64 running")
    right.set_ylabel("µs per step")
    right.legend()
    hardware = report.hardware()
    figure.suptitle(f"scheduler: {hardware['cpu']}, Python {hardware['python']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    args = report.parser(__doc__).parse_args()
    made = report.Report(name="scheduler", settings=vars(args), expected=EXPECTED)
    steps = 100 if args.quick else 400
    for drafts in DRAFTS:
        for running in RUNNING:
            measure(made, drafts=drafts, running=running, waiting=10, steps=steps)
    for drafts in ("plain", "adaptive"):
        for waiting in WAITING[1:]:
            measure(made, drafts=drafts, running=64, waiting=waiting, steps=steps)
    made.ratios["waiting_10000_over_10"] = max(
        best(made, drafts, 64, 10_000) / best(made, drafts, 64, 10)
        for drafts in ("plain", "adaptive")
    )
    for drafts in DRAFTS:
        made.ratios[f"us_per_request_{drafts}"] = best(made, drafts, 256, 10) / 256
    table: list[dict[str, Any]] = []
    for drafts in DRAFTS:
        for running in RUNNING:
            step_us = best(made, drafts, running, 10)
            table.append(
                {
                    "drafts": drafts,
                    "running": running,
                    "us per step": step_us,
                    "us per request": step_us / running,
                }
            )
    made.print(list(table[0]), table)
    made.write(args.output)
    if args.output is not None:
        draw(made, Path(args.output).with_suffix(".png"))


if __name__ == "__main__":
    main()

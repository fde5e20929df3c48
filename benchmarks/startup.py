"""Time from the command to the first token: a new process, a new local Ray, the embedded pair, a warm disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from statistics import median

from benchmarks import report

EXPECTED = {"seconds_to_first_token": ("<=", 10.0)}
PROMPT = "def read(path):\n"


def first_token_s(backend: str) -> float:
    """Start `paceline generate` and watch for the first byte of text it writes."""
    command = [sys.executable, "-m", "paceline", "generate", PROMPT, "--max-tokens", "4"]
    command += ["--distributed-executor-backend", backend]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        elapsed = time.perf_counter() - start
        process.stdout.read()
    if process.returncode != 0:
        raise SystemExit(f"the command ended with exit code {process.returncode}")
    return elapsed


def main() -> None:
    args = report.parser(__doc__).parse_args()
    made = report.Report(name="startup", settings=vars(args), expected=EXPECTED)
    for backend in ("ray", "mp"):
        for run in range(3 if args.quick else 6):
            seconds = first_token_s(backend)
            report.say(f"  {backend}: {seconds:.2f} s")
            if run > 0:  # the first run warms the disk
                made.rows.append({"backend": backend, "run": run, "seconds": seconds})
    table = []
    for backend in ("ray", "mp"):
        seconds = [row["seconds"] for row in made.rows if row["backend"] == backend]
        table.append(
            {
                "backend": backend,
                "runs": len(seconds),
                "least s": min(seconds),
                "median s": median(seconds),
                "most s": max(seconds),
            }
        )
    made.ratios["seconds_to_first_token"] = float(table[0]["median s"])
    made.print(list(table[0]), table)
    made.write(args.output)


if __name__ == "__main__":
    main()

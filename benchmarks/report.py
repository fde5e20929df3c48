"""The one form of all benchmarks: hardware, commit, settings, raw rows, ratios, what was expected.

    python -m benchmarks.NAME [--quick] [--output FILE.json]

Both sides of a ratio are measured in the same run. A benchmark exits 0 whenever it could measure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass
class Report:
    """Filled while measuring, written once at the end."""

    name: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    """Every run, raw."""
    ratios: dict[str, float] = field(default_factory=dict)
    expected: dict[str, tuple[str, float]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    """Measurements that explain the ratios."""

    def write(self, path: str | None) -> None:
        if path is None:
            return
        body = {
            "benchmark": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "commit": commit(),
            "settings": self.settings,
            "rows": self.rows,
            "ratios": self.ratios,
            "expected": self.expected,
            "notes": self.notes,
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(body, indent=1) + "\n")

    def print(self, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """The table, then every ratio beside what was expected of it."""
        from rich.console import Console
        from rich.table import Table

        console = Console(width=max(120, Console().width))
        table = Table(title=self.name, title_justify="left")
        for column in columns:
            table.add_column(
                column, justify="left" if isinstance(rows[0][column], str) else "right"
            )
        for row in rows:
            table.add_row(*(_cell(row[column]) for column in columns))
        console.print(table)
        for name, value in self.ratios.items():
            sign, bound = self.expected.get(name, ("", 0.0))
            wish = f"   expected {sign} {bound:g}" if sign else ""
            console.print(f"{name:48} {value:8.3f}{wish}", highlight=False)
        for name, value in self.notes.items():
            console.print(f"{name}: {json.dumps(value)}", highlight=False)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags every benchmark has."""
    first = (doc or "").strip().splitlines()[0]
    made = argparse.ArgumentParser(description=first)
    made.add_argument("--quick", action="store_true", help="End within a minute.")
    made.add_argument("--output", metavar="FILE.json")
    made.add_argument("--model", default="embedded")
    made.add_argument("--speculative-model", default="embedded/drafter")
    made.add_argument("--prompts-file", metavar="F.jsonl", help="Instead of the held-out prompts.")
    return made


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "avx512_bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def commit() -> str:
    """The commit, marked if the tree differs from it."""
    root = Path(__file__).parent.parent
    run = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)

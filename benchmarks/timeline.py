"""Draw who does what when: `python -m benchmarks.timeline FILE.json` writes FILE.png beside it.

    paceline plan ... --json | python -m benchmarks.timeline - --output FILE.png

The JSON has `timelines`, at the top or under `notes`: {title: [{rank, stage, start_ms, end_ms, group}, ...]}. Each is a
panel, all on one scale, and each rank a lane; where target and drafter share it, the upper half is the target's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLOURS = {"verify": "#4878cf", "calibrate": "#d65f5f", "draft": "#ee9f4a"}
"""Of stages; told apart by their lightness too."""
NAMES = {
    "verify": "target: verify",
    "calibrate": "drafter: exact pass",
    "draft": "drafter: further passes",
}
OTHER, HATCH = "#888888", "////"
PAPER, INK = "#ffffff", "#333333"
"""The picture has a background of its own, so that it reads the same on a dark page."""
_LANE, _GAP, _LANE_INCHES = 0.9, 0.04, 0.17

Row = Mapping[str, Any]


def draw(
    timelines: Mapping[str, Sequence[Row]], *, title: str, until_ms: float | None = None
) -> Figure:
    """One panel for each time line, as long as the shortest unless `until_ms` says otherwise."""
    panels = {name: rows for name, rows in timelines.items() if rows}
    lanes = [len({row["rank"] for row in rows}) for rows in panels.values()]
    height = 1.3 + sum(0.45 + _LANE_INCHES * count for count in lanes)
    figure: Figure
    figure, axes = plt.subplots(
        len(panels),
        figsize=(11, height),
        height_ratios=[2 + count for count in lanes],
        sharex=True,
        squeeze=False,
        facecolor=PAPER,
    )
    end_ms = until_ms or min(max(row["end_ms"] for row in rows) for rows in panels.values())
    for panel, (name, rows) in zip(axes[:, 0], panels.items(), strict=True):
        shown = [row for row in rows if row["start_ms"] < end_ms]
        _draw_panel(panel, shown, end_ms=end_ms)
        panel.set_title(name, loc="left", fontsize=10, color=INK, pad=4)
    axes[-1, 0].set_xlabel("ms", color=INK)
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left", y=1 - 0.12 / height, va="top")
    _add_legend(figure, panels, y=1 - 0.35 / height)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / height))
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Row], *, end_ms: float) -> None:
    ranks = sorted({row["rank"] for row in rows})
    verifying = {row["rank"] for row in rows if row["stage"] == "verify"}
    is_shared = any(row["rank"] in verifying for row in rows if row["stage"] != "verify")
    height = (_LANE - _GAP) / 2 if is_shared else _LANE
    for row in rows:
        top = ranks.index(row["rank"]) - _LANE / 2
        if is_shared and row["stage"] != "verify":
            top += height + _GAP
        axes.broken_barh(
            [(row["start_ms"], min(row["end_ms"], end_ms) - row["start_ms"])],
            (top, height),
            facecolor=COLOURS.get(row["stage"], OTHER),
            hatch=HATCH if row["group"] else None,
            edgecolor=PAPER,
            linewidth=0.6,
        )
    axes.set_facecolor(PAPER)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_xlim(0, end_ms)
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks], fontsize=7)
    axes.set_ylabel("rank", color=INK, fontsize=8)
    axes.tick_params(colors=INK, length=2, labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INK)


def _add_legend(figure: Figure, panels: Mapping[str, Sequence[Row]], *, y: float) -> None:
    rows = [row for each in panels.values() for row in each]
    stages = {row["stage"] for row in rows}
    handles = [
        Patch(facecolor=COLOURS[name], label=NAMES[name]) for name in COLOURS if name in stages
    ]
    if unknown := sorted(stages - set(COLOURS)):
        handles.append(Patch(facecolor=OTHER, label=", ".join(unknown)))
    if any(row["group"] for row in rows):
        label = "second half of the batch"
        handles.append(Patch(facecolor="#bbbbbb", hatch=HATCH, edgecolor=PAPER, label=label))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, y),
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
    )


def timelines_of(data: Mapping[str, Any]) -> Mapping[str, Sequence[Row]]:
    """Of a benchmark's or a plan's JSON. Raises SystemExit where there are none."""
    found: Mapping[str, Sequence[Row]] = data.get("timelines") or data.get("notes", {}).get(
        "timelines", {}
    )
    if not any(found.values()):
        raise SystemExit("no time lines in this file")
    return found


def _title(data: Mapping[str, Any]) -> str:
    """What it is of: a plan's question, or a benchmark's name, hardware and commit."""
    if "question" not in data:
        return f"{data['benchmark']}: {data['hardware']['cpu']}, {data['commit']}"
    asked = data["question"]
    setting = asked["setting"]
    return (
        f"Simulated: {asked['model']} with {asked['speculative_model']} on {asked['num_gpus']} x "
        f"{setting['machine']['gpu']['name']}, batch {setting['batch']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw who does what when.")
    parser.add_argument("file", help="JSON with time lines; -: from standard input.")
    parser.add_argument("--output", type=Path, metavar="FILE.png")
    parser.add_argument("--until", type=float, metavar="MS", help="Draw so much of each.")
    args = parser.parse_args()
    if args.file == "-" and args.output is None:
        parser.error("where to? --output FILE.png")
    data = json.loads(sys.stdin.read() if args.file == "-" else Path(args.file).read_text())
    path = args.output or Path(args.file).with_suffix(".png")
    figure = draw(timelines_of(data), title=_title(data), until_ms=args.until)
    figure.savefig(path, dpi=110, facecolor=PAPER)
    print(path)


if __name__ == "__main__":
    main()

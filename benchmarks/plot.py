"""Draw a benchmark's JSON: `python -m benchmarks.plot FILE.json` writes FILE.png beside it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def draw_layer_parallel(data: dict[str, Any], axes: list[Axes]) -> None:
    """Left: drafting speed-up against acceptance kept. Right: tokens per second by N."""
    lines = data["notes"]["table"]
    marks = {("tensor", 2): "o", ("tensor", 1): "s", ("layer", 2): "^"}
    colours = {"attention": "tab:blue", "block": "tab:orange", "-": "black"}
    fills = {"every_round": "full", "on_mismatch": "left", "never": "none", "-": "full"}
    trade, speed = axes
    for line in lines:
        where = (line["placement"], line["draft_ranks"])
        style = {
            "marker": marks[where],
            "color": colours[line["policy"]],
            "fillstyle": fills[line["calibration"]],
            "linestyle": "none",
            "markersize": 8,
        }
        trade.plot(line["accepted vs N=1"], line["drafting speed-up"], **style)
        trade.annotate(
            str(line["N"]),
            (line["accepted vs N=1"], line["drafting speed-up"]),
            textcoords="offset points",
            xytext=(6, 3),
            fontsize=8,
        )
        speed.plot(line["N"] + _shift(line), line["tokens/s"], **style)
    trade.axvline(0.93, color="grey", linestyle="--", linewidth=1)
    trade.axhline(1.3, color="grey", linestyle=":", linewidth=1)
    trade.set_xlabel("accepted tokens per round, relative to N = 1 (dashed: 7 % fewer)")
    trade.set_ylabel("drafting speed-up per round (dotted: 1.3)")
    trade.set_title("numbers are N")
    speed.set_xlabel("N, layers side by side")
    speed.set_ylabel("tokens per second")
    speed.set_xticks(sorted({line["N"] for line in lines}))
    for label, style in _legend(marks, colours, fills):
        speed.plot([], [], label=label, linestyle="none", markersize=7, **style)
    speed.legend(fontsize=8, loc="best")


def _shift(line: dict[str, Any]) -> float:
    """Apart, so that settings of one N do not hide each other."""
    order = {"every_round": -0.1, "on_mismatch": 0.0, "never": 0.1, "-": 0.0}
    return order[line["calibration"]] + (0.04 if line["policy"] == "block" else -0.04)


def _legend(
    marks: dict[tuple[str, int], str], colours: dict[str, str], fills: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    entries: list[tuple[str, dict[str, Any]]] = []
    for (placement, ranks), marker in marks.items():
        entries.append((f"{placement}, {ranks} draft rank(s)", {"marker": marker, "color": "grey"}))
    for policy in ("attention", "block"):
        entries.append((policy, {"marker": "o", "color": colours[policy]}))
    for calibration in ("every_round", "on_mismatch", "never"):
        entries.append(
            (calibration, {"marker": "o", "color": "grey", "fillstyle": fills[calibration]})
        )
    return entries


def draw_bars(data: dict[str, Any], axes: list[Axes]) -> None:
    """Tokens per second of every system, per data type."""
    totals: dict[str, list[float]] = {}
    for row in data["rows"]:
        tokens, seconds = totals.setdefault(f"{row['system']}, {row['dtype']}", [0.0, 0.0])
        totals[f"{row['system']}, {row['dtype']}"] = [
            tokens + row["tokens"],
            seconds + row["seconds"],
        ]
    names = list(totals)
    axes[0].barh(names, [tokens / seconds for tokens, seconds in totals.values()], color="tab:blue")
    axes[0].invert_yaxis()
    axes[0].set_xlabel("tokens per second, prompt included")


def draw_overload(data: dict[str, Any], axes: list[Axes]) -> None:
    """Left: completions per second, all and good ones, by load. Right: what is refused, and the wait for a first
    token."""
    rates, prices = axes
    capacity = data["notes"]["capacity, requests/s"]
    colours = {"raw": "tab:blue", "patient": "tab:orange"}
    later = prices.twinx()
    for clients, colour in colours.items():
        points = [point for point in data["notes"]["points"] if point["clients"] == clients]
        loads = [point["multiple"] for point in points]

        def values(name: str, points: list[dict[str, Any]] = points) -> list[float]:
            return [point[name] for point in points]

        rates.plot(loads, values("goodput"), "o-", color=colour, label=f"{clients}, good")
        rates.plot(loads, values("throughput"), ":", color=colour, label=f"{clients}, all")
        prices.plot(loads, values("refused_share"), "s-", color=colour, label=f"{clients}, refused")
        later.plot(
            loads, values("p99_ttft_s"), "^--", color=colour, label=f"{clients}, first token"
        )
    loads = sorted({point["multiple"] for point in data["notes"]["points"]})
    ideal = [capacity * min(1.0, load) for load in loads]
    rates.plot(loads, ideal, color="grey", linewidth=1, label="asked for, up to capacity")
    settings = data["settings"]
    rates.set_title(
        f"good: first token within {settings['ttft']:g} s, others {1e3 * settings['tpot']:g} ms each"
    )
    rates.set_ylabel("completions per second")
    prices.set_ylabel("share of requests refused with 429 (squares)")
    later.set_ylabel("first token, p99, s (triangles)")
    for each in (rates, prices, later):
        each.set_xlabel("load, in multiples of capacity")
        each.set_ylim(bottom=0)
    rates.legend(loc="lower right")
    lines = [line for each in (prices, later) for line in each.get_lines()]
    prices.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")


def draw_chaos(data: dict[str, Any], axes: list[Axes]) -> None:
    """When what was struck, and how long until all was whole again."""
    strikes = [row for row in data["rows"] if row["row"] == "strike" and row["whole_s"] is not None]
    for kind in dict.fromkeys(row["kind"] for row in strikes):
        dealt = [row for row in strikes if row["kind"] == kind]
        axes[0].plot(
            [row["at_s"] / 60 for row in dealt],
            [row["whole_s"] for row in dealt],
            "o",
            label=f"{kind}, {len(dealt)}",
        )
    axes[0].set_ylim(bottom=0)
    axes[0].set_xlabel("minutes of load")
    axes[0].set_ylabel("seconds until all was whole again")
    axes[0].legend(loc="best")


WIDE = ("layer_parallel", "overload")
"""Drawn as two panels."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a benchmark's JSON.")
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    data = json.loads(path.read_text())
    wide = data["benchmark"] in WIDE
    figure, axes = plt.subplots(1, 2 if wide else 1, figsize=(14 if wide else 9, 6), squeeze=False)
    known = {
        "chaos": draw_chaos,
        "layer_parallel": draw_layer_parallel,
        "overload": draw_overload,
        "speculation": draw_bars,
    }
    draw = known.get(data["benchmark"])
    if draw is None:
        raise SystemExit(f"nothing to draw for {data['benchmark']}")
    draw(data, list(axes[0]))
    hardware = data["hardware"]
    figure.suptitle(
        f"{data['benchmark']}: {hardware['cpu']}, {hardware['cores']} cores, {data['commit']}"
    )
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()

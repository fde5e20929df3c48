"""A picture of a server for a terminal: engines line by line, and how long requests wait.

What does not fit is left out, the least important columns first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from paceline.actors.commands.top_sample import Between, Row

BARS = " ▁▂▃▄▅▆▇█"
BAR_CELLS = 8
STATE_STYLES = {
    "serving": "green",
    "starting": "cyan",
    "restarting": "yellow",
    "draining": "yellow",
    "failed": "bold red",
}
UNKNOWN = Text("·", style="dim")


@dataclass(frozen=True, kw_only=True)
class View:
    """All that a frame shows."""

    url: str
    model: str = ""
    uptime_s: float = 0.0
    num_in_flight: int = 0
    """On the frontend that answered."""
    between: Between | None = None
    """None before the server has been heard of."""
    history: Sequence[float] = ()
    """Tokens written per second, the latest last."""
    trouble: str = ""
    """Why the server cannot be asked just now."""


class _Column(NamedTuple):
    title: str
    width: int
    keep: int
    """Columns with less go first."""
    show: Callable[[Row], Text]
    side: Literal["left", "right"] = "right"


def frame(view: View, *, width: int) -> RenderableType:
    """The picture, at most `width` columns wide."""
    parts: list[RenderableType] = [_head(view, width=width)]
    if view.trouble:
        parts.append(Text(f"{view.trouble}; trying again", style="bold red", overflow="fold"))
    if view.between is not None:
        parts += [Text(), _table(view.between, width=width), Text()]
        parts.append(_waits(view, width=width))
        parts += [
            Text(f"{row.name}: {row.error}", style="red", overflow="fold")
            for row in view.between.rows
            if row.error
        ]
    return Group(*parts)


def _head(view: View, *, width: int) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("paceline", style="bold")
    if view.model:
        text.append(f"  {view.model}", style="bold cyan")
    text.append(f"  {view.url}", style="dim")
    if view.uptime_s:
        text.append(f"  up {duration(view.uptime_s)}", style="dim")
    line = sparkline(view.history, cells=min(30, width - text.cell_len - 11))
    if line:
        text.append(f"  {line}", style="green").append(" tokens/s", style="dim")
    return text


def _table(between: Between, *, width: int) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, show_footer=len(between.rows) > 1)
    for column in _fitting(_columns(between), width):
        table.add_column(
            Text(column.title),
            column.show(between.total),
            justify=column.side,
            no_wrap=True,
            min_width=column.width,
            header_style="bold dim",
            footer_style="bold",
        )
    shown = _fitting(_columns(between), width)
    for row in between.rows:
        table.add_row(*(column.show(row) for column in shown))
    return table


def _columns(between: Between) -> list[_Column]:
    """What there is to tell: nothing of transfers, say, where there are none."""
    rows = (*between.rows, between.total)
    name_cells = max(len(row.name) for row in rows)
    columns = [
        _Column("ENGINE", max(6, name_cells), 100, lambda r: Text(r.name), "left"),
        _Column("ROLE", 7, 40, lambda r: Text(r.role, style="dim"), "left"),
        _Column("STATE", 10, 80, _state, "left"),
        _Column("RUN", 4, 95, lambda r: _count(r.running) if r.known else UNKNOWN),
        _Column("WAIT", 4, 94, lambda r: _count(r.waiting, alarming=True) if r.known else UNKNOWN),
        _Column("KV", BAR_CELLS + 5, 70, _kv),
        _Column("WRITE/s", 7, 90, lambda r: _number(r.written)),
        _Column("READ/s", 7, 65, lambda r: _number(r.read)),
        _Column("ACCEPT", 6, 60, lambda r: _percent(r.acceptance)),
        _Column("PREFIX", 6, 55, lambda r: _percent(r.prefix_hits)),
    ]
    if between.total.transfers or any(row.role == "prefill" for row in between.rows):
        columns.append(_Column("KV IN/s", 8, 50, lambda r: _bytes(r.transfers)))
    for title, keep, pick in _ALARMS:
        if any(pick(row) for row in rows):
            columns.append(_Column(title, len(title), keep, _alarm(pick)))
    return columns


_ALARMS: tuple[tuple[str, int, Callable[[Row], int]], ...] = (
    ("PREEMPTED", 30, lambda row: row.preemptions),
    ("RESTARTS", 75, lambda row: row.restarts),
    ("KV FAILED", 45, lambda row: row.failed_transfers),
)
"""Columns that are there where there is anything in them."""


def _fitting(columns: list[_Column], width: int) -> list[_Column]:
    shown = list(columns)
    while len(shown) > 1 and sum(each.width + 2 for each in shown) - 2 > width:
        shown.remove(min(shown, key=lambda each: each.keep))
    return shown


def _waits(view: View, *, width: int) -> Text:
    between = view.between
    assert between is not None
    parts = [
        f"first token {_seconds(between.first_token)}",
        f"between tokens {_seconds(between.between_tokens)}",
        f"in flight {view.num_in_flight}",
    ]
    if between.queued:
        parts.append(f"waiting for an engine {between.queued}")
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] += f"   {part}"
        else:
            lines.append(part)
    return Text("\n".join(lines))


def _state(row: Row) -> Text:
    return Text(row.state, style=STATE_STYLES.get(row.state, ""))


def _count(number: int, *, alarming: bool = False) -> Text:
    return Text(f"{number:,}", style="yellow" if alarming and number else "")


def _alarm(pick: Callable[[Row], int]) -> Callable[[Row], Text]:
    return lambda row: _count(pick(row), alarming=True)


def _kv(row: Row) -> Text:
    if row.kv_used is None:
        return UNKNOWN
    style = "green" if row.kv_used < 0.7 else "yellow" if row.kv_used < 0.9 else "red"
    full = round(row.kv_used * BAR_CELLS)
    text = Text("━" * full, style=style)
    text.append("─" * (BAR_CELLS - full), style="bright_black")
    return text.append(f"{row.kv_used:5.0%}", style="default")


def _number(value: float | None) -> Text:
    if value is None:
        return UNKNOWN
    return Text(f"{value:,.0f}" if value < 99_999.5 else f"{value / 1e3:,.0f}k")


def _percent(value: float | None) -> Text:
    return UNKNOWN if value is None else Text(f"{value:.0%}")


def _bytes(value: float | None) -> Text:
    if value is None:
        return UNKNOWN
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return Text(f"{value:.0f} {unit}")
        value /= 1e3
    return Text(f"{value:.1f} GB")


def _seconds(pair: tuple[float | None, float | None]) -> str:
    middle, high = pair
    if middle is None or high is None:
        return "·"
    return f"{_short(middle)}, p95 {_short(high)}"


def _short(seconds: float) -> str:
    if seconds < 0.01:
        return f"{1e3 * seconds:.1f} ms"
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def duration(seconds: float) -> str:
    """Days, hours and minutes, or what there is of them."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def sparkline(values: Sequence[float], *, cells: int) -> str:
    """The latest values as a row of bars, the highest of them a full one."""
    shown = list(values)[-cells:] if cells > 0 else []
    most = max(shown, default=0.0)
    if most <= 0:
        return ""
    return "".join(BARS[max(1, round(8 * value / most)) if value > 0 else 0] for value in shown)

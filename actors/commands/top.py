"""Watch a server: its engines, what they write and read, and how long requests wait.

Asks the server as any client may, so it runs anywhere; neither torch nor Ray is loaded.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from dataclasses import replace

import httpx
from rich.console import Console
from rich.live import Live

from paceline.actors.commands import reach
from paceline.actors.commands.top_frame import View, frame
from paceline.actors.commands.top_sample import Sample, between, take
from paceline.runtime.errors import EngineError

NAME = "top"
HISTORY = 120
"""Rates that are remembered for the line of bars."""
ANSWER_S = 5.0
"""How long the server may take to answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default=reach.DEFAULT_URL,
        metavar="URL",
        help=f"The server (default: {reach.DEFAULT_URL}).",
    )
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="S",
        help="Seconds between frames (default: 1).",
    )
    parser.add_argument("--once", action="store_true", help="Print one frame and end.")
    reach.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    with reach.client(args, timeout_s=ANSWER_S) as client:
        watcher = Watcher(client)
        try:
            if args.once:
                return _once(watcher, console, args.interval)
            if not console.is_terminal:
                while True:
                    console.print(frame(watcher.look(), width=console.width))
                    time.sleep(args.interval)
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    live.update(frame(watcher.look(), width=console.width), refresh=True)
                    time.sleep(args.interval)
        except KeyboardInterrupt:
            return 0


def _once(watcher: Watcher, console: Console, interval_s: float) -> int:
    """Two looks, for rates are known between two. 1 if the server cannot be asked."""
    watcher.look()
    time.sleep(interval_s)
    view = watcher.look()
    if view.trouble:
        raise EngineError(view.trouble)
    console.print(frame(view, width=console.width))
    return 0


class Watcher:
    """Asks again and again, and remembers what it heard."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._last: Sample | None = None
        self._history: deque[float] = deque(maxlen=HISTORY)
        self._view = View(url=str(client.base_url).rstrip("/"))

    def look(self) -> View:
        """The server as it is now; where it cannot be asked, as it was, and why. Raises UserError where
        asking again would not help."""
        try:
            sample = take(self._client)
        except (httpx.HTTPError, EngineError) as error:
            why = reach.reason(error) if isinstance(error, httpx.HTTPError) else str(error)
            self._last = None  # rates over the gap would say nothing
            self._view = replace(self._view, trouble=f"cannot ask {self._view.url}: {why}")
            return self._view
        found = between(self._last, sample)
        self._last = sample
        if found.total.written is not None:
            self._history.append(found.total.written)
        self._view = View(
            url=self._view.url,
            model=sample.live.model,
            uptime_s=sample.live.uptime_s,
            num_in_flight=sample.num_in_flight,
            between=found,
            history=tuple(self._history),
        )
        return self._view


def _interval(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"must be 0.1 to 3600 seconds, found {text}")
    return value

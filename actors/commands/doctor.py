"""Find out what is wrong: with this machine and these settings, or with a server that runs.

machine ──> settings ──> Ray ──> a server of these settings: every hop of a request ──> its end
--url:                           the same of a server that runs already

Takes the flags of `serve`. Every check is made whatever became of the others. Exit codes: 0 all is well,
1 a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from paceline.actors.checks.check import Check, Checked, Verdict, failed, make, ok, skipped
from paceline.actors.commands import reach
from paceline.runtime.config import EngineConfig, FleetConfig, ServerConfig
from paceline.runtime.errors import PacelineError

NAME = "doctor"
POSITIONAL: tuple[str, ...] = ()
MARKS: dict[Verdict, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "failed": ("FAILED", "bold red"),
    "skipped": ("skipped", "dim"),
}
NAME_CELLS, MARK_CELLS = 16, 7
PLACED_S = 90.0
BUILT_S = 180.0
"""Compilers take their time, once on a machine."""
ANSWER_S = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", metavar="URL", help="A server that runs, instead of starting one.")
    parser.add_argument("--grpc-url", metavar="URL", help="Its gRPC door, like grpc://HOST:PORT.")
    parser.add_argument(
        "--no-round-trip", action="store_true", help="Do not start a server to try the settings."
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead.")
    reach.add_arguments(parser, api_key=False)


def run(args: argparse.Namespace) -> int:
    made = _of_server(args) if args.url else _of_settings(args)
    console = Console(highlight=False)
    found = list(made) if args.json else list(_shown(made, console))
    num_failed = sum(each.finding.verdict == "failed" for each in found)
    if args.json:
        checks = [
            {"name": each.name, **asdict(each.finding), "seconds": round(each.seconds, 3)}
            for each in found
        ]
        print(json.dumps({"ok": not num_failed, "checks": checks}, indent=2, default=str))
    else:
        console.print(_verdict(found))
    return 1 if num_failed else 0


def _of_server(args: argparse.Namespace) -> Iterator[Checked]:
    from paceline.actors.checks import machine
    from paceline.actors.checks.server import Server

    yield make(Check("packages", machine.packages))
    with reach.client(args, timeout_s=ANSWER_S) as client:
        server = Server(
            client=client,
            grpc_url=args.grpc_url,
            api_key=reach.api_key(args),
            trust=reach.trust(args),
        )
        yield from map(make, server.checks())


def _of_settings(args: argparse.Namespace) -> Iterator[Checked]:
    from paceline.actors.commands.serve import read_settings

    server, settings, config = read_settings(args)
    sound = True
    for check in _checks(server, settings, config):
        each = make(check)
        sound = sound and each.finding.verdict != "failed"
        yield each
    if args.no_round_trip:
        yield Checked("round trip", skipped("--no-round-trip"), 0.0)
    elif not sound:
        yield Checked("round trip", skipped("not before the above is mended"), 0.0)
    else:
        yield from _round_trip(config, settings)


def _checks(server: ServerConfig, settings: FleetConfig, config: EngineConfig) -> list[Check]:
    from paceline.actors.checks import cluster, machine, ranks
    from paceline.actors.checks import config as configured

    look = functools.partial
    return [
        Check("packages", machine.packages),
        Check("devices", machine.devices, timeout_s=60.0),
        Check("compiler", machine.compiler),
        Check("kernels", machine.kernels, timeout_s=BUILT_S),
        Check("limits", machine.limits),
        Check("collectives", look(ranks.collectives, config), timeout_s=BUILT_S),
        Check("model", look(configured.model, config), timeout_s=config.load_timeout_s),
        Check("ports", look(configured.ports, server)),
        Check("access", look(configured.access, server, config)),
        Check("traces", look(configured.traces, server)),
        Check("Ray access", look(cluster.authentication, config)),
        Check("placement", look(cluster.cluster, config, settings), timeout_s=PLACED_S),
    ]


def _round_trip(config: EngineConfig, settings: FleetConfig) -> Iterator[Checked]:
    """Start a server, ask it, end it. Not in a thread: it must be ended, whatever happens here."""
    from paceline.actors.checks.server import Server
    from paceline.actors.checks.trial import trial

    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        try:
            tried = stack.enter_context(trial(config, settings))
        except PacelineError as error:
            yield Checked("start", failed(str(error)), time.monotonic() - began_s)
            return
        seconds = time.monotonic() - began_s
        yield Checked("start", ok(f"ready after {seconds:.1f} s"), seconds)
        client = stack.enter_context(tried.client(timeout_s=ANSWER_S))
        server = Server(client=client, grpc_url=tried.grpc_url, api_key=tried.api_key)
        yield from map(make, server.checks())
        client.close()
        yield make(Check("stop", tried.stop, timeout_s=60.0))


def _shown(made: Iterable[Checked], console: Console) -> Iterator[Checked]:
    """Print each as soon as it is there."""
    checks = iter(made)
    while True:
        with console.status("looking") if console.is_terminal else contextlib.nullcontext():
            each = next(checks, None)
        if each is None:
            return
        console.print(_line(each))
        yield each


def _line(each: Checked) -> Table:
    word, style = MARKS[each.finding.verdict]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=MARK_CELLS)
    table.add_column(width=NAME_CELLS)
    table.add_column(overflow="fold")
    text = Text(each.finding.text, style="dim" if each.finding.verdict == "skipped" else "")
    if each.finding.advice:
        text.append(f"\n{each.finding.advice}", style="cyan")
    table.add_row(Text(word, style=style), Text(each.name, style="bold"), text)
    return table


def _verdict(found: list[Checked]) -> Text:
    bad = [each.name for each in found if each.finding.verdict == "failed"]
    odd = [each.name for each in found if each.finding.verdict == "warning"]
    if bad:
        return Text(f"\nfailed: {', '.join(bad)}", style="bold red")
    if odd:
        return Text(f"\nfine, but look at: {', '.join(odd)}", style="yellow")
    return Text("\nall is well", style="green")

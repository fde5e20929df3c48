"""Faults at random while KV moves between engines under load: what is wrong, hung or left behind.

    load       requests whose texts are known ──> Fleet ──> prefill engines, decode engines
    faults     one after another, each where KV is under way at that moment
    quiesce    after every group: all requests ended, engines are all back, nothing is held

Every text is known beforehand from one engine without faults: seeds decide all draws, so faults may
change when a token comes and never which. What is left behind is counted on every engine (blocks,
leases) and on the machine (processes, shared memory, files).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks import report
from benchmarks.census import MARK, Census
from benchmarks.faults import (
    KILLS,
    KINDS,
    WHOLE_S,
    WIRE,
    Fault,
    Kind,
    NothingToStrikeError,
    Scene,
    rounded,
)
from benchmarks.known_texts import Asked, Known, Load, make_known, save_model
from paceline.actors.fleet import Fleet
from paceline.runtime import local
from paceline.runtime.config import make_config, make_fleet
from paceline.runtime.preflight import examine
from paceline.runtime.transfer.process import FAULTS

EXPECTED = {
    "faults": (">=", 200.0),
    "wrong": ("<=", 0.0),
    "hung": ("<=", 0.0),
    "leaked": ("<=", 0.0),
    "errors": ("<=", 0.0),
    "freed_s": ("<=", 1.0),
}
HUNG_S = 60.0
LEASE_S, TIMEOUT_S = 5.0, 20.0
HELD_S = 2 * LEASE_S
"""When nobody asks for anything any more, all is given back after so long."""


class Setup(NamedTuple):
    """A fleet, and its share of all faults."""

    name: str
    fleet: dict[str, Any]
    data_plane: str = "grpc"
    kinds: tuple[Kind, ...] = KINDS
    share: float = 1.0


FULL = (
    Setup("1 rank to 1", {"prefill_replicas": 2, "decode_replicas": 2}, share=0.4),
    Setup("2 ranks to 1", {"prefill_tensor_parallel_size": 2, "decode_replicas": 2}, share=0.2),
    Setup("1 rank to 2", {"prefill_replicas": 1, "decode_tensor_parallel_size": 2}, share=0.2),
    Setup(
        "shared memory",
        {"prefill_replicas": 1, "decode_replicas": 2},
        "auto",
        tuple(kind for kind in KINDS if kind not in ("flip byte", "slow reader")),
        share=0.2,
    ),
)
QUICK = (
    Setup(
        "1 rank to 1",
        {"prefill_replicas": 1, "decode_replicas": 2},
        kinds=(*KINDS, *WIRE, "client leaves", "kill link"),
    ),
)


def main() -> None:
    args = _parser().parse_args()
    setups = QUICK if args.quick else tuple(each for each in FULL if each.name in args.setups)
    if args.faults is None:
        args.faults = 20 if args.quick else 200
    if args.quick:
        args.pause_s = min(args.pause_s, 0.2)
    expected = EXPECTED | {"faults": (">=", float(args.faults))}
    made = report.Report(name="kv_faults", settings=vars(args), expected=expected)
    with _on_its_own(args.log) as folder:
        rng = random.Random(args.seed)
        base = _base(args, folder)
        alone = make_config({**base, "distributed_executor_backend": "uni"})
        known = make_known(alone, examine(alone), count=24 if args.quick else 48, rng=rng)
        faults: list[Fault] = []
        for setup, count in zip(setups, _shares(setups, args.faults), strict=True):
            faults += _run(setup, made, base, known, count=count, args=args, rng=rng)
    _compare(made, faults)
    table = [_line(kind, [each for each in faults if each.kind == kind]) for kind in KINDS]
    made.print(list(table[0]), table)
    made.write(args.output)


def _parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__)
    parser.set_defaults(model=None, speculative_model=None)  # small random ones
    parser.add_argument("--faults", type=int, help="200, or 20 if quick.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=8, help="Requests under way at once.")
    parser.add_argument("--group-size", type=int, default=10, help="Faults until all must be free.")
    parser.add_argument("--pause-s", type=float, default=1.0, help="Longest wait before a fault.")
    parser.add_argument("--log", default=os.devnull, metavar="FILE", help="What engines say.")
    names = [setup.name for setup in FULL]
    parser.add_argument("--setups", nargs="+", choices=names, default=names)
    return parser


def _base(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Settings of all engines. float32, so that a text does not depend on what else is in a batch."""
    return {
        "model": args.model or save_model(folder / "target", noise=0.0),
        "dtype": "float32",
        "disable_custom_all_reduce": True,
        "kv_cache_memory": "128MiB",
        "max_num_batched_tokens": 128,
        "step_timeout_s": 30.0,
        "load_timeout_s": 60.0,
        "speculative_config": {
            "model": args.speculative_model or save_model(folder / "drafter", noise=0.05),
            "num_speculative_tokens": 4,
        },
    }


def _shares(setups: Sequence[Setup], count: int) -> list[int]:
    """Of so many faults, all of them."""
    whole = sum(each.share for each in setups)
    ends = [
        round(count * sum(s.share for s in setups[: n + 1]) / whole) for n in range(len(setups))
    ]
    return [end - start for start, end in itertools.pairwise((0, *ends))]


# --------------------------------------------------------------------------------------------- one fleet


def _run(
    setup: Setup,
    made: report.Report,
    base: dict[str, Any],
    known: Sequence[Known],
    *,
    count: int,
    args: argparse.Namespace,
    rng: random.Random,
) -> list[Fault]:
    """A fleet's life, and a row for all that happened."""
    mark = os.environ[MARK] = secrets.token_hex(8)
    began_s = time.monotonic()
    fleet, sizes = _open(setup, base)
    report.say(f"{setup.name}: {count} faults; ready after {time.monotonic() - began_s:.1f} s")
    began_s = time.monotonic()
    load = Load(fleet, known, width=args.width, hung_s=HUNG_S, rng=rng)
    scene = Scene(fleet, load, sizes=sizes, rng=rng)
    rows: list[report.Row] = []
    try:
        kinds = list(itertools.islice(itertools.cycle(setup.kinds), count))
        rng.shuffle(kinds)
        for first in range(0, count, args.group_size):
            load.start()
            for kind in kinds[first : first + args.group_size]:
                scene.wait(lambda: False, rng.uniform(0.0, args.pause_s))
                fault = scene.strike(kind)
                report.say(f"{len(scene.faults):5} {kind}: {fault.victim}, {fault.moving} moving")
            rows.append(_quiesce(scene, mark, began_s))
    except NothingToStrikeError as error:
        report.say(f"  given up: {error}")
        rows.append({"row": "given up", "error": str(error)})
    finally:
        status = load.status()
        load.close()
        fleet.close()
    rows.append(_aftermath(scene, mark))
    _attribute(scene.faults, load.ended)
    rows += [{"row": "fault", **fault.row(since_s=began_s)} for fault in scene.faults]
    rows += [_wreck(asked) for asked in load.ended if asked.outcome not in ("ok", "left")]
    took = [asked.ended_s - asked.asked_s for asked in load.ended if asked.ended_s is not None]
    rows.append(
        {
            "row": "load",
            "seconds": rounded(time.monotonic() - began_s),
            "outcomes": dict(Counter(str(asked.outcome) for asked in load.ended)),
            "median_s": rounded(statistics.median(took) if took else None),
            "longest_s": rounded(max(took, default=None)),
            "transfers": msgspec.to_builtins(status.transfers),
        }
    )
    _count_once(rows)
    made.rows += [{"setup": setup.name, **row} for row in rows]
    return scene.faults


def _open(setup: Setup, base: dict[str, Any]) -> tuple[Fleet, dict[Any, int]]:
    """Engines that are replaced at once. Small chunks: many frames for faults to fall between."""
    transfer = {
        "data_plane": setup.data_plane,
        "lease_s": LEASE_S,
        "timeout_s": TIMEOUT_S,
        "chunk_bytes": 1 << 16,
        "credit_bytes": 1 << 18,
    }
    config = make_config({**base, "kv_transfer_config": transfer})
    settings = make_fleet({"routing_policy": "always", **setup.fleet})
    fleet = Fleet(config, examine(config), settings, start=local.connect, backoff_s=(0.1, 1.0))
    sizes = {
        "prefill": settings.prefill_tensor_parallel_size or 1,
        "decode": settings.decode_tensor_parallel_size or 1,
    }
    return fleet, sizes


def _quiesce(scene: Scene, mark: str, began_s: float) -> report.Row:
    """Ask for nothing more, wait until all has ended and should be free, and count what is not."""
    scene.load.stop()
    since_s = time.monotonic()
    scene.wait(lambda: not scene.load.live(), 2 * HUNG_S)
    scene.wait(lambda: scene.is_quiet and scene.is_whole(), WHOLE_S)
    ended_s = time.monotonic()
    scene.wait(lambda: not scene.held() and not _left_over(scene, mark), HELD_S)
    found = scene.held() + _left_over(scene, mark)
    found["engines"] += not scene.is_whole()
    report.say(f"      quiet after {time.monotonic() - since_s:.1f} s, left: {+found or 'nothing'}")
    return {
        "row": "quiesce",
        "at_s": rounded(since_s - began_s),
        "ended_s": rounded(ended_s - since_s),
        "free_s": rounded(time.monotonic() - ended_s),
        "left": dict(+found),
    }


def _left_over(scene: Scene, mark: str) -> Counter[str]:
    """What is on this machine and belongs to no engine."""
    census = scene.census()
    return +Counter(
        processes=len(census.strays(mark)),
        memory=len(census.unowned_memory()),
        files=len(_files()) - len(census.engines),  # each has one folder
    )


def _count_once(rows: Sequence[report.Row]) -> None:
    """What lay there at an earlier look already is not left anew."""
    before: Counter[str] = Counter()
    for row in rows:
        if "left" in row:
            now = Counter(row["left"])
            row["left"], before = dict(now - before), now


def _aftermath(scene: Scene, mark: str) -> report.Row:
    """What is left when all engines are closed."""

    def left() -> Counter[str]:
        census = Census.take()
        return +Counter(
            processes=len(census.strays(mark)) + len(census.engines),
            files=len(_files()),
            shared=sum(Path(path).exists() for path in scene.shared),
        )

    deadline_s = time.monotonic() + HELD_S
    while (found := left()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    report.say(f"      closed, left: {found or 'nothing'}")
    return {"row": "closed", "left": dict(found)}


def _files() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("paceline-*"))


@contextlib.contextmanager
def _on_its_own(log: str) -> Iterator[Path]:
    """A folder for this run alone, in which all temporary files lie. What engines say of their deaths
    goes to `log`."""
    kept, ours = os.dup(2), sys.stderr
    with tempfile.TemporaryDirectory(prefix="faults-") as root, Path(log).open("ab") as file:
        temporary = Path(root) / "temporary"
        temporary.mkdir()
        before = dict(os.environ)
        os.environ |= {"TMPDIR": str(temporary), FAULTS: json.dumps({"on_signals": True})}
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        tempfile.tempdir = str(temporary)
        logging.getLogger("paceline").setLevel(logging.CRITICAL)
        os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(kept, "w", buffering=1)
        try:
            yield Path(root)
        finally:
            os.dup2(kept, 2)
            sys.stderr = ours
            tempfile.tempdir = None
            os.environ.clear()
            os.environ.update(before)


# --------------------------------------------------------------------------------------------- the form


def _attribute(faults: Sequence[Fault], ended: Iterable[Asked]) -> None:
    """Lay each request that went wrong to the last fault that met it."""
    for asked in ended:
        met = [fault for fault in faults if asked in fault.in_flight]
        if met:
            met[-1].wrong += asked.outcome == "wrong"
            met[-1].hung += asked.outcome == "hung"
            met[-1].errors += asked.outcome == "error"


def _wreck(asked: Asked) -> report.Row:
    pairs = zip(asked.token_ids, asked.expected, strict=False)
    return {
        "row": "request",
        "outcome": asked.outcome,
        "error": asked.error,
        "prompt_tokens": len(asked.request.prompt_token_ids),
        "greedy": asked.request.params.greedy,
        "tokens": len(asked.token_ids),
        "expected_tokens": len(asked.expected),
        "same_tokens": sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)),
    }


def _compare(made: report.Report, faults: Sequence[Fault]) -> None:
    ends = Counter(row["outcome"] for row in made.rows if row["row"] == "request")
    left = sum((Counter(row["left"]) for row in made.rows if "left" in row), Counter[str]())
    made.ratios = {
        "faults": float(len(faults)),
        "wrong": float(ends["wrong"]),
        "hung": float(ends["hung"]),
        "leaked": float(left.total()),
        "errors": float(ends["error"]),
    }
    freed = [each.freed_s for each in faults if each.freed_s is not None]
    if freed:
        made.ratios["freed_s"] = max(freed)
    loads = [row for row in made.rows if row["row"] == "load"]
    flips = [each.noticed for each in faults if each.noticed is not None]
    made.notes = {
        "requests": dict(sum((Counter(row["outcomes"]) for row in loads), Counter[str]())),
        "longest request, s": max((row["longest_s"] or 0.0 for row in loads), default=0.0),
        "faults with KV under way": sum(each.moving > 0 for each in faults),
        "flipped bytes noticed": f"{sum(flips)} of {len(flips)}",
        "longest standstill of a text beside a slow reader, s": rounded(
            max((each.gap_s for each in faults if each.gap_s is not None), default=None)
        ),
        "transfers": {
            name: sum(row["transfers"].get(name, 0) for row in loads)
            for name in ("fetched", "failed", "expired", "num_resumed", "num_corrupt")
        },
        "left": dict(left),
    }


def _line(kind: Kind, faults: Sequence[Fault]) -> report.Row:
    def middle(values: Iterable[float | None]) -> float | str:
        known = [each for each in values if each is not None]
        return statistics.median(known) if known else "-"

    return {
        "kind": kind,
        "count": len(faults),
        "wrong": sum(each.wrong for each in faults),
        "hung": sum(each.hung for each in faults),
        "errors": sum(each.errors for each in faults),
        "engines back, s": middle(each.whole_s for each in faults if kind in KILLS),
        "requests ended, s": middle(each.quiet_s for each in faults),
    }


if __name__ == "__main__":
    main()

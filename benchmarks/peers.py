"""Paceline beside vLLM's CPU build and transformers on one machine: same model, same prompts, same client.

    round 0   paceline plain, draft_model, ...   vllm plain, ...   transformers
    round 1   the same systems in the opposite order
              each: start ─> warm up ─> (one request at a time ─> 36 at once) x repetitions ─> stop

One system runs at a time. A system that does not start, or that fails a request, is in the table with its error.
vLLM comes from an environment of its own: `benchmarks/peers.md` says how to make it.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import multiprocessing
import os
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import report, serve, servers
from benchmarks.client import Client
from paceline.runtime.models.weights import find_model
from paceline.runtime.tokenizer import Tokenizer

EXPECTED = {
    "batch1_over_vllm_best": (">=", 1.5),
    "concurrent36_over_vllm_best": (">=", 1.2),
}
ALONE, TOGETHER = 1, 36
"""Requests in flight."""
RATIO_NAMES = {ALONE: "batch1", TOGETHER: "concurrent36"}
PROMPT_TOKENS = 128
DRAFTS = 5
"""Most tokens drafted per round, ours and vLLM's."""
QUICK = ["paceline plain", "paceline draft_model", "transformers plain"]
"""What a minute is enough for: vLLM takes longer to start."""
TRANSFORMERS_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One round's prompts, the same for every system. Entry r of `alone` and `together` is
    repetition r."""

    warm: list[serve.Ask]
    alone: list[list[serve.Ask]]
    together: list[list[serve.Ask]]

    def runs(self) -> list[tuple[int, int, list[serve.Ask]]]:
        """Repetition, requests in flight, prompts: in the order they are measured."""
        pairs = zip(self.alone, self.together, strict=True)
        return [
            (repetition, in_flight, asks)
            for repetition, pair in enumerate(pairs)
            for in_flight, asks in zip((ALONE, TOGETHER), pair, strict=True)
        ]


def make_work(
    tokenizer: Tokenizer,
    *,
    path: str | None,
    round_number: int,
    repetitions: int,
    num_alone: int,
    max_tokens: int,
) -> Work:
    """No prompt comes twice in a round, so that no prefix cache knows it."""
    sizes = [TOGETHER, *[num_alone, TOGETHER] * repetitions]
    asks = iter(
        serve.held_out_asks(
            path,
            tokenizer,
            count=sum(sizes),
            input_len=PROMPT_TOKENS,
            output_len=max_tokens,
            seed=round_number,
        )
    )
    warm, *parts = [[next(asks) for _ in range(size)] for size in sizes]
    return Work(warm=warm, alone=parts[0::2], together=parts[1::2])


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One runtime in one of its settings."""

    kind: str
    """Whose it is: paceline, vllm or transformers."""
    setting: str
    measure: Callable[[Work], list[report.Row]]
    """Start it, measure it, stop it. Raises StartError where that cannot be done."""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.setting}"


# Servers


async def measure_server(url: str, work: Work, *, model: str) -> list[report.Row]:
    """Every run of the work against one server. Raises StartError at the first failed request."""
    client = Client(url, api_key=None, timeout_s=600.0)
    form = serve.Form(model=model, ignore_eos=True)
    rows = []
    try:
        # both ways, for what is compiled or tuned for a batch size
        for asks, in_flight in ((work.warm, TOGETHER), (work.warm[:3], ALONE)):
            pace = serve.Pace(max_concurrency=in_flight)
            _check(await serve.load(client, form, asks, pace), "while warming up")
        for repetition, in_flight, asks in work.runs():
            run = await serve.load(client, form, asks, serve.Pace(max_concurrency=in_flight))
            _check(run, f"{in_flight} at once")
            rows.append(
                {
                    "repetition": repetition,
                    "concurrency": in_flight,
                    **serve.summary(run),
                    "texts": ["".join(answer.text) for answer in run.answers],
                }
            )
    finally:
        client.close()
    return rows


def _check(run: serve.Run, when: str) -> None:
    failed = [answer.error for answer in run.answers if answer.error is not None]
    if failed:
        what = f"{len(failed)} of {len(run.answers)} requests failed {when}"
        raise servers.StartError(f"{what}: {failed[0]}")


def paceline_system(
    setting: str, config: Mapping[str, Any] | None, *, args: argparse.Namespace, size: int
) -> System:
    """`paceline serve`: one rank lives in the server's process, more are Ray actors."""
    flags = ["--model", args.model, "--dtype", "bfloat16", "--tensor-parallel-size", str(size)]
    flags += ["--distributed-executor-backend", "uni" if size == 1 else "ray"]
    flags += ["--served-model-name", "target", "--disable-log-stats"]
    if config is not None:
        flags += ["--speculative-config", json.dumps(config), "--per-request-spec-decode-metrics"]

    def measure(work: Work) -> list[report.Row]:
        command = servers.paceline_command(*flags)
        with servers.serving(
            command, ready=servers.ready_line, deadline_s=args.ready_timeout
        ) as url:
            return uvloop.run(measure_server(url, work, model="target"))

    name = setting if size == 1 else f"{setting}, {size} ranks"
    return System(kind="paceline", setting=name, measure=measure)


def vllm_system(
    setting: str, config: Mapping[str, Any] | None, *, args: argparse.Namespace, cores: str
) -> System:
    """vLLM's own server, from the environment that --vllm-python names, its threads on `cores`."""
    flags = ["--model", str(find_model(args.model)), "--dtype", "bfloat16"]
    flags += ["--served-model-name", "target", "--disable-uvicorn-access-log"]
    if config is not None:
        flags += ["--speculative-config", json.dumps(config)]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: many times the KV of 36 requests
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": _preloads(args.vllm_python),
        **dict(args.vllm_env),
    }

    def measure(work: Work) -> list[report.Row]:
        url = f"http://127.0.0.1:{_free_port()}"
        # its `vllm` command looks for a distribution of that name, which vllm-cpu is not
        command = [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", *flags]
        command += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
        with servers.serving(
            command,
            ready=lambda _: url if _healthy(url) else None,
            deadline_s=args.ready_timeout,
            env=env,
        ):
            return uvloop.run(measure_server(url, work, model="target"))

    return System(kind="vllm", setting=f"{setting}, cores {cores}", measure=measure)


def _preloads(python: str) -> str:
    """What vLLM wants loaded first, where it is there: Intel's OpenMP, without which it says that
    speculation is slow, and tcmalloc."""
    openmp = Path(python).absolute().parent.parent / "lib" / "libiomp5.so"
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    found = [str(openmp)] if openmp.exists() else []
    return ":".join([tcmalloc, *found] if tcmalloc else found)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


# transformers


def transformers_systems(args: argparse.Namespace) -> list[System]:
    """`generate` in a process of its own. Assisted generation takes one prompt at a time, so only
    the plain setting has a batch."""

    def system(setting: str) -> System:
        def measure(work: Work) -> list[report.Row]:
            # a fresh process: neither its memory nor its threads stay
            context = multiprocessing.get_context("spawn")
            receiver, sender = context.Pipe(duplex=False)
            what = (sender, args.model, args.speculative_model, setting, work)
            process = context.Process(target=_generate_into, args=what, daemon=True)
            process.start()
            sender.close()
            try:
                if not receiver.poll(TRANSFORMERS_TIMEOUT_S):
                    raise servers.StartError(f"no result within {TRANSFORMERS_TIMEOUT_S:g} s")
                found: list[report.Row] | str = receiver.recv()
            except EOFError:
                process.join(10)
                raise servers.StartError(f"exit code {process.exitcode}") from None
            finally:
                process.kill()
                process.join(10)
            if isinstance(found, str):
                raise servers.StartError(found)
            return found

        return System(kind="transformers", setting=setting, measure=measure)

    return [system(setting) for setting in ("plain", "assisted", "prompt lookup")]


def _generate_into(sender: Connection, model: str, drafter: str, setting: str, work: Work) -> None:
    """Send the rows, or in one line why there are none."""
    try:
        sender.send(_generate(model, drafter, setting, work))
    except Exception as error:  # whatever a library raises, the table needs its reason
        sender.send(" ".join(f"{type(error).__name__}: {error}".split())[:400])


def _generate(model: str, drafter: str, setting: str, work: Work) -> list[report.Row]:
    """Every run of the work; 36 prompts at once are one batch, all of one length."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    target = AutoModelForCausalLM.from_pretrained(find_model(model), dtype=torch.bfloat16).eval()
    tokenizer = Tokenizer(find_model(model))
    extra: dict[str, Any] = {}
    if setting == "assisted":
        path = find_model(drafter)
        assistant = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        extra = {"assistant_model": assistant}
    elif setting == "prompt lookup":
        extra = {"prompt_lookup_num_tokens": DRAFTS}

    def generate(asks: Sequence[serve.Ask]) -> list[list[int]]:
        ids = torch.tensor([ask.token_ids for ask in asks])
        out = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=asks[0].max_tokens,
            min_new_tokens=asks[0].max_tokens,
            pad_token_id=0,
            **extra,
        )
        texts: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return texts

    rows = []
    for _ in range(2):
        generate(work.warm[:1])
    for repetition, in_flight, asks in work.runs():
        if in_flight > 1 and extra:
            continue
        start = time.perf_counter()
        texts = []
        for first in range(0, len(asks), in_flight):
            texts += generate(asks[first : first + in_flight])
        seconds = time.perf_counter() - start
        num_tokens = sum(map(len, texts))
        rows.append(
            {
                "repetition": repetition,
                "concurrency": in_flight,
                "duration": seconds,
                "total_output_tokens": num_tokens,
                "output_throughput": num_tokens / seconds,
                "texts": [tokenizer.decode(text) for text in texts],
            }
        )
    return rows


# The comparison


def make_systems(args: argparse.Namespace) -> list[System]:
    """Every runtime in all settings it may be best in."""
    drafter = args.speculative_model
    lookup = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    length = {"num_speculative_tokens": DRAFTS}
    ours: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "draft_model": {"method": "draft_model", "model": drafter},
        "ngram": {"method": "ngram", **lookup},
        "combined": {"method": "combined", "model": drafter, **lookup},
    }
    systems = [
        paceline_system(name, config and {**config, **length}, args=args, size=size)
        for size in args.tensor_parallel_size
        for name, config in ours.items()
    ]
    if args.vllm_python is not None:
        theirs: dict[str, dict[str, Any] | None] = {
            "plain": None,
            "draft_model": {"method": "draft_model", "model": str(find_model(drafter))},
            "ngram": {"method": "ngram", **lookup},
        }
        systems += [
            vllm_system(name, config and {**config, **length}, args=args, cores=cores)
            for cores in args.vllm_cores
            for name, config in theirs.items()
        ]
    systems += transformers_systems(args)
    chosen = [s for s in systems if any(s.name.startswith(prefix) for prefix in args.systems)]
    if not chosen:
        names = ", ".join(system.name for system in systems)
        raise SystemExit(f"--systems names none of: {names}")
    return chosen


def compare(systems: Sequence[System], works: Sequence[Work], rows: list[report.Row]) -> None:
    """Every system in every round; odd rounds go backwards, so that a drifting machine is fair."""
    for number, work in enumerate(works):
        order = systems if number % 2 == 0 else list(reversed(systems))
        for system in order:
            report.say(f"round {number}: {system.name}")
            facts = {"system": system.name, "kind": system.kind, "round": number}
            start = time.monotonic()
            try:
                found = system.measure(work)
            except servers.StartError as error:
                report.say(f"  failed: {error}")
                rows.append({**facts, "error": str(error)})
                continue
            took = time.monotonic() - start
            rows += [{**facts, "with_start_s": took, **row} for row in found]
            for row in found:
                report.say(f"  {row['concurrency']:2}: {row['output_throughput']:8.1f} tokens/s")


def speeds(rows: Sequence[report.Row]) -> dict[tuple[str, int], float]:
    """Output tokens per second, prompts included, of every system and concurrency over all its runs.

    A system that failed in any round has none.
    """
    failed = {row["system"] for row in rows if "error" in row}
    tokens: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["system"] not in failed:
            total = tokens.setdefault((row["system"], row["concurrency"]), [0.0, 0.0])
            total[0] += row["total_output_tokens"]
            total[1] += row["duration"]
    return {key: count / seconds for key, (count, seconds) in tokens.items()}


def best(rows: Sequence[report.Row], kind: str, concurrency: int) -> tuple[str, float] | None:
    """The fastest setting of a runtime, and its speed; None where it has none."""
    names = {row["system"] for row in rows if row["kind"] == kind}
    found = [
        (speed, name)
        for (name, in_flight), speed in speeds(rows).items()
        if name in names and in_flight == concurrency
    ]
    if not found:
        return None
    speed, name = max(found)
    return name, speed


def ratios(rows: Sequence[report.Row]) -> dict[str, float]:
    """Our best setting over each peer's best, where both were measured."""
    found = {}
    for concurrency, name in RATIO_NAMES.items():
        ours = best(rows, "paceline", concurrency)
        for peer in ("vllm", "transformers"):
            theirs = best(rows, peer, concurrency)
            if ours is not None and theirs is not None:
                found[f"{name}_over_{peer}_best"] = ours[1] / theirs[1]
    return found


def table(rows: Sequence[report.Row]) -> list[report.Row]:
    """One line per system: output tokens per second one at a time and 36 at once, the least and the
    most of its runs, and tokens per round of drafting."""
    found, speed = [], speeds(rows)
    for name in dict.fromkeys(row["system"] for row in rows):
        mine = [row for row in rows if row["system"] == name]
        error = next((row["error"] for row in mine if "error" in row), None)
        line: report.Row = {"system": name}
        for in_flight in RATIO_NAMES:
            some = [row for row in mine if row.get("concurrency") == in_flight]
            spread = [row["output_throughput"] for row in some]
            value = speed.get((name, in_flight))
            line[f"{in_flight}: tok/s"] = "" if value is None else f"{value:.0f}"
            line[f"{in_flight}: range"] = f"{min(spread):.0f}-{max(spread):.0f}" if spread else ""
            lengths = [
                row["spec_decode_acceptance_length"]
                for row in some
                if "spec_decode_acceptance_length" in row
            ]
            line[f"{in_flight}: length"] = f"{sum(lengths) / len(lengths):.2f}" if lengths else ""
        line["same text"] = _same_texts(rows, name)
        line["note"] = "" if error is None else f"failed: {error[:60]}"
        found.append(line)
    return found


def _same_texts(rows: Sequence[report.Row], name: str) -> str:
    """How many texts written alone equal those of the table's first system. Other kernels round
    bfloat16 otherwise, so near-ties fall otherwise; a system that shares few texts has another
    model or other prompts."""

    def texts(system: str) -> dict[tuple[int, int], list[str]]:
        return {
            (row["round"], row["repetition"]): row["texts"]
            for row in rows
            if row["system"] == system and row.get("concurrency") == ALONE
        }

    base = next((row["system"] for row in rows if "error" not in row), name)
    mine, its = texts(name), texts(base)
    pairs = [
        pair for key in mine.keys() & its.keys() for pair in zip(mine[key], its[key], strict=True)
    ]
    return f"{sum(a == b for a, b in pairs)}/{len(pairs)}" if pairs else ""


def main() -> None:
    args = _parser().parse_args()
    if args.quick:
        args.rounds, args.repetitions, args.num_alone, args.max_tokens = 1, 1, 2, 32
        args.systems = args.systems or QUICK
    args.systems = args.systems or [""]
    tokenizer = Tokenizer(find_model(args.model))
    works = [
        make_work(
            tokenizer,
            path=args.prompts_file,
            round_number=number,
            repetitions=args.repetitions,
            num_alone=args.num_alone,
            max_tokens=args.max_tokens,
        )
        for number in range(args.rounds)
    ]
    made = report.Report(name="peers", settings=vars(args), expected=EXPECTED)
    systems = make_systems(args)
    compare(systems, works, made.rows)
    if args.vllm_python is None:
        made.notes["vllm"] = "not measured: --vllm-python was not given"
    made.ratios = ratios(made.rows)
    for concurrency, name in RATIO_NAMES.items():
        made.notes[f"{name} best"] = {
            kind: found[0]
            for kind in ("paceline", "vllm", "transformers")
            if (found := best(made.rows, kind, concurrency)) is not None
        }
    lines = table(made.rows)
    made.print(list(lines[0]), lines)
    for row in made.rows:  # compared by now; the figures are what is kept
        row.pop("texts", None)
    made.notes["table"] = lines
    made.write(args.output)


def _parser() -> argparse.ArgumentParser:
    made = report.parser(__doc__)
    made.add_argument("--vllm-python", metavar="PYTHON", help="Of the environment vLLM is in.")
    made.add_argument(
        "--vllm-env",
        type=_pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Set for vLLM alone, LD_PRELOAD for one.",
    )
    made.add_argument(
        "--vllm-cores",
        nargs="+",
        default=["auto", f"0-{(os.cpu_count() or 1) - 1}"],
        metavar="CORES",
        help="VLLM_CPU_OMP_THREADS_BIND, each a system: auto spares a core for its server.",
    )
    made.add_argument("--systems", nargs="+", default=[], metavar="PREFIX", help="Only these.")
    made.add_argument("--tensor-parallel-size", type=int, nargs="+", default=[1])
    made.add_argument("--rounds", type=int, default=2, help="How often every system is started.")
    made.add_argument("--repetitions", type=int, default=3, help="Runs per start.")
    made.add_argument("--num-alone", type=int, default=6, help="Prompts of a run at batch 1.")
    made.add_argument("--max-tokens", type=int, default=128)
    made.add_argument("--ready-timeout", type=float, default=600.0, metavar="SECONDS")
    return made


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text}")
    return name, value


if __name__ == "__main__":
    main()

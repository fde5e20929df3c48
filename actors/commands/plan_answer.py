"""What `paceline plan` says: tables, advice with the flags to give, and what it all rests on."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from paceline.actors.commands.plan_schedules import reasons, schedules_table, timelines
from paceline.runtime.config import EngineConfig
from paceline.runtime.costmodel import gpus
from paceline.runtime.costmodel.acceptance import KEPT
from paceline.runtime.costmodel.memory import RankMemory
from paceline.runtime.costmodel.plan import Plan, Wish, speculative_config
from paceline.runtime.costmodel.rounds import Choice, Setting
from paceline.runtime.costmodel.schedules import target_ranks
from paceline.runtime.costmodel.tree import child_chances


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The flags, understood."""

    setting: Setting
    wish: Wish
    num_engines: int
    num_gpus: int
    num_nodes: int
    prompt: int
    output: int
    model: str
    speculative_model: str | None


_WIDTH = 110
"""Columns that the widest table needs."""


def _advice(question: Question, plan: Plan) -> list[str]:
    """Sentences, the first one a command."""
    lines = [_command(question, plan)]
    setting, best = question.setting, plan.best
    if setting.drafter is not None and best.drafting is None:
        lines.append("Serve without this drafter: its drafts cost about what they save, or more.")
    elif best.drafting is not None and best.drafting.layer_parallel_size > 1:
        kept = KEPT[best.drafting.layer_parallel_size]
        lines.append(
            f"Layers side by side pay only while acceptance stays: {kept:.0%} of the exact drafter's is assumed. "
            "Measure yours: python -m benchmarks.layer_parallel."
        )
    idle = question.num_gpus - question.num_engines * setting.ranks
    if idle:
        lines.append(f"{idle} GPUs are left over: no engine of {setting.ranks} fits on them.")
    return [*lines, *_on_prefill(question, plan)]


def _command(question: Question, plan: Plan) -> str:
    setting, best = question.setting, plan.best
    flags = ["paceline", "serve", question.model]
    ranks = setting.ranks if best.drafting is None else target_ranks(setting, best.drafting)
    flags += ["--tensor-parallel-size", str(ranks), "--max-model-len", str(setting.context)]
    fits = best.memory.kv_tokens // setting.context
    if fits < EngineConfig().max_num_seqs:
        flags += ["--max-num-seqs", str(max(setting.batch, fits))]
    if question.num_engines > 1:
        flags += ["--decode-replicas", str(question.num_engines)]
    if question.num_nodes > 1:
        flags += ["--ray-address", "auto", "--engine-placement", "spread"]
    if best.drafting is not None and question.speculative_model is not None:
        config = speculative_config(question.speculative_model, best.drafting)
        flags += ["--speculative-config", config]
    return shlex.join(flags)


def _on_prefill(question: Question, plan: Plan) -> list[str]:
    found = plan.apart
    if found.num_engines < 2:
        return ["Prefill apart from decode needs two engines; these GPUs hold one of this size."]
    if not found.keeps_busy:
        return [
            f"Read prompts where texts are written: reading is {found.read_share:.0%} of the work, which keeps "
            f"{found.reading_engines:.1f} engines of {found.num_engines} busy."
        ]
    times = (
        f"a prompt of {question.prompt:,} tokens holds up {_count(found.num_texts, 'running text')} by "
        f"{_ms(found.held_up_s)} ms each (steps {found.stretched:.1f} times as long); read elsewhere, it waits "
        f"{_ms(found.waited_s)} ms for its KV"
    )
    if not found.pays:
        return [f"Read prompts where texts are written: {times}."]
    readers = min(found.num_engines - 1, max(1, round(found.reading_engines)))
    flags = f"--prefill-replicas {readers} --decode-replicas {found.num_engines - readers}"
    return [
        f"Prefill apart from decode pays ({flags}): {times}.",
        "KV moves between CPU engines only so far: on GPUs this is what to expect, not yet what can be run.",
    ]


def _assumptions(question: Question) -> list[str]:
    """What the figures rest on beside data sheets and shapes."""
    machine = question.setting.machine
    execution, gpu = machine.execution, machine.gpu
    lines = [
        f"{gpu.name}: {gpu.memory_bytes / 1e9:g} GB, {gpu.bandwidth / 1e12:g} TB/s, {gpu.bf16_flops / 1e12:g} TFLOPS, "
        f"{'NVLink' if gpu.has_nvlink else 'PCIe'} {gpu.link / 1e9:g} GB/s ({gpu.source})",
        f"of these {gpus.BANDWIDTH_SHARE:.0%} of the bandwidth and {gpus.ARITHMETIC_SHARE:.0%} of the arithmetic are "
        f"reached; an all-reduce takes {gpu.all_reduce_latency_s * 1e6:g} us and its bytes",
    ]
    if execution.launch_s:
        lines.append(
            f"eager: {execution.attention_launches} launches per attention, {execution.mlp_launches} per MLP, "
            f"{execution.launch_s * 1e6:g} us each; the longer of host and device counts"
        )
    if question.setting.drafter is not None:
        kept = ", ".join(f"{size}: {share:.0%}" for size, share in KEPT.items())
        lines.append(
            f"acceptance {question.setting.acceptance:g} of the exact drafter; left of it with N layers side by "
            f"side: {kept}"
        )
        chances = child_chances(question.setting.acceptance, 4)
        lines.append(
            "of a tree's node the children are right in "
            + ", ".join(f"{chance:.0%}" for chance in chances)
            + " of cases; stages side by side on a rank share its memory's bandwidth, its arithmetic and its host"
        )
    lines.append("nothing here was measured: see deploy/sizing.md for how far to trust it")
    return lines


def show(question: Question, plan: Plan) -> None:
    """Print it for people."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:  # rich takes a file for 80 columns wide, and cuts the tables' heads
        console.width = max(_WIDTH, console.width)
    setting, mine = question.setting, plan.best.memory
    drafter = f" with {question.speculative_model}" if question.speculative_model else ""
    console.print(
        f"{question.model}{drafter} on {question.num_gpus} x {setting.machine.gpu.name}, "
        f"{_count(question.num_nodes, 'node')}: {_count(question.num_engines, 'engine')} of "
        f"{_count(setting.ranks, 'GPU')}, {_count(setting.batch, 'sequence')} of {setting.context:,} tokens on each\n"
    )
    console.print(_memory_table(setting, mine))
    console.print(_ways_table(plan))
    if plan.schedules:
        console.print(schedules_table(setting, plan))
        console.print("Why")
        for line in reasons(setting, plan):
            console.print(f"  {line}", markup=False)
        console.print()
    console.print("Advice")
    for line in _advice(question, plan):
        console.print(f"  {line}", markup=False)
    console.print("\nAssumed")
    for line in _assumptions(question):
        console.print(f"  {line}", markup=False)


def _memory_table(setting: Setting, mine: RankMemory) -> Table:
    table = Table(title="Memory of the fullest GPU", title_justify="left")
    for name in (
        "target, GB",
        "drafter, GB",
        "KV per token, KB",
        "room for KV, GB",
        "tokens",
        "sequences",
    ):
        table.add_column(name, justify="right")
    table.add_row(
        f"{mine.target / 1e9:.2f}",
        f"{mine.drafter / 1e9:.2f}",
        f"{mine.kv_per_token / 1e3:.1f}",
        f"{mine.kv_room / 1e9:.1f}",
        f"{mine.kv_tokens:,}",
        f"{mine.kv_tokens // setting.context:,}",
    )
    return table


def _ways_table(plan: Plan) -> Table:
    table = Table(
        title="Chains in lockstep, ms, each way's best length (*: advised; layer: whole layers per rank)",
        title_justify="left",
    )
    table.add_column("drafting", no_wrap=True)
    for name in (
        "draft ranks",
        "drafts",
        "drafting",
        "verifying",
        "round",
        "tokens",
        "tokens/s",
        "speed-up",
    ):
        table.add_column(name, justify="right")
    for choice in (plan.plain, *plan.ways):
        name, *cells = _cells(choice, over=plan.plain)
        table.add_row(name + " *" * (choice is plan.best), *cells)
    return table


def _cells(choice: Choice, *, over: Choice) -> list[str]:
    made, drafting = choice.round, choice.drafting
    name, ranks, drafts = "none", "", ""
    if drafting is not None:
        name = f"N = {drafting.layer_parallel_size}"
        name += ", layer" if drafting.placement == "layer" else ""
        ranks, drafts = (
            str(drafting.draft_tensor_parallel_size),
            str(drafting.num_speculative_tokens),
        )
    return [
        name,
        ranks,
        drafts,
        _ms(made.drafting_s) if drafting is not None else "",
        _ms(made.verify_s),
        _ms(made.total_s),
        f"{made.tokens:.2f}",
        f"{choice.tokens_per_s:,.0f}",
        f"{choice.tokens_per_s / over.tokens_per_s:.2f}",
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def as_json(question: Question, plan: Plan) -> dict[str, Any]:
    """All of it for programs, in seconds, bytes and tokens."""

    def choice(made: Choice) -> dict[str, Any]:
        memory_of = asdict(made.memory)
        memory_of |= {"kv_room": made.memory.kv_room, "kv_tokens": made.memory.kv_tokens}
        return {
            "drafting": None if made.drafting is None else asdict(made.drafting),
            "round": asdict(made.round) | {"total_s": made.round.total_s},
            "memory": memory_of,
            "tokens_per_s": made.tokens_per_s,
        }

    return {
        "question": asdict(question),
        "plain": choice(plan.plain),
        "ways": [choice(way) for way in plan.ways],
        "schedules": [choice(way) for way in plan.schedules],
        "reasons": reasons(question.setting, plan),
        "timelines": timelines(question.setting, plan),
        "best": choice(plan.best),
        "speedup": plan.speedup,
        "prefill": asdict(plan.apart) | {"pays": plan.apart.pays},
        "advice": _advice(question, plan),
        "assumptions": _assumptions(question),
    }

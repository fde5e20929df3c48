"""What `paceline plan` says of schedules: a table, why each is or is not worth it, and time lines for drawing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from paceline.runtime.costmodel.plan import Plan, is_served
from paceline.runtime.costmodel.rounds import Choice, Setting
from paceline.runtime.costmodel.schedules import spans_of, target_ranks


def schedules_table(setting: Setting, plan: Plan) -> Table:
    """The best of each schedule, as a chain and as a tree."""
    table = Table(
        title="Schedules, simulated; ms of a round, or of a pass of the target (*: advised; -: not served)",
        title_justify="left",
    )
    table.add_column("schedule", no_wrap=True)
    for name in (
        "ranks",
        "N",
        "drafts",
        "nodes",
        "draft",
        "verify",
        "round",
        "tokens",
        "tokens/s",
        "speed-up",
    ):
        table.add_column(name, justify="right")
    for choice in plan.schedules:
        name, *cells = _cells(setting, choice, over=plan.plain)
        mark = " *" if choice is plan.best else "" if is_served(choice) else " -"
        table.add_row(name + mark, *cells)
    return table


def name_of(choice: Choice) -> str:
    """As the table has it."""
    drafting = choice.drafting
    assert drafting is not None, "expected a way to draft"
    return f"{drafting.schedule}, {'tree' if drafting.is_tree else 'chain'}"


def _cells(setting: Setting, choice: Choice, *, over: Choice) -> list[str]:
    made, drafting = choice.round, choice.drafting
    assert drafting is not None, "expected a way to draft"
    target = target_ranks(setting, drafting)
    apart = f"{target} + {drafting.draft_tensor_parallel_size}"
    return [
        name_of(choice),
        apart if drafting.schedule == "ahead" else str(target),
        str(drafting.layer_parallel_size),
        str(drafting.num_speculative_tokens),
        str(drafting.num_nodes) if drafting.is_tree else "",
        _ms(made.drafting_s),
        _ms(made.verify_s),
        _ms(made.total_s),
        f"{made.tokens:.2f}",
        f"{choice.tokens_per_s:,.0f}",
        f"{choice.tokens_per_s / over.tokens_per_s:.2f}",
    ]


def reasons(setting: Setting, plan: Plan) -> list[str]:
    """What each schedule gains and loses beside a chain in lockstep."""
    if not plan.schedules:
        return []
    chain, *others = plan.schedules
    lines = [_reason(setting, chain, choice) for choice in others]
    if setting.batch < 2:
        lines.insert(
            1 if others else 0,
            "interleaved: needs two sequences, one half to draft for while the other is verified.",
        )
    return lines


def _reason(setting: Setting, chain: Choice, choice: Choice) -> str:
    made, base, drafting = choice.round, chain.round, choice.drafting
    assert drafting is not None, "expected a way to draft"
    gain = choice.tokens_per_s / chain.tokens_per_s - 1
    head = f"{name_of(choice)}, {gain:+.0%} tokens/s:"
    tokens = f"{made.tokens:.2f} tokens a round instead of {base.tokens:.2f}"
    if drafting.schedule == "lockstep":
        return f"{head} {tokens}, and {_ms(made.total_s)} ms instead of {_ms(base.total_s)}."
    if drafting.schedule == "interleaved":
        alone = made.drafting_s + made.verify_s
        return (
            f"{head} half the batch every {_ms(made.total_s / 2)} ms, all of it every {_ms(made.total_s)} instead of "
            f"{_ms(base.total_s)}; the stages of a half take {_ms(alone)} ms one after the other, and each half reads "
            "the weights anew."
        )
    return (
        f"{head} drafting leaves the way ({_ms(base.drafting_s)} of {_ms(base.total_s)} ms); on "
        f"{target_ranks(setting, drafting)} ranks verifying takes {_ms(made.verify_s)} ms instead of "
        f"{_ms(base.verify_s)}; {tokens}, as what was drafted after an unseen mismatch is lost."
    )


def timelines(setting: Setting, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Spans of the first rounds of each schedule, as `benchmarks/timeline.py` draws them."""
    return {
        f"{name_of(choice)}: {choice.tokens_per_s:,.0f} tokens/s": [
            asdict(span) for span in spans_of(setting, choice.drafting)
        ]
        for choice in plan.schedules
        if choice.drafting is not None
    }


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"

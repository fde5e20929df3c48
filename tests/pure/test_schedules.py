"""The three schedules in the cost model: simulated, where there is a closed form compared with it, and advised."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pure.test_plan import PAIR, SIZING, machine_of, plan_of, run, setting_of

from paceline.actors.commands.plan_schedules import name_of
from paceline.runtime.costmodel.acceptance import chain_tokens, parallel_tokens
from paceline.runtime.costmodel.passes import EAGER
from paceline.runtime.costmodel.plan import Wish, is_served, speculative_config
from paceline.runtime.costmodel.rounds import Drafting, evaluate
from paceline.runtime.costmodel.schedules import (
    evaluate_ahead,
    evaluate_interleaved,
    spans_of,
    stages_of,
    together_s,
)
from paceline.runtime.costmodel.shapes import SHAPES
from paceline.runtime.costmodel.simulate import Ahead, Drafts, Stages, ahead
from paceline.runtime.costmodel.tree import Tree, child_chances, round_values
from paceline.runtime.errors import ConfigError

CHAIN: dict[str, Any] = {
    "num_speculative_tokens": 4,
    "layer_parallel_size": 1,
    "draft_tensor_parallel_size": 2,
}


def chain_of(chance: float, *, nodes: int) -> Drafts:
    return Drafts(exact=(chance,), grouped=(chance,), depth=max(1, nodes), nodes=max(1, nodes))


def stages_in_step(window: int, *, drafter: float = 1.0) -> Stages:
    """So many passes of the drafter take `drafter` times as long as one of the target, which takes a second."""
    draft_s = drafter / window
    return Stages(first_s=draft_s, later_s=draft_s, verify_s=1.0, plain_s=1.0, telling_s=0.0)


# ------------------------------------------------------------------------------------------ ahead


@pytest.mark.parametrize(("chance", "window"), [(0.8, 5), (0.5, 2), (0.7, 4), (0.9, 3)])
def test_drafting_ahead_in_step_emits_what_pearl_expects(chance: float, window: int) -> None:
    """The target's own token is the last of each window, so that it looks at one draft less."""
    found = ahead(
        stages_in_step(window), chain_of(chance, nodes=window - 1), batch=1, passes=12_000, seed=5
    )
    assert found.tokens / found.passes == pytest.approx(parallel_tokens(chance, window), rel=0.01)
    assert found.seconds == pytest.approx(found.passes), "the target never waits"


def test_pearls_expectation_is_the_one_worked_out_in_the_design() -> None:
    assert parallel_tokens(0.8, 5) == pytest.approx(2.28, abs=0.01)
    assert chain_tokens(0.8, 5) / 2 == pytest.approx(1.84, abs=0.01), (
        "the same, one after the other"
    )


@given(
    st.floats(0.0, 1.0),
    st.integers(1, 6),
    st.floats(0.1, 4.0),
    st.integers(1, 3),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_a_pass_emits_at_least_its_own_token_and_at_most_all_drafts_and_that(
    chance: float, nodes: int, drafter: float, batch: int, width: int
) -> None:
    chances = child_chances(chance, width)
    drafts = Drafts(exact=chances, grouped=chances, depth=nodes, width=width, nodes=nodes)
    found = ahead(stages_in_step(nodes, drafter=drafter), drafts, batch=batch, passes=30)
    assert batch <= found.tokens / found.passes <= batch * (nodes + 1)


def emitted(found: Ahead) -> float:
    return found.tokens / found.passes


def test_a_drafter_that_is_always_right_gives_full_passes_and_one_never_right_plain_ones() -> None:
    stages = stages_in_step(5, drafter=0.5)
    always, never = (ahead(stages, chain_of(a, nodes=4), batch=2, passes=200) for a in (1.0, 0.0))
    assert emitted(always) == pytest.approx(2 * 5, rel=0.02)
    assert emitted(never) == 2
    assert always.exact_s == pytest.approx(0.1), "calibrated once, for the prompt"


def test_a_slow_drafter_does_not_hold_the_target_up() -> None:
    found = ahead(stages_in_step(1, drafter=3.0), chain_of(0.9, nodes=1), batch=1, passes=500)
    assert found.tokens_per_s >= 1.0


def test_longer_waits_between_passes_are_time_to_draft_in() -> None:
    quick, slow = stages_in_step(4), stages_in_step(4)
    slow = Stages(first_s=0.25, later_s=0.25, verify_s=1.0, plain_s=1.0, telling_s=1.0)
    drafts = chain_of(0.9, nodes=8)
    few, many = (ahead(stages, drafts, batch=1, passes=2_000) for stages in (quick, slow))
    assert emitted(many) > 1.2 * emitted(few)


# ------------------------------------------------------------------------------------------ trees


def test_a_chain_is_a_tree_whose_nodes_have_one_child() -> None:
    values = round_values((0.7,), (0.7,), depth=5, width=1, nodes=5)
    assert 1 + sum(values) == pytest.approx(chain_tokens(0.7, 5))


@pytest.mark.parametrize("chance", [0.05, 0.6, 0.95])
def test_children_get_less_likely_and_one_of_them_is_right_at_most_always(chance: float) -> None:
    found = child_chances(chance, 5)
    assert found[0] == pytest.approx(chance)
    assert list(found) == sorted(found, reverse=True)
    assert sum(found) < 1


def test_of_five_children_as_many_are_right_as_medusa_counts() -> None:
    """About 60 % for the first and over 80 % for one of five (arXiv 2401.10774)."""
    assert sum(child_chances(0.6, 5)) == pytest.approx(0.83, abs=0.01)


def test_a_drawn_tree_keeps_what_its_values_promise() -> None:
    chances = child_chances(0.7, 5)
    rng, tokens, rounds = random.Random(3), 0, 4_000
    for _ in range(rounds):
        tree = Tree(chances, chances, rng)
        for level in range(3):
            tree.forward(4 if level else 1)
            tree.land(exact=level == 0)
        tree.check(10)
        tokens += tree.settle()
    values = round_values(chances, chances, depth=3, width=4, nodes=10)
    assert tokens / rounds == pytest.approx(1 + sum(values), rel=0.02)


@given(st.lists(st.sampled_from(["draft", "land", "check", "settle"]), max_size=60), st.integers())
@settings(max_examples=200, deadline=None)
def test_whatever_overlaps_a_tree_is_whole(steps: list[str], seed: int) -> None:
    chances = child_chances(0.6, 3)
    tree = Tree(chances, chances, random.Random(seed))
    flying = checking = False
    for step in steps:
        if step == "draft" and not flying:
            tree.forward(2)
            flying = True
        elif step == "land" and flying:
            tree.land(exact=tree.is_behind)
            flying = False
        elif step == "check" and not checking:
            checking = tree.check(4) <= 4
        elif step == "settle" and checking:
            assert 1 <= tree.settle() <= 5
            checking = False
        assert all(len(path) == 1 or path[:-1] in tree.values for path in tree.values)
        assert 0 <= tree.num_forwarded <= len(tree.values) + 2
        assert all(0 < value <= 1 for value in tree.values.values())


# ------------------------------------------------------------------------------------------ schedules


def test_stages_side_by_side_take_no_less_than_each_and_no_more_than_both() -> None:
    setting = setting_of(drafter=SHAPES["Llama-3-8B"], batch=8)
    drafting = Drafting(schedule="interleaved", **CHAIN)
    stages = stages_of(setting, drafting)
    alone = (stages.verify_s, stages.drafting_s(4))
    assert max(alone) < together_s(setting, drafting) < sum(alone)


def test_where_the_host_launches_one_by_one_nothing_is_won_side_by_side() -> None:
    setting = setting_of(batch=8, machine=machine_of(execution=EAGER))
    drafting = Drafting(schedule="interleaved", **CHAIN)
    stages = stages_of(setting, drafting)
    both = stages.verify_s + stages.drafting_s(4)
    assert together_s(setting, drafting) == pytest.approx(both, rel=0.01)


def test_halves_pay_where_arithmetic_counts_and_not_where_weights_are_read() -> None:
    """Reading weights takes as long for half a batch; arithmetic half as long."""

    def gain(batch: int) -> float:
        setting = setting_of(drafter=SHAPES["Llama-3-8B"], batch=batch, context=1024)
        ways = [{**CHAIN, "num_speculative_tokens": length} for length in (1, 2, 3, 5)]
        best = max(evaluate(setting, Drafting(**way)).tokens_per_s for way in ways)
        halves = [Drafting(schedule="interleaved", **way) for way in ways]
        return max(evaluate_interleaved(setting, way).tokens_per_s for way in halves) / best

    assert gain(2) < 0.8
    assert gain(256) > 1.0


def test_a_round_of_any_schedule_is_its_stages_less_what_overlaps() -> None:
    setting = setting_of(batch=4)
    for choice in (
        evaluate_ahead(setting, Drafting(schedule="ahead", **CHAIN)),
        evaluate_interleaved(setting, Drafting(schedule="interleaved", **CHAIN)),
    ):
        made = choice.round
        assert choice.tokens_per_s == pytest.approx(setting.batch * made.tokens / made.total_s)
        parts = made.exact_s + made.grouped_s + made.verify_s + made.telling_s
        assert made.total_s == pytest.approx(parts - made.overlapped_s)


def test_a_drafter_apart_leaves_the_target_fewer_ranks_and_more_of_its_weights_on_each() -> None:
    setting = setting_of()
    shared = evaluate(setting, Drafting(**CHAIN)).memory
    apart = evaluate_ahead(setting, Drafting(schedule="ahead", **CHAIN)).memory
    assert apart.target == pytest.approx(SHAPES["Llama-3.1-70B"].num_params * 2 / 6, rel=0.2)
    assert shared.target < apart.target


@pytest.mark.parametrize("schedule", ["lockstep", "interleaved", "ahead"])
def test_a_time_line_gives_every_model_one_thing_to_do_at_a_time(schedule: Any) -> None:
    setting = setting_of(batch=4)
    spans = spans_of(setting, Drafting(schedule=schedule, **CHAIN))
    lanes = defaultdict(list)
    for span in spans:
        model = "target" if span.stage == "verify" or schedule == "lockstep" else "drafter"
        lanes[span.rank, model].append(span)
    assert {rank for rank, _ in lanes} == set(range(8))
    for mine in lanes.values():
        ends = [0.0, *(span.end_ms for span in mine)]
        assert all(span.start_ms >= end - 1e-6 for span, end in zip(mine, ends, strict=False))
    halves = {span.group for span in spans}
    assert halves == ({0, 1} if schedule == "interleaved" else {0})


# ------------------------------------------------------------------------------------------ the plan


def test_trees_are_for_few_sequences_and_chains_for_many() -> None:
    few, many = (plan_of(setting_of(batch=batch, context=1024)) for batch in (1, 128))
    assert few.best.drafting.is_tree
    assert not many.best.drafting.is_tree


def test_drafting_ahead_pays_where_the_host_is_what_a_round_waits_for() -> None:
    """There, fewer ranks make the target no slower. With few sequences trees in lockstep do better."""
    advised = {}
    for batch in (1, 64):
        setting = setting_of(drafter=SHAPES["Llama-3-8B"], machine=machine_of(execution=EAGER))
        setting = dataclasses.replace(setting, batch=batch, context=1024)
        drafting = plan_of(setting, prompt=512, output=512).best.drafting
        advised[batch] = (drafting.schedule, drafting.is_tree)
    assert advised == {1: ("lockstep", True), 64: ("ahead", False)}


def test_with_graphs_a_target_of_70b_in_bfloat16_needs_all_ranks() -> None:
    assert plan_of(setting_of()).best.drafting.schedule == "lockstep"


def test_what_is_not_served_is_shown_and_not_advised() -> None:
    plan = plan_of(setting_of(), Wish(schedule="ahead"))
    assert plan.best.drafting.schedule == "ahead"
    assert not plan.best.drafting.is_tree
    assert [is_served(choice) for choice in plan.schedules][-1] is False


@pytest.mark.parametrize(
    ("wish", "more", "reason"),
    [
        (Wish(schedule="interleaved"), {}, "nothing to run interleaved: it needs a batch of two"),
        (
            Wish(schedule="ahead", placement="layer", layer_parallel_size=2),
            {},
            "nothing to run ahead: it needs ranks for both models",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_in_a_line(
    wish: Wish, more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan_of(setting_of(**more), wish)


def test_a_plan_is_the_same_every_time() -> None:
    first, second = (plan_of(setting_of(batch=2)) for _ in range(2))
    assert first == second


def test_advice_names_the_schedule_its_ranks_and_its_tree() -> None:
    apart = speculative_config("d", Drafting(schedule="ahead", **CHAIN))
    assert json.loads(apart) == {
        "model": "d",
        "num_speculative_tokens": 4,
        "schedule": "ahead",
        "draft_ranks": 2,
    }
    tree = json.loads(speculative_config("d", Drafting(tree_width=8, tree_nodes=32, **CHAIN)))
    assert tree["tree"] == "beam"
    assert (tree["tree_width"], tree["tree_nodes"]) == (8, 32)
    assert tree["draft_tensor_parallel_size"] == 2


def test_the_command_says_why_and_gives_time_lines(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*PAIR, "--gpus", "8", "--batch", "4", "--schedule", "ahead"]
    shown = run(asked, capsys)
    assert '"schedule": "ahead", "draft_ranks"' in shown
    assert "drafting leaves the way" in shown
    assert "ahead, tree -" in shown, "it is not served"
    found = json.loads(run([*asked, "--json"], capsys))
    assert len(found["reasons"]) == len(found["schedules"]) - 1
    assert len(found["timelines"]) == len(found["schedules"])
    assert all(
        row["end_ms"] > row["start_ms"] for rows in found["timelines"].values() for row in rows
    )


def test_the_target_gets_the_ranks_that_the_drafter_leaves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [
        *PAIR,
        "--gpus",
        "8",
        "--schedule",
        "ahead",
        "--draft-tensor-parallel-size",
        "2",
        "--json",
    ]
    found = json.loads(run(asked, capsys))
    assert "--tensor-parallel-size 6 " in found["advice"][0]
    assert found["best"]["drafting"]["draft_tensor_parallel_size"] == 2


@pytest.mark.parametrize(
    ("drafter", "chance", "batch"),
    [("1B", 0.75, 1), ("1B", 0.9, 8), ("8B", 0.75, 32), ("8B", 0.9, 128)],
)
def test_the_page_has_the_speed_ups_of_the_model(drafter: str, chance: float, batch: int) -> None:
    """One cell of each row."""
    (line,) = re.findall(rf"^\| {drafter}, {chance:g} \| (.*) \|$", SIZING.read_text(), re.M)
    cell = line.split(" | ")[[1, 8, 32, 128].index(batch)]
    shape = SHAPES["Llama-3.2-1B" if drafter == "1B" else "Llama-3-8B"]
    setting = setting_of(drafter=shape, acceptance=chance, batch=batch, context=1024)
    plan = plan_of(setting, prompt=512, output=512)
    best = sorted(plan.schedules, key=lambda choice: -choice.tokens_per_s)[:2]
    assert cell == ", ".join(
        f"{name_of(choice).replace(',', '')} {choice.tokens_per_s / plan.plain.tokens_per_s:.2f}"
        for choice in best
    )

"""Drafts branch while few requests run, and where rows and blocks are left for all of a tree."""

from __future__ import annotations

import msgspec
import pytest
from tests.pure.test_scheduler import BLOCK, SINKS, Run, make, make_request, only

from paceline.runtime.config import make_config
from paceline.runtime.schedule.draft_length import TREE_ROWS
from paceline.runtime.schedule.scheduler import make_scheduler
from paceline.runtime.types import DraftShape, RequestResult, ScheduledRequest, StepPlan, StepResult

TREE = DraftShape(kind="beam", width=3, nodes=9)


def shapes(plan: StepPlan) -> list[tuple[int, DraftShape | None]]:
    return [(each.num_draft_tokens, each.tree) for each in plan.scheduled]


def started(*, num_requests: int = 1, max_tokens: int = 40, **more: object) -> Run:
    """Requests whose prompts have been read."""
    run = Run(make(**{"rows": 256, "seats": 64, "drafts": 4, "tree": TREE, **more}))  # type: ignore[arg-type]
    run.add(*(make_request(f"{i}", max_tokens=max_tokens) for i in range(num_requests)))
    run.step()
    return run


def test_few_requests_draft_trees() -> None:
    run = started(num_requests=3)
    assert shapes(run.step()) == [(4, TREE)] * 3
    run.finish()


def test_many_requests_draft_chains() -> None:
    """Where their trees together would have more nodes than a pass takes for nothing."""
    most = TREE_ROWS // TREE.nodes
    run = started(num_requests=most, num_blocks=512)
    assert shapes(run.step()) == [(4, TREE)] * most
    run = started(num_requests=most + 1, num_blocks=512)
    assert shapes(run.step()) == [(4, None)] * (most + 1)
    run.finish()


def test_a_tree_is_no_deeper_than_what_is_left_of_the_text() -> None:
    run = started(max_tokens=4)
    assert shapes(run.step()) == [(2, TREE)]


def test_a_request_that_says_how_much_it_drafts_has_a_tree_so_deep() -> None:
    run = Run(make(rows=64, drafts=4, tree=TREE))
    run.add(make_request("a", num_draft_tokens=2), make_request("b", num_draft_tokens=0))
    run.step()
    assert shapes(run.step()) == [(2, TREE), (0, None)]
    run.finish()


def test_trees_that_do_not_fit_into_the_rows_become_chains() -> None:
    run = started(num_requests=2, rows=2 + 2 * TREE.nodes)
    assert shapes(run.step()) == [(4, TREE)] * 2
    run = started(num_requests=2, rows=1 + 2 * TREE.nodes)
    assert shapes(run.step()) == [(4, None)] * 2
    run.finish()


def test_a_tree_without_blocks_becomes_a_chain() -> None:
    needed = -(-(3 + 1 + TREE.num_slots(4)) // BLOCK)
    run = started(num_blocks=needed, max_tokens=5)
    assert only(run.step()).tree == TREE
    run = started(num_blocks=needed - 1, max_tokens=5)
    assert shapes(run.step()) == [(3, None)]
    run.finish()


def test_no_tree_grows_among_the_sinks() -> None:
    """A slot of a tree is not its position, and sinks are told by their slots."""
    run = Run(make(rows=64, drafts=4, tree=TREE))
    assert SINKS == 3
    run.add(make_request(prompt=1, kv_policy="sink_window", max_tokens=30))
    run.step()
    assert only(run.step()).tree is None
    run.finish()
    assert any(each.tree for plan in run.plans for each in plan.scheduled)


def test_n_grams_draft_chains() -> None:
    run = Run(make(rows=64, drafts=4, method="combined", tree=TREE))
    prompt = (1, 2, 3, 1, 2, 3)
    run.add(make_request("a", prompt=prompt, max_tokens=40), make_request("b", max_tokens=40))
    run.finish()
    kinds = {
        (each.drafter, each.tree is not None)
        for plan in run.plans
        for each in plan.scheduled
        if each.num_draft_tokens
    }
    assert kinds == {("ngram", False), ("draft_model", True)}


def test_acceptance_is_counted_by_depth_and_drafts_by_node() -> None:
    scheduler = make(rows=64, drafts=4, tree=TREE)
    scheduler.add(make_request(max_tokens=30))

    def answer(num_accepted: int) -> ScheduledRequest:
        plan = scheduler.schedule()
        share = only(plan)
        result = RequestResult(
            request_id=share.request_id,
            token_ids=tuple(range(num_accepted + 1)),
            num_drafted=TREE.nodes if share.num_draft_tokens else 0,
            num_accepted=num_accepted,
        )
        scheduler.update(plan, StepResult(step=plan.step, results=(result,)))
        return share

    answer(0)
    for num_accepted in (4, 1, 0):
        assert answer(num_accepted).tree == TREE
    status = scheduler.status()
    assert status.num_drafts == 3
    assert status.drafted == 3 * TREE.nodes
    assert status.accepted == 5
    assert status.accepted_at_position == (2, 1, 1, 1)
    assert [stats.draft_lengths for stats in status.steps] == [(), (4,), (4,), (4,)]


@pytest.mark.parametrize("kind", ["beam", "dynamic", "dynamic_threshold"])
def test_config_says_the_shape(kind: str) -> None:
    spec = {"draft_length": "fixed", "tree": kind, "tree_width": 6, "tree_nodes": 24}
    config = make_config({"speculative_config": spec})
    scheduler = make_scheduler(config, max_model_len=512, num_blocks=40)
    assert scheduler._speculation is not None
    shape = scheduler._speculation.tree
    assert shape is not None
    assert msgspec.to_builtins(shape) == {"kind": kind, "width": 6, "nodes": 24}


def test_slots_hold_what_target_and_drafter_may_write() -> None:
    assert DraftShape(kind="beam", width=12, nodes=60).num_slots(5) == 60
    assert DraftShape(kind="beam", width=4, nodes=8).num_slots(5) == 16
    assert DraftShape(kind="dynamic", width=4, nodes=8).num_slots(5) == 16
    assert DraftShape(kind="dynamic", width=4, nodes=60).num_slots(5) == 64
    assert DraftShape(kind="dynamic_threshold", width=4, nodes=60).num_slots(9) == 60

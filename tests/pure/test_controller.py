"""The choice of a way to draft, over ways whose worth is known to the test alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from tests.pure.test_scheduler import Run, make, make_request, solo

from paceline.runtime.schedule.controller import Controller, Way, ways_to_draft
from paceline.runtime.schedule.draft_length import DraftState, FixedDrafts, StepCost
from paceline.runtime.schedule.scheduler import Scheduler
from paceline.runtime.types import DraftForm, DraftShape, StageTimes

TREE = DraftShape(kind="beam", width=4, nodes=16)


class Batch:
    """Requests that draft, and a machine on which each way gives so many tokens per second."""

    def __init__(self, controller: Controller, worth: dict[str, float], *, noise: float = 0.0):
        self.controller, self.worth = controller, worth
        self.used = Counter[str]()
        self.seconds = self.tokens = 0.0
        self._chance, self._noise = random.Random(0), noise

    def step(self, *, num_requests: int = 1) -> str:
        states = [DraftState(most=5, room=100) for _ in range(num_requests)]
        drafting = self.controller.choose(states, rows=num_requests)
        name = next(each.name for each in self.controller.explain() if each.chosen)
        accepted = 2 * num_requests
        seconds = (num_requests + accepted) / self.worth[name]
        seconds *= 1 + self._noise * (2 * self._chance.random() - 1)
        self.used[name] += 1
        self.seconds += seconds
        self.tokens += num_requests + accepted
        drafts = sum(state.num_rows for state in states)
        self.controller.observe(
            StepCost(
                seconds,
                StageTimes(verify_ms=seconds * 1e3),
                rows=num_requests + drafts,
                draft_rows=drafts,
                num_accepted=accepted,
                first_rows=num_requests,
                num_passes=5,
                later_rows=drafts - num_requests,
                drafting=drafting,
            )
        )
        return name


def fixed(*names: str) -> Controller:
    return Controller([Way(name=name, policy=FixedDrafts()) for name in names])


def test_the_best_way_is_found_and_kept() -> None:
    batch = Batch(fixed("a", "b", "c"), {"a": 100, "b": 180, "c": 60}, noise=0.2)
    for _ in range(1000):
        batch.step()
    assert batch.used["b"] > 900
    assert batch.tokens / batch.seconds > 0.95 * 180


def test_a_way_that_is_hardly_better_changes_nothing() -> None:
    batch = Batch(fixed("a", "b"), {"a": 100, "b": 103})
    for _ in range(500):
        batch.step()
    assert batch.used["a"] > 400


def test_trials_cost_a_few_percent_at_most() -> None:
    names = "abcdef"
    batch = Batch(fixed(*names), {name: 100 if name == "a" else 20 for name in names})
    for _ in range(2000):
        batch.step()
    assert batch.tokens / batch.seconds > 0.95 * 100


def test_a_machine_that_changes_is_noticed() -> None:
    batch = Batch(fixed("a", "b"), {"a": 100, "b": 90})
    for _ in range(200):
        batch.step()
    batch.worth |= {"a": 70, "b": 140}
    for _ in range(400):
        batch.step()
    batch.used.clear()
    for _ in range(100):
        batch.step()
    assert batch.used["b"] > 80


def test_small_and_large_batches_have_a_way_each() -> None:
    batch = Batch(fixed("a", "b"), {"a": 100, "b": 200})
    for _ in range(100):
        batch.step()
    batch.worth |= {"a": 1000, "b": 500}
    for _ in range(100):
        batch.step(num_requests=16)
    assert batch.step(num_requests=16) == "a"
    batch.worth |= {"a": 100, "b": 200}
    assert batch.step() == "b"


def test_trees_are_not_tried_where_they_do_not_fit() -> None:
    ways = ways_to_draft(most=5, tree=TREE)
    assert [way.name for way in ways] == ["chain", "beam tree of 16", "beam tree of 8"]
    batch = Batch(Controller(ways), {way.name: 100 for way in ways})
    for _ in range(200):
        batch.step(num_requests=64)
    assert set(batch.used) == {"chain"}
    for _ in range(200):
        batch.step()
    assert set(batch.used) == {way.name for way in ways}


def test_one_request_alone_is_not_interleaved() -> None:
    ways = ways_to_draft(most=5, plans_in_flight=(1, 2))
    batch = Batch(Controller(ways), {way.name: 100 for way in ways})
    for _ in range(200):
        batch.step()
    assert set(batch.used) == {"lockstep, chain"}
    for _ in range(200):
        batch.step(num_requests=4)
    assert set(batch.used) == {"lockstep, chain", "interleaved, chain"}


def test_what_is_chosen_says_why() -> None:
    batch = Batch(fixed("a", "b"), {"a": 100, "b": 180})
    for _ in range(100):
        batch.step()
    (chosen,) = [each for each in batch.controller.explain() if each.chosen]
    assert chosen.name == "b"
    assert chosen.reason == "gave 1.80 times as much as a"
    assert chosen.tokens_per_second == pytest.approx(180)


def test_grouped_layers_may_be_run_one_after_another() -> None:
    forms = (DraftForm(), DraftForm(exact=True), DraftForm(calibration="every_round"))
    ways = ways_to_draft(most=5, forms=forms, plans_in_flight=(2, 1))
    assert [way.name for way in ways] == [
        f"{schedule}, chain, {layers}"
        for schedule in ("interleaved", "lockstep")
        for layers in (
            "grouped layers",
            "exact layers",
            "grouped layers calibrated every_round",
        )
    ]
    assert [way.plans_in_flight for way in ways] == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("num_requests", [1, 5])
@pytest.mark.parametrize(
    ("make_one", "fewest"),
    [
        (lambda: make(drafts=3, adaptive=True, tree=TREE, rows=256, num_blocks=256), 1),
        (lambda: make(drafts=3, adaptive=True, may_interleave=True, flights=2), 2),
    ],
    ids=["trees", "schedules"],
)
def test_texts_are_their_own_whatever_is_chosen(
    make_one: Callable[[], Scheduler], fewest: int, num_requests: int
) -> None:
    """Ways are tried, where they suit so few requests."""
    run = Run(make_one())
    requests = [make_request(f"{i}", max_tokens=150) for i in range(num_requests)]
    run.add(*requests)
    chosen = set()
    while run.scheduler.has_work:
        run.step()
        chosen |= {each.name for each in run.scheduler.status().ways if each.chosen}
    for request in requests:
        assert run.heard[request.request_id].token_ids == solo(request)[0]
    assert (len(chosen) > 1) == (num_requests >= fewest)

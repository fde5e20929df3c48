"""Which way to draft, by what each way gave lately.

A way is a schedule, a shape of drafts, and how the drafter's layers run:

    lockstep | interleaved     one after the other, or half of the requests beside the other half
    chain | tree of n nodes    how far a chain goes is decided in it, request by request (`draft_length.py`)
    exact | grouped            layers one after another, or side by side; grouped with either calibration

    choose ──> the way of this batch ──its policy──> drafts ──> step ──> tokens, seconds ──> what the way gives

What a way gives is measured: tokens per second of whole steps, so that whatever it costs is in it, and
what its drafts are worth too. It depends on how many requests there are, so each doubling of these has
a record of its own. The best way stays until another gave `_BETTER` times as much; every other one is
tried again now and then, half as often with every time that it lost, soon where it gave more than the
best gives now, and a trial that goes badly ends at once. So all trials together cost a few percent at
most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from paceline.runtime.schedule.draft_length import (
    MOST_PLANS,
    AdaptiveDrafts,
    Drafting,
    DraftPolicy,
    DraftState,
    FixedDrafts,
    StepCost,
    trees_fit,
)
from paceline.runtime.types import AS_CONFIGURED, DraftForm, DraftShape, WayStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What may be chosen for a batch."""

    name: str
    policy: DraftPolicy
    """How many drafts each request gets."""
    tree: DraftShape | None = None
    form: DraftForm = AS_CONFIGURED
    plans_in_flight: int = 1
    halves: bool = False
    """Whether it parts the requests that another way takes together."""

    def suits(self, num_requests: int) -> bool:
        """Whether as many trees fit into a step, and there is something for each half."""
        fits = self.tree is None or trees_fit(self.tree, num_requests)
        return fits and (num_requests > 1 or not self.halves)


@dataclass(slots=True)
class _Record:
    """What a way gave lately, counted with decay."""

    tokens: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    """Since its last trial began."""
    num_lost: int = 0
    """Trials in a row."""
    tried: int = -(2**30)
    """When its last trial ended, in steps of its class."""

    @property
    def goodput(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0.0 else 0.0


@dataclass(slots=True)
class _Class:
    """Batches of about the same size."""

    records: list[_Record]
    best: int = 0
    running: int = 0
    """The best, or one on trial."""
    steps: int = 0
    reason: str = "the first way there is"


def ways_to_draft(
    *,
    most: int,
    tree: DraftShape | None = None,
    forms: Sequence[DraftForm] = (AS_CONFIGURED,),
    plans_in_flight: Sequence[int] = (MOST_PLANS,),
) -> list[Way]:
    """Every form with chains, and the first with trees of three sizes; all that in each schedule. `most`
    is the depth of either."""
    ways = []
    described = [_described(form, alone=len(forms) == 1) for form in forms]
    shapes: list[DraftShape] = []
    if tree is not None:
        sizes = (tree.nodes, tree.nodes // 2, tree.nodes // 4)
        shapes = [msgspec.structs.replace(tree, nodes=nodes) for nodes in sizes if nodes > most]
    for plans in plans_in_flight:
        schedule = ["lockstep", "interleaved"][plans - 1] + ", " if len(plans_in_flight) > 1 else ""
        ways += [
            Way(
                name=f"{schedule}chain{how}",
                policy=AdaptiveDrafts(most=most),
                form=form,
                plans_in_flight=plans,
                halves=plans > min(plans_in_flight),
            )
            for form, how in zip(forms, described, strict=True)
        ]
        ways += [
            Way(
                name=f"{schedule}{shape.kind} tree of {shape.nodes}{described[0]}",
                policy=FixedDrafts(shape),
                tree=shape,
                form=forms[0],
                plans_in_flight=plans,
                halves=plans > min(plans_in_flight),
            )
            for shape in shapes
        ]
    return ways


def _described(form: DraftForm, *, alone: bool) -> str:
    if alone:
        return ""
    if form.exact:
        return ", exact layers"
    return ", grouped layers" + (f" calibrated {form.calibration}" if form.calibration else "")


class Controller:
    """Satisfies `DraftPolicy` by way of others."""

    _DECAY = 0.9
    _BETTER = 1.05
    _TRIAL_STEPS = 8
    _HOPELESS_AFTER = 2  # steps of a trial
    _HOPELESS = 0.6  # of what the best way gives
    _HOPELESS_LOST = 3  # counts for as many trials
    _TRY_EVERY = 128  # steps of a class, after it lost once
    _MOST_LOST = 5  # it is not tried less often than after so many
    _SOON = 32  # steps, where what it gave is more than the best way gives now

    def __init__(self, ways: Sequence[Way]) -> None:
        """The first is what is done before anything is known, and suits every batch."""
        assert ways, "expected a way to draft"
        self._ways = tuple(ways)
        self._classes: dict[int, _Class] = {}
        self._latest: _Class | None = None
        self._way = self._ways[0]

    @property
    def reads_prompts(self) -> bool:
        return self._way.policy.reads_prompts

    @property
    def plans_in_flight(self) -> int:
        """Of the way of the last choice."""
        return self._way.plans_in_flight

    def choose(
        self, states: Sequence[DraftState], *, rows: int, num_running: int | None = None
    ) -> Drafting:
        num_requests = len(states) if num_running is None else num_running
        size = num_requests.bit_length()
        batches = self._classes.get(size)
        if batches is None:
            batches = self._classes[size] = _Class([_Record() for _ in self._ways])
        index = self._pick(batches, num_requests)
        self._latest, self._way = batches, self._ways[index]
        drafting = self._way.policy.choose(states, rows=rows)
        if self._way.tree is None:
            for state in states:
                state.tree = None
        return drafting._replace(
            num_requests=len(states), form=self._way.form, way=index, size=size
        )

    def verified(
        self, state: DraftState, *, num_drafted: int, num_accepted: int, way: int = 0
    ) -> None:
        policy = self._ways[way].policy
        policy.verified(state, num_drafted=num_drafted, num_accepted=num_accepted)

    def observe(self, cost: StepCost) -> None:
        drafting = cost.drafting
        self._ways[drafting.way].policy.observe(cost)
        batches = self._classes.get(drafting.size)
        # a step that reads prompts says nothing of drafting
        if batches is None or cost.rows - cost.draft_rows > drafting.num_requests:
            return
        record = batches.records[drafting.way]
        record.tokens = record.tokens * self._DECAY + drafting.num_requests + cost.num_accepted
        record.seconds = record.seconds * self._DECAY + cost.seconds
        record.steps += 1
        batches.steps += 1
        self._judge(batches, drafting.way)

    def explain(self) -> tuple[WayStatus, ...]:
        """What every way gave for batches like the latest, and which is chosen and why."""
        batches = self._latest
        if batches is None:
            return ()
        return tuple(
            [
                WayStatus(
                    name=way.name,
                    tokens_per_second=record.goodput,
                    chosen=way is self._way,
                    reason=batches.reason if way is self._way else "",
                )
                for way, record in zip(self._ways, batches.records, strict=True)
            ]
        )

    def _pick(self, batches: _Class, num_requests: int) -> int:
        """The way of the next step: whatever is on trial, whatever is due, or the best."""
        records = batches.records
        if not self._ways[batches.running].suits(num_requests):
            batches.running = batches.best
        if not self._ways[batches.best].suits(num_requests):
            batches.running = batches.best = 0
        if batches.running != batches.best or records[batches.best].steps < self._TRIAL_STEPS:
            return batches.running
        for index, record in enumerate(records):
            if self._is_due(batches, index) and self._ways[index].suits(num_requests):
                record.tokens = record.seconds = 0.0
                record.steps = 0
                batches.running = index
                batches.reason = "on trial"
                return index
        return batches.best

    def _is_due(self, batches: _Class, index: int) -> bool:
        """Whether a way should be tried again."""
        record, best = batches.records[index], batches.records[batches.best]
        since = batches.steps - record.tried
        if index == batches.best or since < self._SOON:
            return False
        lost = min(record.num_lost, self._MOST_LOST)
        promising = record.goodput > self._BETTER * best.goodput
        return promising or since >= self._TRY_EVERY * 2 ** (lost - 1)

    def _judge(self, batches: _Class, index: int) -> None:
        """After a step: end a trial that is over, and settle which way is the best."""
        records = batches.records
        record, best = records[index], records[batches.best]
        if index == batches.best or index != batches.running:
            return
        hopeless = (
            record.steps >= self._HOPELESS_AFTER and record.goodput < self._HOPELESS * best.goodput
        )
        if record.steps < self._TRIAL_STEPS and not hopeless:
            return
        share = record.goodput / best.goodput if best.goodput > 0.0 else 1.0
        loser = record
        if share > self._BETTER:
            batches.reason = f"gave {share:.2f} times as much as {self._ways[batches.best].name}"
            batches.best, loser, record.num_lost = index, best, 0
        else:
            batches.reason = f"{self._ways[index].name} gave {share:.2f} times as much"
        batches.running = batches.best
        loser.num_lost += self._HOPELESS_LOST if hopeless else 1
        loser.tried = batches.steps

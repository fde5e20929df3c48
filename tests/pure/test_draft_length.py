"""Draft lengths are told, or found: as many as pay on the machine there is.

The machines here are made up: costs by rows are given, drafts are kept by chance, and the policy
sees only what steps took. Time is counted, not measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.runtime.schedule.draft_length import (
    AdaptiveDrafts,
    CostCurve,
    Drafting,
    DraftPolicy,
    DraftState,
    FixedDrafts,
    StepCost,
)
from paceline.runtime.spec.ngram import NgramIndex
from paceline.runtime.types import StageTimes

MOST = 5
MOST_ROWS = 768


@dataclass(frozen=True)
class Machine:
    """Milliseconds by rows."""

    verify: Callable[[int], float]
    first: Callable[[int], float]
    later: Callable[[int], float]
    rest_ms: float = 0.3
    hidden_ms: float = 0.0
    """Of every step with drafts, in none of its stages."""
    interleaves: bool = False
    """Whether a step drafts while another is verified."""
    noise: float = 0.1


CPU = Machine(
    verify=lambda rows: 5.0 * max(1.0, 0.3 + 0.7 * rows / 24),
    first=lambda rows: max(1.0, rows / 24),
    later=lambda rows: max(1.0, rows / 24),
)
GPU = Machine(
    verify=lambda rows: 30.0 + 0.2 * max(0, rows - 150),
    first=lambda rows: 4.0 + 0.02 * max(0, rows - 150),
    later=lambda rows: 3.0 + 0.02 * max(0, rows - 150),
)
# every row costs the same: what a machine does that is short of arithmetic
PLAIN = Machine(
    verify=lambda rows: 4.0 + 0.5 * rows,
    first=lambda rows: 1.0 + 0.08 * rows,
    later=lambda rows: 1.0 + 0.08 * rows,
)


class Always:
    """Every request drafts so many."""

    reads_prompts = True

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def choose(self, states: Sequence[DraftState], *, rows: int) -> Drafting:
        for state in states:
            state.num_tokens = self._num_tokens
        return Drafting()

    def verified(self, state: DraftState, *, num_drafted: int, num_accepted: int) -> None: ...

    def observe(self, cost: StepCost) -> None: ...


class Simulation:
    """Requests of given acceptance that end and are replaced, on a made-up machine."""

    def __init__(self, policy: DraftPolicy, *, seed: int = 0) -> None:
        self.policy = policy
        self.chance = random.Random(seed)
        self.states: list[DraftState] = []

    def run(self, machine: Machine, rates: Sequence[float], *, steps: int) -> float:
        """Tokens per millisecond over so many steps."""
        self.states = self.states[: len(rates)]
        while len(self.states) < len(rates):
            self.states.append(DraftState(most=MOST, room=99))
        tokens, whole_ms = 0, 0.0
        for _ in range(steps):
            for index in range(len(rates)):
                if self.chance.random() < 1 / 400:
                    self.states[index] = DraftState(most=MOST, room=99, lag=100)
            taken, step_ms = self.step(machine, rates)
            tokens += taken
            whole_ms += step_ms
        return tokens / whole_ms

    def step(self, machine: Machine, rates: Sequence[float]) -> tuple[int, float]:
        states, size = self.states, len(rates)
        drafting = self.policy.choose(states, rows=size)
        read = 0
        for state in states:  # as the scheduler does: no more is read up than a step's rows
            read += state.lag if state.num_tokens else 0
            if read > MOST_ROWS:
                state.num_tokens = 0
        lengths = [state.num_tokens for state in states]
        first_rows = sum(state.lag for state in states if state.num_tokens)
        first = machine.first(first_rows) * self.noise(machine) if first_rows else 0.0
        passes = [sum(length > depth for length in lengths) for depth in range(1, max(lengths))]
        later = sum(map(machine.later, passes)) * self.noise(machine)
        verify = machine.verify(size + sum(lengths)) * self.noise(machine)
        tokens = 0
        for state, rate in zip(states, rates, strict=True):
            kept = 0
            while kept < state.num_tokens and self.chance.random() < rate:
                kept += 1
            tokens += kept + 1
            state.lag += 1
            if state.num_tokens:
                state.lag = 1
                self.policy.verified(state, num_drafted=state.num_tokens, num_accepted=kept)
        step_ms = max(first + later, verify) if machine.interleaves else first + later + verify
        step_ms += machine.rest_ms
        step_ms += machine.hidden_ms if sum(lengths) else 0.0
        times = StageTimes(calibrate_ms=first, draft_ms=later, verify_ms=verify)
        rows = size + sum(lengths)
        self.policy.observe(
            StepCost(
                step_ms / 1e3,
                times,
                rows=rows,
                draft_rows=sum(lengths),
                num_accepted=tokens - size,
                first_rows=first_rows,
                num_passes=max(lengths),
                later_rows=sum(passes),
                drafting=drafting,
            )
        )
        return tokens, step_ms

    def noise(self, machine: Machine) -> float:
        return 1.0 + self.chance.uniform(-machine.noise, machine.noise)


def speed_of(num_tokens: int, machine: Machine, rates: Sequence[float], *, steps: int) -> float:
    return Simulation(Always(num_tokens)).run(machine, rates, steps=steps)


def best_fixed(machine: Machine, rates: Sequence[float], *, steps: int) -> list[float]:
    return [speed_of(count, machine, rates, steps=steps) for count in range(MOST + 1)]


def steps_for(size: int) -> int:
    return max(500, 6000 // size)


# ------------------------------------------------------------------------------------------- regimes


@pytest.mark.parametrize("rate", [0.6, 0.8])
def test_drafts_hidden_behind_another_step_s_verification_are_known_to_cost_nothing(
    rate: float,
) -> None:
    machine = replace(CPU, interleaves=True, noise=0.02)
    fixed = best_fixed(machine, [rate] * 4, steps=500)
    simulation = Simulation(AdaptiveDrafts(most=MOST))
    simulation.run(machine, [rate] * 4, steps=100)
    found = simulation.run(machine, [rate] * 4, steps=1500)
    assert found >= 0.92 * max(fixed), f"{found / max(fixed):.3f} of the best"


@pytest.mark.parametrize("machine", [CPU, GPU, PLAIN], ids=["cpu", "gpu", "plain"])
@pytest.mark.parametrize("size", [1, 8, 128])
@pytest.mark.parametrize("rate", [0.1, 0.6, 0.9])
def test_adaptive_drafting_is_near_the_best_fixed_length_and_never_slow(
    machine: Machine, size: int, rate: float
) -> None:
    rates = [rate] * size
    fixed = best_fixed(machine, rates, steps=steps_for(size) // 3)
    simulation = Simulation(AdaptiveDrafts(most=MOST))
    simulation.run(machine, rates, steps=50)  # the first steps cost more: everything is tried once
    found = simulation.run(machine, rates, steps=steps_for(size))
    assert found >= 0.95 * fixed[0], f"{found / fixed[0]:.3f} of the speed without drafts"
    assert found >= 0.91 * max(fixed), f"{found / max(fixed):.3f} of the best fixed length's speed"


def test_requests_of_a_batch_get_each_its_own_length() -> None:
    rates = [0.95] * 8 + [0.1] * 8
    simulation = Simulation(AdaptiveDrafts(most=MOST))
    simulation.run(CPU, rates, steps=100)
    found = simulation.run(CPU, rates, steps=900)
    assert found >= 1.05 * max(best_fixed(CPU, rates, steps=600)), "one length does as well"


def test_nothing_is_drafted_in_a_large_batch_and_it_starts_again_when_load_falls() -> None:
    simulation = Simulation(AdaptiveDrafts(most=MOST))
    fixed = best_fixed(CPU, [0.9], steps=1000)
    assert simulation.run(CPU, [0.9], steps=1000) >= 0.9 * max(fixed)
    simulation.run(CPU, [0.9] * 128, steps=100)
    drafted = 0
    for _ in range(300):
        simulation.step(CPU, [0.9] * 128)
        drafted += sum(state.num_tokens for state in simulation.states)
    assert drafted < 0.02 * 300 * 128
    simulation.run(CPU, [0.9], steps=100)
    assert simulation.run(CPU, [0.9], steps=1000) >= 0.9 * max(fixed)


def test_it_stops_when_drafts_are_no_longer_kept_and_starts_when_they_are() -> None:
    simulation = Simulation(AdaptiveDrafts(most=MOST))
    for rate in (0.9, 0.05, 0.9):
        fixed = best_fixed(GPU, [rate] * 8, steps=500)
        simulation.run(GPU, [rate] * 8, steps=700)  # time to notice
        found = simulation.run(GPU, [rate] * 8, steps=700)
        assert found >= 0.93 * max(fixed), f"{rate}: {found / max(fixed):.3f}"


def test_it_follows_a_machine_that_changes() -> None:
    simulation = Simulation(AdaptiveDrafts(most=MOST))
    for machine in (GPU, PLAIN, GPU):
        fixed = best_fixed(machine, [0.8] * 16, steps=500)
        simulation.run(machine, [0.8] * 16, steps=3000)
        found = simulation.run(machine, [0.8] * 16, steps=700)
        assert found >= 0.9 * max(fixed), f"{found / max(fixed):.3f}"


def test_a_single_pause_changes_nothing() -> None:
    simulation = Simulation(AdaptiveDrafts(most=MOST))
    simulation.run(GPU, [0.9], steps=300)
    pause = Machine(verify=lambda _: 3000.0, first=GPU.first, later=GPU.later)
    simulation.step(pause, [0.9])
    fixed = best_fixed(GPU, [0.9], steps=300)
    assert simulation.run(GPU, [0.9], steps=100) >= 0.85 * max(fixed)


def test_it_starts_again_after_a_long_time_without_drafts() -> None:
    dear = Machine(verify=lambda _: 30.0, first=lambda _: 12.0, later=lambda _: 12.0)
    simulation = Simulation(AdaptiveDrafts(most=MOST))
    simulation.run(dear, [0.02] * 4, steps=600)
    drafted = 0
    for _ in range(400):
        simulation.step(dear, [0.02] * 4)
        drafted += sum(state.num_tokens for state in simulation.states)
    assert 0 < drafted < 400 * 4 * 0.1
    simulation.run(dear, [0.95] * 4, steps=1500)
    fixed = best_fixed(dear, [0.95] * 4, steps=500)
    assert simulation.run(dear, [0.95] * 4, steps=500) >= 0.9 * max(fixed)


def test_what_no_estimate_shows_is_still_noticed() -> None:
    deceptive = replace(GPU, hidden_ms=90.0)
    simulation = Simulation(AdaptiveDrafts(most=MOST))
    simulation.run(deceptive, [0.8] * 8, steps=100)
    found = simulation.run(deceptive, [0.8] * 8, steps=1500)
    assert found >= 0.95 * speed_of(0, deceptive, [0.8] * 8, steps=500)


def test_exploring_costs_little_where_drafting_never_pays() -> None:
    hopeless = Machine(verify=lambda rows: 4.0 * rows, first=lambda _: 40.0, later=lambda _: 40.0)
    found = Simulation(AdaptiveDrafts(most=MOST)).run(hopeless, [0.9], steps=4000)
    assert found >= 0.97 * speed_of(0, hopeless, [0.9], steps=1000)


# ------------------------------------------------------------------------------------------- bounds


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    room=st.integers(0, 7),
    most=st.integers(0, MOST),
    asked=st.booleans(),
    milliseconds=st.lists(st.floats(0, 1e4), min_size=3, max_size=3),
    adaptive=st.booleans(),
)
def test_no_request_drafts_more_than_it_may(
    sizes: list[int],
    room: int,
    most: int,
    asked: bool,
    milliseconds: list[float],
    adaptive: bool,
) -> None:
    policy: DraftPolicy = AdaptiveDrafts(most=MOST) if adaptive else FixedDrafts()
    first, later, verify = milliseconds
    for size in sizes:
        index = NgramIndex([1, 2, 1, 2] if size % 2 else [1, 2, 3])
        states = [
            DraftState(most=most, asked=asked, index=index, room=room, lag=size)
            for _ in range(size)
        ]
        drafting = policy.choose(states, rows=size)
        assert all(0 <= state.num_tokens <= min(room, most) for state in states)
        for state in states:
            if state.num_tokens:
                policy.verified(state, num_drafted=state.num_tokens, num_accepted=0)
        times = StageTimes(calibrate_ms=first, draft_ms=later, verify_ms=verify)
        rows = sum(state.num_tokens for state in states)
        policy.observe(
            StepCost(first / 1e3, times, size + rows, rows, 0, size, most, rows, drafting)
        )


def test_what_a_request_asks_for_is_what_it_gets() -> None:
    policy = AdaptiveDrafts(most=MOST)
    state = DraftState(most=3, asked=True, room=99)
    for _ in range(200):
        policy.choose([state], rows=1)
        assert state.num_tokens == 3
        policy.verified(state, num_drafted=3, num_accepted=0)
        times = StageTimes(calibrate_ms=9.0, draft_ms=9.0, verify_ms=9.0)
        policy.observe(StepCost(0.03, times, 4, 3, 0, 1, 3, 2))


# ----------------------------------------------------------------------------------- who drafts


def test_fixed_drafting_takes_a_match_before_the_model() -> None:
    matching = DraftState(most=4, room=9, index=NgramIndex([1, 2, 1, 2]))
    new = DraftState(most=4, room=9, index=NgramIndex([1, 2, 3]))
    no_model = DraftState(most=4, room=9, uses_model=False, index=NgramIndex([1, 2, 3]))
    FixedDrafts().choose([matching, new, no_model], rows=3)
    assert [s.num_tokens for s in (matching, new, no_model)] == [4, 4, 0]
    assert (matching.drafter, new.drafter) == ("ngram", "draft_model")


@pytest.mark.parametrize(("ngram", "model", "expected"), [(0.9, 0.6, "ngram"), (0.2, 0.9, "model")])
def test_of_two_drafters_the_one_that_pays_more_is_taken(
    ngram: float, model: float, expected: str
) -> None:
    policy = AdaptiveDrafts(most=MOST)
    chance = random.Random(0)
    state = DraftState(most=MOST, room=99, index=NgramIndex([1, 2, 1, 2]))
    chosen = []
    for _ in range(600):
        drafting = policy.choose([state], rows=1)
        chosen.append(state.drafter if state.num_tokens else "")
        by_model = state.drafter == "draft_model"
        rate, kept = (model if by_model else ngram), 0
        while kept < state.num_tokens and chance.random() < rate:
            kept += 1
        passes = state.num_tokens if by_model else 0
        if state.num_tokens:
            policy.verified(state, num_drafted=state.num_tokens, num_accepted=kept)
        times = StageTimes(
            calibrate_ms=3.0 if passes else 0.0, draft_ms=3.0 * max(0, passes - 1), verify_ms=30.0
        )
        step_ms = times.calibrate_ms + times.draft_ms + times.verify_ms
        rows = state.num_tokens
        policy.observe(
            StepCost(
                step_ms / 1e3,
                times,
                rows=1 + rows,
                draft_rows=rows,
                num_accepted=kept,
                first_rows=bool(passes),
                num_passes=passes,
                later_rows=max(0, passes - 1),
                drafting=drafting,
            )
        )
    late = chosen[100:]
    assert late.count("ngram" if expected == "ngram" else "draft_model") > 0.8 * len(late)


def test_a_request_too_far_behind_is_left_alone() -> None:
    policy = AdaptiveDrafts(most=MOST)
    near = DraftState(most=MOST, room=99, lag=2)
    far = DraftState(most=MOST, room=99, lag=100_000)
    late = DraftState(most=MOST, room=3, lag=200)
    times = StageTimes(verify_ms=30.0)
    policy.choose([near, far, late], rows=3)
    policy.observe(StepCost(0.03, times, 3, 0, 0, 0, 0, 0))
    policy.choose([near, far, late], rows=3)
    assert near.num_tokens > 0
    assert far.num_tokens == late.num_tokens == 0


# ------------------------------------------------------------------------------------------- curves


def test_a_curve_learns_what_each_number_of_rows_costs() -> None:
    curve = CostCurve()
    for _ in range(100):
        for rows in (1, 8, 64):
            curve.observe(rows, 2.0 + rows)
    for rows in (1, 8, 64):
        assert curve.at(rows) == pytest.approx(2.0 + rows, rel=0.05)


@given(
    st.lists(st.tuples(st.integers(1, 600), st.floats(0, 1e5)), max_size=40),
    st.integers(1, 600),
    st.integers(0, 600),
)
def test_more_rows_never_seem_cheaper(seen: list[tuple[int, float]], rows: int, more: int) -> None:
    curve = CostCurve()
    for at, ms in seen:
        curve.observe(at, ms)
    assert 0.0 <= curve.at(rows) <= curve.at(rows + more) * (1.0 + 1e-12)


def test_what_was_never_tried_is_hoped_to_be_cheap() -> None:
    curve = CostCurve()
    curve.observe(16, 5.0)
    curve.observe(256, 50.0)
    assert curve.at(64) == curve.at(1000) - 45.0 == 5.0


def test_fewer_rows_than_any_seen_are_hoped_to_cost_their_share() -> None:
    """Else what a prompt took would price the first draft, and nothing would ever be drafted."""
    curve = CostCurve()
    curve.observe(128, 4.0)
    assert curve.at(1) < 0.1
    assert curve.at(128) == pytest.approx(4.0)
    curve.observe(1, 2.0)
    assert curve.at(1) == pytest.approx(2.0)


def test_what_a_cold_start_took_is_forgotten_at_once() -> None:
    curve = CostCurve()
    for ms in (30.0, 2.1, 1.9, 2.0):
        curve.observe(4, ms)
    assert curve.at(4) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("rate", [0.0, 0.03])
def test_pauses_that_meet_steps_with_and_without_drafts_do_not_end_drafting(rate: float) -> None:
    """A machine that others use too: some steps take tens of milliseconds, whatever is in them."""
    pausing = replace(CPU, verify=lambda rows: CPU.verify(rows) + 30.0 * (chance.random() < rate))
    chance = random.Random(0)
    simulation = Simulation(AdaptiveDrafts(most=MOST))
    simulation.run(pausing, [0.9], steps=300)
    drafted = 0
    for _ in range(1000):
        simulation.step(pausing, [0.9])
        drafted += any(state.num_tokens for state in simulation.states)
    assert drafted > 800


def test_a_machine_that_slows_down_does_so_for_all_rows() -> None:
    curve = CostCurve()
    for _ in range(50):
        curve.observe(1, 1.0)
        curve.observe(64, 10.0)
    for _ in range(60):
        curve.observe(1, 2.0)
    assert curve.at(64) > 13.5

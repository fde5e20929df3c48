"""The simulated schedules beside published measurements. Nothing is fitted: what a source does not state is an
assumption, and named. `deploy/sizing.md` says what agrees within 15 % and why the rest does not.

    nano-PEARL   github.com/smart-lty/nano-PEARL, docs/bench_summary.md and benchmark.html: H200, drafter on one GPU and
                 target on two, bfloat16, greedy, batch 1; mean accepted tokens (MAT), tokens per second
    PEARL        arXiv 2408.11850: up to 4.43 over plain decoding, up to 1.50 over speculative decoding
    SwiftSpec    arXiv 2506.11309 and DOI 10.1145/3779212.3790246, section 4.3.1 and table 7: 8 H800, Qwen2-72B with
                 Qwen2-1.5B, 4-bit weights, trees of width 8, 8 rows of the target
"""

from __future__ import annotations

from statistics import mean
from typing import NamedTuple

import pytest
from tests.pure.test_plan import machine_of

from paceline.runtime.costmodel.acceptance import chain_tokens, parallel_tokens
from paceline.runtime.costmodel.rounds import Drafting, Setting
from paceline.runtime.costmodel.schedules import stages_of
from paceline.runtime.costmodel.shapes import SHAPES
from paceline.runtime.costmodel.simulate import Ahead, Drafts, Stages, ahead
from paceline.runtime.costmodel.tree import child_chances

CLOSE = 0.15


def off(found: float, published: float) -> float:
    return found / published - 1


# ------------------------------------------------------------------------------------------ PEARL


class Measured(NamedTuple):
    """One data set."""

    plain: float
    """Tokens per second without a drafter."""
    pearl: float
    mat: float
    """Tokens from one mismatch to the next, with the target's own: 1 / (1 - a) where each draft is as likely."""

    @property
    def chance(self) -> float:
        return 1 - 1 / self.mat

    @property
    def speedup(self) -> float:
        return self.pearl / self.plain


NANO_PEARL = {  # AIME, CNN/DM, GSM8K, HumanEval
    ("Llama-3.1-70B", "Llama-3.2-1B"): (
        Measured(44.63, 163.27, 8.50),
        Measured(43.62, 120.94, 5.43),
        Measured(44.46, 276.14, 24.26),
        Measured(44.29, 224.87, 12.75),
    ),
    ("Llama-3.1-70B", "Llama-3.2-3B"): (
        Measured(44.31, 155.51, 10.44),
        Measured(43.08, 126.94, 7.27),
        Measured(44.03, 196.43, 23.14),
        Measured(43.99, 200.06, 20.98),
    ),
    ("Qwen2.5-72B", "Qwen2.5-1.5B"): (
        Measured(43.55, 196.83, 15.08),
        Measured(43.16, 89.86, 3.85),
        Measured(43.24, 136.60, 7.34),
        Measured(43.63, 163.99, 9.65),
    ),
    ("Qwen2.5-72B", "Qwen2.5-3B"): (
        Measured(43.66, 169.98, 17.27),
        Measured(43.08, 90.40, 4.19),
        Measured(43.29, 125.22, 7.65),
        Measured(43.85, 142.66, 10.29),
    ),
    ("Qwen3-32B", "Qwen3-0.6B"): (
        Measured(78.61, 204.39, 6.40),
        Measured(77.77, 134.46, 3.18),
        Measured(78.70, 212.87, 6.94),
        Measured(78.64, 171.26, 4.42),
    ),
    ("Qwen3-32B", "Qwen3-1.7B"): (
        Measured(78.82, 211.42, 7.66),
        Measured(78.19, 148.23, 3.88),
        Measured(78.40, 218.36, 8.78),
        Measured(78.79, 174.99, 5.12),
    ),
}
CONTEXT = 500
"""Assumed: prompts of a few hundred tokens (articles of CNN/DM are longer), 200 to a few hundred new ones."""


def from_data_sheets(target: str, drafter: str) -> Stages:
    """Stages as the cost model has them, on their ranks, with CUDA graphs as theirs."""
    setting = Setting(
        target=SHAPES[target],
        drafter=SHAPES[drafter],
        machine=machine_of("H200"),
        ranks=3,
        batch=1,
        context=CONTEXT,
        acceptance=0.9,
        utilization=0.9,
    )
    way = Drafting(
        num_speculative_tokens=1,
        layer_parallel_size=1,
        draft_tensor_parallel_size=1,
        schedule="ahead",
    )
    return stages_of(setting, way)


def pearl(chance: float, window: int, stages: Stages) -> Ahead:
    drafts = Drafts(exact=(chance,), grouped=(chance,), depth=window, nodes=max(1, window - 1))
    return ahead(stages, drafts, batch=1, passes=800)


def in_step(window: int) -> Stages:
    """The target takes a second; the drafter for a window too, as their windows are chosen."""
    draft_s = 1 / window
    return Stages(first_s=draft_s, later_s=draft_s, verify_s=1.0, plain_s=1.0, telling_s=0.0)


@pytest.mark.parametrize("pair", NANO_PEARL, ids=" + ".join)
def test_plain_decoding_is_as_fast_as_measured_within_15_percent(pair: tuple[str, str]) -> None:
    stages = from_data_sheets(*pair)
    found = 1 / (stages.plain_s + stages.telling_s)
    assert off(found, mean(each.plain for each in NANO_PEARL[pair])) == pytest.approx(0, abs=CLOSE)


def test_from_data_sheets_alone_drafting_ahead_looks_better_than_it_was_measured() -> None:
    """Their drafter prepares every pass in Python and copies every token to the host: 1.1 to 2.3 ms more than here."""
    errors = []
    for pair, sets in NANO_PEARL.items():
        stages = from_data_sheets(*pair)
        period_s = stages.plain_s + stages.telling_s
        for each in sets:
            found = pearl(each.chance, round(period_s / stages.later_s), stages)
            errors.append(off(found.tokens_per_s * period_s, each.speedup))
    assert min(errors) > 0
    assert 0.40 < max(errors) < 0.60
    assert sum(error < CLOSE for error in errors) == pytest.approx(7, abs=2), "of 24"


@pytest.mark.parametrize("pair", NANO_PEARL, ids=" + ".join)
def test_once_the_window_is_known_drafting_ahead_is_as_fast_as_measured(
    pair: tuple[str, str],
) -> None:
    """Windows are not published, but set to the measured ratio of speeds. Here AIME's speed-up tells a pair's, a whole
    number; the speed-ups on the three other data sets are predictions."""
    first, *others = NANO_PEARL[pair]

    def error(window: int) -> float:
        return abs(off(parallel_tokens(first.chance, window), first.speedup))

    window = min(range(2, 25), key=error)
    for each in others:
        found = pearl(each.chance, window, in_step(window))
        assert off(found.tokens_per_s, each.speedup) == pytest.approx(0, abs=CLOSE)


def test_pearls_best_gain_over_speculative_decoding_follows_from_that_over_plain() -> None:
    """A window of 5 with a drafter five times as fast, as the authors run a target of 70B with a drafter of 7B; which
    acceptance gives 4.43 is solved for, and the two best figures are taken to be of one pair."""
    low, high = 0.5, 0.999
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if parallel_tokens(middle, 5) < 4.43 else (low, middle)
    gain = 4.43 / (chain_tokens(low, 5) / 2)
    assert off(gain, 1.50) == pytest.approx(0.04, abs=0.01)


# ------------------------------------------------------------------------------------------ SwiftSpec

SERIAL_MS, PARALLEL_MS = (10.34, 3.73), (10.48, 3.25)
"""A pass of the target, and one of the drafter: on 8 GPUs one after the other; on 6 and 2 apart."""
SERIAL_TOKENS, PARALLEL_TOKENS = 3.63, 3.34
"""Average acceptance length over six data sets; read as tokens of a pass, the target's own among them."""
SERIAL_SPEED, PARALLEL_SPEED = 200, 274
DEPTH = 3
"""Passes of the drafter per round. Assumed, by their rule: the whole number below the ratio of pass times, the same for
both."""


def tree_of(chance: float) -> Drafts:
    """Seven drafts, and the last token, in eight rows."""
    chances = child_chances(chance, 5)
    return Drafts(exact=chances, grouped=chances, depth=DEPTH, width=8, nodes=7)


@pytest.fixture(scope="module")
def swift() -> tuple[float, Ahead]:
    """Tokens per second in lockstep, and what becomes of the same trees ahead. The chance is the one that gives the
    published acceptance length in lockstep."""
    low, high = 0.3, 0.999
    for _ in range(40):
        middle = (low + high) / 2
        tokens = tree_of(middle).round_tokens
        low, high = (middle, high) if tokens < SERIAL_TOKENS else (low, middle)
    verify_ms, draft_ms = SERIAL_MS
    serial = 1e3 * tree_of(low).round_tokens / (verify_ms + DEPTH * draft_ms)
    verify_s, draft_s = (each / 1e3 for each in PARALLEL_MS)
    stages = Stages(
        first_s=draft_s, later_s=draft_s, verify_s=verify_s, plain_s=verify_s, telling_s=0.0
    )
    return serial, ahead(stages, tree_of(low), batch=1, passes=2_000)


def test_swiftspecs_speed_ahead_agrees_within_15_percent(swift: tuple[float, Ahead]) -> None:
    assert off(swift[1].tokens_per_s, PARALLEL_SPEED) == pytest.approx(-0.05, abs=0.03)


def test_swiftspecs_gain_by_drafting_ahead_agrees_within_15_percent(
    swift: tuple[float, Ahead],
) -> None:
    """1.37 for this pair; 1.43 on average over five with fused kernels, 1.50 with ordinary ones."""
    gain = swift[1].tokens_per_s / swift[0]
    assert off(gain, PARALLEL_SPEED / SERIAL_SPEED) == pytest.approx(0.12, abs=0.03)
    assert off(gain, 1.43) < CLOSE
    assert off(gain, 1.50) < CLOSE


def test_swiftspecs_speed_in_lockstep_and_its_tokens_ahead_do_not_agree(
    swift: tuple[float, Ahead],
) -> None:
    """Its own figures leave 7.8 ms of 18.2 for drafting, two passes; a tree that keeps what grew below the accepted
    path is deep all the same, and one whose target waits for a tree after a mismatch loses less."""
    assert off(swift[0], SERIAL_SPEED) == pytest.approx(-0.16, abs=0.01)
    assert off(swift[1].tokens / swift[1].passes, PARALLEL_TOKENS) == pytest.approx(-0.19, abs=0.03)

"""Does speculation change what a model writes? A verdict on the user's own models, by the public
interface alone.

Two questions, asked of the same engine with and without its drafter:

    greedy         is every token the same? Where one differs: by how little did the target prefer its own?
    distribution   are many short sampled continuations of one prompt spread the same way? A two-sample chi-square
                   test on whole continuations; its power is shown by the same test against a slightly hotter target,
                   which must fail.

Method: decoding.md's losslessness suite asks both of toy models; this asks them of real ones.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import msgspec

from paceline.runtime.llm import LLM
from paceline.runtime.outputs import Position, RequestOutput
from paceline.runtime.requests import Prompt
from paceline.runtime.types import SamplingParams

CONTROL_TEMPERATURE_FACTOR = 1.5
NEAR_TIE = 0.1
"""Logit margin that rounding in a 16-bit data type can turn round."""
NEAR_TIE_FLOAT32 = 1e-3
PASS_P_VALUE = 1e-3
CONTROL_P_VALUE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first token at which two greedy texts part."""

    position: int
    """Index in the output."""
    plain: int
    speculative: int
    margin: float
    """The target's best logit minus its second best there, in the plain run: rounding can undo a
    tiny one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyReport:
    prompts: int
    tokens: int
    differences: tuple[Difference, ...]
    near_tie: float
    """Margins up to here are called near-ties: what rounding in the target's data type can turn
    round."""

    @property
    def passed(self) -> bool:
        return all(difference.margin <= self.near_tie for difference in self.differences)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributionReport:
    samples: int
    cells: int
    p_value: float
    """Plain against speculative: small means different."""
    control_p_value: float
    """Plain against plain at another temperature: must be small, or the test could not have seen a
    difference."""

    @property
    def passed(self) -> bool:
        return self.p_value > PASS_P_VALUE and self.powerful

    @property
    def powerful(self) -> bool:
        return self.control_p_value < CONTROL_P_VALUE


def first_difference(plain: RequestOutput, speculative: RequestOutput) -> Difference | None:
    """Where two greedy continuations of one prompt part, if they do. `plain` was asked for two
    log-probabilities per token."""
    ours, theirs = plain.outputs[0], speculative.outputs[0]
    for position, (a, b) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=False)):
        if a != b:
            return Difference(
                position=position, plain=a, speculative=b, margin=_margin(ours.logprobs, position)
            )
    if len(ours.token_ids) != len(theirs.token_ids):
        position = min(len(ours.token_ids), len(theirs.token_ids))
        return Difference(position=position, plain=-1, speculative=-1, margin=math.inf)
    return None


def _margin(logprobs: list[Position] | None, position: int) -> float:
    """Best logit minus second best: log-probabilities differ by the same."""
    assert logprobs is not None, "expected log-probabilities with the plain text"
    best, second = sorted((each.logprob for each in logprobs[position].values()), reverse=True)[:2]
    return best - second


def check_greedy(
    llm: LLM, prompts: list[Prompt], *, max_tokens: int, near_tie: float
) -> GreedyReport:
    """Continue every prompt with and without drafts."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    reporting = msgspec.structs.replace(params, logprobs=2)
    plain = llm.generate(prompts, reporting, num_draft_tokens=0, use_tqdm=False)
    speculative = llm.generate(prompts, params, use_tqdm=False)
    found = [first_difference(a, b) for a, b in zip(plain, speculative, strict=True)]
    return GreedyReport(
        prompts=len(prompts),
        tokens=sum(len(output.outputs[0].token_ids) for output in plain),
        differences=tuple(difference for difference in found if difference is not None),
        near_tie=near_tie,
    )


def check_distribution(
    llm: LLM,
    prompt: Prompt,
    *,
    samples: int,
    num_tokens: int = 3,
    params: SamplingParams | None = None,
) -> DistributionReport:
    """Sample `num_tokens` tokens `samples` times each way, with different seeds, and compare the
    spread."""
    base = params or SamplingParams(temperature=0.8, top_k=4)

    def spread(
        first_seed: int, temperature: float, num_draft_tokens: int | None
    ) -> Counter[tuple[int, ...]]:
        each = [
            msgspec.structs.replace(
                base,
                max_tokens=num_tokens,
                ignore_eos=True,
                seed=first_seed + i,
                temperature=temperature,
            )
            for i in range(samples)
        ]
        outputs = llm.generate(
            [prompt] * samples, each, num_draft_tokens=num_draft_tokens, use_tqdm=False
        )
        return Counter(tuple(output.outputs[0].token_ids) for output in outputs)

    plain = spread(0, base.temperature, 0)
    speculative = spread(samples, base.temperature, None)
    hotter = spread(2 * samples, base.temperature * CONTROL_TEMPERATURE_FACTOR, 0)
    p_value, cells = same_distribution(plain, speculative)
    return DistributionReport(
        samples=samples,
        cells=cells,
        p_value=p_value,
        control_p_value=same_distribution(plain, hotter)[0],
    )


def same_distribution(
    a: Counter[tuple[int, ...]], b: Counter[tuple[int, ...]], *, least: int = 10
) -> tuple[float, int]:
    """Chi-square test that two samples of equal size come from one distribution: p-value and number
    of cells.

    Outcomes seen fewer than `least` times in both together share a cell.
    """
    cells: list[tuple[int, int]] = []
    rare_a = rare_b = 0
    for outcome in sorted(set(a) | set(b)):
        if a[outcome] + b[outcome] < least:
            rare_a, rare_b = rare_a + a[outcome], rare_b + b[outcome]
        else:
            cells.append((a[outcome], b[outcome]))
    if rare_a + rare_b:
        cells.append((rare_a, rare_b))
    statistic = sum((x - y) ** 2 / (x + y) for x, y in cells)
    return _chi_square_tail(statistic, degrees=max(1, len(cells) - 1)), len(cells)


def _chi_square_tail(statistic: float, *, degrees: int) -> float:
    """P(chi-square >= statistic)."""
    import torch

    half = torch.tensor(degrees / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, torch.tensor(statistic / 2, dtype=torch.float64)))

"""The verdict on a user's own models: it must be able to go against us."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.actors.cli import main
from paceline.runtime.lossless import (
    DistributionReport,
    GreedyReport,
    first_difference,
    same_distribution,
)
from paceline.runtime.outputs import CompletionOutput, Logprob, RequestOutput


def output(token_ids: list[int], margins: list[float] | None = None) -> RequestOutput:
    """A text; with margins, as of a target that was asked for its two best tokens."""
    logprobs = None
    if margins is not None:
        logprobs = [
            {token_id: Logprob(logprob=-0.5), 60: Logprob(logprob=-0.5 - margin)}
            for token_id, margin in zip(token_ids, margins, strict=True)
        ]
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=[1],
        outputs=[CompletionOutput(token_ids=token_ids, logprobs=logprobs)],
    )


def draws(weights: list[float], *, count: int, seed: int) -> Counter[tuple[int, ...]]:
    choices = random.Random(seed).choices(range(len(weights)), weights, k=count)
    return Counter((choice,) for choice in choices)


def test_the_first_difference_carries_the_margin_of_the_plain_text() -> None:
    found = first_difference(output([5, 6, 7], [1.0, 0.002, 3.0]), output([5, 9, 7]))
    assert found is not None
    assert (found.position, found.plain, found.speculative) == (1, 6, 9)
    assert found.margin == pytest.approx(0.002)
    assert first_difference(output([5, 6], [1.0, 1.0]), output([5, 6])) is None


def test_texts_of_different_length_are_never_a_near_tie() -> None:
    found = first_difference(output([5, 6], [1.0, 1.0]), output([5]))
    assert found is not None
    report = GreedyReport(prompts=1, tokens=2, differences=(found,), near_tie=0.1)
    assert not report.passed


@pytest.mark.parametrize(("margin", "passed"), [(0.05, True), (0.5, False)])
def test_only_near_ties_are_forgiven(margin: float, passed: bool) -> None:
    found = first_difference(output([5], [margin]), output([6]))
    assert found is not None
    assert GreedyReport(prompts=1, tokens=1, differences=(found,), near_tie=0.1).passed is passed


def test_equal_distributions_pass_and_slightly_different_ones_do_not() -> None:
    weights = [5.0, 3.0, 1.0, 1.0]
    shifted = [5.0, 2.4, 1.6, 1.0]
    plain = draws(weights, count=4000, seed=1)
    assert same_distribution(plain, draws(weights, count=4000, seed=2))[0] > 1e-3
    assert same_distribution(plain, draws(shifted, count=4000, seed=2))[0] < 1e-6


def test_a_sampled_token_that_is_not_among_the_best_does_not_make_a_margin_negative() -> None:
    """Three entries then: the token's own and the two best."""
    plain = output([5], [1.0])
    assert plain.outputs[0].logprobs is not None
    plain.outputs[0].logprobs[0] = {
        5: Logprob(logprob=-9.0),
        6: Logprob(logprob=-0.1),
        7: Logprob(logprob=-0.4),
    }
    found = first_difference(plain, output([6]))
    assert found is not None
    assert found.margin == pytest.approx(0.3)


def test_p_values_of_equal_distributions_are_uniform() -> None:
    weights = [4.0, 3.0, 2.0, 1.0, 1.0]
    values = [
        same_distribution(
            draws(weights, count=500, seed=2 * i), draws(weights, count=500, seed=2 * i + 1)
        )[0]
        for i in range(300)
    ]
    for bound in (0.1, 0.3, 0.5, 0.8):
        assert abs(sum(value < bound for value in values) / 300 - bound) < 0.1


def test_a_test_without_power_is_no_verdict() -> None:
    report = DistributionReport(samples=10, cells=2, p_value=0.7, control_p_value=0.4)
    assert not report.powerful
    assert not report.passed


def test_command_gives_its_verdict(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--distributed-executor-backend", "uni", "--dtype", "float32", "--prompts", "3"]
    flags += ["--samples", "400", "--temperature", "1.0", "--top-k", "5", "--max-tokens", "16"]
    speculative = '{"layer_parallel_size": 2, "num_speculative_tokens": 3}'
    code = main(
        [
            "check-lossless",
            str(tiny(seed=0)),
            str(tiny(seed=0, noise=0.03)),
            "--speculative-config",
            speculative,
            *flags,
        ]
    )
    text = capsys.readouterr().out
    assert code == 0, text
    assert "3 of 3 texts identical" in text
    assert "LOSSLESS" in text.splitlines()[-1]

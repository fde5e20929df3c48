"""The layer-parallel drafter against a plain emulation of its equations, and its calibration."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.tiny import Emulation

from paceline.parallel.launch import solo_mesh
from paceline.runtime.config import make_config
from paceline.runtime.loading import load_drafter
from paceline.runtime.models.arch import read_architecture
from paceline.runtime.spec.draft_model import DraftModel
from paceline.runtime.types import Request, SamplingParams

GROUPS = {
    "pairs": [[0], [1, 2], [3, 4], [5]],
    "threes": [[0, 1, 2], [3, 4, 5]],
    "uneven": [[0], [1, 2, 3, 4], [5]],
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def make_drafter(folder: Path, **settings: object) -> DraftModel:
    speculative = {"model": str(folder), "dtype": "float32", **settings}
    config = make_config({"model": str(folder), "speculative_config": speculative})
    drafter = load_drafter(config, solo_mesh(), num_regions=1)
    assert drafter is not None
    return drafter


def begin(drafter: DraftModel, *, temperature: float = 0.0) -> str:
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(PROMPT),
        params=SamplingParams(temperature=temperature, max_tokens=100),
        seed=5,
    )
    drafter.begin(request, region=0)
    drafter.read("r", PROMPT, start=0)
    return "r"


@pytest.mark.parametrize("placement", ["tensor", "layer"])
@pytest.mark.parametrize("policy", ["attention", "block"])
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_pass_equals_the_emulated_equations(
    tiny: Callable[..., Path], name: str, policy: str, placement: str
) -> None:
    folder, groups = tiny(), GROUPS[name]
    drafter = make_drafter(
        folder, layer_groups=groups, layer_parallel_policy=policy, placement=placement
    )
    begin(drafter)
    oracle = Emulation(folder)
    oracle.logits(PROMPT, start=0, groups=[[i] for i in range(6)], policy=policy)
    with torch.inference_mode():
        for start, tokens in ((12, [7]), (13, [8]), (14, [9, 10])):
            expected = oracle.logits(tokens, start=start, groups=groups, policy=policy)
            rows = drafter.model.rows(drafter.model.tokens(tokens), start=start, region=0)
            found = drafter.model.decoder.logits(drafter._layer_parallel.grouped(rows))
            assert (expected - found).abs().max() < 1e-4


def test_grouping_changes_what_the_drafter_computes(tiny: Callable[..., Path]) -> None:
    """Else the test above could not tell an exact pass from a grouped one."""
    oracle = Emulation(tiny())
    exact = oracle.logits(PROMPT, start=0, groups=[[i] for i in range(6)], policy="block")
    for policy in ("attention", "block"):
        for groups in GROUPS.values():
            grouped = oracle.logits(PROMPT, start=0, groups=groups, policy=policy)
            assert (exact - grouped).abs().max() > 1e-2


@pytest.mark.parametrize("calibration", ["every_round", "on_mismatch", "never"])
@pytest.mark.parametrize("policy", ["attention", "block"])
def test_drafts_follow_the_emulated_rounds(
    tiny: Callable[..., Path], policy: str, calibration: str
) -> None:
    """Whole rounds with arbitrary acceptance: every draft is what the equations and the calibration rule give."""
    folder, groups, exact = tiny(), GROUPS["pairs"], [[i] for i in range(6)]
    drafter = make_drafter(
        folder, layer_groups=groups, layer_parallel_policy=policy, calibration=calibration
    )
    request_id = begin(drafter)
    oracle = Emulation(folder)
    oracle.logits(PROMPT, start=0, groups=exact, policy=policy)
    tokens, precise, filled, mismatch = [*PROMPT, 11], len(PROMPT), len(PROMPT), False
    choices = random.Random(1)
    for _ in range(12):
        with torch.inference_mode():
            draft = drafter.propose(request_id, tokens, num_tokens=3)
        refill = calibration == "every_round" or (calibration == "on_mismatch" and mismatch)
        start = precise if refill else filled
        logits = oracle.logits(
            tokens[start:], start=start, groups=exact if refill else groups, policy=policy
        )
        expected = [int(logits[-1].argmax())]
        for depth in range(2):
            logits = oracle.logits(
                expected[-1:], start=len(tokens) + depth, groups=groups, policy=policy
            )
            expected.append(int(logits[-1].argmax()))
        assert list(draft.token_ids) == expected
        accepted = choices.randrange(4)
        precise = len(tokens) if refill else precise
        filled = len(tokens) + min(accepted, 2)
        mismatch = accepted < 3
        drafter.verified(request_id, num_committed=len(tokens), draft=draft, num_accepted=accepted)
        tokens += [*expected[:accepted], choices.randrange(61)]


@pytest.mark.parametrize("placement", ["tensor", "layer"])
@pytest.mark.parametrize("policy", ["attention", "block"])
def test_calibrated_kv_equals_a_fresh_exact_prefill(
    tiny: Callable[..., Path], policy: str, placement: str
) -> None:
    settings = {
        "layer_parallel_size": 2,
        "layer_parallel_policy": policy,
        "calibration": "every_round",
        "placement": placement,
    }
    drafter = make_drafter(tiny(), **settings)
    request_id = begin(drafter)
    tokens = [*PROMPT, 11]
    choices = random.Random(2)
    for _ in range(6):
        with torch.inference_mode():
            draft = drafter.propose(request_id, tokens, num_tokens=4)
            exact = drafter.rows[request_id].exact
            assert exact == len(tokens)
            fresh = make_drafter(tiny(), **settings)
            fresh.model.decoder.exact(
                fresh.model.rows(fresh.model.tokens(tokens), start=0, region=0)
            )
        for group in range(len(drafter.model.decoder.groups)):
            ours = drafter.model.pool.region(group, 0)[:, :exact]
            theirs = fresh.model.pool.region(group, 0)[:, :exact]
            assert (ours - theirs).abs().max() < 1e-5
        accepted = choices.randrange(5)
        drafter.verified(request_id, num_committed=len(tokens), draft=draft, num_accepted=accepted)
        tokens += [*draft.token_ids[:accepted], choices.randrange(61)]


def test_grouped_rows_are_not_exact_so_calibration_has_something_to_do(
    tiny: Callable[..., Path],
) -> None:
    drafter = make_drafter(tiny(), layer_parallel_size=2, calibration="never")
    request_id = begin(drafter)
    with torch.inference_mode():
        drafter.propose(request_id, [*PROMPT, 11], num_tokens=4)
        before = drafter.model.pool.region(1, 0)[:, 12].clone()
        rows = drafter.model.rows(drafter.model.tokens([11]), start=12, region=0)
        drafter.model.decoder.exact(rows)
    assert (before - drafter.model.pool.region(1, 0)[:, 12]).abs().max() > 1e-3


def test_stored_draft_probabilities_are_those_of_the_grouped_pass(
    tiny: Callable[..., Path],
) -> None:
    """The q of verification is what the token was drawn from, not what a calibrated drafter would say."""
    folder, groups = tiny(), GROUPS["pairs"]
    drafter = make_drafter(folder, layer_groups=groups, layer_parallel_policy="block")
    request_id = begin(drafter, temperature=0.7)
    tokens = [*PROMPT, 11]
    with torch.inference_mode():
        draft = drafter.propose(request_id, tokens, num_tokens=3)
    assert draft.probs_PV is not None
    oracle = Emulation(folder)
    exact = [[i] for i in range(6)]
    oracle.logits(PROMPT, start=0, groups=exact, policy="block")
    first = oracle.logits([11], start=12, groups=groups, policy="block")
    second = oracle.logits([draft.token_ids[0]], start=13, groups=groups, policy="block")
    for row, logits in ((0, first), (1, second)):
        expected = (logits[-1] / 0.7).softmax(-1)
        assert (draft.probs_PV[row] - expected).abs().max() < 1e-4


def test_default_groups_leave_first_and_last_layer_alone(tiny: Callable[..., Path]) -> None:
    drafter = make_drafter(tiny(), layer_parallel_size=3)
    assert [group.layers for group in drafter.model.decoder.groups] == [(0,), (1, 2, 3), (4,), (5,)]
    assert read_architecture(tiny()).num_layers == 6

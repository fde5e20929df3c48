"""The layer-parallel drafter against a plain emulation of its equations, and its calibration."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.paged import Place, ScatteredBlocks, read_kv
from tests.tiny import Emulation
from torch import Tensor

from paceline.parallel.launch import solo_mesh
from paceline.runtime.config import make_config
from paceline.runtime.loading import load
from paceline.runtime.models.arch import read_architecture
from paceline.runtime.sampling.batch import SampleState
from paceline.runtime.sequence import Sequence
from paceline.runtime.spec.calibrate import Calibration, DraftRows
from paceline.runtime.spec.draft_model import DraftModel
from paceline.runtime.spec.drafter import Ask, Draft, Reading
from paceline.runtime.types import Request, SamplingParams

GROUPS = {
    "pairs": [[0], [1, 2], [3, 4], [5]],
    "threes": [[0, 1, 2], [3, 4, 5]],
    "uneven": [[0], [1, 2, 3, 4], [5]],
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


NUM_BLOCKS = 32


class Drafting:
    """A drafter, and one request that it has read the prompt of."""

    def __init__(
        self, folder: Path, *, native: bool, temperature: float = 0.0, **settings: Any
    ) -> None:
        speculative = {"model": str(folder), "dtype": "float32", **settings}
        config = make_config(
            {"model": str(folder), "max_num_seqs": 2, "speculative_config": speculative}
        )
        loaded = load(config, solo_mesh())
        assert loaded.draft_model is not None
        self.drafter: DraftModel = loaded.draft_model
        self.model = self.drafter.model
        self.model._native = native
        params = SamplingParams(temperature=temperature, max_tokens=100)
        request = Request(
            request_id="r", prompt_token_ids=tuple(PROMPT), params=params, seed=5, max_tokens=100
        )
        calibration = Calibration(str(settings.get("calibration", "on_mismatch")))
        self._blocks = ScatteredBlocks(NUM_BLOCKS)
        self.place = Place(self._blocks)
        self.sequence = Sequence(
            request=request,
            token_ids=list(PROMPT),
            seen=0,
            draft_rows=DraftRows(calibration=calibration, grouped=loaded.grouped),
            table=self.place.table,
            sample=SampleState(request, vocab_size=61, device=torch.device("cpu")),
        )
        self.make_room(len(PROMPT))
        self.drafter.propose([], [Reading(sequence=self.sequence, end=len(PROMPT))])

    def beside(self, token_ids: list[int]) -> Sequence:
        """Another request, of which nothing has been read."""
        place = Place(self._blocks)
        place.segment(start=0, num_rows=len(token_ids) + 1)
        return Sequence(
            request=self.sequence.request,
            token_ids=list(token_ids),
            seen=0,
            draft_rows=DraftRows(calibration=self.sequence.draft_rows.calibration, grouped=True),
            table=place.table,
        )

    def make_room(self, end: int) -> None:
        self.place.segment(start=0, num_rows=end)

    @torch.inference_mode()
    def feed(self, token_ids: list[int], *, start: int, grouped: bool) -> Tensor:
        """Logits of a pass of its own, `[T, V]`."""
        segment = self.place.segment(start=start, num_rows=len(token_ids))
        rows = self.model.rows(self.model.tokens(token_ids), [segment])
        run = self.drafter._layer_parallel.grouped if grouped else self.model.decoder.exact
        return self.model.decoder.logits(run(rows))

    @torch.inference_mode()
    def propose(self, num_tokens: int) -> Draft:
        self.make_room(len(self.sequence.token_ids) + num_tokens)
        (draft,), _ = self.drafter.propose([Ask(sequence=self.sequence, num_tokens=num_tokens)], [])
        return draft

    def end_round(self, draft: Draft, *, num_accepted: int, own: int) -> None:
        """The target keeps some drafts and adds a token of its own."""
        self.drafter.verified(
            self.sequence, num_drafted=len(draft.token_ids), num_accepted=num_accepted
        )
        self.sequence.commit([*draft.token_ids[:num_accepted], own])

    def kv(self, group: int, *, num_rows: int) -> Tensor:
        return read_kv(self.model.pool, group, self.place.table, num_rows=num_rows)


@pytest.mark.parametrize("placement", ["tensor", "layer"])
@pytest.mark.parametrize("policy", ["attention", "block"])
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_pass_equals_the_emulated_equations(
    tiny: Callable[..., Path], native: bool, name: str, policy: str, placement: str
) -> None:
    folder, groups = tiny(), GROUPS[name]
    drafting = Drafting(
        folder,
        native=native,
        layer_groups=groups,
        layer_parallel_policy=policy,
        placement=placement,
    )
    oracle = Emulation(folder)
    oracle.logits(PROMPT, start=0, groups=[[i] for i in range(6)], policy=policy)
    for start, tokens in ((12, [7]), (13, [8]), (14, [9, 10]), (16, [11, 12, 13])):
        expected = oracle.logits(tokens, start=start, groups=groups, policy=policy)
        found = drafting.feed(tokens, start=start, grouped=True)
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
    tiny: Callable[..., Path], native: bool, policy: str, calibration: str
) -> None:
    """Whole rounds with arbitrary acceptance: every draft is what the equations and the calibration rule give."""
    folder, groups, exact = tiny(), GROUPS["pairs"], [[i] for i in range(6)]
    drafting = Drafting(
        folder,
        native=native,
        layer_groups=groups,
        layer_parallel_policy=policy,
        calibration=calibration,
    )
    drafting.sequence.commit([11])
    oracle = Emulation(folder)
    oracle.logits(PROMPT, start=0, groups=exact, policy=policy)
    tokens, precise, filled, mismatch = [*PROMPT, 11], len(PROMPT), len(PROMPT), False
    choices = random.Random(1)
    for _ in range(12):
        draft = drafting.propose(3)
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
        own = choices.randrange(61)
        drafting.end_round(draft, num_accepted=accepted, own=own)
        tokens += [*expected[:accepted], own]


@pytest.mark.parametrize("placement", ["tensor", "layer"])
@pytest.mark.parametrize("policy", ["attention", "block"])
def test_calibrated_kv_equals_a_fresh_exact_prefill(
    tiny: Callable[..., Path], native: bool, policy: str, placement: str
) -> None:
    settings: dict[str, Any] = {
        "layer_parallel_size": 2,
        "layer_parallel_policy": policy,
        "calibration": "every_round",
        "placement": placement,
    }
    drafting = Drafting(tiny(), native=native, **settings)
    drafting.sequence.commit([11])
    choices = random.Random(2)
    for _ in range(6):
        tokens = list(drafting.sequence.token_ids)
        draft = drafting.propose(4)
        exact = drafting.sequence.draft_rows.exact
        assert exact == len(tokens)
        fresh = Drafting(tiny(), native=native, **settings)
        fresh.feed(tokens, start=0, grouped=False)
        for group in range(len(drafting.model.decoder.groups)):
            ours, theirs = (each.kv(group, num_rows=exact) for each in (drafting, fresh))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        drafting.end_round(draft, num_accepted=choices.randrange(5), own=choices.randrange(61))


def test_grouped_rows_are_not_exact_so_calibration_has_something_to_do(
    tiny: Callable[..., Path], native: bool
) -> None:
    drafting = Drafting(tiny(), native=native, layer_parallel_size=2, calibration="never")
    drafting.sequence.commit([11])
    drafting.propose(4)
    before = drafting.kv(1, num_rows=13)[:, :, 12]
    drafting.feed([11], start=12, grouped=False)
    assert (before - drafting.kv(1, num_rows=13)[:, :, 12]).abs().max() > 1e-3


def test_stored_draft_probabilities_are_those_of_the_grouped_pass(
    tiny: Callable[..., Path], native: bool
) -> None:
    """The q of verification is what the token was drawn from, not what a calibrated drafter would say."""
    folder, groups = tiny(), GROUPS["pairs"]
    drafting = Drafting(
        folder,
        native=native,
        temperature=0.7,
        layer_groups=groups,
        layer_parallel_policy="block",
        verification="rejection",
    )
    drafting.sequence.commit([11])
    assert drafting.sequence.sample is not None
    draft = drafting.propose(3)
    assert draft.probs_PV is not None
    oracle = Emulation(folder)
    exact = [[i] for i in range(6)]
    oracle.logits(PROMPT, start=0, groups=exact, policy="block")
    first = oracle.logits([11], start=12, groups=groups, policy="block")
    second = oracle.logits([draft.token_ids[0]], start=13, groups=groups, policy="block")
    third = oracle.logits([draft.token_ids[1]], start=14, groups=groups, policy="block")
    for row, logits in enumerate((first, second, third)):
        expected = (logits[-1] / 0.7).softmax(-1)
        assert (draft.probs_PV[row] - expected).abs().max() < 1e-4


def test_requests_that_draft_together_draft_what_they_draft_alone(
    tiny: Callable[..., Path], native: bool
) -> None:
    """Different lengths, different numbers of drafts, one that only reads."""
    settings: dict[str, Any] = {"layer_parallel_size": 2, "layer_parallel_policy": "block"}
    together = Drafting(tiny(), native=native, **settings)
    texts = {
        "a": ([*PROMPT, 11], 2),
        "b": ([5, 3, 1, 2], 5),
        "c": ([7] * 40, 0),
        "d": ([(3 * i) % 61 for i in range(35)], 1),
    }
    sequences = {}
    blocks = ScatteredBlocks(NUM_BLOCKS)
    for name, (token_ids, num_tokens) in texts.items():
        place = Place(blocks)
        place.segment(start=0, num_rows=len(token_ids) + num_tokens)
        sequences[name] = Sequence(
            request=together.sequence.request,
            token_ids=list(token_ids),
            seen=0,
            draft_rows=DraftRows(calibration=Calibration.ON_MISMATCH, grouped=True),
            table=place.table,
        )
    with torch.inference_mode():
        asks = [
            Ask(sequence=sequences[name], num_tokens=num_tokens)
            for name, (_, num_tokens) in texts.items()
            if num_tokens
        ]
        reading = Reading(sequence=sequences["c"], end=40)
        drafts, _ = together.drafter.propose(asks, [reading])
        assert [len(draft.token_ids) for draft in drafts] == [2, 5, 1]
        assert sequences["c"].draft_rows.exact == 40
        alone = []
        for ask in asks:
            sequence = Sequence(
                request=ask.sequence.request,
                token_ids=ask.sequence.token_ids,
                seen=0,
                draft_rows=DraftRows(calibration=Calibration.ON_MISMATCH, grouped=True),
                table=ask.sequence.table,
            )
            # all that was packed was exact for the reading's sake; so must this be
            together.drafter.propose(
                [], [Reading(sequence=sequence, end=len(sequence.token_ids) - 1)]
            )
            sequence.draft_rows._mismatch = True
            (draft,), _ = together.drafter.propose(
                [Ask(sequence=sequence, num_tokens=ask.num_tokens)], []
            )
            alone.append(draft.token_ids)
    assert [draft.token_ids for draft in drafts] == alone


def test_an_exact_pass_over_grouped_rows_does_not_make_them_exact(
    tiny: Callable[..., Path],
) -> None:
    """Where another request's pass must be exact, all are; but what came before stays as it was."""
    drafting = Drafting(tiny(), native=False, layer_parallel_size=2, calibration="never")
    drafting.sequence.commit([11])
    draft = drafting.propose(3)
    drafting.end_round(draft, num_accepted=2, own=7)
    rows = drafting.sequence.draft_rows
    assert (rows.exact, rows.filled) == (len(PROMPT), len(PROMPT) + 3)
    other, ask = drafting.beside([4] * 20), Ask(sequence=drafting.sequence, num_tokens=1)
    with torch.inference_mode():
        drafting.drafter.propose([ask], [Reading(sequence=other, end=20)])
    assert (rows.exact, rows.filled) == (len(PROMPT), len(PROMPT) + 4)
    assert other.draft_rows.exact == 20


@pytest.mark.parametrize("first", [True, False])
def test_one_request_that_must_be_calibrated_makes_the_pass_exact(
    tiny: Callable[..., Path], first: bool
) -> None:
    drafting = Drafting(tiny(), native=False, layer_parallel_size=2, calibration="on_mismatch")
    drafting.sequence.commit([11])
    drafting.end_round(drafting.propose(3), num_accepted=0, own=7)
    wanted, other = len(drafting.sequence.token_ids), drafting.beside([4] * 20)
    asks = [Ask(sequence=each, num_tokens=1) for each in (drafting.sequence, other)]
    with torch.inference_mode():
        drafting.drafter.propose([], [Reading(sequence=other, end=19)])
        assert not other.draft_rows.first_pass(committed=20).exact
        drafting.drafter.propose(asks if first else asks[::-1], [])
    assert drafting.sequence.draft_rows.exact == wanted
    fresh = Drafting(tiny(), native=False, layer_parallel_size=2)
    fresh.feed(list(drafting.sequence.token_ids), start=0, grouped=False)
    for group in range(len(drafting.model.decoder.groups)):
        ours, theirs = (each.kv(group, num_rows=wanted) for each in (drafting, fresh))
        assert (ours - theirs).abs().max() < 1e-5


def test_default_groups_leave_first_and_last_layer_alone(tiny: Callable[..., Path]) -> None:
    groups = Drafting(tiny(), native=False, layer_parallel_size=3).model.decoder.groups
    assert [group.layers for group in groups] == [(0,), (1, 2, 3), (4,), (5,)]
    assert read_architecture(tiny()).num_layers == 6

"""Drafts in one call: those that drafting pass by pass makes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import SHAPE

from paceline.parallel.launch import solo_mesh
from paceline.runtime.config import make_config
from paceline.runtime.layers import cpu_chain, cpu_kernels
from paceline.runtime.layers.cpu_chain import BEST, Drawn
from paceline.runtime.layers.cpu_kernels import load_kernels
from paceline.runtime.loading import Loaded, load
from paceline.runtime.sampling.batch import SampleState
from paceline.runtime.sampling.sampler import draw_coupled, gumbel_noise
from paceline.runtime.sequence import Sequence
from paceline.runtime.spec.calibrate import Calibration, DraftRows
from paceline.runtime.spec.draft_model import DraftModel
from paceline.runtime.spec.drafter import Ask, Draft
from paceline.runtime.types import DraftForm, Request, SamplingParams

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
HOT = SamplingParams(temperature=0.8)
HOTTER = SamplingParams(temperature=1.0)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [(5 * i * i + i) % 61 for i in range(50)]]
WANTED = [2, 6, 1]
FORMS: dict[str, dict[str, Any]] = {
    "exact": {},
    "pairs": {"layer_parallel_size": 2},
    "blocks": {"layer_parallel_size": 4, "layer_parallel_policy": "block"},
}


@pytest.fixture(params=[1, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def loaded(folder: Path, **speculative: Any) -> Loaded:
    config = make_config(
        {
            "model": str(folder),
            "dtype": "float32",
            "max_num_seqs": 4,
            "speculative_config": {"model": str(folder), "dtype": "float32", **speculative},
        }
    )
    return load(config, solo_mesh())


def asks(models: Loaded, params: list[SamplingParams]) -> list[Ask]:
    """Requests with prompts that the drafter has not read, in blocks that are not in order."""
    made, free = [], iter(range(17, 0, -1))
    for index, (prompt, wanted, each) in enumerate(zip(PROMPTS, WANTED, params, strict=True)):
        request = Request(
            request_id=str(index),
            prompt_token_ids=tuple(prompt),
            params=each,
            seed=40 + index,
            max_tokens=50,
        )
        sequence = Sequence(
            request=request,
            token_ids=list(prompt),
            seen=len(prompt) - 1,
            draft_rows=DraftRows(calibration=Calibration.ON_MISMATCH, grouped=models.grouped),
            sample=SampleState(request, vocab_size=models.vocab_size, device=CPU),
        )
        sequence.table.extend(next(free) for _ in range(5))
        made.append(Ask(sequence=sequence, num_tokens=wanted))
    return made


@torch.inference_mode()
def rounds(
    models: Loaded, params: list[SamplingParams], form: DraftForm
) -> tuple[list[list[Draft]], list[tuple[int, int]]]:
    """Two rounds, in which half of what was drafted is kept; and what was read exactly, and at all."""
    drafter = models.draft_model
    assert drafter is not None
    given, found = asks(models, params), []
    for _ in range(2):
        drafts, _ = drafter.propose(given, (), form)
        found.append(drafts)
        for ask, draft in zip(given, drafts, strict=True):
            kept = len(draft.token_ids) // 2
            drafter.verified(ask.sequence, num_drafted=len(draft.token_ids), num_accepted=kept)
            ask.sequence.commit([*draft.token_ids[:kept], 11])
    return found, [(a.sequence.draft_rows.exact, a.sequence.draft_rows.filled) for a in given]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("params", [[GREEDY] * 3, [HOT, GREEDY, HOTTER]], ids=["greedy", "mixed"])
@pytest.mark.parametrize("exact", [False, True], ids=["as configured", "exact form"])
def test_one_call_drafts_what_pass_by_pass_does(
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    params: list[SamplingParams],
    exact: bool,
) -> None:
    models, form = loaded(tiny(seed=3), **FORMS[how]), DraftForm(exact=exact)
    called = []
    chain = DraftModel._chain
    monkeypatch.setattr(DraftModel, "_chain", lambda *args: called.append(1) or chain(*args))
    found, rows = rounds(models, params, form)
    assert len(called) == 2, "expected both rounds in one call each"
    monkeypatch.setattr(DraftModel, "_may_chain", lambda *_: False)
    expected, expected_rows = rounds(models, params, form)
    assert found == expected
    assert rows == expected_rows
    assert len({draft.token_ids for each in found for draft in each}) > 3, "all drafts are alike"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=0.8, top_k=5),
        SamplingParams(temperature=0.8, min_p=0.1),
        SamplingParams(temperature=0.0, repetition_penalty=1.2),
        SamplingParams(temperature=0.8, logit_bias={3: 1.0}),
        SamplingParams(temperature=0.8, min_tokens=3),
    ],
)
def test_laws_that_are_more_than_a_temperature_are_drawn_from_one_by_one(
    tiny: Callable[..., Path], params: SamplingParams
) -> None:
    models = loaded(tiny(seed=3))
    assert models.draft_model is not None
    assert models.draft_model._may_chain(asks(models, [GREEDY, HOT, HOTTER]))
    assert not models.draft_model._may_chain(asks(models, [GREEDY, HOT, params]))


def test_what_the_rejection_rule_needs_is_drawn_one_by_one(tiny: Callable[..., Path]) -> None:
    models = loaded(tiny(seed=3), verification="rejection")
    assert models.draft_model is not None
    assert models.draft_model._may_chain(asks(models, [GREEDY] * 3))
    assert not models.draft_model._may_chain(asks(models, [GREEDY, HOT, GREEDY]))


def test_the_race_is_the_samplers(tiny: Callable[..., Path]) -> None:
    """Over vocabularies that are no whole vectors, at many seeds and positions."""
    models = loaded(tiny(seed=3))
    assert SHAPE["vocab_size"] % 16 != 0
    assert models.draft_model is not None
    model = models.draft_model.model
    assert model.chains is not None
    num_rows = 60
    h = torch.randn(num_rows, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = model.decoder.logits(h)
    draws = [Drawn(seed=row % 7, temperature=0.5 + row % 3, position=10 * row) for row in range(60)]
    temperatures = torch.tensor([[draw.temperature] for draw in draws])
    noise = gumbel_noise(
        [draw.seed for draw in draws],
        [draw.position for draw in draws],
        vocab_size=SHAPE["vocab_size"],
        device=CPU,
    )
    raced = draw_coupled(logits / temperatures, noise).tolist()
    assert model.chains.choose(h.clone(), draws) == raced
    assert model.chains.choose(h.clone(), [BEST] * num_rows) == logits.argmax(dim=-1).tolist()
    assert len(set(raced)) > 10


def test_python_and_c_agree_on_what_a_chain_is() -> None:
    """It is written down twice."""
    library = ctypes.CDLL(str(cpu_kernels._library_path()))
    assert library.chain_bytes() == cpu_chain.STRUCT_BYTES

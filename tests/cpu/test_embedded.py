"""The pair that ships with the package is what its card says, and works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.prompts import held_out
from transformers import AutoModelForCausalLM, AutoTokenizer

import paceline.runtime.models.embedded as embedded
from paceline import LLM, SamplingParams
from paceline.runtime.layers.cpu_kernels import load_kernels
from paceline.runtime.models.arch import read_architecture
from paceline.runtime.models.weights import find_model
from paceline.runtime.requests import TokensPrompt
from paceline.runtime.tokenizer import Tokenizer

TARGET, DRAFTER = find_model("embedded"), find_model("embedded/drafter")


def test_sizes_are_within_their_bounds() -> None:
    assert (TARGET / "model.safetensors").stat().st_size <= 64e6
    assert (DRAFTER / "model.safetensors").stat().st_size <= 6e6
    assert read_architecture(TARGET).num_layers == 24
    assert 6 <= read_architecture(DRAFTER).num_layers <= 8


def test_card_names_every_held_out_file() -> None:
    folder = Path(embedded.__file__).parent
    card = (folder / "README.md").read_text()
    for name in json.loads((folder / "held_out.json").read_text()):
        assert f"`{name}`" in card


def test_tokenizer_is_shared_and_reads_back_what_it_wrote() -> None:
    assert (TARGET / "tokenizer.json").read_bytes() == (DRAFTER / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer(TARGET)
    text = "def f(x):\n    return {'ä€': x ** 2}\n"
    ids = tokenizer.encode(text)
    assert ids == AutoTokenizer.from_pretrained(TARGET)(text)["input_ids"]
    stream = tokenizer.stream()
    assert "".join(stream.feed((i,)) for i in ids) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("folder", [TARGET, DRAFTER], ids=["target", "drafter"])
def test_transformers_reads_the_same_model(folder: Path) -> None:
    prompt = held_out(Tokenizer(folder), count=1, length=64)[0]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    with LLM(str(folder), dtype="float32") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=16)
        found = llm.generate(TokensPrompt(prompt_token_ids=prompt), params)[0].outputs[0].token_ids
    assert found == expected[0, 64:].tolist()


@pytest.mark.parametrize(("size", "policy"), [(1, "attention"), (3, "attention"), (3, "block")])
def test_drafts_are_accepted_and_the_text_stays_the_targets(size: int, policy: str) -> None:
    prompts = [
        TokensPrompt(prompt_token_ids=ids)
        for ids in held_out(Tokenizer(TARGET), count=4, length=128)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    speculative = {
        "layer_parallel_size": size,
        "layer_parallel_policy": policy,
        "draft_length": "fixed",
    }
    with LLM(dtype="float32", speculative_config=speculative) as llm:
        plain = llm.generate(prompts, params, num_draft_tokens=0)
        drafted = llm.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in drafted] == [o.outputs[0].token_ids for o in plain]
    metrics = [o.metrics for o in drafted if o.metrics is not None]
    assert sum(m.accepted for m in metrics) > sum(m.rounds for m in metrics)


@pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_change_no_text_in_bfloat16_either(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pass is one call: its rows do not depend on one another's number."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    prompts = [
        TokensPrompt(prompt_token_ids=ids)
        for ids in held_out(Tokenizer(TARGET), count=12, length=128)
    ]
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=64, ignore_eos=True)
    with LLM(dtype="bfloat16", enable_prefix_caching=False, speculative_config={}) as llm:
        alone = [llm.generate(each, params, num_draft_tokens=0)[0] for each in prompts]
        together = llm.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    assert sum(o.metrics.accepted for o in together if o.metrics is not None) > 0

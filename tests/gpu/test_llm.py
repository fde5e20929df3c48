"""One GPU, in process, without Ray: the same text as the CPU's, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.cpu.conftest import SHAPE, SaveModel
from transformers import LlamaConfig

from paceline import LLM, SamplingParams
from paceline.runtime.errors import ConfigError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPTS = [{"prompt_token_ids": [3, 1, 4, 1, 5]}, {"prompt_token_ids": [9, 2, 6]}]


@pytest.mark.parametrize("tree", ["chain", "beam", "dynamic"])
@pytest.mark.parametrize("policy", ["attention", "block"])
def test_gpu_and_cpu_write_the_same_greedy_text(
    tiny: Callable[..., Path], policy: str, tree: str
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    speculative = {
        "model": str(tiny(seed=0, noise=0.03)),
        "layer_parallel_size": 2,
        "layer_parallel_policy": policy,
        "draft_length": "fixed",
        "tree": tree,
    }
    texts = []
    for device, eager in (("cpu", True), ("cuda", True), ("cuda", False)):
        with LLM(
            str(tiny(seed=0)),
            dtype="float32",
            device=device,
            enforce_eager=eager,
            speculative_config=speculative,
        ) as llm:
            for budget in (0, None):
                outputs = llm.generate(PROMPTS, params, num_draft_tokens=budget)
                texts.append([output.outputs[0].token_ids for output in outputs])
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_drafter_that_is_ahead_on_the_same_gpu_leaves_the_text_as_it_is(
    tiny: Callable[..., Path], temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=64, ignore_eos=True)
    with LLM(
        str(tiny(seed=0)),
        dtype="float32",
        device="cuda",
        distributed_executor_backend="uni",
        speculative_config={"model": str(tiny(seed=0, noise=0.03)), "schedule": "ahead"},
    ) as llm:
        texts = [
            [output.outputs[0].token_ids for output in outputs]
            for outputs in (
                llm.generate(PROMPTS, params, num_draft_tokens=budget) for budget in (0, None, None)
            )
        ]
        assert any(step.draft_passes for step in llm.status().steps)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("eager", [True, False], ids=["launched", "played"])
@pytest.mark.parametrize("block_size", [16, 256])
def test_a_library_that_reads_pages_computes_what_gathering_does(
    save_model: SaveModel, eager: bool, block_size: int
) -> None:
    folder = str(save_model(LlamaConfig(**SHAPE | {"head_dim": 64, "num_key_value_heads": 1}))[0])
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, ignore_eos=True)
    prompts = [{"prompt_token_ids": [7, *range(count)]} for count in (3, 40, 60)]
    found = []
    for backend in ("sdpa", "flash"):
        try:
            with LLM(
                folder,
                dtype="bfloat16",
                device="cuda",
                enforce_eager=eager,
                attention_backend=backend,
                block_size=block_size,
            ) as llm:
                outputs = llm.generate(prompts, params)
        except ConfigError as error:
            assert backend == "flash", "nothing is missing for torch's own"
            pytest.skip(str(error))
        first = [output.outputs[0].logprobs[0] for output in outputs]
        found.append([{token: each.logprob for token, each in one.items()} for one in first])
    for gathered, read in zip(*found, strict=True):
        shared = gathered.keys() & read.keys()
        assert len(shared) >= 3
        assert max(abs(gathered[token] - read[token]) for token in shared) < 0.05


@pytest.mark.parametrize("eager", [True, False], ids=["launched", "played"])
def test_bfloat16_runs_on_a_gpu(tiny: Callable[..., Path], eager: bool) -> None:
    with LLM(str(tiny(seed=0)), dtype="bfloat16", device="cuda", enforce_eager=eager) as llm:
        output = llm.generate(
            PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        )
    assert len(output[0].outputs[0].token_ids) == 8

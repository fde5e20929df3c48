"""A model split over ranks gives the logits of the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.ranks import jobs
from tests.ranks.pool import RankPool
from tests.tiny import Emulation
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "vocab_size": 61,  # divides by neither 2 nor 4
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,  # unequal parts on 2 ranks, fewer heads than ranks on 4
    "head_dim": 8,
    "intermediate_size": 45,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama tied, biased": LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama multi-query": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "mistral": MistralConfig(**SIZES, sliding_window=9),
    "qwen2": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**SIZES),
}
TOKENS = [(7 * i * i + 3 * i) % 61 for i in range(60)]
CHUNKS = [40, 1, 6, 13]


@pytest.mark.parametrize("fixture", ["two_ranks", "four_ranks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_matches_transformers_on_ranks(
    family: str, fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts biases at zero, which would hide a lost one
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    for found in request.getfixturevalue(fixture).run(jobs.logits, str(tmp_path), TOKENS, CHUNKS):
        assert (torch.tensor(found) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("fixture", ["two_ranks", "four_ranks"])
@pytest.mark.parametrize("placement", ["tensor", "layer"])
@pytest.mark.parametrize("policy", ["attention", "block"])
@pytest.mark.parametrize("groups", [[[0], [1, 2], [3, 4], [5]], [[0], [1, 2, 3, 4], [5]]])
def test_both_placements_compute_the_emulated_equations(
    tiny: Callable[..., Path],
    fixture: str,
    placement: str,
    policy: str,
    groups: list[list[int]],
    request: pytest.FixtureRequest,
) -> None:
    """Two KV heads on four ranks: a group's units are dealt by (layer, KV head)."""
    folder, prompt, tokens = tiny(), TOKENS[:12], [7, 8, 9]
    oracle = Emulation(folder)
    oracle.logits(prompt, start=0, groups=[[i] for i in range(6)], policy=policy)
    expected = [
        oracle.logits([token], start=12 + i, groups=groups, policy=policy)[0]
        for i, token in enumerate(tokens)
    ]
    speculative = {
        "layer_groups": groups,
        "layer_parallel_policy": policy,
        "placement": placement,
    }
    pool: RankPool = request.getfixturevalue(fixture)
    for found in pool.run(jobs.grouped_logits, str(folder), prompt, tokens, speculative):
        assert (torch.tensor(found) - torch.stack(expected)).abs().max() < 1e-4

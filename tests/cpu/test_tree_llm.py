"""`LLM` with trees: the same texts as without, whatever their parameters and however little memory
there is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline import LLM, SamplingParams
from paceline.runtime.requests import Prompt, TokensPrompt
from paceline.runtime.types import StructuredOutputs

AS_TOKENS: list[Prompt] = [
    TokensPrompt(prompt_token_ids=prompt)
    for prompt in ([3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9])
]
TREE: dict[str, Any] = {"draft_length": "fixed", "tree": "beam", "tree_width": 5, "tree_nodes": 16}


def test_a_grammar_sees_each_path_as_the_text_it_would_be() -> None:
    """With the embedded pair: tiny models have no tokenizer."""
    words = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3}
    params = [
        SamplingParams(
            temperature=temperature,
            max_tokens=24,
            seed=2,
            structured_outputs=outputs,
        )
        for temperature in (0.0, 0.8)
        for outputs in (
            StructuredOutputs(regex="(ab|ac){3}[0-9]{4}"),
            StructuredOutputs(json=json.dumps(words)),
        )
    ]
    prompts: list[Prompt] = ["def f():\n    return "] * len(params)
    with LLM(dtype="float32", speculative_config={"dtype": "float32", **TREE}) as llm:
        plain = llm.generate(prompts, params, num_draft_tokens=0, use_tqdm=False)
        drafted = llm.generate(prompts, params, use_tqdm=False)
    for a, b in zip(plain, drafted, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
    assert sum(output.metrics.accepted for output in drafted if output.metrics) > 10


@pytest.mark.parametrize("tree", ["beam", "dynamic", "dynamic_threshold"])
def test_preempted_requests_keep_their_texts(tiny: Callable[..., Path], tree: str) -> None:
    """Blocks for fewer than all: trees become chains, and requests take turns."""
    params = SamplingParams(temperature=0.9, max_tokens=60, seed=3, ignore_eos=True)
    speculative = {"model": str(tiny(seed=0, noise=0.03)), "layer_parallel_size": 2}
    texts = []
    each = 2 * 6 * 2 * 2 * 16 * 8 * 4  # two models: layers, KV heads, keys and values
    for num_blocks, drafts in ((30, 0), (8, None)):
        with LLM(
            str(tiny(seed=0)),
            dtype="float32",
            max_model_len=80,
            kv_cache_memory=num_blocks * each,
            speculative_config={**speculative, **TREE, "tree": tree},
        ) as llm:
            outputs = llm.generate(AS_TOKENS, params, num_draft_tokens=drafts, use_tqdm=False)
            preemptions = llm.status().num_preemptions
            texts.append([output.outputs[0].token_ids for output in outputs])
    assert texts[0] == texts[1]
    assert preemptions > 0

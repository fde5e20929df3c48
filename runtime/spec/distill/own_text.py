"""Text that the target writes itself: what its drafter will be asked about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.runtime.llm import LLM
from paceline.runtime.requests import Prompt, TokensPrompt
from paceline.runtime.spec.distill.data import Tokens, Windows
from paceline.runtime.spec.distill.settings import Settings
from paceline.runtime.types import SamplingParams


def write_own_text(settings: Settings, documents: Sequence[Tokens]) -> list[list[int]]:
    """Pieces of documents, an eighth to a half of a window long, and how the target goes on from
    each to its end or the window's."""
    pieces = Windows(
        documents, length=settings.length // 2, seed=settings.seed + 1, what="the data"
    )
    rng = np.random.default_rng(settings.seed)
    prompts: list[list[int]] = [
        pieces[number][: rng.integers(settings.length // 8, settings.length // 2 + 1)].tolist()
        for number in range(settings.own_text)
    ]
    temperatures = settings.own_text_temperatures
    given: list[Prompt] = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    params = [
        SamplingParams(
            temperature=temperatures[number % len(temperatures)],
            max_tokens=settings.length - len(prompt),
            seed=settings.seed + number,
        )
        for number, prompt in enumerate(prompts)
    ]
    with LLM(
        settings.target,
        dtype=settings.dtype,
        device=settings.device,
        max_model_len=settings.length,
        distributed_executor_backend="uni",
    ) as llm:
        outputs = llm.generate(given, params)
    return [
        prompt + list(output.outputs[0].token_ids)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]

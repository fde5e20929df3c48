"""Check on your own models that drafting changes nothing."""

from __future__ import annotations

import argparse
from typing import Any

from paceline.runtime.errors import ConfigError
from paceline.runtime.lossless import (
    NEAR_TIE,
    NEAR_TIE_FLOAT32,
    check_distribution,
    check_greedy,
)
from paceline.runtime.requests import Prompt, TextPrompt, TokensPrompt

NAME = "check-lossless"
POSITIONAL = ("model",)
TEXT = "def read(path):\n    with open(path) as file:\n        return"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="The target.")
    parser.add_argument("drafter", metavar="DRAFTER", help="The drafter.")
    parser.add_argument(
        "--prompts", type=int, default=8, metavar="N", help="Greedy prompts (default: 8)."
    )
    parser.add_argument(
        "--samples", type=int, default=1000, metavar="N", help="Samples each way (default: 1000)."
    )
    parser.add_argument(
        "--near-tie",
        type=float,
        default=None,
        metavar="X",
        help="Logit margin that rounding may turn round (default: 0.001 in float32, else 0.1).",
    )


def run(args: argparse.Namespace) -> int:
    from paceline.actors.cli import engine_settings, open_llm, sampling_params

    if args.prompts < 1 or args.samples < 100:
        raise ConfigError("--prompts must be at least 1 and --samples at least 100")
    settings = engine_settings(args)
    settings["speculative_config"] = _with_drafter(settings.get("speculative_config"), args.drafter)
    params = sampling_params(args)
    with open_llm(settings) as llm:
        dtype = llm.config.dtype if llm.config.dtype != "auto" else llm.facts.arch.dtype
        near_tie = args.near_tie
        if near_tie is None:
            near_tie = NEAR_TIE_FLOAT32 if dtype == "float32" else NEAR_TIE
        prompts = _prompts(
            args.prompts, has_text=llm.facts.tokenizer is not None, vocab=llm.facts.arch.vocab_size
        )
        greedy = check_greedy(llm, prompts, max_tokens=args.max_tokens or 64, near_tie=near_tie)
        identical = greedy.prompts - len(greedy.differences)
        print(
            f"greedy        {identical} of {greedy.prompts} texts identical ({greedy.tokens} tokens)"
        )
        for difference in greedy.differences:
            kind = "near-tie" if difference.margin <= near_tie else "NOT a near-tie"
            print(
                f"              differs at {difference.position}, margin {difference.margin:.5f}: {kind}"
            )
        hot = None if params.greedy else params
        spread = check_distribution(llm, prompts[0], samples=args.samples, params=hot)
        print(
            f"distribution  p = {spread.p_value:.3g} over {spread.cells} cells, {spread.samples} samples each way; "
            f"the control, a hotter target, gives p = {spread.control_p_value:.3g}"
        )
    if not spread.powerful:
        print(
            "verdict       UNDECIDED: too few samples for the test to see even the control; raise --samples"
        )
        return 1
    passed = greedy.passed and spread.passed
    print("verdict       " + ("LOSSLESS" if passed else "NOT LOSSLESS"))
    return 0 if passed else 1


def _with_drafter(config: Any, drafter: str) -> dict[str, Any]:
    import json

    values = json.loads(config) if isinstance(config, str) else dict(config or {})
    return {**values, "model": drafter}


def _prompts(count: int, *, has_text: bool, vocab: int) -> list[Prompt]:
    """Different beginnings, as text or, for a model without a tokenizer, as ids."""
    if has_text:
        return [TextPrompt(prompt=f"# {i}\n{TEXT}") for i in range(count)]
    return [
        TokensPrompt(prompt_token_ids=[(7 * i + 3 * j) % vocab for j in range(16)])
        for i in range(count)
    ]

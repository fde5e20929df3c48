"""Batch 1, greedy: Paceline plain and speculative beside transformers plain, assisted and by prompt lookup.

Every prompt is run by every system before the next prompt, so that a drifting machine is fair to all; each system's
time is the whole call, prompt included. Paceline's ranks are Ray actors; transformers has all cores in this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import prompts, report
from paceline import SamplingParams
from paceline.actors.app import ray_llm
from paceline.runtime.llm import LLM
from paceline.runtime.lossless import first_difference
from paceline.runtime.models.weights import find_model
from paceline.runtime.outputs import CompletionOutput, RequestOutput
from paceline.runtime.requests import TokensPrompt

EXPECTED = {
    "speculative_over_plain": (">=", 1.5),
    "speculative_over_transformers_best": (">=", 1.5),
}
SPECULATION = {
    "layer_parallel_size": 4,
    "layer_parallel_policy": "block",
    "draft_length": "fixed",
}

Answer = tuple[list[int], dict[str, Any]]
System = Callable[[list[int]], Answer]


def paceline(llm: LLM, *, max_tokens: int, num_draft_tokens: int | None) -> System:
    """One prompt through an engine, with drafts or without."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)

    def run(prompt: list[int]) -> Answer:
        output = llm.generate(
            [TokensPrompt(prompt_token_ids=prompt)],
            params,
            use_tqdm=False,
            num_draft_tokens=num_draft_tokens,
        )[0]
        metrics, completion = output.metrics, output.outputs[0]
        assert metrics is not None
        facts = {
            "rounds": metrics.rounds,
            "drafted": metrics.drafted,
            "accepted": metrics.accepted,
            "calibrate_ms": metrics.times.calibrate_ms,
            "draft_ms": metrics.times.draft_ms,
            "verify_ms": metrics.times.verify_ms,
            "decode_s": metrics.decode_s,
        }
        return completion.token_ids, facts

    return run


def transformers_systems(
    model: str, drafter: str, *, max_tokens: int, dtype: torch.dtype
) -> dict[str, System]:
    """transformers' three ways, on all cores of this process."""
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(find_model(model), dtype=dtype).eval()
    assistant = AutoModelForCausalLM.from_pretrained(find_model(drafter), dtype=dtype).eval()
    eos = target.generation_config.eos_token_id

    def system(**extra: Any) -> System:
        def run(prompt: list[int]) -> Answer:
            ids = torch.tensor([prompt])
            out = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                pad_token_id=eos[0] if isinstance(eos, list) else eos,
                **extra,
            )
            return out[0, len(prompt) :].tolist(), {}

        return run

    return {
        "transformers plain": system(),
        "transformers assisted": system(assistant_model=assistant),
        "transformers prompt lookup": system(prompt_lookup_num_tokens=5),
    }


def measure(
    systems: dict[str, System], given: list[list[int]], rows: list[report.Row], *, dtype: str
) -> None:
    """Every prompt through every system; one row each."""
    for name, run in systems.items():
        report.say(f"  warming up {name}")
        run(given[0])
    for number, prompt in enumerate(given):
        for name, run in systems.items():
            start = time.perf_counter()
            tokens, facts = run(prompt)
            seconds = time.perf_counter() - start
            rows.append(
                {
                    "system": name,
                    "dtype": dtype,
                    "prompt": number,
                    "tokens": len(tokens),
                    "seconds": seconds,
                    "token_ids": tokens,
                    **facts,
                }
            )
        report.say(f"  prompt {number + 1}/{len(given)}")


def summary(rows: list[report.Row]) -> list[report.Row]:
    """Per system and dtype: tokens per second, acceptance, and where its text leaves Paceline plain's."""
    plain = {
        (row["dtype"], row["prompt"]): row["token_ids"]
        for row in rows
        if row["system"] == "paceline plain"
    }
    found = []
    for system, dtype in dict.fromkeys((row["system"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["system"], row["dtype"]) == (system, dtype)]
        same = sum(row["token_ids"] == plain[dtype, row["prompt"]] for row in mine)
        rounds = sum(row.get("rounds", 0) for row in mine)
        drafted = sum(row.get("drafted", 0) for row in mine)
        accepted = sum(row.get("accepted", 0) for row in mine)
        found.append(
            {
                "system": system,
                "dtype": dtype,
                "tokens/s": sum(row["tokens"] for row in mine)
                / sum(row["seconds"] for row in mine),
                "accepted per round": accepted / rounds if drafted else "",
                "texts equal to plain": f"{same}/{len(mine)}",
            }
        )
    return found


def near_ties(
    llm: LLM, rows: list[report.Row], given: list[list[int]], *, dtype: str, max_tokens: int
) -> list[dict[str, Any]]:
    """Where Paceline's speculative text left its plain one, and by what margin plain chose. Plain
    is asked again, for log-probabilities: they cost time, so no timed run reports them."""
    texts = {
        (row["system"], row["prompt"]): row["token_ids"] for row in rows if row["dtype"] == dtype
    }
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=2)
    found = []
    for number, prompt in enumerate(given):
        drafted = texts["paceline speculative", number]
        if drafted == texts["paceline plain", number]:
            continue
        tokens = TokensPrompt(prompt_token_ids=prompt)
        (plain,) = llm.generate(tokens, params, num_draft_tokens=0, use_tqdm=False)
        speculative = RequestOutput(
            request_id=str(number),
            prompt=None,
            prompt_token_ids=prompt,
            outputs=[CompletionOutput(token_ids=drafted)],
        )
        difference = first_difference(plain, speculative)
        if difference is not None:
            found.append(
                {
                    "dtype": dtype,
                    "prompt": number,
                    "position": difference.position,
                    "margin": difference.margin,
                }
            )
    return found


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=96)
    args = parser.parse_args()
    count = 3 if args.quick else 12
    dtypes = ("bfloat16",) if args.quick else ("bfloat16", "float32")
    made = report.Report(
        name="speculation",
        settings={
            **vars(args),
            "prompts": count,
            "prompt_tokens": 128,
            "speculative_config": SPECULATION,
        },
        expected=EXPECTED,
    )
    differing: list[dict[str, Any]] = []
    for dtype in dtypes:
        report.say(f"{dtype}")
        speculative = {"model": args.speculative_model, **SPECULATION}
        with ray_llm(
            args.model,
            dtype=dtype,
            tensor_parallel_size=args.tensor_parallel_size,
            max_num_seqs=1,
            enable_prefix_caching=False,  # every system reads every prompt
            speculative_config=speculative,
        ) as llm:
            assert llm.facts.tokenizer is not None, "expected a model with a tokenizer"
            given = prompts.given(args.prompts_file, llm.facts.tokenizer, count=count, length=128)
            systems = {
                "paceline plain": paceline(llm, max_tokens=args.max_tokens, num_draft_tokens=0),
                "paceline speculative": paceline(
                    llm, max_tokens=args.max_tokens, num_draft_tokens=None
                ),
                **transformers_systems(
                    args.model,
                    args.speculative_model,
                    max_tokens=args.max_tokens,
                    dtype=getattr(torch, dtype),
                ),
            }
            measure(systems, given, made.rows, dtype=dtype)
            differing += near_ties(llm, made.rows, given, dtype=dtype, max_tokens=args.max_tokens)
    table = summary(made.rows)
    speed = {(row["system"], row["dtype"]): row["tokens/s"] for row in table}

    def best(prefix: str) -> float:
        return float(
            max(value for (system, _), value in speed.items() if system.startswith(prefix))
        )

    for dtype in dtypes:
        ours = speed["paceline speculative", dtype]
        made.ratios[f"speculative_over_plain_{dtype}"] = ours / speed["paceline plain", dtype]
    made.ratios["speculative_over_plain"] = made.ratios[f"speculative_over_plain_{dtypes[0]}"]
    made.ratios["best_speculative_over_best_plain"] = best("paceline speculative") / best(
        "paceline plain"
    )
    made.ratios["speculative_over_transformers_best"] = best("paceline speculative") / best(
        "transformers"
    )
    made.notes["texts that differ from plain"] = differing
    made.print(list(table[0]), table)
    made.write(args.output)


if __name__ == "__main__":
    main()

"""How many drafted tokens the target accepts, exact and in layer groups, on held-out files.

    python -m paceline.runtime.models.embedded.evaluate --target DIR --drafter DIR [--drafter DIR]

Greedy chain drafting with calibration in every round.  Because the target is greedy its text is
known beforehand, and because of the calibration what the drafter proposes after a prefix depends
on the prefix alone.  So all rounds that could start anywhere are drafted at once, and the real
rounds are then read off by walking the text:

    text        p p p p|g g g g g g g g g g ...
    round              ^ drafts 5, say 2 accepted
    next round               ^ 2 accepted tokens and the target's own one later
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

if not __package__:  # run as a plain file, see recipe.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "embedded"

from .corpus import SourceFile, Tokens, collect, encode, unpack
from .export import load_model
from .lm import Grouping, Llama, Passes, Weights, continue_text, logits

log = logging.getLogger("embedded")

CHAIN = 5
EXACT = Grouping(policy="block", size=1)
MEASURED = (
    EXACT,
    *(Grouping(policy=policy, size=n) for policy in ("attention", "block") for n in (2, 3, 4)),
)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Held-out prompts with the target's greedy continuation, `tokens [S, prompt+new+CHAIN]`."""

    tokens: Tensor
    prompt: int
    num_new: int


def cut_prompts(documents: list[Tokens], *, count: int, length: int, seed: int = 0) -> Tensor:
    """`count` prompts `[S, length]`, one document after another, at random places."""
    rng = np.random.default_rng(seed)
    prompts = []
    for index in range(count):
        ids = documents[index % len(documents)]
        start = int(rng.integers(max(1, len(ids) - length)))
        prompts.append(ids[start : start + length].astype(np.int64))
    return torch.from_numpy(np.stack(prompts))


def greedy_texts(target: Llama, prompts: Tensor, *, num_new: int) -> Texts:
    """Let the target continue every prompt; `CHAIN` spare tokens judge the last round."""
    passes = Passes(target.shape, compiled=False)
    with torch.no_grad():
        weights = target.weights(torch.float32)
    tokens = continue_text(passes, weights, prompts, num_new=num_new + CHAIN)
    return Texts(tokens=tokens, prompt=prompts.shape[1], num_new=num_new)


@torch.no_grad()
def accepted_anywhere(drafter: Llama, texts: Texts, *, grouping: Grouping) -> Tensor:
    """Accepted drafted tokens of a round after every prefix `[S, C]`, prefix = prompt + column.

    The grouped pass runs over all rounds' drafted tokens together, `U = C * depth`, a token seeing
    its round's prefix and its round's earlier drafted tokens.
    """
    passes = Passes(drafter.shape, compiled=False)
    weights = drafter.weights(torch.float32)
    tokens, count = texts.tokens, texts.num_new
    x, past = passes.exact(tokens, weights)
    lengths = texts.prompt + torch.arange(count)
    drafted = logits(drafter.shape, x[:, lengths - 1], weights).argmax(-1)[..., None]  # [S, C, 1]
    for _ in range(CHAIN - 1):
        scores = _draft_next(passes, weights, drafted, past, lengths, grouping=grouping)
        drafted = torch.cat((drafted, scores.argmax(-1)[..., None]), dim=-1)
    wanted = torch.stack([tokens[:, lengths + i] for i in range(CHAIN)], dim=-1)
    return (drafted == wanted).int().cumprod(-1).sum(-1)


def _draft_next(
    passes: Passes,
    weights: Weights,
    drafted: Tensor,
    past: list[tuple[Tensor, Tensor]],
    lengths: Tensor,
    *,
    grouping: Grouping,
) -> Tensor:
    """Logits `[S, C, V]` after the `drafted [S, C, depth]` tokens of every round."""
    depth, num_exact = drafted.shape[2], past[0][0].shape[2]
    begins = lengths.repeat_interleave(depth)  # [U]
    positions = begins + torch.arange(depth).repeat(len(lengths))
    exact = torch.arange(num_exact) < begins[:, None]
    own = (begins[:, None] == begins) & (positions <= positions[:, None])
    seen = torch.cat((exact, own), dim=1)
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    x = passes.grouped(
        drafted.flatten(1),
        weights,
        positions=positions,
        past=past,
        mask=mask,
        grouping=grouping,
    )
    return logits(passes.shape, x[:, depth - 1 :: depth], weights)


def per_round(accepted: Tensor) -> float:
    """Walk every text of `accepted [S, C]` round by round; mean accepted tokens per round."""
    total = rounds = 0
    for row in accepted.tolist():
        at = 0
        while at < len(row):
            total, rounds, at = total + row[at], rounds + 1, at + row[at] + 1
    return total / rounds


def measure(drafter: Llama, texts: Texts) -> dict[str, float]:
    """Mean accepted per round for every grouping of `MEASURED`."""
    figures = {}
    for grouping in MEASURED:
        name = "exact" if grouping.size == 1 else f"{grouping.policy} N={grouping.size}"
        parts = [
            accepted_anywhere(
                drafter,
                Texts(tokens=block, prompt=texts.prompt, num_new=texts.num_new),
                grouping=grouping,
            )
            for block in torch.split(texts.tokens, 4)
        ]
        figures[name] = round(per_round(torch.cat(parts)), 3)
    return figures


def acceptance(
    target: Llama,
    drafters: dict[str, Llama],
    documents: list[Tokens],
    *,
    num_prompts: int = 24,
    prompt: int = 128,
    num_new: int = 96,
) -> dict[str, dict[str, float]]:
    """The acceptance table of several drafters against one target."""
    texts = greedy_texts(
        target, cut_prompts(documents, count=num_prompts, length=prompt), num_new=num_new
    )
    return {name: measure(drafter, texts) for name, drafter in drafters.items()}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure acceptance on held-out files.")
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True, action="append")
    parser.add_argument("--corpus", type=Path, help="packed corpus; default: this interpreter's")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the table as JSON here")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    files: list[SourceFile] = unpack(options.corpus) if options.corpus is not None else collect()
    tokenizer = Tokenizer.from_file(str(options.target / "tokenizer.json"))
    documents = encode(tokenizer, [file for file in files if file.is_held_out])
    drafters = {str(folder): load_model(folder) for folder in options.drafter}
    table = acceptance(load_model(options.target), drafters, documents, num_prompts=options.prompts)
    for name, figures in table.items():
        log.info("%s %s", name, figures)
    if options.output is not None:
        options.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()

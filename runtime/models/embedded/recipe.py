"""Train the embedded pair: tokenizer, target, then a drafter distilled from the target.

    python -m paceline.runtime.models.embedded.recipe --output DIR
    python runtime/models/embedded/recipe.py --output DIR        # the same, without the package

Writes `DIR/target`, `DIR/drafter`, `DIR/held_out.json` and `DIR/figures.json`.  All budgets are in
tokens, so every machine trains the same pair; a faster one only takes less time.

Distillation knows how the drafter will be run (`lm.py` has the equations).  A window is cut into
rounds of `CHAIN` tokens as drafting would be:

    position in the round     0          1      2      3      4
    stream E (exact)          E          E      E      E      E       loss: KL to the target
    stream F (grouped)        -          F      F      F      F       loss: KL to the target
    F attends to              all E rows up to and including 0, then F rows of its own round

Every step draws one of `GROUPINGS` for stream F, so one drafter serves them all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if not __package__:  # run as a plain file: the siblings are found as a package of their own
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "embedded"

from .corpus import (
    Encoded,
    SourceFile,
    collect,
    encode_parts,
    mixed_windows,
    pack,
    save_tokenizer,
    train_tokenizer,
    unpack,
)
from .export import load_model, save_model
from .lm import (
    DRAFTER,
    TARGET,
    Grouping,
    Llama,
    Passes,
    Shape,
    Weights,
    continue_text,
    logits,
    maybe_compile,
    rms_norm,
)
from .optimizer import PairOptimizer, schedule

log = logging.getLogger("embedded")

CHAIN = 5
GROUPINGS = (
    *(Grouping(policy="block", size=size) for size in (2, 3, 4, 6)),
    *(Grouping(policy="attention", size=size) for size in (2, 3, 4)),
)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training at one window length."""

    length: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Everything a stage may be tuned by."""

    phases: tuple[Phase, ...]
    batch_tokens: int
    matrix_rate: float
    other_rate: float
    share_of_tests: float
    weight_decay: float = 0.0
    cooldown: float = 0.7
    warmup: int = 30

    def num_steps(self) -> int:
        """Optimizer steps over all phases."""
        return sum(phase.tokens // self.batch_tokens for phase in self.phases)

    def scaled(self, factor: float) -> Budget:
        """The same recipe on a share of the tokens."""
        phases = [replace(phase, tokens=int(phase.tokens * factor)) for phase in self.phases]
        return replace(self, phases=tuple(phases))


TARGET_BUDGET = Budget(
    phases=(Phase(length=256, tokens=5_400_000), Phase(length=512, tokens=1_000_000)),
    batch_tokens=4096,
    matrix_rate=0.02,
    other_rate=0.004,
    share_of_tests=0.3,
)
DRAFTER_BUDGET = Budget(
    phases=(Phase(length=256, tokens=3_600_000),),
    batch_tokens=4096,
    matrix_rate=0.02,
    other_rate=0.004,
    share_of_tests=0.2,
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and in which types the passes run."""

    device: torch.device
    compiled: bool
    dtype: torch.dtype = torch.bfloat16


@dataclass
class Record:
    """What a stage measured, for `figures.json`."""

    stage: str
    seconds: float = 0.0
    tokens: int = 0
    steady_tokens_per_s: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def batches(
    parts: Encoded, budget: Budget, *, device: torch.device, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """Every step's `(step, tokens [S, length+1])` over all phases."""
    rng, step = np.random.default_rng(seed), itertools.count()
    for phase in budget.phases:
        source = mixed_windows(
            parts, length=phase.length + 1, share_of_tests=budget.share_of_tests, rng=rng
        )
        rows = budget.batch_tokens // phase.length
        for _ in range(phase.tokens // budget.batch_tokens):
            block = np.stack(list(itertools.islice(source, rows))).astype(np.int64)
            yield next(step), torch.from_numpy(block).to(device)


def cross_entropy(x: Tensor, norm: Tensor, embedding: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Mean next-token loss of hidden states `x [S, T, E]` for `labels [S, T]`."""
    scores = functional.linear(rms_norm(x, norm, eps), embedding).float()
    return functional.cross_entropy(scores.flatten(0, 1), labels.flatten())


def divergence(x: Tensor, norm: Tensor, embedding: Tensor, teacher: Tensor, eps: float) -> Tensor:
    """Mean KL(target || drafter) of `x [S, U, E]` against the target's logits `[S, U, V]`."""
    ours = functional.linear(rms_norm(x, norm, eps), embedding).float().log_softmax(-1)
    theirs = teacher.float().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


class Pace:
    """Times the steps of a stage and logs now and then."""

    def __init__(self, stage: str, *, num_steps: int, batch_tokens: int) -> None:
        self.record = Record(stage=stage)
        self._num_steps, self._batch_tokens = num_steps, batch_tokens
        self._start = self._last = time.perf_counter()
        self._fast: list[float] = []

    def tick(self, step: int, values: dict[str, Tensor]) -> None:
        """Note one finished step."""
        now = time.perf_counter()
        self._fast.append(now - self._last)
        self._last = now
        self.record.tokens += self._batch_tokens
        self.record.seconds = now - self._start
        if step % 25 == 0 or step == self._num_steps - 1:
            numbers = {name: round(value.item(), 4) for name, value in values.items()}
            self.record.curve.append({"step": step, **numbers})
            # The median step leaves compilation out.
            self.record.steady_tokens_per_s = self._batch_tokens / float(np.median(self._fast))
            log.info(
                "%s %d/%d %s %.0f tokens/s %.0f s",
                self.record.stage,
                step,
                self._num_steps,
                numbers,
                self.record.steady_tokens_per_s,
                self.record.seconds,
            )


class Checkpoint:
    """A stage's state on disk every `every` steps, so that a killed run can go on."""

    def __init__(self, path: Path, *, every: int = 200) -> None:
        self.path, self._every = path, every

    def restore(self, model: Llama, optimizer: PairOptimizer) -> int:
        """Load what is there; returns the number of finished steps."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state(state["optimizer"])
        log.info("resumed %s at step %d", self.path.stem, state["steps"])
        return int(state["steps"])

    def after(self, step: int, model: Llama, optimizer: PairOptimizer) -> None:
        """Write every now and then, whole files only."""
        if (step + 1) % self._every == 0:
            fresh = self.path.with_suffix(".partial")
            state = {"model": model.state_dict(), "optimizer": optimizer.state()}
            torch.save(state | {"steps": step + 1}, fresh)
            fresh.rename(self.path)


def train_target(
    parts: Encoded, budget: Budget, *, machine: Machine, checkpoint: Checkpoint, seed: int = 1
) -> tuple[Llama, Record]:
    """Next-token training of the target."""
    model = Llama(TARGET, generator=torch.Generator().manual_seed(seed)).to(machine.device)
    passes = Passes(TARGET, compiled=machine.compiled)
    loss_of = maybe_compile(cross_entropy, compiled=machine.compiled)
    optimizer = _optimizer(model, budget)
    total = budget.num_steps()
    done = checkpoint.restore(model, optimizer)
    pace = Pace("target", num_steps=total, batch_tokens=budget.batch_tokens)
    for step, tokens in batches(parts, budget, device=machine.device, seed=seed):
        if step < done:
            continue
        weights = model.weights(machine.dtype)
        x, _ = passes.exact(tokens[:, :-1].contiguous(), weights)
        loss = loss_of(
            x,
            weights.final_norm,
            weights.embedding,
            tokens[:, 1:].contiguous(),
            TARGET.norm_eps,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(factor=_factor(step, total, budget))
        pace.tick(step, {"loss": loss.detach()})
        checkpoint.after(step, model, optimizer)
    return model, pace.record


def _optimizer(model: Llama, budget: Budget) -> PairOptimizer:
    return PairOptimizer(
        model.matrices(),
        model.others(),
        matrix_rate=budget.matrix_rate,
        other_rate=budget.other_rate,
        weight_decay=budget.weight_decay,
    )


def _factor(step: int, total: int, budget: Budget) -> float:
    return schedule(step, total=total, warmup=budget.warmup, cooldown=budget.cooldown)


def rounds(*, length: int, offset: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cut a window into drafting rounds that start at `offset`.

    Returns the positions of the drafted tokens `[U]` and the additive mask `[U, T+U]` that lets
    each see the exact rows up to its round's first token and its own round's drafted rows.
    """
    num_rounds = (length - CHAIN + 1) // CHAIN
    first = offset + CHAIN * torch.arange(num_rounds, device=device)
    starts = first.repeat_interleave(CHAIN - 1)
    inside = torch.arange(1, CHAIN, device=device).repeat(num_rounds)
    positions = starts + inside
    exact = torch.arange(length, device=device) <= starts[:, None]
    own = (starts[:, None] == starts) & (positions <= positions[:, None])
    seen = torch.cat((exact, own), dim=1)
    return positions, torch.zeros(seen.shape, device=device).masked_fill(~seen, float("-inf"))


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What the drafter learns from: both streams, and text the target wrote itself."""

    grouped_weight: float = 0.7
    """Weight of stream F's loss against stream E's; 0 trains the control."""
    own_text_tokens: int = 200_000
    """Greedy text to let the target write, prompts included."""
    own_text_every: int = 3
    """Every how many steps one is taken from that text."""


def write_text(
    target: Llama, parts: Encoded, *, tokens: int, machine: Machine, seed: int = 3
) -> Tensor:
    """Windows `[N, 257]` that the target continued greedily from training text."""
    rng, length, rows = np.random.default_rng(seed), 257, 256
    source = mixed_windows(parts, length=length, share_of_tests=0.1, rng=rng)
    passes = Passes(target.shape, compiled=False)
    with torch.no_grad():
        weights = target.weights(machine.dtype)
    written = []
    for _ in range(max(1, tokens // (length * rows))):
        prompt = int(rng.integers(48, 129))
        block = np.stack(list(itertools.islice(source, rows)))[:, :prompt].astype(np.int64)
        known = torch.from_numpy(block).to(machine.device)
        written.append(continue_text(passes, weights, known, num_new=length - prompt))
    return torch.cat(written)


def lesson(
    student: Passes, weights: Weights, tokens: Tensor, *, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[S, T, E]`, `[S, U, E]` of both streams and the positions `[U]` of F's."""
    x, rows = student.exact(tokens, weights)
    grouping = GROUPINGS[int(rng.integers(len(GROUPINGS)))]
    positions, mask = rounds(
        length=tokens.shape[1], offset=int(rng.integers(CHAIN)), device=tokens.device
    )
    fuzzy = student.grouped(
        tokens[:, positions],
        weights,
        positions=positions,
        past=rows,
        mask=mask,
        grouping=grouping,
    )
    return x, fuzzy, positions


def distil(
    target: Llama,
    parts: Encoded,
    budget: Budget,
    *,
    machine: Machine,
    plan: Distillation,
    checkpoint: Checkpoint,
    own_text: Tensor,
    seed: int = 2,
) -> tuple[Llama, Record]:
    """Train the drafter on the target's distributions, exact and in groups."""
    model = Llama(DRAFTER, generator=torch.Generator().manual_seed(seed)).to(machine.device)
    teacher, student = (Passes(s, compiled=machine.compiled) for s in (TARGET, DRAFTER))
    loss_of = maybe_compile(divergence, compiled=machine.compiled)
    optimizer, total = _optimizer(model, budget), budget.num_steps()
    with torch.no_grad():
        frozen = target.weights(machine.dtype)
    done = checkpoint.restore(model, optimizer)
    pace = Pace("drafter", num_steps=total, batch_tokens=budget.batch_tokens)
    rng = np.random.default_rng(seed)
    for step, block in batches(parts, budget, device=machine.device, seed=seed):
        if step < done:
            continue
        tokens = block[:, :-1].contiguous()
        if step % plan.own_text_every == 0 and len(own_text):
            picked = torch.from_numpy(rng.integers(len(own_text), size=len(block)))
            tokens = own_text[picked, :-1]
        with torch.no_grad():
            wanted = logits(TARGET, teacher.exact(tokens, frozen)[0], frozen)
        weights = model.weights(machine.dtype)
        head = (weights.final_norm, weights.embedding)
        if plan.grouped_weight > 0:
            x, fuzzy, positions = lesson(student, weights, tokens, rng=rng)
            exact = loss_of(x, *head, wanted, DRAFTER.norm_eps)
            grouped = loss_of(fuzzy, *head, wanted[:, positions], DRAFTER.norm_eps)
            loss = exact + plan.grouped_weight * grouped
            values = {"exact_kl": exact.detach(), "grouped_kl": grouped.detach()}
        else:
            x, _ = student.exact(tokens, weights)
            loss = loss_of(x, *head, wanted, DRAFTER.norm_eps)
            values = {"exact_kl": loss.detach()}
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(factor=_factor(step, total, budget))
        pace.tick(step, values)
        checkpoint.after(step, model, optimizer)
    return model, pace.record


@torch.no_grad()
def held_out_windows(parts: Encoded, *, length: int, device: torch.device) -> Tensor:
    """Consecutive windows `[S, length+1]` of every held-out file, at most 8 per file."""
    cut = []
    for ids in parts.held_out:
        for start in range(0, min(len(ids), 8 * length) - length, length):
            cut.append(ids[start : start + length + 1].astype(np.int64))
    return torch.from_numpy(np.stack(cut)).to(device)


@torch.no_grad()
def held_out_figures(
    target: Llama, drafter: Llama | None, parts: Encoded, *, machine: Machine, length: int = 512
) -> dict[str, float]:
    """Held-out losses in nats per token, and how often both argmaxes agree on the text."""
    tokens = held_out_windows(parts, length=length, device=machine.device)
    sums: dict[str, float] = {"target_loss": 0.0}
    if drafter is not None:
        sums |= {"drafter_loss": 0.0, "kl": 0.0, "agreement": 0.0}
    models: list[tuple[Shape, Llama]] = [(TARGET, target)]
    models += [(DRAFTER, drafter)] if drafter is not None else []
    for block in torch.split(tokens, 8):
        labels = block[:, 1:]
        scores = []
        for shape, model in models:
            weights = model.weights(machine.dtype)
            x, _ = Passes(shape, compiled=False).exact(block[:, :-1], weights)
            scores.append(logits(shape, x, weights).float().log_softmax(-1))
        picked = [-s.gather(-1, labels[..., None]).mean(dim=(1, 2)).sum().item() for s in scores]
        sums["target_loss"] += picked[0]
        if drafter is not None:
            sums["drafter_loss"] += picked[1]
            gap = scores[0].exp() * (scores[0] - scores[1])
            sums["kl"] += gap.sum(-1).mean(dim=1).sum().item()
            same = scores[0].argmax(-1) == scores[1].argmax(-1)
            sums["agreement"] += same.float().mean(dim=1).sum().item()
    return {name: round(value / len(tokens), 4) for name, value in sums.items()}


def build_pair(
    files: list[SourceFile], output: Path, *, options: argparse.Namespace, machine: Machine
) -> dict[str, object]:
    """Run the stages and write everything; returns the figures."""
    figures: dict[str, object] = {"options": {k: str(v) for k, v in vars(options).items()}}
    start = time.perf_counter()
    tokenizer = train_tokenizer(files)
    parts = encode_parts(tokenizer, files)
    figures["tokenizer_s"] = round(time.perf_counter() - start, 1)
    figures["tokens"] = {name: sum(map(len, ids)) for name, ids in vars(parts).items()}
    log.info("tokenizer %s s, tokens %s", figures["tokenizer_s"], figures["tokens"])
    held_out = sorted(file.path for file in files if file.is_held_out)
    (output / "held_out.json").write_text(json.dumps(held_out, indent=2) + "\n")
    for name in ("target", "drafter"):
        (output / name).mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer, output / name)
    if options.reuse_target is not None:
        target = load_model(options.reuse_target).to(machine.device)
    else:
        budget = TARGET_BUDGET.scaled(options.token_scale)
        saved = Checkpoint(output / "target.checkpoint")
        target, record = train_target(parts, budget, machine=machine, checkpoint=saved)
        figures |= {"target_budget": asdict(budget), "target": asdict(record)}
    save_model(target, output / "target")
    figures["held_out"] = held_out_figures(target, None, parts, machine=machine)
    log.info("held-out %s", figures["held_out"])
    if not options.target_only:
        figures |= build_drafter(target, parts, output, options=options, machine=machine)
    return figures


def build_drafter(
    target: Llama,
    parts: Encoded,
    output: Path,
    *,
    options: argparse.Namespace,
    machine: Machine,
) -> dict[str, object]:
    """Distil, save and measure the drafter."""
    budget = DRAFTER_BUDGET.scaled(options.token_scale)
    plan = Distillation() if options.layer_parallel_loss else Distillation(grouped_weight=0.0)
    start, kept = time.perf_counter(), output / "own_text.pt"
    if kept.exists():
        own_text = torch.load(kept, weights_only=True).to(machine.device)
    else:
        amount = int(plan.own_text_tokens * options.token_scale)
        own_text = write_text(target, parts, tokens=amount, machine=machine)
        torch.save(own_text.cpu(), kept)
    seconds = round(time.perf_counter() - start, 1)
    log.info("own text %d windows %s s", len(own_text), seconds)
    drafter, record = distil(
        target,
        parts,
        budget,
        machine=machine,
        plan=plan,
        checkpoint=Checkpoint(output / "drafter.checkpoint"),
        own_text=own_text,
    )
    save_model(drafter, output / "drafter")
    held_out = held_out_figures(target, drafter, parts, machine=machine)
    log.info("held-out %s", held_out)
    return {
        "drafter_budget": asdict(budget),
        "distillation": asdict(plan),
        "own_text_s": seconds,
        "drafter": asdict(record),
        "held_out": held_out,
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded pair.")
    parser.add_argument("--output", type=Path, help="folder for target/, drafter/ and the figures")
    parser.add_argument("--corpus", type=Path, help="packed corpus; default: this interpreter's")
    parser.add_argument("--prepare", type=Path, help="write the packed corpus there and stop")
    parser.add_argument("--reuse-target", type=Path, help="trained target folder to distil from")
    parser.add_argument("--target-only", action="store_true", help="stop before distillation")
    parser.add_argument(
        "--layer-parallel-loss",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the drafter for grouped layers too (off: the control)",
    )
    parser.add_argument("--token-scale", type=float, default=1.0, help="share of every budget")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    if options.output is None and options.prepare is None:
        parser.error("--output or --prepare is needed")
    if not (options.token_scale > 0 and math.isfinite(options.token_scale)):
        parser.error(f"--token-scale must be positive, got {options.token_scale}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    files = unpack(options.corpus) if options.corpus is not None else collect()
    if options.prepare is not None:
        pack(files, options.prepare)
        return
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    machine = Machine(device=torch.device(options.device), compiled=options.compile)
    figures = build_pair(files, options.output, options=options, machine=machine)
    (options.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The training loop: what a step makes small, what is measured on the way, where it can go on.

    windows ──> target ──> logits ───────┐
       │                                 v
       └──> drafter ──> exact rows ───> loss
               └──────> grouped rows ─> loss x grouped_weight       one form per step

All that is drawn for a step is drawn from (seed, step), so a run that was cut off ends in the same
weights.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from paceline.runtime.errors import ConfigError
from paceline.runtime.spec.distill.lessons import OWN_TEXT, Lessons
from paceline.runtime.spec.distill.loss import acceptance, objective
from paceline.runtime.spec.distill.models import check_models, save_drafter
from paceline.runtime.spec.distill.pair import Pair, Rows
from paceline.runtime.spec.distill.settings import Settings

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
BETAS = (0.9, 0.95)
"""AdamW's, as is usual for language models."""


class Trainer:
    """A drafter on its way, from the last checkpoint on if there is one."""

    def __init__(self, settings: Settings) -> None:
        """Reads models and data, and lets the target write its text. Raises UserError for whatever
        cannot be trained."""
        self.settings = settings
        self.folder = Path(settings.output) / "training"
        facts = check_models(settings)
        _claim(self.folder, settings)
        self._lessons = Lessons(settings, facts, folder=self.folder)
        self._pair = Pair(settings)
        self.drafter = self._pair.drafter
        self._forms = self._pair.forms if settings.grouped_weight else []
        if settings.grouped_weight and not self._forms:
            log.warning("the drafter has no layers that could be grouped: all rows are exact")
        self._optimizer = _optimizer(self.drafter, settings)
        self._schedule = get_cosine_schedule_with_warmup(
            self._optimizer, int(settings.warmup * settings.steps), settings.steps
        )
        self.step = self._restore()

    def run(self) -> Path:
        """Train to the end and write the drafter: its folder."""
        settings = self.settings
        began, first = time.monotonic(), self.step
        if not first:
            self._report("before")
        while self.step < settings.steps:
            losses = self.take_step()
            if self.step % settings.evaluate_every == 0 or self.step == settings.steps:
                seen = (self.step - first) * settings.batch_size * settings.length
                spelled = " + ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
                rate = seen / (time.monotonic() - began)
                self._report(f"step {self.step}/{settings.steps}, {rate:.0f} tokens/s, {spelled}")
            if self.step % settings.checkpoint_every == 0:
                self.save_checkpoint()
        save_drafter(self.drafter, settings)
        self._checkpoint.unlink(missing_ok=True)
        return Path(settings.output)

    def take_step(self) -> dict[str, float]:
        """One optimizer step: its losses, `exact` and `grouped`."""
        settings = self.settings
        rng = np.random.default_rng((settings.seed, self.step))
        windows = self._lessons.batch(self.step, rng).to(self._pair.device)
        wanted = [self._forms[rng.integers(len(self._forms))]] if self._forms else []
        offset = int(rng.integers(settings.num_speculative_tokens))
        weights = {"exact": 1.0, "grouped": settings.grouped_weight}
        losses = dict.fromkeys(["exact", *(["grouped"] if wanted else [])], 0.0)
        for part in torch.split(windows, settings.micro_batch_size or len(windows)):
            total = torch.zeros((), device=self._pair.device)
            found = self._pair.rows(part, wanted, offset=offset)
            for name, rows in zip(losses, found, strict=True):
                loss = self._loss(rows) * (len(part) / len(windows))
                losses[name] += loss.item()
                total = total + weights[name] * loss
            total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.drafter.parameters(), settings.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self.step += 1
        return losses

    @torch.no_grad()
    def evaluate(self) -> dict[str, tuple[float, float]]:
        """On held-out text, the chances that a sampled and a greedy draft are accepted: in an exact
        row, and in a grouped one of each form."""
        windows = self._lessons.held_out().to(self._pair.device)
        names = ["exact", *(form.name for form in self._forms)]
        sums = dict.fromkeys(names, (0.0, 0.0))
        for part in torch.split(
            windows, self.settings.micro_batch_size or self.settings.batch_size
        ):
            for name, rows in zip(names, self._pair.rows(part, self._forms), strict=True):
                share = len(part) / len(windows)
                sampled, greedy = (
                    each.mean().item() for each in acceptance(rows.ours, rows.theirs)
                )
                sums[name] = (sums[name][0] + share * sampled, sums[name][1] + share * greedy)
        return sums

    def save_checkpoint(self) -> None:
        """All that a run goes on from, whole or not at all."""
        state = {
            "step": self.step,
            "drafter": self.drafter.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self._checkpoint)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def _restore(self) -> int:
        if not self._checkpoint.exists():
            return 0
        state = torch.load(self._checkpoint, weights_only=True, map_location=self._pair.device)
        self.drafter.load_state_dict(state["drafter"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        log.info("going on from step %d", state["step"])
        return int(state["step"])

    def _loss(self, rows: Rows) -> torch.Tensor:
        settings = self.settings
        return objective(
            *rows, kind=settings.divergence, next_token_weight=settings.next_token_weight
        )

    def _report(self, what: str) -> None:
        found = self.evaluate()
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, "held_out": found}) + "\n")
        shown = "exact {:.3f} / {:.3f}".format(*found["exact"])
        if self._forms:
            grouped = np.mean([found[form.name] for form in self._forms], axis=0)
            shown += ", grouped {:.3f} / {:.3f}".format(*grouped)
        log.info("%s; accepted sampled / greedy on held-out text: %s", what, shown)


def _claim(folder: Path, settings: Settings) -> None:
    """One folder, one run. Raises ConfigError where the work of another one lies."""
    output, record = Path(settings.output), folder / "settings.json"
    ours = json.loads(msgspec.json.encode(settings))
    begun = record.exists() and any((folder / name).exists() for name in (OWN_TEXT, CHECKPOINT))
    theirs = json.loads(record.read_text()) if begun else ours
    differing = [name for name in ours if ours[name] != theirs.get(name)]
    if differing:
        raise ConfigError(
            f"{output} holds a run with another {', '.join(differing)}: give the same or another output"
        )
    if any(output.glob("*.safetensors")):
        raise ConfigError(f"{output} already holds a model: give another output")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(ours, indent=1) + "\n")


def _optimizer(drafter: PreTrainedModel, settings: Settings) -> torch.optim.AdamW:
    """Norms and biases do not decay."""
    matrices = [p for p in drafter.parameters() if p.ndim > 1]
    others = [p for p in drafter.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=BETAS,
    )

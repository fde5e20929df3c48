"""What a run learns from and what it is measured on, by number of the step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paceline.runtime.preflight import Facts
from paceline.runtime.spec.distill.data import (
    Tokens,
    Windows,
    hold_out,
    read_documents,
    write_token_file,
)
from paceline.runtime.spec.distill.own_text import write_own_text
from paceline.runtime.spec.distill.settings import Settings

log = logging.getLogger(__name__)

OWN_TEXT = "own_text.jsonl"


class Lessons:
    """Windows of `length + 1` tokens: a row's next token is part of its window."""

    def __init__(self, settings: Settings, facts: Facts, *, folder: Path) -> None:
        """Reads the data; what the target writes is kept in `folder`. Raises ConfigError for data
        that is no text or too short."""
        self._settings = settings
        learnt, held_out = hold_out(read_documents(settings.data, facts), settings.held_out)
        log.info(
            "%d tokens to learn from, %d held out", sum(map(len, learnt)), sum(map(len, held_out))
        )
        self._text = self._windows(learnt, "the data")
        self._held_out = self._windows(held_out, "the held-out part of the data")
        self._own_text: Windows | None = None
        if settings.own_text:
            path = folder / OWN_TEXT
            if not path.exists():
                write_token_file(path, write_own_text(settings, learnt))
            own = read_documents([str(path)], facts)
            self._own_text = self._windows(own, "the target's own text")

    def batch(self, step: int, rng: np.random.Generator) -> Tensor:
        """The windows of a step, `[S, T+1]`."""
        size = self._settings.batch_size
        own = rng.random(size) < self._settings.own_text_share
        sources = [self._own_text if self._own_text and mine else self._text for mine in own]
        return _tensor([source[step * size + i] for i, source in enumerate(sources)])

    def held_out(self) -> Tensor:
        """The windows that are measured on, always the same ones, `[S, T+1]`."""
        count = min(self._settings.evaluation_windows, self._held_out.per_epoch)
        return _tensor([self._held_out[number] for number in range(count)])

    def _windows(self, documents: Sequence[Tokens], what: str) -> Windows:
        length = self._settings.length + 1
        return Windows(documents, length=length, seed=self._settings.seed, what=what)


def _tensor(windows: Sequence[Tokens]) -> Tensor:
    return torch.from_numpy(np.stack(windows)).long()

"""What target and drafter say about the same text: the rows that a loss or a measurement compares.

Letters: S windows, T tokens of a window, U grouped rows of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paceline.runtime.errors import ConfigError
from paceline.runtime.spec.distill.grouped import Form, cut_rounds, exact_pass, forms, grouped_pass
from paceline.runtime.spec.distill.models import (
    load_drafter,
    load_target,
    pick_device,
    pick_dtype,
)
from paceline.runtime.spec.distill.settings import Settings


class Rows(NamedTuple):
    """Logits in float32, `[S, T or U, V]`, and the text's own next tokens, `[S, T or U]`."""

    ours: Tensor
    theirs: Tensor
    next_tokens: Tensor


class Pair:
    """A frozen target, and the drafter that learns from it."""

    def __init__(self, settings: Settings) -> None:
        """Loads both. Raises UserError for a device, a shape or a layer that is not there."""
        self.device = pick_device(settings)
        self._dtype = pick_dtype(settings, self.device)
        self._num_drafts = settings.num_speculative_tokens
        self.target = load_target(settings, device=self.device, dtype=self._dtype)
        self.drafter = load_drafter(settings, device=self.device)
        try:
            self.forms = forms(settings, num_layers=self.drafter.config.num_hidden_layers)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        vocab_sizes = (self.target.config.vocab_size, self.drafter.config.vocab_size)
        self._vocab_size = min(vocab_sizes)  # families pad it differently from size to size

    def rows(self, windows: Tensor, wanted: Sequence[Form], *, offset: int = 0) -> Iterator[Rows]:
        """The exact rows of `windows [S, T+1]`, then the grouped ones of each form, in rounds that
        start at `offset`."""
        tokens_ST, next_ST = windows[:, :-1], windows[:, 1:]
        theirs = self._target_logits(tokens_ST)
        with self._products():
            h_STE, cache = exact_pass(self.drafter, tokens_ST)
            ours = self._logits(h_STE, self.drafter)
        yield Rows(ours, theirs, next_ST)
        rounds = cut_rounds(
            tokens_ST.shape[1], num_drafts=self._num_drafts, offset=offset, device=self.device
        )
        at_U = rounds.positions_U
        for form in wanted:
            with self._products():
                tokens_SU = tokens_ST[:, at_U]
                h_SUE = grouped_pass(self.drafter, tokens_SU, rounds, form=form, exact=cache)
                ours = self._logits(h_SUE, self.drafter)
            yield Rows(ours, theirs[:, at_U], next_ST[:, at_U])

    @torch.no_grad()
    def _target_logits(self, tokens_ST: Tensor) -> Tensor:
        h_STE = self.target.model(input_ids=tokens_ST).last_hidden_state
        return self._logits(h_STE, self.target)

    def _logits(self, h: Tensor, model: PreTrainedModel) -> Tensor:
        logits: Tensor = model.lm_head(h)[..., : self._vocab_size]
        return logits.float()

    def _products(self) -> torch.autocast:
        """The drafter's weights stay in float32; its products need not."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16
        )

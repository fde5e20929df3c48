"""What changes a request's logits before the temperature does: grammar, bans, biases, penalties.

In vLLM's order and with its definitions, for a token of logit x:

    grammar             x = -inf                      where the grammar does not allow it
    min_tokens          x = -inf                      end and stop tokens, until so many are written
    logit_bias          x = x + bias
    repetition_penalty  x = x / r if x > 0 else x r   if it is in the prompt or in the text
    frequency_penalty   x = x - f c                   c: how often it is in the text
    presence_penalty    x = x - p                     if it is in the text

Penalties see the drafted prefix. Row i of a chain is processed as if the first i drafts had been
written, which is what it will have been if row i is ever used:

    text      t1 t2 | d1 d2 d3
    row 0     t1 t2                draws what comes first: d1, if the draft was right
    row 1     t1 t2   d1
    row 2     t1 t2   d1 d2

All functions work in place on fp32 logits.

Letters: P rows, V vocabulary, K distinct tokens of prompt and text, D distinct drafts, B tokens of a
list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from paceline.runtime.types import SamplingParams


class Penalties:
    """One request's penalties, and how often its text has each token.

    Kept by distinct token, not by vocabulary: a step costs what the text has, and a committed token
    changes one entry.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Iterable[int],
        *,
        device: torch.device,
    ) -> None:
        self._repetition = params.repetition_penalty
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._slots: dict[int, int] = {}
        self._counts: list[int] = []
        self._ids_K = torch.empty(0, dtype=torch.int64, device=device)
        self._less_K = torch.empty(0, device=device)
        if self._repetition != 1.0:
            for token_id in dict.fromkeys(prompt_token_ids):
                self._slots[token_id] = len(self._counts)
                self._counts.append(0)
            self._grow(list(self._slots))

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )

    def commit(self, token_ids: Iterable[int]) -> None:
        """These tokens are now in the text."""
        for token_id in token_ids:
            slot = self._slots.setdefault(token_id, len(self._counts))
            if slot == len(self._counts):
                self._counts.append(0)
                if slot == len(self._ids_K):
                    self._grow([token_id])
                self._ids_K[slot] = token_id
            self._counts[slot] += 1
            self._less_K[slot] = self._less(self._counts[slot])

    def apply_(self, logits_PV: Tensor, *, drafts: Sequence[int], first: int = 0) -> None:
        """Penalise rows `first`, `first + 1`, ... of the chain: row i sees `drafts[:i]`."""
        used = len(self._counts)
        distinct = list(dict.fromkeys(drafts))
        ids_D = torch.tensor(distinct, dtype=torch.int64, device=logits_PV.device)
        before_PD = logits_PV.index_select(1, ids_D) if distinct else None
        if used:
            ids_K = self._ids_K[:used]
            x_PK = self._repeat(logits_PV.index_select(1, ids_K)).sub_(self._less_K[:used])
            logits_PV.index_copy_(1, ids_K, x_PK)
        if before_PD is None:
            return
        # Tokens that were drafted have counts that differ from row to row: done again, from before.
        less_PD: list[list[float]] = []
        seen_PD: list[list[bool]] = []
        for row in range(first, first + len(logits_PV)):
            counts = [self._count(token_id) + drafts[:row].count(token_id) for token_id in distinct]
            less_PD.append([self._less(count) for count in counts])
            seen_PD.append(
                [
                    count > 0 or token_id in self._slots
                    for token_id, count in zip(distinct, counts, strict=True)
                ]
            )
        seen = torch.tensor(seen_PD, device=logits_PV.device)
        x_PD = torch.where(seen, self._repeat(before_PD), before_PD)
        x_PD = x_PD - torch.tensor(less_PD, dtype=torch.float32, device=logits_PV.device)
        logits_PV.index_copy_(1, ids_D, x_PD)

    def _count(self, token_id: int) -> int:
        slot = self._slots.get(token_id)
        return 0 if slot is None else self._counts[slot]

    def _less(self, count: int) -> float:
        return self._frequency * count + (self._presence if count else 0.0)

    def _repeat(self, x: Tensor) -> Tensor:
        if self._repetition == 1.0:
            return x
        # Divisors as tensors: see filters._scaled.
        r = torch.tensor(self._repetition, dtype=x.dtype, device=x.device)
        return torch.where(x > 0.0, x / r, x * r)

    def _grow(self, token_ids: list[int]) -> None:
        """Room for these tokens and as many as there are."""
        used = len(self._ids_K)
        size = max(64, 2 * (used + len(token_ids)))
        ids_K = self._ids_K.new_zeros(size)
        ids_K[:used] = self._ids_K
        ids_K[used : used + len(token_ids)] = ids_K.new_tensor(token_ids)
        less_K = self._less_K.new_zeros(size)
        less_K[:used] = self._less_K
        if (
            ids_K.is_cuda
        ):  # the old ones may be of another stream, and are still to be read on this one
            for old in (self._ids_K, self._less_K):
                old.record_stream(torch.cuda.current_stream(old.device))
        self._ids_K, self._less_K = ids_K, less_K


def ban_(logits_PV: Tensor, token_ids_B: Tensor) -> None:
    """Exclude these tokens."""
    logits_PV.index_fill_(1, token_ids_B, -torch.inf)


def add_bias_(logits_PV: Tensor, token_ids_B: Tensor, bias_B: Tensor) -> None:
    """Add to the logits of distinct tokens."""
    logits_PV.index_add_(1, token_ids_B, bias_B.expand(len(logits_PV), -1))


def allow_only_(logits_PV: Tensor, masks: Sequence[bytes | None]) -> None:
    """Exclude from each row the tokens whose bit is not set; None leaves a row as it is.

    Token i is bit i % 8 of byte i // 8. Tokens beyond the mask are excluded.
    """
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return
    device, vocab_size = logits_PV.device, logits_PV.shape[1]
    joined = bytearray(b"".join(mask for mask in masks if mask is not None))
    bytes_RB = torch.frombuffer(joined, dtype=torch.uint8).view(len(rows), -1).to(device)
    bits_RB8 = bytes_RB.unsqueeze(-1).bitwise_and(_BITS.to(device))
    barred_RV = bits_RB8.view(len(rows), -1)[:, :vocab_size] == 0
    short = vocab_size - barred_RV.shape[1]
    if short > 0:
        barred_RV = torch.nn.functional.pad(barred_RV, (0, short), value=True)
    if len(rows) == len(masks):
        logits_PV.masked_fill_(barred_RV, -torch.inf)
    else:
        rows_R = torch.tensor(rows, device=device)
        logits_PV[rows_R] = logits_PV[rows_R].masked_fill(barred_RV, -torch.inf)


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)

"""Counter-based randomness: each random number is a hash of what it is for; tokens are drawn by it.

There is no generator and so no state to lose. A number is

    uniform(seed, position, purpose, lane[, round_start])  in [0, 1)

and all numbers with different arguments are independent. Who asks, in which order, how often, on
which machine and beside which other requests makes no difference, so a request that was preempted
or restarted draws what it would have drawn.

    position      0      1      2      3      4      5
    token       The     cat    sat    on    ...    ...
                └── committed: 3 ──┘
                                ^ root   ^ depth 1     position of depth d = committed - 1 + d

Which numbers are drawn twice, and why that does not bias the text: spec/verify.py.

Two ways to draw a token from a law p:

    by quantile    one number u:          the token at which the cumulative sum of p passes u
    by race        one number per token:  argmax (log p + noise), the noise Gumbel distributed

The race couples a drafter to its target without a word between them (Daliri, Musco and Suresh, 2024,
arXiv 2408.07978). Both race with the same noise, a hash of (seed, position, token id), so the token
that wins under q often wins under p as well: with a chance of at least (1 - TV) / (1 + TV), TV being
the total variation between p and q. The target's own token never depends on what was drafted.
Verification is then to draw the target's token at every position and to follow the drafts as long
as they are the same, and the text is a function of prompt, parameters and seed alone.

Letters: R rows, V vocabulary, W some tokens of it.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

# Seed, position, purpose, lane, round_start; little-endian on every machine.
_FIELDS = struct.Struct("<QqBqq")
_NO_ROUND = -1
# Keeps these hashes apart from any other use of blake2b.
_PERSON = b"paceline.uniform"

# Seed and position of a row of noise.
_ROW_FIELDS = struct.Struct("<Qq")
_TWO_WORDS = struct.Struct("<ii")
_ROW_PERSON = b"paceline.gumbel"
# Odd multipliers with good avalanche between shifts of about half a word, as signed 32-bit numbers.
_ODD_1, _ODD_2, _ODD_3 = 0x7FEB352D, 0x846CA68B - 2**32, 0x9E3779B1 - 2**32
# Elements worked on at once on a CPU, so that they stay in its second-level cache.
_CHUNK = 2**17


class Purpose(enum.IntEnum):
    """What a number decides. Its value is hashed: to change one is to change every seeded text."""

    TOKEN = 0
    """A token straight from the target: plain decoding, sample-then-match, and the bonus token."""
    DRAFT = 1
    """A drafted token."""
    ACCEPT = 2
    """Whether a drafted token is accepted."""
    RESIDUAL = 3
    """The recovered token, after every drafted one was rejected."""


def uniform(
    seed: int, *, position: int, purpose: Purpose, lane: int = 0, round_start: int | None = None
) -> float:
    """A number in [0, 1) with 53 random bits: the blake2b hash of the arguments, about 1.5 us.

    `lane` tells apart several numbers for one position and purpose: for ACCEPT the rank among
    siblings, for DRAFT any numbering of the nodes of one depth; 0 in a chain. `round_start`, the
    number of tokens committed when the round began, belongs to DRAFT alone: only drafting visits a
    position in more than one round.
    """
    assert (purpose == Purpose.DRAFT) == (round_start is not None), (
        f"DRAFT and only DRAFT takes a round_start, found {round_start} for {purpose.name}"
    )
    fields = _FIELDS.pack(
        seed & 0xFFFF_FFFF_FFFF_FFFF,
        position,
        purpose,
        lane,
        _NO_ROUND if round_start is None else round_start,
    )
    digest = hashlib.blake2b(fields, digest_size=8, person=_PERSON).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class Uniforms(Protocol):
    """The numbers of one round of one request, by depth below the root. Calling changes nothing."""

    def __call__(self, depth: int, *, purpose: Purpose, lane: int = 0) -> float: ...


@dataclass(frozen=True, slots=True)
class RoundUniforms:
    """`Uniforms` bound to a seed and to the number of tokens (prompt and output) committed so far.

    Depth 1 is the first token after them. The drafter and the verifier of a round share one.
    """

    seed: int
    num_committed: int

    def __call__(self, depth: int, *, purpose: Purpose, lane: int = 0) -> float:
        return uniform(
            self.seed,
            position=self.num_committed - 1 + depth,
            purpose=purpose,
            lane=lane,
            round_start=self.num_committed if purpose == Purpose.DRAFT else None,
        )


def draw(probs: Tensor, u: float) -> int:
    """The token at quantile `u` of `probs` [V]; never one of probability zero.

    Takes the first token whose cumulative probability exceeds u times the sum, which need not be
    one. Sums are fp64: in fp32 a vocabulary of 128k would lose its tail.
    """
    assert 0.0 <= u < 1.0, f"a quantile is in [0, 1), found {u}"
    cumulative = torch.cumsum(probs, 0, dtype=torch.float64)  # [V]
    total = cumulative[-1].item()
    assert 0.0 < total < float("inf"), f"expected a positive finite sum, found {total}"
    # u < 1 keeps u * total below total after rounding too, so there is always such a token.
    token_id = int(torch.searchsorted(cumulative, u * total, right=True))
    if probs[token_id].item() > 0.0:
        return token_id
    # A sequential sum never gets here. A parallel scan may round so that sums fall by 1e-16 at a 0.
    return int(probs.argmax())


def gumbel_noise(
    seeds: Sequence[int], positions: Sequence[int], *, vocab_size: int, device: torch.device
) -> Tensor:
    """Standard Gumbel noise [R, V] in fp32; row r belongs to position `positions[r]` of the text
    whose seed is `seeds[r]`.

    An element depends on its seed, position and token id alone, not on the other rows. The integers
    behind it are the same on every device; logarithms may differ between devices in the last bit.
    """
    # On one CPU core: 120 us for eight rows of V = 4,096, 0.36 ms for a row of V = 131,072.
    mixed_V = mixed_ids(vocab_size, device)
    keys_R2 = row_keys(seeds, positions, device)
    noise_RV = torch.empty((len(seeds), vocab_size), device=device)
    rows = max(1, _CHUNK // vocab_size) if device.type == "cpu" else len(seeds)
    for start in range(0, len(seeds), max(rows, 1)):
        keys = keys_R2[start : start + rows]
        _gumbel(mixed_V ^ keys[:, :1], keys[:, 1:], out=noise_RV[start : start + rows])
    return noise_RV


def gumbel_noise_at(
    seeds: Sequence[int], positions: Sequence[int], token_ids_RW: Tensor, *, vocab_size: int
) -> Tensor:
    """The elements of `gumbel_noise` for these tokens [R, W], at the cost of these alone."""
    keys_R2 = row_keys(seeds, positions, token_ids_RW.device)
    mixed_RW = mixed_ids(vocab_size, token_ids_RW.device)[token_ids_RW]
    noise_RW = torch.empty(token_ids_RW.shape, device=token_ids_RW.device)
    return _gumbel(mixed_RW.bitwise_xor_(keys_R2[:, :1]), keys_R2[:, 1:], out=noise_RW)


def draw_coupled(
    logits_RW: Tensor, noise_RW: Tensor, *, token_ids_RW: Tensor | None = None
) -> Tensor:
    """The winners [R] of the race: one token of each row, distributed as the softmax of its logits.

    Excluded tokens have -inf. `token_ids_RW` names the columns where they are not the whole
    vocabulary. Of tokens with equal scores the lowest id wins.
    """
    scores_RW = logits_RW + noise_RW
    if token_ids_RW is None:
        return scores_RW.argmax(dim=-1)
    best_R1 = scores_RW.amax(dim=-1, keepdim=True)
    none = torch.iinfo(token_ids_RW.dtype).max
    return torch.where(scores_RW == best_R1, token_ids_RW, none).amin(dim=-1)


def row_keys(seeds: Sequence[int], positions: Sequence[int], device: torch.device) -> Tensor:
    """Two independent 32-bit keys for each row [R, 2]."""
    words = []
    for seed, position in zip(seeds, positions, strict=True):
        fields = _ROW_FIELDS.pack(seed & 0xFFFF_FFFF_FFFF_FFFF, position)
        digest = hashlib.blake2b(fields, digest_size=8, person=_ROW_PERSON).digest()
        words.append(_TWO_WORDS.unpack(digest))
    return torch.tensor(words, dtype=torch.int32, device=device).view(-1, 2)


@lru_cache(maxsize=4)
def mixed_ids(vocab_size: int, device: torch.device) -> Tensor:
    """The token ids [V], each spread over 32 bits by a bijection: a constant, so computed once."""
    with torch.inference_mode(False):
        x_V = torch.arange(1, vocab_size + 1, dtype=torch.int32, device=device)
        for odd in (_ODD_3, _ODD_1, _ODD_2):
            _fold_(x_V.mul_(odd), by=16, scratch=torch.empty_like(x_V))
    return x_V


def _gumbel(x: Tensor, key: Tensor, *, out: Tensor) -> Tensor:
    """Noise into `out` from mixed ids with the first key in them; `x` is spent."""
    scratch = torch.empty_like(x)
    _fold_(x.mul_(_ODD_1), by=15, scratch=scratch)
    x.bitwise_xor_(key)
    _fold_(x.mul_(_ODD_2), by=16, scratch=scratch)
    _fold_(x.mul_(_ODD_1), by=15, scratch=scratch)
    return _noise_of(x.bitwise_and_(0x7FFF_FFFF), out=out)


def _noise_of(bits: Tensor, *, out: Tensor) -> Tensor:
    """-log(-log(1 - v)) into `out`, v = (bits + 1/2) / 2^31 for 31 bits."""
    # Near v = 0, where winners come from, fp32 holds all 31 bits. Near 1 it would round to 1, whose
    # noise is -inf.
    out.copy_(bits).add_(0.5).mul_(-(2.0**-31)).clamp_(min=2.0**-24 - 1.0)
    return out.log1p_().neg_().log_().neg_()


def _fold_(x: Tensor, *, by: int, scratch: Tensor) -> None:
    """x ^= x >> by, the shift bringing in zeros; torch's own brings in the sign."""
    torch.bitwise_right_shift(x, by, out=scratch)
    x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - by)) - 1))

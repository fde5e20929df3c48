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

Letters: V vocabulary.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Seed, position, purpose, lane, round_start; little-endian on every machine.
_FIELDS = struct.Struct("<QqBqq")
_NO_ROUND = -1
# Keeps these hashes apart from any other use of blake2b.
_PERSON = b"paceline.uniform"


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

"""What the fullest rank holds: weights of target and drafter, and KV for how many tokens.

    GPU memory  |  target  |  drafter  |  KV of both, in blocks  |  context  |  1 - utilization: activations  |

Rank 0 is the fullest: it belongs to both models, and where something does not divide evenly the first ranks hold more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from paceline.parallel.layer import Groups, exact_groups
from paceline.parallel.shard import shard_group, split
from paceline.runtime.costmodel.shapes import Shape

CONTEXT_BYTES = 1e9
"""What CUDA, its libraries and NCCL's buffers take of a GPU before anything is loaded. Assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One model's part on one rank, in bytes."""

    attention: int
    """Weights, of all layers."""
    mlp: int
    """Weights, of all layers."""
    tables: int
    """Embedding and head."""
    head: int
    """What a pass reads of the tables."""
    kv_per_token: int

    @property
    def weights(self) -> int:
        return self.attention + self.mlp + self.tables


@cache
def held(shape: Shape, *, ranks: int, groups: Groups | None = None) -> Held:
    """Rank 0's part of a model that is split over `ranks`, its layers in `groups`."""
    units = queries = ff = 0
    for group in groups or exact_groups(shape.num_layers):
        part = shard_group(
            len(group),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            ff_size=shape.ff_size,
            ranks=ranks,
            rank=0,
        )
        units += len(part.units)
        queries += sum(len(unit.query_heads) for unit in part.units)
        ff += len(group) * len(part.ff)
    matrix = shape.hidden_size * shape.itemsize
    head = len(split(shape.vocab_size, ranks, 0)) * matrix
    return Held(
        attention=2 * (queries + units) * shape.head_dim * matrix,
        mlp=3 * ff * matrix,
        tables=head if shape.tied_embeddings else 2 * head,
        head=head,
        kv_per_token=2 * units * shape.head_dim * shape.itemsize,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Rank 0 of an engine, in bytes."""

    gpu: float
    target: int
    drafter: int
    kv_per_token: int
    """Of both models."""
    utilization: float

    @property
    def kv_room(self) -> float:
        """For KV; below zero where the weights alone do not fit."""
        return self.utilization * self.gpu - CONTEXT_BYTES - self.target - self.drafter

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV fits, of all sequences together."""
        return max(0, int(self.kv_room // self.kv_per_token))


def rank_memory(
    target: Held, drafter: Held | None, *, gpu_bytes: float, utilization: float
) -> RankMemory:
    """The two models together on the rank that holds most."""
    return RankMemory(
        gpu=gpu_bytes,
        target=target.weights,
        drafter=0 if drafter is None else drafter.weights,
        kv_per_token=target.kv_per_token + (0 if drafter is None else drafter.kv_per_token),
        utilization=utilization,
    )

"""The ranks of an engine, and the axes along which they cooperate.

Target and drafter each have their own tensor-parallel size. Both axes start at rank 0, which
decides for both, so the wider of the two is the world:

    rank                 0   1   2   3
    target axis (4)      x   x   x   x
    draft axis  (2)      x   x                 ranks 2, 3 wait for the drafted tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.parallel.collectives import Collectives


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Ranks 0 to size-1 of the mesh, working on one model together."""

    size: int
    index: int | None
    """This rank's place on the axis; None for a rank that stands outside."""
    collectives: Collectives
    one_host: bool = False
    """Whether its ranks may be expected to have memory in common."""

    @property
    def member(self) -> bool:
        return self.index is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """One rank's view of all ranks."""

    rank: int
    world: Axis
    drafting: Axis
    """All ranks too, for what they say while they draft: `world` again, or with collectives of its own
    where that may be while they verify something else."""
    target: Axis
    draft: Axis
    device: torch.device

    @property
    def rank0(self) -> bool:
        """Whether this is the rank that decides: whatever depends on logits is computed there
        alone."""
        return self.rank == 0

"""What a forward pass is told besides the weights.

Letters: T rows of the pass, M longest context.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from paceline.runtime.kv.pool import KvPool
from paceline.runtime.layers.attention import Masks
from paceline.runtime.layers.rope import Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some consecutive tokens of one request, and where their keys and values go.

    Prompt chunk, decode, verification and calibration are all this, with other rows.
    """

    token_ids: Tensor  # [T] int64
    start: int
    """Position, and slot in the region, of the first row."""
    region: int
    rotations: dict[int, Rotation]
    """By the number of query heads per unit, which may differ between groups of layers."""
    masks: Masks
    pool: KvPool

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[0]

    @property
    def end(self) -> int:
        """How many positions the last row sees, itself included."""
        return self.start + self.num_rows

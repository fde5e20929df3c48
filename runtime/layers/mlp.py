"""The gated activation between the two projections of a feed-forward block.

Letters: T tokens, F feed-forward units here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for `[..., 2*F]`, gates first: `[..., F]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)

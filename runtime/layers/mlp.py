"""The gated activation between the two projections of a feed-forward block.

Letters: T tokens, F feed-forward units here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from paceline.runtime.layers.cpu_kernels import load_kernels, supports
from paceline.runtime.layers.fused import fused


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for `[..., 2*F]`, gates first: `[..., F]`."""
    if supports(gate_up.device, gate_up.dtype):
        kernels = load_kernels()
        if kernels is not None:
            return kernels.swiglu(gate_up)
    return _swiglu(gate_up)


@fused
def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)

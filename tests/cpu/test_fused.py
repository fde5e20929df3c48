"""What torch's compiler makes of functions that are fused: the same numbers."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from paceline.runtime.layers import attention, mlp, norm
from paceline.runtime.layers.fused import fusing

torch.set_num_threads(1)


def test_what_is_fused_computes_the_same() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for T in (1, 2, 6):
        h_TE, delta_TE = random(T, 24), random(T, 24)
        heads, angles = random(T, 2, 4, 8), random(2, T, 8)
        keys, values = random(2, 5, 1, 8, 16), random(2, 5, 1, 16, 8)
        blocks_BN = torch.tensor([[4, 1, 0]])
        found = []
        for how in (nullcontext(), fusing()):
            summed = h_TE.clone()
            with how, torch.inference_mode():
                found.append(
                    (
                        norm._add_rms(summed, delta_TE, 1e-5, torch.float32),
                        summed,
                        norm._add_rms(summed, None, 1e-5, torch.float32),
                        mlp._swiglu(h_TE),
                        *attention._turned(heads, angles[0], angles[1], torch.float32),
                        *attention._read(keys, values, blocks_BN),
                    )
                )
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)

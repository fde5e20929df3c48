"""Root-mean-square normalisation without its weight, which loading folds into the projection that
follows.

Letters: T tokens, E width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.runtime.layers.cpu_kernels import load_kernels, supports
from paceline.runtime.layers.fused import fused


def rms(x: Tensor, *, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last dimension, in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def add_rms(h_TE: Tensor, delta_TE: Tensor | None, *, eps: float, dtype: torch.dtype) -> Tensor:
    """Add what the last block made to the residual stream, in place, and normalise the sum:
    `[T, E]` in `dtype`.

    Between two products a CPU would spend more on six small operations than on the products.
    """
    if supports(h_TE.device, dtype, dtype if delta_TE is None else delta_TE.dtype):
        kernels = load_kernels()
        if kernels is not None:
            return kernels.add_rms(h_TE, delta_TE, eps=eps, dtype=dtype)
    return _add_rms(h_TE, delta_TE, eps, dtype)


@fused
def _add_rms(h_TE: Tensor, delta_TE: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    if delta_TE is not None:
        h_TE += delta_TE
    return rms(h_TE, eps=eps).to(dtype)

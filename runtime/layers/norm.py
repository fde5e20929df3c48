"""Root-mean-square normalisation without its weight, which loading folds into the projection that
follows.

Letters: T tokens, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms(x_TE: Tensor, *, eps: Tensor) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last dimension, in x's dtype. `eps` is a tensor of shape
    `[1]`.

    Four kernels instead of the six of `torch.nn.functional.rms_norm` on a CPU, where a launch costs
    more than the arithmetic.
    """
    norm = torch.linalg.vector_norm(x_TE, dim=-1, keepdim=True)
    return x_TE * torch.rsqrt(torch.addcmul(eps, norm, norm, value=1.0 / x_TE.shape[-1]))

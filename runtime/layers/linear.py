"""One matrix product with the weight layout that suits the device.

Letters: T rows.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN builds a kernel for every shape it meets and forgets the oldest of a thousand
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")

_product = torch.ops.mkldnn._linear_pointwise.default
"""The overload itself: finding it anew costs a microsecond a call."""


class Linear:
    """`x @ weight.T + bias` for `weight` of shape `[out, in]`.

    bfloat16 on a CPU goes through oneDNN, which re-lays the weight on every call unless it is
    packed once: a third of a small product's time. The packed copy replaces the plain one, so
    callers must not rely on sharing memory.
    """

    def __init__(self, weight: Tensor, *, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed: Tensor | None = None
        self._weight: Tensor | None = weight
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.numel():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)
            self._weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, in]` to `[T, out]`."""
        if self._packed is not None:
            num_rows = x.shape[0]
            padded = rounded(num_rows)
            if padded != num_rows:
                x = F.pad(x, (0, 0, 0, padded - num_rows))
            out: Tensor = _product(x, self._packed, self._bias, "none", [], "")
            return out if padded == num_rows else out[:num_rows]
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)


def rounded(num_rows: int) -> int:
    """Rows to compute instead of `num_rows`: there are about fifty such numbers up to 512.

    Batches that change with every step would otherwise meet a new shape in most of them, and building
    oneDNN's kernel for one takes 0.7 ms, twenty times a product of 36 rows.
    """
    if num_rows <= 16:
        return num_rows
    step = 4 if num_rows <= 64 else 8 if num_rows <= 128 else 16 if num_rows <= 256 else 32
    return -(-num_rows // step) * step

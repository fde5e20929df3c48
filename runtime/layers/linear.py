"""One matrix product with the weight layout that suits the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
            out: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._packed, self._bias, "none", [], ""
            )
            return out
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)

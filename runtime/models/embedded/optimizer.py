"""Muon for the stacked matrices, Adam for embedding and norms, and the learning-rate schedule.

Muon (Keller Jordan, 2024) replaces a matrix's momentum by roughly the nearest matrix with equal
singular values, so all directions of a weight learn at one pace, which is reported to save tokens
over Adam; we have not compared the two here. Our version works on stacks `[L, rows, columns]`, one
product for all layers of a kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Coefficients of the odd quintic published with Keller Jordan's Muon (2024): its iterates push
# singular values in (0, 1] quickly into a band around 1, not exactly to 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(stack: Tensor, *, steps: int = 5) -> Tensor:
    """`[L, R, C]` -> same shape, every matrix's singular values near one (computed in bf16)."""
    a, b, c = _QUINTIC
    x: Tensor = stack.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class PairOptimizer:
    """Both rules behind one `step`; the caller gives the schedule's factor each time."""

    def __init__(
        self,
        matrices: list[tuple[nn.Parameter, list[int]]],
        others: list[nn.Parameter],
        *,
        matrix_rate: float,
        other_rate: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        self._matrices = matrices
        self._momenta = [torch.zeros_like(parameter) for parameter, _ in matrices]
        self._matrix_rate, self._other_rate = matrix_rate, other_rate
        self._weight_decay, self._momentum = weight_decay, momentum
        self._adam = torch.optim.AdamW(
            others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"momenta": self._momenta, "adam": self._adam.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for kept, loaded in zip(self._momenta, state["momenta"], strict=True):
            kept.copy_(loaded)
        self._adam.load_state_dict(state["adam"])

    @torch.no_grad()
    def step(self, *, factor: float) -> None:
        """Apply and clear the gradients; `factor` scales both learning rates."""
        for group in self._adam.param_groups:
            group["lr"] = self._other_rate * factor
        self._adam.step()
        self._adam.zero_grad()
        rate = self._matrix_rate * factor
        for (parameter, rows), velocity in zip(self._matrices, self._momenta, strict=True):
            gradient = parameter.grad
            assert gradient is not None, "a step needs gradients of every matrix"
            velocity.lerp_(gradient, 1 - self._momentum)
            direction = gradient.lerp(velocity, self._momentum)
            parameter.mul_(1 - rate * self._weight_decay)
            for part, update in zip(
                torch.split(parameter, rows, dim=1),
                torch.split(direction, rows, dim=1),
                strict=True,
            ):
                scale = max(1.0, part.shape[1] / part.shape[2]) ** 0.5
                part.add_(orthogonalise(update).to(part.dtype), alpha=-rate * scale)
            parameter.grad = None


def schedule(step: int, *, total: int, warmup: int, cooldown: float) -> float:
    """Linear warm-up, plateau, then linear to zero over the last `cooldown` share of the steps."""
    rise = (step + 1) / max(1, warmup)
    fall = (total - step) / max(1.0, total * cooldown)
    return min(1.0, rise, fall)

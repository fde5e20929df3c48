"""How far a drafter's distributions are from its target's, and how many of its drafts that costs.

With p the target's distribution and q the drafter's, a sampled draft is accepted with probability
sum min(p, q) = 1 - tvd(p, q), and a greedy one where both have the same most probable token.

Source of the choice of divergences: DistillSpec (arXiv 2310.08461).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from paceline.runtime.spec.distill.settings import Divergence


def divergence(kind: Divergence, ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over rows of `[..., V]` float32 logits, in nats (`tvd`: a probability)."""
    log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
    if kind == "forward_kl":
        each = _kl(log_p, log_q)
    elif kind == "reverse_kl":
        each = _kl(log_q, log_p)
    elif kind == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        each = (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    else:
        each = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    return each.mean()


def objective(
    ours: Tensor, theirs: Tensor, next_tokens: Tensor, *, kind: Divergence, next_token_weight: float
) -> Tensor:
    """The mixture to make small: logits `[..., V]` of both, the text's own tokens `[...]`."""
    loss = (1 - next_token_weight) * divergence(kind, ours, theirs)
    if next_token_weight:
        own = functional.cross_entropy(ours.flatten(0, -2), next_tokens.flatten())
        loss = loss + next_token_weight * own
    return loss


def acceptance(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The chances that a sampled and a greedy draft are accepted, of each row of `[..., V]` logits."""
    sampled = torch.minimum(ours.softmax(-1), theirs.softmax(-1)).sum(-1)
    return sampled, (ours.argmax(-1) == theirs.argmax(-1)).float()


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)

"""A drafter as it drafts, in transformers' own modules: exact rows, and rounds of grouped rows upon them.

A window of text is cut into rounds as drafting would be. Calibration makes every earlier row exact
by the time a round begins, so that only the round's own rows are grouped ones:

    position in the round    0     1     2     3     4
    exact pass               e     e     e     e     e     the first draft, and what later rounds see
    grouped pass             -     g     g     g     g     the other drafts
    a `g` sees               every e up to its round's position 0, and its own round's g up to itself

Letters: S windows, T tokens of a window, U grouped rows of a window, W = T + U, E width.

Source of the layer groups: EasySpec (arXiv 2502.02493); `runtime/spec/layer_parallel.py` has the equations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from paceline.parallel.layer import Groups, layer_groups
from paceline.runtime.spec.distill.settings import Policy, Settings


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to run a drafter's layers."""

    policy: Policy
    size: int
    groups: Groups

    @property
    def name(self) -> str:
        """For people: `block 4`."""
        return f"{self.policy} {self.size}"


def forms(settings: Settings, *, num_layers: int) -> list[Form]:
    """The grouped forms a drafter of so many layers is trained in; none where every layer runs
    alone. Raises ValueError for an exact layer that does not exist."""
    found: list[Form] = []
    for size in settings.layer_parallel_sizes:
        groups = layer_groups(num_layers, size=size, exact=settings.exact_layers)
        if len(groups) < num_layers and groups not in [form.groups for form in found]:
            found += [
                Form(policy=policy, size=size, groups=groups)
                for policy in settings.layer_parallel_policies
            ]
    return found


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Where the grouped rows of a window are, and what they see."""

    positions_U: Tensor
    mask_UW: Tensor
    """Added to scores: 0 where a row sees an exact row (the first T) or a grouped one."""


def cut_rounds(length: int, *, num_drafts: int, offset: int, device: torch.device) -> Rounds:
    """Rounds of `num_drafts` positions from `offset` on, as many as fit. At least one must."""
    count = (length - offset) // num_drafts
    assert count > 0, f"expected a round of {num_drafts} after {offset} in {length} tokens"
    starts_R = offset + num_drafts * torch.arange(count, device=device)
    starts_U = starts_R.repeat_interleave(num_drafts - 1)
    positions_U = starts_U + torch.arange(1, num_drafts, device=device).repeat(count)
    exact_UT = torch.arange(length, device=device) <= starts_U[:, None]
    own_UU = (starts_U == starts_U[:, None]) & (positions_U <= positions_U[:, None])
    seen_UW = torch.cat((exact_UT, own_UU), dim=1)
    mask_UW = torch.zeros(seen_UW.shape, device=device).masked_fill(~seen_UW, -torch.inf)
    return Rounds(positions_U=positions_U, mask_UW=mask_UW)


def exact_pass(model: PreTrainedModel, tokens_ST: Tensor) -> tuple[Tensor, DynamicCache]:
    """The model as it is: normalised hidden states `[S, T, E]`, and every layer's keys and values."""
    cache = DynamicCache()
    done = model.model(input_ids=tokens_ST, past_key_values=cache, use_cache=True)
    return done.last_hidden_state, cache


def grouped_pass(
    model: PreTrainedModel, tokens_SU: Tensor, rounds: Rounds, *, form: Form, exact: DynamicCache
) -> Tensor:
    """The grouped rows of every round at once: normalised hidden states `[S, U, E]`.

    `exact` is that of the exact pass over the same windows, and stays as it is.
    """
    decoder, past = model.model, _ExactRows(exact)
    h = decoder.embed_tokens(tokens_SU)
    rope = decoder.rotary_emb(h, rounds.positions_U[None])
    for group in form.groups:
        layers = [decoder.layers[index] for index in group]
        A = [
            layer.self_attn(
                hidden_states=layer.input_layernorm(h),
                position_embeddings=rope,
                attention_mask=rounds.mask_UW[None, None],
                past_key_values=past,
            )[0]
            for layer in layers
        ]
        if form.policy == "block":
            u = h + sum(A)
            h = u + sum(layer.mlp(layer.post_attention_layernorm(u)) for layer in layers)
        else:
            for layer, A_i in zip(layers, A, strict=True):
                u = h + A_i
                h = u + layer.mlp(layer.post_attention_layernorm(u))
    normed: Tensor = decoder.norm(h)
    return normed


class _ExactRows:
    """What an attention module asks of a cache: new rows behind the exact ones, remembered by nobody."""

    def __init__(self, exact: DynamicCache) -> None:
        self._layers = exact.layers

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        exact = self._layers[layer_idx]
        return torch.cat((exact.keys, keys), dim=2), torch.cat((exact.values, values), dim=2)

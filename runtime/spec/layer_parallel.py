"""Running a group of the drafter's layers side by side, from one shared input.

Letters: T tokens, E width, L layers of the group, U attention units here, G query heads per unit, D
head width, F feed-forward units here, R draft ranks.

Let the group be layers 1..L with input h_1, LN and LN' the two norms of a layer.

    exact        u_i = h_i + Attn_i(LN_i(h_i))            h_{i+1} = u_i + MLP_i(LN'_i(u_i))        one after another

    attention    A_i = Attn_i(LN_i(h_1))                  all at once: the published policy
                 u_i = h_i + A_i                          h_{i+1} = u_i + MLP_i(LN'_i(u_i))        in sequence, exact

    block        u   = h_1 + sum A_i                      h_{L+1} = u + sum MLP_i(LN'_i(u))        both at once

and two placements, which compute the same sums:

    tensor   every layer is split over all R ranks by heads and feed-forward units, as in tensor parallelism, and the
             group is one wide layer: one projection, one attention call, one collective for all L layers. Weights and
             KV are held once, and an exact pass runs over the same shards.   collectives: 1 + L, or 2 for `block`
    layer    every rank holds the whole drafter; layer i of a group runs on rank (i-1) mod R, and single layers on all
             of them.                                                          collectives: 1, or 2 for `block`

Source: EasySpec (arXiv 2502.02493) for the `attention` policy and the `layer` placement. The wide
layer is ours.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from paceline.parallel.layer import owner
from paceline.parallel.mesh import Axis
from paceline.runtime.inputs import Rows
from paceline.runtime.layers.cpu_pass import Form, SmallPasses
from paceline.runtime.layers.linear import Linear
from paceline.runtime.layers.mlp import swiglu
from paceline.runtime.models.llama import Decoder, LayerGroup, out_linear, qkv_linear
from paceline.runtime.threads import torch_together


class Policy(enum.StrEnum):
    """What runs side by side."""

    ATTENTION = "attention"
    BLOCK = "block"


class Placement(enum.StrEnum):
    """Which rank runs what."""

    TENSOR = "tensor"
    LAYER = "layer"


class LayerParallel:
    """A drafter whose groups of layers run side by side. `grouped` is its one method.

    With placement `tensor` the decoder is split over `axis`; with `layer` it stands whole on every
    rank of it.
    """

    def __init__(
        self, decoder: Decoder, *, policy: Policy, placement: Placement, axis: Axis
    ) -> None:
        self._decoder = decoder
        self._policy = policy
        self._whole = placement is Placement.TENSOR
        """Whether a pass may run in one call."""
        self._groups: list[WideGroup | PlacedGroup | None] = []
        for group in decoder.groups:
            if len(group.layers) == 1:
                self._groups.append(None)
            elif placement is Placement.TENSOR:
                self._groups.append(WideGroup(group, policy=policy, axis=axis))
            else:
                self._groups.append(PlacedGroup(group, policy=policy, axis=axis))

    @property
    def form(self) -> Form:
        """What `grouped` computes."""
        return self._policy.value

    @property
    def any_group(self) -> bool:
        """False where every layer stands alone, so that grouped and exact passes are the same."""
        return any(group is not None for group in self._groups)

    def grouped(self, rows: Rows) -> Tensor:
        """A pass with the groups side by side: `[T, E]` before the final norm. Writes approximate
        KV rows."""
        if rows.small is not None and rows.small.runs_whole and self._whole:
            return rows.small.whole(rows, self.form)
        if rows.play is not None:
            return rows.play(self.form, self.grouped, rows)
        h_TE, delta_TE = self._decoder.embed(rows), None
        with torch_together():
            for group, side_by_side in zip(self._decoder.groups, self._groups, strict=True):
                if side_by_side is None:
                    delta_TE = self._decoder.exact_layer(h_TE, delta_TE, group, 0, rows=rows)
                else:
                    delta_TE = side_by_side(h_TE, delta_TE, rows=rows)
            return h_TE if delta_TE is None else h_TE + delta_TE


class WideGroup:
    """Placement `tensor`: the group as one layer with the heads and feed-forward units of all of
    them."""

    def __init__(self, group: LayerGroup, *, policy: Policy, axis: Axis) -> None:
        assert group.stack is not None, "expected a group of several layers"
        self._group = group
        self._policy = policy
        self._all_reduce_ = axis.collectives.all_reduce_
        stack, units = group.stack, range(len(group.shard.units))
        self._units = units
        self._qkv = qkv_linear(stack, units)
        self._out = out_linear(stack, units)
        self._out_bias = stack.out_bias
        counts = {len(part) for part in group.units}
        self._even = len(counts) == 1
        num_layers = len(group.layers)
        if self._even:  # [L, units per layer * G*D, E]
            self._out_LCE = stack.out.reshape(num_layers, -1, stack.out.shape[-1])
        if policy is Policy.BLOCK:
            bias = None if stack.gate_up_bias is None else stack.gate_up_bias.flatten()
            self._gate_up = Linear(stack.gate_up.flatten(0, 1), bias=bias)
            self._down = Linear(
                stack.down.flatten(0, 1).t(),
                bias=None if stack.down_bias is None else stack.down_bias.sum(dim=0),
            )

    def __call__(self, h_TE: Tensor, delta_TE: Tensor | None, *, rows: Rows) -> Tensor:
        if rows.small is not None:
            return self._small(h_TE, delta_TE, rows.small, rows)
        x_TE = self._group.norm(h_TE, delta_TE)
        context_TC = self._group.context(x_TE, self._qkv, units=self._units, rows=rows)
        if self._policy is Policy.BLOCK:
            return self._block(h_TE, context_TC)
        return self._attention(h_TE, context_TC)

    def _small(
        self, h_TE: Tensor, delta_TE: Tensor | None, small: SmallPasses, rows: Rows
    ) -> Tensor:
        """The same for few rows on a CPU."""
        group, layers = self._group.index, range(len(self._group.layers))
        summed = self._policy is Policy.BLOCK
        A = self._all_reduce_(
            small.attention(h_TE, delta_TE, rows, group=group, layers=layers, summed=summed)
        )
        if summed:
            return self._all_reduce_(small.mlp(h_TE, A, rows, group=group, layers=layers))
        delta_TE = torch.zeros_like(h_TE)
        for layer in layers:
            given_TE = delta_TE + A[layer]
            delta_TE = self._all_reduce_(
                small.mlp(h_TE, given_TE, rows, group=group, layers=range(layer, layer + 1))
            )
        return delta_TE

    def _attention(self, h_TE: Tensor, context_TC: Tensor) -> Tensor:
        A_LTE = self._all_reduce_(self._outputs(context_TC))
        delta_TE = torch.zeros_like(A_LTE[0])
        for layer, A_TE in enumerate(A_LTE):
            x_TE = self._group.norm(h_TE, delta_TE + A_TE)
            delta_TE = self._all_reduce_(self._group.mlp(x_TE, layer))
        return delta_TE

    def _block(self, h_TE: Tensor, context_TC: Tensor) -> Tensor:
        group, num_tokens = self._group, h_TE.shape[0]
        summed_TE = self._out(context_TC)
        if self._out_bias is not None:
            summed_TE = summed_TE + self._out_bias.sum(dim=0)
        gate_up = self._gate_up(group.norm(h_TE, self._all_reduce_(summed_TE)))
        active = swiglu(gate_up.view(num_tokens, len(group.layers), -1))  # [T, L, F]
        return self._all_reduce_(self._down(active.flatten(1)))

    def _outputs(self, context_TC: Tensor) -> Tensor:
        """Every layer's attention output apart, this rank's part: `[L, T, E]`."""
        group, T = self._group, context_TC.shape[0]
        if self._even:
            by_layer = context_TC.view(T, len(group.layers), -1).transpose(0, 1)  # [L, T, C/L]
            A_LTE = torch.bmm(by_layer, self._out_LCE)
        else:
            assert group.stack is not None
            per_unit = torch.bmm(
                context_TC.view(T, len(self._units), -1).transpose(0, 1), group.stack.out
            )  # [U, T, E]
            A_LTE = torch.stack(
                [per_unit[part.start : part.stop].sum(dim=0) for part in group.units]
            )
        return A_LTE if self._out_bias is None else A_LTE + self._out_bias[:, None]


class PlacedGroup:
    """Placement `layer`: this rank runs the layers it owns, and learns the other ranks' results."""

    def __init__(self, group: LayerGroup, *, policy: Policy, axis: Axis) -> None:
        assert axis.index is not None, "expected a draft rank"
        self._group = group
        self._policy = policy
        self._all_reduce_ = axis.collectives.all_reduce_
        num_layers = len(group.layers)
        self._mine = [i for i in range(num_layers) if owner(i, ranks=axis.size) == axis.index]

    def __call__(self, h_TE: Tensor, delta_TE: Tensor | None, *, rows: Rows) -> Tensor:
        group = self._group
        x_TE = group.norm(h_TE, delta_TE)
        # slots that one rank fills and the others leave zero: the sum is the all-gather, whoever
        # owns how many
        A_LTE = torch.zeros(len(group.layers), *h_TE.shape, device=h_TE.device)
        for layer in self._mine:
            A_LTE[layer] = group.attention(x_TE, layer, rows=rows)
        if self._policy is Policy.BLOCK:
            x_TE = group.norm(h_TE, self._all_reduce_(A_LTE.sum(dim=0)))
            M_TE = torch.zeros_like(h_TE)
            for layer in self._mine:
                M_TE = M_TE + group.mlp(x_TE, layer)
            return self._all_reduce_(M_TE)
        self._all_reduce_(A_LTE)
        delta_TE = torch.zeros_like(h_TE)
        for layer, A_TE in enumerate(A_LTE):
            delta_TE = group.mlp(group.norm(h_TE, delta_TE + A_TE), layer).float()
        return delta_TE

"""The decoder of Llama and of every family that differs from it by a line or two.

Letters: T tokens, E width, L layers of a group, U attention units here, G query heads per unit, D
head width, F feed-forward units here, V vocabulary entries here. "Here" is this rank.

One forward pass, read from the bottom up in `Decoder.exact`:

    embed -> for every layer: h += sum over ranks(attention(h));  h += sum over ranks(mlp(h)) -> norm -> head

Each block hands its sum on as `delta`, and the next norm adds it: the residual stream is
h + delta.

Layers live in groups, because a group may also run as one wide layer
(`runtime/spec/layer_parallel.py`). The weights of a group are stacked once, and every exact layer
is a view of its part of the stack:

    qkv      [U, (G+2)*D, E]     unit by unit: its query heads, its key head, its value head
    out      [U, G*D, E]         input-major, so that units add up along the rows
    gate_up  [L, 2*F, E]
    down     [L, F, E]           input-major
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.parallel.layer import Groups
from paceline.parallel.mesh import Axis
from paceline.parallel.shard import GroupShard, shard_group, split
from paceline.runtime.inputs import Rows
from paceline.runtime.layers.attention import attend
from paceline.runtime.layers.cpu_pass import (
    Packed,
    PackedEnds,
    PackedGroup,
    PackedLayer,
    most_rows,
    worth_packing,
)
from paceline.runtime.layers.embed import Embedding
from paceline.runtime.layers.linear import Linear
from paceline.runtime.layers.mlp import swiglu
from paceline.runtime.layers.norm import add_rms, rms
from paceline.runtime.models.arch import Architecture, read_rope, token_ids
from paceline.runtime.models.weights import Checkpoint
from paceline.runtime.threads import torch_together


def architecture(config: dict[str, Any]) -> Architecture:
    """Llama 2 and 3.x, from config.json."""
    heads = int(config["num_attention_heads"])
    bias = bool(config.get("attention_bias", False))
    return Architecture(
        family="llama",
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        ff_size=int(config["intermediate_size"]),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_position=int(config.get("max_position_embeddings", 2048)),
        rope=read_rope(config),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        eos_token_ids=token_ids(config.get("eos_token_id")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A group's weights on this rank, each held once, the norms' weights folded in. Shapes as drawn
    above."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None  # [U, (G+2)*D]
    out_bias: Tensor | None = (
        None  # [L, E], on the axis' first rank only: partial results are summed
    )
    gate_up_bias: Tensor | None = None  # [L, 2*F]
    down_bias: Tensor | None = None  # [L, E], likewise
    qk_norm: Tensor | None = None  # [U, G+1, D]


class LayerGroup:
    """Some consecutive layers on this rank. Every method returns this rank's part of a sum over
    ranks."""

    def __init__(
        self,
        index: int,
        layers: tuple[int, ...],
        *,
        arch: Architecture,
        shard: GroupShard,
        stack: Stack,
        pack: bool = False,
    ) -> None:
        """With `pack`, weights are kept a second time for passes in one call."""
        self.index = index
        self.layers = layers
        self.shard = shard
        self.qk_norm = stack.qk_norm
        self.queries = shard.queries_per_unit
        self.head_dim = arch.head_dim
        self.window = arch.windows[layers[0]] if arch.windows else None
        self.eps = arch.norm_eps
        self.dtype = stack.qkv.dtype
        self.units = [shard.units_of(i) for i in range(len(layers))]
        self._qkv = [qkv_linear(stack, units) for units in self.units]
        self._out = [out_linear(stack, units, bias_of=i) for i, units in enumerate(self.units)]
        self._gate_up = [
            Linear(stack.gate_up[i], bias=_row(stack.gate_up_bias, i)) for i in range(len(layers))
        ]
        self._down = [
            Linear(stack.down[i].t(), bias=_row(stack.down_bias, i)) for i in range(len(layers))
        ]
        self.packed = _packed(stack, self) if pack else None
        self.stack = stack if len(layers) > 1 else None
        """Kept where the layers may run side by side; a single layer needs only its own
        projections."""

    def attention(self, x_TE: Tensor, layer: int, *, rows: Rows) -> Tensor:
        """Attention of the group's `layer`-th layer over normalised `x_TE`, before the sum over
        ranks. Writes its keys and values."""
        units = self.units[layer]
        if not units:  # this rank holds no head of this layer
            return torch.zeros_like(x_TE)
        return self._out[layer](self.context(x_TE, self._qkv[layer], units=units, rows=rows))

    def mlp(self, x_TE: Tensor, layer: int) -> Tensor:
        """Feed-forward block of the group's `layer`-th layer, likewise."""
        return self._down[layer](swiglu(self._gate_up[layer](x_TE)))

    def context(self, x_TE: Tensor, qkv: Linear, *, units: range, rows: Rows) -> Tensor:
        """Attention of the given units over `x_TE`, before the output projection: `[T, U*G*D]`."""
        T, G, D = x_TE.shape[0], self.queries, self.head_dim
        heads = qkv(x_TE).view(T, len(units), G + 2, D)
        if self.qk_norm is not None:
            normed = rms(heads[:, :, : G + 1].float(), eps=self.eps)
            normed = normed * self.qk_norm[units.start : units.stop]
            heads = torch.cat((normed, heads[:, :, G + 1 :].float()), dim=2)
        return attend(
            heads, rows=rows, group=self.index, units=units, window=self.window, dtype=self.dtype
        )

    def norm(self, h_TE: Tensor, delta_TE: Tensor | None) -> Tensor:
        """The normalised input of a block, `[T, E]`; `delta_TE` is added to `h_TE` in place."""
        return add_rms(h_TE, delta_TE, eps=self.eps, dtype=self.dtype)


def _packed(stack: Stack, group: LayerGroup) -> PackedGroup:
    layers = []
    for layer, units in enumerate(group.units):
        part = slice(units.start, units.stop)
        bias = None if stack.qkv_bias is None else stack.qkv_bias[part].flatten()
        out = stack.out[part].flatten(0, 1).t()  # [E, U*G*D]
        layers.append(
            PackedLayer(
                qkv=Packed(stack.qkv[part].flatten(0, 1), bias),
                out=Packed(out, _row(stack.out_bias, layer)),
                gate_up=Packed(stack.gate_up[layer], _row(stack.gate_up_bias, layer)),
                down=Packed(stack.down[layer].t(), _row(stack.down_bias, layer)),
                units=units,
            )
        )
    return PackedGroup(layers=layers, queries=group.queries, window=group.window)


def qkv_linear(stack: Stack, units: range) -> Linear:
    """Projection onto the heads of some units."""
    part = slice(units.start, units.stop)
    bias = None if stack.qkv_bias is None else stack.qkv_bias[part].flatten()
    return Linear(stack.qkv[part].flatten(0, 1), bias=bias)


def out_linear(stack: Stack, units: range, *, bias_of: int | None = None) -> Linear:
    """Output projection of some units, summed over them."""
    weight = stack.out[units.start : units.stop].flatten(0, 1).t()  # [E, U*G*D]
    return Linear(weight, bias=_row(stack.out_bias, bias_of))


class Decoder:
    """A model on one rank: its part of every layer, of the embedding and of the head."""

    def __init__(
        self,
        arch: Architecture,
        *,
        groups: list[LayerGroup],
        embedding: Tensor,
        head: Tensor,
        final_norm: Tensor,
        vocab_size: int,
        num_ids: int,
        axis: Axis,
        pack: bool = False,
    ) -> None:
        """Computes logits of `vocab_size` tokens, and may be fed any of `num_ids`. With `pack` the
        head is kept a second time likewise."""
        self.arch = arch
        self.groups = groups
        self.axis = axis
        assert axis.index is not None, "expected a rank of the axis"
        self.vocab_size = vocab_size
        self.vocabulary = split(vocab_size, axis.size, axis.index)
        """Token ids whose logits this rank computes."""
        self.vocabulary_widths = [len(split(vocab_size, axis.size, r)) for r in range(axis.size)]
        self._embed = Embedding(embedding, offset=self.vocabulary.start, axis=axis, num_ids=num_ids)
        self._small_head, self._small_rows = Packed(head) if pack else None, most_rows()
        self._head = Linear(head)
        self._head_dtype = head.dtype
        self._final_norm = final_norm  # [E]

    def packed_ends(self) -> PackedEnds:
        """What is around the layers, for passes in one call."""
        assert self._small_head is not None, "expected packed weights from end to end"
        return PackedEnds(
            embedding=self._embed.table,
            num_embeddings=self._embed.num_here,
            splits=self._embed.partial,
            final_norm=self._final_norm,
            head=self._small_head,
            tokens=self.vocabulary,
            num_tokens=self.vocab_size,
        )

    def embed(self, rows: Rows) -> Tensor:
        """`[T, E]` float32. Hidden states stay in float32 between layers whatever the weights'
        dtype."""
        return self._embed(rows.token_ids)

    def exact(self, rows: Rows) -> Tensor:
        """The model as it was trained, one layer after another: `[T, E]` before the final norm."""
        if rows.small is not None and rows.small.runs_whole and rows.written is None:
            return rows.small.whole(rows, "exact")
        if rows.play is not None:
            return rows.play("exact", self.exact, rows)
        h_TE, delta_TE = self.embed(rows), None
        with torch_together():
            for group in self.groups:
                for layer, number in enumerate(group.layers):
                    delta_TE = self.exact_layer(h_TE, delta_TE, group, layer, rows=rows)
                    if rows.written is not None:
                        rows.written(number)
            return h_TE if delta_TE is None else h_TE + delta_TE

    def exact_layer(
        self, h_TE: Tensor, delta_TE: Tensor | None, group: LayerGroup, layer: int, *, rows: Rows
    ) -> Tensor:
        """`u = h + Attn(LN(h))`, then `u + MLP(LN'(u))`. The new delta; `h_TE` changes in place."""
        all_reduce_ = self.axis.collectives.all_reduce_
        if rows.small is not None:
            layers = range(layer, layer + 1)
            A_TE = rows.small.attention(
                h_TE, delta_TE, rows, group=group.index, layers=layers, summed=True
            )
            return all_reduce_(
                rows.small.mlp(h_TE, all_reduce_(A_TE), rows, group=group.index, layers=layers)
            )
        x_TE = group.norm(h_TE, delta_TE)
        delta_TE = all_reduce_(group.attention(x_TE, layer, rows=rows))
        x_TE = group.norm(h_TE, delta_TE)
        return all_reduce_(group.mlp(x_TE, layer))

    def logits(self, h_PE: Tensor) -> Tensor:
        """`[P, V]` of this rank's vocabulary, float32."""
        if self._small_head is not None and len(h_PE) <= self._small_rows:
            return self._small_head.of_normed(h_PE, self._final_norm, eps=self.arch.norm_eps)
        x_PE = (rms(h_PE, eps=self.arch.norm_eps) * self._final_norm).to(self._head_dtype)
        with torch_together():
            return self._head(x_PE).float()


def load_decoder(
    checkpoint: Checkpoint,
    arch: Architecture,
    *,
    groups: Groups,
    axis: Axis,
    dtype: torch.dtype,
    device: torch.device,
    vocab_size: int | None = None,
) -> Decoder:
    """Read this rank's part of a model. Raises ModelError where files and config.json disagree.

    `vocab_size` cuts the vocabulary: families pad it differently from size to size, and a drafter must not propose
    what its target does not know.
    """
    assert axis.index is not None, "expected a rank of the axis"
    place = _Place(checkpoint, arch=arch, dtype=dtype, device=device, first=axis.index == 0)
    pack = worth_packing(arch, ranks=axis.size, dtype=dtype, device=device)
    loaded = [
        _load_group(place, number, layers, ranks=axis.size, rank=axis.index, pack=pack)
        for number, layers in enumerate(groups)
    ]
    num_ids = vocab_size or arch.vocab_size
    vocab_size = min(arch.vocab_size, num_ids)
    vocabulary = split(vocab_size, axis.size, axis.index)
    checkpoint.check_shape("model.embed_tokens.weight", (arch.vocab_size, arch.hidden_size))
    embedding = place.put(checkpoint.read("model.embed_tokens.weight", rows=vocabulary))
    checkpoint.check_shape("model.norm.weight", (arch.hidden_size,))
    if arch.tied_embeddings:
        head = embedding
    else:
        checkpoint.check_shape("lm_head.weight", (arch.vocab_size, arch.hidden_size))
        head = place.put(checkpoint.read("lm_head.weight", rows=vocabulary))
    return Decoder(
        arch,
        groups=loaded,
        embedding=embedding,
        head=head,
        final_norm=checkpoint.read("model.norm.weight").float().to(device),
        vocab_size=vocab_size,
        num_ids=num_ids,
        axis=axis,
        pack=pack,
    )


class _Place:
    """Where tensors come from and go to while a decoder is loaded."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        arch: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        first: bool,
    ) -> None:
        self.checkpoint = checkpoint
        self.arch = arch
        self.first = first
        """Whether this rank adds the biases of summed outputs."""
        self._dtype = dtype
        self._device = device

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype).contiguous()

    def rows(self, name: str, rows: range) -> Tensor:
        return self.checkpoint.read(name, rows=rows).float()

    def columns(self, name: str, columns: range) -> Tensor:
        """Transposed: `[in, out]`."""
        return self.checkpoint.read(name, columns=columns).float().t()


def _load_group(
    place: _Place, number: int, layers: tuple[int, ...], *, ranks: int, rank: int, pack: bool
) -> LayerGroup:
    arch = place.arch
    shard = shard_group(
        len(layers),
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        ff_size=arch.ff_size,
        ranks=ranks,
        rank=rank,
    )
    if arch.windows and len({arch.windows[layer] for layer in layers}) > 1:
        raise ValueError(
            f"layers {layers} see windows of different sizes and cannot run side by side"
        )
    _check_shapes(place.checkpoint, arch, layers)
    attention = [
        _load_unit(place, f"model.layers.{layers[u.layer]}.", u.kv_head, u.query_heads)
        for u in shard.units
    ]
    mlps = [_load_mlp(place, f"model.layers.{layer}.", shard.ff) for layer in layers]
    first, D, E = place.first, arch.head_dim, arch.hidden_size

    def stacked(parts: list[Tensor], *shape: int) -> Tensor:
        return place.put(torch.stack(parts) if parts else torch.zeros(0, *shape))

    def summed_bias(name: str, *, wanted: bool) -> Tensor | None:
        if not (wanted and first):
            return None
        names = [f"model.layers.{layer}.{name}.bias" for layer in layers]
        return place.put(torch.stack([place.checkpoint.read(each).float() for each in names]))

    stack = Stack(
        qkv=stacked([a["qkv"] for a in attention], 2 * D, E),
        out=stacked([a["out"] for a in attention], 0, E),
        gate_up=stacked([m["gate_up"] for m in mlps]),
        down=stacked([m["down"] for m in mlps]),
        qkv_bias=stacked([a["qkv_bias"] for a in attention], 2 * D) if arch.qkv_bias else None,
        out_bias=summed_bias("self_attn.o_proj", wanted=arch.output_bias),
        gate_up_bias=stacked([m["gate_up_bias"] for m in mlps]) if arch.mlp_bias else None,
        down_bias=summed_bias("mlp.down_proj", wanted=arch.mlp_bias),
        qk_norm=stacked([a["qk_norm"] for a in attention], 1, D).float() if arch.qk_norm else None,
    )
    return LayerGroup(number, layers, arch=arch, shard=shard, stack=stack, pack=pack)


def _load_unit(place: _Place, prefix: str, kv_head: int, query_heads: range) -> dict[str, Tensor]:
    """One KV head and its query heads, with the input norm folded in."""
    D, attn = place.arch.head_dim, prefix + "self_attn."
    query_rows = range(query_heads.start * D, query_heads.stop * D)
    kv_rows = range(kv_head * D, (kv_head + 1) * D)
    parts = (("q", query_rows), ("k", kv_rows), ("v", kv_rows))
    norm_E = place.checkpoint.read(prefix + "input_layernorm.weight").float()
    unit = {
        "qkv": torch.cat([place.rows(f"{attn}{p}_proj.weight", rows) for p, rows in parts])
        * norm_E,
        "out": place.columns(attn + "o_proj.weight", query_rows),
    }
    if place.arch.qkv_bias:
        unit["qkv_bias"] = torch.cat(
            [place.rows(f"{attn}{p}_proj.bias", rows) for p, rows in parts]
        )
    if place.arch.qk_norm:
        queries = place.checkpoint.read(attn + "q_norm.weight").float().expand(len(query_heads), -1)
        unit["qk_norm"] = torch.cat(
            (queries, place.checkpoint.read(attn + "k_norm.weight").float()[None])
        )
    return unit


def _load_mlp(place: _Place, prefix: str, ff: range) -> dict[str, Tensor]:
    """One layer's feed-forward units, with the norm before them folded in."""
    norm_E = place.checkpoint.read(prefix + "post_attention_layernorm.weight").float()
    names = (prefix + "mlp.gate_proj", prefix + "mlp.up_proj")
    mlp = {
        "gate_up": torch.cat([place.rows(f"{name}.weight", ff) for name in names]) * norm_E,
        "down": place.columns(prefix + "mlp.down_proj.weight", ff),
    }
    if place.arch.mlp_bias:
        mlp["gate_up_bias"] = torch.cat([place.rows(f"{name}.bias", ff) for name in names])
    return mlp


def _check_shapes(checkpoint: Checkpoint, arch: Architecture, layers: tuple[int, ...]) -> None:
    E, D = arch.hidden_size, arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (E,),
        "post_attention_layernorm": (E,),
        "self_attn.q_proj": (arch.num_heads * D, E),
        "self_attn.k_proj": (arch.num_kv_heads * D, E),
        "self_attn.v_proj": (arch.num_kv_heads * D, E),
        "self_attn.o_proj": (E, arch.num_heads * D),
        "mlp.gate_proj": (arch.ff_size, E),
        "mlp.up_proj": (arch.ff_size, E),
        "mlp.down_proj": (E, arch.ff_size),
    }
    for layer in layers:
        for name, shape in shapes.items():
            checkpoint.check_shape(f"model.layers.{layer}.{name}.weight", shape)


def _row(matrix: Tensor | None, index: int | None) -> Tensor | None:
    return None if matrix is None or index is None else matrix[index]

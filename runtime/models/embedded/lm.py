"""A small Llama for training: stacked weights, an exact pass, and a pass in layer groups.

Letters: `S` sequences, `T` tokens per sequence, `E` model width, `H` query heads, `K` KV heads,
`D` head width, `F` feed-forward width, `V` vocabulary, `L` layers, `U` tokens of the grouped pass.

The weights of one kind are one tensor with a leading `L`: the optimizer then orthogonalises all
layers of a kind in one batched product, and one cast per step makes the half-precision copies.

The two passes, for a group of layers 1..n with input h_1 (a single layer is a group of one):

    exact       u_i = h_i + Attn_i(h_i)            h_{i+1} = u_i + MLP_i(u_i)
    attention   A_i = Attn_i(h_1) for all i;       u_i = h_i + A_i; h_{i+1} = u_i + MLP_i(u_i)
    block       u = h_1 + sum_i Attn_i(h_1)        h_out = u + sum_i MLP_i(u)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

P = ParamSpec("P")
R = TypeVar("R")
Rotation = tuple[Tensor, Tensor]
MIN_QUERY_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything that decides the tensor shapes of a Llama with tied embeddings."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    ff_width: int
    head_width: int = 32
    vocabulary: int = 4096
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    max_positions: int = 2048

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v inside the joint projection."""
        kv = self.num_kv_heads * self.head_width
        return self.num_heads * self.head_width, kv, kv


TARGET = Shape(num_layers=24, width=256, num_heads=8, num_kv_heads=4, ff_width=704)
DRAFTER = Shape(num_layers=8, width=128, num_heads=4, num_kv_heads=2, ff_width=352)


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Which layers of the drafter run side by side, and how their results are joined."""

    policy: str
    size: int

    def groups(self, num_layers: int) -> list[range]:
        """Cut the layers: first and last alone, the middle in runs of `size` (the rest shorter)."""
        middle = range(1, num_layers - 1)
        cut = [middle[i : i + self.size] for i in range(0, len(middle), self.size)]
        return [range(1), *cut, range(num_layers - 1, num_layers)]


class Layer(NamedTuple):
    """One layer's weights in the type of the pass."""

    attention_norm: Tensor  # [E]
    qkv: Tensor  # [(H+2K)D, E]
    out: Tensor  # [E, HD]
    feed_norm: Tensor  # [E]
    gate_up: Tensor  # [2F, E]
    down: Tensor  # [E, F]


class Weights(NamedTuple):
    """One step's view of all weights."""

    layers: list[Layer]
    final_norm: Tensor  # [E]
    embedding: Tensor  # [V, E]


class Llama(nn.Module):
    """The parameters, kept in fp32; the passes below take the copies that `weights` makes."""

    def __init__(self, shape: Shape, *, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        deep, wide = shape.num_layers, shape.width
        rows = sum(shape.qkv_rows)

        def normal(*size: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=generator) * std)

        std = 0.5 / math.sqrt(wide)
        self.embedding = normal(shape.vocabulary, wide, std=0.02)
        self.qkv = normal(deep, rows, wide, std=std)
        self.gate_up = normal(deep, 2 * shape.ff_width, wide, std=std)
        # Zero output projections: every layer starts as the identity, so depth costs no stability.
        self.out = nn.Parameter(torch.zeros(deep, wide, shape.qkv_rows[0]))
        self.down = nn.Parameter(torch.zeros(deep, wide, shape.ff_width))
        self.attention_norm = nn.Parameter(torch.ones(deep, wide))
        self.feed_norm = nn.Parameter(torch.ones(deep, wide))
        self.final_norm = nn.Parameter(torch.ones(wide))

    def matrices(self) -> list[tuple[nn.Parameter, list[int]]]:
        """Stacked matrices with the rows of the independent maps inside each."""
        shape = self.shape
        return [
            (self.qkv, list(shape.qkv_rows)),
            (self.out, [shape.width]),
            (self.gate_up, [shape.ff_width, shape.ff_width]),
            (self.down, [shape.width]),
        ]

    def others(self) -> list[nn.Parameter]:
        """Embedding and norms."""
        return [self.embedding, self.attention_norm, self.feed_norm, self.final_norm]

    def weights(self, dtype: torch.dtype) -> Weights:
        """Cast once for a step; gradients flow back to the fp32 parameters."""
        names = ("attention_norm", "qkv", "out", "feed_norm", "gate_up", "down")
        columns = [getattr(self, name).to(dtype).unbind(0) for name in names]
        layers = [Layer(*row) for row in zip(*columns, strict=True)]
        return Weights(layers, self.final_norm.to(dtype), self.embedding.to(dtype))


def rotation(shape: Shape, positions: Tensor, *, dtype: torch.dtype) -> Rotation:
    """Cosine and sine of the rotary angles, `positions [..., T]` -> twice `[..., T, D]`."""
    step = torch.arange(0, shape.head_width, 2, device=positions.device) / shape.head_width
    angle = positions.float()[..., None] / shape.rope_theta**step
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [..., E]` scaled to unit mean square in fp32, then by `weight [E]`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _rotate(x: Tensor, turn: Rotation) -> Tensor:
    """`x [S, heads, T, D]` turned by its position; halves are the pairs."""
    low, high = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat((-high, low), dim=-1) * turn[1]


def project(shape: Shape, x: Tensor, layer: Layer, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """`x [S, T, E]` -> rotated q `[S, H, T, D]`, rotated k and plain v `[S, K, T, D]`."""
    h = functional.linear(rms_norm(x, layer.attention_norm, shape.norm_eps), layer.qkv)
    heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    rows = h.view(*h.shape[:2], sum(heads), shape.head_width).transpose(1, 2)
    q, k, v = torch.split(rows, heads, dim=1)
    return _rotate(q, turn), _rotate(k, turn), v


def join_heads(mixed: Tensor, layer: Layer) -> Tensor:
    """`mixed [S, H, T, D]` -> the attention block's output `[S, T, E]`."""
    return functional.linear(mixed.transpose(1, 2).flatten(2), layer.out)


def feed_forward(shape: Shape, u: Tensor, layer: Layer) -> Tensor:
    """`u [S, T, E]` -> the gated feed-forward's output `[S, T, E]`, without the residual."""
    h = functional.linear(rms_norm(u, layer.feed_norm, shape.norm_eps), layer.gate_up)
    gate, up = h.chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, layer.down)


def causal_attention(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in blocks of queries, `q [S, H, T, D]`, `k`, `v` `[S, K, T, D]` -> as q.

    Written out because the fused CPU kernel's backward pass takes half of a training step at this
    head width: blocks skip the keys to come, and both products run in bf16 over all heads that
    share a KV head.
    """
    share, tokens = shape.num_heads // shape.num_kv_heads, q.shape[2]
    size = max(MIN_QUERY_BLOCK, tokens // 4)
    grouped = (q * shape.head_width**-0.5).unflatten(1, (-1, share))  # [S, K, share, T, D]
    mixed = []
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        rows = grouped[:, :, :, start:end].flatten(2, 3)  # [S, K, share*block, D]
        scores = (rows @ k[:, :, :end].mT).unflatten(2, (share, end - start)).float()
        seen = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        share_of = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(q.dtype)
        block = share_of.flatten(2, 3) @ v[:, :, :end]
        mixed.append(block.unflatten(2, (share, end - start)))
    return torch.cat(mixed, dim=3).flatten(1, 2)


def exact_layer(
    shape: Shape, x: Tensor, layer: Layer, turn: Rotation
) -> tuple[Tensor, Tensor, Tensor]:
    """One causal layer: `x [S, T, E]` -> the next hidden state and this layer's k, v."""
    q, k, v = project(shape, x, layer, turn)
    u = x + join_heads(causal_attention(shape, q, k, v), layer)
    return u + feed_forward(shape, u, layer), k, v


def attend(shape: Shape, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention under any mask, `q [S, H, U, D]`, `keys`, `values` `[S, K, W, D]` -> as q.

    `mask` is additive and broadcasts over `[S, K, H/K, U, W]`; None sees everything.
    """
    share = shape.num_heads // shape.num_kv_heads
    rows = (q * shape.head_width**-0.5).unflatten(1, (-1, share)).flatten(2, 3)
    scores = (rows @ keys.mT).unflatten(2, (share, -1)).float()
    if mask is not None:
        scores = scores + mask
    mixed: Tensor = scores.softmax(-1).to(q.dtype).flatten(2, 3) @ values
    return mixed.view(q.shape)


def fuzzy_attention(
    shape: Shape,
    x: Tensor,
    layer: Layer,
    turn: Rotation,
    past: tuple[Tensor, Tensor],
    mask: Tensor,
) -> Tensor:
    """Attention of the drafted tokens over exact rows and over each other.

    `x [S, U, E]`, `past` the exact k and v `[S, K, T, D]`, `mask` broadcasting over
    `[S, K, H/K, U, T+U]` -> the attention block's output `[S, U, E]`.
    """
    q, k, v = project(shape, x, layer, turn)
    keys, values = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    return join_heads(attend(shape, q, keys, values, mask), layer)


def logits(shape: Shape, x: Tensor, weights: Weights) -> Tensor:
    """`x [..., E]` -> `[..., V]` in the type of the pass."""
    return functional.linear(rms_norm(x, weights.final_norm, shape.norm_eps), weights.embedding)


def maybe_compile(function: Callable[P, R], *, compiled: bool) -> Callable[P, R]:
    """One graph per set of shapes: every shape of the recipe is fixed."""
    return torch.compile(function, dynamic=False) if compiled else function


class Passes:
    """The layer functions of one shape, optionally compiled (one graph serves all layers)."""

    def __init__(self, shape: Shape, *, compiled: bool) -> None:
        self.shape = shape
        self._exact = maybe_compile(exact_layer, compiled=compiled)
        self._attend = maybe_compile(fuzzy_attention, compiled=compiled)
        self._feed = maybe_compile(feed_forward, compiled=compiled)

    def exact(self, tokens: Tensor, weights: Weights) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """`tokens [S, T]` -> last hidden state `[S, T, E]` and every layer's k, v."""
        x = functional.embedding(tokens, weights.embedding)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        turn = rotation(self.shape, positions, dtype=x.dtype)
        rows = []
        for layer in weights.layers:
            x, k, v = self._exact(self.shape, x, layer, turn)
            rows.append((k, v))
        return x, rows

    def grouped(
        self,
        tokens: Tensor,
        weights: Weights,
        *,
        positions: Tensor,
        past: list[tuple[Tensor, Tensor]],
        mask: Tensor,
        grouping: Grouping,
    ) -> Tensor:
        """Drafted `tokens [S, U]` at `positions [U]` -> last hidden state `[S, U, E]`."""
        x = functional.embedding(tokens, weights.embedding)
        turn = rotation(self.shape, positions, dtype=x.dtype)
        for group in grouping.groups(self.shape.num_layers):
            layers = [weights.layers[i] for i in group]
            heads = [
                self._attend(self.shape, x, layer, turn, past[i], mask)
                for i, layer in zip(group, layers, strict=True)
            ]
            if grouping.policy == "block":
                u = x + torch.stack(heads).sum(0)
                x = u + torch.stack([self._feed(self.shape, u, w) for w in layers]).sum(0)
            else:
                for layer, head in zip(layers, heads, strict=True):
                    u = x + head
                    x = u + self._feed(self.shape, u, layer)
        return x


@torch.no_grad()
def continue_text(
    passes: Passes,
    weights: Weights,
    tokens: Tensor,
    *,
    num_new: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Extend `tokens [S, T]` by `num_new`, greedily or sampled, with a KV cache."""
    shape, (num_rows, known) = passes.shape, tokens.shape
    text = functional.pad(tokens, (0, num_new))
    x, rows = passes.exact(tokens, weights)
    # [S, K, T+new, D] per layer, filled as far as the text is known.
    cache = [tuple(functional.pad(part, (0, 0, 0, num_new)) for part in row) for row in rows]
    turns = rotation(shape, torch.arange(known + num_new, device=text.device), dtype=x.dtype)
    for at in range(known, known + num_new):
        scores = logits(shape, x[:, -1], weights).float()
        if temperature > 0:
            share = (scores / temperature).softmax(-1)
            picked = torch.multinomial(share, 1, generator=generator)[:, 0]
        else:
            picked = scores.argmax(-1)
        text[:, at] = picked
        x = functional.embedding(picked, weights.embedding).view(num_rows, 1, -1)
        turn = (turns[0][at : at + 1], turns[1][at : at + 1])
        for layer, (keys, values) in zip(weights.layers, cache, strict=True):
            q, keys[:, :, at : at + 1], values[:, :, at : at + 1] = project(shape, x, layer, turn)
            mixed = attend(shape, q, keys[:, :, : at + 1], values[:, :, : at + 1], None)
            u = x + join_heads(mixed, layer)
            x = u + feed_forward(shape, u, layer)
    return text

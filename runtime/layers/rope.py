"""Rotary position embedding for the heads of one attention unit: queries, then the key, then the
value.

Letters: T tokens, G query heads per unit, D head width, M longest context.

All heads of a unit are rotated by one multiply-add over `[T, U, G+2, D]`: the value head has cosine
1 and sine 0, and the query heads carry the softmax scale, so that neither costs a kernel of its
own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.runtime.models.arch import Architecture

READY_ELEMENTS = 2**24
"""Up to here rotations are kept for every position, in the shape a pass wants them: 64 MiB each of cos and sin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """What a pass multiplies its heads with: cosines, and sines with the sign of the half they
    meet."""

    cos: Tensor  # [T, 1, G+2, D] float32
    sin: Tensor  # [T, 1, G+2, D] float32


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """`[T, U, G+2, D]` in any dtype to the same shape in float32."""
    half = heads.shape[-1] // 2
    return torch.addcmul(heads * rotation.cos, torch.roll(heads, half, -1), rotation.sin)


class RopeTable:
    """Rotations for every position of a context of up to `max_len` tokens."""

    def __init__(self, arch: Architecture, *, max_len: int, device: torch.device) -> None:
        frequency_D, amplitude = _frequencies(arch, max_len=max_len)
        angle_MD = torch.outer(torch.arange(max_len, dtype=torch.float32), frequency_D)  # [M, D/2]
        cos, sin = angle_MD.cos() * amplitude, angle_MD.sin() * amplitude
        self._cos_MD = torch.cat((cos, cos), dim=1).to(device)
        self._sin_MD = torch.cat((-sin, sin), dim=1).to(device)
        self._scale = arch.head_dim**-0.5
        self._ready: dict[int, Rotation] = {}

    def rotation(self, start: int, *, num_tokens: int, queries: int) -> Rotation:
        """For tokens at positions `start` and on, whose units have `queries` query heads."""
        rows = slice(start, start + num_tokens)
        if self._cos_MD.numel() * (queries + 2) > READY_ELEMENTS:
            return self._make(rows, queries=queries)
        if queries not in self._ready:
            self._ready[queries] = self._make(slice(None), queries=queries)
        ready = self._ready[queries]
        return Rotation(cos=ready.cos[rows], sin=ready.sin[rows])

    def _make(self, rows: slice, *, queries: int) -> Rotation:
        cos_TD, sin_TD = self._cos_MD[rows, None], self._sin_MD[rows, None]  # [T, 1, D]
        cos = torch.ones(cos_TD.shape[0], queries + 2, cos_TD.shape[-1], device=cos_TD.device)
        sin = torch.zeros_like(cos)
        cos[:, :queries] = cos_TD * self._scale
        sin[:, :queries] = sin_TD * self._scale
        cos[:, queries] = cos_TD[:, 0]
        sin[:, queries] = sin_TD[:, 0]
        return Rotation(cos=cos.unsqueeze(1), sin=sin.unsqueeze(1))


def _frequencies(arch: Architecture, *, max_len: int) -> tuple[Tensor, float]:
    """Radians per position of each half-head dimension, and the factor that some scalings put on
    cos and sin."""
    rope = arch.rope
    if rope.kind == "default":
        steps = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
        return 1.0 / rope.theta**steps, 1.0
    # The stretched forms are transformers' own functions: they are the reference for what the
    # numbers in a config.json mean. Those that depend on the context length get the longest one
    # this engine serves, as vLLM does, so that a token's rotation never changes while its sequence
    # grows.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        head_dim=arch.head_dim,
        max_position_embeddings=arch.max_position,
        rope_parameters={"rope_type": rope.kind, "rope_theta": rope.theta, **rope.settings},
    )
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[rope.kind](
        config, torch.device("cpu"), seq_len=max_len
    )
    return frequencies.float(), float(amplitude)

"""Rotary position embedding: the angles of a pass, and turning heads by them.

Letters: T rows, D head width, M positions kept ready.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.runtime.models.arch import Architecture

READY_ELEMENTS = 2**24
"""Up to here the angles of every position are kept: 64 MiB each of cosines and sines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Per row of a pass; sines have the sign of the half they meet."""

    cos: Tensor  # [T, D] float32
    sin: Tensor  # [T, D] float32


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Heads `[T, ..., D]` in any dtype, turned, in float32."""
    shape = (heads.shape[0], *[1] * (heads.dim() - 2), heads.shape[-1])
    cos, sin = rotation.cos.view(shape), rotation.sin.view(shape)
    return torch.addcmul(heads * cos, torch.roll(heads, heads.shape[-1] // 2, -1).float(), sin)


class RopeTable:
    """Rotations for positions of a model. Those beyond `max_len` are computed when asked for: a
    request that keeps only a window may go on for ever."""

    def __init__(self, arch: Architecture, *, max_len: int, device: torch.device) -> None:
        frequency_D, self._amplitude = _frequencies(arch, max_len=max_len)
        self._frequency_D = frequency_D.double().to(device)  # [D/2]
        self.num_ready = min(max_len, READY_ELEMENTS // arch.head_dim)
        """Positions from 0 on whose angles are kept, in `ready`."""
        self.ready = self._make(torch.arange(self.num_ready, device=device))

    def rotation(self, positions_T: Tensor, *, largest: int) -> Rotation:
        """For rows at `positions_T` `[T]`, none of which is beyond `largest`."""
        if largest > self.num_ready:
            return self._make(positions_T)
        return Rotation(
            cos=self.ready.cos.index_select(0, positions_T),
            sin=self.ready.sin.index_select(0, positions_T),
        )

    def _make(self, positions_T: Tensor) -> Rotation:
        angle_TD = torch.outer(positions_T.double(), self._frequency_D)  # [T, D/2]
        cos, sin = (
            (angle_TD.cos() * self._amplitude).float(),
            (angle_TD.sin() * self._amplitude).float(),
        )
        return Rotation(cos=torch.cat((cos, cos), dim=1), sin=torch.cat((-sin, sin), dim=1))


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

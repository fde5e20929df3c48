"""Qwen2, Qwen2.5 and Qwen3, dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paceline.runtime.models import llama
from paceline.runtime.models.arch import Architecture


def architecture_qwen2(config: dict[str, Any]) -> Architecture:
    """Qwen2 and Qwen2.5."""
    base = llama.architecture(config)
    # differs from Llama: q, k, v have biases although config.json does not say so; o has none
    return replace(
        base, family="qwen2", qkv_bias=True, output_bias=False, windows=_windows(config, base)
    )


def architecture_qwen3(config: dict[str, Any]) -> Architecture:
    """Qwen3."""
    base = llama.architecture(config)
    # differs from Llama: query and key heads are normalised before rotation
    return replace(base, family="qwen3", qk_norm=True, windows=_windows(config, base))


def _windows(config: dict[str, Any], base: Architecture) -> tuple[int | None, ...]:
    """The later layers slide where the config says so, by list or by the number of those that do
    not."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    if window is None:
        return ()
    kinds = config.get("layer_types")
    if kinds is None:
        full = config.get("max_window_layers", base.num_layers)
        kinds = [
            "full_attention" if i < full else "sliding_attention" for i in range(base.num_layers)
        ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)

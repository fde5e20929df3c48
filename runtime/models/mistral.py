"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paceline.runtime.models import llama
from paceline.runtime.models.arch import Architecture


def architecture(config: dict[str, Any]) -> Architecture:
    """Mistral 7B, Nemo and their kin."""
    base = llama.architecture(config)
    window = config.get("sliding_window")
    # differs from Llama: attention sees the last `sliding_window` positions, in every layer
    return replace(base, family="mistral", windows=(window,) * base.num_layers)

"""The shape of a model, read from its folder's config.json.

One record serves all families: each family file says how its config.json maps to it, and nothing
downstream asks which family it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.runtime.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: its base and, for models stretched past their first context,
    how."""

    theta: float = 10000.0
    kind: str = "default"
    """"default", "linear", "dynamic", "yarn", "llama3" or "longrope"."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The scaling's own numbers, as config.json names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Everything a forward pass needs to know about a model's shape."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ff_size: int
    norm_eps: float
    max_position: int
    rope: Rope
    tied_embeddings: bool
    dtype: str
    """What the weights are stored in: "bfloat16", "float16" or "float32"."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Normalise every query and key head before rotation."""
    windows: tuple[int | None, ...] = ()
    """Per layer, how many last positions attention sees; None is all."""
    eos_token_ids: tuple[int, ...] = ()


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError where there is none or it is no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json: not a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return config


def read_architecture(folder: Path) -> Architecture:
    """The architecture of the model in `folder`. Raises ModelError for a family that is not
    supported."""
    config = read_config(folder)
    names = config.get("architectures") or ["(none named)"]
    families = supported()
    for name in names:
        if name in families:
            try:
                return families[name](config)
            except KeyError as error:
                raise ModelError(f"{folder / 'config.json'} lacks {error}") from None
    raise ModelError(
        f"architecture {', '.join(names)} is not supported; supported: {', '.join(sorted(families))}"
    )


def supported() -> dict[str, Callable[[dict[str, Any]], Architecture]]:
    """Class names in config.json, and the function that reads each."""
    from paceline.runtime.models import llama, mistral, qwen

    return {
        "LlamaForCausalLM": llama.architecture,
        "MistralForCausalLM": mistral.architecture,
        "Qwen2ForCausalLM": qwen.architecture_qwen2,
        "Qwen3ForCausalLM": qwen.architecture_qwen3,
    }


def read_rope(config: dict[str, Any]) -> Rope:
    """RoPE from either spelling: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(scaling.pop("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3", "longrope"):
        raise ModelError(f"rope scaling {kind!r} is not supported")
    return Rope(theta=theta, kind=kind, settings=scaling)


def context_length(wanted: int | None, arch: Architecture) -> int:
    """Longest prompt and output together. Raises ConfigError where more is asked for than the model
    knows."""
    if wanted is not None and wanted > arch.max_position:
        raise ConfigError(
            f"max_model_len {wanted} exceeds the model's own limit of {arch.max_position}"
        )
    return wanted or arch.max_position


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """config.json writes none, one or several token ids."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)

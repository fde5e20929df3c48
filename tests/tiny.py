"""Small random Llamas on disk, and a plain emulation of the drafting equations to hold ours against.

The emulation is written for reading, straight from the equations: one process, one layer after another, whole
attention matrices, no folding, no stacking. It shares no code with the runtime.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 44,
    "max_position_embeddings": 256,
}


def save_tiny(folder: Path, *, seed: int = 0, noise: float = 0.0, **shape: int) -> Path:
    """Random weights large enough that every layer matters.

    `noise` perturbs the weights of the same seed: a drafter that often, not always, agrees with its target.
    """
    config = {**SHAPE, **shape}
    width, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    kv, ff = config["num_key_value_heads"] * config["head_dim"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(seed)
    other = torch.Generator().manual_seed(seed + 1)

    def random(*size: int, scale: float) -> Tensor:
        weight = torch.randn(*size, generator=generator) * scale
        return weight + torch.randn(*size, generator=other) * scale * noise

    tensors = {
        "model.embed_tokens.weight": random(config["vocab_size"], width, scale=1.0),
        "model.norm.weight": 1 + random(width, scale=0.1),
        "lm_head.weight": random(config["vocab_size"], width, scale=0.5),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": 1 + random(width, scale=0.1),
            prefix + "post_attention_layernorm.weight": 1 + random(width, scale=0.1),
            prefix + "self_attn.q_proj.weight": random(heads, width, scale=0.3),
            prefix + "self_attn.k_proj.weight": random(kv, width, scale=0.3),
            prefix + "self_attn.v_proj.weight": random(kv, width, scale=0.2),
            prefix + "self_attn.o_proj.weight": random(width, heads, scale=0.2),
            prefix + "mlp.gate_proj.weight": random(ff, width, scale=0.2),
            prefix + "mlp.up_proj.weight": random(ff, width, scale=0.2),
            prefix + "mlp.down_proj.weight": random(width, ff, scale=0.2),
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Emulation:
    """A model in one process. `rows[i]` holds layer i's keys and values, `[K, S, D]` each."""

    folder: Path
    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = json.loads((self.folder / "config.json").read_text())
        self.tensors = load_file(self.folder / "model.safetensors")

    def logits(
        self, token_ids: list[int], *, start: int, groups: list[list[int]], policy: str
    ) -> Tensor:
        """Feed tokens at `start`, forgetting later rows, with each group side by side: `[T, V]`."""
        h = self.tensors["model.embed_tokens.weight"][token_ids]
        for group in groups:
            h = self._group(h, group, start=start, policy=policy)
        return self._norm(h, "model.norm.weight") @ self.tensors["lm_head.weight"].T

    def _group(self, h: Tensor, group: list[int], *, start: int, policy: str) -> Tensor:
        outputs = [self._attention(h, layer, start=start) for layer in group]
        if policy == "block" and len(group) > 1:
            u = h + sum(outputs)
            return u + sum(self._mlp(u, layer) for layer in group)
        for layer, A in zip(group, outputs, strict=True):
            u = h + A
            h = u + self._mlp(u, layer)
        return h

    def _attention(self, h: Tensor, layer: int, *, start: int) -> Tensor:
        c, T = self.config, h.shape[0]
        D, prefix = c["head_dim"], f"model.layers.{layer}."
        x = self._norm(h, prefix + "input_layernorm.weight")
        q, k, v = (
            (x @ self.tensors[f"{prefix}self_attn.{name}_proj.weight"].T)
            .view(T, -1, D)
            .transpose(0, 1)
            for name in "qkv"
        )
        positions = torch.arange(start, start + T)
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        if layer in self.rows:
            old_k, old_v = self.rows[layer]
            k, v = torch.cat((old_k[:, :start], k), 1), torch.cat((old_v[:, :start], v), 1)
        self.rows[layer] = (k, v)
        share = c["num_attention_heads"] // c["num_key_value_heads"]
        k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
        scores = q @ k.transpose(1, 2) / D**0.5
        hidden = torch.arange(start + T)[None, :] > positions[:, None]
        context = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        flat = context.transpose(0, 1).reshape(T, -1)
        return flat @ self.tensors[prefix + "self_attn.o_proj.weight"].T

    def _mlp(self, u: Tensor, layer: int) -> Tensor:
        prefix = f"model.layers.{layer}."
        x = self._norm(u, prefix + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(x @ self.tensors[prefix + "mlp.gate_proj.weight"].T)
        return (gate * (x @ self.tensors[prefix + "mlp.up_proj.weight"].T)) @ self.tensors[
            prefix + "mlp.down_proj.weight"
        ].T

    def _norm(self, h: Tensor, weight: str) -> Tensor:
        return h * (h.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * self.tensors[weight]

    def _rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        half = heads.shape[-1] // 2
        angle = positions[:, None] / 10000 ** (torch.arange(half) / half)
        a, b = heads[..., :half], heads[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

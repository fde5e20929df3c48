"""Weights to and from a Hugging Face folder (LlamaForCausalLM, bf16, tied embeddings)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .lm import Llama, Shape

# Our stacked tensors and, per row block, the name of the module that holds it.
_SPLITS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "attention_norm": ("input_layernorm",),
    "feed_norm": ("post_attention_layernorm",),
}
_SINGLE = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.ff_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }


def _shape(config: dict[str, object]) -> Shape:
    names = {
        "num_layers": "num_hidden_layers",
        "width": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "ff_width": "intermediate_size",
        "head_width": "head_dim",
        "vocabulary": "vocab_size",
    }
    values = {ours: int(str(config[theirs])) for ours, theirs in names.items()}
    return Shape(**values)


def _rows(shape: Shape, name: str) -> list[int]:
    if name == "qkv":
        return list(shape.qkv_rows)
    return [shape.ff_width] * 2 if name == "gate_up" else [shape.width]


def save_model(model: Llama, folder: Path) -> None:
    """Write config, generation config and weights (not the tokenizer) into `folder`."""
    shape, tensors = model.shape, dict[str, Tensor]()
    for ours, theirs in _SINGLE.items():
        tensors[theirs] = getattr(model, ours)
    for ours, modules in _SPLITS.items():
        for index, stacked in enumerate(getattr(model, ours).unbind(0)):
            parts = stacked.split(_rows(shape, ours), dim=0)
            for module, part in zip(modules, parts, strict=True):
                tensors[f"model.layers.{index}.{module}.weight"] = part
    half = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


@torch.no_grad()
def load_model(folder: Path) -> Llama:
    """Read a folder that `save_model` wrote, into fp32 parameters."""
    shape = _shape(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    model = Llama(shape, generator=torch.Generator())
    for ours, theirs in _SINGLE.items():
        getattr(model, ours).copy_(tensors[theirs])
    for ours, modules in _SPLITS.items():
        stack = [
            torch.cat([tensors[f"model.layers.{index}.{module}.weight"] for module in modules])
            for index in range(shape.num_layers)
        ]
        getattr(model, ours).copy_(torch.stack(stack))
    return model

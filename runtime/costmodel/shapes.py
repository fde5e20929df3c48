"""What a model consists of, as far as its size and speed go: dense decoders with grouped queries and a gated MLP.

Norms and biases, less than a thousandth of all weights, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's own numbers, under the names of config.json."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ff_size: int
    vocab_size: int
    tied_embeddings: bool = False
    itemsize: int = 2
    """Bytes of a weight, and of a key's or value's element: 2 for bfloat16."""

    @property
    def attention_params(self) -> int:
        """Of one layer."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return heads * self.head_dim * self.hidden_size

    @property
    def mlp_params(self) -> int:
        """Of one layer."""
        return 3 * self.hidden_size * self.ff_size

    @property
    def embedding_params(self) -> int:
        """Of the table; an untied head is as large again."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        tables = 1 if self.tied_embeddings else 2
        return (
            self.num_layers * (self.attention_params + self.mlp_params)
            + tables * self.embedding_params
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers, on all ranks together where none is held twice."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def attention_share(self) -> float:
        """Of a layer's weights: what running attention side by side can save at most."""
        return self.attention_params / (self.attention_params + self.mlp_params)


def _shape(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ff: int,
    vocab: int,
    *,
    tied: bool = False,
) -> Shape:
    return Shape(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ff_size=ff,
        vocab_size=vocab,
        tied_embeddings=tied,
    )


_LLAMA_70B = _shape(80, 8192, 64, 8, 128, 28672, 128256)
_LLAMA_8B = _shape(32, 4096, 32, 8, 128, 14336, 128256)

SHAPES = {
    "Llama-3-8B": _LLAMA_8B,
    "Llama-3-70B": _LLAMA_70B,
    "Llama-3.1-8B": _LLAMA_8B,
    "Llama-3.1-70B": _LLAMA_70B,
    "Llama-3.1-405B": _shape(126, 16384, 128, 8, 128, 53248, 128256),
    "Llama-3.2-1B": _shape(16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    "Llama-3.2-3B": _shape(28, 3072, 24, 8, 128, 8192, 128256, tied=True),
    "Llama-3.3-70B": _LLAMA_70B,
    "Mistral-7B-v0.3": _shape(32, 4096, 32, 8, 128, 14336, 32768),
    "Qwen2-0.5B": _shape(24, 896, 14, 2, 64, 4864, 151936, tied=True),
    "Qwen2-1.5B": _shape(28, 1536, 12, 2, 128, 8960, 151936, tied=True),
    "Qwen2-7B": _shape(28, 3584, 28, 4, 128, 18944, 152064),
    "Qwen2-72B": _shape(80, 8192, 64, 8, 128, 29568, 152064),
    "Qwen2.5-0.5B": _shape(24, 896, 14, 2, 64, 4864, 151936, tied=True),
    "Qwen2.5-1.5B": _shape(28, 1536, 12, 2, 128, 8960, 151936, tied=True),
    "Qwen2.5-3B": _shape(36, 2048, 16, 2, 128, 11008, 151936, tied=True),
    "Qwen2.5-7B": _shape(28, 3584, 28, 4, 128, 18944, 152064),
    "Qwen2.5-14B": _shape(48, 5120, 40, 8, 128, 13824, 152064),
    "Qwen2.5-32B": _shape(64, 5120, 40, 8, 128, 27648, 152064),
    "Qwen2.5-72B": _shape(80, 8192, 64, 8, 128, 29568, 152064),
    "Qwen3-0.6B": _shape(28, 1024, 16, 8, 128, 3072, 151936, tied=True),
    "Qwen3-1.7B": _shape(28, 2048, 16, 8, 128, 6144, 151936, tied=True),
    "Qwen3-8B": _shape(36, 4096, 32, 8, 128, 12288, 151936),
    "Qwen3-32B": _shape(64, 5120, 64, 8, 128, 25600, 151936),
}
"""Public models, from the config.json that each is published with."""


def known_shape(model: str) -> Shape | None:
    """Of a public model by its name or hub id, tuned for instructions or not; None for others."""
    name = model.rpartition("/")[2].lower().removeprefix("meta-")
    for end in ("-instruct", "-chat", "-base"):
        name = name.removesuffix(end)
    return next((shape for known, shape in SHAPES.items() if known.lower() == name), None)

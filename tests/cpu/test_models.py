"""Every family and every way to stretch RoPE gives the logits that transformers gives.

Weights are random and not small, so logits are of the order of 1 to 10, and 1e-4 is what float32
leaves. A sequence goes through in one pass, and in ragged passes over the KV pool: short ones, which
form scores in full, and long ones, which take the fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cpu.conftest import SHAPE
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from paceline.parallel.collectives import Alone
from paceline.parallel.launch import solo_mesh
from paceline.parallel.layer import Groups, exact_groups, layer_groups
from paceline.parallel.mesh import Axis
from paceline.runtime.config import EngineConfig
from paceline.runtime.layers.attention import FEW_ROWS
from paceline.runtime.loading import load_target
from paceline.runtime.models.arch import read_architecture
from paceline.runtime.models.llama import load_decoder
from paceline.runtime.models.model import Model
from paceline.runtime.models.weights import Checkpoint

SaveModel = Callable[..., tuple[Path, PreTrainedModel]]

NUM_TOKENS = 60
PASSES = {
    "whole": (60,),
    "ragged": (40, 1, 6, 13),
    "single tokens at the end": (55, 1, 1, 1, 1, 1),
    "two long": (FEW_ROWS + 1, NUM_TOKENS - FEW_ROWS - 1),
    "at the limit": (FEW_ROWS, NUM_TOKENS - FEW_ROWS),
}
each_way_to_pass = pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES.keys())


def random_tokens(count: int = NUM_TOKENS, *, vocab_size: int = 97) -> Tensor:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(1))


def make_model(
    folder: Path,
    *,
    max_len: int = NUM_TOKENS,
    dtype: torch.dtype = torch.float32,
    groups: Groups | None = None,
    num_regions: int = 1,
    axis: Axis | None = None,
) -> Model:
    """The model on one rank, with room for `max_len` tokens whatever its config says."""
    arch = read_architecture(folder)
    mesh = solo_mesh()
    decoder = load_decoder(
        Checkpoint(folder),
        arch,
        groups=groups or exact_groups(arch.num_layers),
        axis=axis or mesh.target,
        dtype=dtype,
        device=mesh.device,
    )
    return Model(
        decoder,
        num_regions=num_regions,
        max_len=max_len,
        kv_dtype=torch.float32,
        device=mesh.device,
    )


@torch.inference_mode()
def logits(model: Model, token_ids: Tensor, passes: Sequence[int], *, region: int = 0) -> Tensor:
    """Logits of every token, `[T, V]`, fed in passes of the given numbers of rows."""
    assert sum(passes) == len(token_ids)
    start, parts = 0, []
    for num_rows in passes:
        rows = model.rows(token_ids[start : start + num_rows], start=start, region=region)
        parts.append(model.decoder.logits(model.decoder.exact(rows)))
        start += num_rows
    return torch.cat(parts)


@torch.inference_mode()
def reference(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    found: Tensor = model(token_ids[None]).logits[0].float()
    return found


def assert_same(found: Tensor, expected: Tensor, *, within: float = 1e-4) -> None:
    assert expected.std() > 0.1, "logits as flat as that would hide a mistake"
    assert (found - expected).abs().max().item() < within


def check(folder: Path, model: PreTrainedModel, passes: Sequence[int] = (40, 1, 6, 13)) -> None:
    token_ids = random_tokens(vocab_size=model.config.vocab_size)
    assert_same(logits(make_model(folder), token_ids, passes), reference(model, token_ids))


# ------------------------------------------------------------------------------------------ families

LLAMAS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "a KV head per query head": {"num_key_value_heads": 4},
    "one KV head": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "attention biases": {"attention_bias": True},
    "mlp biases": {"mlp_bias": True},
    "odd vocabulary": {"vocab_size": 101},
    "heads wider than hidden / heads": {"head_dim": 12},
    "heads narrower than hidden / heads": {"head_dim": 4},
    "another base and epsilon": {"rope_theta": 500000.0, "rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS.keys())
def test_llama_gives_the_logits_of_transformers(
    save_model: SaveModel, changes: dict[str, Any]
) -> None:
    check(*save_model(LlamaConfig(**(SHAPE | changes))))


FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=9),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=2),
    "qwen3": Qwen3Config(**SHAPE, head_dim=12),
}


@each_way_to_pass
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_passes_of_any_length_give_the_logits_of_transformers(
    save_model: SaveModel, config: PreTrainedConfig, passes: tuple[int, ...]
) -> None:
    check(*save_model(config), passes)


OTHERS: dict[str, PreTrainedConfig] = {
    "mistral without a window": MistralConfig(**SHAPE, sliding_window=None),
    "mistral with a window longer than the text": MistralConfig(**SHAPE, sliding_window=64),
    "mistral with wide heads": MistralConfig(**SHAPE, sliding_window=9, head_dim=16),
    "qwen2 without windows": Qwen2Config(**SHAPE, sliding_window=9),
    "qwen2 with tied embeddings": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2 sliding in every layer": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=0
    ),
    "qwen3 with attention biases": Qwen3Config(**SHAPE, head_dim=8, attention_bias=True),
    "qwen3 sliding from layer 1 on": Qwen3Config(
        **SHAPE, head_dim=8, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3 with tied embeddings": Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_variant_gives_the_logits_of_transformers(
    save_model: SaveModel, config: PreTrainedConfig
) -> None:
    check(*save_model(config))


def test_window_shorter_than_the_text_changes_the_logits(save_model: SaveModel) -> None:
    """Else the sliding tests above would show nothing."""
    token_ids = random_tokens()
    texts = [
        logits(
            make_model(save_model(MistralConfig(**SHAPE, sliding_window=w))[0]), token_ids, (60,)
        )
        for w in (9, None)
    ]
    assert (texts[0] - texts[1]).abs().max() > 0.01


def test_qwen2_that_slides_from_a_layer_on_knows_which(save_model: SaveModel) -> None:
    folder, _ = save_model(FAMILIES["qwen2"])
    assert read_architecture(folder).windows == (None, None, 9, 9)


# -------------------------------------------------------------------------------------------- rope

ORIGINAL = 32
"""The first context of the stretched models below; texts are 60 tokens, beyond it."""

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn of a set strength": {
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "attention_factor": 0.7,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 5.0],
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def stretched(name: str) -> LlamaConfig:
    kind = name.split()[0]
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[name]}
    # dynamic stretches from the config's own limit on, which is therefore its first context
    limit = ORIGINAL if kind == "dynamic" else 128
    return LlamaConfig(
        **(SHAPE | {"max_position_embeddings": limit}),
        rope_parameters=parameters,
    )


@each_way_to_pass
@pytest.mark.parametrize("name", ROPES)
def test_stretched_rope_gives_the_logits_of_transformers_beyond_the_first_context(
    save_model: SaveModel, name: str, passes: tuple[int, ...]
) -> None:
    # transformers stretches dynamic and longrope for the text it is given, we for the longest one
    # the engine serves: with room for just this text both mean the same
    check(*save_model(stretched(name)), passes)


@pytest.mark.parametrize("name", ROPES)
def test_stretching_changes_the_logits(save_model: SaveModel, name: str) -> None:
    """Else the tests above would show nothing."""
    token_ids = random_tokens()
    texts = [
        logits(make_model(save_model(config)[0]), token_ids, (60,))
        for config in (stretched(name), FAMILIES["llama"])
    ]
    assert (texts[0] - texts[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_rope_is_not_stretched_where_the_engine_serves_the_first_context_only(
    save_model: SaveModel, name: str
) -> None:
    folder, model = save_model(stretched(name))
    token_ids = random_tokens(ORIGINAL)
    found = logits(make_model(folder, max_len=ORIGINAL), token_ids, (20, 12))
    assert_same(found, reference(model, token_ids))


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_rotation_of_a_token_does_not_change_while_its_text_grows(
    save_model: SaveModel, name: str
) -> None:
    folder, _ = save_model(stretched(name))
    token_ids = random_tokens()
    short = logits(make_model(folder), token_ids[:ORIGINAL], (ORIGINAL,))
    long = logits(make_model(folder), token_ids, (NUM_TOKENS,))
    assert_same(short, long[:ORIGINAL])


def test_rope_in_the_old_spelling_means_the_same(
    save_model: SaveModel, rewrite_config: Callable[..., None]
) -> None:
    folder, model = save_model(stretched("llama3"))
    settings = ROPES["llama3"]
    rewrite_config(
        folder,
        drop=("rope_parameters",),
        rope_theta=10000.0,
        rope_scaling={"type": "llama3", **settings},
    )
    check(folder, model)


# ------------------------------------------------------------------------------------------ loading


def test_layers_loaded_in_groups_give_the_same_exact_pass(save_model: SaveModel) -> None:
    folder, model = save_model(
        LlamaConfig(**(SHAPE | {"num_hidden_layers": 6}), attention_bias=True, mlp_bias=True)
    )
    token_ids = random_tokens()
    grouped = make_model(folder, groups=layer_groups(6, size=2))
    assert_same(logits(grouped, token_ids, (40, 1, 6, 13)), reference(model, token_ids))


def test_sharded_weights_are_found(save_model: SaveModel) -> None:
    folder, model = save_model(FAMILIES["llama"], max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    check(folder, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_half_precision_stays_near_the_same_weights_in_float32(
    save_model: SaveModel, config: PreTrainedConfig, dtype: torch.dtype
) -> None:
    folder, model = save_model(config, dtype=dtype)
    token_ids = random_tokens()
    found = logits(make_model(folder, dtype=dtype), token_ids, (40, 1, 6, 13))
    expected = reference(model.float(), token_ids)
    # a mistake moves a logit by its own spread; rounding by a small part of it
    assert (found - expected).abs().mean() < 0.1 * expected.std()


def test_regions_of_one_pool_do_not_see_each_other(save_model: SaveModel) -> None:
    folder, reference_model = save_model(FAMILIES["llama"])
    model, token_ids = make_model(folder, num_regions=2), random_tokens()
    logits(model, token_ids.flip(0), (NUM_TOKENS,), region=0)
    found = logits(model, token_ids, (40, 1, 6, 13), region=1)
    assert_same(found, reference(reference_model, token_ids))


def test_rows_written_again_replace_what_was_there(save_model: SaveModel) -> None:
    folder, reference_model = save_model(FAMILIES["llama"])
    model, token_ids = make_model(folder), random_tokens()
    logits(model, token_ids.flip(0), (NUM_TOKENS,))
    assert_same(logits(model, token_ids, (1, 59)), reference(reference_model, token_ids))


def test_engine_loads_what_the_parts_load(save_model: SaveModel) -> None:
    folder, reference_model = save_model(FAMILIES["llama"])
    config = EngineConfig(model=str(folder), max_model_len=64)
    model = load_target(config, solo_mesh(), num_regions=1)
    assert model is not None
    assert model.pool.max_len == 64
    token_ids = random_tokens()
    assert_same(logits(model, token_ids, (40, 20)), reference(reference_model, token_ids))


def test_rows_beyond_the_pool_are_refused(save_model: SaveModel) -> None:
    model = make_model(save_model(FAMILIES["llama"])[0], max_len=8)
    with pytest.raises(AssertionError, match=r"rows within 8, found 5\+4"):
        model.rows(random_tokens(4), start=5, region=0)


@pytest.mark.parametrize("num_rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_rank_without_a_query_head_adds_nothing(save_model: SaveModel, num_rows: int) -> None:
    config = LlamaConfig(**(SHAPE | {"num_attention_heads": 2, "num_key_value_heads": 1}))
    model = make_model(save_model(config)[0], axis=Axis(size=3, index=2, collectives=Alone()))
    rows = model.rows(random_tokens(num_rows), start=0, region=0)
    attention = model.decoder.groups[0].attention(torch.ones(num_rows, 32), 0, rows=rows)
    assert torch.equal(attention, torch.zeros(num_rows, 32))

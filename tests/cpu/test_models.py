"""Every family and every way to stretch RoPE gives the logits that transformers gives.

Weights are random and not small, so logits are of the order of 1 to 10, and 1e-4 is what float32
leaves. A text goes through in one pass, and in ragged passes over KV blocks that lie scattered in
their pool; alone, and packed with others; with the compiled kernels, and with torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cpu.conftest import SHAPE
from tests.paged import Place, ScatteredBlocks
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
from paceline.runtime.config import EngineConfig, make_config
from paceline.runtime.errors import ConfigError
from paceline.runtime.inputs import Segment
from paceline.runtime.loading import load
from paceline.runtime.models.arch import read_architecture
from paceline.runtime.models.llama import load_decoder
from paceline.runtime.models.model import Model
from paceline.runtime.models.weights import Checkpoint

SaveModel = Callable[..., tuple[Path, PreTrainedModel]]

NUM_TOKENS = 60
NUM_BLOCKS = 40
PASSES = {
    "whole": (60,),
    "ragged": (40, 1, 6, 13),
    "single tokens at the end": (55, 1, 1, 1, 1, 1),
    "up to the end of a block": (16, 15, 1, 28),
    "across the end of a block": (15, 2, 30, 13),
}
each_way_to_pass = pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES.keys())


def random_tokens(count: int = NUM_TOKENS, *, vocab_size: int = 97) -> Tensor:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(1))


def make_model(
    folder: Path,
    *,
    native: bool,
    max_len: int = NUM_TOKENS,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype = torch.float32,
    groups: Groups | None = None,
    axis: Axis | None = None,
) -> Model:
    """The model on one rank, serving texts of up to `max_len` tokens whatever its config says."""
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
        num_blocks=NUM_BLOCKS,
        block_size=16,
        max_len=max_len,
        kv_dtype=kv_dtype,
        device=mesh.device,
        use_kernels=native,
    )


@torch.inference_mode()
def logits(
    model: Model, token_ids: Tensor, passes: Sequence[int], *, place: Place | None = None
) -> Tensor:
    """Logits of every token, `[T, V]`, fed in passes of the given numbers of rows."""
    assert sum(passes) == len(token_ids)
    place = place or Place(ScatteredBlocks(NUM_BLOCKS))
    start, parts = 0, []
    for num_rows in passes:
        parts.append(feed(model, token_ids, [(place, start, num_rows)]))
        start += num_rows
    return torch.cat(parts)


@torch.inference_mode()
def feed(model: Model, token_ids: Tensor, parts: Sequence[tuple[Place, int, int]]) -> Tensor:
    """One packed pass, `[T, V]`: of each place, so many rows of the text from a start on."""
    segments = [place.segment(start=start, num_rows=count) for place, start, count in parts]
    fed = torch.cat([token_ids[start : start + count] for _, start, count in parts])
    return model.decoder.logits(model.decoder.exact(model.rows(fed, segments)))


@torch.inference_mode()
def reference(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    found: Tensor = model(token_ids[None]).logits[0].float()
    return found


def assert_same(found: Tensor, expected: Tensor, *, within: float = 1e-4) -> None:
    assert expected.std() > 0.1, "logits as flat as that would hide a mistake"
    assert (found - expected).abs().max().item() < within


def check(
    folder: Path, model: PreTrainedModel, passes: Sequence[int] = (40, 1, 6, 13), *, native: bool
) -> None:
    token_ids = random_tokens(vocab_size=model.config.vocab_size)
    found = logits(make_model(folder, native=native), token_ids, passes)
    assert_same(found, reference(model, token_ids))


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
    save_model: SaveModel, native: bool, changes: dict[str, Any]
) -> None:
    check(*save_model(LlamaConfig(**(SHAPE | changes))), native=native)


FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=9),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=2),
    "qwen3": Qwen3Config(**SHAPE, head_dim=12),
}


@each_way_to_pass
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_passes_of_any_length_give_the_logits_of_transformers(
    save_model: SaveModel, native: bool, config: PreTrainedConfig, passes: tuple[int, ...]
) -> None:
    check(*save_model(config), passes, native=native)


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
    save_model: SaveModel, native: bool, config: PreTrainedConfig
) -> None:
    check(*save_model(config), native=native)


def test_window_shorter_than_the_text_changes_the_logits(
    save_model: SaveModel, native: bool
) -> None:
    """Else the sliding tests above would show nothing."""
    token_ids = random_tokens()
    texts = []
    for window in (9, None):
        folder, _ = save_model(MistralConfig(**SHAPE, sliding_window=window))
        texts.append(logits(make_model(folder, native=native), token_ids, (60,)))
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
    save_model: SaveModel, native: bool, name: str, passes: tuple[int, ...]
) -> None:
    # transformers stretches dynamic and longrope for the text it is given, we for the longest one
    # the engine serves: with room for just this text both mean the same
    check(*save_model(stretched(name)), passes, native=native)


@pytest.mark.parametrize("name", ROPES)
def test_stretching_changes_the_logits(save_model: SaveModel, native: bool, name: str) -> None:
    """Else the tests above would show nothing."""
    token_ids = random_tokens()
    texts = [
        logits(make_model(save_model(config)[0], native=native), token_ids, (60,))
        for config in (stretched(name), FAMILIES["llama"])
    ]
    assert (texts[0] - texts[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_rope_is_not_stretched_where_the_engine_serves_the_first_context_only(
    save_model: SaveModel, native: bool, name: str
) -> None:
    folder, model = save_model(stretched(name))
    token_ids = random_tokens(ORIGINAL)
    found = logits(make_model(folder, native=native, max_len=ORIGINAL), token_ids, (20, 12))
    assert_same(found, reference(model, token_ids))


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_rotation_of_a_token_does_not_change_while_its_text_grows(
    save_model: SaveModel, native: bool, name: str
) -> None:
    folder, _ = save_model(stretched(name))
    token_ids = random_tokens()
    short = logits(make_model(folder, native=native), token_ids[:ORIGINAL], (ORIGINAL,))
    long = logits(make_model(folder, native=native), token_ids, (NUM_TOKENS,))
    assert_same(short, long[:ORIGINAL])


def test_rope_in_the_old_spelling_means_the_same(
    save_model: SaveModel, native: bool, rewrite_config: Callable[..., None]
) -> None:
    folder, model = save_model(stretched("llama3"))
    settings = ROPES["llama3"]
    rewrite_config(
        folder,
        drop=("rope_parameters",),
        rope_theta=10000.0,
        rope_scaling={"type": "llama3", **settings},
    )
    check(folder, model, native=native)


# ------------------------------------------------------------------------------------------ loading


def test_layers_loaded_in_groups_give_the_same_exact_pass(
    save_model: SaveModel, native: bool
) -> None:
    folder, model = save_model(
        LlamaConfig(**(SHAPE | {"num_hidden_layers": 6}), attention_bias=True, mlp_bias=True)
    )
    token_ids = random_tokens()
    grouped = make_model(folder, native=native, groups=layer_groups(6, size=2))
    assert_same(logits(grouped, token_ids, (40, 1, 6, 13)), reference(model, token_ids))


def test_sharded_weights_are_found(save_model: SaveModel, native: bool) -> None:
    folder, model = save_model(FAMILIES["llama"], max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    check(folder, model, native=native)


HALVES = {
    "bfloat16": (torch.bfloat16, torch.float32),
    "bfloat16, KV too": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float32),
}


@pytest.mark.parametrize("dtypes", HALVES.values(), ids=HALVES.keys())
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_half_precision_stays_near_the_same_weights_in_float32(
    save_model: SaveModel,
    native: bool,
    config: PreTrainedConfig,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    folder, model = save_model(config, dtype=dtypes[0])
    token_ids = random_tokens()
    found = logits(
        make_model(folder, native=native, dtype=dtypes[0], kv_dtype=dtypes[1]),
        token_ids,
        (40, 1, 6, 13),
    )
    expected = reference(model.float(), token_ids)
    # a mistake moves a logit by its own spread; rounding by a small part of it
    assert (found - expected).abs().mean() < 0.1 * expected.std()


# ------------------------------------------------------------------------------------- packed passes


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_packed_pass_over_many_requests_gives_each_what_it_gets_alone(
    save_model: SaveModel, native: bool, config: PreTrainedConfig
) -> None:
    """Prompt chunks, decoding and rows to verify, of texts of all lengths, in the same passes."""
    folder, reference_model = save_model(config)
    model, blocks = make_model(folder, native=native), ScatteredBlocks(NUM_BLOCKS, seed=3)
    texts = [random_tokens(NUM_TOKENS).roll(i) for i in range(6)]
    schedules = ((60,), (1, 1, 1, 1, 56), (40, 1, 6, 1, 12), (31, 29), (16, 1, 5), (17, 2, 2, 39))
    places = [Place(blocks) for _ in texts]
    done = [0] * len(texts)
    found: list[list[Tensor]] = [[] for _ in texts]
    for number in range(5):
        taking = [i for i, schedule in enumerate(schedules) if number < len(schedule)]
        counts = [schedules[i][number] for i in taking]
        segments = [
            places[i].segment(start=done[i], num_rows=count)
            for i, count in zip(taking, counts, strict=True)
        ]
        fed = [texts[i][done[i] : done[i] + count] for i, count in zip(taking, counts, strict=True)]
        with torch.inference_mode():
            h_TE = model.decoder.exact(model.rows(torch.cat(fed), segments))
            parts = torch.split(model.decoder.logits(h_TE), counts)
        for i, count, part in zip(taking, counts, parts, strict=True):
            found[i].append(part)
            done[i] += count
    alone = make_model(folder, native=native)
    for text, schedule, ours in zip(texts, schedules, found, strict=True):
        text = text[: sum(schedule)]
        assert_same(torch.cat(ours), logits(alone, text, (len(text),)))
        assert_same(torch.cat(ours), reference(reference_model, text))


def test_requests_do_not_see_each_other_s_blocks(save_model: SaveModel, native: bool) -> None:
    folder, reference_model = save_model(FAMILIES["llama"])
    model, token_ids = make_model(folder, native=native), random_tokens()
    blocks = ScatteredBlocks(NUM_BLOCKS)
    other, own = Place(blocks), Place(blocks)
    logits(model, token_ids.flip(0), (NUM_TOKENS,), place=other)
    found = logits(model, token_ids, (40, 1, 6, 13), place=own)
    assert set(other.table.ids().tolist()).isdisjoint(own.table.ids().tolist())
    assert_same(found, reference(reference_model, token_ids))


def test_requests_may_share_the_blocks_of_a_common_beginning(
    save_model: SaveModel, native: bool
) -> None:
    folder, reference_model = save_model(FAMILIES["llama"])
    model, token_ids = make_model(folder, native=native), random_tokens()
    blocks = ScatteredBlocks(NUM_BLOCKS)
    first, second = Place(blocks), Place(blocks)
    logits(model, token_ids, (NUM_TOKENS,), place=first)
    second.table.extend(first.table.ids()[:2].tolist())
    other = torch.cat((token_ids[:32], token_ids[32:].flip(0)))
    assert_same(feed(model, other, [(second, 32, 28)]), reference(reference_model, other)[32:])
    # and the first goes on as if nothing had been
    again = feed(model, token_ids, [(first, 59, 1)])
    assert_same(again, reference(reference_model, token_ids)[59:])


def test_rows_written_again_replace_what_was_there(save_model: SaveModel, native: bool) -> None:
    folder, reference_model = save_model(FAMILIES["llama"])
    model, token_ids = make_model(folder, native=native), random_tokens()
    place = Place(ScatteredBlocks(NUM_BLOCKS))
    logits(model, token_ids.flip(0), (NUM_TOKENS,), place=place)
    found = logits(model, token_ids, (1, 59), place=place)
    assert_same(found, reference(reference_model, token_ids))


# -------------------------------------------------------------------------------- what an engine loads


def test_engine_loads_what_the_parts_load(save_model: SaveModel) -> None:
    folder, reference_model = save_model(FAMILIES["llama"])
    config = EngineConfig(model=str(folder), max_model_len=64, max_num_seqs=5)
    loaded = load(config, solo_mesh())
    assert loaded.target is not None
    assert loaded.draft_model is None
    assert (loaded.vocab_size, loaded.grouped, loaded.grammars) == (97, False, None)
    assert loaded.num_blocks == loaded.target.pool.num_blocks == 2 * 5 * 4
    token_ids = random_tokens()
    assert_same(logits(loaded.target, token_ids, (40, 20)), reference(reference_model, token_ids))


def test_kv_cache_takes_the_memory_it_is_given_for_both_models(save_model: SaveModel) -> None:
    folder, _ = save_model(FAMILIES["llama"])
    settings: dict[str, Any] = {"model": str(folder), "kv_cache_memory": "1MiB"}
    # 4 layers of 2 KV heads: 16 keys and values of 8 floats each
    each = 4 * 2 * 2 * 16 * 8 * 4
    assert load(make_config(settings), solo_mesh()).num_blocks == 2**20 // each
    settings["speculative_config"] = {"model": str(folder), "dtype": "float32"}
    both = load(make_config(settings), solo_mesh())
    assert both.num_blocks == 2**20 // (2 * each)
    assert both.target is not None
    assert both.draft_model is not None
    pools = both.target.pool.num_bytes + both.draft_model.model.pool.num_bytes
    assert 2**20 - 2 * each < pools <= 2**20


def test_kv_cache_that_holds_no_longest_request_is_refused(save_model: SaveModel) -> None:
    folder, _ = save_model(FAMILIES["llama"])
    with pytest.raises(ConfigError, match=r"holds 112 tokens, a request of max_model_len 128"):
        load(EngineConfig(model=str(folder), kv_cache_memory="60000"), solo_mesh())


def test_kv_cache_beyond_the_machine_s_memory_is_refused(save_model: SaveModel) -> None:
    folder, _ = save_model(FAMILIES["llama"])
    with pytest.raises(ConfigError, match=r"kv_cache_memory asks for 1048576.0 GiB"):
        load(EngineConfig(model=str(folder), kv_cache_memory=2**50), solo_mesh())


def test_a_target_that_is_loaded_already_is_shared(save_model: SaveModel) -> None:
    folder, _ = save_model(FAMILIES["llama"])
    config = EngineConfig(model=str(folder), max_num_seqs=3)
    first = load(config, solo_mesh())
    second = load(config, solo_mesh(), target=first.target)
    assert second.target is first.target
    assert second.num_blocks == first.num_blocks


def test_rows_beyond_the_blocks_are_refused(save_model: SaveModel, native: bool) -> None:
    model = make_model(save_model(FAMILIES["llama"])[0], native=native)
    place = Place(ScatteredBlocks(NUM_BLOCKS))
    place.segment(start=0, num_rows=16)
    beyond = Segment(num_rows=4, end=17, table=place.table)
    with pytest.raises(AssertionError, match="found 4 rows up to 17 in 1 blocks"):
        model.rows(random_tokens(4), [beyond])


@pytest.mark.parametrize("num_rows", [1, 20])
def test_rank_without_a_query_head_adds_nothing(
    save_model: SaveModel, native: bool, num_rows: int
) -> None:
    config = LlamaConfig(**(SHAPE | {"num_attention_heads": 2, "num_key_value_heads": 1}))
    axis = Axis(size=3, index=2, collectives=Alone())
    model = make_model(save_model(config)[0], native=native, axis=axis)
    segment = Place(ScatteredBlocks(NUM_BLOCKS)).segment(start=0, num_rows=num_rows)
    rows = model.rows(random_tokens(num_rows), [segment])
    attention = model.decoder.groups[0].attention(torch.ones(num_rows, 32), 0, rows=rows)
    assert torch.equal(attention, torch.zeros(num_rows, 32))

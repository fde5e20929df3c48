"""A model that cannot work is refused in one line that names what is wrong, and a rank reads only
its part of one that can."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from paceline.parallel.collectives import Alone
from paceline.parallel.launch import solo_mesh
from paceline.parallel.layer import exact_groups, layer_groups
from paceline.parallel.mesh import Axis
from paceline.runtime.config import EngineConfig, SpeculativeConfig
from paceline.runtime.errors import ConfigError, ModelError, UserError
from paceline.runtime.loading import load as load_models
from paceline.runtime.models.arch import read_architecture
from paceline.runtime.models.llama import load_decoder
from paceline.runtime.models.weights import Checkpoint, find_model
from paceline.runtime.preflight import examine

SaveModel = Callable[..., tuple[Path, PreTrainedModel]]
MakeLlama = Callable[..., LlamaConfig]

Q_PROJ = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def folder(save_model: SaveModel, llama_config: MakeLlama) -> Path:
    """A good model, to be damaged."""
    return save_model(llama_config())[0]


@pytest.fixture
def sharded(save_model: SaveModel, llama_config: MakeLlama) -> Path:
    """A good model in several files, to be damaged."""
    return save_model(llama_config(), max_shard_size="20KB")[0]


def refusal(action: Callable[[], object], kind: type[UserError] = ModelError) -> str:
    """The one line with which an action is refused."""
    with pytest.raises(kind) as refused:
        action()
    line = str(refused.value)
    assert "\n" not in line
    return line


def preflight(folder: Path | str, **more: Any) -> str:
    return refusal(lambda: examine(EngineConfig(model=str(folder), **more)))


def load(folder: Path) -> object:
    """What a rank does."""
    return load_models(EngineConfig(model=str(folder)), solo_mesh())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------- before anything runs


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "absent", "~/absent-model"])
def test_missing_folder_is_named(name: str) -> None:
    assert preflight(name) == f"no such model folder: {name}"


def test_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert preflight(path).startswith(f"{path} is a file; a model is a Hugging Face folder")


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert preflight(tmp_path) == f"{tmp_path} has no config.json: not a Hugging Face model folder"


@pytest.mark.parametrize("text", [b"{broken", b"", b"\xff\xfe{}"])
def test_config_that_is_no_json_is_refused(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    assert preflight(folder).startswith(f"{folder / 'config.json'} is not valid JSON")


def test_config_that_is_no_object_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    assert preflight(folder) == f"{folder / 'config.json'} is not a JSON object"


def test_config_that_lacks_a_key_names_it(
    folder: Path, rewrite_config: Callable[..., None]
) -> None:
    rewrite_config(folder, drop=("num_hidden_layers",))
    assert preflight(folder) == f"{folder / 'config.json'} lacks 'num_hidden_layers'"


def test_unsupported_architecture_is_named_with_the_list_of_supported_ones(
    folder: Path, rewrite_config: Callable[..., None]
) -> None:
    rewrite_config(folder, architectures=["GPT2LMHeadModel"])
    assert preflight(folder) == (
        "architecture GPT2LMHeadModel is not supported; supported: LlamaForCausalLM, "
        "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    )


def test_config_without_an_architecture_is_refused(
    folder: Path, rewrite_config: Callable[..., None]
) -> None:
    rewrite_config(folder, drop=("architectures",))
    assert preflight(folder).startswith("architecture (none named) is not supported")


def test_unknown_rope_scaling_is_named(folder: Path, rewrite_config: Callable[..., None]) -> None:
    rewrite_config(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    assert preflight(folder) == "rope scaling 'spiral' is not supported"


def test_damaged_generation_config_is_refused(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text("{broken")
    assert str(path) in preflight(folder)


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert preflight(folder) == f"{folder} has no safetensors files"


def test_truncated_weights_are_found_by_preflight(folder: Path) -> None:
    path = folder / "model.safetensors"
    truncate(path)
    line = preflight(folder)
    assert line.startswith(f"{path} is truncated or no safetensors file ({path.stat().st_size}")


def test_truncated_weights_of_the_drafter_are_found_by_preflight(
    folder: Path, save_model: SaveModel, llama_config: MakeLlama
) -> None:
    drafter, _ = save_model(llama_config())
    truncate(drafter / "model.safetensors")
    spec = SpeculativeConfig(model=str(drafter))
    assert str(drafter) in preflight(folder, speculative_config=spec)


def test_context_beyond_the_model_is_refused(folder: Path) -> None:
    config = EngineConfig(model=str(folder), max_model_len=129)
    line = refusal(lambda: examine(config), ConfigError)
    assert line == "max_model_len 129 exceeds the model's own limit of 128"


@pytest.mark.parametrize(("wanted", "length"), [(None, 128), (128, 128), (2, 2)])
def test_context_is_the_model_s_own_unless_less_is_wanted(
    folder: Path, wanted: int | None, length: int
) -> None:
    assert examine(EngineConfig(model=str(folder), max_model_len=wanted)).max_model_len == length


def test_end_of_text_ids_come_from_both_configs_once(
    folder: Path, rewrite_config: Callable[..., None]
) -> None:
    rewrite_config(folder, eos_token_id=2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert examine(EngineConfig(model=str(folder))).eos_token_ids == (2, 5)


# --------------------------------------------------------------------------------------- tokenizers


def add_tokenizer(folder: Path, *words: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def pair(save_model: SaveModel, llama_config: MakeLlama) -> tuple[Path, Path]:
    """A target and a drafter without tokenizers."""
    return save_model(llama_config())[0], save_model(llama_config(num_hidden_layers=2), seed=1)[0]


def pair_config(pair: tuple[Path, Path]) -> EngineConfig:
    spec = SpeculativeConfig(model=str(pair[1]))
    return EngineConfig(model=str(pair[0]), speculative_config=spec)


def test_tokenizers_that_differ_are_refused(pair: tuple[Path, Path]) -> None:
    add_tokenizer(pair[0], "?", "a", "b")
    add_tokenizer(pair[1], "?", "b", "a")
    line = refusal(lambda: examine(pair_config(pair)))
    assert line == (
        f"{pair[0]} and {pair[1]} have different tokenizers (4 entries differ); "
        "a drafter must share its target's"
    )


def test_equal_tokenizers_are_accepted_whatever_the_padding_of_the_vocabulary(
    folder: Path, save_model: SaveModel, llama_config: MakeLlama
) -> None:
    drafter, _ = save_model(llama_config(vocab_size=104))
    for each in (folder, drafter):
        add_tokenizer(each, "?", "a", "b")
    facts = examine(pair_config((folder, drafter)))
    assert facts.tokenizer is not None
    assert facts.tokenizer.encode("b a c") == [2, 1, 0]


def test_vocabularies_of_different_sizes_without_tokenizers_are_refused(
    folder: Path, save_model: SaveModel, llama_config: MakeLlama
) -> None:
    drafter, _ = save_model(llama_config(vocab_size=98))
    line = refusal(lambda: examine(pair_config((folder, drafter))))
    assert line.startswith(f"{folder} has a vocabulary of 97, {drafter} of 98")


def test_damaged_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert preflight(folder).startswith(f"{folder / 'tokenizer.json'} is damaged")


def test_model_without_a_tokenizer_is_accepted(pair: tuple[Path, Path]) -> None:
    assert examine(pair_config(pair)).tokenizer is None


# ------------------------------------------------------------------------------- when a rank loads it


def test_truncated_weights_are_found_by_a_checkpoint(folder: Path) -> None:
    truncate(folder / "model.safetensors")
    assert "is truncated or no safetensors file" in refusal(lambda: Checkpoint(folder))


def test_truncated_shard_is_found_when_it_is_read(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[0]
    truncate(path)
    assert refusal(lambda: load(sharded)).startswith(f"{path} is truncated")


def test_missing_shard_is_named(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.unlink()
    assert refusal(lambda: load(sharded)) == f"{sharded} lacks {path.name}"


@pytest.mark.parametrize("text", ["{broken", "{}", "[]", '{"weight_map": []}'])
def test_damaged_index_is_named(sharded: Path, text: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    assert str(index) in refusal(lambda: load(sharded))


@pytest.mark.parametrize(
    "name",
    [
        Q_PROJ,
        "model.layers.0.input_layernorm.weight",
        "model.layers.3.post_attention_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor_is_named(folder: Path, name: str) -> None:
    change_tensors(folder, lambda tensors: tensors.__delitem__(name))
    assert refusal(lambda: load(folder)) == f"{folder} lacks the tensor {name}"


@pytest.mark.parametrize(
    ("name", "found", "wanted"),
    [
        (Q_PROJ, (32, 24), (32, 32)),
        (Q_PROJ, (48, 32), (32, 32)),
        ("model.layers.0.mlp.down_proj.weight", (32, 50), (32, 48)),
        ("model.embed_tokens.weight", (96, 32), (97, 32)),
        ("lm_head.weight", (104, 32), (97, 32)),
        ("model.norm.weight", (16,), (32,)),
        ("model.layers.1.input_layernorm.weight", (1,), (32,)),
    ],
)
def test_tensor_of_another_shape_is_named_with_both_shapes(
    folder: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(found)}))
    assert refusal(lambda: load(folder)) == (
        f"{folder}: {name} has shape {list(found)}, config.json says {list(wanted)}"
    )


def test_groups_that_do_not_fit_the_drafter_are_refused(pair: tuple[Path, Path]) -> None:
    spec = SpeculativeConfig(model=str(pair[1]), layer_groups=((0,), (1, 2)))
    config = EngineConfig(model=str(pair[0]), speculative_config=spec)
    line = refusal(lambda: load_models(config, solo_mesh()), ConfigError)
    assert (
        line == "layer_groups must list the layers 0 to 1 once each and in order; found [0, 1, 2]"
    )


def test_embedded_pair_has_folders() -> None:
    assert (find_model("embedded"), find_model("embedded/target")) == (
        find_model("embedded/target"),
    ) * 2
    assert find_model("embedded/drafter").name == "drafter"


# ----------------------------------------------------------------------------------- slices of a rank


class CountingFile:
    """Stands before an open safetensors file and counts the elements that leave it."""

    def __init__(self, opened: Any, counts: Counter[str]) -> None:
        self._opened = opened
        self._counts = counts

    def keys(self) -> list[str]:
        return list(self._opened.keys())

    def get_slice(self, name: str) -> CountingSlice:
        return CountingSlice(self._opened.get_slice(name), name=name, counts=self._counts)


class CountingSlice:
    def __init__(self, part: Any, *, name: str, counts: Counter[str]) -> None:
        self._part, self._name, self._counts = part, name, counts

    def get_shape(self) -> list[int]:
        return list(self._part.get_shape())

    def __getitem__(self, where: Any) -> Tensor:
        block: Tensor = self._part[where]
        self._counts[self._name] += block.numel()
        return block


@pytest.fixture
def elements_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Elements read since the start of the test, by tensor."""
    counts: Counter[str] = Counter()
    open_file = safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda *args, **how: CountingFile(open_file(*args, **how), counts)
    )
    return counts


def load_part(folder: Path, *, rank: int, size: int, group_size: int = 1) -> None:
    arch = read_architecture(folder)
    groups = (
        exact_groups(arch.num_layers)
        if group_size == 1
        else layer_groups(arch.num_layers, size=group_size)
    )
    load_decoder(
        Checkpoint(folder),
        arch,
        groups=groups,
        axis=Axis(size=size, index=rank, collectives=Alone()),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def split_tensors(folder: Path) -> dict[str, int]:
    """Elements of the tensors that are split over ranks: all but the norms."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.numel() for name, tensor in tensors.items() if "norm" not in name}


def test_rank_reads_only_its_part(folder: Path, elements_read: Counter[str]) -> None:
    load_part(folder, rank=1, size=2)
    for name, whole in split_tensors(folder).items():
        # 97 rows do not halve: the second rank has the smaller part
        part = 48 * 32 if whole == 97 * 32 else whole // 2
        assert elements_read[name] == part, name


@pytest.mark.parametrize(("size", "group_size"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_ranks_together_read_every_query_output_and_mlp_weight_once(
    folder: Path, elements_read: Counter[str], size: int, group_size: int
) -> None:
    for rank in range(size):
        load_part(folder, rank=rank, size=size, group_size=group_size)
    for name, whole in split_tensors(folder).items():
        if "k_proj" in name or "v_proj" in name:  # held twice where ranks outnumber KV heads
            assert elements_read[name] >= whole, name
        else:
            assert elements_read[name] == whole, name

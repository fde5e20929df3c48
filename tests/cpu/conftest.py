"""Small random models, saved by transformers as their publishers would, and workers over such."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.plans import MakeWorker
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from paceline.parallel.launch import solo_mesh
from paceline.runtime.config import EngineConfig, make_config
from paceline.runtime.layers.cpu_kernels import load_kernels
from paceline.runtime.loading import Loaded, load
from paceline.runtime.worker import Worker

torch.set_num_threads(1)

SaveModel = Callable[..., tuple[Path, PreTrainedModel]]

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
"""Four narrow layers."""


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> SaveModel:
    """`save_model(config, seed=0, **how)`: a folder, and the same model in transformers.

    Every weight is random, norms and biases too: what is at its initial 1 or 0 would hide a mistake.
    """

    def save(
        config: PreTrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, **how: Any
    ) -> tuple[Path, PreTrainedModel]:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
        folder = tmp_path_factory.mktemp(config.model_type)
        model = model.to(dtype)
        model.save_pretrained(folder, **how)
        return folder, model

    return save


@pytest.fixture(scope="session")
def llama_config() -> Callable[..., LlamaConfig]:
    """`llama_config(**changes)`: a Llama of four narrow layers."""

    def make(**changes: Any) -> LlamaConfig:
        return LlamaConfig(**(SHAPE | changes))

    return make


@pytest.fixture
def rewrite_config() -> Callable[..., None]:
    """`rewrite_config(folder, drop=(...), **changes)` edits a folder's config.json."""

    def rewrite(folder: Path, *, drop: tuple[str, ...] = (), **changes: Any) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in values.items() if k not in drop}))

    return rewrite


@pytest.fixture(scope="module")
def make_worker(tiny: Callable[..., Path]) -> MakeWorker:
    """`make_worker(native=..., **speculative)`: a worker that has worked on nothing yet."""
    target, drafter = tiny(seed=0), tiny(seed=0, noise=0.03)

    @cache
    def models(items: tuple[tuple[str, Any], ...]) -> tuple[EngineConfig, Loaded]:
        engine = {key: value for key, value in items if key in EngineConfig.__struct_fields__}
        rest = {key: value for key, value in items if key not in engine}
        speculative = {"model": str(drafter), "dtype": "float32", "num_speculative_tokens": 8}
        config = make_config(
            {
                "model": str(target),
                "dtype": "float32",
                "max_num_seqs": 8,
                "speculative_config": speculative | rest,
                **engine,
            }
        )
        return config, load(config, solo_mesh())

    def make(*, native: bool = True, **changes: Any) -> Worker:
        config, loaded = models(tuple(sorted(changes.items())))
        assert loaded.target is not None
        loaded.target._native = native
        if loaded.draft_model is not None:
            loaded.draft_model.model._native = native
        return Worker(config, solo_mesh(), loaded=loaded)

    return make


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine without a compiler that has never had one."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()

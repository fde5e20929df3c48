"""FlashAttention over pages: which library is taken, and that none is believed unasked.

There is no GPU here: `tests/flash.py` stands in for the kernel, `tests/cpu/test_attention.py` and
`test_graphs.py` put passes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cpu.test_attention import architecture
from tests.flash import attention, flash_on_cpu
from torch import Tensor

from paceline.parallel.launch import solo_mesh
from paceline.runtime import loading
from paceline.runtime.config import make_config
from paceline.runtime.errors import ConfigError
from paceline.runtime.layers import flash
from paceline.runtime.layers.flash import check_pages, read_pages
from paceline.runtime.loading import page_reader
from paceline.runtime.models.model import Model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def check(**changed: Any) -> None:
    given = {"dtype": torch.bfloat16, "num_queries": 4, "head_dim": 64, "block_size": 16}
    check_pages(CPU, **(given | changed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("num_queries", [1, 4, 7])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_reads_pages_rightly_is_believed(
    dtype: torch.dtype, block_size: int, num_queries: int, head_dim: int
) -> None:
    with flash_on_cpu() as calls:
        check(dtype=dtype, block_size=block_size, num_queries=num_queries, head_dim=head_dim)
    assert len(calls) == 2, "with a window and without"


def wrong(out: Tensor, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention that is told something else: `change` of its arguments."""
    change: Callable[..., Any] = kwargs.pop("change")
    value, first_rows, *rest = args
    given = {"query": query, "key": key, "value": value, "first_rows": first_rows, **kwargs}
    given |= change(given)
    parts = [given.pop(name) for name in ("query", "key", "value", "first_rows")]
    return attention(out, *parts, *rest, **given)


WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a key more is seen": lambda g: {"seqused_k": g["seqused_k"] + (g["seqused_k"] > 0).int()},
    "the last key is not": lambda g: {"seqused_k": g["seqused_k"] - (g["seqused_k"] > 0).int()},
    "a window is wider": lambda g: {
        "window_size_left": g["window_size_left"] + (g["window_size_left"] > 0)
    },
    "a window is narrower": lambda g: {
        "window_size_left": g["window_size_left"] - (g["window_size_left"] > 0)
    },
    "blocks lie in their order": lambda g: {"block_table": g["block_table"].sort().values},
    "keys are values": lambda g: {"key": g["value"]},
    "values are keys": lambda g: {"value": g["key"]},
    "heads share other keys": lambda g: {"key": g["key"].flip(2), "value": g["value"].flip(2)},
    "scores are scaled twice": lambda g: {"scale": g["scale"] ** 2},
    "rows are those of another": lambda _: {
        "first_rows": torch.tensor([0, 1, 4, 4], dtype=torch.int32)
    },
    "nothing is computed": lambda g: {"first_rows": torch.zeros_like(g["first_rows"])},
}


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_reads_pages_wrongly_is_not(
    change: Callable[[dict[str, Any]], dict[str, Any]], block_size: int
) -> None:
    def compute(*args: Any, **kwargs: Any) -> Tensor:
        return wrong(*args, change=change, **kwargs)

    with flash_on_cpu(compute), pytest.raises(ConfigError, match="reads pages wrongly"):
        check(block_size=block_size)


def test_where_torch_has_no_kernel_that_is_said() -> None:
    with pytest.raises(ConfigError, match=r"cannot read pages here: .*CPU"):
        check()


class Gpu:
    """A GPU that is not there, and what can be loaded for it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, major: int, installed: set[str], broken: str = ""
    ) -> None:
        self.active: str | None = None
        self.broken = broken
        """What reads pages wrongly."""
        self.checked: list[str] = []
        self._installed = installed
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (major, 0))
        library = torch.nn.attention
        monkeypatch.setattr(library, "activate_flash_attention_impl", self._activate)
        monkeypatch.setattr(library, "restore_flash_attention_impl", self._restore)
        monkeypatch.setattr(library, "current_flash_attention_impl", lambda: self.active)
        monkeypatch.setattr(flash, "check_pages", self._check)
        monkeypatch.setattr(flash, "_in_use", [])

    def _activate(self, name: str) -> None:
        self.active = None
        if name not in self._installed:
            raise ModuleNotFoundError(f"No module named {name}")
        self.active = name

    def _restore(self, *, _raise_warn: bool) -> None:
        assert not _raise_warn
        self.active = None

    def _check(self, *_: object, **__: object) -> None:
        name = self.active or "FA2"
        self.checked.append(name)
        if name == self.broken:
            raise ConfigError("reads pages wrongly")

    def read(self, *, block_size: int = 16, dtype: torch.dtype = torch.bfloat16) -> str:
        return read_pages(architecture(64), CUDA, dtype=dtype, block_size=block_size)


@pytest.mark.parametrize(
    ("major", "installed", "block_size", "found"),
    [
        (9, {"FA3"}, 16, "FA3"),
        (10, {"FA4"}, 16, "FA4"),
        (9, {"FA4"}, 256, "FA2"),
        (8, {"FA3", "FA4"}, 256, "FA2"),
        (12, {"FA3", "FA4"}, 256, "FA2"),
    ],
)
def test_each_gpu_has_its_library(
    monkeypatch: pytest.MonkeyPatch, major: int, installed: set[str], block_size: int, found: str
) -> None:
    gpu = Gpu(monkeypatch, major, installed)
    for _ in range(2):  # a second model finds what the first has loaded
        assert gpu.read(block_size=block_size) == found
    assert gpu.checked == [found, found]


@pytest.mark.parametrize(
    ("major", "dtype", "says"),
    [
        (9, torch.bfloat16, "FA3 cannot be loaded .*; FA2 reads blocks of 256 tokens, found .* 16"),
        (8, torch.bfloat16, "FA2 reads blocks of 256 tokens, found block_size 16"),
        (9, torch.float32, "bfloat16 and float16, not float32"),
    ],
)
def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, major: int, dtype: torch.dtype, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Gpu(monkeypatch, major, set()).read(dtype=dtype)


def test_where_one_library_is_wrong_torch_s_own_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 9, {"FA3"}, broken="FA3")
    assert gpu.read(block_size=256) == "FA2"
    assert gpu.checked == ["FA3", "FA2"]
    with pytest.raises(ConfigError, match="FA2 reads blocks of 256"):
        gpu.read(block_size=16)


def test_what_one_model_goes_by_stays_whatever_another_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(monkeypatch, 9, {"FA3"})
    assert gpu.read(block_size=256) == "FA3"
    gpu.broken = "FA3"  # for the shape of the second
    with pytest.raises(ConfigError, match="FA3 reads pages wrongly"):
        gpu.read(block_size=256)
    assert gpu.active == "FA3"


def test_an_older_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 9, {"FA3"})
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    with pytest.raises(ConfigError, match=r"from version 2.13 on, found 2.11.0\+cu130"):
        gpu.read()


def test_a_choice_that_cannot_be_met_is_refused_and_auto_goes_on(
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = str(tiny(seed=0))
    config = make_config({"model": folder, "dtype": "float32", "kv_cache_memory": "1MiB"})
    target = loading.load(config, solo_mesh()).target
    assert target is not None

    def reader(wanted: str, device: torch.device) -> str:
        config = make_config({"model": folder, "attention_backend": wanted})
        return page_reader(config, target.decoder, device)

    assert reader("auto", CPU) == reader("sdpa", CPU) == reader("sdpa", CUDA) == ""
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"attention_backend flash: .* not on cpu"):
        reader("flash", CPU)
    with pytest.raises(ConfigError, match=r"attention_backend flash: .* not float32"):
        reader("flash", CUDA)
    assert reader("auto", CUDA) == ""
    assert "over gathered KV: FlashAttention takes bfloat16" in caplog.text
    Gpu(monkeypatch, 9, {"FA3"})
    monkeypatch.setattr(target.decoder.groups[0], "dtype", torch.bfloat16)
    assert reader("auto", CUDA) == reader("flash", CUDA) == "FA3"


def test_kv_of_a_gpu_that_others_shall_map_is_refused_with_a_reason(
    tiny: Callable[..., Path],
) -> None:
    config = make_config({"model": str(tiny(seed=0)), "kv_cache_memory": "1MiB"})
    target = loading.load(config, solo_mesh()).target
    assert target is not None
    with pytest.raises(ConfigError, match="KV in the memory of cuda cannot be sent"):
        Model(
            target.decoder,
            num_blocks=8,
            block_size=16,
            max_len=64,
            kv_dtype=torch.bfloat16,
            device=CUDA,
            shared=True,
            attention="FA3",
        )

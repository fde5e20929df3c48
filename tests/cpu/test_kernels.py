"""The compiled kernels: what they compute, against float64; and that a machine can do without them.

Attention has tests of its own (test_attention.py).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.paged import Place, ScatteredBlocks
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from paceline.parallel.launch import solo_mesh
from paceline.runtime.config import make_config
from paceline.runtime.layers import cpu_kernels, cpu_pass
from paceline.runtime.layers.cpu_kernels import load_kernels, supports
from paceline.runtime.layers.mlp import swiglu
from paceline.runtime.layers.norm import add_rms
from paceline.runtime.loading import load

torch.set_num_threads(1)

SaveModel = Callable[..., tuple[Path, PreTrainedModel]]
F32, BF16 = torch.float32, torch.bfloat16
WIDTHS = [1, 7, 15, 16, 17, 32, 100, 384]


@pytest.fixture
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine where nothing has been built yet: the folder of what is."""
    if load_kernels() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_kernels.cache_clear()
    yield tmp_path / "paceline"
    load_kernels.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> bool:
    """Within the rounding of what was found."""
    relative = 2e-6 if found.dtype == F32 else 2**-8
    return torch.allclose(found.double(), expected, rtol=relative, atol=relative * 1e-2)


# ---------------------------------------------------------------------------------------- add and norm


def check_add_rms(rows: int, width: int, given: torch.dtype | None, dtype: torch.dtype) -> None:
    h = random(rows, width)
    delta = None if given is None else random(rows, width, seed=1).to(given)
    summed = h.double() if delta is None else h.double() + delta.double()
    expected = summed / (summed.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    found = add_rms(h, delta, eps=1e-3, dtype=dtype)
    assert found.dtype == dtype
    assert close(found, expected)
    assert torch.allclose(h.double(), summed, rtol=1e-6), "the residual stream moves on"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("given", "dtype"), [(None, F32), (F32, F32), (None, BF16), (BF16, BF16), (F32, BF16)]
)
def test_add_rms_normalises_the_sum(
    width: int, given: torch.dtype | None, dtype: torch.dtype
) -> None:
    for rows in (1, 5):
        check_add_rms(rows, width, given, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_add_rms_without_kernels_is_the_same(no_kernels: None, dtype: torch.dtype) -> None:
    check_add_rms(3, 17, dtype, dtype)


def check_swiglu(values: Tensor) -> None:
    gate, up = values.double().chunk(2, dim=-1)
    found = swiglu(values)
    assert found.shape == gate.shape
    assert close(found, gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_swiglu_gates_the_upper_half(width: int, dtype: torch.dtype) -> None:
    check_swiglu((4 * random(3, 2 * width)).to(dtype))
    check_swiglu((4 * random(2, 3, 2 * width)).to(dtype))


@pytest.mark.parametrize("width", [5, 16])
def test_gates_of_any_size_neither_overflow_nor_lose_their_digits(width: int) -> None:
    for size in (1e-6, 0.1, 1.0, 20.0, 80.0, 1e4):
        gates = size * torch.linspace(-1.0, 1.0, width)
        check_swiglu(torch.cat((gates, torch.ones(width)))[None])


def test_swiglu_without_kernels_is_the_same(no_kernels: None) -> None:
    check_swiglu(random(3, 34))


# --------------------------------------------------------------------------------------- on a machine


def test_kernels_serve_the_cpu_in_two_dtypes() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert supports(cpu, F32, BF16)
    assert not supports(gpu, F32)
    assert not supports(cpu, F32, torch.float16)
    assert supports(cpu, F32, head_dim=256)
    assert not supports(cpu, F32, head_dim=257)


def test_python_and_c_agree_on_what_a_pass_is() -> None:
    """They are written down twice."""
    if load_kernels() is None:
        pytest.skip("no C++ compiler")
    library = ctypes.CDLL(str(cpu_kernels._library_path()))
    assert library.pass_bytes() == ctypes.sizeof(cpu_kernels.Pass)
    assert library.stack_bytes() == cpu_pass.STRUCT_BYTES


def test_a_machine_without_a_compiler_is_told_once(
    no_kernels: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_kernels() is None
        assert load_kernels() is None
    assert [record.getMessage() for record in caplog.records] == [
        "no compiled CPU kernels (no C++ compiler); using torch, which is slower"
    ]


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-4), ("bfloat16", 0.2)])
def test_a_machine_without_a_compiler_computes_the_same(
    no_kernels: None,
    save_model: SaveModel,
    llama_config: Callable[..., LlamaConfig],
    dtype: str,
    within: float,
) -> None:
    folder, reference = save_model(llama_config())
    token_ids = torch.arange(40)
    model = load(make_config({"model": str(folder), "dtype": dtype}), solo_mesh()).target
    assert model is not None
    assert model.pool.groups[0].dtype == F32, "in torch, products of bfloat16 are slow"
    rows = model.rows(token_ids, [Place(ScatteredBlocks(8)).segment(start=0, num_rows=40)])
    assert rows.native is None
    with torch.inference_mode():
        found = model.decoder.logits(model.decoder.exact(rows))
        expected = reference(token_ids[None]).logits[0]
    assert (found - expected).abs().mean() < within * expected.std()


def test_the_library_is_built_once(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_kernels() is not None
    (built,) = fresh_cache.iterdir()
    made = built.stat().st_mtime_ns
    load_kernels.cache_clear()
    monkeypatch.setenv("PATH", "")  # there is no compiler any more
    assert load_kernels() is not None
    assert [path.stat().st_mtime_ns for path in fresh_cache.iterdir()] == [made]


def test_another_source_is_another_library(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = cpu_kernels._library_path()
    changed = tmp_path / "changed.cpp"
    changed.write_text(cpu_kernels.SOURCE.read_text() + "\n")
    monkeypatch.setattr(cpu_kernels, "SOURCE", changed)
    assert cpu_kernels._library_path() != before


@pytest.mark.parametrize("trouble", ["compiler", "folder", "library"])
def test_whatever_keeps_the_library_from_being_built_is_survived(
    fresh_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    trouble: str,
) -> None:
    if trouble == "compiler":
        monkeypatch.setenv("CXX", "false")
    elif trouble == "folder":
        fresh_cache.write_text("a file where the folder should be")
    else:
        fresh_cache.mkdir()
        cpu_kernels._library_path().write_bytes(b"no library")
    with caplog.at_level(logging.WARNING):
        assert load_kernels() is None
    assert len(caplog.records) == 1
    check_swiglu(random(3, 34))

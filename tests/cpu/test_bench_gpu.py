"""The benchmark for GPUs runs where there is none, on a small shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import gpu


def test_it_measures_a_small_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--quick", "--output", str(path)])
    gpu.main()
    found = json.loads(path.read_text())
    assert found["expected"] == {}, "what is expected is expected of GPUs"
    assert found["ratios"]["decode_over_copy_bound"] > 0
    assert {row["what"] for row in found["rows"]} == {
        "token",
        "exact",
        "N = 4, attention",
        "N = 4, block",
    }


def test_the_bound_counts_what_a_pass_must_read() -> None:
    """8.03 billion weights, of which 0.53 are the embedding's; and 256 tokens of 128 KiB."""
    assert gpu.must_read(gpu.LLAMA_8B) == pytest.approx(
        2 * (8.03e9 - 0.525e9) + 256 * 2**17, rel=1e-3
    )

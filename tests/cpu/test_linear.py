"""The packed product: few row counts, the same rows."""

from __future__ import annotations

import pytest
import torch

from paceline.runtime.layers.linear import Linear, rounded


def test_up_to_512_rows_there_are_about_fifty_row_counts() -> None:
    counts = {rounded(rows) for rows in range(1, 513)}
    assert len(counts) <= 56
    assert all(rows <= rounded(rows) < rows * 1.25 for rows in range(1, 2049))


@pytest.mark.parametrize("num_rows", [1, 16, 17, 36, 37, 130, 300])
def test_rows_of_a_rounded_product_are_those_asked_for(num_rows: int) -> None:
    weight = torch.randn(24, 32).bfloat16()
    bias = torch.randn(24).bfloat16()
    x = torch.randn(num_rows, 32).bfloat16()
    found = Linear(weight, bias=bias)(x)
    expected = x.float() @ weight.float().T + bias.float()
    assert found.shape == (num_rows, 24)
    assert found.is_contiguous()
    assert (found.float() - expected).abs().max() < 0.15

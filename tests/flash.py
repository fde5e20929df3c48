"""FlashAttention on a CPU, for tests: what its documentation says it computes, in float64.

torch hands attention over pages to an operation that a library fills in for a GPU. Here the same
operation is filled in for CPUs, so that everything up to it runs as it does there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

OPERATION = "_flash_attention_forward_no_dropout_inplace"


@contextmanager
def flash_on_cpu(compute: Any = None) -> Iterator[list[int]]:
    """While entered, CPUs have FlashAttention. The list has the rows of each call."""
    calls: list[int] = []

    def counted(out: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(query))
        return (compute or attention)(out, query, *args, **kwargs)  # type: ignore[no-any-return]

    library = Library("aten", "IMPL", "CPU")
    library.impl(OPERATION, counted)
    try:
        yield calls
    finally:
        library._destroy()


def attention(
    out: Tensor,  # [T, H, D]
    query: Tensor,
    key: Tensor,  # [blocks, P, U, D]
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
    seqused_k: Tensor,
    block_table: Tensor,
    alibi_slopes: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Rows of segment b are `cum_seq_q[b]` to `cum_seq_q[b+1]`; the last of them stands where its
    `seqused_k[b]` keys end."""
    for each in (cum_seq_q, seqused_k, block_table):
        assert each.dtype == torch.int32
    assert cum_seq_k is None or cum_seq_k.tolist() == [max_k * b for b in range(len(cum_seq_q))]
    assert query.is_contiguous(), "a library would take its strides as they are, and copy otherwise"
    assert key.stride(-1) == value.stride(-1) == 1
    assert dropout_p == 0.0
    assert window_size_right == 0
    assert is_causal == (window_size_left == -1)
    assert max_k == block_table.shape[1] * key.shape[1]
    out.fill_(torch.nan)  # rows of nobody may hold anything
    starts = cum_seq_q.numpy()  # the host may not be told: this is the device's own business
    group = query.shape[1] // key.shape[2]
    for b, (used, ids) in enumerate(zip(seqused_k.numpy(), block_table.numpy(), strict=True)):
        first, end = int(starts[b]), int(starts[b + 1])
        assert end - first <= max_q
        assert used <= max_k
        keys, values = (
            part[ids].flatten(0, 1)[:used].double().repeat_interleave(group, 1)  # [S, H, D]
            for part in (key, value)
        )
        for row in range(first, end):
            seen = int(used) - (end - 1 - row)
            left = 0 if window_size_left == -1 else max(0, seen - 1 - window_size_left)
            scores = torch.einsum("hd,shd->hs", query[row].double(), keys[left:seen]) * scale
            out[row] = torch.einsum("hs,shd->hd", scores.softmax(-1), values[left:seen])
    return torch.empty(query.shape[1], len(query))

"""Attention that reads the KV's pages itself: FlashAttention, through torch.

    queries  [T, H, D] ─┐
    pages    keys, values [blocks, P, U, D], as they lie ─┼──> one kernel ──> [T, H, D]
    sight    first rows, ends, blocks (`sight.py`) ───────┘

All that it goes by lies on the device, so a pass may be recorded and played, and one call serves
prompts, decoding and verification alike. It knows text and sliding windows; trees and windows with
sinks go the way of `attention.py`, over keys and values that were gathered.

torch has one function for three libraries, each for its GPUs:

    Hopper (9.0)       FlashAttention-3, if `flash_attn_interface` can be imported
    Blackwell (10.0)   FlashAttention-4, if `flash_attn.cute` can be imported
    others             torch's own FlashAttention-2, for blocks of 256 tokens or multiples

Which of them reads pages rightly differs from version to version, so none is believed before it has
solved a small problem on the device (`check_pages`).

Source: torch.nn.attention.varlen and its registry of implementations, torch 2.13.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.runtime.errors import ConfigError
from paceline.runtime.layers.sight import Pages
from paceline.runtime.models.arch import Architecture

LIBRARIES = {9: ["FA3"], 10: ["FA4"]}
"""By compute capability."""
OWN = "FA2"
"""What torch brings with it."""
_in_use: list[str] = []
"""The library that some model of this process goes by, if any."""
TOLERANCE = 0.05
"""Of the small problem's results, which are about one. bfloat16 rounds them by 0.004."""


def attend_pages(
    queries: Tensor,  # [T, H, D]
    keys: Tensor,  # [blocks, P, U, D]
    values: Tensor,
    pages: Pages,
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """Context, `[T, H, D]`; H is a multiple of U. Rows that belong to no segment get anything."""
    from torch.nn.attention.varlen import varlen_attn_out  # not in older versions of torch

    context = torch.empty_like(queries)
    varlen_attn_out(
        context,
        queries,
        keys,
        values,
        pages.first_rows,
        # FlashAttention-2 asks for it though blocks say it all; the others refuse it beside blocks
        pages.first_keys if _loaded() is None else None,
        pages.most_rows,
        pages.most_seen,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
        seqused_k=pages.ends_B,
        block_table=pages.blocks_BN,
    )
    return context


def read_pages(
    arch: Architecture, device: torch.device, *, dtype: torch.dtype, block_size: int
) -> str:
    """Makes ready what reads pages of `dtype` on this GPU for such a model, and names it. Raises
    ConfigError where nothing does, with what is missing."""
    if device.type != "cuda":
        raise ConfigError(f"FlashAttention runs on GPUs, not on {device}")
    if dtype not in (torch.bfloat16, torch.float16):
        given = str(dtype).removeprefix("torch.")
        raise ConfigError(f"FlashAttention takes bfloat16 and float16, not {given}")
    if torch.__version__ < "2.13":
        raise ConfigError(f"torch reads pages from version 2.13 on, found {torch.__version__}")
    major = torch.cuda.get_device_capability(device)[0]
    tried = []
    # torch uses one library in all of a process
    for library in _in_use or [*LIBRARIES.get(major, []), OWN]:
        try:
            _load(library)
            if library == OWN and block_size % 256:
                raise ConfigError(f"reads blocks of 256 tokens, found block_size {block_size}")
            check_pages(
                device,
                dtype=dtype,
                num_queries=arch.num_heads // arch.num_kv_heads,
                head_dim=arch.head_dim,
                block_size=block_size,
                windows=any(arch.windows),
            )
        except ConfigError as error:
            tried.append(f"{library} {error}")
        else:
            _in_use[:] = [library]
            return library
    if not _in_use:
        _load(OWN)
    raise ConfigError("; ".join(tried))


def check_pages(
    device: torch.device,
    *,
    dtype: torch.dtype,
    num_queries: int,
    head_dim: int,
    block_size: int,
    windows: bool = True,
) -> None:
    """Solve a small problem with pages and without, `num_queries` query heads per key: a text that is
    verified, one that decodes and a segment without rows, in blocks that lie anyhow; with a window too
    where there are `windows`. Queries resemble the first and the last key that they may see, and the
    keys beside those, which they may not. Raises ConfigError if the results differ."""
    made = torch.Generator().manual_seed(1)
    counts, ends = (3, 1, 0), (block_size + 9, 2 * block_size - 1, 0)
    blocks = torch.tensor([[2, 4], [3, 0], [0, 0]])
    cache = torch.randn(5, 2, block_size, 2, head_dim, generator=made).to(device, dtype)
    keys, values = cache.unbind(1)
    pages = Pages.of(
        torch.tensor([0, 3, 4, 4], dtype=torch.int32, device=device),
        torch.tensor(ends, dtype=torch.int32, device=device),
        blocks.to(device, torch.int32),
        most_rows=max(counts),
        block_size=block_size,
    )
    for window in (None, block_size // 2) if windows else (None,):
        queries, expected = [], []
        for count, end, ids in zip(counts, ends, blocks.to(device), strict=True):
            # [U, S, D], for each query head
            key, value = (
                part[ids].flatten(0, 1).transpose(0, 1).float().repeat_interleave(num_queries, 0)
                for part in (keys, values)
            )
            for seen in range(end - count + 1, end + 1):
                first = 0 if window is None else max(0, seen - window)
                beside = [max(0, first - 1), first, seen - 1, seen]
                queries.append(key[:, beside].sum(1).to(dtype))
                expected.append(
                    F.scaled_dot_product_attention(
                        queries[-1].float()[:, None], key[:, first:seen], value[:, first:seen]
                    )[:, 0]
                )
        try:
            found = attend_pages(
                torch.stack(queries), keys, values, pages, window=window, scale=head_dim**-0.5
            )
        except Exception as error:  # each library has its own ways to refuse, assertions among them
            raise ConfigError(f"cannot read pages here: {error}") from error
        difference = (found.float() - torch.stack(expected)).abs().max()
        if not difference < TOLERANCE:
            raise ConfigError(f"reads pages wrongly here: results differ by {difference:.2g}")


def _load(library: str) -> None:
    """Have torch use it, in all of this process. Raises ConfigError where it cannot."""
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    if library == OWN:
        restore_flash_attention_impl(_raise_warn=False)
    elif library != _loaded():
        try:
            activate_flash_attention_impl(library)
        except Exception as error:  # whatever its import raises
            raise ConfigError(f"cannot be loaded ({error})") from error


def _loaded() -> str | None:
    from torch.nn.attention import current_flash_attention_impl

    return current_flash_attention_impl()

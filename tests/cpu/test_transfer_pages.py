"""Pages leave a pool in wire order and arrive in another pool's order, whatever the blocks and heads
of either."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.paged import Place, ScatteredBlocks, read_kv

from paceline.parallel.launch import solo_mesh
from paceline.parallel.shard import shard_group
from paceline.runtime.errors import ConfigError
from paceline.runtime.kv.pool import KvPool
from paceline.runtime.models.arch import read_architecture
from paceline.runtime.models.llama import load_decoder
from paceline.runtime.models.model import Model
from paceline.runtime.models.weights import Checkpoint
from paceline.runtime.transfer.describe import describe_pool
from paceline.runtime.transfer.kernels import load_kernels
from paceline.runtime.transfer.layout import (
    PAGE,
    GroupPlace,
    Held,
    ModelLayout,
    PoolPlace,
    UnitPlace,
    plan,
)
from paceline.runtime.transfer.pages import PageError, Pages

LAYERS = 3
Dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="session", params=[True, False], ids=["kernels", "numpy"])
def compiled(request: pytest.FixtureRequest) -> bool:
    if request.param and load_kernels() is None:
        pytest.skip("no C++ compiler")
    return bool(request.param)


class Rank:
    """A rank's shared pool, mapped once more as its link does."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        block_size: int,
        num_blocks: int,
        group_size: int = 1,
        compiled: bool = True,
    ) -> None:
        held, places, units = [], [], []
        for group, first in enumerate(range(0, LAYERS, group_size)):
            size = min(group_size, LAYERS - first)
            shard = shard_group(
                size,
                num_heads=num_kv_heads,
                num_kv_heads=num_kv_heads,
                ff_size=1,
                ranks=ranks,
                rank=rank,
            )
            units.append(len(shard.units))
            for layer in range(size):
                own = shard.units_of(layer)
                if own:
                    heads = [shard.units[u].kv_head for u in own]
                    held.append(
                        Held(layer=first + layer, head_start=heads[0], head_stop=heads[-1] + 1)
                    )
                    places.append(UnitPlace(group=group, first_unit=own.start))
        self.pool = KvPool(
            units,
            head_dim=head_dim,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=Dtypes[dtype],
            device=torch.device("cpu"),
            shared=True,
        )
        assert self.pool.shared is not None
        self.layout = ModelLayout(
            name="target",
            num_layers=LAYERS,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,  # type: ignore[arg-type]
            held=tuple(held),
        )
        self.place = PoolPlace(
            block_size=block_size,
            num_blocks=num_blocks,
            groups=tuple(
                GroupPlace(offset_bytes=offset, num_units=count)
                for offset, count in zip(self.pool.shared.offsets, units, strict=True)
            ),
            units=tuple(places),
        )
        self.memory = mmap.mmap(self.pool.memfd, self.pool.mapped_bytes)
        self.pages = Pages(self.memory, self.layout, self.place, use_kernels=compiled)

    def fill(self) -> None:
        """Every number says what it is: layer, head, K or V, block, tile, token, dim."""
        for held, at in zip(self.layout.held, self.place.units, strict=True):
            for head in range(held.num_heads):
                unit = at.first_unit + head
                for kv, part in enumerate(
                    (self.pool.keys(at.group).transpose(3, 4), self.pool.values(at.group))
                ):
                    seed = (held.layer * 8 + held.head_start + head) * 2 + kv
                    generator = torch.Generator().manual_seed(seed)
                    part[unit] = torch.randn(part[unit].shape, generator=generator).to(part.dtype)

    def read(self, layer: int, head: int, page: int) -> NDArray[np.uint8]:
        """K and V of a page as torch sees them, `[2, 16, D]` bytes."""
        index = [held.layer for held in self.layout.held].index(layer)
        at, held = self.place.units[index], self.layout.held[index]
        unit, where = (
            at.first_unit + head - held.head_start,
            divmod(page, self.place.pages_per_block),
        )
        key = self.pool.keys(at.group)[unit][where].t()
        value = self.pool.values(at.group)[unit][where]
        found: NDArray[np.uint8] = torch.stack((key, value)).contiguous().view(torch.uint8).numpy()
        return found

    def pages_of(self, block_ids: list[int], count: int) -> NDArray[np.int64]:
        tiles = self.place.pages_per_block
        each = [block * tiles + tile for block in block_ids for tile in range(tiles)]
        return np.array(each[:count], dtype=np.int64)


SMALL: dict[str, Any] = {"num_kv_heads": 3, "head_dim": 20, "block_size": 32, "num_blocks": 5}


@pytest.mark.parametrize("dtype", Dtypes)
@pytest.mark.parametrize("head_dim", [1, 8, 20, 64])
def test_a_page_on_the_wire_is_head_then_k_and_v_then_token_then_dim(
    dtype: str, head_dim: int, compiled: bool
) -> None:
    rank = Rank(0, 1, **SMALL | {"head_dim": head_dim}, dtype=dtype, compiled=compiled)
    rank.fill()
    wanted = np.array([7, 0, 9])
    out = np.empty((3, rank.layout.page_bytes(2)), dtype=np.uint8)
    rank.pages.gather(1, 1, 3, wanted, out)
    for found, page in zip(out, wanted, strict=True):
        expected = np.stack([rank.read(1, head, int(page)) for head in (1, 2)])
        assert (found == expected.reshape(-1)).all()


@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    num_kv_heads=st.integers(1, 4),
    group_size=st.integers(1, LAYERS),
    blocks=st.tuples(st.sampled_from([16, 32, 48]), st.sampled_from([16, 32, 64])),
    num_pages=st.integers(1, 7),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    natives=st.sampled_from([(True, False), (False, True)]),
)
def test_any_engine_fills_any_other(
    sizes: tuple[int, int],
    num_kv_heads: int,
    group_size: int,
    blocks: tuple[int, int],
    num_pages: int,
    dtype: str,
    natives: tuple[bool, bool],
) -> None:
    """Sharded, grouped and blocked differently, with compiled kernels on one side and numpy on the
    other."""
    shape: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": 12, "dtype": dtype}
    theirs, mine = (
        [
            Rank(
                r,
                size,
                **shape,
                block_size=block,
                num_blocks=8,
                group_size=grouped,
                compiled=native,
            )
            for r in range(size)
        ]
        for size, block, grouped, native in zip(
            sizes, blocks, (1, group_size), natives, strict=True
        )
    )
    for rank in theirs:
        rank.fill()
    for r, consumer in enumerate(mine):
        source = theirs[0].pages_of([6, 1, 4, 0, 7, 2, 3], num_pages)
        target = consumer.pages_of([2, 7, 5, 0, 1, 4, 6], num_pages)
        shares = plan(consumer.layout, [rank.layout for rank in theirs], rank=r)
        for producer, layer, start, stop in shares:
            sent = np.empty((num_pages, consumer.layout.page_bytes(stop - start)), dtype=np.uint8)
            theirs[producer].pages.gather(layer, start, stop, source, sent)
            consumer.pages.scatter(layer, start, stop, target, sent)
            for at, to in zip(source, target, strict=True):
                for head in range(start, stop):
                    expected = theirs[producer].read(layer, head, int(at))
                    assert (consumer.read(layer, head, int(to)) == expected).all()


def test_only_the_named_pages_and_heads_are_written(compiled: bool) -> None:
    rank = Rank(0, 1, **SMALL, dtype="bfloat16", compiled=compiled)
    rank.fill()
    before = {
        (layer, head, page): rank.read(layer, head, page).copy()
        for layer in range(LAYERS)
        for head in range(3)
        for page in range(10)
    }
    data = np.full((2, rank.layout.page_bytes(1)), 7, dtype=np.uint8)
    rank.pages.scatter(1, 1, 2, np.array([3, 8]), data)
    for (layer, head, page), was in before.items():
        written = (layer, head) == (1, 1) and page in (3, 8)
        assert (rank.read(layer, head, page) == (7 if written else was)).all()


@pytest.mark.parametrize(
    ("layer", "heads", "pages", "width"),
    [
        (1, (1, 2), [10], 1),
        (1, (1, 2), [-1], 1),
        (1, (1, 2), [0, 2**40], 1),
        (1, (0, 2), [0], 2),
        (1, (1, 3), [0], 2),
        (1, (1, 1), [0], 0),
        (LAYERS, (1, 2), [0], 1),
        (-1, (1, 2), [0], 1),
        (1, (1, 2), [0], 2),
    ],
)
def test_what_is_not_there_is_neither_read_nor_written(
    layer: int, heads: tuple[int, int], pages: list[int], width: int, compiled: bool
) -> None:
    rank = Rank(1, 3, **SMALL, dtype="float32", compiled=compiled)
    data = np.zeros((len(pages), rank.layout.page_bytes(width)), dtype=np.uint8)
    for move in (rank.pages.gather, rank.pages.scatter):
        with pytest.raises(PageError):
            move(layer, *heads, np.array(pages), data)


def test_a_pool_that_may_only_be_read_is_not_written(compiled: bool) -> None:
    rank = Rank(0, 1, **SMALL, dtype="float32")
    memory = mmap.mmap(rank.pool.memfd, rank.pool.mapped_bytes, prot=mmap.PROT_READ)
    pages = Pages(memory, rank.layout, rank.place, use_kernels=compiled)
    data = np.zeros((1, rank.layout.page_bytes(3)), dtype=np.uint8)
    with pytest.raises(PageError):
        pages.scatter(0, 0, 3, np.array([0]), data)
    pages.gather(0, 0, 3, np.array([0]), data)


def test_a_place_beyond_the_memory_is_refused() -> None:
    rank = Rank(0, 1, **SMALL, dtype="float32")
    with pytest.raises(PageError, match="memory"):
        Pages(memoryview(rank.memory)[:-4096], rank.layout, rank.place)


def test_without_a_compiler_numpy_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("XDG_CACHE_HOME", "PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    load_kernels.cache_clear()
    try:
        assert load_kernels() is None
        rank = Rank(0, 1, **SMALL, dtype="bfloat16")
        rank.fill()
        out = np.empty((1, rank.layout.page_bytes(1)), dtype=np.uint8)
        rank.pages.gather(2, 1, 2, np.array([4]), out)
        assert (out.reshape(-1) == rank.read(2, 1, 4).reshape(-1)).all()
    finally:
        load_kernels.cache_clear()


@pytest.mark.parametrize("groups", [((0,), (1, 2), (3, 4, 5)), ((0, 1, 2, 3, 4, 5),)])
def test_a_models_pages_are_what_its_pass_wrote(
    tiny: Callable[..., Path], groups: tuple[tuple[int, ...], ...]
) -> None:
    folder = tiny()
    arch = read_architecture(folder)
    cpu = torch.device("cpu")
    decoder = load_decoder(
        Checkpoint(folder),
        arch,
        groups=groups,
        axis=solo_mesh().target,
        dtype=torch.float32,
        device=cpu,
    )
    model = Model(
        decoder,
        num_blocks=4,
        block_size=32,
        max_len=64,
        kv_dtype=torch.float32,
        device=cpu,
        shared=True,
    )
    place = Place(ScatteredBlocks(4), block_size=32)
    rows = model.rows(torch.arange(40), [place.segment(start=0, num_rows=40)])
    with torch.inference_mode():
        decoder.exact(rows)
    layout, where = describe_pool(model, "draft")
    heads = arch.num_kv_heads
    assert [(h.layer, h.head_start, h.head_stop) for h in layout.held] == [
        (layer, 0, heads) for layer in range(arch.num_layers)
    ]
    pages = Pages(mmap.mmap(model.pool.memfd, model.pool.mapped_bytes), layout, where)
    tiles = (place.table.ids()[:, None] * 2 + torch.arange(2)).flatten()[:3].numpy()
    out = np.empty((3, layout.page_bytes(heads)), dtype=np.uint8)
    for group, layers in enumerate(groups):
        expected = read_kv(model.pool, group, place.table, num_rows=40).numpy()
        for index, layer in enumerate(layers):
            pages.gather(layer, 0, heads, tiles, out)
            sent = out.view(np.float32).reshape(3, heads, 2, PAGE, -1)
            found = sent.transpose(2, 1, 0, 3, 4).reshape(2, heads, 48, -1)[:, :, :40]
            assert (found == expected[:, index * heads : (index + 1) * heads]).all()


def test_a_shared_pool_ends_with_its_owner() -> None:
    rank = Rank(0, 1, **SMALL, dtype="float32")
    fd = rank.pool.memfd
    assert os.fstat(fd).st_nlink == 0, "expected a file without a name"
    del rank
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_gpus_memory_cannot_be_shared_and_the_user_is_told() -> None:
    with pytest.raises(ConfigError, match="cuda"):
        KvPool(
            [1],
            head_dim=8,
            num_blocks=1,
            block_size=16,
            dtype=torch.float32,
            device=torch.device("cuda"),
            shared=True,
        )

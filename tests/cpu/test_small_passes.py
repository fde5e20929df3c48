"""Passes of a few rows in one call: they compute what passes of a library's products do."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tests.paged import Place, ScatteredBlocks, read_kv
from tests.tiny import SHAPE
from torch import Tensor
from transformers import PreTrainedModel

from paceline.parallel.launch import solo_mesh
from paceline.runtime.config import make_config
from paceline.runtime.layers import cpu_pass
from paceline.runtime.layers.cpu_kernels import load_kernels
from paceline.runtime.layers.cpu_pass import Packed, worth_packing
from paceline.runtime.loading import load
from paceline.runtime.models.arch import read_architecture
from paceline.runtime.models.model import Model
from paceline.runtime.spec.layer_parallel import LayerParallel, Placement, Policy

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")

SaveModel = Callable[..., tuple[Path, PreTrainedModel]]
GROUPS = [[0], [1, 2, 3], [4], [5]]
BLOCKS = 24
PROMPT = 20


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 15, 16, 100, 272])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 36])
def test_a_product_with_a_weight_in_tiles_is_the_product(
    rows: int, outputs: int, dtype: torch.dtype
) -> None:
    weight, bias = random(outputs, 44).to(dtype), random(outputs, seed=1)
    x = random(rows, 44, seed=2).to(dtype)
    found = Packed(weight, bias)(x)
    torch.testing.assert_close(
        found.double(), x.double() @ weight.double().t() + bias.double(), rtol=1e-5, atol=1e-5
    )


def test_weights_of_no_outputs_or_no_inputs_are_products_too() -> None:
    assert Packed(random(0, 8))(random(3, 8)).shape == (3, 0)
    assert Packed(random(8, 0), torch.ones(8))(random(3, 0)).tolist() == [[1.0] * 8] * 3


def loaded(folder: Path, *, dtype: str = "float32") -> Model:
    """In groups, so that layers may run side by side."""
    draft = {"model": str(folder), "dtype": dtype, "layer_groups": GROUPS}
    config = make_config(
        {"model": str(folder), "dtype": dtype, "max_num_seqs": 2, "speculative_config": draft}
    )
    draft_model = load(config, solo_mesh()).draft_model
    assert draft_model is not None
    return draft_model.model


@torch.inference_mode()
def run(
    model: Model, form: str, *, small: bool, num_rows: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """Logits of a pass over several requests, and all KV behind it."""
    for pages in model.pool.groups:
        pages.zero_()
    blocks = ScatteredBlocks(BLOCKS)
    places = [Place(blocks) for _ in num_rows]
    grouped = None
    if form != "exact":
        axis = solo_mesh().draft
        grouped = LayerParallel(
            model.decoder, policy=Policy(form), placement=Placement.TENSOR, axis=axis
        )
    for start, counts in ((0, [PROMPT] * len(num_rows)), (PROMPT, num_rows)):
        segments = [
            place.segment(start=start, num_rows=count)
            for place, count in zip(places, counts, strict=True)
        ]
        ids = [(7 * i + start) % SHAPE["vocab_size"] for i in range(sum(counts))]
        rows = model.rows(model.tokens(ids), segments)
        if not small:
            rows = dataclasses.replace(rows, small=None)
        assert (rows.small is not None) == small, "expected a pass of few rows"
        h_TE = model.decoder.exact(rows) if grouped is None else grouped.grouped(rows)
    if not small:
        model.decoder._small_rows = 0
    kv = [
        read_kv(model.pool, group, place.table, num_rows=PROMPT + count)
        for group in range(len(model.pool.groups))
        for place, count in zip(places, num_rows, strict=True)
    ]
    return model.decoder.logits(h_TE), kv


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_a_row_is_bit_by_bit_the_same_whatever_else_is_in_its_pass(
    tiny: Callable[..., Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So drafting changes no text in bfloat16 either, and neither do neighbours or pieces of prompts."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    model = loaded(tiny(seed=3), dtype=dtype)
    text = [(11 * i + i // 7) % SHAPE["vocab_size"] for i in range(150)]

    def read(pieces: list[int], *, beside: int) -> Tensor:
        """Logits of the whole text, read in such pieces beside a neighbour of so many rows."""
        blocks = ScatteredBlocks(BLOCKS)
        place, neighbour, start, found = Place(blocks), Place(blocks), 0, []
        for number, count in enumerate(pieces):
            segments = [place.segment(start=start, num_rows=count)]
            ids = text[start : start + count]
            if beside and number < 20:
                others = neighbour.segment(start=number * beside, num_rows=beside)
                segments, ids = [others, *segments], [*text[-beside:], *ids]
            h_TE = model.decoder.exact(model.rows(model.tokens(ids), segments))
            found.append(model.decoder.logits(h_TE[-count:]))
            start += count
        return torch.cat(found)

    expected = read([1] * 150, beside=0)
    assert expected.std() > 0.1, "expected something to differ in"
    for pieces in ([150], [100, 50], [128, 6, 6, 6, 4], [3] * 50, [130, *[1] * 20]):
        for beside in (0, 1, 9):
            assert read(pieces, beside=beside).equal(expected), (pieces, beside)


@pytest.mark.parametrize("policy", ["attention", "block"])
@torch.inference_mode()
def test_layers_that_ranks_hold_whole_are_those_that_they_share(
    tiny: Callable[..., Path], policy: str
) -> None:
    """In bfloat16, whose results between the calls of a pass are float32 all the same."""
    model = loaded(tiny(seed=3), dtype="bfloat16")
    found = []
    for placement in (Placement.TENSOR, Placement.LAYER):
        place = Place(ScatteredBlocks(BLOCKS))
        rows = model.rows(model.tokens([5, 6, 7]), [place.segment(start=0, num_rows=3)])
        drafter = LayerParallel(
            model.decoder, policy=Policy(policy), placement=placement, axis=solo_mesh().draft
        )
        found.append(model.decoder.logits(drafter.grouped(rows)))
    assert found[0].std() > 0.1
    torch.testing.assert_close(*found, rtol=0.0, atol=0.05)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many compute."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", ["exact", "attention", "block"])
@pytest.mark.parametrize("num_rows", [[1], [3, 1, 4], [60, 2, 41]])
@pytest.mark.parametrize("num_threads", [2, 3, 5])
def test_threads_compute_bit_by_bit_what_one_does(
    tiny: Callable[..., Path],
    threads: Callable[[int], None],
    form: str,
    num_rows: list[int],
    num_threads: int,
) -> None:
    """More threads than units, and than cores here."""
    threads(1)
    model = loaded(tiny(seed=3))
    expected, expected_kv = run(model, form, small=True, num_rows=num_rows)
    threads(num_threads)
    for _ in range(3):
        found, found_kv = run(model, form, small=True, num_rows=num_rows)
        assert found.equal(expected)
        assert all(a.equal(b) for a, b in zip(found_kv, expected_kv, strict=True))


def test_a_team_sleeps_without_work_wakes_for_it_and_ends_with_its_caller(
    threads: Callable[[int], None],
) -> None:
    threads(3)
    weight, x = random(100, 44), random(1, 44, seed=1)
    small, own = Packed(weight), psutil.Process()
    found: list[Tensor] = []

    def now_and_then() -> None:
        torch.set_num_threads(3)
        for _ in range(20):
            found.append(small(x))
            time.sleep(0.002)  # longer than it stays awake

    before = own.num_threads()
    caller = threading.Thread(target=now_and_then)
    caller.start()
    caller.join(30)
    assert all(each.equal(found[0]) for each in found)
    torch.testing.assert_close(found[0], x @ weight.t(), rtol=1e-5, atol=1e-5)
    deadline = time.monotonic() + 10
    while own.num_threads() > before:
        assert time.monotonic() < deadline, "threads of a caller that has ended"
        time.sleep(0.01)


@pytest.mark.parametrize("form", ["exact", "attention", "block"])
@pytest.mark.parametrize("num_rows", [[1], [3, 1, 4], [60, 2, 41]])
def test_a_small_pass_computes_and_stores_what_a_large_one_does(
    tiny: Callable[..., Path], form: str, num_rows: list[int]
) -> None:
    model = loaded(tiny(seed=3))
    found, found_kv = run(model, form, small=True, num_rows=num_rows)
    expected, expected_kv = run(model, form, small=False, num_rows=num_rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(found_kv, expected_kv, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_it_is_at_least_as_near_to_float32(tiny: Callable[..., Path]) -> None:
    folder = tiny(seed=3)
    half = loaded(folder, dtype="bfloat16")
    exact, _ = run(loaded(folder), "exact", small=True, num_rows=[5])
    small, _ = run(half, "exact", small=True, num_rows=[5])
    large, _ = run(half, "exact", small=False, num_rows=[5])
    assert (small - exact).abs().mean() < 1.2 * (large - exact).abs().mean()


def test_models_that_are_large_keep_their_weights_once(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_pass, "MOST_BYTES", 1000)
    model = loaded(tiny(seed=3))
    rows = model.rows(model.tokens([1]), [Place(ScatteredBlocks(4)).segment(start=0, num_rows=1)])
    assert rows.small is None


def test_passes_of_many_rows_are_a_library_s_where_it_has_tiles(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model = loaded(tiny(seed=3))
    many = cpu_pass.most_rows() + 1
    segment = Place(ScatteredBlocks(BLOCKS)).segment(start=0, num_rows=many)
    assert model.rows(model.tokens([1] * many), [segment]).small is None


def test_inputs_that_make_no_pairs_are_a_library_s_on_every_rank(
    tiny: Callable[..., Path],
) -> None:
    cpu = torch.device("cpu")
    arch = read_architecture(tiny(seed=3))
    assert [arch.ff_size % (2 * ranks) for ranks in (1, 2, 4)] == [0, 0, 4]

    def packs(dtype: torch.dtype, ranks: int) -> bool:
        return worth_packing(arch, ranks=ranks, dtype=dtype, device=cpu)

    assert [packs(torch.bfloat16, ranks) for ranks in (1, 2, 4)] == [True, True, False]
    assert packs(torch.float32, 4)

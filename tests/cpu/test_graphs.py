"""Passes that are recorded once and played with other numbers: the same hidden states and the same
KV as passes that are launched anew.

There is no GPU here. What is recorded is played by `tests/recording.py`, which keeps to a graph's
rules; whether CUDA records it too is asked in `tests/gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.cpu.conftest import SHAPE, SaveModel
from tests.flash import flash_on_cpu
from tests.paged import Place, ScatteredBlocks, read_kv
from tests.recording import record
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, MistralConfig

from paceline import LLM, SamplingParams
from paceline.parallel.collectives import Alone
from paceline.parallel.launch import solo_mesh
from paceline.parallel.layer import layer_groups
from paceline.parallel.mesh import Axis
from paceline.runtime import loading
from paceline.runtime.config import make_config
from paceline.runtime.inputs import Segment
from paceline.runtime.models import graphs
from paceline.runtime.models.arch import read_architecture
from paceline.runtime.models.graphs import Recorder
from paceline.runtime.models.llama import load_decoder
from paceline.runtime.models.model import Model
from paceline.runtime.models.weights import Checkpoint
from paceline.runtime.spec.layer_parallel import LayerParallel, Placement, Policy
from paceline.runtime.spec.tree import DraftTree

torch.set_num_threads(1)
CPU = torch.device("cpu")
NUM_BLOCKS = 64


@pytest.fixture(autouse=True)
def torch_alone(no_kernels: None) -> None:
    """As on a GPU: our compiled kernels are no operations of torch, and are not there."""


def make_model(
    folder: Path,
    *,
    recorder: Recorder | None,
    size: int = 1,
    device: torch.device = CPU,
    attention: str = "",
) -> Model:
    """A small Llama in groups of `size` layers."""
    arch = read_architecture(folder)
    decoder = load_decoder(
        Checkpoint(folder),
        arch,
        groups=layer_groups(arch.num_layers, size=size),
        axis=Axis(size=1, index=0, collectives=Alone()),
        dtype=torch.float32,
        device=device,
    )
    return Model(
        decoder,
        num_blocks=NUM_BLOCKS,
        block_size=16,
        max_len=128,
        kv_dtype=torch.float32,
        device=device,
        record=recorder,
        attention=attention,
    )


class Both:
    """The same passes over two models: one launches, one plays, and reads pages if `attention` says
    by what."""

    def __init__(self, folder: Path, *, size: int = 1, attention: str = "") -> None:
        self.launched = make_model(folder, recorder=None, size=size)
        self.played = make_model(folder, recorder=record, size=size, attention=attention)
        self._tokens = torch.Generator().manual_seed(1)
        forms = [
            LayerParallel(
                model.decoder,
                policy=Policy.BLOCK,
                placement=Placement.TENSOR,
                axis=model.decoder.axis,
            )
            for model in (self.launched, self.played)
        ]
        self._forms = forms

    @property
    def num_recorded(self) -> int:
        assert self.played.graphs is not None
        return self.played.graphs.num_recorded

    def check(self, segments: list[Segment], *, grouped: bool = False) -> Tensor:
        num_rows = sum(segment.num_rows for segment in segments)
        token_ids = torch.randint(0, 97, (num_rows,), generator=self._tokens)
        found = []
        for model, form in zip((self.launched, self.played), self._forms, strict=True):
            with torch.inference_mode():
                rows = model.rows(token_ids, segments)
                found.append((form.grouped if grouped else model.decoder.exact)(rows))
        assert found[1].shape == found[0].shape
        assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-4)
        for segment in segments:
            for group in range(len(self.launched.pool.groups)):
                kv = [
                    read_kv(model.pool, group, segment.table, num_rows=segment.end)
                    for model in (self.launched, self.played)
                ]
                assert torch.allclose(kv[0], kv[1], rtol=1e-4, atol=1e-4)
        return found[0]


@pytest.fixture(scope="module")
def folder(save_model: SaveModel, llama_config: Callable[..., LlamaConfig]) -> Path:
    return save_model(llama_config())[0]


@pytest.fixture(params=["", "FlashAttention"], ids=["gathered", "pages"])
def attention(request: pytest.FixtureRequest) -> Iterator[str]:
    """What reads pages, where that is not left to torch."""
    with flash_on_cpu() as calls:
        yield request.param
    assert bool(calls) == bool(request.param)


PIECES = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(PIECES, min_size=1, max_size=5), grouped=st.booleans())
def test_any_passes_are_what_they_are_launched(
    folder: Path, attention: str, texts: list[list[int]], grouped: bool
) -> None:
    both, blocks = (
        Both(folder, size=2, attention=attention),
        ScatteredBlocks(NUM_BLOCKS, seed=len(texts)),
    )
    places, done = [Place(blocks) for _ in texts], [0] * len(texts)
    for number in range(max(map(len, texts))):
        taking = [i for i, pieces in enumerate(texts) if number < len(pieces)]
        segments = []
        for i in taking:
            count = texts[i][number]
            segments.append(places[i].segment(start=done[i], num_rows=count))
            done[i] += count
        both.check(segments, grouped=grouped)
    assert both.num_recorded > 0


def test_a_text_that_grows_plays_the_same_graph(folder: Path, attention: str) -> None:
    both, place = Both(folder, attention=attention), Place(ScatteredBlocks(NUM_BLOCKS))
    both.check([place.segment(start=0, num_rows=20)])
    before = both.num_recorded
    found = [both.check([place.segment(start=at, num_rows=1)]) for at in range(20, 60)]
    assert both.num_recorded == before + 1
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("parents", [(-1, 0, 0, 1, -1), (-1, -1, -1), (-1, 0, 1, 2)])
def test_trees_of_other_shapes_play_the_same_graph(
    folder: Path, attention: str, parents: tuple[int, ...]
) -> None:
    both, blocks = Both(folder, attention=attention), ScatteredBlocks(NUM_BLOCKS)
    places = [Place(blocks), Place(blocks)]
    both.check([place.segment(start=0, num_rows=12) for place in places])
    for start, tree in ((12, parents), (13, tuple(-1 for _ in parents)), (14, parents)):
        masks = DraftTree(tuple(range(len(tree))), tree).ancestor_mask
        plain = places[0].segment(start=start, num_rows=1 + len(tree))
        with_tree = Segment(
            num_rows=plain.num_rows,
            end=plain.end,
            table=plain.table,
            masks=masks,
            tree_start=start + 1,
        )
        both.check([with_tree, places[1].segment(start=start, num_rows=1)])
    assert both.num_recorded == 2, "one for the prompts, one for trees"


def test_padding_writes_where_nobody_reads(folder: Path, attention: str) -> None:
    model = make_model(folder, recorder=record, attention=attention)
    blocks = ScatteredBlocks(NUM_BLOCKS)
    places = [Place(blocks) for _ in range(3)]
    for group in model.pool.groups:
        group.fill_(7.0)
    segments = [
        place.segment(start=0, num_rows=count)
        for place, count in zip(places, (5, 1, 2), strict=True)
    ]
    with torch.inference_mode():
        model.decoder.exact(model.rows(torch.arange(8), segments))
    for group, pages in enumerate(model.pool.groups):
        untouched = [b for b in range(NUM_BLOCKS) if all(b not in p.table.ids() for p in places)]
        assert (pages[untouched] == 7.0).all()
        for place, count in zip(places, (5, 1, 2), strict=True):
            assert (read_kv(model.pool, group, place.table, num_rows=16)[:, :, count:] == 7.0).all()


def test_what_does_not_fit_is_launched(
    folder: Path, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_ROWS", 16)
    both, blocks = Both(folder, attention=attention), ScatteredBlocks(NUM_BLOCKS)
    long, windowed = Place(blocks), Place(blocks, sinks=4, window=16)
    both.check([long.segment(start=0, num_rows=17)])
    both.check([windowed.segment(start=0, num_rows=21)])
    both.check([windowed.segment(start=21, num_rows=1)])
    assert both.num_recorded == 0
    both.check([long.segment(start=17, num_rows=16)])
    assert both.num_recorded == 1


def test_the_graphs_not_played_for_longest_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    both, place = Both(folder), Place(ScatteredBlocks(NUM_BLOCKS))
    start = 0
    for count in (1, 2, 1, 3, 1, 2):
        both.check([place.segment(start=start, num_rows=count)])
        start += count
        assert both.num_recorded <= 2


def test_a_layer_s_own_window_is_kept(save_model: SaveModel, attention: str) -> None:
    both = Both(save_model(MistralConfig(**SHAPE, sliding_window=11))[0], attention=attention)
    place = Place(ScatteredBlocks(NUM_BLOCKS))
    for at in range(0, 40, 4):
        both.check([place.segment(start=at, num_rows=4)])
    assert both.num_recorded == 1


@pytest.mark.parametrize("tree", ["chain", "beam", "dynamic"])
def test_an_engine_that_plays_writes_the_same_text(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tree: str, attention: str
) -> None:
    made: list[int] = []

    def counted(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        made.append(1)
        return record(compute)

    def recorder(*_: object) -> Recorder:
        return counted

    texts = []
    prompts = [{"prompt_token_ids": [3, 1, 4, 1, 5]}, {"prompt_token_ids": [9, 2, 6]}]
    for played in (False, True):
        if played:
            monkeypatch.setattr(loading, "recorder", recorder)
            monkeypatch.setattr(loading, "page_reader", lambda *_: attention)
        with LLM(
            str(tiny(seed=0)),
            dtype="float32",
            device="cpu",
            distributed_executor_backend="uni",
            kv_cache_memory="4MiB",
            speculative_config={
                "model": str(tiny(seed=0, noise=0.03)),
                "layer_parallel_size": 2,
                "draft_length": "fixed",
                "tree": tree,
            },
        ) as llm:
            for temperature in (0.0, 0.8):
                params = SamplingParams(
                    temperature=temperature, seed=3, max_tokens=24, ignore_eos=True
                )
                outputs = llm.generate(prompts, params)
                texts.append([output.outputs[0].token_ids for output in outputs])
    assert texts[:2] == texts[2:]
    assert made, "nothing was recorded"


def test_graphs_are_for_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "record_cuda", lambda _device: record)
    config = make_config({"model": str(folder), "enforce_eager": False})
    mesh = solo_mesh()
    assert loading.recorder(config, mesh.target, torch.device("cpu")) is None
    assert loading.recorder(config, mesh.target, torch.device("cuda")) is not None
    eager = make_config({"model": str(folder)})
    assert loading.recorder(eager, mesh.target, torch.device("cuda")) is None


class Moves(TorchDispatchMode):
    """Counts operations that take from the host and give to the device. The device is torch's "meta",
    which has shapes and no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = (each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        if isinstance(made, Tensor) and made.device.type == "meta":
            self.count += any(each.device.type == "cpu" for each in given)
        return made


@pytest.mark.parametrize("attention", ["", "FlashAttention"], ids=["gathered", "pages"])
def test_the_device_is_told_of_a_pass_once(folder: Path, attention: str) -> None:
    """Whatever the number of layers; and in what is recorded nothing is told at all."""
    recorded = []

    def record_on_meta(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with Moves() as moves:
            h_TE = compute()
        recorded.append(moves.count)
        return lambda: None, h_TE

    meta, blocks = torch.device("meta"), ScatteredBlocks(NUM_BLOCKS)
    segments = [Place(blocks).segment(start=0, num_rows=count) for count in (3, 1, 3)]
    for recorder in (None, record_on_meta):
        model = make_model(folder, device=meta, recorder=recorder, attention=attention)
        token_ids = model.tokens([1] * 7)
        with Moves() as moves, torch.inference_mode():
            found = model.decoder.exact(model.rows(token_ids, segments))
        assert found.shape == (7, SHAPE["hidden_size"])
        assert moves.count == 1
    assert recorded == [0]

"""Every head a consumer holds comes from one producer rank that holds it, whatever the sizes; and
engines that differ say in what."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.parallel.shard import shard_group
from paceline.runtime.transfer.layout import (
    GroupPlace,
    Held,
    KvMismatchError,
    ModelLayout,
    differences,
    model_fingerprint,
    plan,
)

LAYERS, QUERIES = 4, 2


def layout(held: list[tuple[int, int, int]], *, num_kv_heads: int = 4) -> ModelLayout:
    return ModelLayout(
        name="target",
        num_layers=LAYERS,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        dtype="float32",
        held=tuple(Held(layer=at, head_start=start, head_stop=stop) for at, start, stop in held),
    )


def engine(ranks: int, *, num_kv_heads: int, group_size: int) -> list[ModelLayout]:
    """The layouts of all ranks of an engine whose layers are in groups of `group_size`."""
    made = []
    for rank in range(ranks):
        held = []
        for first in range(0, LAYERS, group_size):
            size = min(group_size, LAYERS - first)
            shard = shard_group(
                size,
                num_heads=num_kv_heads * QUERIES,
                num_kv_heads=num_kv_heads,
                ff_size=1,
                ranks=ranks,
                rank=rank,
            )
            for layer in range(size):
                heads = [shard.units[u].kv_head for u in shard.units_of(layer)]
                if heads:
                    held.append((first + layer, heads[0], heads[-1] + 1))
        made.append(layout(held, num_kv_heads=num_kv_heads))
    return made


def heads_of(ranges: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(layer, head) for layer, start, stop in ranges for head in range(start, stop)]


@given(
    num_kv_heads=st.integers(1, 6),
    producers=st.integers(1, 7),
    consumers=st.integers(1, 7),
    groups=st.tuples(st.integers(1, LAYERS), st.integers(1, LAYERS)),
)
def test_each_head_comes_once_from_a_rank_that_holds_it(
    num_kv_heads: int, producers: int, consumers: int, groups: tuple[int, int]
) -> None:
    theirs = engine(producers, num_kv_heads=num_kv_heads, group_size=groups[0])
    for rank, mine in enumerate(engine(consumers, num_kv_heads=num_kv_heads, group_size=groups[1])):
        shares = plan(mine, theirs, rank=rank)
        wanted = heads_of([(h.layer, h.head_start, h.head_stop) for h in mine.held])
        assert heads_of([share[1:] for share in shares]) == wanted
        for share in shares:
            held = theirs[share.producer].holding(share.layer)
            assert held is not None
            assert held.head_start <= share.head_start < share.head_stop <= held.head_stop


def test_neighbouring_heads_of_one_producer_travel_together() -> None:
    whole, halves = engine(1, num_kv_heads=4, group_size=1), engine(2, num_kv_heads=4, group_size=1)
    assert plan(whole[0], halves, rank=0)[:2] == ((0, 0, 0, 2), (1, 0, 2, 4))
    assert plan(halves[1], whole, rank=1) == tuple((0, layer, 2, 4) for layer in range(LAYERS))


def test_consumer_ranks_take_turns_with_owners_of_one_head() -> None:
    owners = [layout([(0, 0, 1)], num_kv_heads=1)] * 3
    asked = [plan(owners[0], owners, rank=rank)[0].producer for rank in range(6)]
    assert asked == [0, 1, 2, 0, 1, 2]


def test_a_head_that_nobody_holds_is_named() -> None:
    with pytest.raises(KvMismatchError, match="layer 1 head 2"):
        plan(layout([(1, 0, 4)]), [layout([(0, 0, 4), (1, 0, 2)]), layout([(1, 3, 4)])], rank=0)


@pytest.mark.parametrize("change", [{"head_dim": 16}, {"dtype": "bfloat16"}, {"num_layers": 9}])
def test_models_of_another_shape_have_no_plan(change: dict[str, object]) -> None:
    mine = layout([(0, 0, 4)])
    other = msgspec.convert(msgspec.to_builtins(mine) | change, ModelLayout)
    with pytest.raises(KvMismatchError, match=next(iter(change))):
        plan(mine, [mine, other], rank=0)


@pytest.mark.parametrize(
    "held",
    [
        [(0, 2, 2)],
        [(0, 3, 2)],
        [(0, 0, 5)],
        [(LAYERS, 0, 1)],
        [(1, 0, 1), (0, 0, 1)],
        [(1, 0, 1), (1, 1, 2)],
        [(-1, 0, 1)],
    ],
)
def test_an_impossible_layout_is_refused_when_it_is_read(held: list[tuple[int, int, int]]) -> None:
    told = msgspec.to_builtins(layout([])) | {
        "held": [{"layer": at, "head_start": start, "head_stop": stop} for at, start, stop in held]
    }
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(told, ModelLayout)


def test_pools_lie_where_vectors_may() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"offset_bytes": 8, "num_units": 1}, GroupPlace)


def test_differences_are_told_by_name_and_the_drafters_apart() -> None:
    mine = {"kv dtype": "float32", "weights": "a", "draft.weights": "b"}
    theirs = {"kv dtype": "bfloat16", "weights": "a", "draft.weights": "c", "config.x": "1"}
    assert differences(mine, theirs) == [
        "config.x: nothing here, 1 there",
        "kv dtype: float32 here, bfloat16 there",
    ]
    assert differences(mine, theirs, draft=True) == ["draft.weights: b here, c there"]
    assert differences(mine, {"kv dtype": "float32", "weights": "a"}) == []


def write_tensors(path: Path, tensors: dict[str, bytes]) -> None:
    """A safetensors file."""
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {
            "dtype": "U8",
            "shape": [len(data)],
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))


CONFIG = {"hidden_size": 8, "rope_scaling": {"factor": 8.0, "why": "x" * 100}}


def fingerprint(folder: Path, **changes: object) -> dict[str, str]:
    given: dict[str, object] = {"config": CONFIG, "kv_dtype": "bfloat16", "dtype": "bfloat16"}
    return model_fingerprint(folder, **(given | changes))  # type: ignore[arg-type]


def test_a_fine_tune_of_any_one_tensor_is_another_model(tmp_path: Path) -> None:
    tensors = {"a": bytes(100_000), "b": bytes(50), "c": bytes(100_000), "empty": b""}
    write_tensors(tmp_path / "model.safetensors", tensors)
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    for name in "abc":
        trained = {**tensors, name: bytes(byte ^ 1 for byte in tensors[name])}
        write_tensors(tmp_path / "model.safetensors", trained)
        (difference,) = differences(before, fingerprint(tmp_path))
        assert difference.startswith("weights: ")


def test_a_fingerprint_is_of_what_is_computed_and_not_of_who_computes_it(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"a": b"a"})
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path, config=CONFIG | {"transformers_version": "9"}) == before
    changes: dict[str, dict[str, object]] = {
        "dtype: ": {"dtype": "float32"},
        "kv dtype: ": {"kv_dtype": "float32"},
        "config.hidden_size: ": {"config": CONFIG | {"hidden_size": 9}},
        "config.rope_scaling: ": {"config": CONFIG | {"rope_scaling": {"why": "y" * 100}}},
    }
    for name, change in changes.items():
        (difference,) = differences(before, fingerprint(tmp_path, **change))
        assert difference.startswith(name)
    (tmp_path / "tokenizer.json").write_text("{}")
    (difference,) = differences(before, fingerprint(tmp_path))
    assert difference.startswith("tokenizer: nothing here")
    assert all(key.startswith("draft.") for key in fingerprint(tmp_path, draft=True))

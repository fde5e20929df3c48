"""Which rank holds which heads of which layers, who gives what to whom, and whether two engines
may exchange KV at all.

    consumer rank 1 of 2 holds       layer 0 heads 2-3 | layer 1 heads 2-3
    producer ranks of 4 hold         0: head 0   1: head 1   2: head 2   3: head 3     of every layer
    plan                             (producer 2, layer 0, heads 2-2) (producer 3, layer 0, heads 3-3) ...

Both sides may hold any ranges: nothing here knows a tensor-parallel size. Head ranges are half open.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta

from paceline.runtime.errors import EngineError
from paceline.runtime.types import WireType

PAGE = 16
"""Tokens of a page: what a pool keeps side by side, and the unit of the wire."""

PROTOCOL_MAJOR, PROTOCOL_MINOR = 1, 0
"""Peers of one major understand each other. proto/README.md says what a minor may add."""

ModelName = Literal["target", "draft"]
MODELS: tuple[ModelName, ...] = ("target", "draft")
"""By the number that the wire has for them."""

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
Dtype = Literal["float32", "bfloat16", "float16"]

_Count = Annotated[int, Meta(ge=1, lt=1 << 16)]
_Index = Annotated[int, Meta(ge=0, lt=1 << 16)]


class KvMismatchError(EngineError):
    """Two engines whose KV is not interchangeable. The message says in what they differ."""


class Held(WireType, frozen=True, kw_only=True):
    """One layer's KV heads on a rank."""

    layer: _Index
    head_start: _Index
    head_stop: _Count

    @property
    def num_heads(self) -> int:
        return self.head_stop - self.head_start


class ModelLayout(WireType, frozen=True, kw_only=True):
    """The KV of one model, and what part of it a rank holds.

    Raises ValueError where it is not possible, so that one from a peer is checked when it is read.
    """

    name: ModelName
    num_layers: _Count
    num_kv_heads: _Count
    head_dim: _Count
    dtype: Dtype
    held: tuple[Held, ...]
    """By layer, each at most once."""

    def __post_init__(self) -> None:
        last = -1
        for held in self.held:
            if not last < held.layer < self.num_layers:
                raise ValueError(
                    f"layer {held.layer} after layer {last} in a model of {self.num_layers} layers"
                )
            if not held.head_start < held.head_stop <= self.num_kv_heads:
                raise ValueError(
                    f"heads {held.head_start} to {held.head_stop} of {self.num_kv_heads}"
                )
            last = held.layer

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    def page_bytes(self, num_heads: int) -> int:
        """Of one page of one layer, not encoded."""
        return num_heads * 2 * PAGE * self.head_dim * self.itemsize

    def holding(self, layer: int) -> Held | None:
        """This rank's heads of a layer, if it has any."""
        return next((held for held in self.held if held.layer == layer), None)


class GroupPlace(WireType, frozen=True, kw_only=True):
    """One group of layers in a pool's memory: `[pages, units, 2 * 16 * D]`."""

    offset_bytes: Annotated[int, Meta(ge=0, multiple_of=64)]
    num_units: Annotated[int, Meta(ge=0, lt=1 << 32)]


class UnitPlace(WireType, frozen=True, kw_only=True):
    """Where a layer's heads lie: side by side in one group."""

    group: _Index
    first_unit: Annotated[int, Meta(ge=0, lt=1 << 32)]


class PoolPlace(WireType, frozen=True, kw_only=True):
    """Where a rank's pool keeps what its `ModelLayout` says it holds. Page b * (block_size // 16) + i
    is the i-th of block b."""

    block_size: Annotated[int, Meta(ge=PAGE, multiple_of=PAGE)]
    num_blocks: Annotated[int, Meta(ge=1)]
    groups: tuple[GroupPlace, ...]
    units: tuple[UnitPlace, ...]
    """One for each `held`."""

    @property
    def pages_per_block(self) -> int:
        return self.block_size // PAGE

    @property
    def num_pages(self) -> int:
        return self.num_blocks * self.pages_per_block


class Share(NamedTuple):
    """Heads of one layer that come from one producer rank."""

    producer: int
    layer: int
    head_start: int
    head_stop: int


def plan(mine: ModelLayout, producers: Sequence[ModelLayout], *, rank: int) -> tuple[Share, ...]:
    """Who gives consumer `rank` each head it holds, by layer and head.

    `producers[r]` is what the other engine's rank r holds. Of several owners of a head, consumer
    ranks take turns. Raises KvMismatchError where the models differ or nobody holds a head.
    """
    for r, theirs in enumerate(producers):
        for what in ("name", "num_layers", "num_kv_heads", "head_dim", "dtype"):
            ours, other = getattr(mine, what), getattr(theirs, what)
            if ours != other:
                raise KvMismatchError(
                    f"{mine.name} {what}: {ours} here, {other} on rank {r} of the producer"
                )
    owners: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for r, theirs in enumerate(producers):
        for held in theirs.held:
            for head in range(held.head_start, held.head_stop):
                owners[held.layer, head].append(r)
    shares: list[Share] = []
    for held in mine.held:
        for head in range(held.head_start, held.head_stop):
            having = owners.get((held.layer, head))
            if having is None:
                raise KvMismatchError(
                    f"no rank of the producer holds layer {held.layer} head {head} of the {mine.name}"
                )
            producer = having[rank % len(having)]
            last = shares[-1] if shares else None
            if last and last[:2] == (producer, held.layer):  # of the head before
                shares[-1] = last._replace(head_stop=head + 1)
            else:
                shares.append(Share(producer, held.layer, head, head + 1))
    return tuple(shares)


def differences(
    mine: Mapping[str, str], theirs: Mapping[str, str], *, draft: bool = False
) -> list[str]:
    """In what two fingerprints differ, each for a person to read: "kv dtype: float32 here, bfloat16
    there".

    Of what concerns the target, which forbids any transfer, or with `draft` of the drafter, which
    only forbids that of the drafter's KV.
    """
    return [
        f"{key}: {mine.get(key, 'nothing')} here, {theirs.get(key, 'nothing')} there"
        for key in sorted({*mine, *theirs})
        if key.startswith(_DRAFT) == draft and mine.get(key) != theirs.get(key)
    ]


_DRAFT = "draft."
_SILENT = frozenset(
    ("_name_or_path", "architectures", "auto_map", "transformers_version", "use_cache")
)
"""Entries of config.json that do not change what is computed."""
_LONG = 80


def model_fingerprint(
    folder: Path, *, config: Mapping[str, Any], kv_dtype: str, dtype: str, draft: bool = False
) -> dict[str, str]:
    """What must be equal on both sides for a model's KV to be the same numbers, by name.

    `config` is the content of config.json. The version of the engine is not part of it. Reads from
    disk a few KiB of every tensor.
    """
    facts = {
        "dtype": dtype,
        "kv dtype": kv_dtype,
        "tokenizer": _file_digest(folder / "tokenizer.json"),
        "weights": weights_digest(folder),
    }
    for key, value in config.items():
        if key not in _SILENT:
            text = json.dumps(value, sort_keys=True)
            facts[f"config.{key}"] = text if len(text) < _LONG else _hex(text.encode())
    if draft:
        return {_DRAFT + key: value for key, value in facts.items()}
    return {"protocol": str(PROTOCOL_MAJOR), **facts}


SAMPLE_BYTES, SAMPLES_PER_TENSOR = 4096, 2


def weights_digest(folder: Path) -> str:
    """Of the folder's safetensors files: names, sizes, headers, and samples of every tensor.

    Headers alone would not do: two fine-tunes of one model have the same. All of it would not do
    either: to read 100 GB before serving takes minutes. So of each tensor 4 KiB from its middle and 4
    KiB from its end are read, which tells apart whatever has been trained; not an edit of a few
    rows by hand.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise EngineError(f"{path.name} is no safetensors file")
            header = file.read(length)
            digest.update(repr((path.name, size)).encode() + header)
            for start, stop in _tensor_ranges(header):
                width = min(SAMPLE_BYTES, stop - start)
                for part in range(1, SAMPLES_PER_TENSOR + 1):
                    at = start + (stop - start - width) * part // SAMPLES_PER_TENSOR
                    digest.update(os.pread(file.fileno(), width, 8 + length + at))
    return digest.hexdigest()[:16]


def _tensor_ranges(header: bytes) -> list[tuple[int, int]]:
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return sorted(tuple(entry["data_offsets"]) for entry in entries.values())


def _file_digest(path: Path) -> str:
    try:
        return _hex(path.read_bytes())
    except FileNotFoundError:
        return "nothing"


def _hex(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]

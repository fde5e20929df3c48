"""What a forward pass is told besides the weights.

A pass is packed: rows of many requests, one segment each, one after another.

    rows          | a  a  a  a | b | c  c |          prompt chunk, decode, two rows to verify
    row_starts      0            4   5      7
    ends            132          58  901             positions the last row of each sees, itself included

The last rows of a segment may be nodes of a draft tree. They lie in the KV one after another, in a
slot each, but stand in the text at the depth of their node, and see of the tree only what is above
them:

    slot          | 0 .. root | t | t+1 | t+2 | t+3          t: `tree_start`, the slot after the root
    tree                        a  ┬ b     ┬ d
                                   └ c ────┘                 d is a child of c, b and c of a
    mask                        0001 0011  0101  1101        bit i: the row sees slot t + i
    position        0 .. root   t    t+1   t+1   t+2         root + depth, and depth = bits of the mask

Parents come before their children, so the k-th bit of a mask from below is the ancestor at depth k:
a mask says all there is to know of a node's place.

Letters: T rows of the pass, D head width, B segments.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paceline.runtime.kv.pool import BlockTable, KvPool
from paceline.runtime.layers.cpu_kernels import Pass
from paceline.runtime.layers.cpu_pass import Form, SmallPasses
from paceline.runtime.layers.rope import RopeTable
from paceline.runtime.layers.sight import Sight, tell

MOST_NODES = 64
"""Rows that a tree may have in the KV: bits of a word (`config.MOST_TREE_ROWS`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive tokens of one request, the last of them at position `end` - 1."""

    num_rows: int
    end: int
    table: BlockTable
    sinks: int = 0
    window: int = 0
    """A row sees the `sinks` first positions and the `window` latest ones; window 0: all."""
    masks: Sequence[int] = ()
    """Of the last rows, if they are nodes of a tree: which slots of it each sees, itself included."""
    tree_start: int = 0
    """The slot of the tree's first node, which bit 0 of a mask stands for."""

    @property
    def start(self) -> int:
        """The slot of the first row."""
        return self.end - self.num_rows

    @property
    def sees_all(self) -> bool:
        """Whether every row sees all positions up to its own, or as many as its layer lets it."""
        return not (self.masks or self.window or self.sinks)

    @property
    def leaves_sinks(self) -> bool:
        """Whether some row's window has left the sinks behind."""
        return self.window > 0 and self.end > self.sinks + self.window

    @property
    def sink_limit(self) -> int:
        """Rows look at sinks as if they stood no further than here."""
        return self.sinks + self.window - 1 if self.window else self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A packed pass. Prompt chunk, decode, verification and calibration are all this, with other
    rows."""

    token_ids: Tensor  # [T] int64
    positions: Sequence[int]
    """`T` of them: in the text, so those of a tree repeat. Empty for rows that are being recorded."""
    segments: Sequence[Segment]
    pool: KvPool
    scale: float
    """Of the scores."""
    sight: Sight | None = None
    """What attention goes by where it is not compiled here."""
    play: Play | None = None
    """What plays the pass at once, where a device's launches would take longer than its work."""
    native: Pass | None = None
    """What the compiled kernels go by, where those run."""
    small: SmallPasses | None = None
    """What computes all layers in one call, for small models."""
    written: Callable[[int], None] | None = None
    """Told of each layer, by its number in the model, once its keys and values are in the pool."""
    _alive: list[object] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[0]


Play = Callable[[Form, Callable[[Rows], Tensor], Rows], Tensor]
"""What the function makes of the rows, `[T, E]`, recorded before; the form names it (`models/graphs.py`)."""


def pack(
    token_ids_T: Tensor,
    segments: Sequence[Segment],
    *,
    pool: KvPool,
    rope: RopeTable,
    scale: float,
    native: bool,
    pages: bool = False,
    small: SmallPasses | None = None,
    play: Play | None = None,
    written: Callable[[int], None] | None = None,
) -> Rows:
    """Rows for a pass over `segments`, whose tokens are `token_ids_T`, `[T]` on the device. With
    `pages`, attention is a library's that reads them, where it can."""
    positions: list[int] = []
    starts = array("i", (0,))
    for segment in segments:
        assert 0 < segment.num_rows <= segment.end <= len(segment.table) * pool.block_size, (
            f"expected rows within the blocks, found {segment.num_rows} rows up to {segment.end} in "
            f"{len(segment.table)} blocks"
        )
        if segment.masks:
            _check_tree(segment)
            positions += _positions_in_text(segment)
        else:
            positions.extend(range(segment.start, segment.end))
        starts.append(len(positions))
    assert len(positions) == token_ids_T.shape[0], (
        f"expected {len(positions)} tokens, found {token_ids_T.shape[0]}"
    )
    sight = None
    if not native and play is None:
        words, given = tell(segments, positions, block_size=pool.block_size, pages=pages)
        words_W = torch.tensor(words).to(token_ids_T.device)
        sight = Sight(words_W, given, rope=rope, block_size=pool.block_size)
    rows = Rows(
        token_ids=token_ids_T,
        positions=positions,
        segments=segments,
        pool=pool,
        scale=scale,
        sight=sight,
        play=play,
        native=Pass() if native else None,
        small=small if native and small and len(positions) <= small.most_rows else None,
        written=written,
    )
    if rows.native is not None:
        _fill(rows.native, rows, starts, rope)
    return rows


def _check_tree(segment: Segment) -> None:
    """Masks must be those of rows that lie behind the tree's root, parents before children."""
    first = segment.end - len(segment.masks) - segment.tree_start
    assert 0 <= first <= first + segment.num_rows - len(segment.masks), (
        f"expected {len(segment.masks)} tree rows behind slot {segment.tree_start}, found rows "
        f"{segment.start} to {segment.end}"
    )
    assert segment.sinks <= segment.tree_start, (
        f"a slot among {segment.sinks} sinks is its position, found a tree from {segment.tree_start}"
    )
    end = first + len(segment.masks)
    assert end <= MOST_NODES, f"expected trees of at most {MOST_NODES} rows, found {end}"
    for row, mask in enumerate(segment.masks, first):
        assert mask.bit_length() == row + 1, (
            f"tree row {row} sees itself, and nothing after it; its mask is {mask:#b}"
        )


def _positions_in_text(segment: Segment) -> list[int]:
    root = segment.tree_start - 1
    chain = range(segment.start, segment.end - len(segment.masks))
    return [*chain, *(root + mask.bit_count() for mask in segment.masks)]


def _fill(native: Pass, rows: Rows, starts: array[int], rope: RopeTable) -> None:
    segments, pool = rows.segments, rows.pool
    ends = array("i", [segment.end for segment in segments])
    sinks = array("i", [segment.sinks for segment in segments])
    windows = array("i", [segment.window for segment in segments])
    tables = array("Q", [segment.table.address() for segment in segments])
    rows._alive.extend((starts, ends, sinks, windows, tables))
    native.num_rows, native.num_segments = rows.num_rows, len(segments)
    native.block_size, native.head_dim = pool.block_size, pool.head_dim
    native.row_starts, native.ends = _address(starts), _address(ends)
    native.sinks, native.windows = _address(sinks), _address(windows)
    native.tables = _address(tables)
    if any(segment.masks for segment in segments):
        _fill_trees(native, rows)
    _fill_rotations(native, rows, rope)


def _fill_rotations(native: Pass, rows: Rows, rope: RopeTable) -> None:
    segments = rows.segments
    positions_T = torch.tensor(rows.positions, dtype=torch.int64)
    rotation = rope.rotation(positions_T, largest=max(segment.end for segment in segments))
    rows._alive.append(rotation)
    native.cos, native.sin = rotation.cos.data_ptr(), rotation.sin.data_ptr()
    if any(segment.leaves_sinks for segment in segments):
        counts = torch.tensor([segment.num_rows for segment in segments])
        limits = torch.tensor([segment.sink_limit for segment in segments], dtype=torch.int64)
        limit_T = limits.repeat_interleave(counts)
        furthest = max(min(segment.end, segment.sink_limit + 1) for segment in segments)
        at_sinks = rope.rotation(torch.minimum(positions_T, limit_T), largest=furthest)
        rows._alive.append(at_sinks)
        native.sink_cos, native.sink_sin = at_sinks.cos.data_ptr(), at_sinks.sin.data_ptr()


def _fill_trees(native: Pass, rows: Rows) -> None:
    masks = array("Q")
    for segment in rows.segments:
        masks.extend([0] * (segment.num_rows - len(segment.masks)))
        masks.extend(segment.masks)
    tree_starts = array("i", [segment.tree_start for segment in rows.segments])
    rows._alive.extend((masks, tree_starts))
    native.masks, native.tree_starts = _address(masks), _address(tree_starts)


def _address(values: array[int]) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.buffer_info()[0])

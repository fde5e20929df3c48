"""Rows of draft trees, in both forms of attention: each sees what it would see as the end of its own
path.

The reference is the same attention without trees, which test_attention.py holds against an
emulation: a node's path is fed as a plain text, behind the same prefix.

    tree    a ┬ b          the text of d:  prefix, a, c, d
              └ c ─ d

Letters: T rows of a pass, S tokens of a text, U attention units, G query heads per unit, D head
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cpu.test_attention import architecture
from tests.paged import Place, ScatteredBlocks, read_kv
from torch import Tensor

from paceline.runtime.inputs import MOST_NODES, Segment, pack
from paceline.runtime.kv.compact import KeptPath, compact
from paceline.runtime.kv.pool import KvPool
from paceline.runtime.layers.attention import attend
from paceline.runtime.layers.rope import RopeTable
from paceline.runtime.spec.tree import ROOT, DraftTree

torch.set_num_threads(1)

CPU = torch.device("cpu")
UNITS, DIM = 2, 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """A text of `length` tokens, the last `fed` of them in the pass of the tree."""

    parents: tuple[int, ...]
    length: int
    fed: int = 1
    queries: int = 2
    sinks: int = 0
    window: int = 0
    layer_window: int | None = None
    block_size: int = 16
    dtype: torch.dtype = torch.float32

    @property
    def tree(self) -> DraftTree:
        return DraftTree(tuple(range(len(self.parents))), self.parents)

    def heads(self, count: int, *, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        heads = torch.randn(count, UNITS, self.queries + 2, DIM, generator=generator)
        heads[:, :, : self.queries + 1] *= 2.0  # sharp enough that every key matters
        return heads.to(self.dtype)


class Passes:
    """One request's passes over a pool of its own, among blocks that hold anything."""

    def __init__(self, case: Case, *, native: bool) -> None:
        self.case = case
        self._native = native
        num_blocks = (case.length + MOST_NODES) // case.block_size + 2
        self.pool = KvPool(
            [UNITS],
            head_dim=DIM,
            num_blocks=num_blocks,
            block_size=case.block_size,
            dtype=case.dtype,
            device=CPU,
        )
        self.pool.groups[0].fill_(math.nan if native else 1e4)
        self._rope = RopeTable(architecture(DIM), max_len=256, device=CPU)
        self.place = Place(
            ScatteredBlocks(num_blocks, seed=3),
            block_size=case.block_size,
            sinks=case.sinks,
            window=case.window,
        )

    def feed(
        self, heads: Tensor, *, start: int, masks: Sequence[int] = (), tree_start: int = 0
    ) -> Tensor:
        """`[T, U, G, D]` float64."""
        plain = self.place.segment(start=start, num_rows=len(heads))
        segment = Segment(
            num_rows=plain.num_rows,
            end=plain.end,
            table=plain.table,
            sinks=plain.sinks,
            window=plain.window,
            masks=masks,
            tree_start=tree_start,
        )
        rows = pack(
            torch.zeros(len(heads), dtype=torch.int64),
            [segment],
            pool=self.pool,
            rope=self._rope,
            scale=DIM**-0.5,
            native=self._native,
        )
        found = attend(
            heads,
            rows=rows,
            group=0,
            units=range(UNITS),
            window=self.case.layer_window,
            dtype=self.case.dtype,
        )
        return found.view(len(heads), UNITS, self.case.queries, DIM).double()


def expected(case: Case, text: Tensor, nodes: Tensor, *, native: bool) -> Tensor:
    """Of each node: the last row of its path, fed as a text. Before them the rows of the text, which
    see no node."""
    rows = [*Passes(case, native=native).feed(text, start=0)]
    for node in range(len(case.parents)):
        passes = Passes(case, native=native)
        path = list(case.tree.path(node))
        rows.append(passes.feed(torch.cat((text, nodes[path])), start=0)[-1])
    return torch.stack(rows)


def check(case: Case, *, native: bool, levels: bool = False) -> None:
    """The tree in one pass with the end of its text, or level by level behind it."""
    tree = case.tree
    text, nodes = case.heads(case.length, seed=1), case.heads(tree.num_nodes, seed=2)
    passes = Passes(case, native=native)
    before = case.length - case.fed
    if before:
        passes.feed(text[:before], start=0)
    if levels:
        pieces = [passes.feed(text[before:], start=before)]
        first = 0
        while first < tree.num_nodes:  # as many as have all they see before them
            end = first + 1
            while end < tree.num_nodes and tree.parents[end] < first:
                end += 1
            pieces.append(
                passes.feed(
                    nodes[first:end],
                    start=case.length + first,
                    masks=tree.ancestor_mask[first:end],
                    tree_start=case.length,
                )
            )
            first = end
        found = torch.cat(pieces)
    else:
        found = passes.feed(
            torch.cat((text[before:], nodes)),
            start=before,
            masks=tree.ancestor_mask,
            tree_start=case.length,
        )
    difference = (found - expected(case, text, nodes, native=native)[before:]).abs()
    assert difference.max() < (0.1 if case.dtype == torch.bfloat16 else 2e-4)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_nodes = draw(st.integers(1, 12) | st.sampled_from([20, 40]))
    length = draw(st.integers(1, 50))
    sinks = draw(st.integers(0, min(4, length)))
    return Case(
        parents=tuple(draw(st.integers(ROOT, node - 1)) for node in range(num_nodes)),
        length=length,
        fed=draw(st.integers(1, length)),
        queries=draw(st.integers(1, 4)),
        sinks=sinks,
        window=draw(st.integers(1, 40)) if sinks else 0,
        layer_window=draw(st.sampled_from([None, None, 1, 3, 16])),
        block_size=draw(st.sampled_from([16, 32])),
    )


@settings(max_examples=15)
@given(case=cases(), levels=st.booleans())
def test_every_node_sees_its_own_path(native: bool, case: Case, levels: bool) -> None:
    check(case, native=native, levels=levels)


@pytest.mark.parametrize("length", [1, 16, 31])
def test_a_tree_may_have_as_many_nodes_as_a_word_has_bits(native: bool, length: int) -> None:
    parents = tuple((node - 1) // 2 for node in range(MOST_NODES))
    check(Case(parents=(ROOT, *parents[1:]), length=length), native=native)
    check(Case(parents=tuple(range(-1, MOST_NODES - 1)), length=length, queries=1), native=native)


def test_bfloat16_trees_stay_within_their_rounding(native: bool) -> None:
    parents = (ROOT, ROOT, 0, 0, 1, 2, 5, 6, 6)
    check(Case(parents=parents, length=37, fed=3, dtype=torch.bfloat16), native=native)


@pytest.mark.parametrize(
    ("masks", "tree_start", "wrong"),
    [
        ((0b1, 0b01), 20, "tree row 1 sees itself"),
        ((0b1, 0b100), 20, "tree row 1 sees itself"),
        ((0b1, 0b11), 21, "expected 2 tree rows behind slot 21"),
    ],
)
def test_masks_that_are_no_tree_s_are_refused(
    masks: tuple[int, ...], tree_start: int, wrong: str
) -> None:
    passes = Passes(Case(parents=(), length=20), native=False)
    heads = passes.case.heads(22, seed=0)
    with pytest.raises(AssertionError, match=wrong):
        passes.feed(heads, start=0, masks=masks, tree_start=tree_start)


# ------------------------------------------------------------------------------------------- compaction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 14, 30])
def test_a_kept_path_lies_as_if_it_had_been_fed_as_text(
    native: bool, dtype: torch.dtype, length: int
) -> None:
    parents = (ROOT, ROOT, ROOT, 1, 1, 3, 4, 4, 7, 8)
    case = Case(parents=parents, length=length, dtype=dtype)
    text, nodes = case.heads(length, seed=1), case.heads(len(parents), seed=2)
    passes, plain = Passes(case, native=native), Passes(case, native=native)
    passes.feed(torch.cat((text, nodes)), start=0, masks=case.tree.ancestor_mask, tree_start=length)
    path = case.tree.path(9)
    assert path == (1, 4, 7, 8, 9)
    kept = KeptPath(table=passes.place.table, tree_start=length, rows=path)
    compact(passes.pool, [kept], native=native)
    plain.feed(torch.cat((text, nodes[list(path)])), start=0)
    num_rows = length + len(path)
    found, wanted = (
        read_kv(each.pool, 0, each.place.table, num_rows=num_rows) for each in (passes, plain)
    )
    assert torch.equal(found, wanted)


def test_paths_of_several_requests_are_kept_at_once_and_others_are_left_alone(native: bool) -> None:
    pool = KvPool([1, 2], head_dim=4, num_blocks=9, block_size=16, dtype=torch.float32, device=CPU)
    for group in pool.groups:
        group.copy_(torch.randn(group.shape, generator=torch.Generator().manual_seed(0)))
    blocks = ScatteredBlocks(9)
    tables = [Place(blocks).segment(start=0, num_rows=40).table for _ in range(3)]
    before = [[read_kv(pool, g, table, num_rows=40) for g in (0, 1)] for table in tables]
    rows = [(0, 2, 5), (1, 3), (0, 1, 2)]
    paths = [
        KeptPath(table=table, tree_start=13 + i, rows=each)
        for i, (table, each) in enumerate(zip(tables, rows, strict=True))
    ]
    compact(pool, paths, native=native)
    for i, (table, each) in enumerate(zip(tables, rows, strict=True)):
        for g in (0, 1):
            expected_rows = before[i][g].clone()
            for place, row in enumerate(each):
                expected_rows[:, :, 13 + i + place] = before[i][g][:, :, 13 + i + row]
            assert torch.equal(read_kv(pool, g, table, num_rows=40), expected_rows)

"""How drafts grow into trees: against slow definitions of the same trees, and against the target's law.

The toy models of test_lossless_rules.py look one token back, so that what comes below a node is known
by its token, and the whole tree of all texts can be written down.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cpu.test_lossless_rules import (
    Round,
    Toy,
    assert_caught,
    assert_exact,
    draw_heap,
    emitted,
    make_toy,
    measure_text,
    rows,
)

from paceline.runtime.sampling.sampler import Purpose, RoundUniforms, Uniforms, draw
from paceline.runtime.spec.growth import Children, Drawn, Grown, Growth, Ranked
from paceline.runtime.spec.tree import ROOT, DraftTree
from paceline.runtime.spec.verify import verify_sampled
from paceline.runtime.types import DraftShape, TreeKind

torch.set_num_threads(1)

Path = tuple[int, ...]
KINDS: tuple[TreeKind, ...] = ("beam", "dynamic", "dynamic_threshold")


def raise_tree(growth: Growth, below: Callable[[int], Children]) -> tuple[Grown, list[list[int]]]:
    """Grow to the end; `below` is what stands in for the drafter. The tree, and each pass's nodes."""
    passes = []
    growth.put(ROOT, below(ROOT))
    while nodes := growth.grow():
        passes.append(nodes)
        for node in nodes:
            growth.put(node, below(node))
    return growth.finish(), passes


def raise_ranked(
    toy: Toy, *, depth: int, shape: DraftShape | None
) -> tuple[Grown, list[list[int]]]:
    growth = Growth(depth=depth, shape=shape, drawn=False)

    def below(node: int) -> Children:
        law = toy.draft[(0, *growth.path(node))[-1]]
        best = law.topk(min(growth.width, len(law)))
        return Ranked(best.indices.tolist(), best.values.tolist(), reached=growth.reached(node))

    return raise_tree(growth, below)


def raise_drawn(
    toy: Toy, last: int, uniforms: Uniforms, *, depth: int, shape: DraftShape | None
) -> tuple[Grown, list[list[int]]]:
    growth = Growth(depth=depth, shape=shape, drawn=True)

    def below(node: int) -> Children:
        path = growth.path(node)

        def choose(left: torch.Tensor, lane: int) -> int:
            return draw(left, uniforms(1 + len(path), purpose=Purpose.DRAFT, lane=lane))

        law = toy.draft[(last, *path)[-1]]
        return Drawn(law, reached=growth.reached(node), most=growth.width, draw=choose)

    return raise_tree(growth, below)


# ------------------------------------------------------------------------------------- slow definitions


def every_path(toy: Toy, *, depth: int, width: int) -> Iterator[tuple[Path, float]]:
    """All nodes down to a depth, `width` of the likeliest below each, and their chances."""

    def down(last: int, length: int) -> Iterator[tuple[Path, float]]:
        if length == 0:
            return
        best = toy.draft[last].topk(width)
        for token_id, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            yield (token_id,), chance
            for path, rest in down(token_id, length - 1):
                yield (token_id, *path), chance * rest

    return down(0, depth)


def likeliest(found: dict[Path, float], count: int) -> set[Path]:
    return set(sorted(found, key=lambda path: -found[path])[:count])


def paths(tree: DraftTree) -> set[Path]:
    return {tree.tokens(node) for node in range(tree.num_nodes)}


def beam_of(toy: Toy, *, depth: int, width: int, nodes: int) -> set[Path]:
    chances = dict(every_path(toy, depth=depth, width=width))
    kept: dict[Path, float] = {}
    level: set[Path] = {()}
    for length in range(1, depth + 1):
        below = {p: c for p, c in chances.items() if len(p) == length and p[:-1] in level}
        level = likeliest(below, width)
        kept |= {path: chances[path] for path in level}
    return likeliest(kept, nodes)


shapes = st.tuples(st.integers(0, 99), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40))


@given(shapes)
def test_a_beam_is_the_best_of_each_level_and_of_these_the_best(given_: tuple[int, ...]) -> None:
    seed, depth, width, nodes = given_
    toy = make_toy(5, seed=seed)
    shape = DraftShape(kind="beam", width=width, nodes=nodes)
    grown, passes = raise_ranked(toy, depth=depth, shape=shape)
    assert paths(grown.tree) == beam_of(toy, depth=depth, width=width, nodes=nodes)
    assert len(passes) == depth - 1


@given(shapes)
def test_a_threshold_tree_is_all_that_promises_enough(given_: tuple[int, ...]) -> None:
    seed, depth, width, nodes = given_
    toy = make_toy(5, seed=seed)
    shape = DraftShape(kind="dynamic_threshold", width=width, nodes=nodes)
    grown, passes = raise_ranked(toy, depth=depth, shape=shape)
    chances = dict(every_path(toy, depth=depth, width=width))
    enough = {path for path, chance in chances.items() if chance > 1 / nodes}
    assert paths(grown.tree) <= enough
    assert paths(grown.tree) == enough or grown.tree.num_nodes == nodes
    assert len(passes) <= depth - 1


@given(shapes)
def test_a_dynamic_tree_is_the_likeliest_of_all_nodes(given_: tuple[int, ...]) -> None:
    seed, depth, width, nodes = given_
    toy = make_toy(5, seed=seed)
    shape = DraftShape(kind="dynamic", width=width, nodes=nodes)
    grown, passes = raise_ranked(toy, depth=depth, shape=shape)
    chances = dict(every_path(toy, depth=depth, width=width))
    best = likeliest(chances, nodes)
    num_read = sum(map(len, passes))
    found = sum(chances[path] for path in paths(grown.tree))
    wanted = sum(chances[path] for path in best)
    # what it may read sets bounds; within them it misses nothing
    assert paths(grown.tree) == best or num_read == shape.num_slots(depth)
    assert found >= 0.9 * wanted
    assert len(passes) <= 2 * depth


@given(st.integers(0, 99), st.integers(1, 9))
def test_without_a_shape_the_best_token_follows_the_best(seed: int, depth: int) -> None:
    toy = make_toy(5, seed=seed)
    grown, passes = raise_ranked(toy, depth=depth, shape=None)
    last, expected = 0, []
    for _ in range(depth):
        last = int(toy.draft[last].argmax())
        expected.append(last)
    assert grown.tree == DraftTree.chain(expected)
    assert grown.rows == (*range(depth - 1), -1)
    assert all(len(nodes) == 1 for nodes in passes)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(shapes)
def test_rows_are_counted_in_the_order_of_reading(
    kind: TreeKind, drawn: bool, given_: tuple[int, ...]
) -> None:
    seed, depth, width, nodes = given_
    if drawn and kind == "beam":
        return
    toy = make_toy(5, seed=seed)
    shape = DraftShape(kind=kind, width=width, nodes=nodes)
    grown, passes = (
        raise_drawn(toy, 0, RoundUniforms(seed, 1), depth=depth, shape=shape)
        if drawn
        else raise_ranked(toy, depth=depth, shape=shape)
    )
    tree, num_read = grown.tree, sum(map(len, passes))
    assert (kind != "dynamic_threshold") <= tree.num_nodes <= nodes
    assert max(tree.depths, default=0) <= depth
    assert num_read <= shape.num_slots(depth)
    read = [row for row in grown.rows if row >= 0]
    assert len(set(read)) == len(read)
    assert all(row < num_read for row in read)
    for node, parent in enumerate(tree.parents):
        assert len(tree.children(node)) <= width
        assert grown.rows[node] < 0 or tree.depths[node] < depth
        if parent != ROOT:
            assert grown.rows[parent] >= 0, "its children are known only once it has been read"
            assert grown.rows[node] < 0 or grown.rows[parent] < grown.rows[node]


# -------------------------------------------------------------------------------------------- drawn trees


def test_a_drawn_dynamic_tree_is_that_of_the_plain_heap() -> None:
    """Number by number: reading ahead changes nothing."""
    toy = make_toy(5)
    for seed in range(200):
        uniforms = RoundUniforms(seed, 1)
        shape = DraftShape(kind="dynamic", width=5, nodes=8)
        grown, passes = raise_drawn(toy, 0, uniforms, depth=9, shape=shape)
        assert grown.tree == draw_heap(toy, 0, uniforms, num_nodes=8)
        assert len(passes) < 8


def sampled_tree(kind: TreeKind, *, depth: int, width: int, nodes: int) -> Round:
    shape = DraftShape(kind=kind, width=width, nodes=nodes)

    def one_round(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
        tree = raise_drawn(toy, last, uniforms, depth=depth, shape=shape)[0].tree
        probs, draft_probs = rows(toy.target, last, tree), rows(toy.draft, last, tree)
        verdict = verify_sampled(tree, probs, draft_probs, uniforms=uniforms)
        return emitted(tree, verdict.path, verdict.token_id)

    return one_round


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_threshold"])
def test_drawn_trees_write_the_target_s_texts(kind: TreeKind) -> None:
    assert_exact(measure_text(sampled_tree(kind, depth=3, width=3, nodes=6), num_texts=2_500))


def test_dropping_drawn_nodes_that_promise_least_is_caught() -> None:
    """What the ranked trees may do: a draw must not decide whether it counts."""

    def one_round(toy: Toy, last: int, uniforms: Uniforms) -> list[int]:
        shape = DraftShape(kind="dynamic", width=3, nodes=6)
        whole = raise_drawn(toy, last, uniforms, depth=3, shape=shape)[0].tree
        chances = {ROOT: 1.0}
        for node, parent in enumerate(whole.parents):
            before = last if parent == ROOT else whole.token_ids[parent]
            chances[node] = chances[parent] * float(toy.draft[before, whole.token_ids[node]])
        best = sorted(range(6), key=lambda node: -chances[node])
        kept = sorted(best[:3])
        place = {ROOT: ROOT} | {node: i for i, node in enumerate(kept)}
        tree = DraftTree(
            tuple(whole.token_ids[node] for node in kept),
            tuple(place[whole.parents[node]] for node in kept),
        )
        probs, draft_probs = rows(toy.target, last, tree), rows(toy.draft, last, tree)
        verdict = verify_sampled(tree, probs, draft_probs, uniforms=uniforms)
        return emitted(tree, verdict.path, verdict.token_id)

    assert_caught(measure_text(one_round, num_texts=1_200))


def test_children_are_drawn_without_replacement_until_none_is_left() -> None:
    law = torch.tensor([0.5, 0.0, 0.3, 0.2])
    children = Drawn(law, reached=0.8, most=9, draw=lambda left, _: int(left.argmax()))
    found, left = [], 0.8
    for chance in (0.5, 0.6, 1.0):
        assert children.value() == pytest.approx(left)
        found.append(children.take(0))
        assert found[-1][1] == pytest.approx(left * chance)
        left *= 1 - chance
    assert [token_id for token_id, _ in found] == [0, 2, 3]
    assert children.value() is None
    assert law.tolist() == pytest.approx([0.5, 0.0, 0.3, 0.2]), "verification needs it"


def test_a_slot_s_value_does_not_depend_on_what_is_drawn_there() -> None:
    """The values on the way to a slot are settled by the draws before it alone."""
    toy = make_toy(5)
    for token_id in range(5):
        children = Drawn(toy.draft[0], reached=1.0, most=5, draw=lambda _, __, t=token_id: t)  # type: ignore[misc]
        assert children.value() == 1.0
        children.take(0)
        assert children.value() == pytest.approx(1.0 - float(toy.draft[0, token_id]))


def test_values_of_nodes_never_exceed_their_parents() -> None:
    """So the likeliest nodes of a tree are a tree."""
    toy = make_toy(5)
    chances = dict(every_path(toy, depth=4, width=3))
    assert all(chances[path] <= chances[path[:-1]] for path in chances if len(path) > 1)
    for count, kind in itertools.product((1, 3, 17), KINDS):
        shape = DraftShape(kind=kind, width=3, nodes=count)
        tree = raise_ranked(toy, depth=4, shape=shape)[0].tree
        assert paths(tree) >= {path[:-1] for path in paths(tree) if len(path) > 1}

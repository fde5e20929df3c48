"""The draft tree agrees with the slow definition of each of its properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.runtime.spec.tree import ROOT, DraftTree


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    num_nodes = draw(st.integers(0, 12))
    parents = tuple(draw(st.integers(ROOT, node - 1)) for node in range(num_nodes))
    token_ids = draw(st.permutations(range(num_nodes)))
    return DraftTree(tuple(token_ids), parents)


def climb(tree: DraftTree, node: int) -> list[int]:
    """The node and all above it, bottom up."""
    nodes = []
    while node != ROOT:
        nodes.append(node)
        node = tree.parents[node]
    return nodes


@given(trees())
def test_path_leads_from_the_root_to_the_node(tree: DraftTree) -> None:
    assert tree.path(ROOT) == ()
    for node in range(tree.num_nodes):
        assert list(tree.path(node)) == climb(tree, node)[::-1]


@given(trees())
def test_depth_is_the_length_of_the_path(tree: DraftTree) -> None:
    assert list(tree.depths) == [len(climb(tree, node)) for node in range(tree.num_nodes)]


@given(trees())
def test_ancestor_mask_has_the_bits_of_the_path(tree: DraftTree) -> None:
    for node, mask in enumerate(tree.ancestor_mask):
        assert [i for i in range(tree.num_nodes) if mask >> i & 1] == sorted(climb(tree, node))
    assert len(tree.ancestor_mask) == tree.num_nodes


@given(trees())
def test_children_are_listed_in_drawing_order_and_each_once(tree: DraftTree) -> None:
    listed: list[int] = []
    for node in range(ROOT, tree.num_nodes):
        children = tree.children(node)
        assert list(children) == sorted(children)
        assert all(tree.parents[child] == node for child in children)
        listed += children
    assert sorted(listed) == list(range(tree.num_nodes))


@given(trees())
def test_chain_is_a_tree_in_which_nobody_has_two_children(tree: DraftTree) -> None:
    assert tree.is_chain == all(len(tree.children(i)) <= 1 for i in range(ROOT, tree.num_nodes))


def test_chain_grows_downwards() -> None:
    tree = DraftTree.chain([7, 8, 7])
    assert tree == DraftTree(token_ids=(7, 8, 7), parents=(-1, 0, 1))
    assert tree.is_chain
    assert tree.depths == (1, 2, 3)
    assert tree.ancestor_mask == (0b001, 0b011, 0b111)


def test_drawing_in_the_module_s_docstring_is_right() -> None:
    tree = DraftTree((10, 11, 12, 13, 14), (-1, -1, 0, 0, 2))
    assert tree.depths == (1, 1, 2, 2, 3)
    assert tree.ancestor_mask == (0b00001, 0b00010, 0b00101, 0b01001, 0b10101)
    assert not tree.is_chain


def test_empty_tree_is_a_chain_of_nothing() -> None:
    tree = DraftTree.chain([])
    assert tree.num_nodes == 0
    assert tree.is_chain
    assert tree.children(ROOT) == ()
    assert tree.depths == tree.ancestor_mask == ()


def test_same_token_may_stand_under_different_parents() -> None:
    assert DraftTree((5, 6, 7, 7), (-1, -1, 0, 1)).num_nodes == 4


@pytest.mark.parametrize(
    ("token_ids", "parents", "message"),
    [
        ((1, 2), (-1,), "one parent per token, found 2 tokens and 1 parents"),
        ((1, 2), (1, -1), "node 0: its parent comes before it, found 1"),
        ((1,), (0,), "node 0: its parent comes before it, found 0"),
        ((1,), (-2,), "node 0: its parent comes before it, found -2"),
        ((-1,), (-1,), "node 0: a token id is not negative, found -1"),
        ((4, 4), (-1, -1), "siblings are drawn without replacement, found token 4 twice"),
    ],
)
def test_impossible_tree_is_refused(
    token_ids: tuple[int, ...], parents: tuple[int, ...], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        DraftTree(token_ids, parents)


def test_node_beyond_the_tree_is_refused() -> None:
    tree = DraftTree.chain([1])
    with pytest.raises(AssertionError, match="a node below 1, found 1"):
        tree.children(1)
    with pytest.raises(AssertionError, match="a node below 1, found -2"):
        tree.path(-2)

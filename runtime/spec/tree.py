"""The draft of one round: a tree of token ids below the last committed token.

       root (-1)          token_ids      (t0, t1, t2, t3, t4)
       /      \\           parents        (-1, -1,  0,  0,  2)
     t0        t1         depths         ( 1,  1,  2,  2,  3)
    /  \\                  ancestor_mask  (0b00001, 0b00010, 0b00101, 0b01001, 0b10101)
  t2    t3
  |
  t4

A node's index is its row in the verifying pass minus one: row 0 is the root, row 1 + i is node i.
Its position in the text is that of the root plus its depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

ROOT = -1
"""Index of the last committed token, from which the tree grows. It is not a node."""


@dataclass(frozen=True)
class DraftTree:
    """Immutable. A chain is a tree with one child everywhere; no nodes at all is plain decoding."""

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    """Index of each node's parent: ROOT, or a node before it."""

    def __post_init__(self) -> None:
        num_parents = len(self.parents)
        assert self.num_nodes == num_parents, (
            f"one parent per token, found {self.num_nodes} tokens and {num_parents} parents"
        )
        drawn = set()
        for node, (token_id, parent) in enumerate(zip(self.token_ids, self.parents, strict=True)):
            assert token_id >= 0, f"node {node}: a token id is not negative, found {token_id}"
            assert ROOT <= parent < node, f"node {node}: its parent comes before it, found {parent}"
            assert (parent, token_id) not in drawn, (
                f"node {node}: siblings are drawn without replacement, found token {token_id} twice"
            )
            drawn.add((parent, token_id))

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> DraftTree:
        """One token after another."""
        return cls(tuple(token_ids), tuple(range(ROOT, len(token_ids) - 1)))

    @property
    def num_nodes(self) -> int:
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(ROOT, self.num_nodes - 1))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node: the root's children are at 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def ancestor_mask(self) -> tuple[int, ...]:
        """One bitmask per node: bit i is set if node i is the node itself or above it."""
        masks: list[int] = []
        for node, parent in enumerate(self.parents):
            masks.append(1 << node | (0 if parent == ROOT else masks[parent]))
        return tuple(masks)

    @cached_property
    def _children(self) -> tuple[tuple[int, ...], ...]:
        children: list[list[int]] = [[] for _ in range(1 + self.num_nodes)]
        for node, parent in enumerate(self.parents):
            children[1 + parent].append(node)
        return tuple(map(tuple, children))

    def children(self, node: int) -> tuple[int, ...]:
        """The children of a node, or of ROOT, in the order they were drawn."""
        assert ROOT <= node < self.num_nodes, f"a node below {self.num_nodes}, found {node}"
        return self._children[1 + node]

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from the root's child down to `node`; empty for ROOT."""
        assert ROOT <= node < self.num_nodes, f"a node below {self.num_nodes}, found {node}"
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))

    def tokens(self, node: int) -> tuple[int, ...]:
        """The tokens down to a node, its own the last."""
        return tuple(self.token_ids[each] for each in self.path(node))

    def walk(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The nodes that these tokens lead down to from the root, as far as there are such."""
        nodes: list[int] = []
        node = ROOT
        for token_id in token_ids:
            for child in self.children(node):
                if self.token_ids[child] == token_id:
                    node = child
                    nodes.append(child)
                    break
            else:
                break
        return tuple(nodes)

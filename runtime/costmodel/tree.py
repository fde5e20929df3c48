"""What a drafter has drafted of one text, and which part of it the target will agree with.

A node is known by the ranks on its way from the root: `(0, 2)` is the third likeliest child of the likeliest one. The
drafter *forwards* nodes, and the children of a forwarded node are drafts, likeliest first; a chain is the tree whose
nodes have one child. Of every node on its way the target's own choice is one of the children, or none of them:

    the j-th child, if it is none before it, with the chance   a / j

`a` being the acceptance of a chain. Assumed; where the first child is right in 60 % of cases, one of five is in 83 %
(Medusa, arXiv 2401.10774, counts about 60 and over 80 % with its heads). Chances do not depend on the text so far: real
trees, which grow where the drafter is unsure, keep a little more.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Collection
from functools import cache

Path = tuple[int, ...]
"""Ranks on the way from the root; the root's is empty."""
Chances = tuple[float, ...]
"""That the target's choice is a node's first, second, ... child."""

MOST_CHILDREN = 5
"""Less likely ones are not looked at."""


def child_chances(chance: float, count: int) -> Chances:
    """Of `count` children, from the acceptance of a chain."""
    found, missed = [], 1.0
    for child in range(1, count + 1):
        found.append(missed * chance / child)
        missed -= found[-1]
    return tuple(found)


class Tree:
    """One text's tree; its root is the last committed token.

    A pass of the drafter is `forward`, then `land`; one of the target `check`, then `settle`. The two may overlap in
    any way: what is cut off while it flies never lands.
    """

    def __init__(self, exact: Chances, grouped: Chances, rng: random.Random) -> None:
        """Chances where the parent was forwarded by layers in turn, and side by side."""
        self._exact, self._grouped, self._rng = exact, grouped, rng
        self._plant(behind=True)

    def _plant(self, *, behind: bool) -> None:
        """A new tree, of whose root the drafter has seen nothing. `behind`: it had drafted something else."""
        self.is_behind = behind
        self.values: dict[Path, float] = {}
        """How likely each node is on the target's way; the root is not among them."""
        self._open: list[tuple[float, Path]] = [(-1.0, ())]  # a heap: what has no children yet
        self._flying: list[Path] = []
        self._checked: Collection[Path] = ()
        self._true: Path = ()
        self._is_lost = False  # whether the target's choice after `_true` is not a child
        self._num_owed = 0  # committed tokens that the drafter's pass in flight may yet draft

    @property
    def num_forwarded(self) -> int:
        """With those in flight."""
        return 1 + len(self.values) - len(self._open)

    def forward(self, width: int) -> None:
        """Begin a pass over the likeliest nodes without children."""
        count = min(width, len(self._open))
        self._flying = [heapq.heappop(self._open)[1] for _ in range(count)]

    def land(self, *, exact: bool) -> None:
        """End it: children appear, and with them what the target will choose."""
        chances = self._exact if exact else self._grouped
        flying, self._flying = self._flying, []
        if flying:
            self.is_behind = False
        for path in flying:
            value = self.values[path] if path else 1.0
            for rank, chance in enumerate(chances):
                child = (*path, rank)
                self.values[child] = value * chance
                heapq.heappush(self._open, (-value * chance, child))
        if self._true in flying and not self._is_lost:
            self._choose(chances)

    def _choose(self, chances: Chances) -> None:
        """What the target chooses after the last node on its way."""
        at, rank = self._rng.random(), 0
        while rank < len(chances) and at >= chances[rank]:
            at -= chances[rank]
            rank += 1
        if rank < len(chances):
            self._true = (*self._true, rank)
        else:
            self._is_lost = True
        owed, self._num_owed = self._num_owed, 0
        if owed and (self._is_lost or owed > 1):  # wrong, or right but with more to read
            self._plant(behind=self._is_lost)
        elif owed:
            self._cut_to(self._true)

    def check(self, nodes: int) -> int:
        """Begin the target's pass over the likeliest nodes; how many these are."""
        self._checked = best(self.values, nodes)
        return len(self._checked)

    def settle(self) -> int:
        """End it. Nodes that are the target's own choices are committed, and one more token: its next choice. What
        was drafted beyond stays if it begins with that token. Returns the number of tokens."""
        kept = 0
        while kept < len(self._true) and self._true[: kept + 1] in self._checked:
            kept += 1
        if kept < len(self._true):
            self._cut_to(self._true[: kept + 1])
        elif self._true in self._flying and not self._is_lost:
            self._num_owed += 1
            self._cut_to(self._true)
        else:
            self._plant(behind=self._is_lost or self.is_behind)
        return kept + 1

    def _cut_to(self, root: Path) -> None:
        """Make a node the root: only what is below it stays."""
        self._checked = ()
        if not root:
            return
        depth, value = len(root), self.values[root]
        kept = {path: likely for path, likely in self.values.items() if path[:depth] == root}
        del kept[root]
        self.values = {path[depth:]: likely / value for path, likely in kept.items()}
        self._open = [(at / value, path[depth:]) for at, path in self._open if path[:depth] == root]
        heapq.heapify(self._open)
        self._flying = [path[depth:] for path in self._flying if path[:depth] == root]
        self._true = self._true[depth:]


def best(values: dict[Path, float], nodes: int) -> frozenset[Path]:
    """The likeliest nodes. Parents are among them: none is less likely than its child."""
    return frozenset(heapq.nlargest(nodes, values, key=lambda path: (values[path], -len(path))))


@cache
def round_values(
    exact: Chances, grouped: Chances, *, depth: int, width: int, nodes: int
) -> tuple[float, ...]:
    """How likely each node of a tree is to be kept that was grown by an exact pass over its root and `depth` - 1
    grouped ones over `width` nodes each, the likeliest first. A round emits 1 + their sum on average."""
    tree = Tree(exact, grouped, random.Random(0))
    for level in range(depth):
        tree.forward(1 if level == 0 else width)
        tree.land(exact=level == 0)
    return tuple(sorted((tree.values[path] for path in best(tree.values, nodes)), reverse=True))

"""One request's draft while it grows into a tree: which node comes next, and what must be read first.

A *slot* is a place where a node may be drawn: the next child of some node, and what it promises. The
best slot is opened first. What a node's children are is known only once the drafter has read it, so
growing stops there and names the nodes to read:

    grow()  ──nodes to read──>  a drafting pass  ──put(node, children)──>  grow() ...  ──none──>  finish()

    beam                levels: the best `width` slots of each, and at the end the best `nodes` of all
    dynamic_threshold   levels: all slots of each that promise more than 1 / nodes
    dynamic             no levels: the best slots anywhere
    a chain             levels of one

Two kinds of children. *Ranked* ones are chosen: the likeliest first, each with its chance, and a slot
promises the chance that this very token and all above it are kept. *Drawn* ones are drawn from the
drafter's law without replacement. Their slots are valued before the draw (a draw must not decide
whether it is made): v is the chance that a slot is reached, a child drawn with chance r passes v r on
to its own children and leaves v (1 - r) to its next sibling.

A node that was drawn must be verified: so the dynamic tree of drawn nodes grows one by one, and all
that have not been read are read whenever one must be. Of ranked ones the same tree, the likeliest
nodes of all, is found in fewer passes: each reads those nodes that are among the likeliest so far, and
what turns out not to be is dropped.

Sources: EasySpec (arXiv 2502.02493) for the levels of the beam, EAGLE-2 (arXiv 2406.16858) for keeping
the best of all levels, DySpec (arXiv 2410.11744) for drawn children in both dynamic forms.

Letters: V vocabulary.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from paceline.runtime.spec.tree import ROOT, DraftTree
from paceline.runtime.types import DraftShape


class Children(Protocol):
    """What may come below one node, in an order that is fixed before it is looked at."""

    def value(self) -> float | None:
        """What the next slot promises; None where there is no other."""

    def take(self, lane: int) -> tuple[int, float]:
        """Open that slot: the token, and what its node passes on. `lane` tells it from other nodes of
        its depth."""


class Ranked:
    """The likeliest tokens below a node that is itself kept with chance `reached`."""

    def __init__(self, token_ids: Sequence[int], chances: Sequence[float], *, reached: float):
        self._token_ids = token_ids
        self._values = [reached * chance for chance in chances]
        self._next = 0

    def value(self) -> float | None:
        return self._values[self._next] if self._next < len(self._values) else None

    def take(self, lane: int) -> tuple[int, float]:  # noqa: ARG002
        self._next += 1
        return self._token_ids[self._next - 1], self._values[self._next - 1]


class Drawn:
    """Tokens drawn from a law without replacement, `most` at most."""

    def __init__(
        self,
        probs_V: Tensor,
        *,
        reached: float,
        most: int,
        draw: Callable[[Tensor, int], int],
    ) -> None:
        """`draw(law, lane)` is a token of a law that need not be normalised."""
        self._left_V = probs_V.clone()
        self._value = reached
        self._most = most
        self._draw = draw

    def value(self) -> float | None:
        return self._value if self._most > 0 else None

    def take(self, lane: int) -> tuple[int, float]:
        mass = float(self._left_V.sum())
        token_id = self._draw(self._left_V, lane)
        chance = float(self._left_V[token_id]) / mass
        passed_on, self._value = self._value * chance, self._value * (1.0 - chance)
        self._left_V[token_id] = 0.0
        self._most -= 1
        if not self._left_V.any():
            self._most = 0
        return token_id, passed_on


@dataclass(frozen=True, slots=True, kw_only=True)
class Grown:
    """A finished draft."""

    tree: DraftTree
    rows: tuple[int, ...]
    """Which row of the drafting passes read each node, counted from the first; -1: none did."""


class Growth:
    """A tree of at most `depth` levels. Row i of its drafting passes is the i-th node named by
    `grow`."""

    def __init__(self, *, depth: int, shape: DraftShape | None, drawn: bool) -> None:
        """Without a shape, a chain. `drawn` says of which kind all children will be."""
        self.shape = shape
        self._depth = depth
        self._drawn = drawn
        # of every node, in the order in which they come
        self._token_ids: list[int] = []
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._values: list[float] = []
        self._rows: list[int] = []
        self._slots: list[tuple[float, int, int]] = []  # a heap: -value, order of coming, parent
        self._children: dict[int, Children] = {}
        self._unread: list[int] = []
        self._per_depth = Counter[int]()
        self._num_slots = self._num_read = 0

    @property
    def width(self) -> int:
        """Most children that a node can have."""
        return 1 if self.shape is None else self.shape.width

    def reached(self, node: int) -> float:
        """What a node passes on to its children."""
        return 1.0 if node == ROOT else self._values[node]

    def path(self, node: int) -> tuple[int, ...]:
        """The tokens down to a node."""
        token_ids: list[int] = []
        while node != ROOT:
            token_ids.append(self._token_ids[node])
            node = self._parents[node]
        return tuple(reversed(token_ids))

    def to_read(self, node: int) -> tuple[int, int]:
        """Of a node that `grow` named: its token, and the row of its parent; ROOT for that of the
        root."""
        parent = self._parents[node]
        return self._token_ids[node], ROOT if parent == ROOT else self._rows[parent]

    def put(self, node: int, children: Children) -> None:
        """A node that `grow` named, or ROOT, has been read."""
        self._children[node] = children
        self._push(node, children.value())

    def grow(self) -> list[int]:
        """Add nodes as far as can be: which must be read before it can go on, none at the end."""
        shape = self.shape
        if shape is not None and self._grows_anywhere:
            return self._grow_one_by_one(shape) if self._drawn else self._grow_likeliest(shape)
        if shape is None:
            return self._grow_level(width=1, nodes=self._depth)
        if shape.kind == "beam":
            return self._grow_level(width=shape.width, nodes=shape.width * self._depth)
        return self._grow_level(width=shape.nodes, nodes=shape.nodes, least=1.0 / shape.nodes)

    def finish(self) -> Grown:
        """The tree. Of more nodes than it may have the likeliest: no child is likelier than its
        parent."""
        kept: Sequence[int] = range(len(self._token_ids))
        if self.shape is not None and len(kept) > self.shape.nodes:
            assert not self._drawn, "a node that was drawn cannot be dropped"
            kept = sorted(self._likeliest(self.shape.nodes))
        place = {node: i for i, node in enumerate(kept)} | {ROOT: ROOT}
        return Grown(
            tree=DraftTree(
                tuple(self._token_ids[node] for node in kept),
                tuple(place[self._parents[node]] for node in kept),
            ),
            rows=tuple(self._rows[node] for node in kept),
        )

    def _grow_level(self, *, width: int, nodes: int, least: float = 0.0) -> list[int]:
        """Fill one level from the slots below the one before."""
        for _ in range(min(width, nodes - len(self._token_ids))):
            if not self._slots or -self._slots[0][0] <= least:
                break
            self._open()
        self._slots.clear()
        if len(self._token_ids) == nodes:
            return []
        return self._read([node for node in self._unread if self._values[node] > least])

    def _grow_likeliest(self, shape: DraftShape) -> list[int]:
        least = 0.0
        if len(self._token_ids) >= shape.nodes:
            least = self._values[self._likeliest(shape.nodes)[-1]]
        # nodes that come now may make a few of themselves superfluous: `finish` drops those
        for _ in range(shape.nodes):
            if not self._slots or -self._slots[0][0] <= least:
                break
            self._open()
        unread = set(self._unread)
        may_read = shape.num_slots(self._depth)
        most = min(-(-may_read // max(1, self._depth - 1)), may_read - self._num_read)
        best = [node for node in self._likeliest(shape.nodes) if node in unread][:most]
        return self._read(best)

    def _likeliest(self, count: int) -> list[int]:
        """So many nodes, a parent always before its children."""
        return sorted(range(len(self._values)), key=lambda node: -self._values[node])[:count]

    def _grow_one_by_one(self, shape: DraftShape) -> list[int]:
        while self._slots and len(self._token_ids) < shape.nodes:
            if self._slots[0][2] not in self._children:
                # what stood for the children of nodes not read yet has done so
                self._slots = [slot for slot in self._slots if slot[2] in self._children]
                heapq.heapify(self._slots)
                return self._read(self._unread)
            self._open()
        return []

    def _read(self, nodes: list[int]) -> list[int]:
        for node in nodes:
            self._rows[node] = self._num_read
            self._num_read += 1
        if self._grows_anywhere:
            self._unread = [node for node in self._unread if self._rows[node] < 0]
        else:
            self._unread = []
        return nodes

    @property
    def _grows_anywhere(self) -> bool:
        return self.shape is not None and self.shape.kind == "dynamic"

    def _open(self) -> None:
        """Draw the node of the best slot."""
        _, _, parent = heapq.heappop(self._slots)
        children = self._children[parent]
        depth = 1 if parent == ROOT else 1 + self._depths[parent]
        token_id, value = children.take(self._per_depth[depth])
        node = len(self._token_ids)
        self._per_depth[depth] += 1
        self._token_ids.append(token_id)
        self._parents.append(parent)
        self._depths.append(depth)
        self._rows.append(-1)
        self._values.append(value)
        self._push(parent, children.value())
        if depth < self._depth:
            self._unread.append(node)
            if self._drawn and self._grows_anywhere:
                # its first child promises no more than this; how much, reading it will show
                self._push(node, value)

    def _push(self, parent: int, value: float | None) -> None:
        if value is not None and value > 0.0:
            heapq.heappush(self._slots, (-value, self._num_slots, parent))
            self._num_slots += 1

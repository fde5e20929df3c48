"""KV blocks: who holds which, which are free, which still hold a prefix that somebody may want.

    allocate ──> held (count 1) ──hold──> held (count 2) ──release──> held (count 1)
        ^                                                                │ release
        │ oldest first                                                   v
        └────────────────────────── free, contents kept <────────────────┘
                                        └──find + hold──> held again, nothing computed

A block is full of some tokens or not yet. A full one is registered under the hash of everything up
to its end, and can be found by it until it is handed out for other tokens. The target's and the
draft model's pools share block ids, so a registered block also says whether the drafter's rows in
it are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paceline.runtime.schedule.prefix import BlockHash


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The leading blocks of a request that are there already."""

    blocks: tuple[int, ...] = ()
    num_draft_exact: int = 0
    """How many of them, from the front, hold exact drafter rows too."""


class BlockPool:
    """Blocks 0 .. num_blocks - 1. All methods mutate, save where they say otherwise."""

    # A prefix hit takes a block out of the middle of the free list. A deque does that in O(n), an
    # OrderedDict hashes and allocates on every move, so the list is two arrays of neighbours, with
    # entry num_blocks as both its ends.

    def __init__(self, num_blocks: int, *, report: bool = False) -> None:
        """With `report` the pool remembers which hashes come and go, for `take_changes`."""
        assert num_blocks > 0, f"expected at least one block, found {num_blocks}"
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        """Blocks that can be handed out, those that still hold a prefix included."""
        self._holders = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._draft_exact = bytearray(num_blocks)
        self._by_hash: dict[BlockHash, int] = {}
        self._changes: dict[BlockHash, bool] | None = {} if report else None
        self._after = [*range(1, num_blocks + 1), 0]
        self._before = [num_blocks, *range(num_blocks)]

    def allocate(self, count: int) -> list[int]:
        """So many free blocks, the longest unused first. What they held can no longer be found."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} are free"
        blocks = []
        end = self.num_blocks
        for _ in range(count):
            block = self._after[end]
            self._unlink(block)
            self._forget(block)
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """One holder more for each. Free ones leave the free list and keep what they hold."""
        for block in blocks:
            if self._holders[block] == 0:
                self._unlink(block)
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each. Of those left without one, those released first are handed out
        first, but before all others those that hold nothing that can be found."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free already"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._link(block, oldest=self._hashes[block] is None)

    def find(self, hashes: Sequence[BlockHash], *, most: int) -> PrefixHit:
        """The longest run of registered blocks from the start, of `most` at most. Mutates nothing;
        hold the blocks before anything else is allocated."""
        blocks: list[int] = []
        num_draft_exact = 0
        for index in range(min(most, len(hashes))):
            block = self._by_hash.get(hashes[index])
            if block is None:
                break
            if num_draft_exact == index and self._draft_exact[block]:
                num_draft_exact += 1
            blocks.append(block)
        return PrefixHit(tuple(blocks), num_draft_exact)

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of these nobody holds. Mutates nothing."""
        return sum(self._holders[block] == 0 for block in blocks)

    def register(self, block: int, block_hash: BlockHash, *, draft_exact: bool) -> None:
        """Let a held, full block be found. Where another has the same tokens already, the one
        whose drafter rows are exact is found, else the earlier."""
        assert self._holders[block] > 0, f"block {block} is registered but nobody holds it"
        other = self._by_hash.get(block_hash)
        if other == block:
            self._draft_exact[block] |= draft_exact
            return
        if other is not None:
            if self._draft_exact[other] or not draft_exact:
                return
            self._forget(other)
            if self._holders[other] == 0:
                self._unlink(other)
                self._link(other, oldest=True)
        self._forget(block)
        self._by_hash[block_hash] = block
        self._hashes[block] = block_hash
        self._draft_exact[block] = draft_exact
        if self._changes is not None:
            self._changes[block_hash] = True

    def take_changes(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Hashes that can be found now and could perhaps not at the last call, and the reverse."""
        changes = self._changes
        if not changes:
            return (), ()
        self._changes = {}
        stored = tuple(each for each, found in changes.items() if found)
        return stored, tuple(each for each, found in changes.items() if not found)

    def stored(self) -> tuple[BlockHash, ...]:
        """All that can be found, where it is reported. Mutates nothing."""
        return () if self._changes is None else tuple(self._by_hash)

    def emptied(self, num_blocks: int) -> BlockPool:
        """A pool in its place that holds nothing; what could be found here it reports as removed."""
        pool = BlockPool(num_blocks, report=self._changes is not None)
        if self._changes is not None:
            pool._changes = dict.fromkeys((*self._changes, *self._by_hash), False)
        return pool

    def holders(self, block: int) -> int:
        """How many hold a block. Mutates nothing."""
        return self._holders[block]

    def check(self) -> None:
        """Every block is either free, once, or held; what can be found is where it is said to
        be."""
        free: list[int] = []
        end, block = self.num_blocks, self._after[self.num_blocks]
        while block != end and len(free) <= self.num_blocks:
            assert self._before[self._after[block]] == block, f"the free list is torn at {block}"
            free.append(block)
            block = self._after[block]
        unheld = [block for block, count in enumerate(self._holders) if count == 0]
        assert sorted(free) == unheld, f"expected {unheld} in the free list, found {sorted(free)}"
        assert len(free) == self.num_free, f"{len(free)} are free, {self.num_free} were counted"
        found = {block: block_hash for block_hash, block in self._by_hash.items()}
        kept = {block: h for block, h in enumerate(self._hashes) if h is not None}
        assert found == kept, f"expected {kept} to be found, found {found}"
        loose = [block for block, exact in enumerate(self._draft_exact) if exact]
        assert set(loose) <= kept.keys(), f"exact but not registered: {loose}"

    def _forget(self, block: int) -> None:
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hashes[block] = None
            self._draft_exact[block] = 0
            if self._changes is not None:
                self._changes[block_hash] = False

    def _unlink(self, block: int) -> None:
        before, after = self._before[block], self._after[block]
        self._after[before] = after
        self._before[after] = before
        self.num_free -= 1

    def _link(self, block: int, *, oldest: bool) -> None:
        end = self.num_blocks
        before = end if oldest else self._before[end]
        after = self._after[before]
        self._after[before] = self._before[after] = block
        self._before[block], self._after[block] = before, after
        self.num_free += 1

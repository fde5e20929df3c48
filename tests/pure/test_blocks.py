"""Blocks are held or free, oldest first, and what they hold is found until they are handed out."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paceline.runtime.schedule.blocks import BlockPool
from paceline.runtime.schedule.prefix import BlockHash


def name(text: str) -> BlockHash:
    return BlockHash(text.encode())


def filled(pool: BlockPool, *names: str, draft_exact: bool = False) -> list[int]:
    """Blocks that hold these prefixes, one each."""
    blocks = pool.allocate(len(names))
    for block, text in zip(blocks, names, strict=True):
        pool.register(block, name(text), draft_exact=draft_exact)
    return blocks


def found(pool: BlockPool, *names: str) -> tuple[int, ...]:
    return pool.find([name(text) for text in names], most=99).blocks


def test_a_freed_block_is_found_until_it_is_handed_out() -> None:
    pool = BlockPool(3)
    (block,) = filled(pool, "a")
    pool.release([block])
    assert found(pool, "a") == (block,)
    pool.allocate(3)
    assert found(pool, "a") == ()


def test_the_longest_unused_is_handed_out_first() -> None:
    pool = BlockPool(3)
    a, b, c = filled(pool, "a", "b", "c")
    pool.release([b])
    pool.release([a, c])
    assert pool.allocate(3) == [b, a, c]


def test_blocks_that_hold_nothing_go_before_those_that_do() -> None:
    pool = BlockPool(3)
    (a,) = filled(pool, "a")
    b, c = pool.allocate(2)
    pool.release([a, b])
    assert pool.allocate(1) == [b]
    assert found(pool, "a") == (a,)
    pool.release([c])
    assert pool.allocate(2) == [c, a]


def test_a_block_found_again_leaves_the_middle_of_the_free_list() -> None:
    pool = BlockPool(4)
    a, b, c, d = filled(pool, "a", "b", "c", "d")
    pool.release([a, b, c, d])
    pool.hold([c])
    pool.check()
    assert pool.num_free == 3
    assert pool.allocate(3) == [a, b, d]


def test_a_shared_block_is_free_when_its_last_holder_leaves() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.hold([block])
    pool.release([block])
    assert pool.num_free == 0
    pool.release([block])
    assert pool.num_free == 1


def test_a_prefix_ends_at_the_first_block_that_is_missing() -> None:
    pool = BlockPool(4)
    a, b, c = filled(pool, "a", "b", "c")
    assert found(pool, "a", "b", "x", "c") == (a, b)
    hit = pool.find([name("a"), name("b"), name("c")], most=2)
    assert hit.blocks == (a, b)
    assert c not in hit.blocks


def test_only_leading_exact_blocks_count_for_the_drafter() -> None:
    pool = BlockPool(3)
    a, b, _ = filled(pool, "a", "b", "c")
    hashes = [name(text) for text in "abc"]
    pool.register(b, name("b"), draft_exact=True)
    assert pool.find(hashes, most=3).num_draft_exact == 0
    pool.register(a, name("a"), draft_exact=True)
    assert pool.find(hashes, most=3).num_draft_exact == 2


def test_a_block_stays_exact_for_the_drafter() -> None:
    pool = BlockPool(1)
    (block,) = filled(pool, "a", draft_exact=True)
    pool.register(block, name("a"), draft_exact=False)
    assert pool.find([name("a")], most=1).num_draft_exact == 1


def test_of_two_blocks_with_the_same_tokens_the_exact_one_is_found() -> None:
    pool = BlockPool(3)
    (first,) = filled(pool, "a")
    (second,) = filled(pool, "a")
    assert found(pool, "a") == (first,)
    (third,) = filled(pool, "a", draft_exact=True)
    assert found(pool, "a") == (third,)
    pool.release([first, second, third])
    pool.check()
    assert pool.allocate(3)[-1] == third


def test_an_exact_twin_takes_the_name_of_one_that_is_free() -> None:
    pool = BlockPool(3)
    (first,) = filled(pool, "a")
    (kept,) = filled(pool, "k")
    pool.release([kept, first])
    (second,) = filled(pool, "a", draft_exact=True)
    pool.check()
    assert found(pool, "a") == (second,)
    assert pool.allocate(1) == [first], "nothing can be found in it any more"


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="2 are free"):
        pool.allocate(3)
    with pytest.raises(AssertionError, match="free already"):
        pool.release([block])
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.register(block, name("a"), draft_exact=False)


def test_check_sees_a_wrong_count() -> None:
    pool = BlockPool(2)
    pool.num_free = 1
    with pytest.raises(AssertionError, match="were counted"):
        pool.check()


class AnyUse(RuleBasedStateMachine):
    """Against a plain model: lists of holders, and what was last written where."""

    @initialize(num_blocks=st.integers(1, 8))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.held: Counter[int] = Counter()
        self.holds: dict[int, str] = {}

    @rule(count=st.integers(1, 3))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            return
        for block in self.pool.allocate(count):
            assert self.held[block] == 0
            self.held[block] = 1
            self.holds.pop(block, None)

    @precondition(lambda self: self.held.total() > 0)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.held.elements())))
        self.held[block] -= 1
        self.pool.release([block])

    @precondition(lambda self: self.held.total() > 0)
    @rule(data=st.data(), text=st.sampled_from("abc"), draft_exact=st.booleans())
    def register(self, data: st.DataObject, text: str, draft_exact: bool) -> None:
        block = data.draw(st.sampled_from(sorted(self.held.elements())))
        text = self.holds.setdefault(block, text)
        self.pool.register(block, name(text), draft_exact=draft_exact)

    @rule(text=st.sampled_from("abc"))
    def find_and_hold(self, text: str) -> None:
        blocks = found(self.pool, text)
        for block in blocks:
            assert self.holds[block] == text
        self.held.update(blocks)
        self.pool.hold(blocks)

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            for block in range(self.pool.num_blocks):
                assert self.pool.holders(block) == self.held[block]
            assert self.pool.count_free(range(self.pool.num_blocks)) == self.pool.num_free


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

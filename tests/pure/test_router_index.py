"""The index of prefixes finds what it was told, forgets what it must, and never grows without bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.actors.routing import index as index_module
from paceline.actors.routing.index import EXPECT_S, Chain, PrefixIndex

ENGINES = ("a", "b", "c")
SIZE = 2


def chain(*blocks: int) -> Chain:
    """A prompt of blocks, each one number twice."""
    return Chain([each for block in blocks for each in (block, block)], salt="", block_size=SIZE)


blocks_ = st.lists(st.integers(0, 2), max_size=20)
changes = st.tuples(st.sampled_from(ENGINES), blocks_, st.booleans())


@settings(deadline=None)
@given(st.lists(changes, max_size=12), blocks_)
def test_it_finds_the_longest_prefix_that_each_engine_said_it_has(
    events: list[tuple[str, list[int], bool]], asked: list[int]
) -> None:
    index = PrefixIndex()
    model: dict[str, set[bytes]] = {engine_id: set() for engine_id in ENGINES}
    for engine_id in ENGINES:
        index.add(engine_id)
    for engine_id, blocks, stored in events:
        hashes = chain(*blocks).first(99)
        if stored:
            index.update(engine_id, stored=hashes, removed=())
            model[engine_id].update(hashes)
        else:
            index.update(engine_id, stored=(), removed=hashes[1::2])
            model[engine_id].difference_update(hashes[1::2])
    wanted = chain(*asked).first(99)
    expected = {}
    for engine_id, held in model.items():
        count = next((i for i, each in enumerate(wanted) if each not in held), len(wanted))
        if count:
            expected[engine_id] = count
    assert index.longest(chain(*asked), now_s=0.0) == expected
    for engine_id in ENGINES:
        index.forget(engine_id)
    assert len(index) == 0


@given(blocks_.filter(bool), blocks_, st.floats(0, EXPECT_S * 0.99))
def test_what_was_routed_is_believed_until_it_expires(
    blocks: list[int], other: list[int], later_s: float
) -> None:
    index = PrefixIndex()
    index.add("a")
    index.add("b")
    index.expect(["a"], {SIZE: chain(*blocks)}, now_s=5.0)
    index.expect(["b"], {SIZE: chain(*other)}, now_s=5.0)
    assert index.longest(chain(*blocks), now_s=5.0 + later_s)["a"] == len(blocks)
    assert index.longest(chain(*blocks), now_s=5.0 + EXPECT_S) == {}
    assert len(index) == 0


def test_a_confirmed_prefix_outlives_the_expectation_and_a_removed_one_does_not() -> None:
    index = PrefixIndex()
    index.add("a")
    prompt = chain(1, 2, 3)
    index.expect(["a"], {SIZE: prompt}, now_s=0.0)
    index.update("a", stored=prompt.first(2), removed=())
    assert index.longest(prompt, now_s=EXPECT_S + 1) == {"a": 2}
    index.expect(["a"], {SIZE: prompt}, now_s=20.0)
    index.update("a", stored=(), removed=prompt.first(3)[1:2])
    assert index.longest(prompt, now_s=20.0) == {"a": 1}


def test_what_is_routed_again_is_believed_for_longer() -> None:
    index = PrefixIndex()
    index.add("a")
    index.expect(["a"], {SIZE: chain(1, 2)}, now_s=0.0)
    index.expect(["a"], {SIZE: chain(1, 3)}, now_s=EXPECT_S / 2)
    assert index.longest(chain(1, 2), now_s=EXPECT_S) == {"a": 1}
    assert index.longest(chain(1, 3), now_s=EXPECT_S) == {"a": 2}


def test_salts_and_block_sizes_keep_prompts_apart() -> None:
    index = PrefixIndex()
    index.add("a")
    tokens = list(range(16))
    index.expect(["a"], {4: Chain(tokens, salt="x", block_size=4)}, now_s=0.0)
    assert index.longest(Chain(tokens, salt="x", block_size=4), now_s=0.0) == {"a": 4}
    assert index.longest(Chain(tokens, salt="y", block_size=4), now_s=0.0) == {}
    assert index.longest(Chain(tokens, salt="x", block_size=8), now_s=0.0) == {}


def test_an_engine_that_names_more_blocks_than_it_has_starts_again_from_nothing() -> None:
    index = PrefixIndex()
    index.add("a")
    index.add("b")
    prompt = chain(*range(10))
    index.update("b", stored=prompt.first(10), removed=(), most=10)
    index.update("a", stored=prompt.first(10), removed=(), most=9)
    assert index.longest(prompt, now_s=0.0) == {"b": 10}
    assert len(index) == 10


def test_expectations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MOST_EXPECTED", 100)
    index = PrefixIndex()
    index.add("a")
    for prompt in range(50):
        index.expect(["a"], {SIZE: chain(*range(prompt * 10, prompt * 10 + 10))}, now_s=0.0)
        assert len(index) <= 110
    assert index.longest(chain(*range(490, 500)), now_s=0.0) == {"a": 10}
    assert index.longest(chain(*range(10)), now_s=0.0) == {}


def test_a_prompt_that_nobody_has_is_hardly_hashed() -> None:
    index = PrefixIndex()
    index.add("a")
    prompt = chain(*range(1000))
    assert index.longest(prompt, now_s=0.0) == {}
    assert len(prompt._hashes) < 20

"""Equal hashes mean equal tokens from the start, under one salt."""

from __future__ import annotations

from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from paceline.runtime.schedule import prefix
from paceline.runtime.schedule.prefix import BlockHash, extend_hashes, root_hash

tokens = st.lists(st.integers(0, 3), max_size=24)


def hashes_of(token_ids: list[int], *, salt: str = "", block_size: int = 4) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, token_ids, root=root_hash(salt), block_size=block_size)
    return hashes


@given(tokens, tokens)
def test_hashes_agree_exactly_as_far_as_tokens_do(a: list[int], b: list[int]) -> None:
    same = [x == y for x, y in zip(hashes_of(a), hashes_of(b), strict=False)]
    assert same == [
        a[: 4 * (index + 1)] == b[: 4 * (index + 1)] for index in range(min(len(a), len(b)) // 4)
    ]


def test_a_salt_changes_every_hash() -> None:
    plain, salted = hashes_of([1] * 12), hashes_of([1] * 12, salt="s")
    assert not set(plain) & set(salted)


def test_the_same_block_elsewhere_has_another_hash() -> None:
    assert len(set(hashes_of([1] * 40))) == 10


def test_large_token_ids_count_in_full() -> None:
    assert hashes_of([1, 2, 3, 2**31]) != hashes_of([1, 2, 3, 0])
    assert hashes_of([1, 2, 3, 258]) != hashes_of([1, 2, 3, 2])


@given(tokens, st.lists(st.integers(1, 9)))
def test_hashes_are_the_same_however_the_text_grew(token_ids: list[int], pieces: list[int]) -> None:
    grown: list[BlockHash] = []
    end = 0
    for piece in [*pieces, len(token_ids)]:
        end = min(end + piece, len(token_ids))
        extend_hashes(grown, token_ids[:end], root=root_hash(""), block_size=4)
    assert grown == hashes_of(token_ids)


def test_each_full_block_is_hashed_once() -> None:
    hashes: list[BlockHash] = []
    with mock.patch.object(prefix, "block_hash", wraps=prefix.block_hash) as hashed:
        for end in range(33):
            extend_hashes(hashes, list(range(end)), root=root_hash(""), block_size=4)
    assert hashed.call_count == 8

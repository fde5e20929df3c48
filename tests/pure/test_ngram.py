"""Drafts are what followed the longest run that was seen before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline.runtime.spec.ngram import MAX_LOOKS, NgramIndex


def plain_match(token_ids: list[int], *, min_length: int, max_length: int) -> int | None:
    """The definition, looked up slowly: where the best earlier run ends."""
    last = len(token_ids) - 1
    ends = [
        end
        for end in range(min_length - 1, last)
        if token_ids[end - min_length + 1 : end + 1] == token_ids[last - min_length + 1 :]
        and last - min_length + 1 >= 0
    ][-MAX_LOOKS:]
    best, best_length = None, 0
    for end in reversed(ends):
        length = 0
        while (
            length < max_length
            and length <= end
            and token_ids[end - length] == token_ids[last - length]
        ):
            length += 1
        if length > best_length:
            best, best_length = end, length
    return best


@given(
    st.lists(st.integers(0, 2), max_size=60),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(1, 9),
)
def test_the_index_agrees_with_its_definition(
    token_ids: list[int], min_length: int, more: int, num_tokens: int
) -> None:
    max_length = min_length + more
    index = NgramIndex(token_ids, min_length=min_length, max_length=max_length)
    place = plain_match(token_ids, min_length=min_length, max_length=max_length)
    assert index.has_match == (place is not None)
    drafts: list[int] = []
    if place is not None:
        copied = list(token_ids)
        for offset in range(num_tokens):
            copied.append(copied[place + 1 + offset])
        drafts = copied[len(token_ids) :]
    assert index.propose(num_tokens) == tuple(drafts)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40))
def test_an_index_is_the_same_however_the_text_grew(token_ids: list[int], cut: int) -> None:
    grown = NgramIndex(token_ids[:cut])
    grown.extend(token_ids[cut:])
    assert grown.propose(8) == NgramIndex(token_ids).propose(8)
    assert len(grown) == len(token_ids)


def test_a_repeated_text_is_drafted_round_and_round() -> None:
    assert NgramIndex([7, 8, 9, 7, 8, 9]).propose(7) == (7, 8, 9, 7, 8, 9, 7)


def test_a_longer_match_beats_a_later_one() -> None:
    index = NgramIndex([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3])
    assert index.propose(1) == (4,)


def test_of_equal_matches_the_later_is_taken() -> None:
    assert NgramIndex([2, 3, 4, 2, 3, 5, 2, 3]).propose(1) == (5,)


def test_nothing_is_drafted_for_a_new_suffix() -> None:
    assert NgramIndex([1, 2, 3, 4]).propose(3) == ()
    assert NgramIndex().propose(3) == ()
    assert NgramIndex([1, 2, 1, 2]).propose(0) == ()


def test_proposing_changes_nothing() -> None:
    index = NgramIndex([1, 2, 1, 2])
    assert index.propose(3) == index.propose(3)

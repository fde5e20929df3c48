"""From token deltas to text: whatever comes together, the text is the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engines import END, fake_facts, ids_of

from paceline.runtime.config import EngineConfig
from paceline.runtime.outputs import Assembler, CompletionOutput, StopStrings, empty_output
from paceline.runtime.preflight import Facts
from paceline.runtime.requests import RequestFactory
from paceline.runtime.tokenizer import Tokenizer
from paceline.runtime.types import (
    FinishReason,
    Request,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
)

EMBEDDED = Path(__file__).parents[2] / "runtime/models/embedded/target"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return fake_facts(tmp_path_factory.mktemp("fake"))


def request(facts: Facts, params: SamplingParams) -> Request:
    return RequestFactory(facts, EngineConfig()).make("p", params).requests[0]


def in_groups(items: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """`items` cut into groups of these sizes, over and over."""
    groups, start, i = [], 0, 0
    while start < len(items):
        size = sizes[i % len(sizes)] if sizes else 1
        groups.append(list(items[start : start + size]))
        start, i = start + size, i + 1
    return groups or [[]]


def assemble(
    facts: Facts,
    params: SamplingParams,
    token_ids: Sequence[int],
    *,
    sizes: Sequence[int] = (1,),
    reason: FinishReason = "length",
    parts: list[CompletionOutput] | None = None,
) -> tuple[CompletionOutput, Assembler]:
    """Feed tokens as an engine would, which stops a step or two after it is told to."""
    made = request(facts, params)
    assembler = Assembler(made, facts.tokenizer)
    total = CompletionOutput()
    groups = in_groups(token_ids, sizes)
    for i, group in enumerate(groups):
        last = i == len(groups) - 1
        delta = TokenDelta(
            request_id=made.request_id,
            token_ids=tuple(group),
            num_accepted=max(0, len(group) - 1),
            finish_reason=reason if last else None,
        )
        part = assembler.feed(delta)
        if parts is not None:
            parts.append(part)
        total.add(part)
    return total, assembler


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, of those the longest. Slow and plain."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


texts = st.text("ab", max_size=24)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3)
group_sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(text=texts, stops=stop_lists, sizes=group_sizes)
def test_a_text_ends_before_the_first_stop_string_however_it_arrives(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    matcher, got, stop = StopStrings(tuple(stops)), "", None
    for group in in_groups(list(text.encode()), sizes):
        piece, stop = matcher.feed(bytes(group).decode())
        got += piece
        if stop is not None:
            break
        held = text[: len(got) + len(matcher._held)][len(got) :]
        prefixes = {s[:k] for s in stops for k in range(len(s))}
        assert held == matcher._held
        assert held in prefixes, "no more is held back than could become a stop string"
    else:
        got += matcher.flush()
    assert (got, stop) == cut(text, stops)


@given(text=texts, stops=stop_lists, sizes=group_sizes, keep=st.booleans())
def test_text_and_tokens_do_not_depend_on_how_many_come_at_once(
    facts: Facts, text: str, stops: list[str], sizes: list[int], keep: bool
) -> None:
    params = SamplingParams(stop=tuple(stops), include_stop_str_in_output=keep)
    got, _ = assemble(facts, params, ids_of(text), sizes=sizes)
    before, stop = cut(text, stops)
    if stop is None:
        assert (got.text, got.token_ids, got.finish_reason) == (text, ids_of(text), "length")
    else:
        assert got.text == before + (stop if keep else "")
        assert got.token_ids == ids_of(before + stop), "up to the token that completed it"
        assert (got.finish_reason, got.stop_reason) == ("stop", stop)


@given(text=st.text(max_size=12), sizes=group_sizes)
def test_no_part_ends_within_a_character(facts: Facts, text: str, sizes: list[int]) -> None:
    parts: list[CompletionOutput] = []
    got, _ = assemble(facts, SamplingParams(), ids_of(text), sizes=sizes, parts=parts)
    assert got.text == text
    if "�" not in text:
        assert all("�" not in part.text for part in parts)


@given(token_ids=st.lists(st.integers(0, END), max_size=20), sizes=group_sizes)
def test_bytes_that_are_no_text_read_as_the_tokenizer_reads_them(
    facts: Facts, token_ids: list[int], sizes: list[int]
) -> None:
    assert facts.tokenizer is not None
    got, _ = assemble(facts, SamplingParams(), token_ids, sizes=sizes)
    assert got.text == facts.tokenizer.decode(token_ids)


def test_what_was_held_back_comes_with_the_end(facts: Facts) -> None:
    parts: list[CompletionOutput] = []
    assemble(facts, SamplingParams(stop="end"), ids_of("the en"), sizes=[5, 1], parts=parts)
    assert [part.text for part in parts] == ["the ", "en"]
    half = ids_of("é")[:1]
    got, _ = assemble(facts, SamplingParams(), half)
    assert got.text == "�"


def test_stop_strings_count_only_after_min_tokens(facts: Facts) -> None:
    params = SamplingParams(stop="ab", min_tokens=2, max_tokens=50)
    assert assemble(facts, params, ids_of("abcab!"))[0].text == "abc"
    straddling = SamplingParams(stop="ab", min_tokens=1, max_tokens=50)
    assert assemble(facts, straddling, ids_of("abcab!"))[0].text == ""
    overlapping = SamplingParams(stop="aa", min_tokens=2, max_tokens=50)
    assert assemble(facts, overlapping, ids_of("aaa!"))[0].text == "a"
    late = SamplingParams(stop="ab", min_tokens=5, max_tokens=50)
    assert assemble(facts, late, ids_of("abcab!"))[0].text == "abcab!"


def test_tokens_after_a_stop_string_are_dropped_and_the_metrics_awaited(facts: Facts) -> None:
    made = request(facts, SamplingParams(stop="b", logprobs=0))
    assembler = Assembler(made, facts.tokenizer)
    logprobs = tuple(TokenLogprobs(token_id=i, logprob=-1.0, rank=1) for i in ids_of("abc"))
    first = assembler.feed(
        TokenDelta(
            request_id="x", token_ids=tuple(ids_of("abc")), num_accepted=3, logprobs=logprobs
        )
    )
    assert (first.text, first.token_ids, first.num_accepted) == ("a", ids_of("ab"), 2)
    assert first.finish_reason is None
    assert first.logprobs is not None
    assert [next(iter(position)) for position in first.logprobs] == ids_of("ab")
    assert first.cumulative_logprob == -2.0
    assert assembler.stopped
    more = assembler.feed(TokenDelta(request_id="x", token_ids=tuple(ids_of("zz"))))
    assert (more.text, more.token_ids) == ("", [])
    last = assembler.feed(TokenDelta(request_id="x", finish_reason="abort"))
    assert (last.finish_reason, last.stop_reason) == ("stop", "b")


def test_a_lost_engine_is_no_stop_string(facts: Facts) -> None:
    assembler = Assembler(request(facts, SamplingParams(stop="b")), facts.tokenizer)
    assembler.feed(TokenDelta(request_id="x", token_ids=tuple(ids_of("ab"))))
    last = assembler.feed(TokenDelta(request_id="x", finish_reason="error", error="gone"))
    assert (last.finish_reason, last.error) == ("error", "gone")


@pytest.mark.parametrize(("keep", "text"), [(False, "hi"), (True, "hi.")])
def test_a_stop_token_is_reported_but_no_part_of_the_text(
    facts: Facts, keep: bool, text: str
) -> None:
    dot = ids_of(".")[0]
    made = request(facts, SamplingParams(stop_token_ids=(dot,), include_stop_str_in_output=keep))
    assembler = Assembler(made, facts.tokenizer)
    part = assembler.feed(
        TokenDelta(
            request_id="x",
            token_ids=tuple(ids_of("hi.")),
            finish_reason="stop",
            stop_token_id=dot,
        )
    )
    assert (part.text, part.token_ids) == (text, ids_of("hi."))
    assert (part.finish_reason, part.stop_reason) == ("stop", dot)


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<|end|>b")])
def test_special_tokens_are_shown_on_request(facts: Facts, skip: bool, text: str) -> None:
    params = SamplingParams(skip_special_tokens=skip, ignore_eos=True)
    got, _ = assemble(facts, params, [ids_of("a")[0], END, ids_of("b")[0]])
    assert got.text == text


def test_log_probabilities_name_the_chosen_token_first_and_then_the_best(facts: Facts) -> None:
    assembler = Assembler(request(facts, SamplingParams(logprobs=2)), facts.tokenizer)
    a, b, c = ids_of("abc")
    entry = TokenLogprobs(token_id=c, logprob=-3.0, rank=9, top=((a, -0.5), (b, -1.0)))
    position = assembler.position(entry)
    assert list(position) == [c, a, b]
    assert [(p.rank, p.decoded_token) for p in position.values()] == [(9, "c"), (1, "a"), (2, "b")]
    among = TokenLogprobs(token_id=b, logprob=-1.0, rank=2, top=((a, -0.5), (b, -1.0)))
    assert list(assembler.position(among)) == [b, a]


def test_parts_gather_into_the_whole(facts: Facts) -> None:
    job = RequestFactory(facts, EngineConfig()).make("p", SamplingParams(n=2, logprobs=0))
    whole = empty_output(job)
    for text, index, finished in (("a", 0, False), ("x", 1, False), ("b", 0, True)):
        assembler = Assembler(job.requests[index], facts.tokenizer, index=index)
        logprobs = (TokenLogprobs(token_id=ids_of(text)[0], logprob=-0.25, rank=1),)
        delta = TokenDelta(
            request_id=job.requests[index].request_id,
            token_ids=tuple(ids_of(text)),
            num_accepted=1,
            logprobs=logprobs,
            finish_reason="length" if finished else None,
        )
        part = empty_output(job)
        part.outputs = [assembler.feed(delta)]
        part.num_cached_tokens = 16
        part.finished = finished
        whole.add(part)
    assert [o.text for o in whole.outputs] == ["ab", "x"]
    assert [o.num_accepted for o in whole.outputs] == [2, 1]
    assert [o.cumulative_logprob for o in whole.outputs] == [-0.5, -0.25]
    assert (whole.num_cached_tokens, whole.finished) == (16, True)


def test_every_token_of_the_embedded_pair_spells_its_bytes() -> None:
    tokenizer = Tokenizer(EMBEDDED)
    text = "def naïve(π):\n\treturn '→ 🚴'  # ok\n"
    token_ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in token_ids).decode() == text
    for token_id in range(len(tokenizer.vocabulary())):
        expected = tokenizer.decode([token_id], skip_special_tokens=False)
        assert tokenizer.token_text(token_id) == expected

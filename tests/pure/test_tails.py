"""Drafts made ahead are used where they follow the text, and nowhere else, whoever is in front.

The target here writes a fixed text; the drafter guesses it and is often wrong. What they say to each
other takes its time, and may be said twice.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from paceline.runtime.ahead.messages import Close, Commit, Sync, Tail, Tails
from paceline.runtime.ahead.text import DraftedText
from paceline.runtime.errors import ShardError
from paceline.runtime.schedule.tails import TailBook, TailBuffer
from paceline.runtime.types import Request, SamplingParams

NUM_TOKENS = 3
"""So few that a wrong text and the right one meet again by chance."""
PROMPT = (1, 0, 2, 1)


def request(request_id: str = "a", *, max_tokens: int = 40) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=PROMPT,
        params=SamplingParams(),
        seed=0,
        max_tokens=max_tokens,
    )


def tail(position: int, *token_ids: int, base: int = 4, generation: int = 1) -> Tail:
    return Tail(
        request_id="a", generation=generation, base=base, position=position, token_ids=token_ids
    )


def said(*tails: Tail) -> Tails:
    return Tails(rank=0, tails=tails)


def buffer(text: list[int]) -> TailBuffer:
    return TailBuffer(text, generation=1)


def test_a_round_that_accepts_every_draft_leaves_the_next_ones_there() -> None:
    text = [*PROMPT]
    drafts = buffer(text)
    drafts.receive(tail(4, 7, 8, 9, 5, 6))
    assert drafts.first(2) == (7, 8)
    text += [7, 8, 9]  # two drafts and the target's own, which is the third
    drafts.commit()
    assert drafts.first(9) == (5, 6)


def test_the_first_difference_cuts_the_tail() -> None:
    text = [*PROMPT]
    drafts = buffer(text)
    drafts.receive(tail(4, 7, 8, 9))
    text += [7, 5]
    drafts.commit()
    assert len(drafts) == 0


def test_what_was_drafted_before_a_difference_was_known_is_stale() -> None:
    text = [*PROMPT]
    drafts = buffer(text)
    drafts.receive(tail(4, 7, 8))
    text += [7, 5]
    drafts.commit()
    drafts.receive(tail(6, 9))
    drafts.receive(tail(6, 3, base=5))
    assert len(drafts) == 0
    drafts.receive(tail(6, 9, base=6))
    assert drafts.first(1) == (9,)


def test_a_text_in_front_is_compared_with_drafts_as_they_come() -> None:
    text = [*PROMPT, 7, 8, 9]
    drafts = buffer(text)
    text += [1, 2]
    drafts.commit()
    drafts.receive(tail(7, 1, base=7))
    assert len(drafts) == 0
    drafts.receive(tail(8, 2, 6, base=7))
    assert drafts.first(3) == (6,)


def test_a_text_in_front_that_differs_from_the_drafts_makes_what_follows_them_stale() -> None:
    text = [*PROMPT]
    drafts = buffer(text)
    text += [1, 2]
    drafts.commit()
    drafts.receive(tail(4, 1, 5, 2, 2))
    drafts.receive(tail(8, 2))
    assert len(drafts) == 0
    drafts.receive(tail(6, 4, base=6))
    assert drafts.first(2) == (4,)


def test_a_drafter_that_was_overtaken_goes_on_behind_what_it_was_told() -> None:
    text = [*PROMPT]
    drafts = buffer(text)
    text += [1, 2, 0]
    drafts.commit()
    drafts.receive(tail(7, 5, base=7))
    assert drafts.first(1) == (5,)


def test_drafts_said_twice_count_once() -> None:
    text = [*PROMPT]
    drafts = buffer(text)
    drafts.receive(tail(4, 7, 8))
    drafts.receive(tail(5, 8, 9))
    drafts.receive(tail(4, 7))
    assert drafts.first(9) == (7, 8, 9)
    text += [7]
    drafts.commit()
    drafts.receive(tail(4, 7, 8))
    assert drafts.first(9) == (8, 9)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (tail(7, 1), "drafts 6 to 7 are missing"),
        (tail(5, 4), "draft 5 was 8 before, and is 4 now"),
        (tail(6, 1, generation=2), "do not follow the text"),
        (tail(6, 1, base=5), "do not follow the text"),
        (tail(3, 1, base=4), "do not follow the text"),
    ],
)
def test_what_no_drafter_says_is_an_error(wrong: Tail, why: str) -> None:
    text = [*PROMPT]
    drafts = buffer(text)
    drafts.receive(tail(4, 7, 8))
    with pytest.raises(ShardError, match=why):
        drafts.receive(wrong)


def test_drafts_of_an_earlier_generation_are_stale() -> None:
    text = [*PROMPT]
    drafts = buffer(text)
    drafts.receive(tail(4, 7, 8))
    drafts.reset(2)
    drafts.receive(tail(6, 9))
    assert len(drafts) == 0
    drafts.receive(tail(4, 9, generation=2))
    assert drafts.first(1) == (9,)


# ------------------------------------------------------------------------------------------- the book


def test_commits_of_several_steps_are_told_as_one() -> None:
    book, text = TailBook(), [*PROMPT]
    book.open(request(), text, num_ahead=3)
    (sync,) = book.take_orders()
    assert isinstance(sync, Sync)
    assert (sync.request.request_id, sync.output_token_ids, sync.num_ahead) == ("a", (), 3)
    text += [5, 6]
    text += [7]
    assert book.take_orders() == [Commit(request_id="a", base=4, token_ids=(5, 6, 7))]
    assert book.take_orders() == []


def test_a_request_that_nobody_was_told_of_is_not_closed_either() -> None:
    book = TailBook()
    book.open(request(), [*PROMPT], num_ahead=3)
    book.close("a")
    book.close("never there")
    assert book.take_orders() == []


def test_a_request_that_comes_back_is_closed_before_it_is_told_again() -> None:
    book, text = TailBook(), [*PROMPT, 9]
    book.open(request(), text, num_ahead=3)
    (before,) = book.take_orders()
    book.close("a")
    book.open(request(), text, num_ahead=3)
    closed, after = book.take_orders()
    assert closed == Close(request_id="a")
    assert isinstance(before, Sync)
    assert isinstance(after, Sync)
    assert after.generation > before.generation
    assert after.output_token_ids == (9,)


def test_another_drafter_is_told_everything_again() -> None:
    book, text = TailBook(), [*PROMPT]
    drafts = book.open(request(), text, num_ahead=3)
    (before,) = book.take_orders()
    assert isinstance(before, Sync)
    book.receive(said(tail(4, 1, generation=before.generation)))
    book.open(request("b"), [*PROMPT], num_ahead=3)
    book.take_orders()
    book.close("b")
    book.forget()
    assert len(drafts) == 0
    (again,) = book.take_orders()
    assert isinstance(again, Sync)
    assert again.generation > before.generation
    book.receive(said(tail(5, 1, generation=before.generation)))
    assert len(drafts) == 0


def test_drafts_of_a_request_that_is_gone_are_dropped() -> None:
    TailBook().receive(said(tail(4, 1)))


# ------------------------------------------------------------------------------------ the drafter's end


def drafted(*token_ids: int, num_ahead: int = 9) -> DraftedText:
    text = DraftedText.of(Sync(request=request(max_tokens=8), generation=1, num_ahead=num_ahead))
    for token_id in token_ids:
        text.add(token_id)
    return text


@pytest.mark.parametrize(
    ("commit", "wrong_from", "left"),
    [
        ((7, 8), None, [9]),
        ((7, 8, 9), None, []),
        ((7, 8, 9, 5), None, []),
        ((7, 5), 5, []),
        ((6,), 4, []),
        ((7, 8, 5, 4), 6, []),
    ],
)
def test_a_commit_leaves_the_drafter_the_tail_that_follows_it(
    commit: tuple[int, ...], wrong_from: int | None, left: list[int]
) -> None:
    text = drafted(7, 8, 9)
    assert text.commit(4, commit) == wrong_from
    assert text.token_ids == [*PROMPT, *commit, *left]
    assert text.tail == left


def test_a_drafter_stops_at_its_limit_and_at_the_end_of_the_text() -> None:
    assert drafted(1, num_ahead=2).wants
    assert not drafted(1, 2, num_ahead=2).wants
    assert not drafted(*range(7)).wants, "the eighth token of eight is the target's own"


# ----------------------------------------------------------------------------------------- both ends


@dataclass
class Line:
    """Messages on their way, each with its time to come."""

    messages: deque[tuple[int, object]] = field(default_factory=deque)

    def send(self, message: object, *, at: int) -> None:
        due = max([at, *(due for due, _ in self.messages)])  # none overtakes another
        self.messages.append((due, message))

    def take(self, now: int) -> list[object]:
        found = []
        while self.messages and self.messages[0][0] <= now:
            found.append(self.messages.popleft()[1])
        return found


def guess(context: Sequence[int], *, seed: int) -> int:
    """A token that follows from the whole context, as a model's does."""
    return random.Random(f"{seed} {list(context)}").randrange(NUM_TOKENS)


@given(
    seed=st.integers(0, 2**16),
    num_ahead=st.integers(1, 9),
    most=st.integers(1, 5),
    slow=st.sampled_from([(1, 1), (1, 6), (6, 1)]),
    delay=st.integers(0, 12),
)
def test_texts_are_the_targets_own_whoever_is_slow_and_however_late_the_news(
    seed: int, num_ahead: int, most: int, slow: tuple[int, int], delay: int
) -> None:
    """And every draft that is verified was drafted for just this text."""
    rng = random.Random(seed)
    wanted = request(max_tokens=24)
    text, book = [*PROMPT], TailBook()
    expected = [*PROMPT]
    while len(expected) < len(PROMPT) + 24:
        expected.append(guess(expected, seed=1))
    drafts = book.open(wanted, text, num_ahead=num_ahead)
    there: DraftedText | None = None
    made: set[tuple[int, ...]] = set()
    orders, tails, now = Line(), Line(), 0
    while len(text) < len(expected):
        now += 1
        for order in book.take_orders():
            orders.send(order, at=now + rng.randint(0, delay))
        for order in orders.take(now):
            if isinstance(order, Sync):
                there = DraftedText.of(order)
            elif isinstance(order, Commit) and there is not None:
                there.commit(order.base, order.token_ids)
        if now % slow[0] == 0 and there is not None and there.wants:
            # right three times of four
            token_id = guess(there.token_ids, seed=1)
            token_id = rng.choice([token_id] * 3 + [guess(there.token_ids, seed=2)])
            new = there.add(token_id)
            made.add(tuple(there.token_ids))
            for _ in range(rng.choice([1, 1, 1, 2])):
                tails.send(new, at=now + rng.randint(0, delay))
        book.receive(said(*(each for each in tails.take(now) if isinstance(each, Tail))))
        if now % slow[1] == 0:
            room = len(expected) - len(text) - 1
            used = drafts.first(min(most, room))
            assert all((*text, *used[: i + 1]) in made for i in range(len(used)))
            own = expected[len(text) : len(text) + len(used) + 1]
            kept = 0
            while kept < len(used) and used[kept] == own[kept]:
                kept += 1
            text += own[: kept + 1]
            drafts.commit()
    assert text == expected


class TailMachine(RuleBasedStateMachine):
    """A buffer beside a model that remembers every draft with the text it was drafted for."""

    @initialize()
    def begin(self) -> None:
        self.book, self.text = TailBook(), [*PROMPT]
        self.drafts = self.book.open(request(max_tokens=1000), self.text, num_ahead=8)
        self.there: DraftedText | None = None
        self.said: deque[Tail] = deque()
        self.heard: list[Tail] = []
        self.drafted: set[tuple[int, ...]] = set()
        """Every text of the drafter that ended with a draft."""

    @rule(token_ids=st.lists(st.integers(0, NUM_TOKENS - 1), min_size=1, max_size=4))
    def commit(self, token_ids: list[int]) -> None:
        self.text += token_ids
        self.drafts.commit()

    @rule(count=st.integers(0, 3))
    def commit_what_was_drafted(self, count: int) -> None:
        self.text += self.drafts.first(count)
        self.drafts.commit()

    @rule()
    def tell(self) -> None:
        for order in self.book.take_orders():
            if isinstance(order, Sync):
                self.there = DraftedText.of(order)
            elif isinstance(order, Commit):
                assert self.there is not None
                self.there.commit(order.base, order.token_ids)

    @rule(token_ids=st.lists(st.integers(0, NUM_TOKENS - 1), min_size=1, max_size=4))
    def draft(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            if self.there is not None and self.there.wants:
                self.said.append(self.there.add(token_id))
                self.drafted.add(tuple(self.there.token_ids))

    @rule(count=st.integers(1, 4))
    def hear(self, count: int) -> None:
        for _ in range(min(count, len(self.said))):
            each = self.said.popleft()
            self.heard.append(each)
            self.book.receive(said(each))

    @rule()
    def hear_again(self) -> None:
        """The last words, once more."""
        if self.heard:
            self.book.receive(said(self.heard[-1]))

    @rule()
    def start_anew(self) -> None:
        self.there = None
        self.book.forget()

    @invariant()
    def every_draft_was_made_for_just_this_text(self) -> None:
        if hasattr(self, "drafts"):
            tail = self.drafts.first(99)
            for end in range(1, len(tail) + 1):
                assert (*self.text, *tail[:end]) in self.drafted


TestTailMachine = TailMachine.TestCase
TestTailMachine.settings = settings(max_examples=60, stateful_step_count=40)

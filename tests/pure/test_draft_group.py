"""Whatever becomes of draft ranks, the engine loop neither waits nor loses a word.

Ranks are played here: their channel is a list that a test fills and reads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from paceline.runtime.ahead.group import MOST_IN_VAIN, DraftGroup
from paceline.runtime.ahead.messages import Commit, Order, Sync, Tail, Tails
from paceline.runtime.channel import Ready
from paceline.runtime.errors import EngineError, ModelError, ShardError
from paceline.runtime.schedule.tails import TailBook, TailBuffer
from paceline.runtime.types import DraftPass, Request, SamplingParams

LONG_S = 30.0
SILENT_S = 10.0
PASS = DraftPass(span=(1.0, 2.0), num_rows=3, num_drafts=1)


class Channel:
    """Satisfies what is asked of `OrderSender`."""

    def __init__(self) -> None:
        self.told: list[Order] = []
        self.says: list[Tails] = []
        self.died: str | None = None
        self.loads = threading.Event()
        self.loads.set()
        self.refuses: Exception | None = None

    def wait_for_ranks(self, *, timeout_s: float) -> Ready:
        assert self.loads.wait(LONG_S)
        if self.refuses is not None:
            raise self.refuses
        return Ready(ranks=("draft rank 0",), num_blocks=8)

    def send(self, orders: list[Order]) -> None:
        self.told += orders

    def take(self) -> list[Tails]:
        found, self.says = self.says, []
        for tails in found:
            if tails.error is not None:
                raise ShardError(tails.error)
        return found

    def check(self) -> None:
        if self.died is not None:
            raise ShardError(self.died)


class Ranks:
    """Satisfies `DraftRanks`."""

    def __init__(self) -> None:
        self.channel = Channel()
        self.killed = self.closed = False

    def stacks(self) -> list[str]:
        return ["waits for Godot"]

    def kill(self) -> None:
        self.killed = True

    def close(self) -> None:
        self.closed = True


class Stage:
    """A group, the ranks it has started so far, and a request that is drafted for."""

    def __init__(self, *, prepare: Callable[[Ranks], object] = id) -> None:
        self.now_s = 100.0
        self.started: list[Ranks] = []
        self.prepare = prepare
        self.group = DraftGroup(
            self._start,  # type: ignore[arg-type]
            load_timeout_s=LONG_S,
            step_timeout_s=SILENT_S,
            clock=lambda: self.now_s,
        )
        self.book = TailBook()
        self.text = [1, 2, 3]
        self.tail = self.open("a", self.text)

    def _start(self) -> Ranks:
        ranks = Ranks()
        self.prepare(ranks)
        self.started.append(ranks)
        return ranks

    def open(self, request_id: str, text: list[int]) -> TailBuffer:
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(text),
            params=SamplingParams(),
            seed=0,
            max_tokens=9,
        )
        return self.book.open(request, text, num_ahead=5)

    @property
    def channel(self) -> Channel:
        return self.started[-1].channel

    def pass_time(self, seconds: float) -> None:
        """And listen now and then."""
        for _ in range(int(seconds)):
            self.now_s += 1.0
            self.group.receive(self.book)

    def until_started(self) -> None:
        deadline_s = time.monotonic() + LONG_S
        while self.group._starting is not None:
            assert time.monotonic() < deadline_s
            self.group.receive(self.book)

    def drafts(self, *token_ids: int) -> Tails:
        """What the drafter says once it has been told of the request."""
        sync = next(order for order in self.channel.told if isinstance(order, Sync))
        tail = Tail(
            request_id="a",
            generation=sync.generation,
            base=len(self.text),
            position=len(self.text),
            token_ids=token_ids,
        )
        return Tails(rank=0, tails=(tail,), passes=(PASS,))


def ready(**how: Callable[[Ranks], object]) -> Stage:
    stage = Stage(**how)
    stage.group.wait_ready()
    return stage


def test_orders_go_out_and_drafts_come_in() -> None:
    stage = ready()
    stage.group.send(stage.book)
    stage.channel.says.append(stage.drafts(7, 8))
    stage.group.receive(stage.book)
    assert stage.tail.first(9) == (7, 8)
    assert stage.book.take_passes() == (PASS,)
    assert stage.book.take_passes() == ()
    assert stage.group.ranks == ("draft rank 0",)


def test_ranks_that_cannot_load_say_why() -> None:
    def refuse(ranks: Ranks) -> None:
        ranks.channel.refuses = ModelError("no such folder")

    with pytest.raises(ModelError, match="no such folder"):
        ready(prepare=refuse)


def test_what_cannot_even_be_started_is_an_error_too() -> None:
    def fail(ranks: Ranks) -> None:
        raise OSError("no more processes")

    with pytest.raises(EngineError, match="OSError: no more processes"):
        ready(prepare=fail)


@pytest.mark.parametrize("how", ["died", "failed", "nonsense"])
def test_while_ranks_are_started_anew_nothing_waits_and_nothing_is_lost(how: str) -> None:
    stage = ready()
    stage.group.send(stage.book)
    stage.channel.says.append(stage.drafts(7))
    stage.group.receive(stage.book)
    stage.prepare = lambda ranks: ranks.channel.loads.clear()
    if how == "died":
        stage.channel.died = "rank 0 ended with exit code -9"
    elif how == "failed":
        stage.channel.says.append(Tails(rank=0, error="RuntimeError: oh"))
    else:
        wrong = stage.drafts(5)  # in place of the 7 that it said before
        stage.channel.says.append(wrong)
    stage.pass_time(1)
    assert len(stage.tail) == 0
    stage.text += [9, 4]
    stage.tail.commit()
    stage.group.send(stage.book)
    stage.group.receive(stage.book)
    assert stage.group._starting is not None
    deadline_s = time.monotonic() + LONG_S
    while len(stage.started) < 2:
        assert time.monotonic() < deadline_s
    first, second = stage.started
    assert first.killed
    second.channel.loads.set()
    stage.until_started()
    stage.group.send(stage.book)
    (again,) = second.channel.told
    assert isinstance(again, Sync)
    assert again.output_token_ids == (9, 4)
    stage.text.append(5)
    stage.tail.commit()
    stage.group.send(stage.book)
    assert second.channel.told[1:] == [Commit(request_id="a", base=5, token_ids=(5,))]
    assert stage.group.num_restarts == 1


def test_ranks_that_say_nothing_for_too_long_are_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = ready()
    stage.pass_time(SILENT_S)
    assert stage.group.num_restarts == 0
    stage.pass_time(2)
    stage.until_started()
    assert stage.group.num_restarts == 1
    assert "draft rank 0 hangs:\nwaits for Godot" in caplog.text


def test_empty_words_are_words() -> None:
    stage = ready()
    for _ in range(5):
        stage.pass_time(SILENT_S - 2)
        stage.channel.says.append(Tails(rank=0))
        stage.pass_time(1)
    assert stage.group.num_restarts == 0


def test_who_has_not_listened_takes_nobody_for_silent() -> None:
    stage = ready()
    stage.now_s += 10 * SILENT_S
    stage.group.receive(stage.book)
    stage.pass_time(2)
    assert stage.group.num_restarts == 0


def test_ranks_that_end_again_and_again_are_given_up() -> None:
    def die(ranks: Ranks) -> None:
        ranks.channel.died = "rank 0 ended"

    stage = ready(prepare=die)
    for _ in range(MOST_IN_VAIN + 5):
        stage.pass_time(1)
        stage.until_started()
    assert len(stage.started) == MOST_IN_VAIN + 1
    assert all(ranks.killed for ranks in stage.started)
    stage.group.send(stage.book)
    assert stage.channel.told == []
    stage.group.close()


def test_drafts_in_between_make_up_for_earlier_ends() -> None:
    stage = ready()
    for _ in range(MOST_IN_VAIN + 3):
        stage.group.send(stage.book)
        stage.channel.says.append(stage.drafts(7))
        stage.pass_time(1)
        stage.channel.died = "rank 0 ended"
        stage.pass_time(1)
        stage.until_started()
    assert len(stage.started) == MOST_IN_VAIN + 4


def test_ranks_that_come_after_the_end_are_ended() -> None:
    stage = Stage(prepare=lambda ranks: ranks.channel.loads.clear())
    deadline_s = time.monotonic() + LONG_S
    while not stage.started:
        assert time.monotonic() < deadline_s
    closing = threading.Thread(target=stage.group.close)
    closing.start()
    while not stage.group._closed:
        assert time.monotonic() < deadline_s
    stage.channel.loads.set()
    closing.join(LONG_S)
    assert stage.started[0].killed

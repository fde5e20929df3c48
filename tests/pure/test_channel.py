"""Plans reach every rank, results come back, and whatever goes wrong has a name and an end.

Ranks are threads here, over a Unix socket in a temporary folder. A rank's half of the conversation
is a function that gets its `PlanReceiver`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from paceline.runtime import channel
from paceline.runtime.channel import Answer, Hello, PlanReceiver, PlanSender, Ready
from paceline.runtime.errors import (
    DeadlineError,
    EngineError,
    ModelError,
    ShardError,
    UserError,
)
from paceline.runtime.executor import ChannelExecutor
from paceline.runtime.types import (
    WIRE_VERSION,
    Request,
    RequestResult,
    SamplingParams,
    ScheduledRequest,
    StepPlan,
    StepResult,
)

LONG_S = 30.0
"""A deadline that only a hanging test meets."""

PLAN = StepPlan(
    step=3,
    scheduled=(
        ScheduledRequest(
            request_id="a",
            num_tokens=2,
            new_blocks=(4, 2),
            request=Request(
                request_id="a",
                prompt_token_ids=(1, 2),
                params=SamplingParams(),
                seed=5,
                max_tokens=16,
            ),
        ),
    ),
    finished=("b",),
)
RESULT = StepResult(step=3, results=(RequestResult(request_id="a", token_ids=(7, 8)),))

RankLife = Callable[[PlanReceiver], object]


class Ranks:
    """Threads that play ranks, and the sender they talk to."""

    def __init__(self, folder: Path) -> None:
        self.address = f"ipc://{folder}/plans"
        self.died: str | None = None
        self.num_killed = 0
        self.senders: list[PlanSender] = []
        self._threads: list[threading.Thread] = []

    def sender(self, *, num_ranks: int) -> PlanSender:
        made = PlanSender(self.address, num_ranks=num_ranks, watch=lambda: self.died)
        self.senders.append(made)
        return made

    def start(self, *lives: RankLife) -> None:
        """One rank per life, numbered in order."""
        for rank, life in enumerate(lives):
            self._threads.append(threading.Thread(target=self._run, args=(rank, life)))
            self._threads[-1].start()

    def executor(self, *, starts: bool = True, **timeouts: float) -> ChannelExecutor:
        """Over one rank that listens; one that `starts` also says that it is ready."""

        def start() -> _Started:
            made = _Started(self)
            if starts:
                self.start(listen)
            return made

        timeouts = {"load_timeout_s": LONG_S, "step_timeout_s": LONG_S, **timeouts}
        return ChannelExecutor(start, **timeouts)

    def say(self, body: bytes, *, rank: int = 0) -> None:
        """Send raw bytes under a rank's name."""
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.IDENTITY, b"rank-%d" % rank)
            socket.setsockopt(zmq.LINGER, 5000)
            socket.connect(self.address)
            socket.send(body)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(LONG_S)
            assert not thread.is_alive(), "a rank did not end"

    def _run(self, rank: int, life: RankLife) -> None:
        receiver = PlanReceiver(self.address, rank=rank)
        try:
            life(receiver)
        finally:
            receiver.close()


class _Started:
    """Ranks that one executor started."""

    def __init__(self, ranks: Ranks) -> None:
        self.channel = ranks.sender(num_ranks=1)
        self._ranks = ranks

    def stacks(self) -> list[str]:
        return ["in the middle of something"]

    def kill(self) -> None:
        self._ranks.num_killed += 1
        self.close()

    def close(self) -> None:
        self.channel.close()


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(channel, "WATCH_EVERY_MS", 5)
    made = Ranks(tmp_path)
    yield made
    for sender in made.senders:
        sender.close()
    made.join()


def is_ready(receiver: PlanReceiver) -> None:
    receiver.ready("ready", num_blocks=8)


def serve(receiver: PlanReceiver, *, result: StepResult | None = RESULT) -> list[StepPlan]:
    """Say hello, answer every plan with `result`, and end when told to: the plans."""
    receiver.ready("ready", num_blocks=8)
    plans = []
    while (plan := receiver.receive(alive=lambda: True)) is not None:
        plans.append(plan)
        if result is not None:
            receiver.answer(result)
    return plans


def carry_out(sender: PlanSender, *, timeout_s: float, plan: StepPlan = PLAN) -> StepResult:
    sender.send(plan)
    return sender.receive(timeout_s=timeout_s)


def listen(receiver: PlanReceiver) -> None:
    """As `serve`, but answering nothing, as ranks above 0 do."""
    serve(receiver, result=None)


# -------------------------------------------------------------------------------------------- hello


def test_facts_come_in_the_order_of_ranks(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=3)
    ranks.start(
        *(lambda receiver, i=i: receiver.ready(f"facts of {i}", num_blocks=8) for i in range(3))
    )
    ready = sender.wait_for_ranks(timeout_s=LONG_S)
    assert ready == Ready(ranks=("facts of 0", "facts of 1", "facts of 2"), num_blocks=8)


def test_user_error_of_a_rank_is_raised_in_its_own_words(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=2)
    ranks.start(is_ready, lambda receiver: receiver.failed(ModelError("no such tensor")))
    with pytest.raises(UserError) as raised:
        sender.wait_for_ranks(timeout_s=LONG_S)
    assert str(raised.value) == "no such tensor"


def test_other_error_of_a_rank_names_the_rank_and_the_kind(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=2)
    ranks.start(is_ready, lambda receiver: receiver.failed(MemoryError("12 GiB")))
    with pytest.raises(ShardError) as raised:
        sender.wait_for_ranks(timeout_s=LONG_S)
    assert str(raised.value) == "rank 1: MemoryError: 12 GiB"


def test_ranks_that_stay_silent_are_named_at_the_deadline(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=3)
    ranks.start(is_ready)
    ranks.join()  # its hello is on the way
    with pytest.raises(DeadlineError, match=r"waited too long for ranks \[1, 2\] to load"):
        sender.wait_for_ranks(timeout_s=0.5)


def test_rank_that_dies_while_loading_is_named(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=1)
    ranks.died = "rank 0 ended with exit code 9"
    with pytest.raises(ShardError, match=r"exit code 9 while waiting for ranks \[0\] to load"):
        sender.wait_for_ranks(timeout_s=LONG_S)


def test_rank_of_another_version_is_refused(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=1)
    ranks.say(msgspec.msgpack.encode(Hello(rank=0, version=WIRE_VERSION + 1)))
    words = f"speaks version {WIRE_VERSION + 1}, this coordinator {WIRE_VERSION}"
    with pytest.raises(ShardError, match=words):
        sender.wait_for_ranks(timeout_s=LONG_S)


def test_rank_that_does_not_exist_is_refused(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=1)
    ranks.say(msgspec.msgpack.encode(Hello(rank=5)), rank=5)
    with pytest.raises(ShardError, match="rank 5"):
        sender.wait_for_ranks(timeout_s=LONG_S)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"not MessagePack", msgspec.msgpack.encode([1])])
def test_bytes_that_are_no_message_raise_an_engine_error(ranks: Ranks, body: bytes) -> None:
    sender = ranks.sender(num_ranks=1)
    ranks.say(body)
    with pytest.raises(EngineError):
        sender.wait_for_ranks(timeout_s=LONG_S)


# --------------------------------------------------------------------------------------------- step


def test_every_rank_gets_the_plan_and_rank_0_s_result_comes_back(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=2)
    plans: list[list[StepPlan]] = []
    ranks.start(
        lambda receiver: plans.append(serve(receiver)),
        lambda receiver: plans.append(serve(receiver, result=None)),
    )
    sender.wait_for_ranks(timeout_s=LONG_S)
    assert carry_out(sender, timeout_s=LONG_S) == RESULT
    sender.close()
    ranks.join()
    assert plans == [[PLAN], [PLAN]]


def test_only_rank_0_s_result_counts(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=2)
    other = StepResult(step=3, results=(RequestResult(request_id="a", token_ids=(0,)),))
    told = threading.Event()

    def rank_0(receiver: PlanReceiver) -> None:
        receiver.ready("ready", num_blocks=8)
        receiver.receive(alive=lambda: True)
        assert told.wait(LONG_S)
        receiver.answer(RESULT)

    def rank_1(receiver: PlanReceiver) -> None:
        receiver.ready("ready", num_blocks=8)
        receiver.receive(alive=lambda: True)
        receiver.answer(other)
        told.set()

    ranks.start(rank_0, rank_1)
    sender.wait_for_ranks(timeout_s=LONG_S)
    assert carry_out(sender, timeout_s=LONG_S) == RESULT


def test_result_of_an_earlier_step_is_passed_over(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=1)

    def rank_0(receiver: PlanReceiver) -> None:
        receiver.ready("ready", num_blocks=8)
        receiver.receive(alive=lambda: True)
        receiver.answer(StepResult(step=2))
        receiver.answer(RESULT)

    ranks.start(rank_0)
    sender.wait_for_ranks(timeout_s=LONG_S)
    assert carry_out(sender, timeout_s=LONG_S) == RESULT


def test_results_of_plans_sent_together_come_in_their_order(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=1)
    both = threading.Event()

    def rank_0(receiver: PlanReceiver) -> None:
        """Drafts for one plan while another is verified: the answers come from another thread."""
        receiver.ready("ready", num_blocks=8)
        steps = [plan.step for _ in range(2) if (plan := receiver.receive(alive=lambda: True))]
        both.set()

        def verify() -> None:
            for step in steps:
                receiver.answer(StepResult(step=step))

        thread = threading.Thread(target=verify)
        thread.start()
        assert receiver.receive(alive=lambda: True) is None
        thread.join(LONG_S)

    ranks.start(rank_0)
    sender.wait_for_ranks(timeout_s=LONG_S)
    for step in (3, 4):
        sender.send(msgspec.structs.replace(PLAN, step=step))
    assert both.wait(LONG_S), "the second plan is there before the first is answered"
    assert [sender.receive(timeout_s=LONG_S).step for _ in range(2)] == [3, 4]


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_of_any_rank_ends_the_step_and_names_it(ranks: Ranks, failing: int) -> None:
    sender = ranks.sender(num_ranks=2)
    lives: list[RankLife] = [listen, listen]
    failure = StepResult(step=3, error="RuntimeError: out of memory")
    lives[failing] = lambda receiver: serve(receiver, result=failure)
    ranks.start(*lives)
    sender.wait_for_ranks(timeout_s=LONG_S)
    with pytest.raises(ShardError) as raised:
        carry_out(sender, timeout_s=LONG_S)
    assert str(raised.value) == f"rank {failing}: RuntimeError: out of memory"


def test_step_without_an_answer_ends_at_its_deadline(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=1)
    ranks.start(listen)
    sender.wait_for_ranks(timeout_s=LONG_S)
    with pytest.raises(DeadlineError, match="waited too long for step 3"):
        carry_out(sender, timeout_s=0.02)


def test_rank_that_dies_in_a_step_is_named(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=1)
    ranks.start(listen)
    sender.wait_for_ranks(timeout_s=LONG_S)
    ranks.died = "rank 1 ended with exit code -9"
    with pytest.raises(ShardError, match="exit code -9 while waiting for step 3"):
        carry_out(sender, timeout_s=LONG_S)


def test_plan_for_a_rank_that_is_not_there_raises_a_shard_error_that_names_it(
    ranks: Ranks,
) -> None:
    sender = ranks.sender(num_ranks=1)
    with pytest.raises(ShardError, match="rank 0"):
        carry_out(sender, timeout_s=LONG_S)


def test_rank_that_starts_again_in_the_middle_of_a_step_is_noticed(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=1)

    def restarting(receiver: PlanReceiver) -> None:
        receiver.ready("ready", num_blocks=8)
        receiver.receive(alive=lambda: True)
        receiver.ready("ready again", num_blocks=8)

    ranks.start(restarting)
    sender.wait_for_ranks(timeout_s=LONG_S)
    with pytest.raises(ShardError, match="rank 0 started again in the middle of a step"):
        carry_out(sender, timeout_s=LONG_S)


def test_result_of_another_version_is_refused(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=1)
    newer = StepResult(step=3, version=WIRE_VERSION + 1)
    ranks.start(lambda receiver: serve(receiver, result=newer))
    sender.wait_for_ranks(timeout_s=LONG_S)
    with pytest.raises(ShardError, match="mixed installations"):
        carry_out(sender, timeout_s=LONG_S)


def test_plan_of_another_version_is_refused_by_the_rank(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=1)
    refused: list[BaseException] = []

    def rank_0(receiver: PlanReceiver) -> None:
        receiver.ready("ready", num_blocks=8)
        try:
            receiver.receive(alive=lambda: True)
        except EngineError as error:
            refused.append(error)
        receiver.answer(RESULT)

    ranks.start(rank_0)
    sender.wait_for_ranks(timeout_s=LONG_S)
    newer = msgspec.structs.replace(PLAN, version=WIRE_VERSION + 1)
    carry_out(sender, plan=newer, timeout_s=LONG_S)
    ranks.join()
    assert len(refused) == 1


def test_checking_finds_a_rank_that_died_while_there_was_nothing_to_do(ranks: Ranks) -> None:
    executor = ranks.executor()
    executor.check()
    ranks.died = "rank 0 ended with exit code -9"
    with pytest.raises(ShardError, match="rank 0 ended with exit code -9"):
        executor.check()


def test_a_step_that_hangs_is_found_and_the_stacks_of_all_ranks_are_logged(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    executor = ranks.executor(step_timeout_s=0.02)
    executor.send(PLAN)
    with pytest.raises(ShardError, match="step 3: the stacks of all ranks are in the log"):
        executor.receive()
    assert "rank 0 hangs:\nin the middle of something" in caplog.text


def test_other_ranks_take_the_place_of_those_that_ended(ranks: Ranks) -> None:
    executor = ranks.executor()
    ranks.died = "rank 0 ended with exit code -9"
    executor.end_ranks()
    ranks.died = None
    executor.start_ranks()
    executor.check()
    executor.close()


def test_ranks_that_do_not_load_in_time_are_ended(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DeadlineError):
        ranks.executor(load_timeout_s=0.02, starts=False)
    assert "rank 0 hangs" in caplog.text
    assert ranks.num_killed == 1


# ----------------------------------------------------------------------------------------- shutdown


def test_closing_tells_every_rank_to_end(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=2)
    ranks.start(listen, listen)
    sender.wait_for_ranks(timeout_s=LONG_S)
    sender.close()
    ranks.join()


def test_closing_twice_is_safe(ranks: Ranks) -> None:
    sender = ranks.sender(num_ranks=1)
    sender.close()
    sender.close()


def test_closing_does_not_wait_for_ranks_that_never_came(ranks: Ranks) -> None:
    ranks.sender(num_ranks=4).close()


def test_rank_ends_when_its_coordinator_is_gone(ranks: Ranks) -> None:
    plans: list[StepPlan | None] = []
    ranks.sender(num_ranks=1)
    ranks.start(lambda receiver: plans.append(receiver.receive(alive=lambda: False)))
    ranks.join()
    assert plans == [None]


def test_answer_names_its_rank_and_is_told_from_a_hello() -> None:
    body = msgspec.msgpack.encode(Answer(rank=1, result=RESULT))
    assert msgspec.msgpack.decode(body, type=Hello | Answer) == Answer(rank=1, result=RESULT)


def test_negative_rank_is_refused_on_arrival() -> None:
    body = msgspec.msgpack.encode({"type": "hello", "rank": -1})
    with pytest.raises(msgspec.ValidationError, match=">= 0"):
        msgspec.msgpack.decode(body, type=Hello | Answer)

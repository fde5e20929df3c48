"""Plans out to every rank, one result back for each, in order: MessagePack over ZMQ, without Ray.

    coordinator   ROUTER  ── plan ──>  DEALER   rank 0
                          ── plan ──>  DEALER   rank 1
                          <─ hello ──           once per rank, when its models are loaded, or why they are not
                          <─ result ─           rank 0, after every plan; any rank, if it fails

On one host over a Unix socket, else TCP: about 20 us each way. Messages are checked against their
types and their version on arrival, and nothing is unpickled.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import zmq

from paceline.runtime.errors import DeadlineError, ShardError, UserError
from paceline.runtime.types import WIRE_VERSION, StepPlan, StepResult, WireType

WATCH_EVERY_MS = 500
"""How often a wait looks whether those it waits for are still alive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAddresses:
    """Where a rank finds its coordinator."""

    plans: str
    links: str | None = None
    """For the rank's KV link, where the engine has any."""
    drafts: bool = False
    """Whether it is a rank of a drafter that is ahead, which takes orders instead of plans."""


class Hello(WireType, frozen=True, kw_only=True, tag="hello"):
    """A rank is ready, or why it never will be."""

    rank: Annotated[int, msgspec.Meta(ge=0)]
    error: str | None = None
    user_error: bool = False
    """Whether the user can mend it."""
    facts: str = ""
    """What a person may want to know: device, data types, collectives."""
    num_blocks: int = 0
    """KV blocks of each pool; all ranks agree."""
    on_gpu: bool = False
    """Whether it leaves the cores of its machine to others, mostly."""
    version: int = WIRE_VERSION


class Answer(WireType, frozen=True, kw_only=True, tag="answer"):
    """A rank's result of a plan."""

    rank: Annotated[int, msgspec.Meta(ge=0)]
    result: StepResult


class Ready(WireType, frozen=True, kw_only=True):
    """All ranks are loaded."""

    ranks: tuple[str, ...]
    """What each said of itself."""
    num_blocks: int
    on_gpu: bool = False
    """Whether they compute on GPUs."""


_plans_in = msgspec.msgpack.Decoder(StepPlan)
_answers_in = msgspec.msgpack.Decoder(Hello | Answer)
_out = msgspec.msgpack.Encoder()


class RankSender:
    """The coordinator's end of a channel to ranks, whatever is said over it. `watch` names a rank that
    died, or returns None; it is asked while waiting."""

    _name = "rank"
    _words_in: msgspec.msgpack.Decoder[Any]
    """What ranks may say: `Hello`, and what has a `rank` and a version."""
    _last_word: bytes
    """Tells a rank to end."""

    def __init__(self, address: str, *, num_ranks: int, watch: Callable[[], str | None]) -> None:
        """Binds `address`, such as `ipc:///tmp/x` or `tcp://10.0.0.1:*`; `self.address` is what
        ranks connect to."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 1 << 26)
        self._socket.bind(address)
        self.address = str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._identities = [_identity(rank) for rank in range(num_ranks)]
        self._watch = watch

    def wait_for_ranks(self, *, timeout_s: float) -> Ready:
        """What every rank said, once all are ready.

        Raises UserError or ShardError with the first rank's own words, DeadlineError if some stay
        silent.
        """
        facts: dict[int, str] = {}
        num_blocks, on_gpu = 0, False
        deadline = time.monotonic() + timeout_s
        while len(facts) < len(self._identities):
            missing = sorted(set(range(len(self._identities))) - set(facts))
            hello = self._receive(deadline, waiting_for=f"ranks {missing} to load")
            if not isinstance(hello, Hello):
                continue
            if hello.error is not None:
                kind = UserError if hello.user_error else ShardError
                raise kind(hello.error if hello.user_error else f"rank {hello.rank}: {hello.error}")
            facts[hello.rank] = hello.facts
            num_blocks, on_gpu = hello.num_blocks, hello.on_gpu
        ranks = tuple(facts[rank] for rank in range(len(self._identities)))
        return Ready(ranks=ranks, num_blocks=num_blocks, on_gpu=on_gpu)

    def check(self) -> None:
        """Raise ShardError if a rank is gone."""
        if (gone := self._watch()) is not None:
            raise ShardError(gone)

    def close(self) -> None:
        """Tell the ranks to end, without waiting for them."""
        if self._socket.closed:
            return
        self._socket.setsockopt(zmq.LINGER, 500)
        for identity in self._identities:
            try:
                self._socket.send_multipart((identity, self._last_word), zmq.DONTWAIT)
            except zmq.ZMQError:  # that rank never came or is gone
                continue
        self._socket.close()
        self._context.term()

    def _receive(self, deadline: float, *, waiting_for: str) -> Any:
        """A rank's next word, one of `_words_in`."""
        while not self._socket.poll(WATCH_EVERY_MS):
            dead = self._watch()
            if dead is not None:
                raise ShardError(f"{dead} while waiting for {waiting_for}")
            if time.monotonic() > deadline:
                raise DeadlineError(f"waited too long for {waiting_for}")
        _, body = self._socket.recv_multipart()
        try:
            message = self._words_in.decode(body)
        except msgspec.DecodeError as error:
            raise ShardError(f"a rank sent what is no message: {error}") from None
        if message.rank >= len(self._identities):
            raise ShardError(f"rank {message.rank} spoke, of {len(self._identities)}")
        version = message.result.version if isinstance(message, Answer) else message.version
        if version != WIRE_VERSION:
            raise ShardError(
                f"a rank speaks version {version}, this coordinator {WIRE_VERSION}: mixed installations"
            )
        return message

    def _say(self, body: bytes, *, what: str, flags: int = 0) -> None:
        """The same to every rank. Raises ShardError if one is gone."""
        for rank, identity in enumerate(self._identities):
            try:
                self._socket.send_multipart((identity, body), flags)
            except zmq.ZMQError:  # no such peer any more, or one that has stopped listening
                gone = self._watch() or f"{self._name} {rank} is gone"
                raise ShardError(f"{gone}, found when sending {what}") from None


class PlanSender(RankSender):
    """The coordinator's end."""

    _words_in = _answers_in
    _last_word = _out.encode(StepPlan(step=-1, scheduled=(), shutdown=True))

    def __init__(self, address: str, *, num_ranks: int, watch: Callable[[], str | None]) -> None:
        """See `RankSender`."""
        super().__init__(address, num_ranks=num_ranks, watch=watch)
        self._sent: deque[int] = deque()
        """Steps without a result."""

    def send(self, plan: StepPlan) -> None:
        """Send a plan to every rank, which may still be at work on earlier ones. Raises ShardError."""
        self._say(_out.encode(plan), what=f"step {plan.step}")
        self._sent.append(plan.step)

    def receive(self, *, timeout_s: float) -> StepResult:
        """Rank 0's result of the earliest plan that has none yet. Raises ShardError with any rank's
        failure, DeadlineError."""
        step = self._sent.popleft()
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self._receive(deadline, waiting_for=f"step {step}")
            if isinstance(answer, Hello):
                raise ShardError(f"rank {answer.rank} started again in the middle of a step")
            if answer.result.error is not None:
                raise ShardError(
                    f"rank {answer.rank}: {answer.result.error}",
                    out_of_memory=answer.result.out_of_memory,
                )
            result: StepResult = answer.result
            if answer.rank == 0 and result.step == step:
                return result


class RankReceiver:
    """A rank's end of a channel."""

    def __init__(self, address: str, *, rank: int) -> None:
        self._rank = rank
        self._context = zmq.Context()
        self._socket = self._connect(address)

    def _connect(self, address: str, *, identity: bool = True) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        if identity:
            socket.setsockopt(zmq.IDENTITY, _identity(self._rank))
        socket.setsockopt(zmq.LINGER, 1000)
        socket.setsockopt(zmq.MAXMSGSIZE, 1 << 26)
        socket.connect(address)
        return socket

    def ready(self, facts: str, *, num_blocks: int, on_gpu: bool = False) -> None:
        hello = Hello(rank=self._rank, facts=facts, num_blocks=num_blocks, on_gpu=on_gpu)
        self._socket.send(_out.encode(hello))

    def failed(self, error: BaseException) -> None:
        """Say why this rank cannot load."""
        user = isinstance(error, UserError)
        words = str(error) if user else f"{type(error).__name__}: {error}"
        self._socket.send(_out.encode(Hello(rank=self._rank, error=words, user_error=user)))

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class PlanReceiver(RankReceiver):
    """A rank's end. `answer` may be called from another thread than the rest: it has a socket of its
    own."""

    def __init__(self, address: str, *, rank: int) -> None:
        super().__init__(address, rank=rank)
        self._answers = self._connect(address, identity=False)

    def receive(self, *, alive: Callable[[], bool]) -> StepPlan | None:
        """The next plan; None when the coordinator said so or `alive` says that it is gone."""
        while not self._socket.poll(WATCH_EVERY_MS):
            if not alive():
                return None
        plan = _plans_in.decode(self._socket.recv())
        if plan.version != WIRE_VERSION:
            raise ShardError(
                f"the coordinator speaks version {plan.version}, this rank {WIRE_VERSION}: mixed installations"
            )
        return None if plan.shutdown else plan

    def answer(self, result: StepResult) -> None:
        self._answers.send(_out.encode(Answer(rank=self._rank, result=result)))

    def close(self) -> None:
        self._answers.close()
        super().close()


def _identity(rank: int) -> bytes:
    return b"rank-%d" % rank

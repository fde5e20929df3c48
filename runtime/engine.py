"""The engine: schedule, execute, update, again. The file to read first.

    submit(request) ──> scheduler ──StepPlan──> executor ──> every rank
                           ^  ^                                 │
    list[TokenDelta] <─────┘  └──────────StepResult─────────────┘

Where two plans may be in flight, the next one is made and sent before the result of the last is waited
for, so that ranks always have one.

and, where prompts are read on one engine for another:

    scheduler ──Offer, Fetch──> links of all ranks ──TransferEnd──> scheduler

and, where the drafter is ahead:

    scheduler ──Sync, Commit, Close──> draft ranks ──Tails──> scheduler

Holds no tensors and no device. What may be added here: the order of a step's parts, nothing about
how any is done.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from paceline.runtime.ahead.group import DraftGroup
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import EngineError, PromptError, ShardError
from paceline.runtime.executor import Executor
from paceline.runtime.schedule.scheduler import Scheduler, make_scheduler
from paceline.runtime.transfer.control import KvControl
from paceline.runtime.types import EngineStatus, KvLinks, Request, StepPlan, TokenDelta

logger = logging.getLogger(__name__)

MOST_IN_VAIN = 5
"""How often ranks are started anew without a token in between."""
IDLE_STEP_S = 10.0
"""After so long without one, an idle engine takes a step."""
LINKS_S = 60.0
"""How long the KV links of new ranks may take to serve."""


class EngineClient(Protocol):
    """An engine, wherever it runs. `submit` and `abort` may be called from other threads than
    `poll`."""

    def submit(self, requests: list[Request]) -> None:
        """Queue requests. Each will end in exactly one delta with a finish reason."""

    def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:
        """New tokens since the last call; waits up to `wait_s` for some. Raises EngineError if the
        engine is lost."""

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests; each still ends in its one terminal delta."""

    def status(self) -> EngineStatus:
        """The latest known; its `steps` are those since the last call."""

    def close(self) -> None:
        """Free everything the engine holds. Safe to call twice."""


class Engine:
    """Satisfies `EngineClient` in this process: `poll` runs one step. Not for several threads.

    When a rank ends or hangs, all are started anew and every request goes on after its last token.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        links: KvControl | None = None,
        ahead: DraftGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`links` lead to the ranks' KV links, `ahead` to ranks that only draft."""
        self.scheduler = scheduler
        self.executor = executor
        self.links = links
        self.ahead = ahead
        self.stalled = False
        """Whether the last step found nothing to do before a command comes or a transfer ends."""
        self.failure: ShardError | None = None
        """Why the ranks are to be started anew, by the next `poll`."""
        self._ended: list[TokenDelta] = []
        """Terminal deltas of requests that no step ended."""
        self._in_flight: deque[StepPlan] = deque()
        """Plans whose results are to come."""
        self._clock = clock
        self._stepped_s = clock()
        self._num_restarts = 0
        self._in_vain = 0
        """Restarts since there was a token."""

    @property
    def has_work(self) -> bool:
        if self._ended or self.failure is not None:
            return True
        return self.scheduler.has_work and not self.stalled

    def submit(self, requests: list[Request]) -> None:
        for request in requests:
            try:
                self.scheduler.add(request)
            except PromptError as error:
                self._ended.append(
                    TokenDelta(
                        request_id=request.request_id, finish_reason="error", error=str(error)
                    )
                )

    def abort(self, request_ids: list[str]) -> None:
        deltas = (self.scheduler.abort(request_id) for request_id in request_ids)
        self._ended += [delta for delta in deltas if delta is not None]
        self._order()

    def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:  # noqa: ARG002 nothing to wait for
        """Raises EngineError where ranks cannot be started anew, or end again and again."""
        ended, self._ended = self._ended, []
        try:
            if self.failure is not None:
                return ended + self._restart(self.failure)
            for end in self.links.receive() if self.links is not None else ():
                ended += self.scheduler.transferred(end)
            return ended + (self.step() if self.scheduler.has_work else [])
        except ShardError as error:
            self._fail(error)
            return ended

    def step(self) -> list[TokenDelta]:
        """Plan as many steps as may be in flight, and end the earliest. Raises ShardError."""
        while self.scheduler.may_plan:
            self._hear_drafter()
            plan = self.scheduler.schedule()
            self._order()  # before the step: links follow it layer by layer
            if not (plan.scheduled or plan.finished):
                break
            self._send(plan)
        self.stalled = not self._in_flight
        if self.stalled:
            return []
        deltas = self._receive()
        self._order()
        if deltas:
            self._in_vain = 0
        return deltas

    def check(self) -> None:
        """Look whether all ranks live, and now and then whether they work; asked while there is nothing
        to do."""
        self._hear_drafter()
        try:
            self.executor.check()
            if not self.scheduler.has_work and self._clock() - self._stepped_s >= IDLE_STEP_S:
                # of nobody: a rank that hangs is found before somebody waits for it
                self._send(self.scheduler.schedule())
                self._receive()
        except ShardError as error:
            self._fail(error)

    def _send(self, plan: StepPlan) -> None:
        self._stepped_s = self._clock()
        self.executor.send(plan)
        self._in_flight.append(plan)

    def _receive(self) -> list[TokenDelta]:
        plan = self._in_flight.popleft()
        result = self.executor.receive()
        if result.error is not None:
            raise ShardError(result.error, out_of_memory=result.out_of_memory)
        return self.scheduler.update(plan, result)

    def _fail(self, failure: ShardError) -> None:
        logger.error("the ranks are started anew: %s", failure)
        self.failure = failure

    def _restart(self, failure: ShardError) -> list[TokenDelta]:
        """Start all ranks anew: what a dead one leaves behind in the others, nobody knows."""
        self._in_vain += 1
        if self._in_vain > MOST_IN_VAIN:
            raise EngineError(
                f"ranks ended {self._in_vain} times in a row without a token: {failure}"
            )
        self.executor.end_ranks()
        self._in_flight.clear()
        if self.links is not None:
            self.links.lose_all()
        self.executor.start_ranks()
        if self.links is not None:
            self.links.wait_ready(timeout_s=LINKS_S, check=self.executor.check)
        deltas = self.scheduler.restart(
            self.executor.num_blocks, out_of_memory=failure.out_of_memory
        )
        self.failure, self.stalled = None, False
        self._num_restarts += 1
        self._order()
        logger.warning("the ranks are back, %d requests go on", self.scheduler.num_requests)
        return deltas

    def _order(self) -> None:
        """Pass on what the scheduler wants of the links, and of draft ranks."""
        if self.links is not None:
            self.links.send(self.scheduler.transfers.take_orders())
        if self.ahead is not None and self.scheduler.tails is not None:
            self.ahead.send(self.scheduler.tails)

    def _hear_drafter(self) -> None:
        """Take the drafts that are there."""
        if self.ahead is not None and self.scheduler.tails is not None:
            self.ahead.receive(self.scheduler.tails)

    def status(self) -> EngineStatus:
        links = KvLinks() if self.links is None else self.links.links
        ahead = self.ahead
        return msgspec.structs.replace(
            self.scheduler.status(),
            ranks=self.executor.ranks + (() if ahead is None else ahead.ranks),
            links=links,
            num_restarts=self._num_restarts + (0 if ahead is None else ahead.num_restarts),
            restarting=self.failure is not None,
        )

    def close(self) -> None:
        self.executor.close()
        if self.ahead is not None:
            self.ahead.close()
        if self.links is not None:
            self.links.close()


def make_engine(
    config: EngineConfig,
    executor: Executor,
    links: KvControl | None,
    max_model_len: int,
    *,
    ahead: DraftGroup | None = None,
) -> Engine:
    """An engine over ranks that are loaded, once their KV links serve and draft ranks have loaded too.
    Closes all if they do not."""
    try:
        if links is not None:
            links.wait_ready(timeout_s=config.load_timeout_s, check=executor.check)
        if ahead is not None:
            ahead.wait_ready()
        wanted = config.async_scheduling
        if wanted and not executor.apart:
            logger.warning("async_scheduling has no effect: this process has the only rank")
        scheduler = make_scheduler(
            config,
            max_model_len=max_model_len,
            num_blocks=executor.num_blocks,
            async_scheduling=executor.apart and (executor.on_gpu if wanted is None else wanted),
        )
    except BaseException:
        executor.close()
        if links is not None:
            links.close()
        if ahead is not None:
            ahead.close()
        raise
    return Engine(scheduler, executor, links=links, ahead=ahead)

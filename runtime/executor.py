"""How an engine reaches its workers: plans in, results out; and workers anew where some ended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from paceline.runtime.channel import PlanSender
from paceline.runtime.errors import DeadlineError, ShardError
from paceline.runtime.types import StepPlan, StepResult

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Plans are carried out in the order in which they were sent. Several may be under way at once, if
    no two of them have a request in common; those that have wait for each other."""

    apart: bool
    """Whether plans are carried out while this process does something else."""
    on_gpu: bool
    """Of ranks apart: whether they leave this process a core to do that."""
    num_blocks: int
    """KV blocks of each pool."""
    ranks: tuple[str, ...]
    """What each rank said of itself."""

    def send(self, plan: StepPlan) -> None:
        """Have a plan carried out. Raises ShardError if a rank cannot be reached."""

    def receive(self) -> StepResult:
        """The result of the earliest plan that has none yet. Blocks until rank 0 is done with it, and
        raises ShardError if a rank cannot be."""

    def check(self) -> None:
        """Raise ShardError if a rank is gone; asked while there is nothing to do."""

    def end_ranks(self) -> None:
        """End every rank, those included that hang. Only `start_ranks` or `close` may follow."""

    def start_ranks(self) -> None:
        """Start all of them anew, with nothing in their memory. Raises EngineError or UserError."""

    def close(self) -> None:
        """Let the workers go. Safe to call twice."""


class Ranks(Protocol):
    """The processes of all ranks, started together: if one ends, all are ended."""

    channel: PlanSender

    def stacks(self) -> list[str]:
        """What each rank is doing, in order."""

    def kill(self) -> None:
        """End every process now, and close the channel."""

    def close(self) -> None:
        """Let every process end, and close the channel. Safe to call twice."""


class ChannelExecutor:
    """Satisfies `Executor` with ranks in processes of their own, wherever those are."""

    apart = True

    def __init__(
        self, start: Callable[[], Ranks], *, load_timeout_s: float, step_timeout_s: float
    ) -> None:
        """`start` sets all ranks to work; returns when they are loaded. Raises UserError or
        EngineError, with none left."""
        self._start = start
        self._load_timeout_s = load_timeout_s
        self._step_timeout_s = step_timeout_s
        self.num_blocks, self.on_gpu = 0, False
        self.ranks: tuple[str, ...] = ()
        self._running: Ranks
        self.start_ranks()

    def send(self, plan: StepPlan) -> None:
        self._running.channel.send(plan)

    def receive(self) -> StepResult:
        try:
            return self._running.channel.receive(timeout_s=self._step_timeout_s)
        except DeadlineError as error:
            self._log_stacks()
            raise ShardError(f"{error}: the stacks of all ranks are in the log") from None

    def check(self) -> None:
        self._running.channel.check()

    def end_ranks(self) -> None:
        self._running.kill()

    def start_ranks(self) -> None:
        self._running = self._start()
        try:
            ready = self._running.channel.wait_for_ranks(timeout_s=self._load_timeout_s)
        except BaseException as error:
            if isinstance(error, DeadlineError):
                self._log_stacks()
            self._running.kill()  # while it loads a rank does not hear that it shall end
            raise
        self.num_blocks, self.ranks, self.on_gpu = ready.num_blocks, ready.ranks, ready.on_gpu

    def close(self) -> None:
        self._running.close()

    def _log_stacks(self) -> None:
        """Before the ranks are ended: where each of them hangs."""
        for rank, stack in enumerate(self._running.stacks()):
            logger.error("rank %d hangs:\n%s", rank, stack)

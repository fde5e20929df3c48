"""The draft ranks as the engine loop sees them: told of everything, listened to, never waited for.

    starting ──all loaded──> drafting ──one ends, hangs or errs──> starting ...

They are started in a thread of their own, so while they are started anew requests go on without
drafts. What was told to ranks that are gone is told again to the next ones.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from paceline.runtime.ahead.channel import OrderSender
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import DeadlineError, EngineError, PacelineError, ShardError
from paceline.runtime.schedule.tails import TailBook

logger = logging.getLogger(__name__)

MOST_IN_VAIN = 5
"""How often draft ranks are started anew without a draft in between; then they are given up."""
WATCH_EVERY_S = 0.5
CLOSE_S = 5.0


def shared_cores(config: EngineConfig) -> tuple[int | None, bool]:
    """Threads of each rank on a CPU, if it should not choose itself, and whether ranks may spin while
    they wait. Where the drafter is ahead two worlds share a host's cores, and neither sees the other."""
    num_threads, may_spin = config.cpu_threads, not config.disable_custom_all_reduce
    if config.drafts_ahead:
        num_cores = os.cpu_count() or 1
        num_threads = num_threads or max(1, num_cores // config.num_ranks)
        may_spin = may_spin and config.num_ranks <= num_cores
    return num_threads, may_spin


class DraftRanks(Protocol):
    """The processes of all draft ranks, started together, as `Ranks` are."""

    channel: OrderSender

    def stacks(self) -> list[str]:
        """What each is doing, in order."""

    def kill(self) -> None:
        """End every process now, and close the channel."""

    def close(self) -> None:
        """Let every process end, and close the channel. Safe to call twice."""


class DraftGroup:
    """For the engine loop's thread alone, but for what starts ranks."""

    def __init__(
        self,
        start: Callable[[], DraftRanks],
        *,
        load_timeout_s: float,
        step_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start` sets all draft ranks to work. They load while the caller does something else."""
        self._start_ranks = start
        self._load_timeout_s, self._step_timeout_s = load_timeout_s, step_timeout_s
        self._clock = clock
        self.ranks: tuple[str, ...] = ()
        """What each said of itself."""
        self.num_restarts = 0
        self._in_vain = 0
        self._running: DraftRanks | None = None
        self._failure: PacelineError | None = None
        self._closed = False
        self._heard_s = self._watched_s = clock()
        self._starting: threading.Thread | None = self._start(None)

    def wait_ready(self) -> None:
        """Until all have loaded, for the first time. Raises UserError or EngineError if they do not."""
        assert self._starting is not None, "expected ranks that are being started"
        self._starting.join()
        self._starting = None
        if self._failure is not None:
            raise self._failure
        self._heard_s = self._clock()

    def send(self, book: TailBook) -> None:
        """Tell the draft ranks what has happened."""
        if self._running is None or self._starting is not None:
            return
        try:
            if orders := book.take_orders():
                self._running.channel.send(orders)
        except ShardError as error:
            self._restart(error, book)

    def receive(self, book: TailBook) -> None:
        """Hand over the drafts that have come. Waits for nothing."""
        if self._starting is not None:
            self._look_whether_started(book)
        if self._running is None or self._starting is not None:
            return
        try:
            for tails in self._running.channel.take():
                book.receive(tails)
                self._heard_s = self._clock()
                if tails.tails:
                    self._in_vain = 0
            self._watch(self._running)
        except EngineError as error:
            self._restart(error, book)

    def close(self) -> None:
        """End the ranks. Safe to call twice."""
        self._closed = True
        if self._starting is not None:
            self._starting.join(CLOSE_S)  # ranks that come later are ended by their thread
        if self._running is not None:
            self._running.close()
            self._running = None

    def _watch(self, running: DraftRanks) -> None:
        """Raise EngineError where a rank has ended, or says nothing although it should."""
        now_s = self._clock()
        quiet_s = now_s - self._watched_s
        if quiet_s < WATCH_EVERY_S:
            return
        self._watched_s = now_s
        running.channel.check()
        if quiet_s > self._step_timeout_s:  # nobody listened
            self._heard_s = now_s
        if now_s - self._heard_s > self._step_timeout_s:
            for rank, stack in enumerate(running.stacks()):
                logger.error("draft rank %d hangs:\n%s", rank, stack)
            raise DeadlineError(f"the drafter said nothing for {self._step_timeout_s:.0f} s")

    # ---------------------------------------------------------------------------------------- starts

    def _restart(self, error: EngineError, book: TailBook) -> None:
        ended, self._running = self._running, None
        book.forget()
        self._in_vain += 1
        self.num_restarts += 1
        if self._in_vain > MOST_IN_VAIN:
            logger.error("draft ranks end again and again, so nothing is drafted: %s", error)
            if ended is not None:
                ended.kill()
            return
        logger.error("the draft ranks are started anew: %s", error)
        self._starting = self._start(ended)

    def _start(self, ended: DraftRanks | None) -> threading.Thread:
        """Start ranks in a thread, once those that `ended` have been killed."""

        def run() -> None:
            running = None
            try:
                if ended is not None:
                    ended.kill()
                running = self._start_ranks()
                ready = running.channel.wait_for_ranks(timeout_s=self._load_timeout_s)
                self.ranks = ready.ranks
            except PacelineError as error:
                self._failure = error
            except Exception as error:  # whatever it is, who waits for the ranks must hear of it
                self._failure = EngineError(f"{type(error).__name__}: {error}")
            if running is not None and (self._failure is not None or self._closed):
                running.kill()
            elif running is not None:
                self._running = running

        self._failure = None
        thread = threading.Thread(target=run, name="draft ranks' start", daemon=True)
        thread.start()
        return thread

    def _look_whether_started(self, book: TailBook) -> None:
        assert self._starting is not None
        if self._starting.is_alive():
            return
        self._starting.join()
        self._starting = None
        self._heard_s = self._watched_s = self._clock()
        if self._failure is not None:
            self._restart(EngineError(str(self._failure)), book)
        else:
            logger.warning("the draft ranks are back")

"""The engine: schedule, execute, update, again. The file to read first.

    submit(request) ──> scheduler ──StepPlan──> executor ──> every rank
                           ^  ^                                 │
    list[TokenDelta] <─────┘  └──────────StepResult─────────────┘

and, where prompts are read on one engine for another:

    scheduler ──Offer, Fetch──> links of all ranks ──TransferEnd──> scheduler

Holds no tensors and no device. What may be added here: the order of a step's parts, nothing about
how any is done.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from paceline.runtime.errors import PromptError, ShardError
from paceline.runtime.executor import Executor
from paceline.runtime.schedule.scheduler import Scheduler
from paceline.runtime.transfer.control import KvControl
from paceline.runtime.types import EngineStatus, KvLinks, Request, TokenDelta


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
    """Satisfies `EngineClient` in this process: `poll` runs one step. Not for several threads."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        ranks: tuple[str, ...] = (),
        links: KvControl | None = None,
    ) -> None:
        """`ranks` is what each rank said of itself; `links` lead to their KV links."""
        self.scheduler = scheduler
        self.executor = executor
        self.links = links
        self.stalled = False
        """Whether the last step found nothing to do before a command comes or a transfer ends."""
        self._ranks = ranks
        self._ended: list[TokenDelta] = []
        """Terminal deltas of requests that no step ended."""

    @property
    def has_work(self) -> bool:
        return bool(self._ended) or (self.scheduler.has_work and not self.stalled)

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
        ended, self._ended = self._ended, []
        for end in self.links.receive() if self.links is not None else ():
            ended += self.scheduler.transferred(end)
        return ended + (self.step() if self.scheduler.has_work else [])

    def step(self) -> list[TokenDelta]:
        """One step for whatever is scheduled."""
        plan = self.scheduler.schedule()
        self._order()  # before the step: links follow it layer by layer
        self.stalled = not (plan.scheduled or plan.finished)
        if self.stalled:
            return []
        result = self.executor.step(plan)
        if result.error is not None:
            raise ShardError(result.error)
        deltas = self.scheduler.update(plan, result)
        self._order()
        return deltas

    def _order(self) -> None:
        """Pass on what the scheduler wants of the links."""
        if self.links is not None:
            self.links.send(self.scheduler.transfers.take_orders())

    def status(self) -> EngineStatus:
        links = KvLinks() if self.links is None else self.links.links
        return msgspec.structs.replace(self.scheduler.status(), ranks=self._ranks, links=links)

    def close(self) -> None:
        self.executor.close()
        if self.links is not None:
            self.links.close()

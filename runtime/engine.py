"""The engine: schedule, execute, update, again. The file to read first.

    submit(request) ──> scheduler ──StepPlan──> executor ──> every rank
                            ^                                   │
    list[TokenDelta] <──────┴────────────StepResult─────────────┘

Holds no tensors and no device. What may be added here: the order of a step's parts, nothing about
how any is done.
"""

from __future__ import annotations

from typing import Protocol

from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import ShardError
from paceline.runtime.executor import Executor
from paceline.runtime.schedule.scheduler import Scheduler
from paceline.runtime.types import Request, TokenDelta


class EngineClient(Protocol):
    """An engine, wherever it runs."""

    def submit(self, requests: list[Request]) -> None:
        """Queue requests. Each will end in exactly one delta with a finish reason."""

    def poll(self) -> list[TokenDelta]:
        """New tokens since the last call; waits a little for some. Raises EngineError if the engine
        is lost."""

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests; each still ends in its one terminal delta."""

    def close(self) -> None:
        """Free everything the engine holds. Safe to call twice."""


def make_scheduler(config: EngineConfig, *, max_model_len: int) -> Scheduler:
    """The scheduler a config asks for: one request at a time, first come, first served."""
    spec = config.speculative_config
    return Scheduler(
        num_regions=1,
        max_model_len=max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_draft_tokens=0 if spec is None else spec.num_speculative_tokens,
    )


class Engine:
    """Satisfies `EngineClient` in this process: `poll` runs one step."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self._aborted: list[TokenDelta] = []

    def submit(self, requests: list[Request]) -> None:
        for request in requests:
            self.scheduler.add(request)

    def abort(self, request_ids: list[str]) -> None:
        deltas = (self.scheduler.abort(request_id) for request_id in request_ids)
        self._aborted += [delta for delta in deltas if delta is not None]

    def poll(self) -> list[TokenDelta]:
        aborted, self._aborted = self._aborted, []
        return aborted + (self.step() if self.scheduler.has_work else [])

    def step(self) -> list[TokenDelta]:
        """One step for whatever is scheduled."""
        plan = self.scheduler.schedule()
        result = self.executor.step(plan)
        if result.error is not None:
            raise ShardError(result.error)
        return self.scheduler.update(plan, result)

    def close(self) -> None:
        self.executor.close()

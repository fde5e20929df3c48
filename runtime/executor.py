"""How an engine reaches its workers: one plan in, one result out."""

from __future__ import annotations

from typing import Protocol

from paceline.runtime.channel import PlanSender
from paceline.runtime.types import StepPlan, StepResult


class Executor(Protocol):
    """`step` blocks until every rank has carried the plan out, and raises EngineError if one
    cannot."""

    def step(self, plan: StepPlan) -> StepResult: ...

    def check(self) -> None:
        """Raise EngineError if a rank is gone; asked while there is nothing to do."""

    def close(self) -> None:
        """Let the workers go. Safe to call twice."""


class ChannelExecutor:
    """Ranks in processes of their own, wherever those are. Whoever started them ends them."""

    def __init__(self, channel: PlanSender, *, step_timeout_s: float) -> None:
        self._channel = channel
        self._timeout_s = step_timeout_s

    def step(self, plan: StepPlan) -> StepResult:
        return self._channel.step(plan, timeout_s=self._timeout_s)

    def check(self) -> None:
        self._channel.check()

    def close(self) -> None:
        self._channel.close()

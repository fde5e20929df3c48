"""Which request gets how many tokens in the next step.

What may be added here: decisions that need only counts and ids. The scheduler imports neither
torch, numpy nor Ray, so every policy can be tested in ten lines.

A step is `{request: number of tokens}`: a prompt chunk, or the last committed token with a draft
budget on top.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from paceline.runtime.schedule.request import RunningRequest
from paceline.runtime.types import (
    Request,
    ScheduledRequest,
    StepPlan,
    StepResult,
    TokenDelta,
)


class Scheduler:
    """First come, first served, over as many KV regions as there are.

    `schedule` and `update` alternate: every plan is answered before the next is made.
    """

    def __init__(
        self,
        *,
        num_regions: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        num_draft_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._max_model_len = max_model_len
        self._chunk = max_num_batched_tokens
        self._num_draft_tokens = num_draft_tokens
        self._clock = clock
        self._waiting: deque[Request] = deque()
        self._running: dict[str, RunningRequest] = {}
        self._free = list(range(num_regions))
        self._num_regions = num_regions
        self._finished: list[str] = []
        self._step = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        """Queue a request. It must fit `max_model_len`; the caller has checked."""
        total = len(request.prompt_token_ids) + request.params.max_tokens
        assert total <= self._max_model_len, (
            f"expected at most {self._max_model_len} tokens, found {total}"
        )
        assert request.request_id not in self._running, f"{request.request_id} is here already"
        self._waiting.append(request)

    def abort(self, request_id: str) -> TokenDelta | None:
        """Drop a request wherever it is; its terminal delta, or None if it is not here."""
        if request_id in self._running:
            metrics = self._running[request_id].metrics(now_s=self._clock())
            self._release(request_id)
            return TokenDelta(
                request_id=request_id, token_ids=(), finish_reason="abort", metrics=metrics
            )
        for request in self._waiting:
            if request.request_id == request_id:
                self._waiting.remove(request)
                return TokenDelta(request_id=request_id, token_ids=(), finish_reason="abort")
        return None

    def schedule(self) -> StepPlan:
        """The next step. Moves waiting requests into free regions."""
        while self._waiting and self._free:
            request = self._waiting.popleft()
            self._running[request.request_id] = RunningRequest(
                request=request, region=self._free.pop(), started_s=self._clock()
            )
        scheduled = tuple(self._share(running) for running in self._running.values())
        plan = StepPlan(step=self._step, scheduled=scheduled, finished=tuple(self._finished))
        self._finished.clear()
        self._step += 1
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take a step's tokens; one delta per request that got any. Ends requests and frees their
        regions."""
        assert result.step == plan.step, (
            f"expected the result of step {plan.step}, found {result.step}"
        )
        now_s = self._clock()
        deltas = []
        for share, each in zip(plan.scheduled, result.results, strict=True):
            running = self._running[each.request_id]
            running.announced = True
            running.num_read = min(
                running.num_read + share.num_tokens, len(running.request.prompt_token_ids)
            )
            if not each.token_ids:
                continue
            token_ids, reason = running.append(each, now_s=now_s)
            metrics = running.metrics(now_s=now_s) if reason else None
            deltas.append(
                TokenDelta(
                    request_id=each.request_id,
                    token_ids=token_ids,
                    margins=each.margins[: len(token_ids)],
                    num_accepted=min(each.num_accepted, len(token_ids)),
                    finish_reason=reason,
                    metrics=metrics,
                )
            )
            if reason is not None:
                self._release(each.request_id)
        return deltas

    def check(self) -> None:
        """Every region is either free or held by exactly one request."""
        held = [running.region for running in self._running.values()]
        assert sorted(held + self._free) == list(range(self._num_regions)), (
            f"expected every region once, found held {held} and free {self._free}"
        )

    def _share(self, running: RunningRequest) -> ScheduledRequest:
        first = not running.announced
        draft = 0
        if running.prompt_left:
            num_tokens = min(running.prompt_left, self._chunk)
        else:
            num_tokens = 1
            wanted = running.request.num_draft_tokens
            budget = (
                self._num_draft_tokens if wanted is None else min(wanted, self._num_draft_tokens)
            )
            # a round emits one token besides its drafts, so more drafts than that could never be
            # used
            draft = max(0, min(budget, running.tokens_left - 1))
        return ScheduledRequest(
            request_id=running.request.request_id,
            num_tokens=num_tokens,
            num_draft_tokens=draft,
            request=running.request if first else None,
            region=running.region if first else None,
        )

    def _release(self, request_id: str) -> None:
        running = self._running.pop(request_id)
        self._free.append(running.region)
        if running.announced:
            self._finished.append(request_id)

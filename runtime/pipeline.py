"""Two plans on a rank at once: drafts are made for one while the other is verified.

    draft thread     | plan 1 |     | plan 2 |     | plan 3 |       no request is in two plans that overlap
    verify thread             | plan 1       | plan 2       | plan 3

Each stage has a thread, on a GPU a stream, and takes plans in their order, on every rank the same.
What they share:

    a request     its `Sequence` and all that hangs on it go with the plan: at any time one thread has
                  them. A plan's drafting waits until the last but one is over on this rank too
    `sequences`   drafting alone: who ends is forgotten, who comes is added. Verification has references
    KV blocks     the drafter's pool is written and read by drafting, the target's by verification; so in
                  either what an earlier plan writes is there for a later one, prefixes included
    ranks         speak over `Mesh.drafting` in one stage and `Mesh.world` in the other: collectives of one
                  group must come in the same order everywhere, and threads keep none
    the board     drafting marks its own columns, verification the target's (`runtime/transfer/board.py`)

PEARL (arXiv 2408.11850) verifies one batch on some ranks while others draft on for it. Here two halves
of a batch take turns on the same ranks, and no draft is made that may prove void.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext

import torch

from paceline.runtime.types import StepPlan, StepResult
from paceline.runtime.worker import Drafted, Worker

CLOSE_S = 5.0
"""What plans under way get to end."""


class Pipeline:
    """Carries out a worker's plans. Consecutive ones have no request in common."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        # with threads of their own for all cores, the stages would only wait for each other
        num_threads = max(1, torch.get_num_threads() // 2)
        self._drafting, self._verifying = (
            ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(num_threads,))
            for name in ("draft", "verify")
        )
        self._latest: deque[Future[StepResult]] = deque(maxlen=2)
        device = self._device = worker.mesh.device
        self._streams: dict[str, torch.cuda.Stream] = {}
        if device.type == "cuda":
            for name in ("draft", "verify"):
                self._streams[name] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)  # weights and pools were made on another stream

    def send(self, plan: StepPlan) -> Future[StepResult]:
        """Begin a plan; its result. What either stage raises is raised there."""
        last_but_one = self._latest[0] if len(self._latest) == 2 else None
        drafted = self._drafting.submit(self._draft, plan, last_but_one)
        result = self._verifying.submit(self._verify, drafted)
        self._latest.append(result)
        return result

    def close(self) -> None:
        """Wait a little for the plans under way. Safe to call twice."""
        wait(self._latest, timeout=CLOSE_S)
        for stage in (self._drafting, self._verifying):
            stage.shutdown(wait=False, cancel_futures=True)

    def _draft(self, plan: StepPlan, last_but_one: Future[StepResult] | None) -> Drafted:
        if last_but_one is not None:
            wait([last_but_one])
        with self._stream("draft"):
            drafted = self._worker.draft(plan)
            self._finish()
        return drafted

    def _verify(self, drafted: Future[Drafted]) -> StepResult:
        plan = drafted.result()
        with self._stream("verify"):
            result = self._worker.verify(plan)
            self._finish()
        return result

    def _stream(self, stage: str) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._streams[stage]) if self._streams else nullcontext()

    def _finish(self) -> None:
        """What is queued must be done before the other stage's stream goes on with it."""
        if self._streams:
            torch.cuda.current_stream(self._device).synchronize()

"""Two plans on a rank at once: drafts are made for one while the other is verified.

    draft thread     | a b |     | c d |     | a b |     | c d |
    verify thread          | a b     | c d     | a b     | c d        requests a .. d

Each stage has a thread, on a GPU a stream, and takes plans in their order, on every rank the same.
What they share:

    a request     its `Sequence` and all that hangs on it go with the plan: at any time one thread has
                  them. So drafting waits for every earlier plan with one of its requests. The scheduler
                  has heard that these are over, but of rank 0: another rank may still be at it
    `sequences`   drafting alone: who ends is forgotten, who comes is added. Verification has references
    KV blocks     the drafter's pool is written and read by drafting, the target's by verification; so in
                  either what an earlier plan writes is there for a later one, prefixes included. Of a tree
                  verification moves the drafter's rows too: behind the text, where no prefix reaches
    ranks         speak over `Mesh.drafting` in one stage and `Mesh.world` in the other: collectives of one
                  group must come in the same order everywhere, and threads keep none
    the board     drafting marks its own columns, verification the target's (`runtime/transfer/board.py`);
                  a slot begins anew when no earlier plan is under way

PEARL (arXiv 2408.11850) verifies one batch on some ranks while others draft on for it. Here two halves
of a batch take turns on the same ranks, and no draft is made that may prove void.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext

import torch

from paceline.runtime.types import StepPlan, StepResult
from paceline.runtime.worker import Drafted, Worker

CLOSE_S = 5.0
"""What plans under way get to end."""


class Pipeline:
    """Carries out a worker's plans, two of them at a time where they have no request in common."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        # with threads of their own for all cores, the stages would only wait for each other
        num_threads = max(1, torch.get_num_threads() // 2)
        self._drafting, self._verifying = (
            ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(num_threads,))
            for name in ("draft", "verify")
        )
        self._under_way: list[tuple[Future[StepResult], set[str]]] = []
        """Results to come, and the requests of their plans."""
        device = self._device = worker.mesh.device
        self._streams: dict[str, torch.cuda.Stream] = {}
        if device.type == "cuda":
            for name in ("draft", "verify"):
                self._streams[name] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)  # weights and pools were made on another stream

    def send(self, plan: StepPlan) -> Future[StepResult]:
        """Begin a plan; its result. What either stage raises is raised there."""
        self._under_way = [each for each in self._under_way if not each[0].done()]
        names = {each.request_id for each in plan.scheduled}
        begins_slot = any(each.slot is not None for each in plan.scheduled)
        before = [
            result
            for result, theirs in self._under_way
            if begins_slot or not names.isdisjoint(theirs)
        ]
        drafted = self._drafting.submit(self._draft, plan, before)
        result = self._verifying.submit(self._verify, drafted)
        self._under_way.append((result, names))
        return result

    def carry_out(self, plan: StepPlan) -> StepResult:
        """A plan that is alone, in the caller's thread."""
        # rank 0 has answered them all, this one may be behind
        wait([result for result, _ in self._under_way])
        result = self._worker.step(plan)
        self._finish()
        return result

    def close(self) -> None:
        """Wait a little for the plans under way. Safe to call twice."""
        wait([result for result, _ in self._under_way], timeout=CLOSE_S)
        for stage in (self._drafting, self._verifying):
            stage.shutdown(wait=False, cancel_futures=True)

    def _draft(self, plan: StepPlan, before: list[Future[StepResult]]) -> Drafted:
        wait(before)
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

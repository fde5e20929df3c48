"""Several ranks, kept for all tests of a session: starting one takes longer than most tests."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from paceline.parallel.launch import free_port, join, leave, reshape
from paceline.parallel.rank import RankSpec

ANSWER_S = 240.0


class RankPool:
    """Runs functions `job(mesh, *args)` on every rank at once; they are named, not sent."""

    def __init__(self, size: int, *, shared_memory: bool) -> None:
        self.size = size
        port, context = free_port(), get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            spec = RankSpec(
                rank=rank,
                local_rank=rank,
                local_size=size,
                target_size=size,
                draft_size=size,
                master_port=port,
                shared_memory=shared_memory,
            )
            process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self,
        job: Callable[..., Any],
        *args: Any,
        target_size: int | None = None,
        draft_size: int | None = None,
    ) -> list[Any]:
        """Every rank's answer. Raises AssertionError with the trace of the first rank that failed."""
        sizes = (target_size or self.size, draft_size or self.size)
        for pipe in self._pipes:
            pipe.send((job.__module__, job.__name__, sizes, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(ANSWER_S), f"rank {rank} did not answer in {ANSWER_S:.0f} s"
            answers.append(pipe.recv())
        failed = [text for ok, text in answers if not ok]
        assert not failed, failed[0]
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, spec: RankSpec) -> None:
    whole = join(spec)
    meshes = {(spec.target_size, spec.draft_size): whole}
    try:
        while True:
            module, name, sizes, args = pipe.recv()
            if sizes not in meshes:
                meshes[sizes] = reshape(whole, target_size=sizes[0], draft_size=sizes[1])
            try:
                value = getattr(importlib.import_module(module), name)(meshes[sizes], *args)
                pipe.send((True, value))
            except Exception:
                pipe.send((False, traceback.format_exc()))
    except EOFError:
        leave()

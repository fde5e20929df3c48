"""`LLM`: the offline interface, with the names vLLM's users know."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from paceline.runtime.config import EngineConfig, make_config
from paceline.runtime.engine import EngineClient
from paceline.runtime.errors import ConfigError, EngineError, PromptError
from paceline.runtime.outputs import Assembler, CompletionOutput, RequestOutput, empty_output
from paceline.runtime.preflight import Facts, examine
from paceline.runtime.requests import Job, Prompt, RequestFactory
from paceline.runtime.types import EngineStatus, SamplingParams


class LLM:
    """A target model, and perhaps a drafter, ready to continue prompts.

    `LLM(model=..., tensor_parallel_size=..., speculative_config={...})` takes every field of
    `EngineConfig`. One rank runs in this process, several in processes of their own; for ranks on a
    Ray cluster see `paceline.actors.app`. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        model: str = "embedded",
        *,
        connect: Callable[[EngineConfig, Facts], EngineClient] | None = None,
        **settings: Any,
    ) -> None:
        self._client: EngineClient | None = None
        self.config = make_config({"model": model, **settings})
        self.facts = examine(self.config)
        if connect is None:
            if self.config.distributed_executor_backend == "ray":
                raise ConfigError(
                    "for ranks on Ray use paceline.actors.app.ray_llm(...) with the same arguments"
                )
            from paceline.runtime.local import local_engine

            connect = local_engine
        self._client = connect(self.config, self.facts)
        self._factory = RequestFactory(self.facts, self.config)
        self._calls = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        num_draft_tokens: int | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; outputs in the order of the prompts. Raises PromptError for one
        that cannot be.

        `num_draft_tokens` limits speculation for this call; 0 turns it off.
        """
        jobs = self.jobs(
            prompts, sampling_params, priority=priority, num_draft_tokens=num_draft_tokens
        )
        outputs = [empty_output(job) for job in jobs]
        with _progress(len(jobs), shown=use_tqdm) as advance:
            for number, part in self.stream(jobs):
                outputs[number].add(part)
                if part.finished:
                    advance()
        return outputs

    def jobs(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        num_draft_tokens: int | None = None,
    ) -> list[Job]:
        """Checked requests for `stream`, one job per prompt."""
        listed = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            each_params = [sampling_params or SamplingParams()] * len(listed)
        else:
            each_params = list(sampling_params)
        priorities = [0] * len(listed) if priority is None else list(priority)
        for found, what in ((each_params, "sampling params"), (priorities, "priorities")):
            if len(found) != len(listed):
                raise PromptError(f"{len(listed)} prompts, but {len(found)} {what}")
        call = next(self._calls)
        return [
            self._factory.make(
                prompt,
                params,
                request_id=f"{call}-{number}",
                num_draft_tokens=num_draft_tokens,
                priority=each,
            )
            for number, (prompt, params, each) in enumerate(
                zip(listed, each_params, priorities, strict=True)
            )
        ]

    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, RequestOutput]]:
        """New parts as they come: the job's number, and what is new of its one output that has
        news.

        Leaving the iteration early aborts what is left. Raises EngineError if the engine is lost.
        """
        client, tokenizer = self._running(), self.facts.tokenizer
        assemblers = {
            request.request_id: (number, Assembler(request, tokenizer, index=index))
            for number, job in enumerate(jobs)
            for index, request in enumerate(job.requests)
        }
        left = {number: len(job.requests) for number, job in enumerate(jobs)}
        client.submit([request for job in jobs for request in job.requests])
        try:
            while assemblers:
                for delta in client.poll():
                    if delta.request_id not in assemblers:
                        continue  # of a call that was left early
                    number, assembler = assemblers[delta.request_id]
                    if delta.error is not None:
                        raise EngineError(delta.error)
                    stopped_before = assembler.stopped
                    part = assembler.feed(delta)
                    if delta.finish_reason is not None:
                        del assemblers[delta.request_id]
                        left[number] -= 1
                    elif assembler.stopped and not stopped_before:
                        client.abort([delta.request_id])
                    output = self._output(jobs[number], part, finished=left[number] == 0)
                    output.prompt_logprobs = assembler.prompt_logprobs(delta)
                    output.num_cached_tokens = delta.num_cached_tokens
                    yield number, output
        finally:
            if assemblers:
                client.abort(list(assemblers))

    def status(self) -> EngineStatus:
        """How the engine is."""
        return self._running().status()

    def close(self) -> None:
        """Free the ranks. Safe to call twice."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _running(self) -> EngineClient:
        if self._client is None:
            raise EngineError("this LLM is closed")
        return self._client

    @staticmethod
    def _output(job: Job, part: CompletionOutput, *, finished: bool) -> RequestOutput:
        return RequestOutput(
            request_id=job.request_id,
            prompt=job.prompt,
            prompt_token_ids=job.prompt_token_ids,
            outputs=[part],
            finished=finished,
        )


@contextlib.contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar over finished prompts, on a terminal only. Yields what to call when one is done."""
    if not (shown and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda: bar.advance(task)

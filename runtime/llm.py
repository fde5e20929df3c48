"""`LLM`: the offline interface, with the names vLLM's users know."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypedDict

import msgspec

from paceline.runtime.config import EngineConfig, make_config
from paceline.runtime.engine import EngineClient
from paceline.runtime.errors import ConfigError, EngineError, PromptError
from paceline.runtime.preflight import Facts, examine
from paceline.runtime.sampling.filters import validate
from paceline.runtime.types import Request, RequestMetrics, SamplingParams, TokenDelta


class TextPrompt(TypedDict):
    prompt: str


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


Prompt = str | TextPrompt | TokensPrompt


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """What was written after one prompt."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """Per token, the target's best logit minus its second best; empty when sampling."""
    finish_reason: str | None = None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """One prompt and its continuation."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics | None = None

    @property
    def finished(self) -> bool:
        return self.outputs[0].finish_reason is not None


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
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        num_draft_tokens: int | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; outputs in the order of the prompts. Raises PromptError for one
        that cannot be.

        `num_draft_tokens` limits speculation for this call; 0 turns it off.
        """
        requests = self.requests(prompts, sampling_params, num_draft_tokens=num_draft_tokens)
        outputs = {output.request_id: output for _, output in requests}
        with _progress(len(outputs), shown=use_tqdm) as advance:
            for delta, _ in self.stream(requests):
                if delta.finish_reason is not None:
                    advance()
        return list(outputs.values())

    def requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        num_draft_tokens: int | None = None,
    ) -> list[tuple[Request, RequestOutput]]:
        """Checked requests, each with the output that `stream` will fill."""
        listed = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            each_params = [sampling_params or SamplingParams()] * len(listed)
        else:
            each_params = list(sampling_params)
        if len(each_params) != len(listed):
            raise PromptError(f"{len(listed)} prompts, but {len(each_params)} sampling params")
        pairs = zip(listed, each_params, strict=True)
        return [self._request(prompt, params, num_draft_tokens) for prompt, params in pairs]

    def stream(
        self, requests: list[tuple[Request, RequestOutput]]
    ) -> Iterator[tuple[TokenDelta, str]]:
        """New tokens and their text as they come, of whichever request they are. Fills the outputs.

        Leaving the iteration early aborts what is left. Raises EngineError if the engine is lost.
        """
        client = self._running()
        outputs = {request.request_id: output for request, output in requests}
        tokenizer = self.facts.tokenizer
        streams = {request_id: tokenizer.stream() if tokenizer else None for request_id in outputs}
        client.submit([request for request, _ in requests])
        left = set(outputs)
        try:
            while left:
                for delta in client.poll():
                    if delta.request_id not in left:
                        continue  # of a call that was left early
                    if delta.finish_reason is not None:
                        left.discard(delta.request_id)
                    if delta.error is not None:
                        raise EngineError(delta.error)
                    stream = streams[delta.request_id]
                    text = stream.feed(delta.token_ids) if stream else ""
                    self._extend(outputs[delta.request_id], delta, text)
                    yield delta, text
        finally:
            if left:
                client.abort(list(left))

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

    def _extend(self, output: RequestOutput, delta: TokenDelta, text: str) -> None:
        completion = output.outputs[0]
        completion.token_ids += delta.token_ids
        completion.margins += delta.margins
        completion.text += text
        if delta.finish_reason is not None:
            completion.finish_reason = delta.finish_reason
            output.metrics = delta.metrics
            if (
                self.facts.tokenizer is not None
            ):  # what a stream held back as half a character shows now
                completion.text = self.facts.tokenizer.decode(completion.token_ids)

    def _request(
        self, prompt: Prompt, params: SamplingParams, num_draft_tokens: int | None
    ) -> tuple[Request, RequestOutput]:
        validate(params)
        text, token_ids = self._token_ids(prompt)
        room = self.facts.max_model_len - len(token_ids)
        if room < 1:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens, the context holds {self.facts.max_model_len} with at least "
                "one to generate"
            )
        number = next(self._ids)
        request = Request(
            request_id=f"request-{number}",
            prompt_token_ids=tuple(token_ids),
            params=msgspec.structs.replace(params, max_tokens=min(params.max_tokens, room)),
            seed=params.seed if params.seed is not None else self.config.seed + number,
            num_draft_tokens=num_draft_tokens,
            eos_token_ids=self.facts.eos_token_ids,
        )
        output = RequestOutput(
            request_id=request.request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            outputs=[CompletionOutput()],
        )
        return request, output

    def _token_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text = prompt if isinstance(prompt, str) else prompt.get("prompt")
        if text is not None:
            if self.facts.tokenizer is None:
                raise PromptError(f"{self.config.model} has no tokenizer; give prompt_token_ids")
            token_ids = self.facts.tokenizer.encode(str(text))
        else:
            assert not isinstance(prompt, str)
            given = prompt.get("prompt_token_ids")
            if not isinstance(given, list) or not all(type(i) is int for i in given):
                raise PromptError("a prompt is a string, or has `prompt` or `prompt_token_ids`")
            token_ids = given
        if not token_ids:
            raise PromptError("the prompt is empty")
        bad = [i for i in token_ids if not 0 <= i < self.facts.arch.vocab_size]
        if bad:
            raise PromptError(
                f"token id {bad[0]} is outside the vocabulary of {self.facts.arch.vocab_size}"
            )
        return None if text is None else str(text), token_ids


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

"""From a prompt and its parameters to requests for the engine: checked, tokenised, resolved.

    prompt + SamplingParams ──RequestFactory.make──> Job "ID" ── requests ──> Request "ID-0"
                                                                              Request "ID-1"  (n of them)

Whatever a user can get wrong in a request is found here, before anything is queued. Imports no
torch.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, TypedDict

import msgspec

from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import PromptError
from paceline.runtime.sampling.params import validate
from paceline.runtime.types import Request, SamplingParams, StructuredOutputs

if TYPE_CHECKING:
    from paceline.runtime.preflight import Facts
    from paceline.runtime.sampling.grammar import GrammarCompiler

MAX_ID_CHARS = 256
MAX_SALT_CHARS = 1024
"""Of a session id too."""
PRIORITY_LIMIT = 2**31
"""Priorities lie strictly between minus this and this: the ends are the server's own."""


class TextPrompt(TypedDict):
    """A prompt that is tokenised here."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt that was tokenised elsewhere."""

    prompt_token_ids: list[int]


Prompt = str | TextPrompt | TokensPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt to continue, as the user sees it; the engine sees its `requests`."""

    request_id: str
    prompt: str | None
    """The text, where the prompt was one."""
    prompt_token_ids: list[int]
    params: SamplingParams
    """As given."""
    requests: tuple[Request, ...]
    """One per text to write; the i-th has the id `child_id(request_id, i)`."""


def child_id(request_id: str, index: int) -> str:
    """The engine's id of one text of a job. No two jobs share one, whatever ids clients choose."""
    return f"{request_id}-{index}"


def job_id(request_id: str) -> str:
    """The job that a text of the engine belongs to: `child_id` undone."""
    return request_id.rpartition("-")[0]


class RequestFactory:
    """Makes jobs for one engine. May be used from several threads."""

    def __init__(self, facts: Facts, config: EngineConfig) -> None:
        self._facts = facts
        self._config = config
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._grammar_lock = threading.Lock()
        self._grammars: GrammarCompiler | None = None

    def make(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        num_draft_tokens: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
        session_id: str = "",
        retry_key: str | None = None,
    ) -> Job:
        """A checked job. Raises PromptError, one line that names the parameter, for what cannot be
        served.

        Requests without a seed get the engine's plus a running number, so that a program that is
        run again gets the same texts; those that name a `retry_key` get one that is a function of it,
        so that whoever asks again gets the same text. Requests of one `session_id` go to one engine where several
        serve. Whether `request_id` is in use is for the caller to know.
        """
        self._check(params, request_id, num_draft_tokens, priority)
        for text, what in ((cache_salt, "cache_salt"), (session_id, "session_id")):
            if len(_checked_text(text, what=what)) > MAX_SALT_CHARS:
                raise PromptError(f"{what} may have {MAX_SALT_CHARS} characters, found {len(text)}")
        prompt_text, token_ids = self.token_ids(prompt)
        max_tokens = self._max_tokens(len(token_ids), params)
        with self._lock:
            numbers = [next(self._numbers) for _ in range(params.n)]
        first_seed = self._config.seed + numbers[0] if params.seed is None else params.seed
        if retry_key is not None and params.seed is None:
            first_seed = int.from_bytes(blake2b(retry_key.encode(), digest_size=6).digest())
        request_id = f"request-{numbers[0]}" if request_id is None else request_id
        each = msgspec.structs.replace(params, n=1, max_tokens=max_tokens)
        requests = tuple(
            Request(
                request_id=child_id(request_id, index),
                prompt_token_ids=tuple(token_ids),
                params=each,
                seed=first_seed + index,
                max_tokens=max_tokens,
                num_draft_tokens=num_draft_tokens,
                eos_token_ids=self._facts.eos_token_ids,
                priority=priority,
                cache_salt=cache_salt,
                session_id=session_id,
            )
            for index in range(params.n)
        )
        return Job(
            request_id=request_id,
            prompt=prompt_text,
            prompt_token_ids=token_ids,
            params=params,
            requests=requests,
        )

    def token_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text, if it is one, and its token ids. Raises PromptError for an empty one and
        for ids outside the vocabulary."""
        text = prompt if isinstance(prompt, str) else prompt.get("prompt")
        if text is None:
            given = None if isinstance(prompt, str) else prompt.get("prompt_token_ids")
            if not isinstance(given, list) or not all(type(i) is int for i in given):
                raise PromptError("a prompt is a string, or has `prompt` or `prompt_token_ids`")
            token_ids = given
        elif not isinstance(text, str):
            raise PromptError(f"prompt must be a string, found {type(text).__name__}")
        elif self._facts.tokenizer is None:
            raise PromptError(f"{self._config.model} has no tokenizer; give prompt_token_ids")
        else:
            token_ids = self._facts.tokenizer.encode(_checked_text(text, what="prompt"))
        if not token_ids:
            raise PromptError("the prompt is empty")
        vocab_size = self._facts.arch.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            bad = next(i for i in token_ids if not 0 <= i < vocab_size)
            raise PromptError(f"prompt: token id {bad} is outside the vocabulary of {vocab_size}")
        return text, token_ids

    def _max_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """How many tokens may be written: as many as asked for, and no more than the context
        holds."""
        limit = self._facts.max_model_len
        if params.kv_policy != "full":  # the window moves on; only an open end needs a bound
            return limit if params.max_tokens is None else params.max_tokens
        room = limit - num_prompt_tokens
        if room < 1:
            raise PromptError(
                f"the prompt has {num_prompt_tokens} tokens, the context holds {limit} with at "
                "least one to generate"
            )
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def _check(
        self,
        params: SamplingParams,
        request_id: str | None,
        num_draft_tokens: int | None,
        priority: int,
    ) -> None:
        validate(params, vocab_size=self._facts.arch.vocab_size)
        if request_id is not None:
            _checked_text(request_id, what="request_id")
            if not 1 <= len(request_id) <= MAX_ID_CHARS or not request_id.isprintable():
                raise PromptError(
                    f"request_id must have 1 to {MAX_ID_CHARS} printable characters, found {request_id!r:.80}"
                )
        if num_draft_tokens is not None and not 0 <= num_draft_tokens <= 64:
            raise PromptError(
                f"num_draft_tokens must be between 0 and 64, found {num_draft_tokens}"
            )
        if not -PRIORITY_LIMIT < priority < PRIORITY_LIMIT:
            raise PromptError(
                f"priority must be between {1 - PRIORITY_LIMIT} and {PRIORITY_LIMIT - 1}, found {priority}"
            )
        self._check_text_needs(params)

    def _check_text_needs(self, params: SamplingParams) -> None:
        for stop in params.stop_strings:
            _checked_text(stop, what="stop")
        for name, wanted in (
            ("stop", bool(params.stop_strings)),
            ("structured_outputs", params.structured_outputs is not None),
        ):
            if wanted and self._facts.tokenizer is None:
                raise PromptError(f"{name} needs a tokenizer, and {self._config.model} has none")
        if params.structured_outputs is not None:
            self._check_grammar(params.structured_outputs)

    def _check_grammar(self, outputs: StructuredOutputs) -> None:
        """With the code that the engine runs: what it could not compile is refused here."""
        from paceline.runtime.sampling.grammar import GrammarCompiler, check_grammar

        facts = self._facts
        assert facts.tokenizer is not None, "structured outputs without one were refused"
        with self._grammar_lock:
            if self._grammars is None:
                fast, vocab_size = facts.tokenizer.fast, facts.arch.vocab_size
                self._grammars = GrammarCompiler(fast, vocab_size=vocab_size)
            check_grammar(outputs, self._grammars, eos_token_ids=facts.eos_token_ids)


def _checked_text(text: str, *, what: str) -> str:
    """Half a surrogate pair is no text: it has no UTF-8, so that nothing after us could carry it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{what} has half a surrogate pair at character {error.start}") from None
    return text

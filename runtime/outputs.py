"""From the engine's token deltas to what a user reads: text, log-probabilities, reasons to stop.

    TokenDelta ──> tokens one by one ──> text stream ──> stop strings ──> CompletionOutput
                   (so that the text does      never half      hold back what could
                    not depend on how many     a character     still become one
                    came at once)

A stream yields what is new (`Assembler.feed`); `RequestOutput.add` gathers such pieces into the
whole. Attribute names are vLLM's. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from paceline.runtime.requests import Job
from paceline.runtime.tokenizer import Tokenizer
from paceline.runtime.types import (
    FinishReason,
    Request,
    RequestMetrics,
    TokenDelta,
    TokenLogprobs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One candidate at one position."""

    logprob: float
    rank: int | None = None
    """1 for the most probable token."""
    decoded_token: str | None = None


Position = dict[int, Logprob]
"""By token id: the token that stands there first, then the most probable ones, best first."""


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One text written after a prompt, or the newest part of it."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_accepted: int = 0
    """How many of `token_ids` had been drafted; in a part, those at its front."""
    logprobs: list[Position] | None = None
    """Of `token_ids`, where asked for."""
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for the end-of-text token."""
    metrics: RequestMetrics | None = None
    """How the engine wrote it; with the finish reason."""
    error: str | None = None
    """With finish reason "error"."""

    def finished(self) -> bool:
        return self.finish_reason is not None

    def add(self, part: CompletionOutput) -> None:
        """Append a later part of the same text."""
        self.text += part.text
        self.token_ids += part.token_ids
        self.num_accepted += part.num_accepted
        if part.logprobs is not None:
            self.logprobs = (self.logprobs or []) + part.logprobs
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + (
                part.cumulative_logprob or 0.0
            )
        if part.finish_reason is not None:
            self.finish_reason, self.stop_reason = part.finish_reason, part.stop_reason
            self.metrics, self.error = part.metrics, part.error


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """One prompt and its continuations, or what is new of them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Position | None] | None = None
    """Where asked for, with the first token; the first token of a prompt has none."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV the engine had already."""
    finished: bool = False
    """Whether every continuation has ended."""

    @property
    def metrics(self) -> RequestMetrics | None:
        """The first continuation's; each has its own."""
        return self.outputs[0].metrics if self.outputs else None

    def add(self, part: RequestOutput) -> None:
        """Append what came later. `self.outputs` holds every continuation, in order."""
        for output in part.outputs:
            self.outputs[output.index].add(output)
        if part.prompt_logprobs is not None:
            self.prompt_logprobs = part.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, part.num_cached_tokens)
        self.finished = part.finished


def empty_output(job: Job) -> RequestOutput:
    """What `RequestOutput.add` gathers a job's parts into."""
    return RequestOutput(
        request_id=job.request_id,
        prompt=job.prompt,
        prompt_token_ids=job.prompt_token_ids,
        outputs=[CompletionOutput(index=index) for index in range(len(job.requests))],
    )


class StopStrings:
    """Finds the first stop string to be completed in a text that arrives in pieces.

    One automaton per string (Knuth, Morris, Pratt), so that a character costs the same however long
    the strings are and wherever pieces end.

        text  ... a b c | a b c a          for the stop string "abcabd"
                  emitted | held back: it could still become a stop string
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._borders = [_borders(string) for string in strings]
        self._states = [0] * len(strings)
        self._held = ""

    def feed(self, piece: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Text that is certain now, and the stop string that ended it, if one did.

        The text then ends before the stop string. While not `armed`, strings that are completed do
        not count, but they may have begun.
        """
        text = self._held + piece
        end = len(self._held)
        for char in piece:
            end += 1
            found = self._step(char)
            if found and armed:
                stop = max(found, key=len)
                self._held = ""
                return text[: end - len(stop)], stop
        certain = len(text) - max(self._states, default=0)
        self._held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        """What was held back, once no more can come."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._strings)
        return held

    def _step(self, char: str) -> list[str]:
        """Move every automaton on; the strings that end with this character."""
        found = []
        for i, string in enumerate(self._strings):
            borders, state = self._borders[i], self._states[i]
            while state and string[state] != char:
                state = borders[state - 1]
            state += string[state] == char
            if state == len(string):
                found.append(string)
                state = borders[state - 1]
            self._states[i] = state
        return found


def _borders(string: str) -> list[int]:
    """Entry i: the longest proper prefix of string[:i+1] that is also its suffix."""
    borders = [0] * len(string)
    for i in range(1, len(string)):
        length = borders[i - 1]
        while length and string[length] != string[i]:
            length = borders[length - 1]
        borders[i] = length + (string[length] == string[i])
    return borders


class Assembler:
    """Turns the deltas of one request into parts of its `CompletionOutput`.

        writing ──stop string──> stopped ──terminal delta──> finished
           └──────────────────terminal delta─────────────────────^

    In `stopped` the text is complete but the engine does not know yet: whoever feeds aborts the
    request, tokens that still come are dropped, and the terminal delta brings the metrics.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None, *, index: int = 0) -> None:
        params = request.params
        self._index = index
        self._tokenizer = tokenizer
        self._skip_special = params.skip_special_tokens
        self._keep_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._wants_logprobs = params.logprobs is not None
        self._stream = (
            None if tokenizer is None else tokenizer.stream(skip_special_tokens=self._skip_special)
        )
        self._stops = StopStrings(params.stop_strings) if params.stop_strings else None
        self._token_ids: list[int] = []
        self._num_chars = 0
        """Of text that left the stream, emitted or held back."""
        self.stop: str | None = None
        """The stop string that was met."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text before the engine did."""
        return self.stop is not None

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def feed(self, delta: TokenDelta) -> CompletionOutput:
        """What is new. Mutates: feed each delta once, in order."""
        texts: list[str] = []
        taken = 0 if self.stopped else self._read(delta, texts)
        part = CompletionOutput(
            index=self._index,
            text="".join(texts),
            token_ids=list(delta.token_ids[:taken]),
            num_accepted=min(delta.num_accepted, taken),
        )
        if self._wants_logprobs:
            part.logprobs = [self.position(entry) for entry in delta.logprobs[:taken]]
            part.cumulative_logprob = sum(entry.logprob for entry in delta.logprobs[:taken])
        if delta.finish_reason is not None:
            part.metrics = delta.metrics
            if self.stopped and delta.finish_reason != "error":
                part.finish_reason, part.stop_reason = "stop", self.stop
            else:
                part.finish_reason, part.stop_reason = delta.finish_reason, delta.stop_token_id
                part.error = delta.error
        return part

    def _read(self, delta: TokenDelta, texts: list[str]) -> int:
        """Append the new text to `texts`; how many of the tokens belong to it."""
        # A token that ends the text is reported, but it is no part of the text.
        ends = delta.finish_reason == "stop" and not self._keep_stop
        last = len(delta.token_ids) - 1
        for i, token_id in enumerate(delta.token_ids):
            self._token_ids.append(token_id)
            if self._stream is None or (ends and i == last):
                continue
            if not self._extend(self._stream.step(token_id), texts):
                return i + 1
        if delta.finish_reason is not None:
            self._flush(texts, ends=ends)
        return len(delta.token_ids)

    def prompt_logprobs(self, delta: TokenDelta) -> list[Position | None] | None:
        """The prompt's, where a delta brings them; its first token has none."""
        if not delta.prompt_logprobs:
            return None
        return [None, *(self.position(entry) for entry in delta.prompt_logprobs)]

    def position(self, entry: TokenLogprobs) -> Position:
        """One position's log-probabilities with the tokens' texts."""
        position = {entry.token_id: self._logprob(entry.token_id, entry.logprob, entry.rank)}
        for rank, (token_id, logprob) in enumerate(entry.top, start=1):
            if token_id not in position:
                position[token_id] = self._logprob(token_id, logprob, rank)
        return position

    def _logprob(self, token_id: int, logprob: float, rank: int) -> Logprob:
        text = None if self._tokenizer is None else self._tokenizer.token_text(token_id)
        return Logprob(logprob=logprob, rank=rank, decoded_token=text)

    def _extend(self, piece: str, texts: list[str]) -> bool:
        """Whether the text goes on."""
        self._num_chars += len(piece)
        if self._stops is None:
            texts.append(piece)
            return True
        armed = len(self._token_ids) > self._min_tokens
        text, self.stop = self._stops.feed(piece, armed=armed)
        texts.append(text)
        if self.stop is not None and self._keep_stop:
            texts.append(self.stop)
        return self.stop is None

    def _flush(self, texts: list[str], *, ends: bool) -> None:
        """The rest: what the stream held back as half a character, and what could have become a
        stop string."""
        if self._tokenizer is not None:
            token_ids = self._token_ids[:-1] if ends else self._token_ids
            whole = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
            if not self._extend(whole[self._num_chars :], texts):
                return
        if self._stops is not None:
            texts.append(self._stops.flush())

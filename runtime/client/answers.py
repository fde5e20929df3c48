"""What a client answers with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token and its log-probability. HTTP tells tokens by their text, gRPC by their id."""

    logprob: float
    token: str | None = None
    token_id: int | None = None
    top: tuple[TokenLogprob, ...] = ()
    """The most probable tokens in its place, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens read and written, of all texts together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV the engine had already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How drafting went."""

    rounds: int
    """Verification passes, each of which emitted at least one token."""
    drafted: int
    accepted: int
    accepted_at: tuple[int, ...] = ()
    """Entry i counts the rounds that accepted exactly i drafts."""

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One text."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """`stop`, `length` or `abort`."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    num_accepted: int = 0
    """How many of `token_ids` had been drafted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one prompt. The properties are those of its first text."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    speculation: Speculation | None = None
    """Of all texts together; None if the server does not say."""
    kv_policy: str = "full"
    """Any other is lossy: the text may differ from what the model would write."""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is new of a text that is being written."""

    request_id: str
    """The one to abort."""
    index: int = 0
    """Which of the `n` texts."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    num_accepted: int = 0
    """How many of `token_ids`, from the front, had been drafted."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    """In the last piece of each text."""
    stop_reason: int | str | None = None
    speculation: Speculation | None = None
    """At the end: over HTTP in the last piece, over gRPC in each text's last, of that text."""
    usage: Usage | None = None
    """The same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that is served."""

    model_id: str
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether tokens are generated."""

    ok: bool
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server is."""

    version: str
    ranks: tuple[str, ...] = ()
    """What each rank said of itself when it had loaded."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The engine's settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """How busy a server is."""

    num_running: int
    num_waiting: int
    kv_usage: float
    """Part of the KV blocks in use."""
    prefix_hit_rate: float
    """Part of the prompt tokens looked up in the prefix cache that were there."""
    drafted: int
    """This and the next two: tokens since the engine started."""
    accepted: int
    generated: int

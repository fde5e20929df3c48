"""The types that cross a process boundary.

Frozen, keyword-only, and made of ints, floats, strings and lists alone, so that each can be sent as
MessagePack and none can carry a tensor or a live object. A prompt crosses to the workers once;
later plans carry only what changed.

    Request ──submit──> Engine ──StepPlan──> every rank
                          ^                     │
    TokenDelta <──────────┴─────StepResult──────┘ (rank 0 only)
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

WIRE_VERSION = 1
"""Raised by one whenever a type below changes its meaning; both ends of a channel compare it."""


class WireType(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that is sent: immutable, keyword-only, strict about unknown fields."""


class SamplingParams(WireType, frozen=True, kw_only=True):
    """How one request's tokens are chosen. Names and meanings are those of vLLM and the OpenAI
    API."""

    max_tokens: Annotated[int, Meta(description="Most tokens to generate.")] = 16
    temperature: Annotated[
        float, Meta(description="0 is greedy; logits are divided by it otherwise.")
    ] = 1.0
    top_k: Annotated[
        int, Meta(description="Keep the k most probable tokens; 0 or -1 keeps all.")
    ] = 0
    top_p: Annotated[
        float, Meta(description="Keep the most probable tokens whose mass reaches top_p.")
    ] = 1.0
    min_p: Annotated[
        float, Meta(description="Drop tokens less probable than min_p times the most probable one.")
    ] = 0.0
    seed: Annotated[
        int | None, Meta(description="The text is a function of prompt, parameters and seed.")
    ] = None
    ignore_eos: Annotated[bool, Meta(description="Go on past the end-of-text token.")] = False
    stop_token_ids: Annotated[
        tuple[int, ...], Meta(description="Stop after any of these, besides the model's own.")
    ] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class Request(WireType, frozen=True, kw_only=True):
    """One prompt to continue."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    """Resolved: never None, so that a restarted engine draws the same numbers."""
    num_draft_tokens: int | None = None
    """Draft tokens per round for this request; None is the engine's setting, 0 turns speculation
    off."""
    eos_token_ids: tuple[int, ...] = ()


class ScheduledRequest(WireType, frozen=True, kw_only=True):
    """One request's share of a step: how many tokens it feeds, and how many it drafts on top."""

    request_id: str
    num_tokens: Annotated[int, Meta(ge=1)]
    """Committed tokens to feed the target in this step: a prompt chunk, or the last committed
    token."""
    num_draft_tokens: Annotated[int, Meta(ge=0)] = 0
    """Draft budget of the round; 0 while the prompt is still being read."""
    request: Request | None = None
    """The request itself, the first time only."""
    region: int | None = None
    """The KV region given to it, the first time only."""


class StepPlan(WireType, frozen=True, kw_only=True):
    """What every rank does next."""

    step: int
    scheduled: tuple[ScheduledRequest, ...]
    finished: tuple[str, ...] = ()
    """Requests to forget before the step: their KV regions may be in `scheduled` again."""
    shutdown: bool = False
    version: int = WIRE_VERSION


class StageTimes(WireType, frozen=True, kw_only=True):
    """Milliseconds on rank 0, summed over what a message covers."""

    calibrate_ms: float = 0.0
    """The exact drafting pass that makes the drafter's KV exact and gives the first draft."""
    draft_ms: float = 0.0
    """All other drafting passes."""
    verify_ms: float = 0.0
    """The target's pass and the verification of its result."""

    def plus(self, other: StageTimes) -> StageTimes:
        return StageTimes(
            calibrate_ms=self.calibrate_ms + other.calibrate_ms,
            draft_ms=self.draft_ms + other.draft_ms,
            verify_ms=self.verify_ms + other.verify_ms,
        )


class RequestResult(WireType, frozen=True, kw_only=True):
    """What a step did for one request. `token_ids` is empty while its prompt is still being
    read."""

    request_id: str
    token_ids: tuple[int, ...]
    margins: tuple[float, ...] = ()
    """Per token, the target's best logit minus its second best: small where rounding can change
    greedy text."""
    num_drafted: int = 0
    num_accepted: int = 0
    times: StageTimes = StageTimes()


class StepResult(WireType, frozen=True, kw_only=True):
    """Rank 0's answer to a plan, or why there is none."""

    step: int
    results: tuple[RequestResult, ...] = ()
    error: str | None = None
    version: int = WIRE_VERSION


class RequestMetrics(WireType, frozen=True, kw_only=True):
    """How one request went. Times are in milliseconds on rank 0 unless named otherwise."""

    num_prompt_tokens: int
    num_tokens: int
    rounds: int
    """Verification passes, each of which emitted at least one token."""
    drafted: int
    accepted: int
    times: StageTimes
    prefill_ms: float
    """From the engine's first step for it to its first token."""
    decode_s: float
    """From the first token to the last."""

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first over the time they took."""
        return (self.num_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


class TokenDelta(WireType, frozen=True, kw_only=True):
    """New tokens of one request. Exactly one delta of a request has a `finish_reason`, and it is
    the last."""

    request_id: str
    token_ids: tuple[int, ...]
    margins: tuple[float, ...] = ()
    num_accepted: int = 0
    """How many of them, from the front, had been drafted."""
    finish_reason: str | None = None
    """"stop", "length", "abort" or "error"."""
    error: str | None = None
    metrics: RequestMetrics | None = None

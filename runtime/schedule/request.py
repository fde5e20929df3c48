"""One request on its way through the engine.

WAITING ──region free──> READING ──prompt read──> DECODING ──stop, length, abort──> gone
"""

from __future__ import annotations

from dataclasses import dataclass, field

from paceline.runtime.types import Request, RequestMetrics, RequestResult, StageTimes


@dataclass(slots=True, kw_only=True)
class RunningRequest:
    """A request that holds a KV region."""

    request: Request
    region: int
    num_read: int = 0
    """Prompt tokens the target has seen."""
    announced: bool = False
    """Whether the ranks know it."""
    token_ids: list[int] = field(default_factory=list)
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    times: StageTimes = field(default_factory=StageTimes)
    started_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def prompt_left(self) -> int:
        return len(self.request.prompt_token_ids) - self.num_read

    @property
    def tokens_left(self) -> int:
        return self.request.params.max_tokens - len(self.token_ids)

    def stop_reason(self) -> str | None:
        """Why the last token ends the request, if it does."""
        params, last = self.request.params, self.token_ids[-1]
        if last in params.stop_token_ids:
            return "stop"
        if last in self.request.eos_token_ids and not params.ignore_eos:
            return "stop"
        return "length" if self.tokens_left == 0 else None

    def append(self, result: RequestResult, *, now_s: float) -> tuple[tuple[int, ...], str | None]:
        """Take a step's tokens up to the one that ends the request: those tokens, and the finish
        reason."""
        if not self.token_ids:
            self.first_token_s = now_s
        else:
            self.rounds += 1
            self.drafted += result.num_drafted
            self.times = self.times.plus(result.times)
        count, reason = 0, None
        while count < len(result.token_ids) and reason is None:
            self.token_ids.append(result.token_ids[count])
            count += 1
            reason = self.stop_reason()
        self.accepted += min(count, result.num_accepted)
        return result.token_ids[:count], reason

    def metrics(self, *, now_s: float) -> RequestMetrics:
        """How it went, once it is over."""
        first_token_s = self.first_token_s if self.token_ids else now_s
        return RequestMetrics(
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_tokens=len(self.token_ids),
            rounds=self.rounds,
            drafted=self.drafted,
            accepted=self.accepted,
            times=self.times,
            prefill_ms=(first_token_s - self.started_s) * 1e3,
            decode_s=now_s - first_token_s,
        )

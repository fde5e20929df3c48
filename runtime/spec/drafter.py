"""What every drafter is to the worker: something that proposes tokens for one request and learns
what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from paceline.runtime.types import Request, StageTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A chain of proposed tokens."""

    token_ids: tuple[int, ...]
    """The same on every rank of the target axis."""
    probs_PV: Tensor | None
    """Row i is the distribution the i-th token was really drawn from; on rank 0 only. None: not
    drawn, a point mass."""
    times: StageTimes
    """Without `verify_ms`."""


class Drafter(Protocol):
    """Called in lockstep on every rank. Holds state per request from `begin` to `forget`."""

    def describe(self) -> str:
        """A few words for a person."""

    def begin(self, request: Request, *, region: int) -> None:
        """Make room. `region` is the request's, in whatever pool the drafter keeps."""

    def read(self, request_id: str, token_ids: list[int], *, start: int) -> None:
        """See a chunk of the prompt, which begins at position `start`."""

    def propose(self, request_id: str, token_ids: list[int], *, num_tokens: int) -> Draft:
        """At most `num_tokens` (at least 1) tokens to follow `token_ids`, all committed tokens of
        the request."""

    def verified(
        self, request_id: str, *, num_committed: int, draft: Draft, num_accepted: int
    ) -> None:
        """The target kept the first `num_accepted` tokens of `draft`, which followed
        `num_committed` tokens."""

    def forget(self, request_id: str) -> None:
        """The request is over."""

"""Drafts from the request's own earlier tokens: what followed the last time its latest few tokens
stood in this order.

Integers only, so every rank computes the same; chosen, not drawn, so verification takes them as a
point mass. Source: prompt lookup decoding (Saxena 2023).
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from paceline.runtime.sequence import Sequence
from paceline.runtime.spec.drafter import Ask, Draft, Reading
from paceline.runtime.types import AS_CONFIGURED, DraftForm, StageTimes


class NgramDrafter:
    """Satisfies `Drafter`."""

    def describe(self) -> str:
        return "n-gram"

    def propose(
        self,
        asks: Many[Ask],
        readings: Many[Reading],  # noqa: ARG002
        form: DraftForm = AS_CONFIGURED,  # noqa: ARG002
    ) -> tuple[list[Draft], StageTimes]:
        drafts = []
        for ask in asks:
            index = ask.sequence.ngrams
            assert index is not None, "expected an index of every request that n-grams draft for"
            drafts.append(Draft(token_ids=tuple(index.propose(ask.num_tokens))))
        return drafts, StageTimes()

    def verified(self, sequence: Sequence, *, num_drafted: int, num_accepted: int) -> None:
        pass

"""One request as a drafter that is ahead has it: the text it was told of, and its own tail.

    0 ............ committed ------ tail ------ len(token_ids)

A commit is compared with the tail. What it has of it stays, so a round that accepted every draft
changes nothing here; from the first difference on the tail is thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from paceline.runtime.ahead.messages import Sync, Tail


@dataclass(slots=True, kw_only=True, eq=False)
class DraftedText:
    """Made by a `Sync`, changed by `Commit`s and by what is drafted."""

    request_id: str
    generation: int
    token_ids: list[int]
    num_ahead: int
    most: int
    """Tokens after which no draft can be used: the last one of a text is the target's own."""
    committed: int = field(init=False)

    def __post_init__(self) -> None:
        self.committed = len(self.token_ids)

    @classmethod
    def of(cls, sync: Sync) -> DraftedText:
        request = sync.request
        return cls(
            request_id=request.request_id,
            generation=sync.generation,
            token_ids=[*request.prompt_token_ids, *sync.output_token_ids],
            num_ahead=sync.num_ahead,
            most=len(request.prompt_token_ids) + request.max_tokens - 1,
        )

    @property
    def tail(self) -> list[int]:
        return self.token_ids[self.committed :]

    @property
    def wants(self) -> bool:
        """Whether a further draft could be of use."""
        end = len(self.token_ids)
        return end - self.committed < self.num_ahead and end < self.most

    def commit(self, base: int, token_ids: Sequence[int]) -> int | None:
        """Take tokens of the text; the position from which on the tail was wrong, if it was."""
        assert base == self.committed, f"told of token {base}, and {self.committed} are known"
        end = min(len(self.token_ids), base + len(token_ids))
        for position in range(base, end):
            if self.token_ids[position] != token_ids[position - base]:
                self.token_ids[position:] = token_ids[position - base :]
                self.committed = len(self.token_ids)
                return position
        self.token_ids += token_ids[end - base :]
        self.committed = base + len(token_ids)
        return None

    def add(self, token_id: int) -> Tail:
        """A draft: what to say of it."""
        self.token_ids.append(token_id)
        return Tail(
            request_id=self.request_id,
            generation=self.generation,
            base=self.committed,
            position=len(self.token_ids) - 1,
            token_ids=(token_id,),
        )

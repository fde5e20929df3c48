"""One request on one rank: its committed tokens, its KV blocks, and how far both models have read
it.

    committed tokens   0 ............. seen ............... len(token_ids)
                       |-- in the target's KV --|-- to be fed --|

Every rank holds the same, except for what only the deciding rank needs.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from paceline.runtime.inputs import Segment
from paceline.runtime.kv.pool import BlockTable
from paceline.runtime.sampling.batch import SampleState, is_plain_greedy, is_plain_race
from paceline.runtime.spec.calibrate import DraftRows
from paceline.runtime.spec.ngram import NgramIndex
from paceline.runtime.types import Request


@dataclass(slots=True, kw_only=True)
class Sequence:
    """Made when a request is first scheduled, and again when it comes back after a preemption."""

    request: Request
    token_ids: list[int]
    seen: int
    draft_rows: DraftRows
    plain_greedy: bool = field(init=False)
    """Whether every token is the best of the raw logits: asked of every request in every step."""
    races: bool = field(init=False)
    """Whether each is the best of them, or drawn at a temperature, with nothing else done to them."""
    sinks: int = 0
    window: int = 0
    """What its KV policy keeps; window 0: everything."""
    table: BlockTable = field(default_factory=BlockTable)
    ngrams: NgramIndex | None = None
    """Where the n-gram drafter is used."""
    sample: SampleState | None = None
    """On the rank that decides."""
    slot: int | None = None
    """Where on the board its progress is marked, if another engine waits for its KV."""
    error: str | None = None
    """Why it cannot be served, found where its tokens are chosen."""

    def __post_init__(self) -> None:
        self.plain_greedy = is_plain_greedy(self.request.params)
        self.races = self.plain_greedy or is_plain_race(self.request.params)

    def segment(
        self, *, start: int, num_rows: int, masks: Tokens[int] = (), tree_start: int = 0
    ) -> Segment:
        """Rows from slot `start` on, the last of them maybe of a tree with these masks."""
        return Segment(
            num_rows=num_rows,
            end=start + num_rows,
            table=self.table,
            sinks=self.sinks,
            window=self.window,
            masks=masks,
            tree_start=tree_start,
        )

    def commit(self, token_ids: Tokens[int]) -> None:
        """Append what a round emitted."""
        self.token_ids.extend(token_ids)
        if self.ngrams is not None:
            self.ngrams.extend(token_ids)
        if self.sample is not None:
            self.sample.commit(token_ids)

"""A worker under hand-made plans: the blocks and the book-keeping of a scheduler that may do as it
likes.

    texts ──shares: how many tokens, how many drafts──> StepPlan ──> Worker ──> StepResult ──> texts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from tests.paged import ScatteredBlocks

from paceline.runtime.types import (
    DrafterName,
    DraftShape,
    Request,
    RequestResult,
    SamplingParams,
    ScheduledRequest,
    StepPlan,
    StepResult,
)
from paceline.runtime.worker import Worker

MakeWorker = Callable[..., Worker]
"""`make_worker(native=..., **speculative)`: a worker that has worked on nothing yet."""


@dataclass(slots=True, kw_only=True, eq=False)
class Text:
    """One request and what has become of it."""

    request: Request
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    seen: int = 0
    known: bool = False
    """Whether the worker has it."""
    num_draft_cached: int = 0
    results: list[RequestResult] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.request.request_id

    @property
    def token_ids(self) -> list[int]:
        return [*self.request.prompt_token_ids, *self.output]

    @property
    def unread(self) -> int:
        """Tokens until it emits."""
        return len(self.token_ids) - self.seen

    @property
    def done(self) -> bool:
        return len(self.output) >= self.request.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One text's part of a step."""

    text: Text
    num_tokens: int
    num_drafts: int = 0
    drafter: DrafterName = "draft_model"
    read_draft: bool = False
    tree: DraftShape | None = None

    @property
    def most_rows(self) -> int:
        """Drafts, and KV slots behind the committed tokens."""
        return self.num_drafts if self.tree is None else self.tree.num_slots(self.num_drafts)


class Driver:
    """Plans steps for a worker. Blocks are scattered over the pool, in an order of the seed's."""

    def __init__(self, worker: Worker, *, block_size: int = 16, seed: int = 0) -> None:
        self.worker = worker
        self.blocks = ScatteredBlocks(worker.num_blocks, seed=seed)
        self._block_size = block_size
        self._step = 0
        self._finished: list[str] = []

    def add(
        self,
        name: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int = 0,
        num_draft_tokens: int | None = None,
    ) -> Text:
        """A text to be written; it holds nothing yet."""
        assert params.max_tokens is not None
        request = Request(
            request_id=name,
            prompt_token_ids=tuple(prompt),
            params=params,
            seed=seed,
            max_tokens=params.max_tokens,
            num_draft_tokens=num_draft_tokens,
        )
        return Text(request=request)

    def share_prefix(
        self, text: Text, other: Text, *, num_blocks: int, num_draft_cached: int
    ) -> None:
        """Start with the first blocks of another text, as a prefix cache would."""
        assert not text.known
        text.blocks = other.blocks[:num_blocks]
        text.seen = num_blocks * self._block_size
        text.num_draft_cached = num_draft_cached

    def preempt(self, text: Text) -> None:
        """Take its blocks away; it will be read again, into others."""
        self._finished.append(text.name)
        self.blocks.free += text.blocks
        text.blocks, text.seen, text.known, text.num_draft_cached = [], 0, False, 0

    def forget(self, *texts: Text) -> None:
        for text in texts:
            self.preempt(text)

    def step(self, shares: Sequence[Share]) -> StepResult:
        """Carry out a plan, as it would arrive over a channel, and note its results."""
        scheduled = tuple(self._schedule(share) for share in shares)
        plan = StepPlan(step=self._step, scheduled=scheduled, finished=tuple(self._finished))
        self._step, self._finished = self._step + 1, []
        plan = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        result = self.worker.step(plan)
        assert [each.request_id for each in result.results] == [s.text.name for s in shares]
        for share, each in zip(shares, result.results, strict=True):
            self._note(share, each)
        return result

    def _schedule(self, share: Share) -> ScheduledRequest:
        text = share.text
        end = text.seen + share.num_tokens + share.most_rows
        missing = -(-end // self._block_size) - len(text.blocks)
        new = self.blocks.take(max(0, missing))
        first = not text.known
        held = text.blocks if first else []
        text.blocks = [*text.blocks, *new]
        text.known = True
        return ScheduledRequest(
            request_id=text.name,
            num_tokens=share.num_tokens,
            num_draft_tokens=share.num_drafts,
            tree=share.tree,
            drafter=share.drafter,
            read_draft=share.read_draft,
            new_blocks=(*held, *new),
            request=text.request if first else None,
            output_token_ids=tuple(text.output) if first else (),
            num_cached=text.seen if first else 0,
            num_draft_cached=text.num_draft_cached if first else 0,
        )

    def _note(self, share: Share, result: RequestResult) -> None:
        text = share.text
        emits = share.num_tokens == text.unread
        assert len(result.token_ids) == (result.num_accepted + 1 if emits else 0)
        assert 0 <= result.num_accepted <= result.num_drafted <= share.most_rows
        assert result.num_accepted <= share.num_drafts
        assert result.draft_exact <= text.seen + share.num_tokens + result.num_accepted
        text.seen += share.num_tokens + result.num_accepted
        text.output += result.token_ids
        text.results.append(result)

    def write(
        self,
        *texts: Text,
        drafts: int = 0,
        chunk: int = 512,
        drafter: DrafterName = "draft_model",
        read_draft: bool = True,
        tree: DraftShape | None = None,
    ) -> list[list[int]]:
        """All of them to their ends, side by side; their outputs."""
        while going := [text for text in texts if not text.done]:
            shares = []
            for text in going:
                emits = text.unread <= chunk
                num_drafts = drafts if emits and text.output else 0
                shares.append(
                    Share(
                        text=text,
                        num_tokens=min(chunk, text.unread),
                        num_drafts=num_drafts,
                        tree=tree if num_drafts else None,
                        drafter=drafter,
                        read_draft=read_draft and not (drafts and text.output),
                    )
                )
            self.step(shares)
        return outputs(*texts)


def outputs(*texts: Text) -> list[list[int]]:
    """What was asked for of each: a last round may write more."""
    return [text.output[: text.request.max_tokens] for text in texts]


def num_accepted(*texts: Text) -> int:
    return sum(result.num_accepted for text in texts for result in text.results)

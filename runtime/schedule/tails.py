"""Drafts that were made ahead, and whether they still follow the text.

A drafter on ranks of its own streams drafts while the target verifies earlier ones. Neither waits
for the other, so either may be in front:

    the drafter is    text    0 ............ committed
                      stream  0 ............ committed ---- tail ---- streamed

    the target is     text    0 ...... streamed ---- expected ---- committed
                      stream  0 ...... streamed

What the target commits is compared with the tail, or, once it comes, the stream with the text that
was expected of it. Where both are equal the rest of the tail stays: a round that accepts every draft
finds the next ones there already, and the target's own token among them. Where they differ the tail is
cut, and the drafter, who will see the same difference, begins anew behind it. What it says before it
has seen it is known by the text it was told of: no further than the difference.

So the modes of PEARL (arXiv 2408.11850) are cases of one rule: with an empty tail the target computes
the next token while the drafter drafts from the same text (pre-verify); with a full one it verifies
while the drafter continues behind what is verified (post-verify). After the protocol of decoupled
speculation in SGLang's notes (decoding.md 4.3).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.runtime.ahead.messages import Close, Commit, Order, Sync, Tail, Tails
from paceline.runtime.errors import ShardError
from paceline.runtime.types import DraftPass, Request

_MOST_PASSES = 100


class TailBuffer:
    """One request's drafts that wait for their verification. `text` are its tokens, and grows."""

    def __init__(self, text: Sequence[int], *, generation: int) -> None:
        self._text = text
        self.reset(generation)

    def reset(self, generation: int) -> None:
        """Nothing is drafted, and drafts of earlier generations count no more."""
        self._generation = generation
        self._committed = self._streamed = len(self._text)
        self._boundary = 0
        """A drafter that was told of fewer tokens does not know where it was wrong last."""
        self._tail: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._tail)

    def first(self, count: int) -> tuple[int, ...]:
        """The drafts that follow the text, so many at most. Mutates nothing."""
        return tuple(itertools.islice(self._tail, count))

    def commit(self) -> None:
        """The text has grown: drop what it has of the tail, or all of it where they differ."""
        for position in range(self._committed, len(self._text)):
            if self._tail and self._tail.popleft() != self._text[position]:
                self._cut(position)
            self._committed = position + 1

    def receive(self, tail: Tail) -> None:
        """Take what the drafter added. Stale drafts are dropped; raises ShardError for what no drafter
        in its right mind says: a gap, another token in place of one that it said before."""
        if tail.generation < self._generation or tail.base < self._boundary:
            return
        if tail.generation > self._generation or not tail.base <= min(
            self._committed, tail.position
        ):
            raise ShardError(f"drafts from {tail.position} on do not follow the text: {tail}")
        if tail.position > self._streamed:
            if tail.position != tail.base:
                raise ShardError(f"drafts {self._streamed} to {tail.position} are missing: {tail}")
            self._streamed = tail.base  # it was overtaken, and goes on behind what it was told
        for position, token_id in enumerate(tail.token_ids, tail.position):
            if position == self._streamed and position < self._committed:
                if token_id != self._text[position]:
                    self._cut(position)
                    return
            elif position == self._streamed:
                self._tail.append(token_id)
            elif token_id != self._known(position):
                raise ShardError(
                    f"draft {position} was {self._known(position)} before, and is {token_id} now: {tail}"
                )
            self._streamed = max(self._streamed, position + 1)

    def _known(self, position: int) -> int:
        """What was streamed there."""
        in_text = position < self._committed
        return self._text[position] if in_text else self._tail[position - self._committed]

    def _cut(self, position: int) -> None:
        """The text has another token here than the stream."""
        self._tail.clear()
        self._streamed = position
        self._boundary = position + 1


@dataclass(slots=True, kw_only=True, eq=False)
class _Open:
    """A request that is drafted for."""

    request: Request
    text: Sequence[int]
    num_ahead: int
    tail: TailBuffer
    generation: int
    told: int | None = None
    """Tokens of the text that the drafter was told of; None where it does not know the request."""


class TailBook:
    """All requests that are drafted for ahead. What the drafter must be told piles up until somebody
    takes it."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._closed: list[str] = []
        self._generations = itertools.count(1)
        self._passes: deque[DraftPass] = deque(maxlen=_MOST_PASSES)

    def __len__(self) -> int:
        """Requests that are drafted for."""
        return len(self._open)

    def open(self, request: Request, text: Sequence[int], *, num_ahead: int) -> TailBuffer:
        """Have drafts made for a request, that grows as `text` does."""
        generation = next(self._generations)
        tail = TailBuffer(text, generation=generation)
        self._open[request.request_id] = _Open(
            request=request, text=text, num_ahead=num_ahead, tail=tail, generation=generation
        )
        return tail

    def close(self, request_id: str) -> None:
        """No more drafts for it; nothing happens where there were none."""
        known = self._open.pop(request_id, None)
        if known is not None and known.told is not None:
            self._closed.append(request_id)

    def receive(self, tails: Tails) -> None:
        """Take drafts; those of closed requests are dropped. Raises ShardError, see `TailBuffer`."""
        self._passes += tails.passes
        for tail in tails.tails:
            if (known := self._open.get(tail.request_id)) is not None:
                known.tail.receive(tail)

    def take_passes(self) -> tuple[DraftPass, ...]:
        """The drafter's passes that were heard of since the last call, the latest hundred at most."""
        passes = tuple(self._passes)
        self._passes.clear()
        return passes

    def take_orders(self) -> list[Order]:
        """What the drafter is to be told now."""
        orders: list[Order] = [Close(request_id=each) for each in self._closed]
        self._closed = []
        for request_id, each in self._open.items():
            if each.told == len(each.text):
                continue
            if each.told is None:
                written = each.text[len(each.request.prompt_token_ids) :]
                orders.append(
                    Sync(
                        request=each.request,
                        generation=each.generation,
                        output_token_ids=tuple(written),
                        num_ahead=each.num_ahead,
                    )
                )
            else:
                new = tuple(each.text[each.told :])
                orders.append(Commit(request_id=request_id, base=each.told, token_ids=new))
            each.told = len(each.text)
        return orders

    def forget(self) -> None:
        """The drafter is gone, and another must be told everything."""
        self._closed = []
        for each in self._open.values():
            each.generation, each.told = next(self._generations), None
            each.tail.reset(each.generation)

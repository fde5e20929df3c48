"""The n-gram drafter's memory: where the last few tokens occurred before, and what came next.

    tokens   a b c d e a b c | suffix "b c", seen before at 2
                   ^ ^ ^       drafts: d e a, then on through b c and the drafts themselves

Integers only. Every rank keeps the same index and finds the same drafts, so none are sent.
"""

from __future__ import annotations

from collections.abc import Iterable

_NOWHERE = -1

MAX_LOOKS = 32
"""Earlier places looked at. Text that repeats one token would else be compared with all of it."""


class NgramIndex:
    """The tokens of one request, by their runs of `min_length`.

    The match is the earlier place that agrees with the suffix for most tokens, up to `max_length`;
    the latest of those that agree equally far; among the `MAX_LOOKS` latest that agree for
    `min_length`.
    """

    __slots__ = ("_ends", "_max_length", "_min_length", "_previous", "_tokens")

    def __init__(
        self, token_ids: Iterable[int] = (), *, min_length: int = 2, max_length: int = 4
    ) -> None:
        assert 1 <= min_length <= max_length, (
            f"expected 1 <= min_length <= max_length, found {min_length} and {max_length}"
        )
        self._min_length = min_length
        self._max_length = max_length
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        # entry i: the latest earlier end of the run that ends at token i
        self._previous: list[int] = []
        self.extend(token_ids)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Add committed tokens. Constant time for each."""
        tokens, ends, previous, length = (
            self._tokens,
            self._ends,
            self._previous,
            self._min_length,
        )
        for token_id in token_ids:
            tokens.append(token_id)
            end = len(tokens) - 1
            if end + 1 < length:
                previous.append(_NOWHERE)
                continue
            run = tuple(tokens[-length:])
            previous.append(ends.get(run, _NOWHERE))
            ends[run] = end

    @property
    def has_match(self) -> bool:
        """Whether there is anything to draft. Constant time."""
        return bool(self._previous) and self._previous[-1] != _NOWHERE

    def propose(self, num_tokens: int) -> tuple[int, ...]:
        """`num_tokens` drafts, or none where the suffix is new. Mutates nothing."""
        if not self.has_match or num_tokens < 1:
            return ()
        tokens, place = self._tokens, self._match()
        period = len(tokens) - 1 - place
        return tuple(tokens[place + 1 + offset % period] for offset in range(num_tokens))

    def _match(self) -> int:
        last = len(self._tokens) - 1
        best, best_length, end = _NOWHERE, 0, self._previous[-1]
        for _ in range(MAX_LOOKS):
            if end == _NOWHERE or best_length == self._max_length:
                break
            length = self._agreement(end, last)
            if length > best_length:
                best, best_length = end, length
            end = self._previous[end]
        return best

    def _agreement(self, end: int, last: int) -> int:
        tokens, length = self._tokens, self._min_length
        while (
            length < self._max_length
            and length <= end
            and tokens[end - length] == tokens[last - length]
        ):
            length += 1
        return length

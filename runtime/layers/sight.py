"""What the rows of a pass see, as tensors on the device: worked out once, for all layers.

A pass is told in one array of integers, so that a device hears of it in one copy:

    positions T | slots T | sink limits T | batch | batch | ..
                            └ rows B*R | blocks B*N | windows B | sinks B | tree starts B | masks B*R

A batch is segments of equally many rows, which go through attention as one product. What is not
there is not told either: sink limits where nobody looks at sinks from a window, masks where there
is no tree, rows where one batch is the whole pass.

A kernel that finds its way through pages by itself (`flash.py`) needs no more than

    positions T | slots T | first rows B+1 | ends B | blocks B*N

for rows that see all before them; others are told as above.

An outline says how long every part is. A graph is recorded for an outline, and passes that are
smaller are padded to it: rows of padding stand at position 0, see that alone, and write to a block
that nobody reads. For a kernel that reads pages they belong to nobody, and see nothing.

Letters: T rows of the pass, B segments, R rows of a segment, N blocks, S positions in them, G query
heads per unit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from paceline.runtime.kv.pool import TILE
from paceline.runtime.layers.rope import RopeTable, Rotation

if TYPE_CHECKING:
    from paceline.runtime.inputs import Segment

ALL = 2**31
"""A window that hides nothing."""


class Batch(NamedTuple):
    """Segments of equally many rows."""

    num_segments: int
    num_rows: int
    """Of each; where pages are read, of the one that has most."""
    num_blocks: int
    """Of the longest."""


class Outline(NamedTuple):
    """All that shapes depend on."""

    num_rows: int
    batches: tuple[Batch, ...]
    pages: bool = False
    """Whether attention reads the pages themselves. Then one batch is the whole pass."""
    sinks: bool = False
    """Whether some segment looks at sinks from a window that has left them."""
    trees: bool = False
    furthest: int = 0
    """No row stands behind it."""

    @property
    def num_words(self) -> int:
        """Integers that tell a pass of this outline."""
        if self.pages:
            ((B, _, N),) = self.batches
            return 2 * self.num_rows + 2 * B + 1 + B * N
        count = (3 if self.sinks else 2) * self.num_rows
        for B, R, N in self.batches:
            count += B * (N + 3) + B * R * ((len(self.batches) > 1) + self.trees)
        return count


class Pages(NamedTuple):
    """Whose rows are which, and what they may read."""

    first_rows: Tensor
    """`[B+1]` int32: rows of segment b are those from `first_rows[b]` on, before `first_rows[b+1]`."""
    ends_B: Tensor
    """int32: positions that the last row of each sees."""
    blocks_BN: Tensor
    """int32."""
    first_keys: Tensor
    """`[B+1]` int32: where keys of each would begin, were all blocks laid one after another."""
    most_rows: int
    """Of a segment."""
    most_seen: int
    """Positions in the blocks of a segment."""

    @classmethod
    def of(
        cls,
        first_rows: Tensor,
        ends_B: Tensor,
        blocks_BN: Tensor,
        *,
        most_rows: int,
        block_size: int,
    ) -> Pages:
        B, N = blocks_BN.shape
        most_seen = N * block_size
        each = torch.arange(B + 1, dtype=torch.int32, device=blocks_BN.device)
        return cls(first_rows, ends_B, blocks_BN, each * most_seen, most_rows, most_seen)


def tell(
    segments: Sequence[Segment], positions: Sequence[int], *, block_size: int, pages: bool = False
) -> tuple[list[int], Outline]:
    """The pass in words, and the outline of exactly these segments; with `pages`, for a kernel that
    reads them, if it can."""
    furthest = max(segment.end for segment in segments)
    words = [*positions, *_slots(segments, block_size=block_size)]
    if pages and all(segment.sees_all for segment in segments):
        most_rows = max(segment.num_rows for segment in segments)
        batch = _batch(segments, most_rows, block_size=block_size)
        given = Outline(len(positions), (batch,), pages=True, furthest=furthest)
        return words + _about_pages(segments, batch, block_size=block_size), given
    alike = _alike(segments)
    given = Outline(
        num_rows=len(positions),
        batches=tuple(
            _batch([segment for _, segment in found], num_rows, block_size=block_size)
            for num_rows, found in alike.items()
        ),
        sinks=any(segment.leaves_sinks for segment in segments),
        trees=any(segment.masks for segment in segments),
        furthest=furthest,
    )
    if given.sinks:
        for segment in segments:
            words += [segment.sink_limit] * segment.num_rows
    for (num_rows, found), batch in zip(alike.items(), given.batches, strict=True):
        if len(alike) > 1:
            for start, _ in found:
                words.extend(range(start, start + num_rows))
        words += _about([segment for _, segment in found], batch, given, block_size=block_size)
    return words, given


def tell_padded(
    segments: Sequence[Segment],
    positions: Sequence[int],
    given: Outline,
    *,
    block_size: int,
    scratch: int,
) -> tuple[list[int], list[int]]:
    """The pass in words of a larger outline of one batch, and the row that each of its own became.
    `scratch` is the slot where padding writes."""
    (batch,) = given.batches
    places: list[int] = []
    if given.pages:
        places.extend(range(len(positions)))
    else:
        for b, segment in enumerate(segments):
            places.extend(range(b * batch.num_rows, b * batch.num_rows + segment.num_rows))
    slots = _slots(segments, block_size=block_size)
    words = [0] * given.num_rows + [scratch] * given.num_rows
    for place, position, slot in zip(places, positions, slots, strict=True):
        words[place], words[given.num_rows + place] = position, slot
    if given.pages:
        words += _about_pages(segments, batch, block_size=block_size)
    else:
        words += _about(segments, batch, given, block_size=block_size)
    return words, places


def _batch(segments: Sequence[Segment], num_rows: int, *, block_size: int) -> Batch:
    return Batch(len(segments), num_rows, max(-(-each.end // block_size) for each in segments))


def _slots(segments: Sequence[Segment], *, block_size: int) -> list[int]:
    """Where each row is written."""
    slots: list[int] = []
    for segment in segments:
        slots += segment.table.slots(segment.start, segment.end, block_size=block_size)
    return slots


def _alike(segments: Sequence[Segment]) -> dict[int, list[tuple[int, Segment]]]:
    """Segments with the row each begins at, by their number of rows."""
    found: dict[int, list[tuple[int, Segment]]] = defaultdict(list)
    start = 0
    for segment in segments:
        found[segment.num_rows].append((start, segment))
        start += segment.num_rows
    return found


def _about(
    segments: Sequence[Segment], batch: Batch, given: Outline, *, block_size: int
) -> list[int]:
    """Blocks, windows, sinks, tree starts and masks of some segments, padded to a batch."""
    B, R, _ = batch
    rest = [0] * (B - len(segments))
    words = _blocks(segments, batch, block_size=block_size)
    words += [*(segment.window or ALL for segment in segments), *[ALL] * len(rest)]
    words += [*(segment.sinks for segment in segments), *rest]
    words += [*(segment.tree_start for segment in segments), *rest]
    if given.trees:
        for segment in segments:
            words += [0] * (segment.num_rows - len(segment.masks))
            words += [mask - (mask >> 63 << 64) for mask in segment.masks]  # signed
            words += [0] * (R - segment.num_rows)
        words += rest * R
    return words


def _about_pages(segments: Sequence[Segment], batch: Batch, *, block_size: int) -> list[int]:
    """First rows, ends and blocks of some segments, padded to a batch: the rest has no rows."""
    rest = batch.num_segments - len(segments)
    words = list(accumulate((segment.num_rows for segment in segments), initial=0))
    words += words[-1:] * rest
    words += [*(segment.end for segment in segments), *[0] * rest]
    return words + _blocks(segments, batch, block_size=block_size)


def _blocks(segments: Sequence[Segment], batch: Batch, *, block_size: int) -> list[int]:
    B, _, N = batch
    words: list[int] = []
    for segment in segments:
        ids = segment.table.first(-(-segment.end // block_size))
        words += ids
        words += [0] * (N - len(ids))
    return words + [0] * (N * (B - len(segments)))


class Sight:
    """Where the rows of one pass stand, where they write, and what they see. Nothing in it is known
    to the host but shapes."""

    def __init__(self, words: Tensor, given: Outline, *, rope: RopeTable, block_size: int) -> None:
        """`words` `[num_words]` int64, on the device of `rope`."""
        at = 0

        def take(*shape: int) -> Tensor:
            nonlocal at
            start, at = at, at + torch.Size(shape).numel()
            return words[start:at].view(shape)

        T = given.num_rows
        positions_T, slots_T = take(T), take(T)
        self.blocks_T = slots_T // block_size
        """Block, tile in it and place in that, where each row's key and value go."""
        self.tiles_T = slots_T % block_size // TILE
        self.lanes_T = slots_T % TILE
        self.rotation = rope.rotation(positions_T, largest=given.furthest)
        self.sink_rotation: Rotation | None = None
        """For queries that look at sinks from a window: as if the window followed right upon them."""
        if given.sinks:
            limited_T = torch.minimum(positions_T, take(T))
            self.sink_rotation = rope.rotation(limited_T, largest=given.furthest)
        self.pages: Pages | None = None
        self.batches: list[Seen] = []
        """One or more where pages are not read."""
        if given.pages:
            ((B, R, N),) = given.batches
            told = take(2 * B + 1 + B * N).to(torch.int32)
            self.pages = Pages.of(
                told[: B + 1],
                told[B + 1 : 2 * B + 1],
                told[2 * B + 1 :].view(B, N),
                most_rows=R,
                block_size=block_size,
            )
            return
        for B, R, N in given.batches:
            rows_BR = take(B, R) if len(given.batches) > 1 else None
            self.batches.append(
                Seen(
                    rows_BR=rows_BR,
                    positions_BR=positions_T.view(B, R)
                    if rows_BR is None
                    else positions_T[rows_BR],
                    blocks_BN=take(B, N),
                    windows_B=take(B),
                    sinks_B=take(B),
                    tree_starts_B=take(B),
                    masks_BR=take(B, R) if given.trees else None,
                    num_seen=N * block_size,
                )
            )


class Seen:
    """The same for a batch."""

    def __init__(
        self,
        *,
        rows_BR: Tensor | None,
        positions_BR: Tensor,
        blocks_BN: Tensor,
        windows_B: Tensor,
        sinks_B: Tensor,
        tree_starts_B: Tensor,
        masks_BR: Tensor | None,
        num_seen: int,
    ) -> None:
        self.rows_BR = rows_BR
        """Which of the pass they are; None: all, in their order."""
        self.blocks_BN = blocks_BN
        self.shape = positions_BR.shape
        column = torch.arange(num_seen, device=positions_BR.device)
        self.sinks_BS = column < sinks_B[:, None]
        self._column, self._row = column, positions_BR[..., None]
        self._windows = windows_B[:, None, None]
        self._starts, self._masks_BR = tree_starts_B[:, None, None], masks_BR
        self._allowed: dict[tuple[int | None, int], Tensor] = {}

    def allowed(self, window: int | None, *, queries: int) -> Tensor:
        """What each row may see in layers of this sliding window, for every query head of a unit:
        `[B, 1, G*R, S]`. Worked out once."""
        key = (window, queries)
        if key not in self._allowed:
            allowed = self._within(
                self._windows if window is None else self._windows.clamp(max=window)
            )
            self._allowed[key] = allowed.repeat(1, queries, 1)[:, None]
        return self._allowed[key]

    def _within(self, own: Tensor) -> Tensor:
        """`[B, R, S]`."""
        column, row = self._column, self._row
        near = (column > row - own) | self.sinks_BS[:, None]
        allowed = (column <= row) & near
        if self._masks_BR is None:
            return allowed
        masks = self._masks_BR[..., None]
        bit = column - self._starts  # [B, 1, S]
        within = (bit >= 0) & (bit < 64)
        above = (masks >> bit.clamp(0, 63) & 1).bool() & within
        # the k-th bit of a mask from below is the ancestor at depth k
        depth = above.cumsum(-1)
        in_window = depth > depth[..., -1:] - own
        return torch.where((masks != 0) & (bit >= 0), above & in_window, allowed)

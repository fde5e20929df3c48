"""Passes of few rows as CUDA graphs: one launch instead of a thousand.

A pass of one row over the layers of a large model is hundreds of small operations, and on a GPU the
host takes longer to launch most of them than they run. A graph is recorded once and played with
other numbers in the same places. So a pass is padded to one of a few outlines (`layers/sight.py`),
told in one array of integers, and played:

    words, tokens ──copy──> the graph's own ──play──> hidden states, padded ──rows that are real──>

    rows of a segment    1 2 3 4 5 6 7 8, then steps of four
    segments             1 2 4 8 12 16 ..
    positions seen       a power of two, from 128

Passes with more than `MOST_ROWS` rows once padded, or where sinks are looked at from a window, run
as ever: there a launch costs less than what is launched.

Recording is given from outside (`Recorder`): on a GPU it is `record_cuda`, and in tests, where there
is none, something that computes anew over the same memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from paceline.runtime.inputs import Play, Rows, Segment
from paceline.runtime.kv.pool import KvPool
from paceline.runtime.layers.cpu_pass import Form
from paceline.runtime.layers.fused import fusing
from paceline.runtime.layers.rope import RopeTable
from paceline.runtime.layers.sight import Batch, Outline, Sight, tell_padded

MOST_ROWS = 256
"""Of a padded pass."""
MOST_SEEN = 2**16
"""Positions that all segments of a padded pass may see together where their keys and values are read
into one place."""
MOST_BLOCKS = 2**13
"""In all tables of a padded pass: the host writes each of them down, in a tenth of a microsecond."""
FEWEST_SEEN = 128
MOST_GRAPHS = 64
"""Kept at a time for each model; those not played for longest go."""

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records what a function does to tensors: what plays it again, and the tensor that holds its result
after each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graph:
    words: Tensor  # [num_words] int64, and behind them the real rows' places, [T]
    token_ids: Tensor  # [T] int64
    play: Callable[[], None]
    h_TE: Tensor


class GraphedPasses:
    """A model's passes over its KV pool, recorded as they are first met."""

    def __init__(
        self,
        pool: KvPool,
        *,
        rope: RopeTable,
        scale: float,
        device: torch.device,
        record: Recorder,
        pages: bool = False,
    ) -> None:
        """The pool must have a scratch block. With `pages`, attention is a library's that reads
        them."""
        self._pool, self._rope, self._scale = pool, rope, scale
        self._device, self._record, self._pages = device, record, pages
        self._graphs: OrderedDict[tuple[Form, Outline], _Graph] = OrderedDict()

    @property
    def num_recorded(self) -> int:
        return len(self._graphs)

    def fit(self, segments: Sequence[Segment]) -> Play | None:
        """What plays a pass over these; None where it must be launched."""
        if any(segment.leaves_sinks for segment in segments):
            return None
        padded = _padded(segments, self._pool.block_size, pages=self._pages)
        (batch,) = padded.batches
        num_blocks = batch.num_segments * batch.num_blocks
        num_seen = 0 if padded.pages else num_blocks * self._pool.block_size
        if padded.num_rows > MOST_ROWS or num_seen > MOST_SEEN or num_blocks > MOST_BLOCKS:
            return None
        if max(segment.end for segment in segments) > self._rope.num_ready:
            return None
        return partial(self._run, padded)

    def _run(
        self, padded: Outline, form: Form, compute: Callable[[Rows], Tensor], rows: Rows
    ) -> Tensor:
        """Reads nothing from the device."""
        words, places = tell_padded(
            rows.segments,
            rows.positions,
            padded,
            block_size=self._pool.block_size,
            scratch=self._pool.scratch_slot,
        )
        assert len(words) == padded.num_words, (
            f"expected {padded.num_words} words, found {len(words)}"
        )
        told = torch.tensor([*words, *places], dtype=torch.int64)
        graph = self._graphs.get((form, padded))
        if graph is None:
            graph = self._recorded(form, padded, compute)
        self._graphs.move_to_end((form, padded))
        graph.words[: len(told)].copy_(told, non_blocking=True)
        places_T = graph.words[len(words) : len(told)]
        graph.token_ids.index_copy_(0, places_T, rows.token_ids)
        graph.play()
        return graph.h_TE.index_select(0, places_T)

    def _recorded(self, form: Form, padded: Outline, compute: Callable[[Rows], Tensor]) -> _Graph:
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        num_words = padded.num_words
        # a pass of padding alone, for the time of recording
        words = torch.zeros(num_words + padded.num_rows, dtype=torch.int64, device=self._device)
        words[padded.num_rows : 2 * padded.num_rows] = self._pool.scratch_slot
        token_ids = torch.zeros(padded.num_rows, dtype=torch.int64, device=self._device)

        def again() -> Tensor:
            size = self._pool.block_size
            sight = Sight(words[:num_words], padded, rope=self._rope, block_size=size)
            rows = Rows(
                token_ids=token_ids,
                positions=(),
                segments=(),
                pool=self._pool,
                scale=self._scale,
                sight=sight,
            )
            return compute(rows)

        play, h_TE = self._record(again)
        graph = _Graph(words=words, token_ids=token_ids, play=play, h_TE=h_TE)
        self._graphs[form, padded] = graph
        return graph


def _padded(segments: Sequence[Segment], block_size: int, *, pages: bool) -> Outline:
    """The outline whose graph serves a pass over these."""
    num_segments, num_rows = len(segments), max(segment.num_rows for segment in segments)
    if num_segments > 2:
        num_segments = -(-num_segments // 4) * 4
    if num_rows > 8:
        num_rows = -(-num_rows // 4) * 4
    furthest = max(segment.end for segment in segments)
    num_seen = max(FEWEST_SEEN, 1 << (furthest - 1).bit_length())
    return Outline(
        num_rows=num_segments * num_rows,
        batches=(Batch(num_segments, num_rows, -(-num_seen // block_size)),),
        pages=pages and all(segment.sees_all for segment in segments),
        trees=any(segment.masks for segment in segments),
    )


def record_cuda(device: torch.device) -> Recorder:
    """Records into CUDA graphs that share their memory: what one leaves is gone when another is
    played."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def record(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        current = torch.cuda.current_stream(device)
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        with torch.cuda.stream(aside), fusing():
            compute()  # libraries choose their ways and take their memory, which no graph may do
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        memory = graphs[0].pool() if graphs else None
        # other threads may be at work on the device, such as a drafter that is ahead
        recording = torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local")
        with recording, fusing():
            h_TE = compute()
        graphs[:] = [graph]
        return graph.replay, h_TE

    return record

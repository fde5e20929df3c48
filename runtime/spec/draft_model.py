"""A small model as drafter: exact or layer-parallel passes, all requests of a step packed together.

    first pass    everything the drafter has not seen exactly (or, uncalibrated, not seen at all)   -> draft 1
    then          one grouped pass per depth, of the requests that still want tokens                -> draft 2 .. n

The last draft is never fed back: its row would be the next round's to write anyway. If one request's
first pass must be exact, all are: being exact costs little, a second pass much. Where a draft is to
branch, tree_drafting.py takes over after the first pass.

Letters: T rows, B requests, E width, V vocabulary entries here.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.parallel.mesh import Axis
from paceline.parallel.tensor import best, gather_vocabulary
from paceline.runtime.clock import StageClock
from paceline.runtime.kv.compact import KeptPath
from paceline.runtime.layers.cpu_chain import Drawn
from paceline.runtime.models.model import Model
from paceline.runtime.sampling.batch import (
    SampleRequest,
    draft_probs,
    draft_tokens,
)
from paceline.runtime.sequence import Sequence
from paceline.runtime.spec.drafter import Ask, Draft, Reading
from paceline.runtime.spec.layer_parallel import LayerParallel
from paceline.runtime.spec.tree_drafting import TreeDrafting
from paceline.runtime.types import AS_CONFIGURED, DraftForm, StageTimes

SHORT_ROWS = 32
"""Longer backlogs are read ahead of the packed first pass where it would grow too large."""


@dataclass(slots=True, kw_only=True)
class _Span:
    """Committed tokens of one request for the first pass."""

    sequence: Sequence
    start: int
    end: int


class DraftModel:
    """Satisfies `Drafter`. Every rank of `axis` runs it in lockstep; rank 0 draws and tells the
    others."""

    def __init__(
        self,
        model: Model,
        layer_parallel: LayerParallel,
        *,
        axis: Axis,
        max_rows: int,
        rejection: bool,
    ) -> None:
        """`max_rows` bounds a pass. With `rejection` drafts come with the distributions they were
        drawn from."""
        self.model = model
        self._layer_parallel = layer_parallel
        self._axis = axis
        self._max_rows = max_rows
        self._rejection = rejection
        self._trees = TreeDrafting(model, layer_parallel, axis=axis, rejection=rejection)

    def describe(self) -> str:
        return f"{self.model.describe()}, {len(self.model.decoder.groups)} passes for " + (
            f"{self.model.decoder.arch.num_layers} layers"
        )

    def propose(
        self, asks: Many[Ask], readings: Many[Reading], form: DraftForm = AS_CONFIGURED
    ) -> tuple[list[Draft], StageTimes]:
        clock = StageClock(self.model.device)
        if any(ask.tree is not None for ask in asks):
            return self._propose_trees(asks, readings, form, clock)
        # longest first, so that those still drafting are always the first ones
        order = sorted(range(len(asks)), key=lambda i: -asks[i].num_tokens)
        sorted_asks = [asks[i] for i in order]
        h_BE, exact = self._first_pass(sorted_asks, readings, form)
        if h_BE is None:
            return [], self._times(exact, first_ms=clock.lap(), rest_ms=0.0)
        if self._may_chain(sorted_asks):
            drafts, first_ms = self._chain(h_BE, sorted_asks, form, clock)
            times = self._times(exact, first_ms=first_ms, rest_ms=clock.lap())
            by_ask = dict(zip(order, drafts, strict=True))
            return [by_ask[i] for i in range(len(asks))], times
        drafting = _Drafting(sorted_asks, rejection=self._rejection)
        self._choose(h_BE, drafting)
        first_ms = clock.lap()
        for depth in range(2, sorted_asks[0].num_tokens + 1):
            drafting.drop_those_below(depth)
            self._choose(self._next_pass(drafting, form, depth=depth), drafting)
        drafts = drafting.finish()
        times = self._times(exact, first_ms=first_ms, rest_ms=clock.lap())
        by_ask = dict(zip(order, drafts, strict=True))
        return [by_ask[i] for i in range(len(asks))], times

    def _propose_trees(
        self, asks: Many[Ask], readings: Many[Reading], form: DraftForm, clock: StageClock
    ) -> tuple[list[Draft], StageTimes]:
        """The same where some drafts branch; what was drafted rank 0 alone knows."""
        h_BE, exact = self._first_pass(list(asks), readings, form)
        assert h_BE is not None, "expected a row for every ask"
        first_ms = clock.lap()
        drafts = self._trees.propose(asks, h_BE, form)
        return drafts, self._times(exact, first_ms=first_ms, rest_ms=clock.lap())

    def _times(self, exact: bool, *, first_ms: float, rest_ms: float) -> StageTimes:
        calibrated = exact and self._layer_parallel.any_group
        return StageTimes(
            calibrate_ms=first_ms if calibrated else 0.0,
            draft_ms=rest_ms if calibrated else first_ms + rest_ms,
        )

    def keep(self, kept: Many[tuple[Sequence, Draft, Many[int]]]) -> None:
        """Of the trees that were verified, keep the KV of these nodes: those of the accepted path.
        Called before the round's tokens are committed, and before `verified`."""
        paths = []
        for sequence, draft, path in kept:
            read = [row for row in (draft.rows[node] for node in path) if row >= 0]
            start = len(sequence.token_ids)
            paths.append(KeptPath(table=sequence.table, tree_start=start, rows=read))
            sequence.draft_rows.passed(end=start + len(read), exact=False)
        self.model.keep(paths)

    def verified(self, sequence: Sequence, *, num_drafted: int, num_accepted: int) -> None:
        sequence.draft_rows.verified(
            committed=len(sequence.token_ids), num_drafted=num_drafted, num_accepted=num_accepted
        )

    def _first_pass(
        self, asks: list[Ask], readings: Many[Reading], form: DraftForm
    ) -> tuple[Tensor | None, bool]:
        """Every ask's last committed token and whatever must be read before it: hidden states of
        those tokens, `[B, E]`, and whether the pass was exact."""
        spans, exact = [], False
        for ask in asks:
            sequence, committed = ask.sequence, len(ask.sequence.token_ids)
            first = sequence.draft_rows.first_pass(committed=committed, form=form)
            # behind a window blocks are given back, and must not be written any more
            start = (
                max(first.start, committed - sequence.window) if sequence.window else first.start
            )
            spans.append(_Span(sequence=sequence, start=start, end=committed))
            exact = exact or first.exact
        for reading in readings:
            start = reading.sequence.draft_rows.filled
            if start < reading.end:
                spans.append(_Span(sequence=reading.sequence, start=start, end=reading.end))
                exact = True
        if not spans:
            return None, False
        if sum(span.end - span.start for span in spans) > self._max_rows:
            for span in spans:
                self._read_ahead(span)
        h_TE = self._pass(spans, exact=exact)
        last, end = [], 0
        for span in spans[: len(asks)]:
            end += span.end - span.start
            last.append(end - 1)
        return (h_TE[last] if last else None), exact

    def _read_ahead(self, span: _Span) -> None:
        """Read all but the last token of a long backlog, alone."""
        while span.end - span.start > SHORT_ROWS:
            end = min(span.end - 1, span.start + self._max_rows)
            self._pass([_Span(sequence=span.sequence, start=span.start, end=end)], exact=True)
            span.start = end

    def _pass(self, spans: list[_Span], *, exact: bool) -> Tensor:
        """Feed committed tokens: `[T, E]`."""
        token_ids: list[int] = []
        segments = []
        for span in spans:
            token_ids += span.sequence.token_ids[span.start : span.end]
            num_rows = span.end - span.start
            segments.append(span.sequence.segment(start=span.start, num_rows=num_rows))
        rows = self.model.rows(self.model.tokens(token_ids), segments)
        h_TE = (self.model.decoder.exact if exact else self._layer_parallel.grouped)(rows)
        for span in spans:
            draft_rows = span.sequence.draft_rows
            draft_rows.passed(end=span.end, exact=exact and span.start <= draft_rows.exact)
        return h_TE

    def _next_pass(self, drafting: _Drafting, form: DraftForm, *, depth: int) -> Tensor:
        """Feed the latest draft of every request that drafts on: `[B, E]`."""
        segments = []
        for ask in drafting.asks:
            position = len(ask.sequence.token_ids) + depth - 2
            segments.append(ask.sequence.segment(start=position, num_rows=1))
            draft_rows = ask.sequence.draft_rows
            draft_rows.passed(end=position + 1, exact=form.exact and position <= draft_rows.exact)
        rows = self.model.rows(drafting.latest, segments)
        return (self.model.decoder.exact if form.exact else self._layer_parallel.grouped)(rows)

    def _may_chain(self, asks: list[Ask]) -> bool:
        """Whether all drafts may come from two calls, in which ranks speak for themselves."""
        chains = self.model.chains
        if chains is None or len(asks) > chains.most_rows:
            return False
        if self.model.decoder.axis is not self._axis and self._axis.size > 1:
            return False
        return all(
            (ask.sequence.plain_greedy or (ask.sequence.races and not self._rejection))
            and ask.sequence.window == 0
            and chains.reaches(len(ask.sequence.token_ids) + ask.num_tokens)
            for ask in asks
        )

    def _chain(
        self, h_BE: Tensor, asks: list[Ask], form: DraftForm, clock: StageClock
    ) -> tuple[list[Draft], float]:
        """A draft for every ask, from the hidden states of its last committed token, and the
        milliseconds of the first token."""
        chains = self.model.chains
        assert chains is not None
        draws = [
            Drawn(
                seed=ask.sequence.request.seed,
                temperature=ask.sequence.request.params.temperature,
                position=len(ask.sequence.token_ids),
            )
            for ask in asks
        ]
        first = chains.choose(h_BE, draws)
        first_ms = clock.lap()
        rest: list[list[int]] = [[] for _ in asks]
        on = [ask for ask in asks if ask.num_tokens > 1]
        if on:
            rest[: len(on)] = chains.draft_on(
                first[: len(on)],
                [draw.after() for draw in draws[: len(on)]],
                [ask.sequence.table for ask in on],
                [ask.num_tokens - 1 for ask in on],
                "exact" if form.exact else self._layer_parallel.form,
            )
        for ask in on:
            draft_rows, start = ask.sequence.draft_rows, len(ask.sequence.token_ids)
            exact = form.exact and start <= draft_rows.exact
            draft_rows.passed(end=start + ask.num_tokens - 1, exact=exact)
        drafts = [
            Draft(token_ids=(token_id, *more)) for token_id, more in zip(first, rest, strict=True)
        ]
        return drafts, first_ms

    def _choose(self, h_BE: Tensor, drafting: _Drafting) -> None:
        """The next draft of every request, the same on every rank."""
        decoder = self.model.decoder
        logits_BV = decoder.logits(h_BE)
        if drafting.greedy:
            # ranks of a split vocabulary exchange candidates and all see the same ones, bit for
            # bit; whole copies of a drafter (placement `layer`) each compute their own, so there
            # rank 0's word counts
            ids_B = best(logits_BV, offset=decoder.vocabulary.start, axis=decoder.axis)
            if decoder.axis is not self._axis:
                ids_B = self._axis.collectives.broadcast_(ids_B)
            drafting.append(ids_B, None)
            return
        full_BV = gather_vocabulary(logits_BV, axis=decoder.axis, widths=decoder.vocabulary_widths)
        ids_B = torch.zeros(full_BV.shape[0], dtype=torch.int64, device=full_BV.device)
        probs_BV = None
        if self._axis.index == 0:
            requests = drafting.sample_requests()
            if self._rejection:
                drawn, probs_BV = draft_probs(full_BV, requests)
                ids_B = torch.tensor(drawn, dtype=torch.int64, device=full_BV.device)
            else:
                ids_B = draft_tokens(full_BV, requests)
        drafting.append(self._axis.collectives.broadcast_(ids_B), probs_BV)


class _Drafting:
    """The drafts of a step while they grow, by depth; requests leave at the end of the list."""

    def __init__(self, asks: list[Ask], *, rejection: bool) -> None:
        self.asks = asks
        self.greedy = all(ask.sequence.plain_greedy for ask in asks)
        self._num_asks = len(asks)
        self._rejection = rejection
        self._ids: list[Tensor] = []
        self._probs: list[Tensor | None] = []
        self._told: list[list[int]] = [list(ask.drafted) for ask in asks]
        """Drafts so far, for drawing the next one. Which they are matters to penalties and grammars
        alone; else their number does, and nobody waits for the device to say them."""
        states = [ask.sequence.sample for ask in asks]
        self._reads = any(state is not None and state.processes for state in states)

    @property
    def latest(self) -> Tensor:
        """`[B]`: what each drafted last."""
        return self._ids[-1][: len(self.asks)]

    def drop_those_below(self, depth: int) -> None:
        """Keep the requests that want a draft of this depth."""
        while self.asks[-1].num_tokens < depth:
            self.asks = self.asks[:-1]

    def append(self, ids_B: Tensor, probs_BV: Tensor | None) -> None:
        self._ids.append(ids_B)
        self._probs.append(probs_BV)
        if not self.greedy:
            drafted = ids_B.tolist() if self._reads else [0] * len(ids_B)
            for told, token_id in zip(self._told, drafted, strict=False):
                told.append(int(token_id))

    def sample_requests(self) -> list[SampleRequest]:
        """What drawing the next draft of each request needs. On rank 0 alone."""
        found = []
        for ask, told in zip(self.asks, self._told, strict=False):
            state = ask.sequence.sample
            assert state is not None, "expected the deciding rank"
            found.append(SampleRequest(state=state, drafts=tuple(told)))
        return found

    def finish(self) -> list[Draft]:
        """One chain per request asked for."""
        told = iter(torch.cat(self._ids).tolist())  # all at once: one wait for the device
        columns = [[next(told) for _ in range(len(ids))] for ids in self._ids]
        drafts = []
        for i in range(self._num_asks):
            token_ids = tuple(int(column[i]) for column in columns if i < len(column))
            probs_PV = None
            if self._rejection and self._probs[0] is not None:
                rows = [probs[i] for probs in self._probs if probs is not None and i < len(probs)]
                probs_PV = torch.stack(rows)
            drafts.append(Draft(token_ids=token_ids, probs_PV=probs_PV))
        return drafts

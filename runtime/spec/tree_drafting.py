"""The drafts of a step, some of them trees, grown side by side by a small model.

    rank 0        distributions ──growth.py──> nodes to read, of all requests ──told──┐
    all ranks     one grouped pass over them <────────────────────────────────────────┘  and again

Every pass has the nodes of all requests that still grow, of chains one each, so there are as many
passes as the request of most levels needs. The drafter's KV rows of a tree lie behind the committed
tokens in the order in which its nodes were read; `Draft.rows` says which is whose.

Letters: R rows of a pass, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from paceline.parallel.mesh import Axis
from paceline.parallel.tensor import gather_vocabulary
from paceline.runtime.inputs import MOST_NODES
from paceline.runtime.models.model import Model
from paceline.runtime.sampling.batch import SampleRequest, draft_laws, draw_draft
from paceline.runtime.sampling.ranking import likeliest
from paceline.runtime.spec.drafter import Ask, Draft
from paceline.runtime.spec.growth import Drawn, Growth, Ranked
from paceline.runtime.spec.layer_parallel import LayerParallel
from paceline.runtime.spec.tree import ROOT
from paceline.runtime.types import DraftForm


@dataclass(slots=True, kw_only=True, eq=False)
class _Plant:
    """One request's draft on this rank."""

    ask: Ask
    drawn: bool
    """Whether its drafts are drawn, for the sampled rule, and not chosen."""
    masks: list[int] = field(default_factory=list)
    """Of the rows read so far (`inputs.py`)."""
    to_read: list[tuple[int, int]] = field(default_factory=list)
    """Told by rank 0: each node's token, and the row that read its parent."""
    growth: Growth = field(init=False)
    """Grows on rank 0 alone, as do the next two."""
    nodes: list[int] = field(default_factory=list)
    """Those that the last pass read."""
    laws: dict[int, Tensor] = field(default_factory=dict)
    """By node, what its children were drawn from, if they were drawn."""

    def __post_init__(self) -> None:
        shape = self.ask.tree
        self.growth = Growth(depth=self.ask.num_tokens, shape=shape, drawn=self.drawn)
        self.nodes = [ROOT]

    @property
    def most_rows(self) -> int:
        """Nodes that one pass may read, at most."""
        return 1 if self.ask.tree is None else MOST_NODES

    def request(self, node: int) -> SampleRequest:
        """What choosing the children of a node needs."""
        state = self.ask.sequence.sample
        assert state is not None, "expected the deciding rank"
        return SampleRequest(state=state, drafts=self.growth.path(node))

    def take_rows(self) -> list[int]:
        """Note the rows to be read; their masks."""
        first = len(self.masks)
        for row, (_, parent) in enumerate(self.to_read, first):
            self.masks.append(1 << row | (0 if parent == ROOT else self.masks[parent]))
        return self.masks[first:]

    def draft(self) -> Draft:
        """What has grown, on rank 0."""
        grown = self.growth.finish()
        tree, probs_PV = grown.tree, None
        if self.laws:
            # a tree whose children were drawn keeps all its nodes, so its nodes are the growth's
            nothing = torch.zeros_like(self.laws[ROOT])
            last = max(self.laws)
            probs_PV = torch.stack([self.laws.get(n, nothing) for n in range(ROOT, last + 1)])
        if self.ask.tree is None:
            return Draft(token_ids=tree.token_ids, probs_PV=probs_PV)
        return Draft(token_ids=tree.token_ids, tree=tree, rows=grown.rows, probs_PV=probs_PV)


class TreeDrafting:
    """Every rank of `axis` runs it in lockstep; rank 0 decides and alone knows what was drafted."""

    def __init__(
        self, model: Model, layer_parallel: LayerParallel, *, axis: Axis, rejection: bool
    ) -> None:
        """With `rejection`, chains and dynamic trees of sampled requests come with the distributions
        that they were drawn from."""
        self._model = model
        self._layer_parallel = layer_parallel
        self._axis = axis
        self._rejection = rejection

    def propose(self, asks: Many[Ask], h_RE: Tensor, form: DraftForm) -> list[Draft]:
        """A draft per ask, given the hidden states of their last committed tokens: on rank 0, and
        empty ones on the others."""
        plants = [_Plant(ask=ask, drawn=self._draws(ask)) for ask in asks]
        while True:
            self._put(plants, h_RE)
            self._tell(plants)
            if not any(plant.to_read for plant in plants):
                break
            h_RE = self._pass(plants, exact=form.exact)
        for plant in plants:
            if plant.ask.tree is None:  # as chains do: their rows lie where they stay
                sequence = plant.ask.sequence
                end = len(sequence.token_ids) + len(plant.masks)
                sequence.draft_rows.passed(end=end, exact=False)
        if self._axis.index != 0:
            return [Draft() for _ in plants]
        return [plant.draft() for plant in plants]

    def _put(self, plants: list[_Plant], h_RE: Tensor) -> None:
        """Of the nodes that were read, the children that they may have."""
        decoder = self._model.decoder
        logits_RV = gather_vocabulary(
            decoder.logits(h_RE), axis=decoder.axis, widths=decoder.vocabulary_widths
        )
        if self._axis.index != 0:
            return
        read = [(plant, node) for plant in plants for node in plant.nodes]
        drawn = [row for row, (plant, _) in enumerate(read) if plant.drawn]
        ranked = [row for row, (plant, _) in enumerate(read) if not plant.drawn]
        if drawn:
            self._put_drawn(logits_RV[drawn], [read[row] for row in drawn])
        if ranked:
            self._put_ranked(logits_RV[ranked], [read[row] for row in ranked])

    def _draws(self, ask: Ask) -> bool:
        if not self._rejection or ask.sequence.request.params.greedy:
            return False
        return ask.tree is None or ask.tree.kind != "beam"

    def _put_drawn(self, logits_RV: Tensor, read: list[tuple[_Plant, int]]) -> None:
        requests = [plant.request(node) for plant, node in read]
        laws_RV = draft_laws(logits_RV, requests)
        for (plant, node), request, law_V in zip(read, requests, laws_RV, strict=True):
            plant.laws[node] = law_V
            growth = plant.growth
            children = Drawn(
                law_V,
                reached=growth.reached(node),
                most=growth.width,
                draw=partial(draw_draft, request=request),
            )
            growth.put(node, children)

    def _put_ranked(self, logits_RV: Tensor, read: list[tuple[_Plant, int]]) -> None:
        found = likeliest(
            logits_RV,
            [plant.request(node) for plant, node in read],
            num_tokens=max(plant.growth.width for plant, _ in read),
            foresee=not self._rejection,
        )
        for (plant, node), (token_ids, chances) in zip(read, found, strict=True):
            growth = plant.growth
            most = growth.width
            children = Ranked(token_ids[:most], chances[:most], reached=growth.reached(node))
            growth.put(node, children)

    def _tell(self, plants: list[_Plant]) -> None:
        """What every request's next nodes are, on all ranks."""
        words: list[int] = []
        for plant in plants:
            plant.to_read = self._grow(plant) if self._axis.index == 0 else []
            if self._axis.size > 1:
                flat = [word for pair in plant.to_read for word in pair]
                words += [len(plant.to_read), *flat, *[0] * (2 * plant.most_rows - len(flat))]
        if self._axis.size == 1:
            return
        told = torch.tensor(words, dtype=torch.int64, device=self._model.device)
        if self._axis.index != 0:
            told = told.new_zeros(sum(1 + 2 * plant.most_rows for plant in plants))
        words = [int(word) for word in self._axis.collectives.broadcast_(told).tolist()]
        at = 0
        for plant in plants:
            pairs = words[at + 1 : at + 1 + 2 * words[at]]
            plant.to_read = list(zip(pairs[::2], pairs[1::2], strict=True))
            at += 1 + 2 * plant.most_rows

    def _grow(self, plant: _Plant) -> list[tuple[int, int]]:
        if not plant.nodes:
            return []
        growth = plant.growth
        plant.nodes = growth.grow()
        return [growth.to_read(node) for node in plant.nodes]

    def _pass(self, plants: list[_Plant], *, exact: bool) -> Tensor:
        """Read the next nodes of all requests: `[R, E]`."""
        token_ids: list[int] = []
        segments = []
        for plant in plants:
            if not plant.to_read:
                continue
            sequence = plant.ask.sequence
            committed, first = len(sequence.token_ids), len(plant.masks)
            token_ids += [token_id for token_id, _ in plant.to_read]
            segment = sequence.segment(
                start=committed + first,
                num_rows=len(plant.to_read),
                masks=plant.take_rows(),
                tree_start=committed,
            )
            segments.append(segment)
        rows = self._model.rows(self._model.tokens(token_ids), segments)
        return (self._model.decoder.exact if exact else self._layer_parallel.grouped)(rows)

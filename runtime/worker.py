"""One rank: it loads its part of the models and carries out plans.

What may be added here: what every request of every kind goes through on a rank. Drafting belongs in
`spec/`, rules of acceptance in `spec/verify.py`, anything about which request comes next in
`schedule/`, tensors in `models/`.

Every rank runs the same code on the same plan. A round, with rank 0 deciding:

    rank 0      propose ──draft ids──> verify pass ──logits──> verdict ──tokens──> lengths
    rank 1..    propose ──draft ids──> verify pass                    └─tokens──> lengths
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paceline.parallel.mesh import Mesh
from paceline.parallel.tensor import best_two, gather_vocabulary
from paceline.runtime.clock import StageClock
from paceline.runtime.config import EngineConfig
from paceline.runtime.loading import load_drafter, load_target
from paceline.runtime.models.model import Model
from paceline.runtime.sampling.filters import distribution
from paceline.runtime.sampling.sampler import RoundUniforms
from paceline.runtime.spec.drafter import Draft, Drafter
from paceline.runtime.spec.tree import DraftTree
from paceline.runtime.spec.verify import Verdict, verify_greedy, verify_point_mass, verify_sampled
from paceline.runtime.types import (
    Request,
    RequestResult,
    ScheduledRequest,
    StageTimes,
    StepPlan,
    StepResult,
)

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Sequence:
    """One request on this rank: its committed tokens, and how many of them the target has seen."""

    request: Request
    region: int
    token_ids: list[int]
    seen: int = 0
    """Rows of the target's KV that hold committed tokens."""

    @property
    def prompt_left(self) -> bool:
        return self.seen < len(self.request.prompt_token_ids)


@dataclass(slots=True, kw_only=True)
class Emitted:
    """Tokens a pass committed, with the target's margins where it took the best token."""

    token_ids: list[int]
    margins: list[float] = field(default_factory=list)
    num_accepted: int = 0


class Worker:
    """A rank's models and the requests they work on. `step` is its one hot method."""

    def __init__(
        self,
        config: EngineConfig,
        mesh: Mesh,
        *,
        num_regions: int = 1,
        target: Model | None = None,
    ) -> None:
        """`target` is one already loaded on this rank, for several drafters to share in turn."""
        self.mesh = mesh
        self.target = target or load_target(config, mesh, num_regions=num_regions)
        self.drafter: Drafter | None = load_drafter(config, mesh, num_regions=num_regions)
        self._speculates = config.speculative_config is not None
        self.sequences: dict[str, Sequence] = {}

    def facts(self) -> str:
        """One line for a person: where this rank runs and what it holds."""
        parts = [
            f"rank {self.mesh.rank}",
            str(self.mesh.device),
            f"all-reduce {self.mesh.world.collectives.name}",
        ]
        if self.target is not None:
            parts.append(f"target {self.target.describe()}")
        if self.drafter is not None:
            parts.append(f"drafter {self.drafter.describe()}")
        return ", ".join(parts)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Carry out a plan. Every rank returns a result; only rank 0's is read."""
        for request_id in plan.finished:
            self._forget(request_id)
        results = []
        for scheduled in plan.scheduled:
            sequence = self._sequence(scheduled)
            if sequence.prompt_left:
                results.append(self._read_prompt(sequence, scheduled.num_tokens))
            else:
                results.append(self._round(sequence, scheduled.num_draft_tokens))
        return StepResult(step=plan.step, results=tuple(results))

    def _sequence(self, scheduled: ScheduledRequest) -> Sequence:
        """The request's state here, made on its first step."""
        request = scheduled.request
        if request is not None:
            assert scheduled.region is not None, "expected a KV region with a new request"
            self.sequences[request.request_id] = Sequence(
                request=request, region=scheduled.region, token_ids=list(request.prompt_token_ids)
            )
            if self.drafter is not None:
                self.drafter.begin(request, region=scheduled.region)
        return self.sequences[scheduled.request_id]

    def _forget(self, request_id: str) -> None:
        if self.sequences.pop(request_id, None) is not None and self.drafter is not None:
            self.drafter.forget(request_id)

    def _read_prompt(self, sequence: Sequence, num_tokens: int) -> RequestResult:
        """Feed a chunk of the prompt to both models; the last chunk gives the first token."""
        clock = StageClock(self.mesh.device)
        start = sequence.seen
        chunk = sequence.token_ids[start : start + num_tokens]
        logits = self._target_pass(sequence, chunk, start=start, num_logits=1)
        sequence.seen += len(chunk)
        emitted = Emitted(token_ids=[])
        if not sequence.prompt_left:
            emitted = self._commit(sequence, DraftTree.chain(()), None, logits)
        verify_ms = clock.lap()
        if self.drafter is not None and sequence.request.num_draft_tokens != 0:
            self.drafter.read(sequence.request.request_id, chunk, start=start)
        times = StageTimes(verify_ms=verify_ms, calibrate_ms=clock.lap())
        return _result(sequence, emitted, num_drafted=0, times=times)

    def _round(self, sequence: Sequence, num_draft_tokens: int) -> RequestResult:
        """Draft, verify, commit: at least one token."""
        committed = len(sequence.token_ids)
        draft = self._propose(sequence, num_draft_tokens)
        clock = StageClock(self.mesh.device)
        tree = DraftTree.chain(draft.token_ids)
        fed = [sequence.token_ids[-1], *draft.token_ids]
        logits = self._target_pass(sequence, fed, start=sequence.seen, num_logits=len(fed))
        emitted = self._commit(sequence, tree, draft.probs_PV, logits)
        sequence.seen = len(sequence.token_ids) - 1
        if self.drafter is not None and draft.token_ids:
            self.drafter.verified(
                sequence.request.request_id,
                num_committed=committed,
                draft=draft,
                num_accepted=emitted.num_accepted,
            )
        times = draft.times.plus(StageTimes(verify_ms=clock.lap()))
        return _result(sequence, emitted, num_drafted=len(draft.token_ids), times=times)

    def _propose(self, sequence: Sequence, num_tokens: int) -> Draft:
        """The draft, known to every rank of the world."""
        none = Draft(token_ids=(), probs_PV=None, times=StageTimes())
        if num_tokens == 0 or not self._speculates:
            return none
        draft = none
        if self.drafter is not None:
            draft = self.drafter.propose(
                sequence.request.request_id, sequence.token_ids, num_tokens=num_tokens
            )
        if self.mesh.draft.size == self.mesh.world.size:
            return draft
        told = self._tell(list(draft.token_ids), num_tokens)
        return Draft(token_ids=tuple(told), probs_PV=draft.probs_PV, times=draft.times)

    def _target_pass(
        self, sequence: Sequence, token_ids: list[int], *, start: int, num_logits: int
    ) -> Tensor | None:
        """Logits of the last `num_logits` rows over this rank's vocabulary; None where the target
        does not run."""
        if self.target is None:
            return None
        rows = self.target.rows(self.target.tokens(token_ids), start=start, region=sequence.region)
        h_TE = self.target.decoder.exact(rows)
        return self.target.decoder.logits(h_TE[-num_logits:])

    def _commit(
        self,
        sequence: Sequence,
        tree: DraftTree,
        draft_probs_PV: Tensor | None,
        logits_PV: Tensor | None,
    ) -> Emitted:
        """Verify the tree on rank 0, tell the others, append what was emitted."""
        params = sequence.request.params
        margins: list[float] = []
        verdict: Verdict | None = None
        if self.target is not None and logits_PV is not None:
            decoder = self.target.decoder
            if params.greedy:
                best_P, margin_P = best_two(
                    logits_PV, offset=decoder.vocabulary.start, axis=decoder.axis
                )
                if self.mesh.rank0:
                    verdict = verify_greedy(tree, best_P.tolist())
                    margins = margin_P.tolist()
            else:
                full_PV = gather_vocabulary(
                    logits_PV, axis=decoder.axis, widths=decoder.vocabulary_widths
                )
                if self.mesh.rank0:
                    verdict = self._sample(sequence, tree, draft_probs_PV, full_PV)
        token_ids = []
        if verdict is not None:
            token_ids = [*(tree.token_ids[node] for node in verdict.path), verdict.token_id]
        token_ids = self._tell(token_ids, tree.num_nodes + 1)
        sequence.token_ids += token_ids
        return Emitted(
            token_ids=token_ids, margins=margins[: len(token_ids)], num_accepted=len(token_ids) - 1
        )

    def _sample(
        self, sequence: Sequence, tree: DraftTree, draft_probs_PV: Tensor | None, logits_PV: Tensor
    ) -> Verdict:
        probs_PV = distribution(logits_PV, sequence.request.params)
        uniforms = RoundUniforms(sequence.request.seed, len(sequence.token_ids))
        if draft_probs_PV is None:
            return verify_point_mass(tree, probs_PV, uniforms=uniforms)
        return verify_sampled(tree, probs_PV, draft_probs_PV, uniforms=uniforms)

    def _tell(self, token_ids: list[int], most: int) -> list[int]:
        """Rank 0's token ids, at most `most` of them, on every rank of the world."""
        if self.mesh.world.size == 1:
            return token_ids
        words = [len(token_ids), *token_ids, *[0] * (most - len(token_ids))]
        told = torch.tensor(words, dtype=torch.int64, device=self.mesh.device)
        words = self.mesh.world.collectives.broadcast_(told).tolist()
        return [int(word) for word in words[1 : 1 + words[0]]]


def _result(
    sequence: Sequence, emitted: Emitted, *, num_drafted: int, times: StageTimes
) -> RequestResult:
    return RequestResult(
        request_id=sequence.request.request_id,
        token_ids=tuple(emitted.token_ids),
        margins=tuple(emitted.margins),
        num_drafted=num_drafted,
        num_accepted=emitted.num_accepted,
        times=times,
    )

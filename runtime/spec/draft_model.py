"""A small model as drafter: exact or layer-parallel passes, one token after another.

    first pass    everything the drafter has not seen exactly (or, uncalibrated, not seen at all)   -> draft 1
    then          one grouped pass per token                                                          -> draft 2 .. n

The last draft is never fed back: its row would be the next round's to write anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.parallel.mesh import Axis
from paceline.parallel.tensor import best_one, gather_vocabulary
from paceline.runtime.clock import StageClock
from paceline.runtime.models.model import Model
from paceline.runtime.sampling.filters import distribution
from paceline.runtime.sampling.sampler import Purpose, RoundUniforms, draw
from paceline.runtime.spec.calibrate import Calibration, DraftRows
from paceline.runtime.spec.drafter import Draft
from paceline.runtime.spec.layer_parallel import LayerParallel
from paceline.runtime.types import Request, StageTimes


class DraftModel:
    """Satisfies `Drafter`. Every rank of `axis` runs it in lockstep; rank 0 draws and tells the
    others."""

    def __init__(
        self,
        model: Model,
        layer_parallel: LayerParallel,
        *,
        calibration: Calibration,
        axis: Axis,
        vocab_size: int,
    ) -> None:
        """`vocab_size` is the target's: rows of probabilities have its width."""
        self._vocab_size = vocab_size
        self.model = model
        self._layer_parallel = layer_parallel
        self._calibration = calibration
        self._axis = axis
        self.rows: dict[str, DraftRows] = {}
        """Per request, which KV rows are exact."""
        self._requests: dict[str, tuple[Request, int]] = {}

    def describe(self) -> str:
        return f"{self.model.describe()}, {len(self.model.decoder.groups)} passes for " + (
            f"{self.model.decoder.arch.num_layers} layers"
        )

    def begin(self, request: Request, *, region: int) -> None:
        self._requests[request.request_id] = (request, region)
        self.rows[request.request_id] = DraftRows(
            calibration=self._calibration, grouped=self._layer_parallel.any_group
        )

    def forget(self, request_id: str) -> None:
        del self._requests[request_id], self.rows[request_id]

    def read(self, request_id: str, token_ids: list[int], *, start: int) -> None:
        self._pass(request_id, self.model.tokens(token_ids), start=start, exact=True)

    def propose(self, request_id: str, token_ids: list[int], *, num_tokens: int) -> Draft:
        request, _ = self._requests[request_id]
        committed = len(token_ids)
        uniforms = RoundUniforms(request.seed, committed)
        clock = StageClock(self.model.device)
        first = self.rows[request_id].first_pass(committed=committed)
        pending = self.model.tokens(token_ids[first.start :])
        h_TE = self._pass(request_id, pending, start=first.start, exact=first.exact)
        token, probs = self._choose(h_TE, request, depth=1, uniforms=uniforms)
        first_ms = clock.lap()
        tokens, rows = [token], [probs]
        for depth in range(2, num_tokens + 1):
            h_TE = self._pass(request_id, token, start=committed + depth - 2, exact=False)
            token, probs = self._choose(h_TE, request, depth=depth, uniforms=uniforms)
            tokens.append(token)
            rows.append(probs)
        drawn = [row for row in rows if row is not None]
        draft_ids = tuple(int(i) for i in torch.cat(tokens).tolist())
        rest_ms = clock.lap()
        calibrated = first.exact and self.rows[request_id].grouped
        return Draft(
            token_ids=draft_ids,
            probs_PV=torch.cat(drawn) if drawn else None,
            times=StageTimes(
                calibrate_ms=first_ms if calibrated else 0.0,
                draft_ms=rest_ms if calibrated else first_ms + rest_ms,
            ),
        )

    def verified(
        self, request_id: str, *, num_committed: int, draft: Draft, num_accepted: int
    ) -> None:
        self.rows[request_id].verified(
            committed=num_committed, num_drafted=len(draft.token_ids), num_accepted=num_accepted
        )

    def _pass(self, request_id: str, token_ids_T: Tensor, *, start: int, exact: bool) -> Tensor:
        """Feed tokens; the last row's hidden state, `[1, E]`."""
        rows = self.model.rows(token_ids_T, start=start, region=self._requests[request_id][1])
        decode = self.model.decoder.exact if exact else self._layer_parallel.grouped
        h_TE = decode(rows)
        self.rows[request_id].passed(end=rows.end, exact=exact)
        return h_TE[-1:]

    def _choose(
        self, h_1E: Tensor, request: Request, *, depth: int, uniforms: RoundUniforms
    ) -> tuple[Tensor, Tensor | None]:
        """The next draft, `[1]` int64, the same on every rank; and, on rank 0, what it was drawn
        from, `[1, V]`."""
        decoder = self.model.decoder
        logits = decoder.logits(h_1E)
        if request.params.greedy:
            # ranks of a split vocabulary exchange candidates and all see the same ones, bit for
            # bit; whole copies of a drafter (placement `layer`) each compute their own, so there
            # rank 0's word counts
            token = best_one(logits, offset=decoder.vocabulary.start, axis=decoder.axis)
            return (
                token if decoder.axis is self._axis else self._axis.collectives.broadcast_(token)
            ), None
        full = gather_vocabulary(logits, axis=decoder.axis, widths=decoder.vocabulary_widths)
        probs = None
        token = torch.zeros(1, dtype=torch.int64, device=full.device)
        if self._axis.index == 0:
            probs = distribution(full, request.params)
            probs = F.pad(probs, (0, self._vocab_size - probs.shape[1]))
            token[0] = draw(probs[0], uniforms(depth, purpose=Purpose.DRAFT))
        return self._axis.collectives.broadcast_(token), probs

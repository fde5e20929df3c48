"""Tokens for all requests of a step, on rank 0: processed, filtered and drawn in a few calls.

    logits of the step      request a  row 0     after its text
                                       row 1     after its text and drafts[:1]
                                       row 2     after its text and drafts[:2]
                            request b  row 0     ...

    plain greedy rows       argmax
    others                  copied to fp32, processed by request (penalties.py), then
      greedy                argmax
      sampled               scaled and filtered together (filters.py), drawn by race (sampler.py)

A row gets the token that decoding one token at a time would draw there: it depends on the request,
its seed and the tokens before it, not on the rows beside it nor on who drafted. So to verify a chain
is to follow the drafts as long as they equal the target's tokens (`verify_greedy`, temperature or
not), and the text is the same whatever is drafted. The rejection rule takes distributions instead.

Letters: R rows of all requests, P rows of one, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.runtime.sampling.filters import candidates, distribution, select_rows
from paceline.runtime.sampling.grammar import GrammarCompiler, GrammarState
from paceline.runtime.sampling.penalties import Penalties, add_bias_, allow_only_, ban_
from paceline.runtime.sampling.sampler import (
    Purpose,
    RoundUniforms,
    draw,
    draw_coupled,
    gumbel_noise,
    gumbel_noise_at,
)
from paceline.runtime.types import Request, SamplingParams

# Measured in ms on one CPU core, `target_tokens`, logits and 36 requests of 1 or 6 rows each:
#                                            V = 4,096           V = 131,072
#                                         36 x 1    36 x 6    36 x 1    36 x 6
#   plain greedy                            0.10      0.53       2.7        16
#   temperature 1                           0.67       3.6        18       106
#   temperature 0.8, min_p 0.05             0.83       4.7        22       135
#   temperature 0.8, top_k 50, top_p 0.9     1.5       8.4         8        49
#   temperature 0.8, top_p 0.9               2.2        13        16       108
#   greedy, all three penalties             0.79       3.0         4        67
#   greedy, any JSON object                 0.98       3.8        11       105

# Elements of logits drawn from at once on a CPU, so that what comes between stays in its caches.
_CHUNK = 2**19


def is_plain_greedy(params: SamplingParams) -> bool:
    """Whether every token is the best of the raw logits.

    Ranks that split the vocabulary can then agree on it without gathering rows, unless
    log-probabilities are asked for.
    """
    return params.greedy and _leaves_logits(params)


def is_plain_race(params: SamplingParams) -> bool:
    """Whether every token is drawn from the raw logits at a temperature, none of them dropped."""
    drops = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    return not params.greedy and not drops and _leaves_logits(params)


def _leaves_logits(params: SamplingParams) -> bool:
    return (
        not Penalties.wanted(params)
        and not params.logit_bias
        and params.min_tokens == 0
        and params.structured_outputs is None
    )


class SampleState:
    """What rank 0 remembers of a request between steps in order to process its logits.

    Everything in it follows from the request and its committed tokens, so it may be thrown away when
    the request is preempted and made again.
    """

    def __init__(
        self,
        request: Request,
        *,
        vocab_size: int,
        device: torch.device,
        grammars: GrammarCompiler | None = None,
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """`vocab_size` is the target's. Raises PromptError for a grammar that a frontend should have
        refused."""
        params = request.params
        self.request = request
        self.vocab_size = vocab_size
        self.num_output = 0
        self._min_tokens = params.min_tokens
        # A token id beyond the vocabulary is never written, so nothing need be done about it.
        self._ends = [
            token_id
            for token_id in dict.fromkeys((*request.eos_token_ids, *params.stop_token_ids))
            if 0 <= token_id < vocab_size
        ]
        self._ends_B = torch.tensor(self._ends, dtype=torch.int64, device=device)
        biases = {i: bias for i, bias in (params.logit_bias or {}).items() if 0 <= i < vocab_size}
        self._biases: tuple[Tensor, Tensor] | None = None
        if biases:
            self._biases = (
                torch.tensor(list(biases), dtype=torch.int64, device=device),
                torch.tensor(list(biases.values()), dtype=torch.float32, device=device),
            )
        self._penalties: Penalties | None = None
        if Penalties.wanted(params):
            prompt = (i for i in request.prompt_token_ids if 0 <= i < vocab_size)
            self._penalties = Penalties(params, prompt, device=device)
        self.grammar: GrammarState | None = None
        if params.structured_outputs is not None:
            assert grammars is not None, "structured outputs need a tokenizer to compile them for"
            self.grammar = grammars.start(
                params.structured_outputs, eos_token_ids=request.eos_token_ids
            )
        self.plain_greedy = is_plain_greedy(params)
        self.commit(output_token_ids)

    @property
    def num_committed(self) -> int:
        """Tokens of prompt and text: the position of the next one."""
        return len(self.request.prompt_token_ids) + self.num_output

    @property
    def processes(self) -> bool:
        """Whether logits are changed before temperature and filters."""
        return (
            self.grammar is not None
            or self._penalties is not None
            or self._biases is not None
            or self.num_output < self._min_tokens
        )

    def commit(self, token_ids: Iterable[int]) -> None:
        """These tokens are now in the text."""
        tokens = tuple(token_ids)
        self.num_output += len(tokens)
        if self._penalties is not None:
            self._penalties.commit(tokens)
        if self.grammar is not None:
            self.grammar.commit(tokens)

    def process_(self, logits_PV: Tensor, *, drafts: Sequence[int], first: int = 0) -> None:
        """Grammar, bans, biases and penalties for rows `first`, `first + 1`, ... of a chain, in
        place. `logits_PV` is in fp32; row i sees `drafts[:i]`."""
        num_rows = len(logits_PV)
        num_banned = 0
        if self._ends:
            written = self.num_output + first
            num_banned = min(num_rows, max(0, self._min_tokens - written))
        if self.grammar is not None:
            rows = range(first, first + num_rows)
            allow_only_(logits_PV, [self.grammar.mask(drafts[:row]) for row in rows])
            # A grammar that must stop stops, however few tokens there are: something must be drawn.
            for row in range(num_banned):
                others_1V = logits_PV[row : row + 1].index_fill(1, self._ends_B, -torch.inf)
                if others_1V.amax().item() > -torch.inf:
                    logits_PV[row] = others_1V[0]
        elif num_banned:
            ban_(logits_PV[:num_banned], self._ends_B)
        if self._biases is not None:
            add_bias_(logits_PV, *self._biases)
        if self._penalties is not None:
            self._penalties.apply_(logits_PV, drafts=drafts, first=first)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One request's rows of a step: one after its text, one more after each draft."""

    state: SampleState
    drafts: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return 1 + len(self.drafts)


def target_tokens(logits_RV: Tensor, requests: Sequence[SampleRequest]) -> list[list[int]]:
    """The target's token for every row, by request: 1 + len(drafts) of them each.

    `logits_RV` are raw, the requests' rows one after another; they are not modified.
    """
    total = sum(request.num_rows for request in requests)
    assert total == len(logits_RV), f"expected {total} rows of logits, found {len(logits_RV)}"
    token_ids = _tokens(logits_RV, [(request, 0) for request in requests]).tolist()
    rows = iter(token_ids)
    return [[next(rows) for _ in range(request.num_rows)] for request in requests]


def draft_tokens(logits_RV: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """The drafter's next token for each request, [R] int64; `drafts` are those drafted so far.

    One row each. Drawn with the noise that the target will draw with at the same position. The
    drafter's vocabulary may be shorter than the target's, or padded.
    """
    logits_RV = target_width(logits_RV, requests)
    return _tokens(logits_RV, [(request, len(request.drafts)) for request in requests])


def draft_probs(logits_RV: Tensor, requests: Sequence[SampleRequest]) -> tuple[list[int], Tensor]:
    """`draft_tokens` for the rejection rule: tokens, and what they were drawn from, [R, V]."""
    probs_RV = draft_laws(logits_RV, requests)
    token_ids = []
    for probs_V, request in zip(probs_RV, requests, strict=True):
        token_ids.append(draw_draft(probs_V, 0, request=request))
    return token_ids, probs_RV


def draft_laws(logits_RV: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """What the drafter draws each request's next token from, [R, V] of the target's vocabulary."""
    return next_laws(target_width(logits_RV, requests), requests)


def draw_draft(probs_V: Tensor, lane: int, *, request: SampleRequest) -> int:
    """A token to follow a request's text and drafts, from a law that need not be normalised. `lane`
    tells apart the nodes of one depth of a tree."""
    uniforms = RoundUniforms(request.state.request.seed, request.state.num_committed)
    depth = 1 + len(request.drafts)
    return draw(probs_V, uniforms(depth, purpose=Purpose.DRAFT, lane=lane))


def next_laws(logits_RV: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """What each request's token after all of its drafts is drawn from, [R, V]: one row each."""
    laws, row = [], 0
    for state, alike in itertools.groupby(requests, key=lambda request: request.state):
        group = list(alike)
        if state.processes:
            for request in group:
                laws.append(
                    _distribution(logits_RV[row : row + 1], request, first=len(request.drafts))
                )
                row += 1
        else:
            laws.append(distribution(logits_RV[row : row + len(group)], state.request.params))
            row += len(group)
    return torch.cat(laws)


def target_token(logits_V: Tensor, request: SampleRequest) -> int:
    """The target's token after all of a request's drafts, the same as `target_tokens` finds there."""
    return int(_tokens(logits_V[None], [(request, len(request.drafts))]))


def target_probs(logits_PV: Tensor, request: SampleRequest) -> Tensor:
    """What the target draws a request's tokens from, [P, V], for the rejection rule."""
    assert len(logits_PV) == request.num_rows, (
        f"expected {request.num_rows} rows of logits, found {len(logits_PV)}"
    )
    return _distribution(logits_PV, request, first=0)


def _distribution(logits_PV: Tensor, request: SampleRequest, *, first: int) -> Tensor:
    if request.state.processes:
        logits_PV = logits_PV.to(torch.float32, copy=True)
        request.state.process_(logits_PV, drafts=request.drafts, first=first)
    return distribution(logits_PV, request.state.request.params)


def target_width(logits_RV: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """A drafter's logits over the target's vocabulary: of what it does not know, -inf."""
    short = requests[0].state.vocab_size - logits_RV.shape[1]
    if short == 0:
        return logits_RV
    return torch.nn.functional.pad(logits_RV, (0, short), value=-torch.inf)


@dataclass(slots=True)
class _Rows:
    """Rows that are drawn in the same way."""

    rows: list[int]
    params: list[SamplingParams]
    seeds: list[int]
    positions: list[int]


def _tokens(logits_RV: Tensor, spans: Sequence[tuple[SampleRequest, int]]) -> Tensor:
    """The token of each row [R] int64. A span is a request and the depth of its first row; it goes
    down to its last draft."""
    if all(request.state.plain_greedy for request, _ in spans):
        return logits_RV.argmax(dim=-1)
    plain: list[int] = []
    other: list[int] = []
    greedy: list[int] = []  # rows within `other`, as are those of `sampled`
    sampled = _Rows([], [], [], [])
    touched: list[tuple[SampleRequest, int, slice]] = []
    row = 0
    for request, first in spans:
        state = request.state
        num_rows = request.num_rows - first
        rows = range(row, row + num_rows)
        row += num_rows
        if state.plain_greedy:
            plain += rows
            continue
        inside = range(len(other), len(other) + num_rows)
        other += rows
        if state.processes:
            touched.append((request, first, slice(inside.start, inside.stop)))
        params = state.request.params
        if params.greedy:
            greedy += inside
            continue
        sampled.rows += inside
        sampled.params += [params] * num_rows
        sampled.seeds += [state.request.seed] * num_rows
        start = state.num_committed + first
        sampled.positions += range(start, start + num_rows)
    own_RV = logits_RV if not plain else select_rows(logits_RV, other)
    if touched:
        own_RV = own_RV.to(torch.float32, copy=own_RV is logits_RV)
        for request, first, span in touched:
            request.state.process_(own_RV[span], drafts=request.drafts, first=first)
    own_R = torch.empty(len(other), dtype=torch.int64, device=logits_RV.device)
    if greedy:
        _put(own_R, greedy, select_rows(own_RV, greedy).argmax(dim=-1))
    if sampled.rows:
        _put(own_R, sampled.rows, _draw(select_rows(own_RV, sampled.rows), sampled))
    if not plain:
        return own_R
    token_ids_R = torch.empty(len(logits_RV), dtype=torch.int64, device=logits_RV.device)
    _put(token_ids_R, plain, select_rows(logits_RV, plain).argmax(dim=-1))
    _put(token_ids_R, other, own_R)
    return token_ids_R


def _draw(logits_RV: Tensor, rows: _Rows) -> Tensor:
    """The winner of each row's race [R]."""
    num_rows, vocab_size = logits_RV.shape
    device = logits_RV.device
    chunk = max(1, _CHUNK // vocab_size) if device.type == "cpu" else num_rows
    token_ids_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    for start in range(0, num_rows, chunk):
        end = start + chunk
        for part in candidates(logits_RV[start:end], rows.params[start:end]):
            seeds = [rows.seeds[start + row] for row in part.rows]
            positions = [rows.positions[start + row] for row in part.rows]
            ids_RW = part.token_ids_RW
            if ids_RW is None:
                noise = gumbel_noise(seeds, positions, vocab_size=vocab_size, device=device)
            else:
                noise = gumbel_noise_at(seeds, positions, ids_RW, vocab_size=vocab_size)
            drawn_R = draw_coupled(part.logits_RW, noise, token_ids_RW=ids_RW)
            _put(token_ids_R[start:end], part.rows, drawn_R)
    return token_ids_R


def _put(into: Tensor, rows: list[int], values: Tensor) -> None:
    if len(rows) == len(into):
        into.copy_(values)
    else:
        into.index_copy_(0, torch.tensor(rows, device=into.device), values)

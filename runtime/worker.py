"""One rank: it loads its part of the models and carries out plans.

What may be added here: what every request of every kind goes through on a rank. Drafting belongs in
`spec/`, rules of acceptance in `spec/verify.py`, what turns logits into tokens in `sampling/`,
anything about which request comes next in `schedule/`, tensors in `models/`.

Every rank runs the same code on the same plan. A step, with rank 0 deciding:

    rank 0      propose ──draft ids──> target pass ──logits──> tokens, verdicts ──tokens──> lengths
    rank 1..    propose ──draft ids──> target pass                             └──tokens──> lengths

It has two stages, `draft` and `verify`, which may run side by side for two plans that share no request
(`runtime/pipeline.py`).

All requests of a step share its passes. A request whose fed tokens reach its last committed one gets
its drafts' rows on top, and emits at least one token; the others only fill KV.

Letters: T rows of the target's pass, P rows whose logits are wanted, V vocabulary, E width.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from paceline.parallel.mesh import Axis, Mesh
from paceline.parallel.tensor import best, gather_vocabulary
from paceline.runtime.clock import StageClock, now_ms
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import PromptError
from paceline.runtime.kv.compact import KeptPath
from paceline.runtime.layers.cpu_chain import BEST
from paceline.runtime.loading import Loaded, load
from paceline.runtime.models.model import Model
from paceline.runtime.sampling.batch import (
    SampleRequest,
    SampleState,
    next_laws,
    target_probs,
    target_token,
    target_tokens,
)
from paceline.runtime.sampling.logprobs import token_logprobs
from paceline.runtime.sampling.sampler import RoundUniforms
from paceline.runtime.sequence import Sequence
from paceline.runtime.spec.calibrate import Calibration, DraftRows
from paceline.runtime.spec.drafter import (
    Ask,
    Draft,
    Drafter,
    Reading,
    draft_words,
    most_words,
    read_words,
)
from paceline.runtime.spec.ngram import NgramIndex
from paceline.runtime.spec.ngram_drafter import NgramDrafter
from paceline.runtime.spec.tree import ROOT, DraftTree
from paceline.runtime.spec.verify import (
    accepted_of_chain,
    verify_chosen,
    verify_greedy,
    verify_point_mass,
    verify_sampled,
)
from paceline.runtime.threads import torch_alone
from paceline.runtime.transfer.rank import KvLink
from paceline.runtime.types import (
    DrafterName,
    DraftForm,
    Request,
    RequestResult,
    ScheduledRequest,
    Span,
    StageTimes,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

NO_DRAFT = Draft()


@dataclass(slots=True, kw_only=True, eq=False)
class Feed:
    """One request's rows in the target's pass: committed tokens, then drafts."""

    sequence: Sequence
    scheduled: ScheduledRequest
    draft: Draft = NO_DRAFT
    emitted: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def emits(self) -> bool:
        """Whether the fed tokens reach the last committed one."""
        sequence = self.sequence
        return sequence.seen + self.scheduled.num_tokens == len(sequence.token_ids)

    def asks(self, drafter: DrafterName) -> bool:
        """Whether it wants a draft, and from this drafter."""
        scheduled = self.scheduled
        return scheduled.num_draft_tokens > 0 and scheduled.drafter == drafter and self.emits

    def reads(self, drafter: DrafterName) -> bool:
        """Whether this drafter, the model, reads its tokens along without drafting for it."""
        return self.scheduled.read_draft and drafter == "draft_model" and not self.asks(drafter)

    @property
    def reading(self) -> Reading:
        return Reading(sequence=self.sequence, end=self.sequence.seen + self.scheduled.num_tokens)

    @property
    def num_rows(self) -> int:
        return self.scheduled.num_tokens + len(self.draft.token_ids)

    @property
    def path(self) -> tuple[int, ...]:
        """The nodes of its tree that were accepted."""
        assert self.draft.tree is not None, "expected a tree"
        return self.draft.tree.walk(self.emitted[:-1])

    @property
    def kept(self) -> KeptPath:
        """The same, of the target's KV."""
        sequence = self.sequence
        start = len(sequence.token_ids)
        return KeptPath(table=sequence.table, tree_start=start, rows=self.path)

    @property
    def depth(self) -> int:
        """Drafts that could all have been accepted."""
        tree = self.draft.tree
        return len(self.draft.token_ids) if tree is None else max(tree.depths, default=0)

    @property
    def prompt_rows(self) -> int:
        """How many of the first rows are followed by a token of the prompt whose log-probability
        is wanted."""
        request, seen = self.sequence.request, self.sequence.seen
        if request.params.prompt_logprobs is None:
            return 0
        return max(0, min(self.scheduled.num_tokens, len(request.prompt_token_ids) - 1 - seen))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drafted:
    """A plan between its stages."""

    step: int
    feeds: list[Feed]
    times: StageTimes
    span: Span


class Worker:
    """A rank's models and the requests they work on. `step` is its one hot method."""

    def __init__(self, config: EngineConfig, mesh: Mesh, *, loaded: Loaded | None = None) -> None:
        """`loaded` are models already on this rank, for several workers to use in turn."""
        self.mesh = mesh
        self.config = config
        self._models = models = loaded or load(config, mesh)
        self.target = models.target
        self.num_blocks = models.num_blocks
        self._threads: Callable[[], AbstractContextManager[None]] = (
            torch_alone if models.is_small else nullcontext
        )
        self._grammars = models.grammars
        self._vocab_size = models.vocab_size
        self.sequences: dict[str, Sequence] = {}
        spec = config.speculative_config
        self._rejects = spec is not None and spec.verification == "rejection"
        self._calibration = Calibration(spec.calibration) if spec else Calibration.NEVER
        self._grouped = models.grouped
        self._link: KvLink | None = None
        self._drafters: dict[DrafterName, Drafter] = {}
        if models.draft_model is not None:
            self._drafters["draft_model"] = models.draft_model
        if spec is not None and spec.method in ("ngram", "combined"):
            self._drafters["ngram"] = NgramDrafter()

    def connect(self, *, control: str, host: str) -> None:
        """Start this rank's KV link, so that other engines can follow what is computed here.
        `control` is the engine loop's address, `host` ours."""
        rank = self.mesh.rank
        self._link = KvLink(self.config, self._models, rank=rank, control=control, host=host)

    def close(self) -> None:
        """End the KV link, if there is one. Safe to call twice."""
        if self._link is not None:
            self._link.close()

    def facts(self) -> str:
        """One line for a person: where this rank runs and what it holds."""
        parts = [
            f"rank {self.mesh.rank}",
            str(self.mesh.device),
            f"all-reduce {self.mesh.world.collectives.name}",
        ]
        if self.mesh.drafting is not self.mesh.world:
            parts[-1] += f", {self.mesh.drafting.collectives.name} while drafting"
        if self.target is not None:
            parts.append(f"target {self.target.describe()}")
        parts += [f"drafter {drafter.describe()}" for drafter in self._drafters.values()]
        return ", ".join(parts)

    def step(self, plan: StepPlan) -> StepResult:
        """Carry out a plan. Every rank returns a result; only rank 0's is read."""
        return self.verify(self.draft(plan))

    @torch.inference_mode()
    def draft(self, plan: StepPlan) -> Drafted:
        """The first stage: who takes part, and their drafts. Plans come in their order."""
        start_ms = now_ms()
        for request_id in plan.finished:
            self.sequences.pop(request_id, None)
        feeds = [self._feed(scheduled) for scheduled in plan.scheduled]
        with self._threads():
            times = self._draft(feeds, plan.form)
        self._mark_drafter(feeds)
        return Drafted(step=plan.step, feeds=feeds, times=times, span=(start_ms, now_ms()))

    @torch.inference_mode()
    def verify(self, drafted: Drafted) -> StepResult:
        """The second: the target's pass, its tokens, and the new lengths. Plans come in their order."""
        feeds = drafted.feeds
        if not feeds:
            return StepResult(step=drafted.step)
        start_ms, clock = now_ms(), StageClock(self.mesh.device)
        with self._threads():
            self._emit(feeds, self._target_pass(feeds))
        results = tuple(self._commit(feed) for feed in feeds)
        return StepResult(
            step=drafted.step,
            results=results,
            times=drafted.times.plus(StageTimes(verify_ms=clock.lap())),
            draft_span=drafted.span,
            verify_span=(start_ms, now_ms()),
            num_rows=sum(feed.num_rows for feed in feeds),
        )

    def _feed(self, scheduled: ScheduledRequest) -> Feed:
        """The request's state here, made on its first step."""
        if scheduled.request is not None:
            self.sequences[scheduled.request_id] = self._begin(scheduled)
        sequence = self.sequences[scheduled.request_id]
        if scheduled.new_blocks:
            assert all(0 <= block < self.num_blocks for block in scheduled.new_blocks), (
                f"expected blocks below {self.num_blocks}, found {scheduled.new_blocks}"
            )
            sequence.table.extend(scheduled.new_blocks)
        ready = scheduled.draft_token_ids
        assert max(ready, default=0) < self._vocab_size, (
            f"expected drafts below {self._vocab_size}, found {ready}"
        )
        return Feed(sequence=sequence, scheduled=scheduled, draft=Draft(token_ids=ready))

    def _begin(self, scheduled: ScheduledRequest) -> Sequence:
        request = scheduled.request
        assert request is not None
        cached = scheduled.num_draft_cached
        keeps_window = request.params.kv_policy == "sink_window"
        sequence = Sequence(
            request=request,
            token_ids=[*request.prompt_token_ids, *scheduled.output_token_ids],
            seen=scheduled.num_cached,
            draft_rows=DraftRows(
                calibration=self._calibration, grouped=self._grouped, exact=cached, filled=cached
            ),
            sinks=self.config.kv_sink_tokens if keeps_window else 0,
            window=self.config.kv_window if keeps_window else 0,
            slot=scheduled.slot,
        )
        if "ngram" in self._drafters and request.num_draft_tokens != 0:
            spec = self.config.speculative_config
            assert spec is not None
            sequence.ngrams = NgramIndex(
                sequence.token_ids,
                min_length=spec.prompt_lookup_min,
                max_length=spec.prompt_lookup_max,
            )
        if self._link is not None and scheduled.slot is not None:
            self._link.begin(scheduled.slot, scheduled.generation)
        if self.mesh.rank0:
            self._rank0_begin(sequence, scheduled.output_token_ids)
        return sequence

    def _rank0_begin(self, sequence: Sequence, output_token_ids: tuple[int, ...]) -> None:
        """What choosing its tokens needs. A grammar that a frontend should have refused ends its
        request, not the engine."""
        request = sequence.request
        if request.params.structured_outputs is not None and self._grammars is None:
            sequence.error = "structured_outputs needs a tokenizer, and this model has none"
        if sequence.error is None:
            try:
                sequence.sample = self._sample_state(request, output_token_ids)
                return
            except PromptError as error:
                sequence.error = str(error)
        free = msgspec.structs.replace(request.params, structured_outputs=None)
        unshaped = msgspec.structs.replace(request, params=free)
        sequence.sample = self._sample_state(unshaped, output_token_ids)

    def _sample_state(self, request: Request, output_token_ids: tuple[int, ...]) -> SampleState:
        return SampleState(
            request,
            vocab_size=self._vocab_size,
            device=self.mesh.device,
            grammars=self._grammars,
            output_token_ids=output_token_ids,
        )

    def _draft(self, feeds: list[Feed], form: DraftForm) -> StageTimes:
        """Give every feed that wants one its draft, known to every rank of the world."""
        times = StageTimes()
        for name, drafter in self._drafters.items():
            asking = [feed for feed in feeds if feed.asks(name)]
            readings = [feed.reading for feed in feeds if feed.reads(name)]
            if asking or readings:
                times = times.plus(self._ask(drafter, asking, readings, form))
        modelled = [feed for feed in feeds if feed.asks("draft_model")]
        branching = any(feed.scheduled.tree is not None for feed in modelled)
        if modelled and (branching or self.mesh.draft.size != self.mesh.world.size):
            drafts = [draft_words(feed.draft) for feed in modelled]
            sizes = [most_words(feed.scheduled) for feed in modelled]
            told = self._tell(drafts, sizes, axis=self.mesh.drafting)
            for feed, words in zip(modelled, told, strict=True):
                branches = feed.scheduled.tree is not None
                feed.draft = read_words(words, branches=branches, probs_PV=feed.draft.probs_PV)
        return times

    def _ask(
        self, drafter: Drafter, feeds: list[Feed], readings: list[Reading], form: DraftForm
    ) -> StageTimes:
        asks = [
            Ask(
                sequence=feed.sequence,
                num_tokens=feed.scheduled.num_draft_tokens,
                tree=feed.scheduled.tree,
            )
            for feed in feeds
        ]
        drafts, times = drafter.propose(asks, readings, form)
        for feed, draft in zip(feeds, drafts, strict=True):
            feed.draft = draft
        return times

    def _target_pass(self, feeds: list[Feed]) -> Tensor | None:
        """Hidden states, `[P, E]`: of each feed the rows that prompt log-probabilities need, then
        those after which it emits. None where the target does not run."""
        if self.target is None:
            return None
        token_ids: list[int] = []
        segments = []
        wanted: list[int] = []
        for feed in feeds:
            sequence, first = feed.sequence, len(token_ids)
            fed_to = sequence.seen + feed.scheduled.num_tokens
            token_ids += sequence.token_ids[sequence.seen : fed_to]
            token_ids += feed.draft.token_ids
            tree = feed.draft.tree
            segments.append(
                sequence.segment(
                    start=sequence.seen,
                    num_rows=feed.num_rows,
                    masks=() if tree is None else tree.ancestor_mask,
                    tree_start=fed_to,
                )
            )
            wanted.extend(range(first, first + feed.prompt_rows))
            if feed.emits:
                wanted.extend(range(first + feed.scheduled.num_tokens - 1, len(token_ids)))
        rows = self.target.rows(
            self.target.tokens(token_ids), segments, written=self._follower(feeds)
        )
        h_TE = self.target.decoder.exact(rows)
        if len(wanted) < len(token_ids):
            h_TE = h_TE[torch.tensor(wanted, dtype=torch.int64, device=h_TE.device)]
        return h_TE

    def _follower(self, feeds: list[Feed]) -> Callable[[int], None] | None:
        """What tells the KV link of each layer, where another engine waits for one of these."""
        ends = {slot: f.reading.end for f in feeds if (slot := f.sequence.slot) is not None}
        if self._link is None or not ends:
            return None
        return self._link.follow(list(ends), list(ends.values()))

    def _mark_drafter(self, feeds: list[Feed]) -> None:
        """Tell the KV link how far the drafter has read what another engine waits for."""
        if self._link is None:
            return
        for sequence in (feed.sequence for feed in feeds):
            if sequence.slot is not None:
                self._link.drafted(sequence.slot, sequence.draft_rows.exact)

    def _emit(self, feeds: list[Feed], h_PE: Tensor | None) -> None:
        """Choose the tokens of every feed that emits, on rank 0, and tell all ranks; the best ones
        target ranks all know."""
        emitting = [feed for feed in feeds if feed.emits]
        simple = all(
            feed.sequence.plain_greedy and feed.sequence.request.params.logprobs is None
            for feed in emitting
        ) and not any(feed.prompt_rows for feed in feeds)
        if self.target is not None and h_PE is not None and len(h_PE):
            decoder = self.target.decoder
            if simple:
                self._follow(emitting, _split(self._best(self.target, h_PE), emitting))
            else:
                full_PV = gather_vocabulary(
                    decoder.logits(h_PE), axis=decoder.axis, widths=decoder.vocabulary_widths
                )
                if self.mesh.rank0:
                    self._rank0_choose(feeds, full_PV)
        if not simple or self.mesh.target.size < self.mesh.world.size:
            sizes = [1 + len(feed.draft.token_ids) for feed in emitting]
            told = self._tell([feed.emitted for feed in emitting], sizes, axis=self.mesh.world)
            for feed, token_ids in zip(emitting, told, strict=True):
                feed.emitted = token_ids
        self._keep([feed for feed in emitting if feed.draft.tree is not None])

    def _best(self, target: Model, h_PE: Tensor) -> list[int]:
        """The best token after each row, the same on every rank."""
        if target.chains is not None and len(h_PE) <= target.chains.most_rows:
            return target.chains.choose(h_PE, [BEST] * len(h_PE))
        decoder = target.decoder
        ids = best(decoder.logits(h_PE), offset=decoder.vocabulary.start, axis=decoder.axis)
        return [int(token_id) for token_id in ids.tolist()]

    def _keep(self, feeds: list[Feed]) -> None:
        """Of these trees, leave the KV of what was accepted, where a chain's would be."""
        if not feeds:
            return
        if self.target is not None:
            self.target.keep([feed.kept for feed in feeds])
        if self._models.draft_model is not None:
            self._models.draft_model.keep([(f.sequence, f.draft, f.path) for f in feeds])

    def _follow(self, emitting: list[Feed], tokens: list[list[int]]) -> None:
        """Keep each draft as far as the target's own tokens agree with it, and add the next one."""
        for feed, own in zip(emitting, tokens, strict=True):
            tree = feed.draft.tree
            if tree is not None:
                feed.emitted = verify_greedy(tree, own).emitted(tree)
                continue
            kept = accepted_of_chain(feed.draft.token_ids, own)
            feed.emitted = tuple(own[: kept + 1])

    def _rank0_choose(self, feeds: list[Feed], logits_PV: Tensor) -> None:
        """Tokens and log-probabilities of every feed, from the whole vocabulary."""
        emitting, rows, first = [], [], 0
        for feed in feeds:
            if feed.prompt_rows:
                request = feed.sequence.request
                asked = request.params.prompt_logprobs
                after = feed.sequence.seen + 1
                feed.prompt_logprobs = tuple(
                    token_logprobs(
                        logits_PV[first : first + feed.prompt_rows],
                        request.prompt_token_ids[after : after + feed.prompt_rows],
                        num_top=[asked or 0] * feed.prompt_rows,
                    )
                )
                first += feed.prompt_rows
            if feed.emits:
                end = first + 1 + len(feed.draft.token_ids)
                emitting.append(feed)
                rows.append(logits_PV[first:end])
                first = end
        coupled = [
            (feed, part)
            for feed, part in zip(emitting, rows, strict=True)
            if not self._drawn(feed) and feed.draft.tree is None
        ]
        if coupled:
            requests = [_sample_request(feed) for feed, _ in coupled]
            tokens = target_tokens(torch.cat([part for _, part in coupled]), requests)
            self._follow([feed for feed, _ in coupled], tokens)
        for feed, part in zip(emitting, rows, strict=True):
            if self._drawn(feed):
                feed.emitted = self._verify_drawn(feed, part)
            elif feed.draft.tree is not None:
                feed.emitted = self._verify_tree(feed.draft.tree, feed, part)
            asked = feed.sequence.request.params.logprobs
            if asked is not None:
                count = len(feed.emitted)
                if feed.draft.tree is not None:
                    part = part[[0, *(1 + node for node in feed.path)]]
                feed.logprobs = tuple(
                    token_logprobs(part[:count], feed.emitted, num_top=[asked] * count)
                )

    def _drawn(self, feed: Feed) -> bool:
        """Whether the rejection rule decides."""
        return self._rejects and not feed.sequence.request.params.greedy

    def _verify_drawn(self, feed: Feed, logits_PV: Tensor) -> tuple[int, ...]:
        request, draft_probs_PV = _sample_request(feed), feed.draft.probs_PV
        tree = feed.draft.tree
        if tree is None:
            tree = DraftTree.chain(feed.draft.token_ids)
            probs_PV = target_probs(logits_PV, request)
        else:
            nodes = range(ROOT, tree.num_nodes)
            paths = [SampleRequest(state=request.state, drafts=tree.tokens(n)) for n in nodes]
            probs_PV = next_laws(logits_PV, paths)
        uniforms = RoundUniforms(request.state.request.seed, request.state.num_committed)
        if draft_probs_PV is None:  # chosen, not drawn
            verdict = verify_point_mass(tree, probs_PV, uniforms=uniforms)
        else:
            verdict = verify_sampled(tree, probs_PV, draft_probs_PV, uniforms=uniforms)
        return verdict.emitted(tree)

    def _verify_tree(self, tree: DraftTree, feed: Feed, logits_PV: Tensor) -> tuple[int, ...]:
        """Go down the tree by the tokens that the target draws on the way, and draws nowhere else."""
        state = _sample_request(feed).state

        def token_id(node: int, _depth: int) -> int:
            return target_token(
                logits_PV[1 + node], SampleRequest(state=state, drafts=tree.tokens(node))
            )

        return verify_chosen(tree, token_id).emitted(tree)

    def _commit(self, feed: Feed) -> RequestResult:
        """Move the lengths; nothing is copied."""
        sequence, num_drafted = feed.sequence, len(feed.draft.token_ids)
        num_accepted = max(0, len(feed.emitted) - 1)
        drafter = self._drafters.get(feed.scheduled.drafter)
        if num_drafted and drafter is not None:
            drafter.verified(sequence, num_drafted=feed.depth, num_accepted=num_accepted)
        sequence.seen += feed.scheduled.num_tokens + num_accepted
        sequence.commit(feed.emitted)
        return RequestResult(
            request_id=feed.scheduled.request_id,
            token_ids=feed.emitted,
            num_drafted=num_drafted,
            num_accepted=num_accepted,
            draft_exact=sequence.draft_rows.exact,
            logprobs=feed.logprobs,
            prompt_logprobs=feed.prompt_logprobs,
            error=sequence.error or _grammar_error(sequence),
        )

    def _tell(
        self, chains: Many[Many[int]], sizes: list[int], *, axis: Axis
    ) -> list[tuple[int, ...]]:
        """Rank 0's chains of token ids, the i-th at most `sizes[i]` long, on every rank."""
        if axis.size == 1 or not sizes:
            return [tuple(chain) for chain in chains]
        words: list[int] = []
        for chain, size in zip(chains, sizes, strict=True):
            words += [len(chain), *chain, *[0] * (size - len(chain))]
        told = torch.tensor(words, dtype=torch.int64, device=self.mesh.device)
        words = [int(word) for word in axis.collectives.broadcast_(told).tolist()]
        found, at = [], 0
        for size in sizes:
            found.append(tuple(words[at + 1 : at + 1 + words[at]]))
            at += 1 + size
        return found


def _grammar_error(sequence: Sequence) -> str | None:
    """Why its text can no longer follow its grammar, such as a bound of the compiler met midway."""
    state = sequence.sample
    return None if state is None or state.grammar is None else state.grammar.error


def _sample_request(feed: Feed) -> SampleRequest:
    state = feed.sequence.sample
    assert state is not None, "expected the deciding rank"
    return SampleRequest(state=state, drafts=feed.draft.token_ids)


def _split(values: list[int], feeds: list[Feed]) -> list[list[int]]:
    """One list per feed: its root row and its drafts' rows."""
    found, at = [], 0
    for feed in feeds:
        end = at + 1 + len(feed.draft.token_ids)
        found.append(values[at:end])
        at = end
    return found

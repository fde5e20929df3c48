"""Drafting ahead on one draft rank: which texts get a draft in the next pass, and in which blocks.

    orders ──take──> texts ──draft: one pass──> one more draft for every text that wants one ──> tails

Every draft rank does the same with the same orders, and draft rank 0 draws. A text is calibrated as in
lockstep: by an exact pass over everything that was not read exactly, after a difference between it and
its tail (or after every commit). Prompts are read in chunks beside the others' drafts.

The drafter's KV has blocks of its own, with a prefix cache. Nobody else's bookkeeping need be in step
with it: a text that the target has preempted, or an engine whose target ranks were started anew, finds
its rows again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import msgspec
import torch

from paceline.runtime.ahead.messages import Close, Commit, Order, Sync, Tails
from paceline.runtime.ahead.text import DraftedText
from paceline.runtime.clock import now_ms
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import PromptError
from paceline.runtime.loading import Loaded
from paceline.runtime.sampling.batch import SampleState
from paceline.runtime.schedule.blocks import BlockPool
from paceline.runtime.schedule.prefix import BlockHash, extend_hashes, root_hash
from paceline.runtime.sequence import Sequence
from paceline.runtime.spec.calibrate import Calibration, DraftRows
from paceline.runtime.spec.draft_model import SHORT_ROWS
from paceline.runtime.spec.drafter import Ask, Reading
from paceline.runtime.threads import torch_alone
from paceline.runtime.types import DraftPass, Request

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class _Text:
    """A text, its rows and its blocks. The sequence's tokens are the text's: told and drafted."""

    text: DraftedText
    sequence: Sequence
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    num_registered: int = 0
    seated: bool = False
    """Whether it has blocks; before that it waits for them."""

    @property
    def unread(self) -> int:
        return len(self.text.token_ids) - self.sequence.draft_rows.filled

    @property
    def num_rows(self) -> int:
        """What its next draft takes: more than what is unread where rows are made exact."""
        length = len(self.text.token_ids)
        return length - self.sequence.draft_rows.first_pass(committed=length).start


class AheadDrafter:
    """All texts on one draft rank. `take` and `draft` are called in turn, on every rank alike."""

    def __init__(self, config: EngineConfig, loaded: Loaded, *, rank: int) -> None:
        spec, model = config.speculative_config, loaded.draft_model
        assert spec is not None, "expected a speculative_config"
        assert model is not None, "expected a rank of the drafter"
        self.num_blocks = loaded.num_blocks
        self._model = model
        self._loaded = loaded
        self._rank = rank
        self._block_size = config.block_size
        self._max_rows = config.max_num_batched_tokens
        self._caches = config.enable_prefix_caching
        policy = Calibration(spec.calibration)
        self._every_commit = policy is Calibration.EVERY_ROUND
        # a commit is what ends a round here, so the rows are told when one is due
        self._calibration = Calibration.ON_MISMATCH if self._every_commit else policy
        self._pool = BlockPool(loaded.num_blocks)
        self._texts: dict[str, _Text] = {}

    def describe(self) -> str:
        return self._model.describe()

    # ---------------------------------------------------------------------------------------- orders

    def take(self, orders: Iterable[Order]) -> None:
        """What has happened to the texts."""
        for order in orders:
            match order:
                case Sync():
                    self._close(order.request.request_id)
                    self._open(order)
                case Commit():
                    self._commit(self._texts[order.request_id], order)
                case Close():
                    self._close(order.request_id)

    def _open(self, sync: Sync) -> None:
        request, text = sync.request, DraftedText.of(sync)
        sequence = Sequence(
            request=request,
            token_ids=text.token_ids,
            seen=0,
            draft_rows=DraftRows(calibration=self._calibration, grouped=self._loaded.grouped),
        )
        if self._rank == 0:
            sequence.sample = self._rank0_sample_state(request, sync.output_token_ids)
        self._texts[request.request_id] = _Text(text=text, sequence=sequence)

    def _rank0_sample_state(
        self, request: Request, output_token_ids: tuple[int, ...]
    ) -> SampleState:
        def state(request: Request) -> SampleState:
            return SampleState(
                request,
                vocab_size=self._loaded.vocab_size,
                device=self._model.model.device,
                grammars=self._loaded.grammars,
                output_token_ids=output_token_ids,
            )

        shaped = request.params.structured_outputs is not None
        if not shaped or self._loaded.grammars is not None:
            try:
                return state(request)
            except PromptError as error:  # the target's ranks end it for the same reason
                logger.debug("drafts at will: %s", error, extra={"request_id": request.request_id})
        free = msgspec.structs.replace(request.params, structured_outputs=None)
        return state(msgspec.structs.replace(request, params=free))

    def _commit(self, each: _Text, commit: Commit) -> None:
        wrong_from = each.text.commit(commit.base, commit.token_ids)
        if each.sequence.sample is not None:
            each.sequence.sample.commit(commit.token_ids)
        if wrong_from is not None:
            _calibrate(each.sequence.draft_rows, kept=wrong_from)
        elif self._every_commit:
            _calibrate(each.sequence.draft_rows, kept=len(each.text.token_ids))

    def _close(self, request_id: str) -> None:
        each = self._texts.pop(request_id, None)
        if each is not None:
            self._pool.release(reversed(each.blocks))

    # ---------------------------------------------------------------------------------------- a pass

    @torch.inference_mode()
    def draft(self) -> Tails | None:
        """One more draft for every text that wants one and has blocks. None if there is none."""
        began_ms = now_ms()
        asking, readings = self._plan()
        if not asking and not readings:
            return None
        asks = [
            Ask(sequence=each.sequence, num_tokens=1, drafted=tuple(each.text.tail))
            for each in asking
        ]
        num_rows = sum(each.num_rows for each in asking) + sum(
            reading.end - reading.sequence.draft_rows.filled for reading in readings
        )
        with torch_alone() if self._loaded.is_small else nullcontext():
            drafts, _ = self._model.propose(asks, readings)
        tails = []
        for each, draft in zip(asking, drafts, strict=True):
            self._settle(each)
            tails.append(each.text.add(draft.token_ids[0]))
        return Tails(
            rank=self._rank,
            tails=tuple(tails),
            passes=(
                DraftPass(
                    span=(began_ms, now_ms()),
                    num_rows=num_rows,
                    num_drafts=len(asks),
                ),
            ),
        )

    def _plan(self) -> tuple[list[_Text], list[Reading]]:
        """Texts that get a draft in this pass, and chunks of those that have more to read first."""
        self._seat()
        wanting = [each for each in self._texts.values() if each.seated and each.text.wants]
        wanting = [each for each in wanting if self._grow(each)]
        asking = [each for each in wanting if each.unread <= SHORT_ROWS]
        # whoever is about to draft waits for a part of a prompt at most
        room = self._max_rows // 4 if asking else self._max_rows
        readings = []
        for each in wanting:
            if each.unread <= SHORT_ROWS or room <= 0:
                continue
            if each.unread <= room:
                asking.append(each)
            else:
                end = each.sequence.draft_rows.filled + room
                readings.append(Reading(sequence=each.sequence, end=end))
            room -= each.unread
        return asking, readings

    def _settle(self, each: _Text) -> None:
        """After a pass over all of a text: whatever made it due for an exact one has been done, if all
        rows are exact now. Full blocks of the text that was told can be found by others."""
        rows, text = each.sequence.draft_rows, each.text
        if rows.exact == rows.filled:
            rows.verified(committed=rows.filled, num_drafted=0, num_accepted=0)
        num_full = min(rows.exact, text.committed) // self._block_size
        if not self._caches or num_full <= each.num_registered:
            return
        self._hash(each)
        for index in range(each.num_registered, num_full):
            self._pool.register(each.blocks[index], each.hashes[index], draft_exact=True)
        each.num_registered = num_full

    # ---------------------------------------------------------------------------------------- blocks

    def _seat(self) -> None:
        """Give blocks to those that wait, in the order in which they came, while there are enough for
        all of a text and its drafts."""
        for each in self._texts.values():
            if each.seated:
                continue
            hit: tuple[int, ...] = ()
            if self._caches:
                self._hash(each)
                most = (each.text.committed - 1) // self._block_size
                hit = self._pool.find(each.hashes, most=most).blocks
            length = len(each.text.token_ids) + each.text.num_ahead
            needed = -(-length // self._block_size) - len(hit)
            if self._pool.num_free - self._pool.count_free(hit) < needed:
                return
            self._pool.hold(hit)
            each.blocks = list(hit)
            each.sequence.table.extend(hit)
            each.num_registered = len(hit)
            rows = each.sequence.draft_rows
            rows.passed(end=len(hit) * self._block_size, exact=True)
            each.seated = True
            self._grow(each)

    def _grow(self, each: _Text) -> bool:
        """Blocks for all of a text's tokens; whether it has them."""
        missing = -(-len(each.text.token_ids) // self._block_size) - len(each.blocks)
        if missing > self._pool.num_free:
            return False
        if missing > 0:
            new = self._pool.allocate(missing)
            each.blocks += new
            each.sequence.table.extend(new)
        return True

    def _hash(self, each: _Text) -> None:
        text = each.text
        extend_hashes(
            each.hashes,
            text.token_ids[: text.committed],
            root=root_hash(each.sequence.request.cache_salt),
            block_size=self._block_size,
        )


def _calibrate(rows: DraftRows, *, kept: int) -> None:
    """Rows from `kept` on are of another text, and the next pass shall be exact."""
    rows.verified(committed=kept, num_drafted=1, num_accepted=0)

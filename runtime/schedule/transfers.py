"""Which requests' blocks are in the hands of the KV links, and until when.

    producing   offer ──> (ranks compute) ──complete──> held for the consumer ──ended──> blocks free
    fetching    fetch ──> blocks being filled ─────────────────────────────────ended──> the request runs
    either      drop: its request is gone ──────> blocks kept until the links say so ──ended──> blocks free

Links read and write blocks on their own time. So a block that was offered or is being fetched into
is nobody else's before every rank's link has said `Ended`, whatever became of its request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from paceline.runtime.transfer.messages import (
    Cancel,
    Command,
    Complete,
    Fetch,
    Offer,
    TransferStats,
    Withdraw,
)
from paceline.runtime.types import Handover, KvFetch, KvProduce, TransferTotals


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferEnd:
    """All ranks' links are done with a transfer."""

    transfer_id: str
    error: str | None = None
    """Why it failed, in the words of the first rank that did."""
    handover: Handover | None = None
    """Of a fetch that did not."""
    stats: TransferStats = field(default_factory=TransferStats)
    """Bytes and counts summed over ranks, times of the slowest."""


@dataclass(slots=True, kw_only=True, eq=False)
class Transfer:
    """One request's transfer, from the order to the links until they have all ended it."""

    transfer_id: str
    request_id: str
    producing: bool
    num_tokens: int
    slot: int | None = None
    generation: int = 0
    kept: list[int] | None = None
    """Its blocks, once its request is gone."""
    is_let_go: bool = False
    """Whether it was read to its end and the router needs it no more."""


@dataclass(slots=True)
class TransferBook:
    """All transfers of an engine. Orders pile up in `orders` until somebody takes them."""

    num_slots: int
    """Requests that can be offered at once; 0 for an engine without links."""
    orders: list[Command] = field(default_factory=list)
    _transfers: dict[str, Transfer] = field(default_factory=dict)
    _free_slots: list[int] = field(init=False)
    _generation: int = 0
    _totals: TransferTotals = field(default_factory=TransferTotals)

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.num_slots))

    @property
    def has_slot(self) -> bool:
        return bool(self._free_slots)

    @property
    def holds_blocks(self) -> bool:
        """Whether any blocks are in the links' hands, to come back by themselves."""
        return bool(self._transfers)

    @property
    def num_fetching(self) -> int:
        return sum(not each.producing and each.kept is None for each in self._transfers.values())

    def knows(self, transfer_id: str) -> bool:
        return transfer_id in self._transfers

    def kept_blocks(self) -> Iterable[int]:
        """Blocks of requests that are gone."""
        for transfer in self._transfers.values():
            yield from transfer.kept or ()

    def offer(
        self, wanted: KvProduce, request_id: str, block_ids: Iterable[int], *, num_tokens: int
    ) -> Transfer:
        """Let the links serve a request's blocks while they are filled."""
        self._generation += 1
        transfer = Transfer(
            transfer_id=wanted.transfer_id,
            request_id=request_id,
            producing=True,
            num_tokens=num_tokens,
            slot=self._free_slots.pop(),
            generation=self._generation,
        )
        self._transfers[wanted.transfer_id] = transfer
        assert transfer.slot is not None
        self.orders.append(
            Offer(
                transfer_id=wanted.transfer_id,
                slot=transfer.slot,
                generation=transfer.generation,
                block_ids=tuple(block_ids),
                num_tokens=num_tokens,
                lease_s=wanted.lease_s,
                consumer_id=wanted.consumer_id,
            )
        )
        return transfer

    def complete(self, transfer: Transfer, handover: Handover) -> None:
        """Its prompt is read and its token drawn."""
        self.orders.append(Complete(transfer_id=transfer.transfer_id, handover=handover))

    def fetch(
        self,
        wanted: KvFetch,
        request_id: str,
        block_ids: Iterable[int],
        *,
        num_tokens: int,
        num_cached: int,
        num_draft_cached: int,
        want_draft: bool,
    ) -> Transfer:
        """Let the links fill a request's blocks behind those that hold its cached prefix."""
        transfer = Transfer(
            transfer_id=wanted.transfer_id,
            request_id=request_id,
            producing=False,
            num_tokens=num_tokens,
        )
        self._transfers[wanted.transfer_id] = transfer
        self.orders.append(
            Fetch(
                transfer_id=wanted.transfer_id,
                addresses=wanted.addresses,
                block_ids=tuple(block_ids),
                num_tokens=num_tokens,
                num_cached=num_cached,
                num_draft_cached=num_draft_cached,
                want_draft=want_draft,
                lease_s=wanted.lease_s,
                timeout_s=wanted.timeout_s,
            )
        )
        return transfer

    def keep(self, transfer: Transfer, block_ids: list[int], *, reason: str | None) -> None:
        """Its request is gone; with a reason, the links are told to stop."""
        transfer.kept = block_ids
        if reason is None:
            return
        if transfer.producing:
            self.orders.append(Withdraw(transfer_id=transfer.transfer_id, reason=reason))
        else:
            self.orders.append(Cancel(transfer_id=transfer.transfer_id))

    def let_go(self, request_id: str, *, reason: str) -> None:
        """Nobody wants what a request that has ended is still held for."""
        for each in self._transfers.values():
            if each.producing and each.kept is not None and each.request_id == request_id:
                each.is_let_go = True
                self.orders.append(Withdraw(transfer_id=each.transfer_id, reason=reason))

    def refuse(self, transfer_id: str, reason: str) -> None:
        """A transfer that never was offered never will be: whoever waits for it shall know."""
        self.orders.append(Withdraw(transfer_id=transfer_id, reason=reason))

    def end(self, end: TransferEnd) -> Transfer | None:
        """Forget a transfer that the links are done with; None if it is not known."""
        transfer = self._transfers.pop(end.transfer_id, None)
        if transfer is None:
            return None
        if transfer.slot is not None:
            self._free_slots.append(transfer.slot)
        self._count(transfer, end)
        return transfer

    def lose_all(self) -> None:
        """The links are gone, and whatever was in their hands with them."""
        for transfer in self._transfers.values():
            self._count(transfer, TransferEnd(transfer_id=transfer.transfer_id, error="links lost"))
        self._transfers.clear()
        self.orders.clear()
        self._free_slots = list(range(self.num_slots))

    def take_orders(self) -> list[Command]:
        orders, self.orders = self.orders, []
        return orders

    def totals(self) -> TransferTotals:
        producing = sum(each.producing for each in self._transfers.values())
        return msgspec.structs.replace(
            self._totals, producing=producing, fetching=len(self._transfers) - producing
        )

    def _count(self, transfer: Transfer, end: TransferEnd) -> None:
        stats, so_far, ok = end.stats, self._totals, end.error is None or transfer.is_let_go
        if transfer.producing:
            self._totals = msgspec.structs.replace(
                so_far,
                produced=so_far.produced + ok,
                expired=so_far.expired + (not ok and "lease" in str(end.error)),
                stall_s=so_far.stall_s + stats.stall_s,
            )
            return
        self._totals = msgspec.structs.replace(
            so_far,
            fetched=so_far.fetched + ok,
            failed=so_far.failed + (not ok and transfer.kept is None),
            fetched_tokens=so_far.fetched_tokens + ok * transfer.num_tokens,
            num_bytes=so_far.num_bytes + stats.num_bytes,
            seconds=so_far.seconds + ok * stats.seconds,
            unoverlapped_s=so_far.unoverlapped_s + ok * stats.unoverlapped_s,
            num_resumed=so_far.num_resumed + stats.num_resumed,
            num_corrupt=so_far.num_corrupt + stats.num_corrupt,
        )

"""What an engine and the KV links of its ranks say to one another: MessagePack over ZMQ.

    producing engine                                     consuming engine
    Offer      blocks that will be filled                Fetch     blocks to fill, and from whom
    Complete   the prompt is read: here is its token     Cancel    nobody waits for it any more
    Withdraw   it never will be
               Ended <── link of each rank ──> Ended

After `Ended` a link touches the transfer's blocks no more: only then may they be freed or read.
Every Offer and every Fetch gets exactly one `Ended` from each rank, or that rank's link has died,
which its successor's `LinkReady` tells.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from paceline.runtime.types import WIRE_VERSION, Handover, WireType


class Offer(WireType, frozen=True, kw_only=True, tag="offer"):
    """Serve a request's KV to whoever opens the transfer, layer by layer while it is computed."""

    transfer_id: str
    slot: int
    """Where on the board the ranks say how far each layer is."""
    generation: int
    """What the slot's generation is once its marks are this request's."""
    block_ids: tuple[int, ...]
    """For all `num_tokens`, those with a cached prefix included."""
    num_tokens: Annotated[int, msgspec.Meta(ge=1)]
    lease_s: float
    """How long the blocks are held for a consumer that does not come, or is not heard of."""
    consumer_id: str = ""
    """The engine it is for; empty for whichever knows the transfer's id."""


class Complete(WireType, frozen=True, kw_only=True, tag="complete"):
    """All of it is computed and the first token is drawn."""

    transfer_id: str
    handover: Handover


class Withdraw(WireType, frozen=True, kw_only=True, tag="withdraw"):
    """Stop serving a transfer, offered or not: consumers are told why."""

    transfer_id: str
    reason: str


class Fetch(WireType, frozen=True, kw_only=True, tag="fetch"):
    """Fill a request's blocks from another engine."""

    transfer_id: str
    addresses: tuple[str, ...]
    """`host:port` of the producing engine's links, by rank."""
    block_ids: tuple[int, ...]
    """Reserved for all `num_tokens`."""
    num_tokens: int
    num_cached: int
    """Leading tokens whose target KV is there already; whole blocks."""
    num_draft_cached: int
    """Likewise of the drafter."""
    want_draft: bool
    """Whether to fetch the drafter's KV too, where the other side has it."""
    lease_s: float
    timeout_s: float
    """After so long without success it has failed."""


class Cancel(WireType, frozen=True, kw_only=True, tag="cancel"):
    """Stop fetching, and tell the producer that nobody will come."""

    transfer_id: str


class TransferStats(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """One transfer on one rank, as its link saw it."""

    num_bytes: int = 0
    """Of frames, headers included."""
    seconds: float = 0.0
    """From `Offer` or `Fetch` to `Ended`."""
    unoverlapped_s: float = 0.0
    """From the arrival of the producer's word that all is computed to the last page in place;
    consumer only."""
    stall_s: float = 0.0
    """Producer: with pages ready and no credit to send them."""
    num_resumed: int = 0
    """Times a broken stream was taken up again."""
    num_corrupt: int = 0
    """Frames whose checksum was wrong."""
    plane: str = ""


class Ended(WireType, frozen=True, kw_only=True, tag="ended"):
    """A rank's link is done with a transfer, well or not."""

    rank: int
    transfer_id: str
    producing: bool
    error: str | None = None
    """Why it failed; None if all is delivered, or all is in place."""
    handover: Handover | None = None
    """Consumer, without error."""
    stats: TransferStats = TransferStats()


class LinkReady(WireType, frozen=True, kw_only=True, tag="ready"):
    """A rank's link serves, for the first time or again after its predecessor died."""

    rank: int
    boot_id: int
    address: str
    """`host:port` of its gRPC server."""
    fingerprint: dict[str, str]
    """What must be equal on both sides, by name."""
    version: int = WIRE_VERSION


Command = Offer | Complete | Withdraw | Fetch | Cancel
News = Ended | LinkReady

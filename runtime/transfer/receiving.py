"""What one fetch gets from one producer rank, and what of it is in place.

frame, verified ──> Part.place: into the pool's reserved blocks ──> a bit per page of each range
                    nothing else writes there, and nothing does once the fetch is over
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime.transfer.bell import Bell
from paceline.runtime.transfer.codec import BY_ID
from paceline.runtime.transfer.frames import Frame, FrameError
from paceline.runtime.transfer.layout import MODELS, PAGE, ModelName, Share, differences, plan
from paceline.runtime.transfer.messages import Fetch
from paceline.runtime.transfer.pages import Pages
from paceline.runtime.transfer.peers import Description, Peer, TransferError
from paceline.runtime.transfer.wire import num_pages, pool_pages
from paceline.runtime.types import Handover


@dataclass(slots=True)
class Progress:
    """What the parts of a fetch have in common."""

    fetch: Fetch
    pools: Mapping[ModelName, Pages]
    pages: Mapping[ModelName, NDArray[np.int64]]
    """Of the pools, by position."""
    over: bool = False
    """Nothing may be written any more."""
    released: bool = False
    """The producers know that all is here."""
    draft_wanted: bool = False
    handover: Handover | None = None
    handover_s: float = 0.0
    """When it came."""
    last_page_s: float = 0.0
    num_bytes: int = 0
    num_resumed: int = 0
    num_corrupt: int = 0
    planes: set[str] = field(default_factory=set)

    @staticmethod
    def of(fetch: Fetch, pools: Mapping[ModelName, Pages]) -> Progress:
        """Raises ValueError where its blocks are none of the pools'."""
        return Progress(
            fetch,
            pools,
            {
                name: pool_pages(fetch.block_ids, pool.place, fetch.num_tokens)
                for name, pool in pools.items()
            },
        )

    def first_page(self, name: ModelName) -> int:
        """Pages before it are in place already."""
        fetch = self.fetch
        cached = fetch.num_cached if name == "target" else fetch.num_draft_cached
        return min(cached, fetch.num_tokens) // PAGE

    def stop_page(self, name: ModelName) -> int | None:
        """Pages from it on are not needed; None while that is not known."""
        if name == "target":
            return num_pages(self.fetch.num_tokens)
        if self.handover is None:
            return None
        return num_pages(min(self.handover.draft_exact, self.fetch.num_tokens))

    def hand_over(self, handover: Handover) -> None:
        if self.handover is None:
            self.handover = handover
            self.handover_s = time.monotonic()


Shares = dict[ModelName, list[Share]]


def share_out(
    progress: Progress,
    told: Sequence[Description],
    *,
    rank: int,
    fingerprint: Mapping[str, str],
) -> tuple[list[Shares], bool]:
    """What each producer rank gives to consumer `rank`, and whether the drafter's KV can be had, on
    which all ranks agree. Raises KvMismatchError."""
    shares: list[Shares] = [{} for _ in told]

    def share(name: ModelName) -> None:
        if name not in progress.pools:
            return
        having = [r for r, each in enumerate(told) if name in each.layouts]
        layouts = [told[r].layouts[name] for r in having]
        for found in plan(progress.pools[name].layout, layouts, rank=rank):
            shares[having[found.producer]].setdefault(name, []).append(found)

    share("target")
    have_draft = (
        progress.fetch.want_draft
        and any("draft" in each.layouts for each in told)
        and not any(differences(fingerprint, each.fingerprint, draft=True) for each in told)
    )
    if have_draft:
        share("draft")
    return shares, have_draft


class Part:
    """One producer rank's shares."""

    def __init__(self, progress: Progress, peer: Peer, shares: Mapping[ModelName, Iterable[Share]]):
        self.progress = progress
        self.peer = peer
        self.bell = Bell()
        """Rings when a page is in place or the handover has come."""
        self.handed_over = False
        """This rank has said that all is computed."""
        self.ticket = 0
        """The latest; 0 before the first."""
        total = num_pages(progress.fetch.num_tokens)
        self._have: dict[tuple[int, Share], NDArray[np.bool_]] = {
            (MODELS.index(name), share): np.zeros(total, dtype=np.bool_)
            for name, each in shares.items()
            for share in each
        }
        self._by_place = {
            (model, share.layer, share.head_start, share.head_stop - share.head_start): (
                share,
                have,
            )
            for (model, share), have in self._have.items()
        }

    @property
    def complete(self) -> bool:
        """All that this rank has to give is in place."""
        return self.handed_over and not any(True for _ in self.missing())

    def missing(self) -> Iterable[tuple[ModelName, Share, NDArray[np.bool_], int, int]]:
        """Shares not yet in place as far as is known: what is there of them, and its bounds."""
        for (model, share), have in self._have.items():
            name = MODELS[model]
            first, stop = self.progress.first_page(name), self.progress.stop_page(name)
            if stop is None:
                stop = len(have)
            if first < stop and not have[first:stop].all():
                yield name, share, have, first, stop

    def wants(self) -> list[pb.Want]:
        """What is still to come."""
        found = []
        for model, name in enumerate(MODELS):
            first = self.progress.first_page(name)
            ranges = [(share, have) for (m, share), have in self._have.items() if m == model]
            if not ranges or first >= len(ranges[0][1]):
                continue
            want = pb.Want(model=pb.Model.ValueType(model), first_page=first)
            for share, _ in ranges:
                want.ranges.add(
                    layer=share.layer, head_start=share.head_start, head_stop=share.head_stop
                )
            if any(have.any() for _, have in ranges):
                want.received.extend(
                    np.packbits(have[first:], bitorder="little").tobytes() for _, have in ranges
                )
            found.append(want)
        return found

    def place(self, frame: Frame) -> tuple[NDArray[np.bool_], int, int]:
        """Write a verified frame's pages, and tell which they were. Raises FrameError for one that was
        not asked for, CodecError for one of another length than it says."""
        at = (frame.model, frame.layer, frame.head_start, frame.num_heads)
        found = self._by_place.get(at)
        stop = frame.first_page + frame.num_pages
        if found is None or stop > len(found[1]) or frame.codec not in BY_ID:
            raise FrameError(
                f"pages {frame.first_page} to {stop} of {at} in codec {frame.codec}: not asked for"
            )
        pool = self.progress.pools[MODELS[frame.model]]
        data = BY_ID[frame.codec].decode(
            frame.payload, frame.num_pages, frame.num_heads, pool.layout
        )
        return self.put(MODELS[frame.model], *found, frame.first_page, data)

    def put(
        self,
        name: ModelName,
        share: Share,
        have: NDArray[np.bool_],
        first: int,
        data: NDArray[np.uint8],
    ) -> tuple[NDArray[np.bool_], int, int]:
        """Write pages, `[n, page_bytes]`, from position page `first` on."""
        progress, stop = self.progress, first + len(data)
        if progress.over:
            raise TransferError("this fetch is over")
        if first < progress.first_page(name):
            raise FrameError(f"page {first} of the {name}, which is in place already")
        progress.pools[name].scatter(
            share.layer, share.head_start, share.head_stop, progress.pages[name][first:stop], data
        )
        have[first:stop] = True
        progress.last_page_s = time.monotonic()
        self.bell.ring()
        return have, first, stop

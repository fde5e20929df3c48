"""What the engine loop and a drafter that is ahead say to each other.

    engine loop   ── Sync ───>  all draft ranks     a request and its text so far
                  ── Commit ─>                      tokens that have come to the text since
                  ── Close ──>                      drafts of it are of no more use
                  <── Tails ──  draft rank 0        new drafts, after every pass; now and then without any

Both agree on the first `base` tokens of a request's text. On top of those the drafter has drafted a
tail, and says what it adds to it:

    text of the target   0 ........................ base ............ committed
    text of the drafter  0 ........................ base ........ position ... position + new ones
                         |-- what it was told --|-- its own tail --|-- new --|

Every draft rank gets the same orders in the same order.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from paceline.runtime.types import WIRE_VERSION, DraftPass, Request, WireType

Count = Annotated[int, Meta(ge=0)]


class Sync(WireType, frozen=True, kw_only=True, omit_defaults=True, tag="sync"):
    """Draft for this request from now on; in place of what was known of it, if anything was."""

    generation: Count
    """Tails say it back: those of an earlier one are out of date."""
    request: Request
    output_token_ids: tuple[Count, ...] = ()
    """What it has written."""
    num_ahead: Annotated[int, Meta(ge=1)]
    """Most drafts beyond its text."""


class Commit(WireType, frozen=True, kw_only=True, tag="commit"):
    """Tokens that follow the first `base` ones of a text. Several steps' commits may come as one."""

    request_id: str
    base: Count
    token_ids: tuple[Count, ...]


class Close(WireType, frozen=True, kw_only=True, tag="close"):
    """Forget a request."""

    request_id: str


Order = Sync | Commit | Close


class Orders(WireType, frozen=True, kw_only=True, omit_defaults=True):
    """What has happened since the last ones, in order."""

    orders: tuple[Order, ...] = ()
    shutdown: bool = False
    version: int = WIRE_VERSION


class Tail(WireType, frozen=True, kw_only=True):
    """Drafts of one request, from `position` on."""

    request_id: str
    generation: Count
    base: Count
    """Tokens of the text that the drafter knew."""
    position: Count
    token_ids: tuple[Count, ...]


class Tails(WireType, frozen=True, kw_only=True, omit_defaults=True, tag="tails"):
    """What a pass gave, or why there will be no other. Empty ones say that the drafter lives."""

    rank: Count
    tails: tuple[Tail, ...] = ()
    passes: tuple[DraftPass, ...] = ()
    error: str | None = None
    version: int = WIRE_VERSION


def shutdown() -> bytes:
    """The last word to draft ranks, as it is sent."""
    return msgspec.msgpack.encode(Orders(shutdown=True))

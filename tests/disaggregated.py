"""A prefill engine and a decode engine, each in processes of its own, and requests between them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from paceline.runtime.config import make_config
from paceline.runtime.link import LinkClient
from paceline.runtime.local import connect
from paceline.runtime.preflight import examine
from paceline.runtime.types import EngineStatus, KvFetch, KvProduce, Request, TokenDelta

LONG_S = 60.0


@dataclass(kw_only=True)
class Engine:
    """An engine that moves KV, and what it said."""

    client: LinkClient
    deltas: dict[str, list[TokenDelta]] = field(default_factory=dict)
    latest: EngineStatus = field(default_factory=EngineStatus)

    @classmethod
    def start(cls, name: str, *, transfer: dict[str, Any] | None = None, **settings: Any) -> Engine:
        """Several ranks of these share two cores with everything else: Gloo sleeps while it waits."""
        config = make_config(
            {
                "distributed_executor_backend": "mp",
                "disable_custom_all_reduce": True,
                "kv_cache_memory": "64MiB",
                "kv_transfer_config": {"engine_id": name, **(transfer or {})},
                **settings,
            }
        )
        engine = cls(client=connect(config, examine(config)))
        engine.wait(lambda: bool(engine.latest.links.addresses))
        return engine

    def wait(self, done: Callable[[], bool], *, timeout_s: float = LONG_S) -> None:
        """Listen until something is so."""
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, f"never came to be; {self.latest}"
            for delta in self.client.poll(0.05):
                self.deltas.setdefault(delta.request_id, []).append(delta)
            self.latest = self.client.status()

    def ended(self, request_id: str) -> bool:
        deltas = self.deltas.get(request_id, [])
        return bool(deltas) and deltas[-1].finish_reason is not None

    def write(self, request: Request) -> list[TokenDelta]:
        """All deltas of a request."""
        self.deltas.pop(request.request_id, None)
        self.client.submit([request])
        self.wait(lambda: self.ended(request.request_id))
        return self.deltas[request.request_id]

    def idle(self) -> bool:
        """Whether nothing is held for anybody."""
        totals = self.latest.transfers
        held = self.latest.num_blocks - self.latest.num_free_blocks
        return held == 0 and totals.producing == totals.fetching == self.latest.num_running == 0


def text(deltas: list[TokenDelta]) -> tuple[int, ...]:
    return tuple(token_id for delta in deltas for token_id in delta.token_ids)


def halves(request: Request, links: Engine, **more: Any) -> tuple[Request, Request]:
    """What the engine that reads the prompt gets, and the one that goes on."""
    transfer_id = uuid.uuid4().hex
    produce = KvProduce(transfer_id=transfer_id, lease_s=more.get("lease_s", 20.0))
    fetch = KvFetch(
        transfer_id=transfer_id,
        addresses=links.latest.links.addresses,
        **{"lease_s": 20.0, "timeout_s": 30.0, **more},
    )
    most = len(request.output_token_ids) + 1
    return (
        msgspec.structs.replace(request, produce=produce, max_tokens=most, num_draft_tokens=0),
        msgspec.structs.replace(request, fetch=fetch),
    )


def write_apart(request: Request, prefill: Engine, decode: Engine, **more: Any) -> list[TokenDelta]:
    """All deltas of a request whose prompt is read on one engine and whose text is written on
    another."""
    reading, writing = halves(request, prefill, **more)
    prefill.client.submit([reading])
    return decode.write(writing)

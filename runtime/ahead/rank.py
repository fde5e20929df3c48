"""The life of one draft rank: meet, load, draft, leave.

    rank 0      orders ──> how many ──┬──> take, one pass ──> tails ──> orders ...
    rank 1..    orders ──────────────<┘──> take, one pass ──> orders ...

Each rank has the same orders in its own queue, but not at the same moment: rank 0 says how many of
them come before a pass. While there is nothing to draft all wait for orders and for nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from paceline.parallel.launch import join, leave
from paceline.parallel.mesh import Mesh
from paceline.parallel.rank import RankSpec
from paceline.runtime.ahead.channel import OrderReceiver
from paceline.runtime.ahead.drafting import AheadDrafter
from paceline.runtime.ahead.messages import Orders
from paceline.runtime.config import EngineConfig
from paceline.runtime.loading import load

logger = logging.getLogger(__name__)

BEAT_S = 0.5
"""How often an idle draft rank 0 says that it lives."""


def run_draft_rank(
    config: EngineConfig, spec: RankSpec, address: str, *, alive: Callable[[], bool]
) -> None:
    """Draft until told to stop or `alive` is false. Failures are told to the engine loop."""
    channel = OrderReceiver(address, rank=spec.rank)
    try:
        try:
            mesh = join(spec)
            drafter = AheadDrafter(config, load(config, mesh), rank=spec.rank)
        except Exception as error:  # whatever it is, the engine must hear of it rather than wait
            logger.debug("draft rank %d cannot load", spec.rank, exc_info=True)
            channel.failed(error)
            return
        serve(drafter, channel, mesh, step_timeout_s=config.step_timeout_s, alive=alive)
    finally:
        channel.close()
        leave()


def serve(
    drafter: AheadDrafter,
    channel: OrderReceiver,
    mesh: Mesh,
    *,
    step_timeout_s: float,
    alive: Callable[[], bool],
) -> None:
    """Take orders and draft, in turn, until told to stop."""
    facts = f"draft rank {mesh.rank}, {mesh.device}, drafter {drafter.describe()}"
    channel.ready(facts, num_blocks=drafter.num_blocks)
    queue = _Queue(channel, mesh, step_timeout_s=step_timeout_s, alive=alive)
    idle = True
    try:
        while (found := queue.take(idle=idle)) is not None:
            for orders in found:
                drafter.take(orders.orders)
            tails = drafter.draft()
            idle = tails is None
            if tails is not None and mesh.rank0:
                channel.tell(tails)
    except Exception as error:
        logger.exception("draft rank %d failed", mesh.rank)
        channel.failed_at_work(error)


class _Queue:
    """One rank's orders, taken by all ranks at the same places between passes."""

    def __init__(
        self,
        channel: OrderReceiver,
        mesh: Mesh,
        *,
        step_timeout_s: float,
        alive: Callable[[], bool],
    ) -> None:
        self._channel, self._mesh = channel, mesh
        self._step_timeout_s, self._alive = step_timeout_s, alive

    def take(self, *, idle: bool) -> list[Orders] | None:
        """The orders before the next pass, one message at least where it is `idle`; None at the end.
        All ranks are idle or none is."""
        first = self._mesh.rank0
        while idle and not self._channel.wait(BEAT_S):
            if not self._alive():
                return None
            if first:
                self._channel.beat()
        found: list[Orders] = []
        while first and self._channel.wait(0.0):
            found.append(self._next())
        if self._mesh.world.size > 1:
            count = torch.tensor([len(found)], dtype=torch.int64, device=self._mesh.device)
            count = self._mesh.world.collectives.broadcast_(count)
            while len(found) < int(count.item()):
                found.append(self._next())
        return None if any(each.shutdown for each in found) else found

    def _next(self) -> Orders:
        return self._channel.orders(wait_s=self._step_timeout_s, alive=self._alive)

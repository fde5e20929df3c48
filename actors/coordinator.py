"""The engine loop in a Ray actor. It holds no tensors and no device, so it outlives a dead shard.

frontend ──link──> engine thread: Engine.step, again and again ──link──> frontend
                       │ channel
                       v
                   shard 0 .. shard n-1
"""

from __future__ import annotations

import logging
import tempfile
import threading

import ray

from paceline.actors import handles
from paceline.parallel.rank import RankSpec
from paceline.runtime.channel import PlanSender, RankAddresses
from paceline.runtime.config import EngineConfig
from paceline.runtime.engine import Engine
from paceline.runtime.engine_loop import run_engine
from paceline.runtime.errors import PacelineError, UserError
from paceline.runtime.executor import ChannelExecutor
from paceline.runtime.link import LinkAddress, LinkServer
from paceline.runtime.schedule.scheduler import make_scheduler
from paceline.runtime.transfer.control import KvControl
from paceline.runtime.types import WireType

logger = logging.getLogger(__name__)

CLOSE_S = 5.0


class Started(WireType, frozen=True, kw_only=True):
    """How a start ended."""

    ranks: tuple[str, ...] = ()
    """What each rank said of itself."""
    link: LinkAddress | None = None
    error: str | None = None
    user_error: bool = False
    """Whether the user can mend it."""


class Coordinator:
    """One per engine. Its methods run in Ray's threads, the engine in one of its own."""

    def __init__(self) -> None:
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lost: str | None = None

    def where(self) -> str:
        """The address of its node."""
        return str(ray.util.get_node_ip_address())

    def start(
        self,
        config: EngineConfig,
        max_model_len: int,
        shards: list[handles.ShardHandle],
        specs: list[RankSpec],
        *,
        ranks_here: bool,
        frontend_here: bool,
    ) -> Started:
        """Set the shards to work, wait until all are loaded, and serve whoever links up."""
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-")
        runs: list[handles.Ref] = []
        channel = PlanSender(
            self._address("plans", local=ranks_here),
            num_ranks=len(shards),
            watch=lambda: handles.first_dead(runs),
        )
        links = None
        if config.kv_transfer_config is not None:
            address = self._address("links", local=ranks_here)
            links = KvControl(address, num_ranks=len(shards))
        addresses = RankAddresses(
            plans=channel.address, links=None if links is None else links.address
        )
        for shard, spec in zip(shards, specs, strict=True):
            runs.append(handles.run_shard(shard, config, spec, addresses))
        executor = ChannelExecutor(channel, step_timeout_s=config.step_timeout_s)
        try:
            ready = channel.wait_for_ranks(timeout_s=config.load_timeout_s)
            if links is not None:
                links.wait_ready(timeout_s=config.load_timeout_s, check=executor.check)
        except PacelineError as error:
            channel.close()
            if links is not None:
                links.close()
            return Started(error=str(error), user_error=isinstance(error, UserError))
        scheduler = make_scheduler(config, max_model_len=max_model_len, num_blocks=ready.num_blocks)
        engine = Engine(scheduler, executor, ranks=ready.ranks, links=links)
        link = LinkServer(
            self._address("commands", local=frontend_here),
            self._address("news", local=frontend_here),
        )
        self._thread = threading.Thread(
            target=self._serve, args=(engine, link), name="engine", daemon=True
        )
        self._thread.start()
        return Started(ranks=ready.ranks, link=link.address)

    def watch(self) -> str | None:
        """Returns when the engine has ended: why it was lost, if it was. Its reference is how
        others see that this actor lives."""
        assert self._thread is not None, "expected start() first"
        self._thread.join()
        return self._lost

    def close(self) -> None:
        """Stop the loop and tell the shards to end."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=CLOSE_S)
        if self._folder is not None:
            self._folder.cleanup()

    def _serve(self, engine: Engine, link: LinkServer) -> None:
        self._lost = run_engine(engine, link, wanted=lambda: not self._closing.is_set())

    def _address(self, name: str, *, local: bool) -> str:
        assert self._folder is not None
        return f"ipc://{self._folder.name}/{name}" if local else f"tcp://{self.where()}:*"

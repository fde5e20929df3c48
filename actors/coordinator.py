"""The engine loop in a Ray actor. It holds no tensors and no device, so it outlives a dead shard.

frontend ──link──> engine thread: Engine.step, again and again ──link──> frontend
                       │ channel
                       v
                   shard 0 .. shard n-1     one ends or hangs: all are ended, and set to work anew

A drafter that is ahead has shards of its own, after those, with a channel of their own.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import threading
from typing import Generic, TypeVar

import ray

from paceline.actors import handles
from paceline.parallel import leftovers
from paceline.parallel.rank import RankSpec
from paceline.runtime import logs, stacks
from paceline.runtime.ahead.channel import OrderSender
from paceline.runtime.ahead.group import DraftGroup, shared_cores
from paceline.runtime.channel import PlanSender, RankAddresses, RankSender
from paceline.runtime.config import EngineConfig
from paceline.runtime.engine import Engine, make_engine
from paceline.runtime.engine_loop import run_engine
from paceline.runtime.errors import EngineError, PacelineError, UserError
from paceline.runtime.executor import ChannelExecutor
from paceline.runtime.link import LinkAddress, LinkServer
from paceline.runtime.notes import Notes
from paceline.runtime.transfer.control import KvControl
from paceline.runtime.types import WireType

logger = logging.getLogger(__name__)

CLOSE_S = 5.0
ChannelT = TypeVar("ChannelT", bound=RankSender)


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
        self._folder = tempfile.TemporaryDirectory(prefix=leftovers.prefix())
        self._host = str(ray.util.get_node_ip_address())
        self._lost: str | None = None
        self._groups: list[ShardGroup] = []
        self._local = False
        """Whether the driver is on this node."""
        self._notes = Notes()
        """Its own log is a file on its node; what it warns of is said to the driver."""

    def start(
        self,
        config: EngineConfig,
        max_model_len: int,
        shards: list[handles.ShardHandle],
        *,
        gpu: bool,
        frontend_node: str,
    ) -> Started:
        """Set the shards to work, wait until all are loaded, and serve whoever links up."""
        stacks.allow()
        logs.configure(config, role=logs.engine_role(config, "coordinator"))
        here = ray.get_runtime_context().get_node_id()
        links = None
        try:
            places = handles.places_of(shards, timeout_s=config.placement_timeout_s)
            ranks_here = all(place.node_id == here for place in places)
            if config.kv_transfer_config is not None:
                address = self._address("links", local=ranks_here)
                links = KvControl(address, num_ranks=len(shards))
            ahead = None
            if config.drafts_ahead:
                shards, drafting = shards[: config.world_size], shards[config.world_size :]
                group = ShardGroup(config, drafting, gpu=gpu, here=here, folder=self._folder.name)
                self._groups.append(group)
                ahead = DraftGroup(
                    group.start_drafting,
                    load_timeout_s=config.load_timeout_s,
                    step_timeout_s=config.step_timeout_s,
                )
            group = ShardGroup(
                config, shards, gpu=gpu, here=here, folder=self._folder.name, links=links
            )
            self._groups.append(group)
            executor = ChannelExecutor(
                group.start,
                load_timeout_s=config.load_timeout_s,
                step_timeout_s=config.step_timeout_s,
            )
            engine = make_engine(config, executor, links, max_model_len, ahead=ahead)
        except PacelineError as error:
            # draft ranks that still load end with their actors
            return Started(error=str(error), user_error=isinstance(error, UserError))
        local = self._local = frontend_node == here
        link = LinkServer(
            self._address("commands", local=local), self._address("news", local=local)
        )
        self._thread = threading.Thread(
            target=self._serve, args=(engine, link), name="engine", daemon=True
        )
        self._thread.start()
        return Started(ranks=executor.ranks, link=link.address)

    def where(self) -> tuple[str, str, int]:
        """The id and the address of its node, and its process there."""
        return ray.get_runtime_context().get_node_id(), self._host, os.getpid()

    def watch(self) -> str | None:
        """Returns when the engine has ended: why it was lost, if it was. Its reference is how
        others see that this actor lives."""
        assert self._thread is not None, "expected start() first"
        self._thread.join()
        return self._lost

    def close(self) -> list[int]:
        """Stop the loop and tell the shards to end; their processes, where the driver is on this node
        too."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=CLOSE_S)
        self._folder.cleanup()
        return [pid for group in self._groups for pid in group.pids] if self._local else []

    def _serve(self, engine: Engine, link: LinkServer) -> None:
        self._lost = run_engine(
            engine, link, wanted=lambda: not self._closing.is_set(), notes=self._notes
        )

    def _address(self, name: str, *, local: bool) -> str:
        return f"ipc://{self._folder.name}/{name}" if local else f"tcp://{self._host}:*"


class ShardGroup:
    """The shards of an engine, which Ray starts again when they end, to be set to work together."""

    def __init__(
        self,
        config: EngineConfig,
        shards: list[handles.ShardHandle],
        *,
        gpu: bool,
        here: str,
        folder: str,
        links: KvControl | None = None,
    ) -> None:
        """`here` is this node's id."""
        self._config, self._shards, self._gpu = config, shards, gpu
        self._here, self._folder, self._links = here, folder, links
        self._used: set[handles.ShardPlace] = set()
        """Processes that have been at work and have ended or will: none of them may be again."""
        self._numbers = itertools.count()
        self.pids: list[int] = []
        """Of those at work."""

    def start(self) -> ShardRanks[PlanSender]:
        """Set all shards to work on plans. Raises EngineError."""
        config, places = self._config, self._fresh()
        links = None if self._links is None else self._links.address
        if links is not None and links.startswith("ipc:") and not self._are_here(places):
            raise EngineError("its ranks have moved to other nodes")
        ranks = ShardRanks(self._shards, places, PlanSender, address=self._address("plans", places))
        specs = self._specs(places, config.tensor_parallel_size, config.shared_draft_size)
        ranks.run(config, specs, RankAddresses(plans=ranks.channel.address, links=links))
        return ranks

    def start_drafting(self) -> ShardRanks[OrderSender]:
        """Set all shards to work as draft ranks. Raises EngineError."""
        config, places = self._config, self._fresh()
        address = self._address("orders", places)
        ranks = ShardRanks(self._shards, places, OrderSender, address=address)
        specs = self._specs(places, 0, config.draft_size)
        ranks.run(config, specs, RankAddresses(plans=ranks.channel.address, drafts=True))
        return ranks

    def _fresh(self) -> list[handles.ShardPlace]:
        """Where the shards are, once each is a process that has not been at work before."""
        places = handles.places_of(
            self._shards, but=self._used, timeout_s=self._config.placement_timeout_s
        )
        self.pids = [place.pid for place in places]
        self._used |= set(places)
        return places

    def _are_here(self, places: list[handles.ShardPlace]) -> bool:
        return all(place.node_id == self._here for place in places)

    def _address(self, name: str, places: list[handles.ShardPlace]) -> str:
        """What to bind for shards at these places."""
        if self._are_here(places):
            return f"ipc://{self._folder}/{name}-{next(self._numbers)}"
        return f"tcp://{ray.util.get_node_ip_address()}:*"

    def _specs(
        self, places: list[handles.ShardPlace], target_size: int, draft_size: int
    ) -> list[RankSpec]:
        config = self._config
        port = 0
        if len(places) > 1:
            port = handles.port_of(self._shards[0], timeout_s=config.load_timeout_s)
        nodes = [place.node_id for place in places]
        num_threads, shared_memory = shared_cores(config)
        return [
            RankSpec(
                rank=rank,
                local_rank=nodes[:rank].count(node_id),
                local_size=nodes.count(node_id),
                target_size=target_size,
                draft_size=draft_size,
                master_addr=places[0].address,
                master_port=port,
                device="cuda"
                if self._gpu
                else "cpu",  # Ray shows each actor its own GPU only, as number 0
                interleaved=config.interleaved,
                shared_memory=shared_memory,
                num_threads=num_threads,
                timeout_s=config.load_timeout_s,
            )
            for rank, node_id in enumerate(nodes)
        ]


class ShardRanks(Generic[ChannelT]):
    """Satisfies `Ranks`, or `DraftRanks`, with shards at work."""

    def __init__(
        self,
        shards: list[handles.ShardHandle],
        places: list[handles.ShardPlace],
        channel: type[ChannelT],
        *,
        address: str,
    ) -> None:
        self._shards, self._places = shards, places
        self._runs: list[handles.Ref] = []
        self.channel = channel(
            address, num_ranks=len(shards), watch=lambda: handles.first_dead(self._runs)
        )

    def run(self, config: EngineConfig, specs: list[RankSpec], addresses: RankAddresses) -> None:
        for shard, spec in zip(self._shards, specs, strict=True):
            self._runs.append(handles.run_shard(shard, config, spec, addresses))

    def stacks(self) -> list[str]:
        return handles.stacks_of(self._places)

    def kill(self) -> None:
        self.channel.close()
        handles.restart(self._shards)

    def close(self) -> None:
        self.channel.close()

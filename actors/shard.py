"""One rank of an engine in a Ray actor: a process on a device, in one long `run`."""

from __future__ import annotations

import logging
import os

import ray

from paceline.parallel.rank import RankSpec
from paceline.runtime.channel import RankAddresses
from paceline.runtime.config import EngineConfig

logger = logging.getLogger(__name__)


class Shard:
    """Lives in one bundle of the engine's placement group. Loads nothing until `run`."""

    def where(self) -> tuple[str, str, int]:
        """The id and the address of its node, and its process there."""
        node_id = ray.get_runtime_context().get_node_id()
        return node_id, ray.util.get_node_ip_address(), os.getpid()

    def free_port(self) -> int:
        """A port on its node, for the ranks to meet at."""
        from paceline.parallel.launch import free_port

        return free_port()

    def run(self, config: EngineConfig, spec: RankSpec, addresses: RankAddresses) -> None:
        """Serve plans until the coordinator says stop, or its raylet is gone."""
        from paceline.runtime import logs
        from paceline.runtime.rank import rank_name, run_rank

        logs.configure(config, role=logs.engine_role(config, rank_name(spec, addresses)))

        parent = os.getppid()
        host = ray.util.get_node_ip_address()
        run_rank(config, spec, addresses, host=host, alive=lambda: os.getppid() == parent)

"""The Ray cluster: whether it can be reached, and whether the engines asked for have a place there."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from paceline.actors.checks.check import Finding, failed, ok, skipped, warning
from paceline.actors.engine_set import engine_config, first_roles, is_fleet, is_linked
from paceline.actors.ray_token import TOKEN_ADVICE
from paceline.runtime.config import EngineConfig, FleetConfig
from paceline.runtime.errors import PlacementError

PLACED_S = 10.0
"""How long the cluster may take to find the engines a place."""


def cluster(config: EngineConfig, settings: FleetConfig) -> Finding:
    """Ask for the engines' placement groups, and give them back: nothing is started in them."""
    if config.distributed_executor_backend != "ray":
        return skipped("the engines' ranks are local processes: no Ray is needed")
    configs = engines(config, settings)
    num_ranks = sum(each.num_ranks for each in configs)
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    if address is None:
        return _local(num_ranks)
    import ray

    from paceline.actors.app import RayCluster
    from paceline.actors.placement import find_places

    try:
        joined = RayCluster(config, num_ranks=num_ranks, spread=False)
    except PlacementError as error:
        return failed(str(error), f"ray status --address {address} says more; {TOKEN_ADVICE}")
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        places = find_places(config, num_ranks=num_ranks)
        taken = []
        try:
            for each in configs:
                short = msgspec.structs.replace(each, placement_timeout_s=PLACED_S)
                taken.append(places.take(short))
                taken[-1].wait(short, stop=threading.Event())
        finally:
            for place in taken:
                place.release()
        return ok(
            f"{address}: {len(nodes)} nodes; {len(configs)} engines of {num_ranks} ranks together find a "
            f"{places.device} each",
            nodes=len(nodes),
            ranks=num_ranks,
            resources=ray.cluster_resources(),
        )
    finally:
        joined.close()


def _local(num_ranks: int) -> Finding:
    """Without a cluster one is started here, with this machine's devices."""
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there, kind = (num_gpus, "GPUs") if num_gpus else (os.cpu_count() or 1, "cores")
    text = f"no cluster is named: a local Ray with {there} {kind}, {num_ranks} taken by ranks"
    if num_ranks > there:
        return failed(
            text,
            "lower tensor_parallel_size or the replicas, or name a cluster (--ray-address, RAY_ADDRESS)",
        )
    return ok(text, ranks=num_ranks, devices=there)


def engines(config: EngineConfig, settings: FleetConfig) -> list[EngineConfig]:
    """The configs of all engines that will be started."""
    if not is_fleet(settings, config):
        return [config]
    return [
        engine_config(
            config, settings, role=role, engine_id=role, linked=is_linked(settings, config)
        )
        for role in first_roles(settings, config)
    ]


def authentication(config: EngineConfig, *, environ: Mapping[str, str] = os.environ) -> Finding:
    """Whether Ray asks who is there, and whether we could answer."""
    if config.distributed_executor_backend != "ray":
        return skipped("no Ray is needed")
    mode = environ.get("RAY_AUTH_MODE", "")
    if not (config.ray_address or environ.get("RAY_ADDRESS") or mode):
        return skipped("a local Ray listens on this machine alone")
    if not mode:
        return warning(
            "RAY_AUTH_MODE is not set here: a cluster that `ray start` began asks for a token by default, "
            "and to who has none it looks as if nobody were there",
            TOKEN_ADVICE,
            mode=mode,
        )
    if mode.lower() != "token":
        return warning(
            "RAY_AUTH_MODE is not token: whoever reaches Ray's ports runs code on its nodes",
            "where others share the network: RAY_AUTH_MODE=token on every node and here",
            mode=mode,
        )
    home = Path(environ.get("HOME", "~")).expanduser()
    given: dict[str, Any] = {
        "RAY_AUTH_TOKEN": environ.get("RAY_AUTH_TOKEN"),
        "RAY_AUTH_TOKEN_PATH": Path(environ.get("RAY_AUTH_TOKEN_PATH") or os.devnull).is_file(),
        "~/.ray/auth_token": (home / ".ray" / "auth_token").is_file(),
    }
    found = [name for name, there in given.items() if there]
    if not found:
        return failed("RAY_AUTH_MODE=token, and there is no token", TOKEN_ADVICE)
    return ok(f"RAY_AUTH_MODE=token, the token from {found[0]}", mode=mode)

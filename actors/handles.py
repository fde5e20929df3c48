"""Every remote call Paceline makes, typed. The only module that says `.remote(`.

Each call has a deadline; what Ray raises becomes one of our errors.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NewType

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from paceline.parallel.rank import RankSpec
from paceline.runtime.channel import RankAddresses
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import DeadlineError, EngineError

if TYPE_CHECKING:
    from paceline.actors.coordinator import Coordinator, Started
    from paceline.actors.shard import Shard

ShardHandle = NewType("ShardHandle", object)
CoordinatorHandle = NewType("CoordinatorHandle", object)
Ref = NewType("Ref", object)

CALL_TIMEOUT_S = 60.0


def make_shard(shard: type[Shard], group: PlacementGroup, bundle: int, *, gpu: bool) -> ShardHandle:
    """A shard actor in one bundle of a placement group."""
    actor: Any = ray.remote(shard)
    strategy = PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=bundle
    )
    handle = actor.options(
        num_cpus=0 if gpu else 1,
        num_gpus=1 if gpu else 0,
        max_restarts=0,
        max_concurrency=2,  # `where` must answer while `run` runs
        scheduling_strategy=strategy,
        name=None,
    ).remote()
    return ShardHandle(handle)


def make_coordinator(coordinator: type[Coordinator], *, node_id: str) -> CoordinatorHandle:
    """The coordinator actor, on the given node if that still has a process to spare."""
    actor: Any = ray.remote(coordinator)
    handle = actor.options(
        num_cpus=0,
        max_restarts=0,
        max_concurrency=8,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=True),
    ).remote()
    return CoordinatorHandle(handle)


def nodes_of(shards: list[ShardHandle], *, timeout_s: float) -> list[tuple[str, str]]:
    """Every shard's node id and address."""
    places: list[tuple[str, str]] = _get(
        [_actor(shard).where.remote() for shard in shards],
        timeout_s=timeout_s,
        what="shards to start",
    )
    return places


def port_of(shard: ShardHandle) -> int:
    return int(_get(_actor(shard).free_port.remote(), timeout_s=CALL_TIMEOUT_S, what="a free port"))


def run_shard(
    shard: ShardHandle, config: EngineConfig, spec: RankSpec, addresses: RankAddresses
) -> Ref:
    """Set a shard to work; the reference is done when the shard is."""
    return Ref(_actor(shard).run.remote(config, spec, addresses))


def first_dead(runs: list[Ref]) -> str | None:
    """Which of the running shards has ended, and why; None while all live."""
    ended = _first_ended(runs)
    if ended is None:
        return None
    index, _, died = ended
    return f"rank {index} ended" if died is None else f"rank {index} died: {died}"


def start(
    coordinator: CoordinatorHandle,
    config: EngineConfig,
    max_model_len: int,
    shards: list[ShardHandle],
    specs: list[RankSpec],
    *,
    ranks_here: bool,
    frontend_here: bool,
) -> Started:
    """See `Coordinator.start`."""
    ref = _actor(coordinator).start.remote(
        config,
        max_model_len,
        shards,
        specs,
        ranks_here=ranks_here,
        frontend_here=frontend_here,
    )
    answer: Started = _get(
        ref, timeout_s=config.load_timeout_s + CALL_TIMEOUT_S, what="the engine to load"
    )
    return answer


def watch(coordinator: CoordinatorHandle) -> Ref:
    """A reference that is done when the coordinator's engine is."""
    return Ref(_actor(coordinator).watch.remote())


def why_ended(watched: Ref) -> str | None:
    """Why the engine behind a watched reference is gone; None while it lives."""
    ended = _first_ended([watched])
    if ended is None:
        return None
    _, why, died = ended
    return f"the coordinator died: {died}" if died is not None else why or "the engine ended"


def close(
    coordinator: CoordinatorHandle | None, shards: list[ShardHandle], *, timeout_s: float
) -> None:
    """End the engine's actors: asked first, killed in any case."""
    if coordinator is not None:
        with contextlib.suppress(ray.exceptions.RayError):  # it is killed below
            ray.get(_actor(coordinator).close.remote(), timeout=timeout_s)
    for handle in (*shards, *([coordinator] if coordinator is not None else [])):
        ray.kill(_actor(handle), no_restart=True)


def _actor(handle: object) -> Any:
    return handle


def _first_ended(refs: list[Ref]) -> tuple[int, Any, str | None] | None:
    """Index and result of one that is done, or why it failed; None while none is."""
    done, _ = ray.wait(list(refs), num_returns=1, timeout=0) if refs else ([], [])
    if not done:
        return None
    index = refs.index(done[0])
    try:
        return index, ray.get(done[0], timeout=1.0), None
    except ray.exceptions.RayError as error:
        return index, None, _brief(error)


def _get(ref: Any, *, timeout_s: float, what: str) -> Any:
    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise DeadlineError(f"waited {timeout_s:.0f} s for {what}") from None
    except ray.exceptions.RayError as error:
        raise EngineError(f"while waiting for {what}: {_brief(error)}") from None


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

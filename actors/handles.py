"""Every remote call Paceline makes, typed. The only module that says `.remote(`.

Each call has a deadline; what Ray raises becomes one of our errors.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NewType

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from paceline.parallel.rank import RankSpec
from paceline.runtime import stacks
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
STACKS_S = 15.0
"""What a task on every node may take that looks what its processes do."""
RETRY_S = 0.1


def make_shard(shard: type[Shard], group: PlacementGroup, bundle: int, *, gpu: bool) -> ShardHandle:
    """A shard actor in one bundle of a placement group."""
    actor: Any = ray.remote(shard)
    strategy = PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=bundle
    )
    handle = actor.options(
        num_cpus=0 if gpu else 1,
        num_gpus=1 if gpu else 0,
        max_restarts=-1,  # one that ends comes back, and does nothing until it is told to
        max_concurrency=2,  # `where` must answer while `run` runs
        scheduling_strategy=strategy,
        name=None,
    ).remote()
    return ShardHandle(handle)


def make_coordinator(
    coordinator: type[Coordinator], group: PlacementGroup, bundle: int
) -> CoordinatorHandle:
    """The coordinator actor, on the node of a bundle and without taking anything of it: an affinity to
    the node that is soft Ray may pass over, and every step would cross the network."""
    actor: Any = ray.remote(coordinator)
    strategy = PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=bundle
    )
    handle = actor.options(
        num_cpus=0,
        max_restarts=0,
        max_concurrency=8,
        scheduling_strategy=strategy,
    ).remote()
    return CoordinatorHandle(handle)


class ShardPlace(NamedTuple):
    """Where a shard is."""

    node_id: str
    address: str
    pid: int


def places_of(
    shards: Sequence[ShardHandle | CoordinatorHandle],
    *,
    timeout_s: float,
    but: Collection[ShardPlace] = (),
) -> list[ShardPlace]:
    """Where every shard is, once none of them is one of the processes `but` which it must not be."""
    deadline_s = time.monotonic() + timeout_s
    places: dict[int, ShardPlace] = {}
    while len(places) < len(shards):
        for index in [each for each in range(len(shards)) if each not in places]:
            left_s = max(0.1, deadline_s - time.monotonic())
            try:
                where = ray.get(_actor(shards[index]).where.remote(), timeout=left_s)
            except ray.exceptions.ActorUnavailableError:  # it is being started again
                continue
            except ray.exceptions.RayActorError as error:
                if "restart" not in str(error).lower() and not but:
                    raise EngineError(f"while waiting for shards: {_brief(error)}") from None
                continue
            except ray.exceptions.GetTimeoutError:
                pass
            except ray.exceptions.RayError as error:
                raise EngineError(f"while waiting for shards: {_brief(error)}") from None
            else:
                place = ShardPlace(*where)
                if place not in but:
                    places[index] = place
        if len(places) < len(shards):
            if time.monotonic() >= deadline_s:
                raise DeadlineError(f"waited {timeout_s:.0f} s for shards to start")
            time.sleep(RETRY_S)
    return [places[index] for index in range(len(shards))]


def restart(shards: list[ShardHandle]) -> None:
    """End every shard's process, whatever it does; Ray starts others in their place."""
    for shard in shards:
        with contextlib.suppress(ray.exceptions.RayError):  # it has ended already
            ray.kill(_actor(shard), no_restart=False)


def stacks_of(places: list[ShardPlace]) -> list[str]:
    """What the processes at these places are doing, each asked on its own node."""
    take: Any = ray.remote(stacks.take)
    refs = [
        take.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=place.node_id, soft=False),
        ).remote(place.pid)
        for place in places
    ]
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=STACKS_S)
    found = []
    for ref, place in zip(refs, places, strict=True):
        try:
            found.append(
                str(ray.get(ref, timeout=0)) if ref in done else "its node does not answer"
            )
        except ray.exceptions.RayError as error:
            found.append(f"process {place.pid} cannot be asked: {_brief(error)}")
    return found


def port_of(shard: ShardHandle, *, timeout_s: float) -> int:
    """A free port where a shard is. Its process reads torch first, from wherever that is kept."""
    answer = _get(_actor(shard).free_port.remote(), timeout_s=timeout_s, what="a rank to start")
    return int(answer)


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
    *,
    gpu: bool,
    frontend_node: str,
) -> Started:
    """See `Coordinator.start`."""
    ref = _actor(coordinator).start.remote(
        config, max_model_len, shards, gpu=gpu, frontend_node=frontend_node
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
) -> list[int]:
    """End the engine's actors: asked first, killed in any case. Processes on this node that will be
    gone."""
    pids: list[int] = []
    if coordinator is not None:
        with contextlib.suppress(ray.exceptions.RayError):  # it is killed below
            pids = ray.get(_actor(coordinator).close.remote(), timeout=timeout_s)
    for handle in (*shards, *([coordinator] if coordinator is not None else [])):
        ray.kill(_actor(handle), no_restart=True)
    return pids


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

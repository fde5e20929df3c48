"""Start the ranks of an engine: the process group, its axes, and, without Ray, the processes
themselves."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from paceline.parallel.collectives import Alone, Collectives, ProcessGroup, shared_memory
from paceline.parallel.mesh import Axis, Mesh
from paceline.parallel.rank import RankSpec

_ANY_PORT = 9
OPENMP_SPINS = ("GOMP_SPINCOUNT", "30000")
"""Measured with 36 requests on two cores: 6 to 13 % more tokens than by default."""


def solo_mesh(device: torch.device | str = "cpu") -> Mesh:
    """A mesh of one rank, which needs no process group."""
    axis = Axis(size=1, index=0, collectives=Alone())
    return Mesh(
        rank=0, world=axis, drafting=axis, target=axis, draft=axis, device=torch.device(device)
    )


def join(spec: RankSpec) -> Mesh:
    """Meet the other ranks and return this one's mesh. Blocks for at most `timeout_s`; raises
    RuntimeError then.

    Sets the environment that NCCL, Gloo and DeepSpeed read, but for interfaces that the user has
    named, and the number of OpenMP threads: ranks that share a CPU host share its cores.
    """
    if spec.device == "cpu":
        share = max(1, (os.cpu_count() or 1) // spec.local_size)
        torch.set_num_threads(spec.num_threads or share)
    if spec.world_size == 1:
        alone = solo_mesh(spec.device)
        return reshape(alone, target_size=spec.target_size, draft_size=spec.draft_size)
    os.environ.update(
        MASTER_ADDR=spec.master_addr,
        MASTER_PORT=str(spec.master_port),
        RANK=str(spec.rank),
        WORLD_SIZE=str(spec.world_size),
        LOCAL_RANK=str(spec.local_rank),
        LOCAL_SIZE=str(spec.local_size),
    )
    if spec.local_size < spec.world_size:
        _meet_over_the_network(spec)
    device = (
        torch.device("cuda", spec.device_index) if spec.device == "cuda" else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=spec.rank,
        world_size=spec.world_size,
        timeout=timedelta(seconds=spec.timeout_s),
    )
    alone = solo_mesh(device)
    whole = Axis(
        size=spec.world_size,
        index=spec.rank,
        collectives=_world_collectives(spec, device),
        one_host=spec.shared_memory and device.type == "cpu" and spec.local_size == spec.world_size,
    )
    drafting = whole
    if spec.interleaved:  # collectives of one group must come in one order on all ranks
        group = dist.new_group(list(range(spec.world_size)))
        drafting = replace(whole, collectives=ProcessGroup(group, size=spec.world_size))
    mesh = replace(alone, rank=spec.rank, world=whole, drafting=drafting)
    return reshape(mesh, target_size=spec.target_size, draft_size=spec.draft_size)


def reshape(mesh: Mesh, *, target_size: int, draft_size: int) -> Mesh:
    """The same ranks with other axes. Collective: every rank of the world calls it with the same sizes."""
    assert max(target_size, draft_size) == mesh.world.size, (
        "expected the wider axis to be the world"
    )
    return replace(
        mesh,
        target=_axis(mesh.world, mesh.rank, target_size),
        draft=_axis(mesh.drafting, mesh.rank, draft_size),
    )


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


def calm_openmp() -> None:
    """Let OpenMP's threads in processes started from now on spin for a tenth of a millisecond after work
    they shared, enough to be there for the next, and not for the milliseconds of its default: those
    would be missed by whoever shares the cores. What the user says goes."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(*OPENMP_SPINS)


def spawn(
    target: Callable[..., None], *, args: list[tuple[Any, ...]], daemon: bool = True
) -> list[multiprocessing.process.BaseProcess]:
    """One process per entry of `args`. The caller joins or kills them; daemons end with their
    parent in any case, and may have no processes of their own."""
    calm_openmp()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=each, daemon=daemon) for each in args]
    for process in processes:
        process.start()
    return list(processes)


def _meet_over_the_network(spec: RankSpec) -> None:
    """Have Gloo and NCCL listen where the others' host is reached. By itself Gloo listens where this
    host's name leads to, which may be loopback, or nowhere."""
    interface = route_interface(spec.master_addr)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def route_interface(host: str) -> str | None:
    """The network interface with the address from which this host speaks to another; None if there
    is no way there, or no such interface."""
    try:
        family, _, _, _, peer = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(peer)  # sends nothing
            address = sock.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family == family and each.address == address for each in addresses):
            return name
    return None


def _world_collectives(spec: RankSpec, device: torch.device) -> Collectives:
    # the kernel spins while it waits, so ranks that outnumber the cores would mostly wait for each
    # other's turn
    fits = spec.local_size == spec.world_size <= (os.cpu_count() or 1)
    if device.type == "cpu" and spec.shared_memory and fits:
        shared = shared_memory(rank=spec.rank, size=spec.world_size)
        if shared is not None:
            return shared
    group = dist.group.WORLD
    assert group is not None, "expected a process group, found none"
    return ProcessGroup(group, size=spec.world_size)


def _axis(world: Axis, rank: int, size: int) -> Axis:
    """The first `size` ranks. Every rank must call this, in the same order: making a group is collective."""
    index = rank if rank < size else None
    if size == world.size:
        return world
    if size <= 1:
        return Axis(size=size, index=index, collectives=Alone())
    # DeepSpeed's shared memory knows only the whole world, so a narrower axis talks through a group of its own.
    group = dist.new_group(list(range(size)))
    if index is None:
        return Axis(size=size, index=None, collectives=Alone())
    return replace(world, size=size, index=index, collectives=ProcessGroup(group, size=size))

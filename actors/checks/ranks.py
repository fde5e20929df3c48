"""Two ranks on this machine add up a tensor, the way an engine's ranks do."""

from __future__ import annotations

import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

from paceline.actors.checks.check import Finding, ok, warning
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import DeadlineError

RANKS = 2
ROUNDS = 200
WIDTH = 4096
"""Values that are summed: about one row of a model."""
MEET_S = 60.0
BUILD_S = 150.0
"""What the first run on a machine may take: it compiles."""


def collectives(config: EngineConfig) -> Finding:
    """Which path sums take, and how long one does."""
    name, microseconds = _measure(config)
    text = f"{name} sums {WIDTH} values over {RANKS} ranks in {microseconds:.0f} us"
    facts: dict[str, Any] = {"path": name, "microseconds": microseconds}
    if name == "gloo" and not config.disable_custom_all_reduce:
        return warning(
            f"{text}; DeepSpeed's shared memory would take a few",
            "it needs a C++ compiler, AVX-512 and as many cores as ranks; on busy cores Gloo is right, and "
            "--disable-custom-all-reduce says so",
            **facts,
        )
    return ok(text, **facts)


def _measure(config: EngineConfig) -> tuple[str, float]:
    """The path's name and the median of its microseconds."""
    import multiprocessing

    from paceline.parallel.launch import free_port, spawn

    ours, theirs = multiprocessing.Pipe(duplex=False)
    port = free_port()
    shared = not config.disable_custom_all_reduce
    args = [(rank, port, shared, _device(config), theirs) for rank in range(RANKS)]
    processes = spawn(_rank, args=args)
    theirs.close()
    try:
        if not ours.poll(BUILD_S):
            raise DeadlineError(f"two ranks did not meet and add up within {BUILD_S:.0f} s")
        name, microseconds = ours.recv()
        return str(name), float(microseconds)
    except EOFError:
        codes = [process.exitcode for process in processes]
        raise DeadlineError(f"the ranks ended with exit codes {codes} and said nothing") from None
    finally:
        for process in processes:
            process.join(2.0)
            process.kill()


def _device(config: EngineConfig) -> str:
    """Two GPUs talk over NCCL; one has nobody to talk to."""
    import torch

    use = config.device != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() > 1
    return "cuda" if use else "cpu"


def _rank(rank: int, port: int, shared_memory: bool, device: str, told: Connection) -> None:
    """One of the ranks. The first tells how it went."""
    import torch

    from paceline.parallel.launch import join, leave
    from paceline.parallel.rank import RankSpec

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mesh = join(
        RankSpec(
            rank=rank,
            local_rank=rank,
            local_size=RANKS,
            target_size=RANKS,
            draft_size=0,
            master_port=port,
            device=device,
            device_index=rank,
            shared_memory=shared_memory,
            timeout_s=MEET_S,
        )
    )
    line = mesh.world.collectives
    times = []
    for _ in range(ROUNDS):
        ones = torch.ones(WIDTH, device=mesh.device)
        began = time.perf_counter()
        line.all_reduce_(ones)
        total = float(ones[-1])  # on a GPU this waits for the sum
        times.append(time.perf_counter() - began)
        assert total == RANKS, f"{RANKS} ones make {total}"
    if rank == 0:
        told.send((line.name, 1e6 * statistics.median(times)))
    leave()

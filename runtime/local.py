"""An engine whose ranks are processes of this machine, or this process itself: no Ray."""

from __future__ import annotations

import os
import tempfile
import time
from multiprocessing.process import BaseProcess

from paceline.parallel.launch import free_port, solo_mesh, spawn
from paceline.parallel.rank import RankSpec
from paceline.runtime.channel import PlanSender
from paceline.runtime.config import EngineConfig
from paceline.runtime.engine import Engine, make_scheduler
from paceline.runtime.errors import PlacementError
from paceline.runtime.executor import ChannelExecutor, Executor
from paceline.runtime.preflight import Facts
from paceline.runtime.rank import local_rank
from paceline.runtime.types import StepPlan, StepResult
from paceline.runtime.worker import Worker


def local_engine(config: EngineConfig, facts: Facts) -> Engine:
    """One rank runs here, several as local processes. Raises PlacementError for more ranks than
    devices."""
    device, count = local_devices(config.device)
    if config.world_size > count:
        raise PlacementError(
            f"{config.world_size} ranks need {config.world_size} {device} devices, this machine has {count}; lower "
            "tensor_parallel_size or draft_tensor_parallel_size"
        )
    executor: Executor
    if config.world_size == 1 and config.distributed_executor_backend != "mp":
        executor = InProcess(Worker(config, solo_mesh(device)))
    else:
        executor = LocalProcesses(config, device=device)
    return Engine(make_scheduler(config, max_model_len=facts.max_model_len), executor)


def local_devices(wanted: str) -> tuple[str, int]:
    """The kind of device to use here, and how many there are; a CPU core counts as one."""
    import torch

    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return "cuda", torch.cuda.device_count()
    return "cpu", os.cpu_count() or 1


class InProcess:
    """Satisfies `Executor` with this process' own rank.

    The others, if there are any, must run the same engine in lockstep: all then make the same plans.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def step(self, plan: StepPlan) -> StepResult:
        return self._worker.step(plan)

    def close(self) -> None:
        pass


class LocalProcesses:
    """Satisfies `Executor` with one process per rank, which end with this one."""

    def __init__(self, config: EngineConfig, *, device: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-")
        size, port = config.world_size, free_port()
        self._channel = PlanSender(
            f"ipc://{self._folder.name}/plans", num_ranks=size, watch=self._dead
        )
        self._executor = ChannelExecutor(self._channel, step_timeout_s=config.step_timeout_s)
        self._processes: list[BaseProcess] = []
        specs = [
            RankSpec(
                rank=rank,
                local_rank=rank,
                local_size=size,
                target_size=config.tensor_parallel_size,
                draft_size=config.draft_size,
                master_port=port,
                device=device,
                device_index=rank,
                shared_memory=not config.disable_custom_all_reduce,
                timeout_s=config.load_timeout_s,
            )
            for rank in range(size)
        ]
        try:
            self._processes = spawn(
                local_rank, args=[(config, spec, self._channel.address) for spec in specs]
            )
            self.facts = self._channel.wait_for_ranks(timeout_s=config.load_timeout_s)
        except BaseException:
            self.close()
            raise

    def step(self, plan: StepPlan) -> StepResult:
        return self._executor.step(plan)

    def close(self) -> None:
        """Ends every process: asked first, killed after two seconds."""
        self._channel.close()
        deadline = time.monotonic() + 2.0
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(5.0)
        self._folder.cleanup()

    def _dead(self) -> str | None:
        for rank, process in enumerate(self._processes):
            if not process.is_alive():
                return f"rank {rank} ended with exit code {process.exitcode}"
        return None

"""An engine without Ray: its ranks are processes of this machine, or this process itself.

LLM        this process: Engine ── executor ──> ranks
a server   this process: LinkClient ── link ──> engine process: Engine ── executor ──> ranks
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from paceline.parallel.launch import free_port, solo_mesh, spawn
from paceline.parallel.rank import RankSpec
from paceline.runtime.channel import PlanSender, RankAddresses
from paceline.runtime.config import EngineConfig
from paceline.runtime.engine import Engine
from paceline.runtime.engine_loop import run_engine
from paceline.runtime.errors import (
    DeadlineError,
    EngineError,
    PacelineError,
    PlacementError,
    UserError,
)
from paceline.runtime.executor import ChannelExecutor
from paceline.runtime.link import LinkAddress, LinkClient, LinkServer
from paceline.runtime.preflight import Facts
from paceline.runtime.rank import local_rank
from paceline.runtime.schedule.scheduler import make_scheduler
from paceline.runtime.transfer.control import KvControl
from paceline.runtime.types import StepPlan, StepResult
from paceline.runtime.worker import Worker

LOCALHOST = "127.0.0.1"
GRACE_S = 5.0
"""What processes get to end by themselves."""
STOP_EVERY_S = 0.1
"""How soon a start under way notices that it is not wanted any more."""


def local_engine(config: EngineConfig, facts: Facts) -> Engine:
    """One rank runs here, several as local processes. Raises PlacementError for more ranks than
    devices."""
    return _engine(config, max_model_len=facts.max_model_len)


def connect(
    config: EngineConfig, facts: Facts, *, stop: threading.Event | None = None
) -> LinkClient:
    """The same engine in a process of its own, loaded and ready. `stop`, set from another thread, gives
    the start up: raises EngineError."""
    folder = tempfile.TemporaryDirectory(prefix="paceline-")
    ours, theirs = multiprocessing.Pipe()
    args = (config, facts.max_model_len, folder.name, theirs)
    (process,) = spawn(_engine_process, args=[args], daemon=False)
    theirs.close()

    def close() -> None:
        atexit.unregister(close)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGTERM)
        _end([process])
        folder.cleanup()

    atexit.register(
        close
    )  # else a parent that forgets to close waits for its child at exit, for ever
    try:
        deadline = time.monotonic() + config.load_timeout_s + GRACE_S
        while not ours.poll(STOP_EVERY_S):
            if stop is not None and stop.is_set():
                raise EngineError("the engine was told to stop while it started")
            if time.monotonic() >= deadline:
                raise DeadlineError(f"waited {config.load_timeout_s:.0f} s for the engine to load")
        address_given, error, user_error = ours.recv()
    except (EOFError, PacelineError) as failure:
        close()
        if isinstance(failure, PacelineError):
            raise
        raise EngineError(f"the engine ended with exit code {process.exitcode}") from None
    except BaseException:
        close()
        raise
    if error is not None:
        close()
        raise (UserError if user_error else EngineError)(error)
    return LinkClient(
        LinkAddress(commands=address_given[0], news=address_given[1]),
        watch=lambda: (
            None if process.is_alive() else f"the engine ended with exit code {process.exitcode}"
        ),
        on_close=close,
    )


def _engine_process(
    config: EngineConfig, max_model_len: int, folder: str, ready: Connection
) -> None:
    """Load, say so, serve until told to stop or the parent is gone. All its files lie in `folder`,
    which the parent takes away, however this process ends."""
    parent, stopped = os.getppid(), False
    tempfile.tempdir = folder

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a start that is given up ends its ranks
    if config.cpu_threads is not None or "OMP_NUM_THREADS" not in os.environ:
        import torch

        # one core is the frontend's: threads that wait for one another wait longest where they
        # outnumber the cores
        torch.set_num_threads(config.cpu_threads or max(1, (os.cpu_count() or 1) - 1))
    try:
        engine = _engine(config, max_model_len=max_model_len)
    except Exception as error:  # whatever it is, the parent must hear of it rather than wait
        known = isinstance(error, PacelineError)
        words = str(error) if known else f"{type(error).__name__}: {error}"
        ready.send((None, words, isinstance(error, UserError)))
        return
    signal.signal(signal.SIGTERM, stop)
    link = LinkServer(f"ipc://{folder}/commands", f"ipc://{folder}/news")
    ready.send(((link.address.commands, link.address.news), None, False))
    ready.close()
    run_engine(engine, link, wanted=lambda: not stopped and os.getppid() == parent)


def _engine(config: EngineConfig, *, max_model_len: int) -> Engine:
    device, count = local_devices(config.device)
    if config.world_size > count:
        raise PlacementError(
            f"{config.world_size} ranks need {config.world_size} {device} devices, this machine has {count}; lower "
            "tensor_parallel_size or draft_tensor_parallel_size"
        )
    executor: InProcess | LocalProcesses
    links = None
    if config.kv_transfer_config is not None:
        links = KvControl(f"tcp://{LOCALHOST}:*", num_ranks=config.world_size)
    address = None if links is None else links.address
    if config.world_size == 1 and config.distributed_executor_backend != "mp":
        executor = InProcess(Worker(config, solo_mesh(device)), links=address)
    else:
        executor = LocalProcesses(config, device=device, links=address)
    try:
        if links is not None:
            links.wait_ready(timeout_s=config.load_timeout_s, check=executor.check)
    except BaseException:
        executor.close()
        raise
    scheduler = make_scheduler(config, max_model_len=max_model_len, num_blocks=executor.num_blocks)
    return Engine(scheduler, executor, ranks=executor.ranks, links=links)


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

    def __init__(self, worker: Worker, *, links: str | None = None) -> None:
        """`links` is where its KV link finds the engine loop, if it shall have one."""
        self._worker = worker
        self.num_blocks, self.ranks = worker.num_blocks, (worker.facts(),)
        if links is not None:
            worker.connect(control=links, host=LOCALHOST)

    def step(self, plan: StepPlan) -> StepResult:
        return self._worker.step(plan)

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._worker.close()


class LocalProcesses:
    """Satisfies `Executor` with one process per rank, which end with this one."""

    def __init__(self, config: EngineConfig, *, device: str, links: str | None = None) -> None:
        """`links` is where KV links find the engine loop, if there shall be any."""
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
                num_threads=config.cpu_threads,
                timeout_s=config.load_timeout_s,
            )
            for rank in range(size)
        ]
        addresses = RankAddresses(plans=self._channel.address, links=links)
        try:
            self._processes = spawn(local_rank, args=[(config, spec, addresses) for spec in specs])
            ready = self._channel.wait_for_ranks(timeout_s=config.load_timeout_s)
            self.ranks, self.num_blocks = ready.ranks, ready.num_blocks
        except BaseException:
            for process in self._processes:  # while it loads a rank does not hear that it shall end
                process.kill()
            self.close()
            raise

    def step(self, plan: StepPlan) -> StepResult:
        return self._executor.step(plan)

    def check(self) -> None:
        self._executor.check()

    def close(self) -> None:
        """Ends every process: asked first, then killed."""
        self._channel.close()
        _end(self._processes)
        with contextlib.suppress(FileNotFoundError):
            self._folder.cleanup()

    def _dead(self) -> str | None:
        for rank, process in enumerate(self._processes):
            if not process.is_alive():
                return f"rank {rank} ended with exit code {process.exitcode}"
        return None


def _end(processes: list[BaseProcess]) -> None:
    """Wait a little for processes that were told to end, and kill those that do not."""
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join(GRACE_S)

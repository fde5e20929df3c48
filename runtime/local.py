"""An engine without Ray: its ranks are processes of this machine, or this process itself.

LLM        this process: Engine ── executor ──> ranks
a server   this process: LinkClient ── link ──> engine process: Engine ── executor ──> ranks
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from paceline.parallel.launch import free_port, solo_mesh, spawn
from paceline.parallel.leftovers import sweep
from paceline.parallel.rank import RankSpec
from paceline.runtime import logs, stacks
from paceline.runtime.ahead.channel import OrderSender
from paceline.runtime.ahead.group import DraftGroup, shared_cores
from paceline.runtime.ahead.thread import DraftThread
from paceline.runtime.channel import PlanSender, RankAddresses, RankSender
from paceline.runtime.config import EngineConfig
from paceline.runtime.engine import Engine, make_engine
from paceline.runtime.engine_loop import run_engine
from paceline.runtime.errors import (
    DeadlineError,
    EngineError,
    PacelineError,
    PlacementError,
    UserError,
)
from paceline.runtime.executor import ChannelExecutor
from paceline.runtime.link import LinkAddress, LinkClient, LinkServer, Patience
from paceline.runtime.loading import load
from paceline.runtime.orphans import end_with_parent
from paceline.runtime.pipeline import Pipeline
from paceline.runtime.preflight import Facts
from paceline.runtime.rank import ORPHAN_S, failed_step, local_rank, ran_out_of_memory
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

    pid, ended = process.pid or 0, ""

    def gone() -> str | None:
        if ended or process.is_alive():
            return ended or None
        return f"the engine ended with exit code {process.exitcode}"

    def close() -> None:
        nonlocal ended
        atexit.unregister(close)
        if ended:
            return
        if process.is_alive():
            os.kill(pid, signal.SIGTERM)
        process.join(GRACE_S)
        ended = gone() or "the engine is closed"
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
        raise EngineError(ended) from None
    except BaseException:
        close()
        raise
    if error is not None:
        close()
        raise (UserError if user_error else EngineError)(error)
    return LinkClient(
        LinkAddress(commands=address_given[0], news=address_given[1]),
        watch=gone,
        on_close=close,
        patience=Patience(
            step_s=config.step_timeout_s,
            restart_s=config.load_timeout_s,
            stacks=lambda: stacks.take(pid),
        ),
    )


def _engine_process(
    config: EngineConfig, max_model_len: int, folder: str, ready: Connection
) -> None:
    """Load, say so, serve until told to stop or the parent is gone. All its files lie in `folder`,
    which the parent takes away, however this process ends, or this one if the parent is gone."""
    parent, stopped = os.getppid(), False
    tempfile.tempdir = folder
    end_with_parent(grace_s=ORPHAN_S, first=lambda: shutil.rmtree(folder, ignore_errors=True))

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    logs.configure(config, role=logs.engine_role(config, "coordinator"))
    stacks.allow()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a start that is given up ends its ranks
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        # of more than two cores one is the frontend's: threads that wait for one another wait
        # longest where they outnumber the cores
        cores = os.cpu_count() or 1
        torch.set_num_threads(max(min(2, cores), cores - 1))
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
    if os.getppid() != parent:  # which can take its folder away no more
        shutil.rmtree(folder, ignore_errors=True)


def _engine(config: EngineConfig, *, max_model_len: int) -> Engine:
    device, count = local_devices(config.device)
    if device == "cpu" and config.cpu_threads is not None:
        import torch

        torch.set_num_threads(config.cpu_threads)
    if config.distributed_executor_backend == "uni" and config.drafts_ahead:
        return _threads(config, device=device, max_model_len=max_model_len)
    if config.num_ranks > count:
        raise PlacementError(
            f"{config.num_ranks} ranks need {config.num_ranks} {device} devices, this machine has {count}; lower "
            f"tensor_parallel_size or {'draft_ranks' if config.drafts_ahead else 'draft_tensor_parallel_size'}"
        )
    links = None
    if config.kv_transfer_config is not None:
        links = KvControl(f"tcp://{LOCALHOST}:*", num_ranks=config.world_size)
    address = None if links is None else links.address
    if config.num_ranks == 1 and config.distributed_executor_backend != "mp":
        alone = InProcess(lambda: Worker(config, solo_mesh(device)), links=address)
        return make_engine(config, alone, links, max_model_len)
    ahead = None
    if config.drafts_ahead:
        ahead = DraftGroup(
            lambda: LocalDraftRanks(config, device=device),
            load_timeout_s=config.load_timeout_s,
            step_timeout_s=config.step_timeout_s,
        )
    try:
        executor = ChannelExecutor(
            lambda: LocalRanks(config, device=device, links=address),
            load_timeout_s=config.load_timeout_s,
            step_timeout_s=config.step_timeout_s,
        )
    except BaseException:
        if ahead is not None:
            ahead.close()
        raise
    return make_engine(config, executor, links, max_model_len, ahead=ahead)


def _threads(config: EngineConfig, *, device: str, max_model_len: int) -> Engine:
    """The target in this thread and a drafter that is ahead in another, on one device."""
    mesh = solo_mesh(device)
    loaded = load(config, mesh)
    alone = dataclasses.replace(loaded, draft_model=None)
    executor = InProcess(lambda: Worker(config, mesh, loaded=alone))
    ahead = DraftGroup(
        lambda: DraftThread(config, mesh, loaded),
        load_timeout_s=config.load_timeout_s,
        step_timeout_s=config.step_timeout_s,
    )
    return make_engine(config, executor, None, max_model_len, ahead=ahead)


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

    apart = False
    on_gpu = False

    def __init__(self, make: Callable[[], Worker], *, links: str | None = None) -> None:
        """`make` loads the worker, again where memory ran out. `links` is where its KV link finds the
        engine loop, if it shall have one."""
        self._make, self._links = make, links
        self._worker: Worker | None = None
        self._pipeline: Pipeline | None = None
        """Where plans are interleaved; else each is carried out when its result is wanted."""
        self._sent: deque[tuple[StepPlan, Future[StepResult] | None]] = deque()
        self.num_blocks = 0
        self.ranks: tuple[str, ...] = ()
        self.start_ranks()

    def send(self, plan: StepPlan) -> None:
        pipeline = None if plan.alone else self._pipeline
        self._sent.append((plan, None if pipeline is None else pipeline.send(plan)))

    def receive(self) -> StepResult:
        worker = self._worker
        assert worker is not None, "expected start_ranks() first"
        plan, result = self._sent.popleft()
        try:
            if result is None:
                return (worker.step if self._pipeline is None else self._pipeline.carry_out)(plan)
            return result.result(worker.config.step_timeout_s)
        except Exception as error:
            if worker.mesh.world.size > 1 or not ran_out_of_memory(error):
                raise
            return failed_step(plan, error)

    def check(self) -> None:
        pass

    def end_ranks(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
        if self._worker is not None:
            self._worker.close()
        self._worker = self._pipeline = None
        self._sent.clear()

    def start_ranks(self) -> None:
        worker = self._worker = self._make()
        self.num_blocks, self.ranks = worker.num_blocks, (worker.facts(),)
        if worker.config.interleaved:
            self._pipeline = Pipeline(worker)
        if self._links is not None:
            worker.connect(control=self._links, host=LOCALHOST)

    def close(self) -> None:
        self.end_ranks()


class _Processes:
    """Ranks in processes of this machine, which end with this one."""

    channel: RankSender

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-")
        self._processes: list[BaseProcess] = []

    def stacks(self) -> list[str]:
        return [stacks.take(process.pid or 0) for process in self._processes]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        self.close()

    def close(self) -> None:
        """Ends every process: asked first, then killed."""
        self.channel.close()
        _end(self._processes)
        self._processes = []
        sweep()
        with contextlib.suppress(FileNotFoundError):
            self._folder.cleanup()

    def _dead(self) -> str | None:
        for rank, process in enumerate(self._processes):
            if not process.is_alive():
                return f"rank {rank} ended with exit code {process.exitcode}"
        return None


class LocalRanks(_Processes):
    """Satisfies `Ranks`."""

    channel: PlanSender

    def __init__(self, config: EngineConfig, *, device: str, links: str | None = None) -> None:
        """`links` is where KV links find the engine loop, if there shall be any."""
        super().__init__()
        size = config.world_size
        self.channel = PlanSender(
            f"ipc://{self._folder.name}/plans", num_ranks=size, watch=self._dead
        )
        specs = _specs(
            config, config.tensor_parallel_size, config.shared_draft_size, device=device, first=0
        )
        addresses = RankAddresses(plans=self.channel.address, links=links)
        self._processes = spawn(local_rank, args=[(config, spec, addresses) for spec in specs])


class LocalDraftRanks(_Processes):
    """Satisfies `DraftRanks`: on the devices after those of the other world."""

    channel: OrderSender

    def __init__(self, config: EngineConfig, *, device: str) -> None:
        super().__init__()
        size = config.draft_size
        self.channel = OrderSender(
            f"ipc://{self._folder.name}/orders", num_ranks=size, watch=self._dead
        )
        specs = _specs(config, 0, size, device=device, first=config.world_size)
        addresses = RankAddresses(plans=self.channel.address, drafts=True)
        self._processes = spawn(local_rank, args=[(config, spec, addresses) for spec in specs])


def _specs(
    config: EngineConfig, target_size: int, draft_size: int, *, device: str, first: int
) -> list[RankSpec]:
    """The ranks of one world, whose devices begin with the `first`."""
    size, port = max(target_size, draft_size), free_port()
    num_threads, shared_memory = shared_cores(config)
    return [
        RankSpec(
            rank=rank,
            local_rank=rank,
            local_size=size,
            target_size=target_size,
            draft_size=draft_size,
            master_port=port,
            device=device,
            device_index=first + rank,
            interleaved=config.interleaved,
            shared_memory=shared_memory,
            num_threads=num_threads,
            timeout_s=config.load_timeout_s,
        )
        for rank in range(size)
    ]


def _end(processes: list[BaseProcess]) -> None:
    """Wait a little for processes that were told to end, and kill those that do not."""
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join(GRACE_S)
        if not process.is_alive():
            process.close()  # its pipes, now: who watches it still refers to it

"""The life of one rank, the same in a Ray actor and in a local process: meet, load, work, leave."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch

from paceline.parallel.launch import join, leave
from paceline.parallel.leftovers import sweep
from paceline.parallel.rank import RankSpec
from paceline.runtime import logs, stacks
from paceline.runtime.ahead.rank import run_draft_rank
from paceline.runtime.channel import PlanReceiver, RankAddresses
from paceline.runtime.config import EngineConfig
from paceline.runtime.orphans import end_with_parent
from paceline.runtime.pipeline import Pipeline
from paceline.runtime.types import StepPlan, StepResult
from paceline.runtime.worker import Worker

logger = logging.getLogger(__name__)

ORPHAN_S = 5.0
"""What a process gets to end by itself once that which started it is gone."""


def run_rank(
    config: EngineConfig,
    spec: RankSpec,
    addresses: RankAddresses,
    *,
    host: str = "127.0.0.1",
    alive: Callable[[], bool] = lambda: True,
) -> None:
    """Serve plans until told to stop or `alive` is false. Failures are told to the coordinator.
    `host` is where other engines reach this rank's KV link."""
    stacks.allow()
    sweep()
    if addresses.drafts:
        run_draft_rank(config, spec, addresses.plans, alive=alive)
        return
    channel = PlanReceiver(addresses.plans, rank=spec.rank)
    worker = pipeline = None
    try:
        try:
            worker = Worker(config, join(spec))
            if addresses.links is not None:
                worker.connect(control=addresses.links, host=host)
        except (
            Exception
        ) as error:  # whatever it is, the coordinator must hear of it rather than wait
            logger.debug("rank %d cannot load", spec.rank, exc_info=True)
            channel.failed(error)
            return
        pipeline = Pipeline(worker) if config.interleaved else None
        failed = threading.Event()
        on_gpu = worker.mesh.device.type == "cuda"
        channel.ready(worker.facts(), num_blocks=worker.num_blocks, on_gpu=on_gpu)
        while (plan := channel.receive(alive=lambda: alive() and not failed.is_set())) is not None:
            if pipeline is None:
                carried_out = _at_once(worker.step, plan)
            elif plan.alone:
                carried_out = _at_once(pipeline.carry_out, plan)
            else:
                carried_out = pipeline.send(plan)
            carried_out.add_done_callback(partial(_answer, channel, spec.rank, plan, failed))
            if failed.is_set():
                return
    finally:
        if pipeline is not None:
            pipeline.close()
        if worker is not None:
            worker.close()
        channel.close()
        leave()


def _at_once(step: Callable[[StepPlan], StepResult], plan: StepPlan) -> Future[StepResult]:
    """The result of a plan, once it is carried out."""
    done: Future[StepResult] = Future()
    try:
        done.set_result(step(plan))
    except Exception as error:
        done.set_exception(error)
    return done


def _answer(
    channel: PlanReceiver,
    rank: int,
    plan: StepPlan,
    failed: threading.Event,
    done: Future[StepResult],
) -> None:
    """Say what became of a plan. Of those after one that failed nobody wants to know."""
    if failed.is_set() or done.cancelled():
        return
    error = done.exception()
    if error is not None:
        logger.error("rank %d failed in step %d", rank, plan.step, exc_info=error)
        failed.set()
        channel.answer(failed_step(plan, error))
    elif rank == 0:
        channel.answer(done.result())


def failed_step(plan: StepPlan, error: BaseException) -> StepResult:
    """What a rank says of a step it could not do."""
    return StepResult(
        step=plan.step,
        error=f"{type(error).__name__}: {error}",
        out_of_memory=ran_out_of_memory(error),
    )


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a step failed for want of the device's or the host's memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def rank_name(spec: RankSpec, addresses: RankAddresses) -> str:
    """For logs: ranks of a drafter that is ahead are counted by themselves."""
    return f"draft rank {spec.rank}" if addresses.drafts else f"rank {spec.rank}"


def local_rank(config: EngineConfig, spec: RankSpec, addresses: RankAddresses) -> None:
    """A rank in a process of its own, which ends when its parent does."""
    end_with_parent(grace_s=ORPHAN_S)
    logs.configure(config, role=logs.engine_role(config, rank_name(spec, addresses)))
    parent = os.getppid()
    run_rank(config, spec, addresses, alive=lambda: os.getppid() == parent)

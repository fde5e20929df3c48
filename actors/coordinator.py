"""The engine loop in a Ray actor. It holds no tensors and no device, so it outlives a dead shard.

client ──submit──> [inbox] ──> engine thread: Engine.step, again and again ──> [outbox] ──poll──> client
                                    │ channel
                                    v
                               shard 0 .. shard n-1
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time

import msgspec
import ray

from paceline.actors import handles
from paceline.parallel.rank import RankSpec
from paceline.runtime.channel import PlanSender
from paceline.runtime.config import EngineConfig
from paceline.runtime.engine import Engine, make_scheduler
from paceline.runtime.errors import EngineError, PacelineError, UserError
from paceline.runtime.executor import ChannelExecutor
from paceline.runtime.types import Request, TokenDelta

logger = logging.getLogger(__name__)

BATCH_S = 0.1
"""Deltas are handed over at most this often, ends of requests at once. Every Ray call takes about a
millisecond of processor time from somebody, and on a host without cores to spare that somebody is a
rank, for which all the others then wait."""


class Coordinator:
    """One per engine. Its methods run in Ray's threads, the engine in one of its own."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inbox: list[Request] = []
        self._aborts: list[str] = []
        self._outbox: list[TokenDelta] = []
        self._error: str | None = None
        self._closing = False
        self._last_poll_s = 0.0
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def where(self) -> str:
        """The address of its node."""
        return str(ray.util.get_node_ip_address())

    def start(
        self,
        config: EngineConfig,
        max_model_len: int,
        shards: list[handles.ShardHandle],
        specs: list[RankSpec],
        *,
        one_node: bool,
    ) -> tuple[list[str], str | None, bool]:
        """Set the shards to work and wait until all are loaded: their facts, or an error and
        whether it is the user's."""
        if one_node:
            self._folder = tempfile.TemporaryDirectory(prefix="paceline-")
            address = f"ipc://{self._folder.name}/plans"
        else:
            address = f"tcp://{self.where()}:*"
        runs: list[handles.Ref] = []
        channel = PlanSender(address, num_ranks=len(shards), watch=lambda: handles.first_dead(runs))
        for shard, spec in zip(shards, specs, strict=True):
            runs.append(handles.run_shard(shard, config, spec, channel.address))
        try:
            facts = channel.wait_for_ranks(timeout_s=config.load_timeout_s)
        except PacelineError as error:
            channel.close()
            return [], str(error), isinstance(error, UserError)
        executor = ChannelExecutor(channel, step_timeout_s=config.step_timeout_s)
        self._engine = Engine(make_scheduler(config, max_model_len=max_model_len), executor)
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()
        return facts, None, False

    def submit(self, requests: bytes) -> None:
        """Queue requests, MessagePack."""
        with self._changed:
            self._inbox += msgspec.msgpack.decode(requests, type=list[Request])
            self._changed.notify_all()

    def abort(self, request_ids: list[str]) -> None:
        with self._changed:
            self._aborts += request_ids
            self._changed.notify_all()

    def poll(self, wait_s: float) -> tuple[bytes, str | None]:
        """Deltas since the last call as MessagePack, waiting up to `wait_s` for some; and why there
        will be no more."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while not (self._outbox or self._error):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            pause = self._last_poll_s + BATCH_S - time.monotonic()
            if pause > 0:
                self._changed.wait_for(self._urgent, pause)
            deltas, self._outbox = self._outbox, []
            self._last_poll_s = time.monotonic()
            return msgspec.msgpack.encode(deltas), self._error

    def _urgent(self) -> bool:
        """Whether somebody waits for more than the next few tokens."""
        return self._error is not None or any(delta.finish_reason for delta in self._outbox)

    def close(self) -> None:
        """Stop the loop and tell the shards to end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        if self._folder is not None:
            self._folder.cleanup()

    def _loop(self) -> None:
        engine = self._engine
        assert engine is not None, "expected start() before the loop"
        try:
            while True:
                with self._changed:
                    while not (
                        self._inbox or self._aborts or engine.scheduler.has_work or self._closing
                    ):
                        self._changed.wait(1.0)
                    if self._closing:
                        break
                    requests, self._inbox = self._inbox, []
                    aborts, self._aborts = self._aborts, []
                engine.submit(requests)
                engine.abort(aborts)
                deltas = engine.poll()
                if deltas:
                    with self._changed:
                        first = not self._outbox
                        self._outbox += deltas
                        if first or self._urgent():  # else nobody is waiting
                            self._changed.notify_all()
        except Exception as error:  # whatever it is, clients must hear of it rather than wait
            logger.exception("engine lost")
            known = isinstance(error, EngineError)
            with self._changed:
                self._error = str(error) if known else f"{type(error).__name__}: {error}"
                self._changed.notify_all()
        finally:
            engine.close()

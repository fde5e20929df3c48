"""A rank's side of its KV link: shared memory, the board to mark, and a process to watch.

    Worker.step ──begin, after each layer──> board, eventfd ──> link process
    watcher thread ── dead, or its heartbeat stands still ──> killed and started again

The link maps this rank's pools. They are memfds: nothing in a file system to be left behind.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import mmap
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

import paceline
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import ConfigError
from paceline.runtime.loading import Loaded
from paceline.runtime.models.model import Model
from paceline.runtime.models.weights import find_model
from paceline.runtime.tls import LINK_NAME, link_tls
from paceline.runtime.transfer.board import Board
from paceline.runtime.transfer.describe import describe_pool
from paceline.runtime.transfer.layout import ModelLayout, ModelName, model_fingerprint
from paceline.runtime.transfer.process import LinkSpec, PoolSpec

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 0.25
SILENT_S = 10.0
"""A link whose heartbeat stands still so long is taken for hung."""
START_S = 30.0
"""What a link gets before its first beat."""
GRACE_S = 2.0


class KvLink:
    """Starts a rank's link and marks progress for it. Close it, or it ends with this process."""

    def __init__(
        self,
        config: EngineConfig,
        loaded: Loaded,
        *,
        rank: int,
        control: str,
        host: str,
    ) -> None:
        """`control` is the engine loop's address, `host` ours. Raises ConfigError where pools cannot
        be shared, or this node's certificate is of no use."""
        transfer = config.kv_transfer_config
        assert transfer is not None, "expected kv_transfer_config"
        tls = link_tls(config)
        if tls is not None:
            tls.check_mutual(LINK_NAME)
        if loaded.target is None:
            raise ConfigError(
                "KV transfer needs a part of the target on every rank: draft_tensor_parallel_size "
                "may not exceed tensor_parallel_size"
            )
        held: dict[ModelName, Model] = {"target": loaded.target}
        if loaded.draft_model is not None:
            held["draft"] = loaded.draft_model.model
        described = {name: describe_pool(model, name) for name, model in held.items()}
        layouts = {name: layout for name, (layout, _) in described.items()}
        geometry = {
            "num_slots": transfer.max_transfers,
            "num_layers": layouts["target"].num_layers,
            "num_draft_layers": layouts["draft"].num_layers if "draft" in layouts else 0,
        }
        self._board_fd = os.memfd_create("paceline-board", os.MFD_CLOEXEC)
        size = Board.nbytes(**geometry)
        os.ftruncate(self._board_fd, size)
        self._board = Board(mmap.mmap(self._board_fd, size), **geometry)
        self._board.nonce = secrets.token_bytes(16)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        pools = tuple(
            PoolSpec(
                layout=described[name][0],
                place=described[name][1],
                fd=model.pool.memfd,
                num_bytes=model.pool.mapped_bytes,
            )
            for name, model in held.items()
        )
        self._spec = LinkSpec(
            engine_id=transfer.engine_id or "engine",
            rank=rank,
            num_ranks=config.world_size,
            control=control,
            host=transfer.host or host,
            config=transfer,
            fingerprint=_fingerprint(config, held, layouts),
            pools=pools,
            board_fd=self._board_fd,
            wakeup_fd=self._bell,
            tls=tls,
            **geometry,
        )
        self._closing = threading.Event()
        self._process = self._start()
        self._watcher = threading.Thread(target=self._watch, name="kv-link", daemon=True)
        self._watcher.start()
        atexit.register(self.close)

    def begin(self, slot: int, generation: int) -> None:
        """The slot's marks are from now on those of another request. A cached prefix is not marked
        before its first step: that very step may be writing it, for somebody else."""
        self._board.begin(slot, generation)

    def follow(self, slots: Sequence[int], ends: Sequence[int]) -> Callable[[int], None]:
        """What a pass of the target is to call after each layer that has written these requests' KV
        up to these positions."""
        at, marks = np.array(slots), self._board.marks
        values = np.array(ends, dtype=np.int64)

        def written(layer: int) -> None:
            marks[at, layer] = values
            self._ring()

        return written

    def drafted(self, slot: int, num_exact: int) -> None:
        """The drafter's KV of a request is exact up to there."""
        self._board.draft_marks[slot] = num_exact
        self._ring()

    def close(self) -> None:
        """End the link. Safe to call twice."""
        self._closing.set()
        atexit.unregister(self.close)
        _end(self._process)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it rings already
            os.eventfd_write(self._bell, 1)

    def _start(self) -> subprocess.Popen[bytes]:
        fds = (self._board_fd, self._bell, *(pool.fd for pool in self._spec.pools))
        # wherever this package was found, the link finds it too
        home = str(Path(paceline.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [sys.executable, "-m", "paceline.runtime.transfer.process"],
            stdin=subprocess.PIPE,
            pass_fds=fds,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the watcher will see that it is dead
            process.stdin.write(msgspec.json.encode(self._spec))
            process.stdin.close()
        return process

    def _watch(self) -> None:
        """Start a new link whenever this one dies or hangs."""
        beat, seen_s, patience_s = self._board.heartbeat, time.monotonic(), START_S
        while not self._closing.wait(WATCH_EVERY_S):
            now_s = time.monotonic()
            if self._board.heartbeat != beat:
                beat, seen_s, patience_s = self._board.heartbeat, now_s, SILENT_S
            ended = self._process.poll()
            if ended is None and now_s - seen_s < patience_s:
                continue
            why = f"ended with exit code {ended}" if ended is not None else "hangs"
            logger.warning("the KV link of rank %d %s: another is started", self._spec.rank, why)
            self._process.kill()
            self._process.wait()
            if self._closing.is_set():
                return
            self._process = self._start()
            beat, seen_s, patience_s = self._board.heartbeat, time.monotonic(), START_S


def _fingerprint(
    config: EngineConfig, held: dict[ModelName, Model], layouts: dict[ModelName, ModelLayout]
) -> dict[str, str]:
    """What must be equal on both sides; of the drafter under names that begin with `draft.`."""
    facts: dict[str, str] = {}
    for name, model in held.items():
        spec = config.speculative_config
        draft = name == "draft"
        folder = find_model(spec.model if draft and spec is not None else config.model)
        facts |= model_fingerprint(
            folder,
            config=json.loads((folder / "config.json").read_text()),
            kv_dtype=layouts[name].dtype,
            dtype=str(model.decoder.groups[0].dtype).removeprefix("torch."),
            draft=draft,
        )
    return facts


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

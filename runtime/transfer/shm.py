"""Pools of another process on this host, read in place.

    producer   memfds of board and pools ── pid, fds, nonce, in its Describe answer ──> consumer
    consumer   /proc/PID/fd/N, mapped read-only, if the nonce on the board is the one that was told

Whoever can open those files may read the process's memory anyway. Where they cannot be opened, as
in another container or as another user, pages go over gRPC.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime.transfer.board import Board
from paceline.runtime.transfer.layout import ModelLayout, ModelName
from paceline.runtime.transfer.pages import Pages
from paceline.runtime.transfer.wire import model_name, place_from_pb, pool_to_pb

if TYPE_CHECKING:
    from paceline.runtime.transfer.process import LinkSpec

NONCE_BYTES = 16


def host_boot_id() -> str:
    """Of the running kernel; empty where there is none to be had."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def advertise(spec: LinkSpec, nonce: bytes) -> pb.SharedMemory | None:
    """What this process tells others on its host; None where there is nothing to go by."""
    boot_id = host_boot_id()
    sizes = {pool.place.block_size for pool in spec.pools}
    if not boot_id or len(sizes) > 1:  # one table of pages serves both models
        return None
    return pb.SharedMemory(
        host_boot_id=boot_id,
        pid=os.getpid(),
        board_fd=spec.board_fd,
        num_slots=spec.num_slots,
        num_layers=spec.num_layers,
        num_draft_layers=spec.num_draft_layers,
        nonce=nonce,
        pools=[
            pool_to_pb(pool.layout.name, pool.place, fd=pool.fd, num_bytes=pool.num_bytes)
            for pool in spec.pools
        ],
    )


class SharedPools:
    """Another process's pools and board, mapped here until it is closed: whoever keeps a pool or the
    board beside it keeps the memory too, which its owner may have left to this process alone."""

    def __init__(self, told: pb.SharedMemory, layouts: dict[ModelName, ModelLayout]) -> None:
        """Raises OSError or ValueError where they are out of reach or not the ones that are meant."""
        if not told.host_boot_id or told.host_boot_id != host_boot_id():
            raise ValueError("another host")
        if len(told.nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce of {len(told.nonce)} bytes")
        sizes = (told.num_slots, told.num_layers, told.num_draft_layers)
        if max(sizes) >= 1 << 16:
            raise ValueError(f"a board of {sizes}")
        self.process = os.pidfd_open(told.pid)
        """Readable once that process has ended: nobody gives its memory back while it is mapped here."""
        self.is_closed = False
        self.pools: dict[ModelName, Pages] = {}
        """Empty once it is closed."""
        self._board: Board | None = None
        try:
            geometry = dict(
                zip(("num_slots", "num_layers", "num_draft_layers"), sizes, strict=True)
            )
            board = self._map(told.pid, told.board_fd, Board.nbytes(**geometry))
            self._board = Board(board, **geometry)
            if self._board.nonce != told.nonce:
                raise ValueError("another process's memory under that number")
            for pool in told.pools:
                name = model_name(pool.model)
                memory = self._map(told.pid, pool.fd, pool.num_bytes)
                self.pools[name] = Pages(memory, layouts[name], place_from_pb(pool))
        except KeyError as error:
            self.close()
            raise ValueError(f"a pool of {error}, of which no layout was told") from None
        except BaseException:
            self.close()
            raise

    def marks(self, slot: int, generation: int, *, draft: bool) -> NDArray[np.int64] | None:
        """As `Board.read`."""
        if self._board is None:
            return None
        return self._board.read(slot, generation, draft=draft)

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        if self.is_closed:
            return
        self.is_closed = True
        os.close(self.process)
        self.pools, self._board = {}, None

    @staticmethod
    def _map(pid: int, fd: int, num_bytes: int) -> mmap.mmap:
        file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(file).st_size < num_bytes:
                raise ValueError(f"a file shorter than {num_bytes} bytes")
            return mmap.mmap(file, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(file)

"""Memory that the ranks of an axis have in common, on one host.

Nobody sees it by name once all have mapped it, so that nothing outlives the ranks.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import secrets
from pathlib import Path

import torch

from paceline.parallel.mesh import Axis

logger = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
_WORDS = 3  # of 20 bits, which float32 carries exactly


class Region:
    """Bytes, mapped as long as somebody has this."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._mapping = (ctypes.c_char * num_bytes).from_buffer(mmap.mmap(fd, num_bytes))
        self.address = ctypes.addressof(self._mapping)


def share(axis: Axis, num_bytes: int) -> Region | None:
    """`num_bytes` zeros that every rank of the axis has mapped; None on all of them where any cannot, as
    on another host, or in a container of its own. Collective."""
    if not axis.one_host:
        return None
    words = torch.tensor([secrets.randbits(20) for _ in range(_WORDS)], dtype=torch.int64)
    words = axis.collectives.broadcast_(words)
    path = FOLDER / ("paceline-" + "".join(f"{word:05x}" for word in words.tolist()))
    made = _made(path, num_bytes) if axis.index == 0 else None
    _all(axis, made is not None or axis.index != 0)
    try:
        fd = made if made is not None else _opened(path)
        everybody = _all(axis, fd is not None)
    finally:
        if made is not None:
            path.unlink(missing_ok=True)
    if fd is None:
        return None
    try:
        return Region(fd, num_bytes) if everybody else None
    finally:
        os.close(fd)


def _all(axis: Axis, mine: bool) -> bool:
    """Whether it is so on every rank, known once all have come."""
    count = axis.collectives.all_reduce_(torch.tensor([float(mine)]))
    return int(count.item()) == axis.size


def _made(path: Path, num_bytes: int) -> int | None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        logger.warning("ranks cannot share memory (%s): they add up more slowly", error)
        return None
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        logger.warning("ranks cannot share memory (%s): they add up more slowly", error)
        path.unlink(missing_ok=True)
        os.close(fd)
        return None
    return fd


def _opened(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None

"""What ranks say to each other while a step runs.

Three verbs are enough: sum partial results (`all_reduce_`), collect one row per rank
(`all_gather`), and tell everybody what rank 0 decided (`broadcast_`). Beside `launch`, the only
module that imports torch.distributed.

Paths, fastest first on one CPU host: DeepSpeed's shared-memory all-reduce (microseconds; sums only,
so the other two verbs are sums over slots that one rank fills and the others leave zero), Gloo. On
GPUs: NCCL. Passes of few rows on a CPU add up without coming back here, in memory of their own
(`region.py`, `runtime/layers/cpu_team.h`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

BUILD_TIMEOUT_S = 300.0


class Collectives(Protocol):
    """All ranks of an axis call the same verb with the same shapes; every call blocks until the
    result is there."""

    name: str

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place. Floating types only."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`[...]` on every rank to `[ranks, ...]` on every rank. float32 only."""

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Rank 0's values on every rank, in place. int64 or float32; ints below 2**24."""


class Alone:
    """One rank: nothing to say."""

    name = "none"

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        return tensor


class ProcessGroup:
    """NCCL or Gloo through torch.distributed."""

    def __init__(self, group: dist.ProcessGroup, *, size: int) -> None:
        self.name = str(dist.get_backend(group))
        self._group = group
        self._size = size

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        out = tensor.new_empty((self._size, *tensor.shape))  # [ranks, ...]
        dist.all_gather(list(out.unbind(0)), tensor.contiguous(), group=self._group)
        return out

    def broadcast_(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, src=0, group=self._group)
        return tensor


class SharedMemory:
    """DeepSpeed's shared-memory all-reduce between the processes of one CPU host.

    Its kernel spins while it waits, and knows no deadline: whoever started the ranks must watch
    them.
    """

    name = "deepspeed-shm"

    def __init__(self, *, rank: int, size: int) -> None:
        self._rank = rank
        self._size = size
        self._sum_ = torch.ops.deepspeed.inference_all_reduce_

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        self._sum_(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        out = tensor.new_zeros((self._size, *tensor.shape))  # [ranks, ...]
        out[self._rank] = tensor
        self._sum_(out)
        return out

    def broadcast_(self, tensor: Tensor) -> Tensor:
        words = tensor.float() if self._rank == 0 else torch.zeros(tensor.shape)
        self._sum_(words)
        return tensor.copy_(words)


def shared_memory(*, rank: int, size: int) -> SharedMemory | None:
    """DeepSpeed's shared-memory path for all ranks of this host, or None, said once, where it
    cannot be had.

    Every rank of the default process group must call this; they agree on the answer. The first call
    on a machine compiles the kernel (a minute, cached under ~/.cache/paceline).
    """
    kernel = _load_kernel(rank)
    ready = torch.tensor([kernel is not None], dtype=torch.int64)
    dist.all_reduce(ready, op=dist.ReduceOp.MIN)
    if kernel is None or not ready.item():
        return None
    kernel.initialize(size, rank)
    dist.barrier()
    _unlink_buffers(rank)
    return SharedMemory(rank=rank, size=size)


def build_kernel() -> bool:
    """Compile DeepSpeed's kernel ahead of the first run. True where it can be used."""
    return _load_kernel(0) is not None


def _load_kernel(rank: int) -> _Kernel | None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        with _one_builder():
            kernel: _Kernel = ShareMemCommBuilder().load(verbose=False)
        if kernel.vector_kernel_level() < 2:
            raise RuntimeError("this processor lacks avx512bw")
        return kernel
    except Exception as error:  # a build can fail in any way: no compiler, no ninja, no space
        if rank == 0:
            logger.warning(
                "no shared-memory all-reduce (%s); using Gloo, which is slower", _first_line(error)
            )
        return None


@contextlib.contextmanager
def _one_builder() -> Iterator[None]:
    """One process of this host at a time builds or loads, in a folder that no other installation uses.

    Left alone, processes wait without end for the lock file of one that was killed. Raises
    TimeoutError.
    """
    installation = (sys.prefix, torch.__version__, importlib.metadata.version("deepspeed"))
    name = hashlib.sha256(repr(installation).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline"
    folder = cache / f"deepspeed-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    with (cache / f"deepspeed-{name}.lock").open("w") as lock:
        _wait_for(lock)  # the kernel lets go of it whatever becomes of its holder
        for stale in folder.rglob("lock"):
            stale.unlink()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        try:
            yield
        finally:
            del os.environ["TORCH_EXTENSIONS_DIR"]
            if before is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = before


def _wait_for(lock: IO[str]) -> None:
    deadline_s = time.monotonic() + BUILD_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise TimeoutError(
                    f"another process has been building it for {BUILD_TIMEOUT_S:.0f} s"
                ) from None
            time.sleep(0.05)
        else:
            return


class _Kernel(Protocol):
    """What DeepSpeed's compiled module offers."""

    def initialize(self, size: int, rank: int) -> None: ...

    def vector_kernel_level(self) -> int: ...


def _unlink_buffers(rank: int) -> None:
    """Remove the buffers' names once every rank has mapped them, so that nothing outlives the
    ranks."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    build_kernel()  # a machine without a compiler is warned, and served by Gloo

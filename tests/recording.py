"""Recording and playing on a CPU what a CUDA graph would record and play on a GPU.

A graph is the operations that a device was given, with the places of their operands, and nothing of
what the host did in between. So here: every operation that torch is given is noted with its operands;
to play is to do them all again, each result into the memory where it was at first. What the host read
or decided while recording is not decided again, and a text would show it.

An operation that hands a number to the host cannot be recorded, there or here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TELLS_HOST = ("_local_scalar_dense", "nonzero", "equal", "unique")


class Recording(TorchDispatchMode):
    """Notes what torch is given while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in TELLS_HOST, f"{name} tells the host something: no graph can"
        made = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(made) if isinstance(each, Tensor)]
        self.calls.append((func, args, kwargs or {}, tensors))
        return made

    def play(self) -> None:
        for func, args, kwargs, before in self.calls:
            made = func(*args, **kwargs)
            now = [each for each in tree_leaves(made) if isinstance(each, Tensor)]
            for old, new in zip(before, now, strict=True):
                if old.data_ptr() != new.data_ptr():  # a view is where it was
                    old.copy_(new)


def record(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A `Recorder` (`runtime/models/graphs.py`)."""
    recording = Recording()
    with recording:
        found = compute()
    found.fill_(torch.nan)  # what was computed while recording is nobody's result
    return recording.play, found

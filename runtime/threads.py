"""The threads of a rank on a CPU.

Passes of small models have a team of their own (`layers/cpu_team.h`), which spins while it waits. So do
torch's threads, for a millisecond after every operation that they shared, and the two would take the
cores from each other. Hence torch computes alone in a step, but for what a library does with many rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MOST_MEMBERS = 16
"""Of a team: with more, those passes are so short that meeting takes longer."""

_own = threading.local()


def team_size() -> int:
    """How many threads, the caller's included, compute a pass of a small model."""
    return min(MOST_MEMBERS, getattr(_own, "size", 0) or torch.get_num_threads())


@contextmanager
def torch_alone() -> Iterator[None]:
    """While torch needs no more than this thread."""
    size = torch.get_num_threads()
    if size == 1:
        yield
        return
    _own.size = size
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(size)
        _own.size = 0


@contextmanager
def torch_together() -> Iterator[None]:
    """Within `torch_alone`, while torch needs all threads there are."""
    size = getattr(_own, "size", 0)
    if size == 0:
        yield
        return
    torch.set_num_threads(size)
    try:
        yield
    finally:
        torch.set_num_threads(1)

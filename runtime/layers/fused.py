"""Small operations that follow one another, as one kernel.

Between two products of a pass of one row a GPU would spend more on a dozen small operations than on
the products: each costs two microseconds even when it is played from a graph. torch's compiler makes
one kernel of a function; here is when: while a pass is recorded (`models/graphs.py`), where the
seconds that it takes are spent once.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Made = TypeVar("Made")


class _Here(threading.local):
    fusing = False


_here = _Here()


@contextmanager
def fusing() -> Iterator[None]:
    """Functions marked as `fused` are compiled while this is entered, by this thread."""
    before, _here.fusing = _here.fusing, True
    try:
        yield
    finally:
        _here.fusing = before


def fused(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Marks a function of tensors alone, without branches on what they hold."""
    # not before it is wanted: torch's compiler takes a second to read
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        return (compiled() if _here.fusing else function)(*args, **kwargs)

    return call

"""The functions of `kernels.cpp`, absent without a compiler. `pages.py` and `codec.py` hold what each
computes in numpy too, many times slower.

Callers have checked every index and length: nothing here does.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

from paceline.runtime.native import LOAD_ERRORS, function, load_library

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class Kernels:
    """The loaded library. Memory is given by its address. While one runs, other threads do too."""

    def __init__(self, library: ctypes.CDLL) -> None:
        moves = (_P, _L, _P, _L, _I, _I, _P)
        codes = (_P, _L, _I, _P)
        self.gather = {n: function(library, f"gather_{n}", moves) for n in (2, 4)}
        """By bytes of an element: (pool, stride, pages, N, U, D, out)."""
        self.scatter = {n: function(library, f"scatter_{n}", moves) for n in (2, 4)}
        """(pool, stride, pages, N, U, D, data)"""
        self.quantise = {
            dtype: function(library, f"quantise_{dtype}", codes, result=ctypes.c_int)
            for dtype in ("bfloat16", "float32")
        }
        """(rows, units, D, out): 0 for what cannot be carried."""
        self.restore = {
            dtype: function(library, f"restore_{dtype}", codes) for dtype in ("bfloat16", "float32")
        }
        """(encoded, units, D, rows)"""


@functools.cache
def load_kernels() -> Kernels | None:
    """Compiled on first use; None, said once, where they cannot be."""
    try:
        return Kernels(load_library(SOURCE))
    except LOAD_ERRORS as error:
        logger.warning("no compiled KV kernels (%s); using numpy, which is slower", error)
        return None


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    load_kernels()

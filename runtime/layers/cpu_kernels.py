"""The kernels of `cpu_kernels.cpp`: built once per machine, loaded with ctypes, absent without a
compiler.

Everything they compute can also be computed with torch alone, several times slower; each caller
holds both forms side by side.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.runtime.native import LOAD_ERRORS, function, library_path, load_library
from paceline.runtime.threads import team_size

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")

LANES = 16
"""Floats of a vector."""

_P, _I, _F, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
_FUNCTIONS = {
    "attend": (
        ("f32_f32_f32", "f32_f32_bf16", "f32_bf16_bf16", "bf16_f32_bf16", "bf16_bf16_bf16"),
        (_P, _P, _P, _L, _L, _L, _I, _I, _I, _F, _P),
    ),
    "add_rms": (("f32_f32", "bf16_bf16", "f32_bf16"), (_P, _P, _I, _I, _F, _P, _P)),
    "swiglu": (("f32", "bf16"), (_P, _I, _I, _P)),
    "move_rows": (("f32", "bf16"), (_P, _L, _L, _L, _I, _I, _I, _P, _P, _I)),
    "pass": (("f32_f32", "bf16_bf16", "bf16_f32"), (_P, _P, _P, _P, _I, _P, _P, _P, _P)),
    "attention": (
        ("f32_f32", "bf16_bf16", "bf16_f32"),
        (_P, _P, _I, _P, _P, _P, _I, _I, _I, _P),
    ),
    "mlp": (("f32_f32", "bf16_bf16", "bf16_f32"), (_P, _P, _I, _P, _P, _P, _I, _I, _P)),
    "choose": (("f32_f32", "bf16_bf16", "bf16_f32"), (_P, _P, _P, _I, _P, _P, _P, _P)),
    "chain": (("f32_f32", "bf16_bf16", "bf16_f32"), (_P, _P, _P, _P)),
    "product": (("f32", "bf16"), (_P, _P, _P, _I, _P)),
}
"""The forms each comes in, by the dtypes it reads and writes, and its arguments."""
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_DTYPES = frozenset(_NAMES)
_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}


class Pass(ctypes.Structure):
    """The C struct of the same name: one packed pass. Whoever fills it keeps the arrays alive."""

    _fields_ = (
        ("num_rows", ctypes.c_int32),
        ("num_segments", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("row_starts", _P),
        ("ends", _P),
        ("sinks", _P),
        ("windows", _P),
        ("tables", _P),
        ("cos", _P),
        ("sin", _P),
        ("sink_cos", _P),
        ("sink_sin", _P),
        ("masks", _P),
        ("tree_starts", _P),
    )


class Team:
    """Threads that wait for work, and end when nobody has them any more."""

    def __init__(self, address: int, size: int, *, end: Callable[[int], None]) -> None:
        self.address, self.size = address, size
        # a process that ends takes them along, wherever they are
        weakref.finalize(self, end, address).atexit = False


class Kernels:
    """The loaded library. Tensors must be contiguous, on the CPU, float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._forms = {
            name: {
                tuple(_BY_NAME[part] for part in form.split("_")): function(
                    library, f"{name}_{form}", signature
                )
                for form in forms
            }
            for name, (forms, signature) in _FUNCTIONS.items()
        }
        self._new_team = function(library, "new_team", (_I,), result=_P)
        self._end_team = function(library, "end_team", (_P,))
        self._teams = threading.local()
        self._attend, self._add_rms, self._swiglu, self._move_rows = (
            self._forms[name] for name in ("attend", "add_rms", "swiglu", "move_rows")
        )

    def form(self, name: str, *dtypes: torch.dtype) -> Callable[..., Any]:
        """The C function for these dtypes. Whoever calls it keeps what it is given alive."""
        return self._forms[name][dtypes]

    def team(self) -> int:
        """Address of the threads that compute with the caller's."""
        size = team_size()
        team = getattr(self._teams, "own", None)
        if team is None or team.size != size:
            team = self._teams.own = Team(self._new_team(size), size, end=self._end_team)
        return team.address

    def attend(
        self,
        given: Pass,
        qkv: Tensor,  # [T, U, G+2, D]
        blocks: Tensor,  # [blocks, I, U, 2*16*D], strided
        *,
        queries: int,
        window: int | None,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Rotate, write keys and values, and attend: `[T, U*G*D]` in `dtype`."""
        num_units = blocks.shape[2]
        context = torch.empty((given.num_rows, num_units * queries * given.head_dim), dtype=dtype)
        self._attend[qkv.dtype, blocks.dtype, dtype](
            ctypes.addressof(given),
            qkv.data_ptr(),
            blocks.data_ptr(),
            blocks.stride(0),
            blocks.stride(1),
            blocks.stride(2),
            num_units,
            queries,
            window or 0,
            scale,
            context.data_ptr(),
        )
        return context

    def add_rms(
        self,
        h_TE: Tensor,
        delta_TE: Tensor | None,
        *,
        eps: float,
        dtype: torch.dtype,
        weight_E: Tensor | None = None,
    ) -> Tensor:
        """Add delta to h in place; h over its root mean square, times the weight if there is one,
        `[T, E]` in `dtype`."""
        out = torch.empty(h_TE.shape, dtype=dtype)
        given = torch.float32 if delta_TE is None else delta_TE.dtype
        rows, width = h_TE.shape
        self._add_rms[given, dtype](
            h_TE.data_ptr(),
            None if delta_TE is None else delta_TE.data_ptr(),
            rows,
            width,
            eps,
            out.data_ptr(),
            None if weight_E is None else weight_E.data_ptr(),
        )
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` for `[..., 2*F]`, gates first."""
        shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        out = torch.empty(shape, dtype=gate_up.dtype)
        self._swiglu[(gate_up.dtype,)](
            gate_up.data_ptr(), out.numel() // shape[-1], shape[-1], out.data_ptr()
        )
        return out

    def move_rows(
        self, blocks: Tensor, *, head_dim: int, block_size: int, source: Tensor, target: Tensor
    ) -> None:
        """Copy keys and values of all units of `blocks` `[blocks, I, U, 2*16*D]` between slots,
        `[moves]` int32 each, block times `block_size` plus place in it; in order."""
        self._move_rows[(blocks.dtype,)](
            blocks.data_ptr(),
            blocks.stride(0),
            blocks.stride(1),
            blocks.stride(2),
            blocks.shape[2],
            head_dim,
            block_size,
            source.data_ptr(),
            target.data_ptr(),
            len(source),
        )


def supports(device: torch.device, *dtypes: torch.dtype, head_dim: int = 16) -> bool:
    """Whether the kernels can do it."""
    return device.type == "cpu" and head_dim <= 256 and _DTYPES.issuperset(dtypes)


@functools.cache
def load_kernels() -> Kernels | None:
    """The kernels, compiled on first use (two seconds); None, said once, where they cannot be."""
    try:
        return Kernels(load_library(SOURCE))
    except LOAD_ERRORS as error:
        logger.warning("no compiled CPU kernels (%s); using torch, which is slower", error)
        return None


def _library_path() -> Path:
    return library_path(SOURCE)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    load_kernels()

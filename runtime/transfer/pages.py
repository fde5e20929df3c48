"""Pages of a rank's pool as the wire has them.

    pool   page of all units of a group  | unit | key [D, 16]  value [16, D]         keys transposed
    wire   page of heads of one layer    | head | key [16, D]  value [16, D]

The heads of a layer lie side by side in the pool, so a page of any range of them is one run there
too. Letters: D head width, N pages, U heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.runtime.errors import EngineError
from paceline.runtime.transfer.kernels import load_kernels
from paceline.runtime.transfer.layout import PAGE, ModelLayout, PoolPlace

if TYPE_CHECKING:
    from typing_extensions import Buffer

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]


class PageError(EngineError):
    """Pages or heads that are not there."""


class _Run(NamedTuple):
    """A layer's heads in every page of the pool."""

    head_start: int
    head_stop: int
    bytes: Bytes
    """`[pages, page_bytes]`, a view with the pool's stride."""


class Pages:
    """One model's pool, in memory that this process can reach."""

    def __init__(
        self, buffer: Buffer, layout: ModelLayout, place: PoolPlace, *, use_kernels: bool = True
    ) -> None:
        """`buffer` is writable where anything is scattered. Raises PageError where it is too small.

        `use_kernels` false computes with numpy alone.
        """
        self.layout = layout
        self.place = place
        if len(place.units) != len(layout.held):
            raise PageError(f"{len(place.units)} places for {len(layout.held)} layers")
        memory = np.frombuffer(memoryview(buffer), dtype=np.uint8)
        unit = layout.page_bytes(1)
        groups = []
        for group in place.groups:
            width = group.num_units * unit
            stop = group.offset_bytes + place.num_pages * width
            if stop > memory.nbytes:
                raise PageError(f"a pool that ends at {stop} in {memory.nbytes} bytes of memory")
            groups.append(memory[group.offset_bytes : stop].reshape(place.num_pages, width))
        self._kernels = load_kernels() if use_kernels else None
        self._runs: dict[int, _Run] = {}
        for held, at in zip(layout.held, place.units, strict=True):
            stop = at.first_unit + held.num_heads
            if at.group >= len(groups) or stop > place.groups[at.group].num_units:
                raise PageError(f"layer {held.layer} beyond its group of units")
            run = groups[at.group][:, at.first_unit * unit : stop * unit]
            self._runs[held.layer] = _Run(held.head_start, held.head_stop, run)

    def gather(
        self, layer: int, head_start: int, head_stop: int, pages: Indices, out: Bytes
    ) -> None:
        """Read pool pages into `out`, `[n, page_bytes]` in wire order."""
        run = self._find(layer, head_start, head_stop, pages, out)
        if self._kernels is not None:
            self._move(self._kernels.gather, run, pages, out)
            return
        stored, sent = self._units(run[pages]), self._units(out)  # [N, U, 2, 16*D]
        sent[:, :, 0] = self._turned(stored[:, :, 0], self.layout.head_dim)
        sent[:, :, 1] = stored[:, :, 1]

    def scatter(
        self, layer: int, head_start: int, head_stop: int, pages: Indices, data: Bytes
    ) -> None:
        """Write `data`, `[n, page_bytes]` in wire order, to pool pages, each named once."""
        run = self._find(layer, head_start, head_stop, pages, data)
        if not run.flags.writeable:
            raise PageError("a pool that may only be read")
        if self._kernels is not None:
            self._move(self._kernels.scatter, run, pages, data)
            return
        sent = self._units(data)  # [N, U, 2, 16*D]
        stored = np.empty_like(sent)
        stored[:, :, 0] = self._turned(sent[:, :, 0], PAGE)
        stored[:, :, 1] = sent[:, :, 1]
        run[pages] = stored.view(np.uint8).reshape(len(pages), -1)

    def _move(
        self, kernels: dict[int, Callable[..., Any]], run: Bytes, pages: Indices, wire: Bytes
    ) -> None:
        itemsize, D = self.layout.itemsize, self.layout.head_dim
        num_heads = run.shape[1] // self.layout.page_bytes(1)
        kernels[itemsize](
            run.ctypes.data,
            run.strides[0] // itemsize,
            pages.ctypes.data,
            len(pages),
            num_heads,
            D,
            wire.ctypes.data,
        )

    def _turned(self, keys: NDArray[Any], rows: int) -> NDArray[Any]:
        """`[N, U, 16*D]` with each `[rows, columns]` transposed."""
        N, U, size = keys.shape
        return keys.reshape(N, U, rows, size // rows).swapaxes(2, 3).reshape(N, U, size)

    def _find(
        self, layer: int, head_start: int, head_stop: int, pages: Indices, data: Bytes
    ) -> Bytes:
        """`[pages, page_bytes]` of some heads of a layer. Raises PageError for what is not here."""
        run = self._runs.get(layer)
        if run is None:
            raise PageError(f"{self.layout.name} layer {layer} is not held here")
        if not run.head_start <= head_start < head_stop <= run.head_stop:
            raise PageError(
                f"heads {head_start} to {head_stop} of {self.layout.name} layer {layer}, of which "
                f"{run.head_start} to {run.head_stop} are held here"
            )
        width = self.layout.page_bytes(head_stop - head_start)
        if data.shape != (len(pages), width):
            raise PageError(f"pages of shape {data.shape} where {(len(pages), width)} was expected")
        if len(pages) and not 0 <= pages.min() <= pages.max() < self.place.num_pages:
            raise PageError(f"a page beyond the {self.place.num_pages} there are")
        for array, dtype in ((data, np.uint8), (pages, np.int64)):
            assert array.dtype == dtype, f"expected {dtype}, found {array.dtype}"
            assert array.flags.c_contiguous, "expected contiguous memory"
        start = (head_start - run.head_start) * self.layout.page_bytes(1)
        return run.bytes[:, start : start + width]

    def _units(self, pages: Bytes) -> NDArray[Any]:
        """`[N, U, 2, 16*D]`: a view of contiguous pages, element by element."""
        width = np.uint16 if self.layout.itemsize == 2 else np.uint32
        return pages.view(width).reshape(len(pages), -1, 2, PAGE * self.layout.head_dim)

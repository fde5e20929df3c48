"""How pages look on the wire: as they are, or with fewer bits.

    none   page                        | head | K V | token | dim                      as stored
    int8   page, of each head          | scale of K, V by token: float32 [2, 16] | int8 [2, 16, D]

Both keep heads apart, so that any range of heads stays contiguous. To add a codec: a class with the
methods of `Codec`, and its line in `CODECS`; its number is for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.runtime.errors import EngineError
from paceline.runtime.transfer.kernels import load_kernels
from paceline.runtime.transfer.layout import PAGE, ModelLayout

if TYPE_CHECKING:
    from typing_extensions import Buffer

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class CodecError(EngineError):
    """KV that a codec cannot carry, or bytes that it has not made."""


class Codec(Protocol):
    """Stateless. `pages` are `[n, page_bytes]` in wire order, C-contiguous."""

    id: int
    name: str
    lossy: bool

    def encoded_bytes(self, num_pages: int, num_heads: int, layout: ModelLayout) -> int: ...

    def encode(self, pages: Bytes, num_heads: int, layout: ModelLayout, out: Bytes) -> None:
        """Write what to send into `out`, `[encoded_bytes]`. Raises CodecError for numbers it cannot
        carry."""
        ...

    def decode(self, encoded: Buffer, num_pages: int, num_heads: int, layout: ModelLayout) -> Bytes:
        """`[n, page_bytes]`, perhaps a view of what came. Raises CodecError unless it has the length
        that belongs to so many pages."""
        ...


class NoCodec:
    id, name, lossy = 0, "none", False

    def encoded_bytes(self, num_pages: int, num_heads: int, layout: ModelLayout) -> int:
        return num_pages * layout.page_bytes(num_heads)

    def encode(self, pages: Bytes, num_heads: int, layout: ModelLayout, out: Bytes) -> None:  # noqa: ARG002
        out[:] = pages.reshape(-1)

    def decode(self, encoded: Buffer, num_pages: int, num_heads: int, layout: ModelLayout) -> Bytes:
        _check_length(self, memoryview(encoded).nbytes, num_pages, num_heads, layout)
        return np.frombuffer(memoryview(encoded), dtype=np.uint8).reshape(num_pages, -1)


REFUSED = "int8: KV that is not finite, or too large for a scale"
SMALLEST, LARGEST = np.float32(2.0**-100), np.float32(2.0**120)


class Int8Codec:
    """Per token, head and K or V: a float32 scale, the largest magnitude over 127, and integers
    rounded to nearest, ties to even.

    Rows whose largest magnitude is below 2^-100 are zeros. Infinities, NaN and magnitudes of 2^120
    and more are refused.
    """

    id, name, lossy = 1, "int8", True

    def __init__(self, *, use_kernels: bool = True) -> None:
        """`use_kernels` false computes with numpy alone."""
        self._use_kernels = use_kernels

    def encoded_bytes(self, num_pages: int, num_heads: int, layout: ModelLayout) -> int:
        return num_pages * num_heads * 2 * PAGE * (4 + layout.head_dim)

    def encode(self, pages: Bytes, num_heads: int, layout: ModelLayout, out: Bytes) -> None:
        units = len(pages) * num_heads
        kernels = load_kernels() if self._use_kernels else None
        if kernels is None or layout.dtype not in kernels.quantise:
            rows = pages.reshape(units, 2 * PAGE, -1)
            out[:] = quantise(widen(rows, layout.dtype)).reshape(-1)
            return
        _check_length(self, out.nbytes, len(pages), num_heads, layout)
        D = layout.head_dim
        if not kernels.quantise[layout.dtype](pages.ctypes.data, units, D, out.ctypes.data):
            raise CodecError(REFUSED)

    def decode(self, encoded: Buffer, num_pages: int, num_heads: int, layout: ModelLayout) -> Bytes:
        _check_length(self, memoryview(encoded).nbytes, num_pages, num_heads, layout)
        num_units, D = num_pages * num_heads, layout.head_dim
        units = np.frombuffer(memoryview(encoded), dtype=np.uint8).reshape(num_units, -1)
        if not np.isfinite(_scales(units)).all():
            raise CodecError("int8: a scale that is not finite")
        kernels = load_kernels() if self._use_kernels else None
        if kernels is None or layout.dtype not in kernels.restore:
            return narrow(restore(units), layout.dtype).reshape(num_pages, -1)
        pages = np.empty((num_pages, layout.page_bytes(num_heads)), dtype=np.uint8)
        kernels.restore[layout.dtype](units.ctypes.data, num_units, D, pages.ctypes.data)
        return pages


def quantise(rows: Floats) -> Bytes:
    """`[units, 32, D]` to `[units, 32 * (4 + D)]`."""
    top = np.abs(rows).max(axis=-1)
    if not bool((top < LARGEST).all()):  # also where it is NaN
        raise CodecError(REFUSED)
    zero = top < SMALLEST
    inverse = np.where(zero, np.float32(0), np.float32(127) / np.where(zero, np.float32(1), top))
    scales = np.where(zero, np.float32(0), top / np.float32(127))
    values = np.rint(rows * inverse[..., None]).astype(np.int8)
    count = len(rows)
    parts = (scales.view(np.uint8), values.reshape(count, -1).view(np.uint8))
    return np.concatenate(parts, axis=1)


def restore(units: Bytes) -> Floats:
    """The inverse, as near as it comes."""
    values = units[:, _SCALE_BYTES:].view(np.int8).reshape(len(units), 2 * PAGE, -1)
    product: Floats = values.astype(np.float32) * _scales(units)[..., None]
    return product


_SCALE_BYTES = 2 * PAGE * 4


def _scales(units: Bytes) -> Floats:
    """`[units, 32]`"""
    return units[:, :_SCALE_BYTES].view(np.float32)


def widen(stored: Bytes, dtype: str) -> Floats:
    """Float32 of the numbers along the last axis."""
    if dtype == "bfloat16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    found: Floats = stored.view(dtype).astype(np.float32, copy=False)
    return found


def narrow(rows: Floats, dtype: str) -> Bytes:
    """As stored; to nearest, ties to even."""
    if dtype == "bfloat16":
        bits = rows.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)
    return np.ascontiguousarray(rows.astype(dtype, copy=False)).view(np.uint8)


def _check_length(
    codec: Codec, found: int, num_pages: int, num_heads: int, layout: ModelLayout
) -> None:
    expected = codec.encoded_bytes(num_pages, num_heads, layout)
    if found != expected:
        raise CodecError(
            f"{codec.name}: {found} bytes where {num_pages} pages of {num_heads} heads have {expected}"
        )


CODECS: tuple[Codec, ...] = (NoCodec(), Int8Codec())
BY_NAME = {codec.name: codec for codec in CODECS}
BY_ID = {codec.id: codec for codec in CODECS}

"""Passes through a small model on a CPU, a whole stack of layers in one call: `cpu_pass.h`.

A product of a row with a small matrix takes a few microseconds, and calling a library for it as long
again. So models whose layers are small keep a second copy of their weights in the order in which that
call reads them, and everything from the embedding to the final norm runs in it. Larger models gain
nothing by it, and where the processor has matrix tiles passes of many rows are a library's business.

Letters: T rows, E width, L layers of a group, O outputs, I inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.parallel.region import share
from paceline.parallel.shard import split
from paceline.runtime.layers.cpu_kernels import LANES, Kernels, Pass, load_kernels, supports
from paceline.runtime.sampling.sampler import mixed_ids

if TYPE_CHECKING:
    from paceline.parallel.mesh import Axis
    from paceline.runtime.inputs import Rows
    from paceline.runtime.kv.pool import KvPool
    from paceline.runtime.models.arch import Architecture

LINE_BYTES = 64
MOST_BYTES = 256 * 2**20
"""Of weights that are kept a second time."""
MOST_SUMMED = 2**18
"""Numbers that ranks add up at once; more go in several turns."""
SUM_TIMEOUT_S = 600.0
"""How long a rank waits for another in the midst of a pass. Whoever started the ranks ends them long
before, and says what each was at."""

Form = Literal["exact", "attention", "block"]
FORMS: dict[Form, int] = {"exact": 0, "attention": 1, "block": 2}


class Matrix(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("first_unit", ctypes.c_int32),
        ("num_units", ctypes.c_int32),
    )


class _Group(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("tile_stride", ctypes.c_int64),
        ("unit_stride", ctypes.c_int64),
        ("num_layers", ctypes.c_int32),
        ("num_units", ctypes.c_int32),
        ("queries", ctypes.c_int32),
        ("window", ctypes.c_int32),
    )


class _Stack(ctypes.Structure):
    _fields_ = (
        ("groups", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("num_groups", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class _Ranks(ctypes.Structure):
    _fields_ = (
        ("region", ctypes.c_void_p),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("capacity", ctypes.c_int64),
        ("turn", ctypes.c_int64),
        ("timeout_s", ctypes.c_double),
        ("failed", ctypes.c_int32),
    )


class _Ends(ctypes.Structure):
    _fields_ = (
        ("embedding", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("head", Matrix),
        ("mixed_ids", ctypes.c_void_p),
        ("first_embedding", ctypes.c_int32),
        ("num_embeddings", ctypes.c_int32),
        ("first_token", ctypes.c_int32),
        ("splits", ctypes.c_int32),
    )


STRUCT_BYTES = sum(ctypes.sizeof(each) for each in (_Stack, _Group, _Layer, _Ranks, _Ends))


def most_rows() -> int:
    """Passes of more rows are a library's. Measured on two cores without tiles against oneDNN, 24 layers
    of 256 in bfloat16: 1.9 times as fast at 128 rows of a prompt, 2.8 at 36 requests of three rows.
    Processors with tiles multiply many rows faster than this code, which uses none."""
    return 16 if torch.cpu._is_amx_tile_supported() else 8192


class Packed:
    """A weight in tiles, with its bias in float32."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        """bfloat16 weights must have an even number of inputs."""
        self._kernels = _kernels()
        self._product = self._kernels.form("product", weight_OI.dtype)
        self.dtype = weight_OI.dtype
        self.outputs, self.inputs = weight_OI.shape
        self._weight = _in_tiles(weight_OI)
        self._bias = None if bias_O is None else bias_O.float().contiguous()
        self.matrix = Matrix(
            self._weight.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self.inputs,
            self.outputs,
        )

    @property
    def num_bytes(self) -> int:
        return self._weight.numel() * self._weight.element_size()

    def move(self, to: Tensor) -> None:
        """Keep the weight in these bytes from now on."""
        self._weight = to.view(self.dtype).view(self._weight.shape).copy_(self._weight)
        self.matrix.weight = self._weight.data_ptr()

    def of_normed(self, h_TI: Tensor, norm_I: Tensor, *, eps: float) -> Tensor:
        """`[T, O]` float32, of rows [T, I] in float32 before their norm, bit by bit as at the end of a
        pass."""
        return self(
            self._kernels.add_rms(
                h_TI.contiguous(), None, eps=eps, dtype=self.dtype, weight_E=norm_I
            )
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        """`[T, O]` float32."""
        y_TO = torch.empty(x_TI.shape[0], self.outputs)
        matrix, num_rows = ctypes.addressof(self.matrix), x_TI.shape[0]
        team = self._kernels.team()
        self._product(team, matrix, x_TI.data_ptr(), num_rows, y_TO.data_ptr())
        return y_TO


def in_reading_order(groups: Sequence[PackedGroup], head: Packed) -> list[Packed]:
    """A model's weights as its passes read them."""
    weights = []
    for group in groups:
        weights += [layer.qkv for layer in group.layers] + [layer.out for layer in group.layers]
        for layer in group.layers:
            weights += [layer.gate_up, layer.down]
    return [*weights, head]


def lay_side_by_side(weights: Sequence[Packed]) -> None:
    """One after another in large pages: passes of few rows are a twentieth shorter for it."""
    sizes = [-(-weight.num_bytes // LINE_BYTES) * LINE_BYTES for weight in weights]
    # NumPy asks for large pages
    memory = torch.from_numpy(np.empty(sum(sizes) + LINE_BYTES, dtype=np.uint8))
    at = -memory.data_ptr() % LINE_BYTES
    for weight, size in zip(weights, sizes, strict=True):
        weight.move(memory[at : at + weight.num_bytes])
        at += size


def _kernels() -> Kernels:
    kernels = load_kernels()
    assert kernels is not None, "expected compiled kernels behind packed weights"
    return kernels


def _in_tiles(weight_OI: Tensor) -> Tensor:
    outputs, inputs = weight_OI.shape
    num_tiles = -(-outputs // LANES)
    padded = F.pad(weight_OI, (0, 0, 0, num_tiles * LANES - outputs))
    if weight_OI.dtype == torch.float32:
        return padded.view(num_tiles, LANES, inputs).transpose(1, 2).contiguous()
    assert inputs % 2 == 0, f"expected pairs of inputs, found {inputs}"
    return padded.view(num_tiles, LANES, inputs // 2, 2).transpose(1, 2).contiguous()


def worth_packing(
    arch: Architecture, *, ranks: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a model's layers are small enough, and nothing in them is what `cpu_pass.h` lacks. The
    same on every rank: what they sum must be of one dtype."""
    if not supports(device, dtype, head_dim=arch.head_dim) or load_kernels() is None:
        return False
    widths = [arch.hidden_size, arch.head_dim]
    widths += [len(split(arch.ff_size, ranks, rank)) for rank in range(ranks)]
    in_pairs = dtype != torch.bfloat16 or all(width % 2 == 0 for width in widths)
    num_heads = 2 * (arch.num_heads + arch.num_kv_heads)  # of queries, keys, values and outputs
    per_layer = arch.hidden_size * (num_heads * arch.head_dim + 3 * arch.ff_size)
    num_weights = arch.num_layers * per_layer + arch.vocab_size * arch.hidden_size
    is_small = num_weights * dtype.itemsize <= MOST_BYTES * ranks
    return is_small and in_pairs and not arch.qk_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    """A layer's weights on this rank."""

    qkv: Packed
    out: Packed
    gate_up: Packed
    down: Packed
    units: range
    """Those of its group that are its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedGroup:
    """Layers that may run side by side."""

    layers: Sequence[PackedLayer]
    queries: int
    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedEnds:
    """What is around the layers, on this rank."""

    embedding: Tensor  # [ids here, E], then a row of zeros if other ranks have more
    num_embeddings: int
    splits: bool
    """Whether other ranks have more."""
    final_norm: Tensor  # [E] float32
    head: Packed
    tokens: range
    """Those whose embeddings and logits are here."""
    num_tokens: int
    """Of all ranks."""


class SmallPasses:
    """A model's layers over its KV pool, for passes of up to `most_rows` rows."""

    def __init__(
        self,
        groups: Sequence[PackedGroup],
        pool: KvPool,
        *,
        ends: PackedEnds,
        axis: Axis,
        width: int,
        eps: float,
        scale: float,
    ) -> None:
        """Collective: every rank of the axis makes its own at the same time."""
        self.most_rows = most_rows()
        self.dtype = groups[0].layers[0].qkv.dtype
        kernels, dtype, kv_dtype = _kernels(), self.dtype, pool.groups[0].dtype
        self._team = kernels.team
        self._pass = kernels.form("pass", dtype, kv_dtype)
        self._attention = kernels.form("attention", dtype, kv_dtype)
        self._mlp = kernels.form("mlp", dtype, kv_dtype)
        self._most_layers = max(len(group.layers) for group in groups)
        lay_side_by_side(in_reading_order(groups, ends.head))
        made, alive = (_Group * len(groups))(), []
        for index, (group, blocks) in enumerate(zip(groups, pool.groups, strict=True)):
            layers = (_Layer * len(group.layers))(
                *(
                    _Layer(
                        each.qkv.matrix,
                        each.out.matrix,
                        each.gate_up.matrix,
                        each.down.matrix,
                        each.units.start,
                        len(each.units),
                    )
                    for each in group.layers
                )
            )
            alive.append(layers)
            made[index] = _Group(
                ctypes.addressof(layers),
                blocks.data_ptr(),
                blocks.stride(0),
                blocks.stride(1),
                blocks.stride(2),
                len(group.layers),
                blocks.shape[2],
                group.queries,
                group.window or 0,
            )
        most_floats = min(self.most_rows * self._most_layers * width, MOST_SUMMED)
        self._ranks, region = None, None
        if axis.size > 1:
            lines, capacity = 64 * axis.size, -(-most_floats // LANES) * LANES
            region = share(axis, lines + 2 * axis.size * capacity * 4)
        if region is not None:
            assert axis.index is not None, "expected a rank of the axis"
            self._ranks = _Ranks(
                region.address, axis.index, axis.size, capacity, 0, SUM_TIMEOUT_S, 0
            )
        mixed = mixed_ids(ends.num_tokens, torch.device("cpu"))
        self._ends = _Ends(
            ends.embedding.data_ptr(),
            ends.final_norm.data_ptr(),
            ends.head.matrix,
            mixed.data_ptr(),
            ends.tokens.start,
            ends.num_embeddings,
            ends.tokens.start,
            ends.splits,
        )
        self.ends_address = ctypes.addressof(self._ends)
        self._alive = (groups, pool, made, alive, region, ends, mixed)
        ranks = None if self._ranks is None else ctypes.addressof(self._ranks)
        self._stack = _Stack(ctypes.addressof(made), ranks, len(groups), width, eps, scale)
        self.address = ctypes.addressof(self._stack)
        self.runs_whole = axis.size == 1 or self._ranks is not None
        """Whether `whole` may be asked for: ranks without memory in common add up between two calls."""

    def whole(self, rows: Rows, form: Form) -> Tensor:
        """From tokens through all layers: `[T, E]` before the final norm. Raises TimeoutError where
        another rank does not come."""
        T, E = rows.num_rows, self._stack.width
        room = torch.empty(2 + (self._most_layers if form == "attention" else 1), T, E)
        h_TE, delta_TE, A = room[0], room[1], room[2:]
        self._pass(
            self._team(),
            self.address,
            self.ends_address,
            ctypes.addressof(_native(rows)),
            FORMS[form],
            rows.token_ids.data_ptr(),
            h_TE.data_ptr(),
            delta_TE.data_ptr(),
            A.data_ptr(),
        )
        self.check()
        return h_TE.add_(delta_TE)

    def check(self) -> None:
        """Raises TimeoutError where another rank did not come to a sum."""
        if self._ranks is not None and self._ranks.failed:
            raise TimeoutError(f"another rank did not come to a sum in {self._ranks.timeout_s:g} s")

    def attention(
        self,
        h_TE: Tensor,
        delta_TE: Tensor | None,
        rows: Rows,
        *,
        group: int,
        layers: range,
        summed: bool,
    ) -> Tensor:
        """This rank's part of the attention of some layers of a group over the norm of
        `h_TE += delta_TE`: `[L, T, E]`, or `[T, E]` if summed."""
        _check_floats(h_TE, delta_TE)
        shape = h_TE.shape if summed else (len(layers), *h_TE.shape)
        A = torch.empty(shape)
        self._attention(
            self._team(),
            self.address,
            group,
            ctypes.addressof(_native(rows)),
            h_TE.data_ptr(),
            None if delta_TE is None else delta_TE.data_ptr(),
            layers.start,
            layers.stop,
            summed,
            A.data_ptr(),
        )
        return A

    def mlp(self, h_TE: Tensor, A_TE: Tensor, rows: Rows, *, group: int, layers: range) -> Tensor:
        """This rank's part of the feed-forward blocks of some layers of a group, each over the norm of
        `h_TE += A_TE`, summed: `[T, E]`."""
        _check_floats(h_TE, A_TE)
        delta_TE = torch.empty_like(h_TE)
        self._mlp(
            self._team(),
            self.address,
            group,
            ctypes.addressof(_native(rows)),
            h_TE.data_ptr(),
            A_TE.data_ptr(),
            layers.start,
            layers.stop,
            delta_TE.data_ptr(),
        )
        return delta_TE


def _check_floats(h_TE: Tensor, delta_TE: Tensor | None) -> None:
    """What the compiled passes take for granted."""
    for each in (h_TE, h_TE if delta_TE is None else delta_TE):
        assert each.dtype == torch.float32, f"expected float32, found {each.dtype}"
        assert each.shape == h_TE.shape, f"expected {h_TE.shape}, found {each.shape}"
        assert each.is_contiguous(), "expected rows that follow one another"


def _native(rows: Rows) -> Pass:
    assert rows.native is not None, "expected a pass for the compiled kernels"
    return rows.native

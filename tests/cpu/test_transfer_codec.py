"""Codecs give back what they took, or as near as they promise, or say that they cannot."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from paceline.runtime.transfer.codec import (
    BY_ID,
    BY_NAME,
    CODECS,
    Codec,
    CodecError,
    Int8Codec,
    narrow,
    widen,
)
from paceline.runtime.transfer.kernels import load_kernels
from paceline.runtime.transfer.layout import PAGE, Dtype, ModelLayout

D = 5
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
HALF_STEP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Half the distance of neighbouring numbers over their magnitude, at most."""


def layout(dtype: Dtype) -> ModelLayout:
    return ModelLayout(
        name="target", num_layers=1, num_kv_heads=8, head_dim=D, dtype=dtype, held=()
    )


def encoded(codec: Codec, pages: NDArray[np.uint8], num_heads: int, dtype: Dtype) -> bytes:
    out = np.empty(codec.encoded_bytes(len(pages), num_heads, layout(dtype)), dtype=np.uint8)
    codec.encode(pages, num_heads, layout(dtype), out)
    return out.tobytes()


@pytest.fixture(scope="session", params=[True, False], ids=["kernels", "numpy"])
def int8(request: pytest.FixtureRequest) -> Int8Codec:
    if request.param and load_kernels() is None:
        pytest.skip("no C++ compiler")
    return Int8Codec(use_kernels=request.param)


numbers = st.floats(-(2.0**15), 2.0**15, width=32)
floats = arrays.arrays(np.float32, (2, 3 * 2 * PAGE * D), elements=numbers, fill=numbers)
"""Two pages of three heads."""
ROWS = (2, 3, 2 * PAGE, D)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=floats)
def test_none_gives_back_every_bit(dtype: Dtype, rows: NDArray[np.float32]) -> None:
    pages = narrow(rows, dtype)
    codec = BY_NAME["none"]
    sent = encoded(codec, pages, 3, dtype)
    assert sent == pages.tobytes()
    assert (codec.decode(sent, 2, 3, layout(dtype)) == pages).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=floats)
def test_int8_is_within_half_a_step(
    dtype: Dtype, int8: Int8Codec, rows: NDArray[np.float32]
) -> None:
    pages = narrow(rows, dtype)
    given_rows = widen(pages, dtype).reshape(ROWS)
    back = int8.decode(encoded(int8, pages, 3, dtype), 2, 3, layout(dtype))
    found = widen(back, dtype).reshape(ROWS)
    step = np.abs(given_rows).max(axis=-1, keepdims=True) / 127
    within = step * 0.5001 + np.abs(given_rows) * HALF_STEP[dtype] + 2.0**-24
    assert (np.abs(found - given_rows) <= within).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(bits=arrays.arrays(np.uint32, (2, 3 * 2 * PAGE * D)))
def test_kernels_and_numpy_agree_bit_for_bit(dtype: Dtype, bits: NDArray[np.uint32]) -> None:
    """Of any numbers: subnormal, infinite and none at all."""
    if load_kernels() is None:
        pytest.skip("no C++ compiler")
    pages = bits.view(np.uint8) if dtype == "float32" else (bits >> 16).astype("<u2").view(np.uint8)
    said: list[Any] = []
    for codec in (Int8Codec(), Int8Codec(use_kernels=False)):
        try:
            sent = encoded(codec, pages, 3, dtype)
            said.append((sent, codec.decode(sent, 2, 3, layout(dtype)).tobytes()))
        except CodecError as error:
            said.append(str(error))
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=floats)
def test_a_range_of_heads_is_a_run_of_bytes(dtype: Dtype, rows: NDArray[np.float32]) -> None:
    """So a producer may send any heads, and so may whoever stands between."""
    pages = narrow(rows, dtype)
    heads = pages.reshape(2, 3, -1)
    for codec in CODECS:
        whole = np.frombuffer(encoded(codec, pages, 3, dtype), dtype=np.uint8).reshape(2, 3, -1)
        for start, stop in pairwise((0, 1, 3)):
            part = np.ascontiguousarray(heads[:, start:stop]).reshape(2, -1)
            sent = np.frombuffer(encoded(codec, part, stop - start, dtype), dtype=np.uint8)
            assert (whole[:, start:stop].reshape(-1) == sent).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 2.0**120, -(2.0**127)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_never_sends_what_has_no_scale(int8: Int8Codec, dtype: Dtype, bad: float) -> None:
    rows = np.ones((1, 2 * PAGE * D), dtype=np.float32)
    rows[0, 17] = bad
    with pytest.raises(CodecError):
        encoded(int8, narrow(rows, dtype), 1, dtype)


@pytest.mark.parametrize("small", [0.0, -0.0, 1e-45, 1e-38, 2.0**-101])
def test_int8_sends_what_is_next_to_nothing_as_zeros(int8: Int8Codec, small: float) -> None:
    rows = np.full((1, 2 * PAGE * D), small, dtype=np.float32)
    sent = encoded(int8, narrow(rows, "float32"), 1, "float32")
    assert not any(sent)
    assert not int8.decode(sent, 1, 1, layout("float32")).any()


def test_int8_keeps_the_largest_and_ties_go_to_even(int8: Int8Codec) -> None:
    rows = np.zeros((1, 2 * PAGE, D), dtype=np.float32)
    rows[:, :] = (127, 0.5, 1.5, -2.5, -127)
    sent = encoded(int8, narrow(rows.reshape(1, -1), "float32"), 1, "float32")
    assert np.frombuffer(sent[: 4 * 2 * PAGE], dtype="<f4").tolist() == [1.0] * 2 * PAGE
    assert np.frombuffer(sent[4 * 2 * PAGE :], dtype=np.int8)[:D].tolist() == [127, 0, 2, -2, -127]


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("change", [-1, 1])
def test_bytes_of_another_length_are_refused(name: str, change: int) -> None:
    codec = BY_NAME[name]
    length = codec.encoded_bytes(2, 3, layout("bfloat16")) + change
    with pytest.raises(CodecError):
        codec.decode(bytes(length), 2, 3, layout("bfloat16"))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_scale_that_is_no_number_is_refused(int8: Int8Codec, bad: float) -> None:
    sent = bytearray(int8.encoded_bytes(1, 1, layout("float32")))
    sent[8:12] = np.float32(bad).tobytes()
    with pytest.raises(CodecError):
        int8.decode(bytes(sent), 1, 1, layout("float32"))


def test_numbers_of_codecs_are_for_ever() -> None:
    assert {number: codec.name for number, codec in BY_ID.items()} == {0: "none", 1: "int8"}
    assert [codec.name for codec in CODECS if codec.lossy] == ["int8"]

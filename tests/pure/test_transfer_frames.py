"""A frame is read as it was written or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.runtime.transfer.frames import (
    HEADER_BYTES,
    MAX_TEXT_BYTES,
    VERSION,
    Digest,
    Frame,
    FrameError,
    Kind,
    decode_frame,
    encode_end,
    encode_error,
    new_frame,
    seal_pages,
)

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
places = st.fixed_dictionaries(
    {
        "boot_id": u64,
        "ticket": u64,
        "lane": u16,
        "sequence": u32,
        "model": u8,
        "codec": u8,
        "layer": u16,
        "head_start": u16,
        "num_heads": st.integers(1, 2**16 - 1),
        "first_page": u32,
        "num_pages": st.integers(1, 2**32 - 1),
    }
)
PLACE = {
    "boot_id": 0x0102030405060708,
    "ticket": 0x1112131415161718,
    "lane": 1,
    "sequence": 2,
    "model": 1,
    "codec": 0,
    "layer": 3,
    "head_start": 4,
    "num_heads": 2,
    "first_page": 5,
    "num_pages": 1,
}
EXAMPLE = """
504b564601010000 0807060504030201 0100020000000100 0300040002000000
0500000001000000 09000000839206e3 1817161514131211 000000000385b911
313233343536373839
"""
SPECIFICATION = Path(__file__).parents[2] / "proto" / "README.md"


def pages(payload: bytes, **changes: Any) -> bytes:
    body, room = new_frame(len(payload))
    room[:] = payload
    seal_pages(body, **(PLACE | changes))
    return body


@given(st.binary(max_size=300), places)
def test_what_is_read_is_what_was_written(payload: bytes, place: dict[str, int]) -> None:
    frame = decode_frame(pages(payload, **place))
    assert frame.kind == Kind.PAGES
    assert frame.payload == payload
    assert {name: getattr(frame, name) for name in place} == place


def test_bytes_are_those_of_the_specification() -> None:
    assert pages(b"123456789").hex() == "".join(EXAMPLE.split())
    assert "".join(EXAMPLE.split()) in "".join(SPECIFICATION.read_text().split())


@given(st.binary(max_size=40), st.data())
def test_a_flipped_bit_anywhere_is_noticed(payload: bytes, data: st.DataObject) -> None:
    body = bytearray(pages(payload))
    at = data.draw(st.integers(0, 8 * len(body) - 1))
    body[at // 8] ^= 1 << at % 8
    with pytest.raises(FrameError):
        decode_frame(bytes(body))


@given(st.binary(max_size=40), st.integers(1, HEADER_BYTES + 40), st.binary(min_size=1, max_size=9))
def test_a_frame_that_was_cut_or_lengthened_is_noticed(
    payload: bytes, cut: int, more: bytes
) -> None:
    body = pages(payload)
    for changed in (body[: max(0, len(body) - cut)], body + more):
        with pytest.raises(FrameError, match="bytes"):
            decode_frame(changed)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_reason(body: bytes) -> None:
    with pytest.raises(FrameError, match="frame"):
        decode_frame(body)


def test_another_version_is_named() -> None:
    body = bytearray(pages(b"x"))
    body[4] = VERSION + 1
    with pytest.raises(FrameError, match=f"version {VERSION + 1}, .*{VERSION} is spoken here"):
        decode_frame(bytes(body))


@pytest.mark.parametrize("nothing", ["num_pages", "num_heads"])
def test_a_frame_of_nothing_is_refused(nothing: str) -> None:
    with pytest.raises(FrameError):
        decode_frame(pages(b"", **{nothing: 0}))


def test_an_error_is_told_in_words_and_cut_where_it_is_long() -> None:
    frame = decode_frame(encode_error("lease expired: Jürgen", boot_id=7, ticket=8, lane=3))
    assert (frame.kind, frame.boot_id, frame.ticket, frame.lane) == (Kind.ERROR, 7, 8, 3)
    assert frame.text == "lease expired: Jürgen"
    cut = decode_frame(encode_error("ü" * MAX_TEXT_BYTES, boot_id=7, ticket=8, lane=3))
    assert cut.text.startswith("ü" * (MAX_TEXT_BYTES // 2))


@dataclass
class Sent:
    bodies: list[bytes]
    end: Frame


@pytest.fixture
def sent() -> Sent:
    digest = Digest()
    bodies = [pages(bytes([n]) * 10, sequence=n) for n in range(4)]
    for body in bodies:
        digest.add(body)
    return Sent(bodies, decode_frame(encode_end(digest, boot_id=1, ticket=2, lane=0)))


def received(bodies: list[bytes]) -> Digest:
    digest = Digest()
    for body in bodies:
        digest.add(body)
    return digest


def test_a_whole_stream_is_what_its_end_says(sent: Sent) -> None:
    received(sent.bodies).check(sent.end)
    assert sent.end.kind == Kind.END


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 3, 3], [0, 2, 1, 3], [0, 1, 1, 3], []])
def test_a_frame_lost_repeated_or_out_of_turn_is_noticed(sent: Sent, order: list[int]) -> None:
    with pytest.raises(FrameError):
        received([sent.bodies[n] for n in order]).check(sent.end)


def test_other_bytes_in_a_frame_of_the_same_place_are_noticed(sent: Sent) -> None:
    other = pages(b"another..?", sequence=2)
    decode_frame(other)
    with pytest.raises(FrameError):
        received([*sent.bodies[:2], other, sent.bodies[3]]).check(sent.end)

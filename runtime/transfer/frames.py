"""Frames: the bodies of the messages that carry KV.

    0    magic "PKVF"                         24   layer, first head, heads: u16 each, u16 zero
    4    version, kind, flags: u8 u8 u16      32   first page, pages: u32 each
    8    boot id u64                          40   payload bytes, crc32c of the payload: u32 each
    16   lane, sequence: u16 u32, model,      48   ticket u64
         codec: u8 each                       56   u32 zero, crc32c of the 60 bytes before: u32
    64   payload

Little endian. A PAGES frame has pages that follow one another by token position, of one layer and
one range of heads. The sequence counts a stream's PAGES frames from zero. END says how many there
were and the crc32c over bytes 0 to 59 of each in turn, which have the crc32c of their payloads: a
lost, repeated or reordered frame is noticed. ERROR has a text.
"""

from __future__ import annotations

import ctypes
import enum
import struct
from typing import TYPE_CHECKING, NamedTuple

from crc32c import crc32c

from paceline.runtime.errors import EngineError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"PKVF"
VERSION = 1
_HEADER = struct.Struct("<4sBBHQHIBBHHHHIIIIQI")
_CRC = struct.Struct("<I")
_END = struct.Struct("<II")
HEADER_BYTES = _HEADER.size + _CRC.size
MAX_TEXT_BYTES = 4096
_NOWHERE = (0,) * 9
"""Of frames without pages: all that says which."""


class FrameError(EngineError):
    """A frame that is damaged or that this version does not understand. Nothing of it may be
    used."""


class Kind(enum.IntEnum):
    PAGES = 1
    END = 2
    ERROR = 3


class Frame(NamedTuple):
    """A frame whose checksums were right."""

    kind: Kind
    boot_id: int
    ticket: int
    lane: int
    sequence: int
    model: int
    codec: int
    layer: int
    head_start: int
    num_heads: int
    first_page: int
    """By token position: of positions 16 * first_page and on."""
    num_pages: int
    payload: memoryview
    """Of the body that was decoded: valid as long as that is."""

    @property
    def head_stop(self) -> int:
        return self.head_start + self.num_heads

    @property
    def text(self) -> str:
        """Of an ERROR frame."""
        return str(self.payload, "utf-8", "replace")


def new_frame(payload_bytes: int) -> tuple[bytes, memoryview]:
    """Room for a frame: its body, and its payload to be written before `seal_pages`.

    gRPC sends nothing but `bytes`, so pages are written straight into one. That is allowed of a new
    one that nobody else has seen; the view must not be used once it is sealed.
    """
    body = _new_bytes(None, HEADER_BYTES + payload_bytes)
    start = _bytes_address(body) + HEADER_BYTES
    return body, memoryview((ctypes.c_ubyte * payload_bytes).from_address(start)).cast("B")


def seal_pages(
    body: bytes,
    *,
    boot_id: int,
    ticket: int,
    lane: int,
    sequence: int,
    model: int,
    codec: int,
    layer: int,
    head_start: int,
    num_heads: int,
    first_page: int,
    num_pages: int,
) -> None:
    """Make a PAGES frame of a body from `new_frame` whose payload is written."""
    place = (lane, sequence, model, codec, layer, head_start, num_heads, 0, first_page, num_pages)
    head = _header(Kind.PAGES, boot_id, ticket, place, memoryview(body)[HEADER_BYTES:])
    ctypes.memmove(_bytes_address(body), head, HEADER_BYTES)


def encode_end(digest: Digest, *, boot_id: int, ticket: int, lane: int) -> bytes:
    """The last frame of a stream that went well; `digest` has seen all its PAGES frames."""
    payload = _END.pack(digest.num_frames, digest.value)
    return _header(Kind.END, boot_id, ticket, (lane, *_NOWHERE), payload) + payload


def encode_error(text: str, *, boot_id: int, ticket: int, lane: int) -> bytes:
    """The last frame of a stream that did not."""
    payload = text.encode()[:MAX_TEXT_BYTES]
    return _header(Kind.ERROR, boot_id, ticket, (lane, *_NOWHERE), payload) + payload


def _header(
    kind: Kind, boot_id: int, ticket: int, place: tuple[int, ...], payload: Buffer
) -> bytes:
    num_bytes = memoryview(payload).nbytes
    head = _HEADER.pack(
        MAGIC, VERSION, kind, 0, boot_id, *place, num_bytes, crc32c(payload), ticket, 0
    )
    return head + _CRC.pack(crc32c(head))


_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, (ctypes.c_char_p, ctypes.c_ssize_t)
_bytes_address = ctypes.pythonapi.PyBytes_AsString
_bytes_address.restype, _bytes_address.argtypes = ctypes.c_void_p, (ctypes.py_object,)


def decode_frame(body: Buffer) -> Frame:
    """Raises FrameError where a byte is not what was sent, and where it is of another version."""
    view = memoryview(body)
    if view.nbytes < HEADER_BYTES:
        raise FrameError(f"a frame of {view.nbytes} bytes, fewer than its header has")
    fields = _HEADER.unpack_from(view)
    magic, version, kind, flags, boot_id, lane, sequence, model, codec = fields[:9]
    layer, head_start, num_heads, _, first_page, num_pages, num_bytes, crc, ticket, _ = fields[9:]
    if magic != MAGIC:
        raise FrameError(f"not a frame: it begins with {magic!r}")
    if version != VERSION or flags:
        raise FrameError(
            f"frame version {version}, flags {flags}; version {VERSION} is spoken here"
        )
    if _CRC.unpack_from(view, _HEADER.size)[0] != crc32c(view[: _HEADER.size]):
        raise FrameError("a damaged header: its checksum is wrong")
    payload = view[HEADER_BYTES:]
    if payload.nbytes != num_bytes:
        raise FrameError(f"a payload of {payload.nbytes} bytes where {num_bytes} were announced")
    if crc32c(payload) != crc:
        raise FrameError(
            f"a damaged payload: layer {layer}, page {first_page}: its checksum is wrong"
        )
    if kind not in _KINDS:
        raise FrameError(f"a frame of unknown kind {kind}")
    if kind == Kind.PAGES and not (num_pages and num_heads):
        raise FrameError("a frame of no pages or of no heads")
    if kind == Kind.END and num_bytes != _END.size:
        raise FrameError(f"an end of {num_bytes} bytes")
    return Frame(
        kind=Kind(kind),
        boot_id=boot_id,
        ticket=ticket,
        lane=lane,
        sequence=sequence,
        model=model,
        codec=codec,
        layer=layer,
        head_start=head_start,
        num_heads=num_heads,
        first_page=first_page,
        num_pages=num_pages,
        payload=payload,
    )


_KINDS = frozenset(Kind)


class Digest:
    """The PAGES frames of one stream of one lane, in their order. Both ends keep one.

    Over headers without their checksums: the crc of anything followed by its own crc is the same
    whatever it was.
    """

    def __init__(self) -> None:
        self.num_frames = 0
        self.value = 0

    def add(self, body: Buffer) -> None:
        """`body` is a whole PAGES frame."""
        self.num_frames += 1
        self.value = crc32c(memoryview(body)[: _HEADER.size], self.value)

    def check(self, end: Frame) -> None:
        """Raises FrameError where what came is not what was sent."""
        num_frames, value = _END.unpack(end.payload)
        if num_frames != self.num_frames:
            raise FrameError(f"{self.num_frames} frames came where {num_frames} were sent")
        if value != self.value:
            raise FrameError("frames came in another order, or others than were sent")

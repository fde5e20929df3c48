"""Between our types and those of `proto/kv_transfer.proto`. What comes from a peer is checked on
reading: ValueError says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import grpc
import msgspec
import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from paceline.proto import kv_transfer_pb2 as pb
from paceline.runtime.transfer.layout import (
    MODELS,
    PAGE,
    GroupPlace,
    ModelLayout,
    ModelName,
    PoolPlace,
    UnitPlace,
)
from paceline.runtime.types import Handover, TokenLogprobs

SERVICE = pb.DESCRIPTOR.services_by_name["KvTransfer"].full_name
KEEPALIVE_S = 3.0
"""A connection that answers no ping for so long, after so long in silence, is cut."""
BASE_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1e3)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_S * 1e3)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
MAX_REQUEST_BYTES = 1 << 26
"""Of a message to a producer: an Open that resumes has a bit for each page of each range."""
MAX_CHUNK_BYTES = 1 << 22
MAX_LANES = 16
MAX_CREDIT_BYTES = 1 << 30

_DTYPES = {"float32": pb.FLOAT32, "bfloat16": pb.BFLOAT16, "float16": pb.FLOAT16}
_DTYPE_NAMES = {number: name for name, number in _DTYPES.items()}

M = TypeVar("M", bound=Message)


def num_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE)


def pool_pages(block_ids: Sequence[int], place: PoolPlace, num_tokens: int) -> NDArray[np.int64]:
    """Which pages of a pool a request's tokens are in, by position. Raises ValueError where blocks
    are missing, or are none of the pool's."""
    ids = np.asarray(block_ids, dtype=np.int64)
    if len(ids) * place.block_size < num_tokens:
        raise ValueError(
            f"{len(ids)} blocks of {place.block_size} tokens cannot hold {num_tokens} tokens"
        )
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < place.num_blocks:
        raise ValueError(f"a block id that is none of 0 to {place.num_blocks - 1}")
    tiles = place.pages_per_block
    pages = (ids[:, None] * tiles + np.arange(tiles)).reshape(-1)
    return pages[: num_pages(num_tokens)]


def parse(kind: type[M], body: bytes) -> M:
    try:
        message: M = kind()
        message.ParseFromString(body)
    except DecodeError:
        raise ValueError(f"{len(body)} bytes that are no {kind.__name__}") from None
    return message


def model_name(number: int) -> ModelName:
    if not 0 <= number < len(MODELS):
        raise ValueError(f"model {number}; there are {len(MODELS)}")
    return MODELS[number]


def layout_to_pb(layout: ModelLayout) -> pb.Layout:
    return pb.Layout(
        model=pb.Model.ValueType(MODELS.index(layout.name)),
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=_DTYPES[layout.dtype],
        held=[
            pb.HeadRange(layer=each.layer, head_start=each.head_start, head_stop=each.head_stop)
            for each in layout.held
        ],
    )


def layout_from_pb(message: pb.Layout) -> ModelLayout:
    fields = {
        "name": model_name(message.model),
        "num_layers": message.num_layers,
        "num_kv_heads": message.num_kv_heads,
        "head_dim": message.head_dim,
        "dtype": _DTYPE_NAMES.get(message.dtype, f"number {message.dtype}"),
        "held": [
            {"layer": each.layer, "head_start": each.head_start, "head_stop": each.head_stop}
            for each in message.held
        ],
    }
    return msgspec.convert(fields, ModelLayout)  # raises ValidationError, a ValueError


def pool_to_pb(name: ModelName, place: PoolPlace, *, fd: int, num_bytes: int) -> pb.Pool:
    return pb.Pool(
        model=pb.Model.ValueType(MODELS.index(name)),
        fd=fd,
        num_bytes=num_bytes,
        block_size=place.block_size,
        num_blocks=place.num_blocks,
        groups=[
            pb.Group(offset_bytes=each.offset_bytes, num_units=each.num_units)
            for each in place.groups
        ],
        units=[pb.Unit(group=each.group, first_unit=each.first_unit) for each in place.units],
    )


def place_from_pb(message: pb.Pool) -> PoolPlace:
    place = PoolPlace(
        block_size=message.block_size,
        num_blocks=message.num_blocks,
        groups=tuple(
            GroupPlace(offset_bytes=each.offset_bytes, num_units=each.num_units)
            for each in message.groups
        ),
        units=tuple(
            UnitPlace(group=each.group, first_unit=each.first_unit) for each in message.units
        ),
    )
    return msgspec.convert(msgspec.to_builtins(place), PoolPlace)


def handover_to_pb(handover: Handover) -> pb.Handover:
    return pb.Handover(
        token_ids=handover.token_ids,
        seed=handover.seed,
        position=handover.position,
        draft_exact=handover.draft_exact,
        num_cached_tokens=handover.num_cached_tokens,
        logprobs=map(_logprobs_to_pb, handover.logprobs),
        prompt_logprobs=map(_logprobs_to_pb, handover.prompt_logprobs),
    )


def handover_from_pb(message: pb.Handover) -> Handover:
    return Handover(
        token_ids=tuple(message.token_ids),
        seed=message.seed,
        position=message.position,
        draft_exact=message.draft_exact,
        num_cached_tokens=message.num_cached_tokens,
        logprobs=_logprobs_from_pb(message.logprobs),
        prompt_logprobs=_logprobs_from_pb(message.prompt_logprobs),
    )


def _logprobs_to_pb(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top=[pb.TopToken(token_id=token, logprob=logprob) for token, logprob in entry.top],
    )


def _logprobs_from_pb(entries: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            top=tuple((each.token_id, each.logprob) for each in entry.top),
        )
        for entry in entries
    )


def code_of(error: grpc.aio.AioRpcError) -> str:
    """`UNAVAILABLE: connection refused`, for a person to read."""
    return f"{error.code().name}: {error.details()}"

from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Model(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TARGET: _ClassVar[Model]
    DRAFT: _ClassVar[Model]

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNKNOWN: _ClassVar[Dtype]
    FLOAT32: _ClassVar[Dtype]
    BFLOAT16: _ClassVar[Dtype]
    FLOAT16: _ClassVar[Dtype]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Codec]
    INT8: _ClassVar[Codec]

class Plane(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRPC: _ClassVar[Plane]
    SHARED_MEMORY: _ClassVar[Plane]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DONE: _ClassVar[Outcome]
    ABORT: _ClassVar[Outcome]
TARGET: Model
DRAFT: Model
DTYPE_UNKNOWN: Dtype
FLOAT32: Dtype
BFLOAT16: Dtype
FLOAT16: Dtype
NONE: Codec
INT8: Codec
GRPC: Plane
SHARED_MEMORY: Plane
DONE: Outcome
ABORT: Outcome

class HeadRange(_message.Message):
    __slots__ = ("layer", "head_start", "head_stop")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEAD_START_FIELD_NUMBER: _ClassVar[int]
    HEAD_STOP_FIELD_NUMBER: _ClassVar[int]
    layer: int
    head_start: int
    head_stop: int
    def __init__(self, layer: _Optional[int] = ..., head_start: _Optional[int] = ..., head_stop: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("model", "num_layers", "num_kv_heads", "head_dim", "dtype", "held")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    model: Model
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: Dtype
    held: _containers.RepeatedCompositeFieldContainer[HeadRange]
    def __init__(self, model: _Optional[_Union[Model, str]] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., held: _Optional[_Iterable[_Union[HeadRange, _Mapping]]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_chunk_bytes", "max_lanes", "max_credit_bytes", "max_lease_s")
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_LANES_FIELD_NUMBER: _ClassVar[int]
    MAX_CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASE_S_FIELD_NUMBER: _ClassVar[int]
    max_chunk_bytes: int
    max_lanes: int
    max_credit_bytes: int
    max_lease_s: float
    def __init__(self, max_chunk_bytes: _Optional[int] = ..., max_lanes: _Optional[int] = ..., max_credit_bytes: _Optional[int] = ..., max_lease_s: _Optional[float] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("host_boot_id", "pid", "board_fd", "num_slots", "num_layers", "num_draft_layers", "nonce", "pools")
    HOST_BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    BOARD_FD_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    host_boot_id: str
    pid: int
    board_fd: int
    num_slots: int
    num_layers: int
    num_draft_layers: int
    nonce: bytes
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    def __init__(self, host_boot_id: _Optional[str] = ..., pid: _Optional[int] = ..., board_fd: _Optional[int] = ..., num_slots: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_draft_layers: _Optional[int] = ..., nonce: _Optional[bytes] = ..., pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("model", "fd", "num_bytes", "block_size", "num_blocks", "groups", "units")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    model: Model
    fd: int
    num_bytes: int
    block_size: int
    num_blocks: int
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    units: _containers.RepeatedCompositeFieldContainer[Unit]
    def __init__(self, model: _Optional[_Union[Model, str]] = ..., fd: _Optional[int] = ..., num_bytes: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., units: _Optional[_Iterable[_Union[Unit, _Mapping]]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("offset_bytes", "num_units")
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_UNITS_FIELD_NUMBER: _ClassVar[int]
    offset_bytes: int
    num_units: int
    def __init__(self, offset_bytes: _Optional[int] = ..., num_units: _Optional[int] = ...) -> None: ...

class Unit(_message.Message):
    __slots__ = ("group", "first_unit")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    FIRST_UNIT_FIELD_NUMBER: _ClassVar[int]
    group: int
    first_unit: int
    def __init__(self, group: _Optional[int] = ..., first_unit: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("consumer_id",)
    CONSUMER_ID_FIELD_NUMBER: _ClassVar[int]
    consumer_id: str
    def __init__(self, consumer_id: _Optional[str] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("protocol_major", "protocol_minor", "protocol_minor_min", "engine_id", "boot_id", "rank", "num_ranks", "fingerprint", "layouts", "limits", "planes", "codecs", "shared_memory")
    class FingerprintEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_MAJOR_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MINOR_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MINOR_MIN_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PLANES_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    protocol_major: int
    protocol_minor: int
    protocol_minor_min: int
    engine_id: str
    boot_id: int
    rank: int
    num_ranks: int
    fingerprint: _containers.ScalarMap[str, str]
    layouts: _containers.RepeatedCompositeFieldContainer[Layout]
    limits: Limits
    planes: _containers.RepeatedScalarFieldContainer[Plane]
    codecs: _containers.RepeatedScalarFieldContainer[Codec]
    shared_memory: SharedMemory
    def __init__(self, protocol_major: _Optional[int] = ..., protocol_minor: _Optional[int] = ..., protocol_minor_min: _Optional[int] = ..., engine_id: _Optional[str] = ..., boot_id: _Optional[int] = ..., rank: _Optional[int] = ..., num_ranks: _Optional[int] = ..., fingerprint: _Optional[_Mapping[str, str]] = ..., layouts: _Optional[_Iterable[_Union[Layout, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., planes: _Optional[_Iterable[_Union[Plane, str]]] = ..., codecs: _Optional[_Iterable[_Union[Codec, str]]] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("model", "first_page", "ranges", "received")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    model: Model
    first_page: int
    ranges: _containers.RepeatedCompositeFieldContainer[HeadRange]
    received: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, model: _Optional[_Union[Model, str]] = ..., first_page: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[HeadRange, _Mapping]]] = ..., received: _Optional[_Iterable[bytes]] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("transfer_id", "consumer_id", "consumer_rank", "num_consumers", "fingerprint", "wants", "codec", "plane", "num_lanes", "max_chunk_bytes", "lease_s", "boot_id")
    class FingerprintEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_ID_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_CONSUMERS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WANTS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    PLANE_FIELD_NUMBER: _ClassVar[int]
    NUM_LANES_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    consumer_id: str
    consumer_rank: int
    num_consumers: int
    fingerprint: _containers.ScalarMap[str, str]
    wants: _containers.RepeatedCompositeFieldContainer[Want]
    codec: Codec
    plane: Plane
    num_lanes: int
    max_chunk_bytes: int
    lease_s: float
    boot_id: int
    def __init__(self, transfer_id: _Optional[str] = ..., consumer_id: _Optional[str] = ..., consumer_rank: _Optional[int] = ..., num_consumers: _Optional[int] = ..., fingerprint: _Optional[_Mapping[str, str]] = ..., wants: _Optional[_Iterable[_Union[Want, _Mapping]]] = ..., codec: _Optional[_Union[Codec, str]] = ..., plane: _Optional[_Union[Plane, str]] = ..., num_lanes: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., lease_s: _Optional[float] = ..., boot_id: _Optional[int] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("boot_id", "ticket", "num_tokens", "lease_s", "num_lanes", "chunk_bytes", "target_pages", "slot", "generation")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_LANES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TARGET_PAGES_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    boot_id: int
    ticket: int
    num_tokens: int
    lease_s: float
    num_lanes: int
    chunk_bytes: int
    target_pages: _containers.RepeatedScalarFieldContainer[int]
    slot: int
    generation: int
    def __init__(self, boot_id: _Optional[int] = ..., ticket: _Optional[int] = ..., num_tokens: _Optional[int] = ..., lease_s: _Optional[float] = ..., num_lanes: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., target_pages: _Optional[_Iterable[int]] = ..., slot: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class StreamControl(_message.Message):
    __slots__ = ("ticket", "lane", "credit_bytes", "acked_frames")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACKED_FRAMES_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    lane: int
    credit_bytes: int
    acked_frames: int
    def __init__(self, ticket: _Optional[int] = ..., lane: _Optional[int] = ..., credit_bytes: _Optional[int] = ..., acked_frames: _Optional[int] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AwaitRequest(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    def __init__(self, ticket: _Optional[int] = ...) -> None: ...

class AwaitResponse(_message.Message):
    __slots__ = ("num_tokens", "handover")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    handover: Handover
    def __init__(self, num_tokens: _Optional[int] = ..., handover: _Optional[_Union[Handover, _Mapping]] = ...) -> None: ...

class TopToken(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("token_id", "logprob", "rank", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    rank: int
    top: _containers.RepeatedCompositeFieldContainer[TopToken]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top: _Optional[_Iterable[_Union[TopToken, _Mapping]]] = ...) -> None: ...

class Handover(_message.Message):
    __slots__ = ("token_ids", "seed", "position", "draft_exact", "num_cached_tokens", "logprobs", "prompt_logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    DRAFT_EXACT_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    seed: int
    position: int
    draft_exact: int
    num_cached_tokens: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., seed: _Optional[int] = ..., position: _Optional[int] = ..., draft_exact: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("tickets",)
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    tickets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tickets: _Optional[_Iterable[int]] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("lost",)
    LOST_FIELD_NUMBER: _ClassVar[int]
    lost: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lost: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("transfer_id", "consumer_id", "consumer_rank", "outcome", "reason")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_ID_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_RANK_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    consumer_id: str
    consumer_rank: int
    outcome: Outcome
    reason: str
    def __init__(self, transfer_id: _Optional[str] = ..., consumer_id: _Optional[str] = ..., consumer_rank: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("known", "freed")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    FREED_FIELD_NUMBER: _ClassVar[int]
    known: bool
    freed: bool
    def __init__(self, known: _Optional[bool] = ..., freed: _Optional[bool] = ...) -> None: ...

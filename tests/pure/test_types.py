"""Whatever crosses a process boundary arrives as it was sent, and nothing else arrives."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from msgspec import inspect

from paceline.runtime import channel, link, types
from paceline.runtime.ahead import messages as ahead
from paceline.runtime.transfer import messages
from paceline.runtime.types import (
    Event,
    RequestMetrics,
    SamplingParams,
    StageTimes,
    StructuredOutputs,
    WireType,
)

WIRE_TYPES = [
    each
    for module in (types, channel, link, messages, ahead)
    for each in vars(module).values()
    if isinstance(each, type) and issubclass(each, WireType) and each.__module__ == module.__name__
    if each is not WireType
]


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type. Knows only what may be sent: a tensor or an object has none."""
    return of_kind(inspect.type_info(annotation))


def of_kind(kind: inspect.Type, *, within: tuple[type, ...] = ()) -> st.SearchStrategy[Any]:
    """A struct within itself (`within`) has no values, so that a list of it is empty."""
    match kind:
        case inspect.Metadata():
            return of_kind(kind.type, within=within)
        case inspect.StructType():
            if kind.cls in within:
                return st.nothing()
            within = (*within, kind.cls)
            fields = {f.name: of_kind(f.type, within=within) for f in kind.fields}
            return st.builds(kind.cls, **fields)
        case inspect.VarTupleType():
            each = of_kind(kind.item_type, within=within)
            return st.just(()) if each.is_empty else st.lists(each, max_size=3).map(tuple)
        case inspect.TupleType():
            return st.tuples(*(of_kind(each) for each in kind.item_types))
        case inspect.DictType():
            keys, values_ = of_kind(kind.key_type), of_kind(kind.value_type)
            return st.dictionaries(keys, values_, max_size=3)
        case inspect.EnumType():
            return st.sampled_from(kind.cls)
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=kind.max_length or 8)
        case inspect.UnionType():
            return st.one_of(*(of_kind(each, within=within) for each in kind.types))
        case inspect.IntType():
            least = -(2**63) if kind.ge is None else kind.ge
            return st.integers(least, 2**63 - 1 if kind.le is None else kind.le)
        case inspect.FloatType():
            return st.floats(allow_nan=False)
        case inspect.StrType():
            return st.text(max_size=8)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
    raise AssertionError(f"expected something that can be sent, found {kind}")


@st.composite
def wire_values(draw: st.DrawFn) -> WireType:
    wire_value: WireType = draw(values(draw(st.sampled_from(WIRE_TYPES))))
    return wire_value


def test_the_list_of_wire_types_is_whole() -> None:
    assert [each.__name__ for each in WIRE_TYPES] == [
        "StructuredOutputs",
        "SamplingParams",
        "TokenLogprobs",
        "KvProduce",
        "KvFetch",
        "Request",
        "Handover",
        "DraftShape",
        "DraftForm",
        "ScheduledRequest",
        "StepPlan",
        "StageTimes",
        "RequestResult",
        "StepResult",
        "FetchAccount",
        "RequestMetrics",
        "Hop",
        "TokenDelta",
        "DraftPass",
        "StepStats",
        "KvLinks",
        "TransferTotals",
        "WayStatus",
        "EngineStatus",
        "Hello",
        "Answer",
        "Ready",
        "LinkAddress",
        "Submit",
        "Abort",
        "Forget",
        "Batch",
        "Lost",
        "Offer",
        "Complete",
        "Withdraw",
        "Fetch",
        "Cancel",
        "TransferStats",
        "Ended",
        "LinkReady",
        "Sync",
        "Commit",
        "Close",
        "Orders",
        "Tail",
        "Tails",
    ]


@given(wire_values())
def test_value_survives_messagepack(value: WireType) -> None:
    body = msgspec.msgpack.encode(value)
    assert msgspec.msgpack.decode(body, type=type(value)) == value


@given(wire_values())
def test_value_hashes_equal_after_messagepack(value: WireType) -> None:
    try:
        before = hash(value)
    except TypeError:
        reject()  # it holds a mapping, such as `logit_bias`
    assert hash(msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value))) == before


@given(wire_values())
def test_unknown_field_is_refused(value: WireType) -> None:
    fields = msgspec.to_builtins(value, builtin_types=(bytes,)) | {"surprise": 1}
    body = msgspec.msgpack.encode(fields)
    with pytest.raises(msgspec.ValidationError, match="surprise"):
        msgspec.msgpack.decode(body, type=type(value))


@given(wire_values())
def test_field_of_the_wrong_type_is_refused(value: WireType) -> None:
    name = type(value).__struct_fields__[0]
    body = msgspec.msgpack.encode(
        msgspec.to_builtins(value, builtin_types=(bytes,)) | {name: {"a": "mapping"}}
    )
    with pytest.raises(msgspec.ValidationError, match="object"):
        msgspec.msgpack.decode(body, type=type(value))


@given(wire_values())
def test_value_cannot_be_changed(value: WireType) -> None:
    name = type(value).__struct_fields__[0]
    with pytest.raises(AttributeError, match="immutable"):
        setattr(value, name, getattr(value, name))


@pytest.mark.parametrize("wire_type", WIRE_TYPES, ids=lambda each: each.__name__)
def test_fields_are_given_by_name_only(wire_type: type[WireType]) -> None:
    with pytest.raises(TypeError):
        wire_type("positional")


@pytest.mark.parametrize(
    "wire_type",
    [types.StepPlan, types.StepResult, channel.Hello, link.Submit, ahead.Orders, ahead.Tails],
)
def test_message_that_opens_or_answers_carries_the_version(wire_type: type[WireType]) -> None:
    version = next(f for f in msgspec.structs.fields(wire_type) if f.name == "version")
    assert version.default == types.WIRE_VERSION


def test_share_of_no_token_is_refused_on_arrival() -> None:
    body = msgspec.msgpack.encode({"request_id": "a", "num_tokens": 0})
    with pytest.raises(msgspec.ValidationError, match=">= 1"):
        msgspec.msgpack.decode(body, type=types.ScheduledRequest)


def test_stage_times_add_up_stage_by_stage() -> None:
    one = StageTimes(calibrate_ms=1.0, draft_ms=2.0, verify_ms=3.0)
    other = StageTimes(calibrate_ms=10.0, draft_ms=20.0, verify_ms=30.0)
    assert one.plus(other) == StageTimes(calibrate_ms=11.0, draft_ms=22.0, verify_ms=33.0)


def metrics(*events: tuple[Event, float], num_tokens: int = 5) -> RequestMetrics:
    return RequestMetrics(
        num_prompt_tokens=7,
        num_tokens=num_tokens,
        num_cached_tokens=0,
        rounds=0,
        drafted=0,
        accepted=0,
        accepted_at=(),
        times=StageTimes(),
        events=events,
    )


@pytest.mark.parametrize(("num_tokens", "decode_s", "speed"), [(5, 2.0, 2.0), (1, 0.0, 0.0)])
def test_decoding_speed_leaves_out_the_first_token(
    num_tokens: int, decode_s: float, speed: float
) -> None:
    found = metrics(
        (Event.FIRST_TOKEN, 10.0), (Event.FINISHED, 10.0 + decode_s), num_tokens=num_tokens
    )
    assert found.tokens_per_second == speed


def test_latencies_are_differences_of_events() -> None:
    found = metrics(
        (Event.QUEUED, 1.0),
        (Event.SCHEDULED, 3.0),
        (Event.PREEMPTED, 3.5),
        (Event.SCHEDULED, 4.0),
        (Event.FIRST_TOKEN, 4.5),
        (Event.FINISHED, 6.0),
    )
    prefill_s = found.between(Event.SCHEDULED, Event.FIRST_TOKEN)
    assert prefill_s == 1.5, "from when it was scheduled first"
    assert found.decode_s == 1.5
    assert found.at(Event.PREEMPTED) == 3.5


def test_latencies_of_what_never_happened_are_zero() -> None:
    found = metrics((Event.QUEUED, 1.0), (Event.FINISHED, 2.0))
    assert (found.decode_s, found.tokens_per_second) == (0.0, 0.0)
    assert found.at(Event.FIRST_TOKEN) is None


def test_params_that_differ_in_nothing_take_no_room() -> None:
    """They cross with every request: what is at its default is left out."""
    for nothing in (SamplingParams(), StructuredOutputs()):
        assert msgspec.to_builtins(nothing) == {}


@pytest.mark.parametrize(
    ("stop", "strings"), [((), ()), ("ab", ("ab",)), (("a", "b"), ("a", "b")), ("", ("",))]
)
def test_one_stop_string_or_several_come_to_the_same(
    stop: str | tuple[str, ...], strings: tuple[str, ...]
) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (1e-5, False), (1.0, False)])
def test_only_temperature_zero_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy

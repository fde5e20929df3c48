"""Whatever crosses a process boundary arrives as it was sent, and nothing else arrives."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from paceline.runtime import channel, types
from paceline.runtime.types import RequestMetrics, SamplingParams, StageTimes, WireType

WIRE_TYPES = [
    each
    for module in (types, channel)
    for each in vars(module).values()
    if isinstance(each, type) and issubclass(each, WireType) and each.__module__ == module.__name__
    if each is not WireType
]


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type. Knows only what may be sent: a tensor or an object has none."""
    return of_kind(inspect.type_info(annotation))


def of_kind(kind: inspect.Type) -> st.SearchStrategy[Any]:
    match kind:
        case inspect.Metadata():
            return of_kind(kind.type)
        case inspect.StructType():
            return st.builds(kind.cls, **{f.name: of_kind(f.type) for f in kind.fields})
        case inspect.VarTupleType():
            return st.lists(of_kind(kind.item_type), max_size=3).map(tuple)
        case inspect.UnionType():
            return st.one_of(*(of_kind(each) for each in kind.types))
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
        "SamplingParams",
        "Request",
        "ScheduledRequest",
        "StepPlan",
        "StageTimes",
        "RequestResult",
        "StepResult",
        "RequestMetrics",
        "TokenDelta",
        "Hello",
        "Answer",
    ]


@given(wire_values())
def test_value_survives_messagepack(value: WireType) -> None:
    body = msgspec.msgpack.encode(value)
    assert msgspec.msgpack.decode(body, type=type(value)) == value


@given(wire_values())
def test_value_is_equal_and_hashes_equal_after_messagepack(value: WireType) -> None:
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value))
    assert hash(again) == hash(value)


@given(wire_values())
def test_unknown_field_is_refused(value: WireType) -> None:
    fields = msgspec.to_builtins(value) | {"surprise": 1}
    body = msgspec.msgpack.encode(fields)
    with pytest.raises(msgspec.ValidationError, match="surprise"):
        msgspec.msgpack.decode(body, type=type(value))


@given(wire_values())
def test_field_of_the_wrong_type_is_refused(value: WireType) -> None:
    name = type(value).__struct_fields__[0]
    body = msgspec.msgpack.encode(msgspec.to_builtins(value) | {name: {"a": "mapping"}})
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


@pytest.mark.parametrize("wire_type", [types.StepPlan, types.StepResult, channel.Hello])
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


@pytest.mark.parametrize(("num_tokens", "decode_s", "speed"), [(5, 2.0, 2.0), (1, 0.0, 0.0)])
def test_decoding_speed_leaves_out_the_first_token(
    num_tokens: int, decode_s: float, speed: float
) -> None:
    metrics = RequestMetrics(
        num_prompt_tokens=7,
        num_tokens=num_tokens,
        rounds=0,
        drafted=0,
        accepted=0,
        times=StageTimes(),
        prefill_ms=1.0,
        decode_s=decode_s,
    )
    assert metrics.tokens_per_second == speed


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (1e-5, False), (1.0, False)])
def test_only_temperature_zero_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy

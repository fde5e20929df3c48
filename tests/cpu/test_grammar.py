"""Text written under a grammar always has its shape, drafted or not; bad grammars are refused."""

from __future__ import annotations

import contextlib
import json
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from paceline.runtime.errors import PromptError
from paceline.runtime.models import embedded
from paceline.runtime.sampling.batch import SampleRequest, SampleState, draft_tokens, target_tokens
from paceline.runtime.sampling.grammar import GrammarCompiler, GrammarState, check_grammar
from paceline.runtime.spec.tree import DraftTree
from paceline.runtime.spec.verify import verify_greedy
from paceline.runtime.types import Request, SamplingParams, StructuredOutputs

torch.set_num_threads(1)

CPU = torch.device("cpu")
VOCAB = 4096
EOS = (0,)

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bb"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEXES = [r"[0-9]{3}-(cat|dog)?", r"(ab|a)*c?", r"[a-f]{2,9}", r"x"]


@cache
def fast() -> Tokenizer:
    folder = Path(embedded.__file__).parent / "target"
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(fast(), vocab_size=VOCAB)


def start(**fields: Any) -> GrammarState:
    return compiler().start(StructuredOutputs(**fields), eos_token_ids=EOS)


def ids(text: str) -> tuple[int, ...]:
    return tuple(fast().encode(text).ids)


def allowed(mask: bytes | None) -> set[int]:
    assert mask is not None
    return {i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1}


def toy_logits(tokens: tuple[int, ...], *, seed: int) -> torch.Tensor:
    """A model that knows no shape at all, but likes to come to an end."""
    generator = torch.Generator().manual_seed(hash((tokens[-3:], seed)) % 2**31)
    logits = 2 * torch.randn(VOCAB, generator=generator)
    logits[0] += 9.0
    logits[1:97] += 3.0  # single characters, quotes and braces among them
    return logits


def make_state(
    outputs: StructuredOutputs,
    *,
    seed: int,
    written: tuple[int, ...] = (),
    eos: tuple[int, ...] = EOS,
    **params: Any,
) -> SampleState:
    request = Request(
        request_id="r",
        prompt_token_ids=(5,),
        params=SamplingParams(structured_outputs=outputs, **params),
        seed=seed,
        max_tokens=100,
        eos_token_ids=eos,
    )
    return SampleState(
        request, vocab_size=VOCAB, device=CPU, grammars=compiler(), output_token_ids=written
    )


def write(
    outputs: StructuredOutputs, *, seed: int, draft_length: int, most: int = 150, **params: Any
) -> tuple[int, ...]:
    """Whole rounds, until the end of text or `most` tokens; half of the drafts are wrong."""
    state = make_state(outputs, seed=seed, **params)
    text: tuple[int, ...] = ()
    while len(text) < most and 0 not in text:
        drafts: tuple[int, ...] = ()
        for depth in range(draft_length):
            one = SampleRequest(state=state, drafts=drafts)
            wrong = (len(text) + depth) % 4 == 3
            logits = toy_logits((*text, *drafts), seed=seed + wrong)
            drafts += (int(draft_tokens(logits.unsqueeze(0), [one])),)
        if len(text) % 5 == 4:
            drafts = (*drafts[:-1], 77)  # legal or not
        rows = [toy_logits((*text, *drafts[:row]), seed=seed) for row in range(1 + len(drafts))]
        (tokens,) = target_tokens(torch.stack(rows), [SampleRequest(state=state, drafts=drafts)])
        verdict = verify_greedy(DraftTree.chain(drafts), tokens)
        emitted = (*drafts[: verdict.num_accepted], verdict.token_id)
        state.commit(emitted)
        text += emitted
        if len(text) % 3 == 0:  # preempted: the state is made again
            state = make_state(outputs, seed=seed, written=text, **params)
    return text[: text.index(0) + 1] if 0 in text else text[:most]


SHAPES = [
    *(StructuredOutputs(regex=regex) for regex in REGEXES),
    StructuredOutputs(json=json.dumps(PERSON)),
    StructuredOutputs(choice=("yes", "no", "yes, but")),
    StructuredOutputs(grammar='start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,2}/\n'),
]


def has_shape(text: str, outputs: StructuredOutputs) -> bool:
    if outputs.regex is not None:
        return re.fullmatch(outputs.regex, text) is not None
    if outputs.json is not None:
        jsonschema.validate(json.loads(text), json.loads(outputs.json))
        return True
    if outputs.choice is not None:
        return text in outputs.choice
    bare = text.strip("()")
    return re.fullmatch(r"[0-9]{1,2}", bare) is not None and text.count("(") == text.count(")")


@pytest.mark.parametrize(
    "outputs", SHAPES, ids=lambda outputs: next(iter(msgspec.to_builtins(outputs)))
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_has_its_shape_and_is_the_same_with_drafts(
    outputs: StructuredOutputs, temperature: float
) -> None:
    ended = 0
    for seed in range(4):
        plain = write(outputs, seed=seed, draft_length=0, temperature=temperature)
        for draft_length in (1, 4):
            drafted = write(outputs, seed=seed, draft_length=draft_length, temperature=temperature)
            assert drafted == plain
        if plain[-1] == 0:
            ended += 1
            assert has_shape(fast().decode(plain), outputs)
    assert ended >= 2  # else this test says nothing


def test_text_without_the_mask_has_no_shape() -> None:
    request = Request(
        request_id="r", prompt_token_ids=(5,), params=SamplingParams(), seed=1, max_tokens=9
    )
    state = SampleState(request, vocab_size=VOCAB, device=CPU)
    for length in range(1, 9):
        logits = toy_logits((1,) * length, seed=length)
        logits[0] = -9.0
        ((token_id,),) = target_tokens(logits.unsqueeze(0), [SampleRequest(state=state)])
        assert not has_shape(fast().decode([token_id]), SHAPES[0])


def test_any_json_object_is_one() -> None:
    text = write(StructuredOutputs(json_object=True), seed=3, draft_length=2, most=400)
    assert text[-1] == 0
    assert isinstance(json.loads(fast().decode(text)), dict)


def test_the_end_is_allowed_where_the_grammar_may_stop_and_forced_where_it_must() -> None:
    state = start(regex="a(b|c)?")
    assert 0 not in allowed(state.mask())
    assert allowed(state.mask(ids("a"))) == {0, *ids("b"), *ids("c")}
    state.commit(ids("ab"))
    assert allowed(state.mask()) == {0}
    assert allowed(state.mask((0,))) == {0}
    state.commit((0,))
    assert allowed(state.mask()) == {0}
    state.commit((0, 17))  # ignore_eos: the text goes on, the grammar does not
    assert allowed(state.mask()) == {0}
    assert state.error is None


def test_masks_see_the_drafted_prefix_and_forget_it() -> None:
    state = start(regex=r"[0-9]{3}-(cat|dog)")
    one, dash, c = ids("1")[0], ids("-")[0], ids("c")[0]
    drafts = (one, one, one, dash, c)
    masks = state.masks(drafts)
    assert dash in allowed(masks[3])
    assert dash not in allowed(masks[2])
    assert c in allowed(masks[4])
    # Another chain from the same place, then the first again, then none.
    assert dash not in allowed(state.mask((one, one)))
    assert state.masks(drafts) == masks
    fresh = start(regex=r"[0-9]{3}-(cat|dog)")
    assert state.mask() == fresh.mask()
    state.commit((one, one))
    fresh.commit((one, one))
    assert state.masks((one, dash)) == fresh.masks((one, dash))


def test_rows_after_an_illegal_draft_are_left_alone() -> None:
    state = start(regex="[0-9]+")
    one, c = ids("1")[0], ids("c")[0]
    masks = state.masks((one, c, one, VOCAB + 7))
    assert [mask is None for mask in masks] == [False, False, True, True, True]
    assert state.mask((VOCAB,)) is None
    assert state.mask((-1,)) is None
    assert state.mask() == start(regex="[0-9]+").mask()
    assert state.error is None


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5, unique=True), st.data())
@settings(max_examples=60, deadline=None)
def test_every_choice_and_nothing_else_can_be_written(
    choices: list[str], data: st.DataObject
) -> None:
    state = start(choice=tuple(choices))
    choice = data.draw(st.sampled_from(choices))
    for token_id in ids(choice):
        assert token_id in allowed(state.mask())
        state.commit((token_id,))
    assert 0 in allowed(state.mask())
    longer = {other for other in choices if other.startswith(choice) and other != choice}
    assert bool(longer) == (allowed(state.mask()) != {0})


def test_a_text_must_end_even_if_min_tokens_asks_for_more() -> None:
    state = make_state(
        StructuredOutputs(regex="ab?"), seed=0, eos=(60,), min_tokens=9, temperature=0.0
    )
    logits = torch.zeros(1, VOCAB)
    logits[0, 60] = 5.0
    a, b = ids("a")[0], ids("b")[0]
    assert target_tokens(logits, [SampleRequest(state=state)]) == [[a]]
    rows = logits.expand(3, -1)
    # After `a` the end is banned, as b is possible; after `ab` there is nothing but the end.
    found = target_tokens(rows, [SampleRequest(state=state, drafts=(a, b))])
    assert found == [[a, b, 60]]


BAD = {
    "json": [
        '{"minimum": NaN}',
        '{"enum": ["\\ud800"]}',
        "{",
        "[1]",
        "7",
        '{"type": "frob"}',
        '{"$ref": "http://x.invalid/y"}',
        '{"$ref": "#"}',
    ],
    "regex": ["(", "\ud800", "a{3,1}", "(?=x)a"],
    "grammar": ["start: [", "stop: A", "start: start"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind in BAD for text in BAD[kind]])
def test_a_bad_grammar_is_refused_in_one_line(kind: str, text: str) -> None:
    with pytest.raises(PromptError, match=rf"^structured_outputs\.{kind} ") as caught:
        check_grammar(
            msgspec.convert({kind: text}, StructuredOutputs), compiler(), eos_token_ids=EOS
        )
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_without_an_end_of_text_token_no_shape_is_promised() -> None:
    with pytest.raises(PromptError, match="end-of-text token"):
        check_grammar(StructuredOutputs(regex="a"), compiler(), eos_token_ids=(VOCAB,))


HOSTILE = {
    "nested schema": StructuredOutputs(json='{"items":' * 500 + "{}" + "}" * 500),
    "schema nested beyond the parser": StructuredOutputs(json='{"items":' * 6_000),
    "many properties": StructuredOutputs(
        json=json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(2_000)}})
    ),
    "product of alternatives": StructuredOutputs(
        json=json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"a{i}{j}": {"type": "null"}}} for j in range(8)]}
                    for i in range(8)
                ]
            }
        )
    ),
    "counted repetition": StructuredOutputs(regex="a{1000000}"),
    "nested repetition": StructuredOutputs(regex="(?:(?:a{1,1000}){1,1000}){1,1000}"),
    "optional repetition": StructuredOutputs(regex="(?:x?){300}x{300}"),
    "deep parentheses": StructuredOutputs(regex="(" * 5_000 + "a" + ")" * 5_000),
    "ambiguous grammar": StructuredOutputs(grammar='start: e\ne: e e | "a" | "a" e | e "a" | ""\n'),
    "wide grammar": StructuredOutputs(
        grammar="start: " + " | ".join(f'"w{i}"' for i in range(4_000))
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_or_bounded(name: str) -> None:
    own = GrammarCompiler(fast(), vocab_size=VOCAB)
    began = time.process_time()
    with contextlib.suppress(PromptError):
        state = own.start(HOSTILE[name], eos_token_ids=EOS)
        for _ in range(20):
            state.commit((max(allowed(state.mask())),))
    assert time.process_time() - began < 20.0  # a tenth of it here; without bounds, minutes


def test_a_text_that_leaves_its_grammar_is_ended_and_says_so() -> None:
    state = start(regex="[0-9]+")
    state.commit(ids("c"))
    assert state.error is not None
    assert allowed(state.mask()) == {0}
    assert start(regex="[0-9]+").error is None  # the compiled grammar is not spoilt


def test_compiled_grammars_are_kept_but_not_without_end() -> None:
    own = GrammarCompiler(fast(), vocab_size=VOCAB)
    for i in range(100):
        own.start(StructuredOutputs(regex=f"a{i}"), eos_token_ids=EOS)
    assert len(own._compiled) == 32
    kept = own._compiled["regex", "a99", EOS]
    own.start(StructuredOutputs(regex="a99"), eos_token_ids=EOS)
    assert own._compiled["regex", "a99", EOS] is kept


def test_a_wider_model_than_its_tokenizer_is_masked_to_its_end() -> None:
    own = GrammarCompiler(fast(), vocab_size=5_001)
    state = own.start(StructuredOutputs(regex="[a-z ]+"), eos_token_ids=EOS)
    mask = state.mask(ids("a"))
    assert mask is not None
    assert len(mask) == 626
    assert max(allowed(mask)) < VOCAB

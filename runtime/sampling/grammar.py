"""Text of a given shape: which tokens a JSON schema, a regex or a grammar allows next.

Needs the tokenizer and llguidance, not torch, so that a frontend can refuse a bad grammar with the
very code that rank 0 runs.

A state is a cursor into the request's text and whatever is drafted after it. Masks are asked for by
drafted prefix; the cursor goes there, back over tokens that differ and on over the new ones.

    committed text          | drafts
    {"name":                |  "  Ada  ",  ...
                            ^ mask()   ^ mask((", Ada))

What keeps a hostile grammar from stopping the engine. Compiling is bounded by the length of the text
(`params.MAX_GRAMMAR_CHARS`), by nesting, by the number of symbols and by the work on its regexes;
each mask by the work of its lexer and its parser; memory by the lexer's states. Measured on one CPU
core over some forty hostile ones: at most 0.3 s to compile, 0.6 s for a first mask. `check_grammar`
does both in the frontend, where they stop nobody else. What runs into a bound only later, in the
middle of a text, is ended there.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer as FastTokenizer

from paceline.runtime.errors import PromptError
from paceline.runtime.types import StructuredOutputs

logger = logging.getLogger(__name__)

_K = TypeVar("_K")
_T = TypeVar("_T")

_MAX_NESTING = 64
_MAX_COMPILED = 32
_MAX_TOKENIZERS = 4
_LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Small models otherwise write line breaks between two JSON tokens until their length is up.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t]{1,16}"}


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the latest."""

    def __init__(self, tokenizer: FastTokenizer, *, vocab_size: int) -> None:
        """`vocab_size` is the model's: masks cover it. The tokenizer is read when the first grammar
        comes, which takes 10 ms for 4,096 tokens and about a second for 128k."""
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._tokenizers: OrderedDict[tuple[int, ...], LLTokenizer] = OrderedDict()
        self._compiled: OrderedDict[tuple[str, str, tuple[int, ...]], LLMatcher] = OrderedDict()

    def start(self, outputs: StructuredOutputs, *, eos_token_ids: Sequence[int]) -> GrammarState:
        """The state of a text that is still empty.

        Raises PromptError where the grammar cannot be compiled within bounds, has no text, or where
        there is no end-of-text token to end it with.
        """
        eos = tuple(i for i in dict.fromkeys(eos_token_ids) if 0 <= i < self.vocab_size)
        if not eos:
            raise PromptError("structured_outputs need a model with an end-of-text token")
        kind, text = _kind_and_text(outputs)
        key = (kind, text, eos)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compile(kind, text, eos)
            _remember(self._compiled, key, compiled, most=_MAX_COMPILED)
        else:
            self._compiled.move_to_end(key)
        return GrammarState(compiled, eos_token_ids=eos, vocab_size=self.vocab_size)

    def _compile(self, kind: str, text: str, eos: tuple[int, ...]) -> LLMatcher:
        try:
            source = _source(kind, text)
        except PromptError:
            raise
        except ValueError as error:  # lone surrogates, NaN: not what the library reads as text
            raise PromptError(
                f"structured_outputs.{kind} cannot be used: {_one_line(str(error))}"
            ) from None
        matcher = LLMatcher(self._llguidance(eos), source, log_level=0, limits=_LIMITS)
        first = matcher.deep_copy()
        if not first.is_error():
            first.compute_bitmask()  # much is only compiled when it is needed
        if first.is_error():
            raise PromptError(
                f"structured_outputs.{kind} cannot be used: {_one_line(first.get_error())}"
            )
        return matcher

    def _llguidance(self, eos: tuple[int, ...]) -> LLTokenizer:
        found = self._tokenizers.get(eos)
        if found is None:
            size = max(self.vocab_size, self._tokenizer.get_vocab_size())
            found = LLTokenizer(self._tokenizer.to_str(), n_vocab=size, eos_token=list(eos))
            _remember(self._tokenizers, eos, found, most=_MAX_TOKENIZERS)
        return found


class GrammarState:
    """What one request may write next.

    End of text is allowed exactly where the grammar may stop, and is all that is allowed where it
    must, and after the end.
    """

    def __init__(
        self, compiled: LLMatcher, *, eos_token_ids: tuple[int, ...], vocab_size: int
    ) -> None:
        self._compiled = compiled
        self._matcher = compiled.deep_copy()
        self._vocab_size = vocab_size
        self._mask_size = (vocab_size + 7) // 8
        self._committed: list[int] = []
        """Without what came after the end."""
        self._ahead: list[int] = []
        """Drafts that the matcher has consumed after the committed tokens."""
        self._masks: dict[tuple[int, ...], bytes | None] = {}
        """By drafted prefix, since the last commit."""
        self._eos_mask = _mask_of(eos_token_ids, size=self._mask_size)
        self.error: str | None = None
        """The bound that the grammar ran into, if it did: from then on only the end is allowed."""

    def mask(self, drafts: Sequence[int] = ()) -> bytes | None:
        """The tokens allowed after `drafts`: token i is bit i % 8 of byte i // 8.

        None where `drafts` are no text of the grammar: such a row is never used.
        """
        prefix = tuple(drafts)
        if prefix not in self._masks:
            self._masks[prefix] = self._compute(prefix)
        return self._masks[prefix]

    def masks(self, drafts: Sequence[int]) -> list[bytes | None]:
        """For each row of a chain, 1 + len(drafts) of them."""
        return [self.mask(drafts[:row]) for row in range(1 + len(drafts))]

    def commit(self, token_ids: Iterable[int]) -> None:
        """These tokens are now in the text."""
        tokens = tuple(token_ids)
        self._masks.clear()
        if self.error is not None or not tokens:
            return
        if self._move_to(tokens) or self._ended:
            self._committed += self._ahead
            self._ahead = []
            return
        # Not drawn under the mask, which only a text from elsewhere can be: end it here.
        self._fail(f"token {tokens[len(self._ahead)]} is not allowed")

    @property
    def _ended(self) -> bool:
        """Whether the grammar is complete, with its end-of-text token or still without it."""
        return self._matcher.is_stopped()

    def _compute(self, prefix: tuple[int, ...]) -> bytes | None:
        if self.error is not None:
            return self._eos_mask
        if not self._move_to(prefix):
            return self._eos_mask if self._ended else None
        if self._ended:
            return self._eos_mask
        mask = self._matcher.compute_bitmask()
        if not self._matcher.is_error():
            return mask[: self._mask_size]
        message = self._matcher.get_error()
        if prefix:
            # The draft ran into a bound, not the text: go back to the text as if it had not been.
            self._restart()
        else:
            self._fail(message)
        return self._eos_mask

    def _move_to(self, prefix: tuple[int, ...]) -> bool:
        """Put the cursor after `prefix`, or after as much of it as the grammar allows."""
        same = 0
        while same < min(len(prefix), len(self._ahead)) and prefix[same] == self._ahead[same]:
            same += 1
        if same < len(self._ahead):
            self._matcher.rollback(len(self._ahead) - same)
            del self._ahead[same:]
        for token_id in prefix[same:]:
            # The library takes a token beyond its vocabulary for an error of ours, for good.
            if not 0 <= token_id < self._vocab_size:
                return False
            if self._matcher.try_consume_tokens([token_id]) != 1:
                if self._matcher.is_error():
                    self._restart()
                return False
            self._ahead.append(token_id)
        return True

    def _restart(self) -> None:
        """A matcher that ran into a bound is of no more use; another reads the committed text."""
        self._matcher = self._compiled.deep_copy()
        self._ahead = []
        if not self._matcher.consume_tokens(self._committed):
            self._fail(self._matcher.get_error())

    def _fail(self, message: str) -> None:
        self.error = _one_line(message)
        logger.warning("structured output ended early: %s", self.error)


def check_grammar(
    outputs: StructuredOutputs, compiler: GrammarCompiler, *, eos_token_ids: Sequence[int]
) -> None:
    """Raise PromptError where `outputs` could not be served. For a frontend, before it queues."""
    compiler.start(outputs, eos_token_ids=eos_token_ids)


def _kind_and_text(outputs: StructuredOutputs) -> tuple[str, str]:
    """Which of its fields is set, and what identifies its grammar. `params.validate` has checked
    that there is exactly one."""
    if outputs.json is not None:
        return "json", outputs.json
    if outputs.json_object:
        return "json_object", '{"type": "object"}'
    if outputs.regex is not None:
        return "regex", outputs.regex
    if outputs.choice is not None:
        return "choice", json.dumps(outputs.choice)
    assert outputs.grammar is not None, "structured_outputs without a field set was not refused"
    return "grammar", outputs.grammar


def _source(kind: str, text: str) -> str:
    """The grammar as llguidance reads it."""
    if kind in ("json", "json_object"):
        return _schema_source(text)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        lark = " | ".join(json.dumps(choice) for choice in json.loads(text))
        return LLMatcher.grammar_from_lark(f"start: {lark}\n")
    return LLMatcher.grammar_from_lark(text)


def _schema_source(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"structured_outputs.json is not JSON: {_one_line(str(error))}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise PromptError(
            f"structured_outputs.json must be a schema, an object, found {type(schema).__name__}"
        )
    if _nesting(schema) > _MAX_NESTING:
        raise PromptError(f"structured_outputs.json must be nested at most {_MAX_NESTING} deep")
    schema.pop("x-guidance", None)  # options of the library's own are not the user's to set
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)  # type: ignore[arg-type]


def _nesting(value: object) -> int:
    """How deep lists and objects lie in each other; without recursion."""
    depth, level = 0, [value]
    while level:
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        depth, level = depth + 1, inner
    return depth


def _one_line(message: str) -> str:
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= 300 else f"{line[:300]}..."


def _mask_of(token_ids: Iterable[int], *, size: int) -> bytes:
    mask = bytearray(size)
    for token_id in token_ids:
        mask[token_id // 8] |= 1 << token_id % 8
    return bytes(mask)


def _remember(cache: OrderedDict[_K, _T], key: _K, value: _T, *, most: int) -> None:
    """Keep the `most` latest."""
    cache[key] = value
    while len(cache) > most:
        cache.popitem(last=False)

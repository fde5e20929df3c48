"""Which sampling parameters can be served: the bounds of every field, without torch.

A message begins with the parameter's name, so that a caller who reports one apart from the text can
take the first word.
"""

from __future__ import annotations

import math

import msgspec

from paceline.runtime.config import readable
from paceline.runtime.errors import PromptError
from paceline.runtime.types import SamplingParams, StructuredOutputs

MIN_TEMPERATURE = 1e-5
"""Below it, logits divided by the temperature may leave fp32."""
MAX_N = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_GRAMMAR_CHARS = 64 * 1024
"""Of a JSON schema, a regex, a grammar, or all choices together."""
MAX_CHOICES = 1024
_MAX_COUNT = 2**31 - 1


def validate(params: SamplingParams, *, vocab_size: int | None = None) -> None:
    """Raise PromptError, one line that names the parameter, its bounds and what was found.

    With `vocab_size`, token ids beyond the vocabulary are refused too. Whether a grammar compiles is
    not looked at: that is `grammar.check_grammar`.
    """
    _check_types(params)
    t = params.temperature
    if not (t == 0.0 or MIN_TEMPERATURE <= t < math.inf):
        raise PromptError(
            f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, found {t}"
        )
    if not -1 <= params.top_k <= _MAX_COUNT:
        raise PromptError(f"top_k must be positive, or 0 or -1 to keep all, found {params.top_k}")
    if not 0.0 < params.top_p <= 1.0:
        raise PromptError(f"top_p must be above 0 and at most 1, found {params.top_p}")
    if not 0.0 <= params.min_p <= 1.0:
        raise PromptError(f"min_p must be from 0 to 1, found {params.min_p}")
    if not 1 <= params.n <= MAX_N:
        raise PromptError(f"n must be from 1 to {MAX_N}, found {params.n}")
    if params.seed is not None and not -(2**63) <= params.seed < 2**63:
        raise PromptError(f"seed must fit in 64 bits with a sign, found {params.seed}")
    _check_lengths(params)
    _check_penalties(params)
    _check_stops(params)
    for name, count in (
        ("logprobs", params.logprobs),
        ("prompt_logprobs", params.prompt_logprobs),
    ):
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise PromptError(f"{name} must be from 0 to {MAX_LOGPROBS}, found {count}")
    if params.structured_outputs is not None:
        _check_structured(params.structured_outputs)
    if vocab_size is not None:
        _check_vocabulary(params, vocab_size)


def _check_types(params: SamplingParams) -> None:
    """A struct made in Python holds whatever it was given; one that was decoded does not."""
    outputs = params.structured_outputs
    if outputs is not None and not isinstance(outputs, StructuredOutputs):
        raise PromptError(
            f"structured_outputs must be a StructuredOutputs, found {type(outputs).__name__}"
        )
    biases = params.logit_bias
    if isinstance(biases, dict) and not all(isinstance(token_id, int) for token_id in biases):
        raise PromptError("logit_bias must be keyed by token ids, found other keys")
    try:
        msgspec.convert(msgspec.to_builtins(params), SamplingParams)
    except msgspec.ValidationError as error:
        raise PromptError(readable(str(error))) from None
    except (TypeError, OverflowError) as error:
        raise PromptError(f"sampling parameters must be plain values: {error}") from None


def _check_lengths(params: SamplingParams) -> None:
    most, least = params.max_tokens, params.min_tokens
    if most is not None and not 1 <= most <= _MAX_COUNT:
        raise PromptError(f"max_tokens must be at least 1, found {most}")
    if not 0 <= least <= _MAX_COUNT:
        raise PromptError(f"min_tokens must not be negative, found {least}")
    if most is not None and least > most:
        raise PromptError(f"min_tokens must be at most max_tokens, {most}, found {least}")


def _check_penalties(params: SamplingParams) -> None:
    if not 0.0 < params.repetition_penalty < math.inf:
        raise PromptError(f"repetition_penalty must be above 0, found {params.repetition_penalty}")
    for name, penalty in (
        ("presence_penalty", params.presence_penalty),
        ("frequency_penalty", params.frequency_penalty),
    ):
        if not -2.0 <= penalty <= 2.0:
            raise PromptError(f"{name} must be from -2 to 2, found {penalty}")
    biases = params.logit_bias or {}
    if len(biases) > MAX_LOGIT_BIASES:
        raise PromptError(
            f"logit_bias must have at most {MAX_LOGIT_BIASES} entries, found {len(biases)}"
        )
    for token_id, bias in biases.items():
        if token_id < 0:
            raise PromptError(f"logit_bias must not name negative token ids, found {token_id}")
        if not -100.0 <= bias <= 100.0:
            raise PromptError(
                f"logit_bias must be from -100 to 100, found {bias} for token {token_id}"
            )


def _check_stops(params: SamplingParams) -> None:
    strings = params.stop_strings
    if len(strings) > MAX_STOP_STRINGS:
        raise PromptError(
            f"stop must have at most {MAX_STOP_STRINGS} strings, found {len(strings)}"
        )
    for text in strings:
        if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
            raise PromptError(
                f"stop must have strings of 1 to {MAX_STOP_STRING_CHARS} characters, "
                f"found one of {len(text)}"
            )
    stop_ids = params.stop_token_ids
    if len(stop_ids) > MAX_STOP_TOKEN_IDS:
        raise PromptError(
            f"stop_token_ids must have at most {MAX_STOP_TOKEN_IDS} entries, found {len(stop_ids)}"
        )
    if any(token_id < 0 for token_id in stop_ids):
        raise PromptError(f"stop_token_ids must not be negative, found {min(stop_ids)}")


def _check_structured(outputs: StructuredOutputs) -> None:
    texts = {"json": outputs.json, "regex": outputs.regex, "grammar": outputs.grammar}
    given = [name for name, text in texts.items() if text is not None]
    given += ["json_object"] if outputs.json_object else []
    given += ["choice"] if outputs.choice is not None else []
    if len(given) != 1:
        raise PromptError(
            "structured_outputs must have exactly one of json, json_object, regex, choice and "
            f"grammar, found {' and '.join(given) or 'none'}"
        )
    for name, text in texts.items():
        if text is not None and not 1 <= len(text) <= MAX_GRAMMAR_CHARS:
            raise PromptError(
                f"structured_outputs.{name} must have 1 to {MAX_GRAMMAR_CHARS} characters, "
                f"found {len(text)}"
            )
    if outputs.choice is not None:
        if not 1 <= len(outputs.choice) <= MAX_CHOICES:
            raise PromptError(
                f"structured_outputs.choice must have 1 to {MAX_CHOICES} texts, "
                f"found {len(outputs.choice)}"
            )
        if not all(outputs.choice):
            raise PromptError("structured_outputs.choice must have no empty text, found one")
        total = sum(map(len, outputs.choice))
        if total > MAX_GRAMMAR_CHARS:
            raise PromptError(
                f"structured_outputs.choice must have at most {MAX_GRAMMAR_CHARS} characters, "
                f"found {total}"
            )


def _check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    for name, token_ids in (
        ("logit_bias", tuple(params.logit_bias or ())),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if token_ids and max(token_ids) >= vocab_size:
            raise PromptError(
                f"{name} must name token ids below {vocab_size}, found {max(token_ids)}"
            )

"""The OpenAI API's bodies: what is asked (checked field by field) and what is answered.

    bytes ──decode──> dict ──triage──> Struct ──> Prompt, SamplingParams
                             known, and used            ^
                             known, and changes nothing │  model, user, tools=[] ...
                             known, not supported       └─ 400, by name
                             unknown                       400, with the nearest name

Fields beyond OpenAI's are vLLM's, under vLLM's names. Chunks of a stream are put together from
bytes: they are the server's hot path.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from paceline.runtime.config import readable
from paceline.runtime.errors import EngineError, OverloadedError, UserError
from paceline.runtime.outputs import CompletionOutput, Logprob, Position, RequestOutput
from paceline.runtime.requests import Job
from paceline.runtime.tokenizer import Tokenizer
from paceline.runtime.types import (
    EngineRole,
    KvPolicyName,
    RequestMetrics,
    SamplingParams,
    StructuredOutputs,
)

FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot say."""
MAX_DEPTH = 100
"""Of lists and objects in a body. Whatever works on one by recursion has room for that."""


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        message = str(self)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """The status each of our errors has. Raises the error itself if it is none of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error), param=_param(str(error)))
    if isinstance(error, OverloadedError):
        return ApiError(
            429, str(error), code="server_overloaded", retry_after_s=error.retry_after_s
        )
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_unavailable")
    raise error


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stream says besides text."""

    include_usage: bool | None = None
    """One last chunk with the usage."""
    continuous_usage_stats: bool | None = None
    """The usage so far with every chunk."""
    include_obfuscation: bool | None = None
    """Accepted; there is none."""


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named JSON schema."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    """Accepted: a schema is always enforced."""


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What shape the text must have, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What shape the text must have, in vLLM's words: exactly one of these."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What completions and chats have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    kv_policy: KvPolicyName | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredBody | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    return_token_ids: bool = False
    return_metrics: bool = False
    priority: int = 0
    cache_salt: str = ""
    session_id: str | None = None
    """Requests of one session go to one engine where several serve."""
    prompt_cache_key: str | None = None
    """OpenAI's word for it."""
    num_draft_tokens: int | None = None
    request_id: str | None = None


class CompletionBody(GenerateBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    """A text, token ids, or a list of either."""
    echo: bool = False
    """The prompt before the text."""
    logprobs: int | None = None
    best_of: int | None = None


class ChatBody(GenerateBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize: of a prompt or of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class EngineBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /engines: what the new engine is for."""

    role: EngineRole


METADATA = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_retention", "parallel_tool_calls"),
    }
)
"""Accepted and without effect here: they say something about the caller, or about tools, of which there are none."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "echo": (False,),
    "documents": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "add_special_tokens": (True,),
    "include_reasoning": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "detokenize": (True,),
    "logits_processors": ([],),
    "return_tokens_as_token_ids": (False,),
    "mm_processor_kwargs": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
}
"""Known, not supported: with these values, or null, they change nothing and are accepted."""

Body = TypeVar("Body", bound=msgspec.Struct)


def decode_body(raw: bytes, kind: type[Body]) -> Body:
    """A body, checked. Raises ApiError, whose message names the field."""
    try:
        values = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise _too_deep() from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth(values) > MAX_DEPTH:
        raise _too_deep()
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    fields = kind.__struct_fields__
    known = {name: value for name, value in values.items() if value is not None and name in fields}
    for name, value in values.items():
        if name in fields or name in METADATA or value is None:
            continue
        _triage(name, value, fields)
    if "logit_bias" in known:  # msgspec takes 1e3 for no key, but must not see what is no object
        _check_biases(known["logit_bias"])
    try:
        return msgspec.convert(known, kind, str_keys=True)
    except msgspec.ValidationError as error:
        message = readable(str(error))
        raise ApiError(400, message, param=_param(message)) from None


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested too deeply: more than {MAX_DEPTH} levels")


def _depth(value: Any) -> int:
    """How deep lists and objects lie in each other; without recursion."""
    depth, level = 0, [value]
    while level:
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for many in inside for each in many if isinstance(each, dict | list)]
        depth += 1
    return depth


def _check_biases(biases: Any) -> None:
    if isinstance(biases, dict):
        for token_id in biases:
            if not re.fullmatch(r"-?[0-9]{1,18}", str(token_id)):
                message = f"logit_bias must be keyed by token ids, found {token_id!r:.40}"
                raise ApiError(400, message, param="logit_bias")


def _triage(name: str, value: Any, fields: Sequence[str]) -> None:
    """Raise for a field that would change the answer, or that nobody knows."""
    if name in NEUTRAL:
        if any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
            return
        raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
    near = difflib.get_close_matches(name[:80], [*fields, *METADATA], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    message = f"unknown field {name[:80]!r}{hint}"
    raise ApiError(400, message, param=name[:80], code="unknown_parameter")


_PASSED_ON = tuple(
    name
    for name in SamplingParams.__struct_fields__
    if name in GenerateBody.__struct_fields__ and name not in ("stop", "structured_outputs")
)


def sampling_params(body: CompletionBody | ChatBody) -> SamplingParams:
    """The parameters a body asks for. Raises ApiError for combinations that make no sense;
    `sampling.params.validate` knows the bounds."""
    values = {name: v for name in _PASSED_ON if (v := getattr(body, name)) is not None}
    if body.stop is not None:
        values["stop"] = body.stop if isinstance(body.stop, str) else tuple(body.stop)
        values["stop"] = values["stop"] or ()  # "" and [] both mean none
    if body.stop_token_ids is not None:
        values["stop_token_ids"] = tuple(body.stop_token_ids)
    values["structured_outputs"] = structured_outputs(body)
    if isinstance(body, CompletionBody):
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise ApiError(400, "best_of is not supported, unless it equals n", param="best_of")
        values["logprobs"] = body.logprobs
        if body.echo and body.logprobs is not None:
            if body.stream:
                raise ApiError(400, "echo with logprobs cannot be streamed", param="echo")
            values.setdefault("prompt_logprobs", body.logprobs)
    else:
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        values["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
        most = body.max_completion_tokens
        values["max_tokens"] = body.max_tokens if most is None else most
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(400, "prompt_logprobs cannot be streamed", param="prompt_logprobs")
    return SamplingParams(**values)


def structured_outputs(body: GenerateBody) -> StructuredOutputs | None:
    """What shape the text must have, whichever of the three ways it is asked for."""
    found: list[StructuredOutputs] = []
    wanted = body.response_format
    if wanted is not None and wanted.type == "json_object":
        found.append(StructuredOutputs(json_object=True))
    elif wanted is not None and wanted.type == "json_schema":
        schema = wanted.json_schema.schema if wanted.json_schema is not None else None
        if schema is None:
            message = "response_format.json_schema.schema is missing"
            raise ApiError(400, message, param="response_format")
        found.append(StructuredOutputs(json=_json_text(schema)))
    own = body.structured_outputs
    if own is not None:
        found.append(_structured(own.json, own.regex, own.choice, own.grammar, own.json_object))
    guided = (body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    if any(value is not None for value in guided):
        found.append(_structured(*guided, None))
    if len(found) > 1:
        message = "response_format, structured_outputs and guided_* exclude one another"
        raise ApiError(400, message, param="response_format")
    return found[0] if found else None


def _structured(
    schema: dict[str, Any] | str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
    json_object: bool | None,
) -> StructuredOutputs:
    return StructuredOutputs(
        json=schema if schema is None or isinstance(schema, str) else _json_text(schema),
        regex=regex,
        choice=None if choice is None else tuple(choice),
        grammar=grammar,
        json_object=bool(json_object),
    )


def _json_text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def completion_prompts(body: CompletionBody) -> list[str | list[int]]:
    """One text, several texts, one list of token ids, or several. Raises ApiError."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(type(part) is int for part in prompt):
        return [prompt]  # type: ignore[list-item]
    if not prompt:
        raise ApiError(400, "prompt is empty", param="prompt")
    if any(type(part) is int for part in prompt):
        raise ApiError(400, "prompt mixes token ids with other prompts", param="prompt")
    return prompt  # type: ignore[return-value]


def _param(message: str) -> str | None:
    """The field that a message is about: its first word, if that is one."""
    word = re.match(r"[a-z_]+", message)
    name = word[0] if word else ""
    known = {*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__}
    return name if name in {*known, *TokenizeBody.__struct_fields__, "tokens"} else None


# Answers


def usage(
    *,
    num_prompt_tokens: int,
    num_tokens: int,
    num_cached_tokens: int,
    metrics: Sequence[RequestMetrics],
) -> dict[str, Any]:
    """Tokens read and written. Drafts count as OpenAI's predicted tokens do."""
    answer: dict[str, Any] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }
    if metrics:
        accepted = sum(m.accepted for m in metrics)
        answer["completion_tokens_details"] = {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(m.drafted for m in metrics) - accepted,
        }
    return answer


def speculation(
    metrics: Sequence[RequestMetrics], *, num_spec_tokens: int
) -> dict[str, Any] | None:
    """How drafting went, summed over a response's texts, in vLLM's shape; None without a round."""
    rounds = sum(m.rounds for m in metrics)
    if not rounds:
        return None
    drafted, accepted = sum(m.drafted for m in metrics), sum(m.accepted for m in metrics)
    histogram = [0] * max(len(m.accepted_at) for m in metrics)
    for entry in metrics:
        for i, count in enumerate(entry.accepted_at):
            histogram[i] += count
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1.0 + accepted / rounds,
            "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "acceptance_histogram": histogram,
            "num_spec_steps": rounds,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
            "num_spec_tokens": num_spec_tokens,
        }
    }


def plain_logprobs(positions: Iterable[Position | None]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per position, by token id."""
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": max(entry.logprob, FLOOR),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in position.items()
        }
        for position in positions
    ]


def _token_id_fields(output: CompletionOutput, whole: RequestOutput) -> dict[str, Any]:
    """What `return_token_ids` adds to a choice."""
    return {
        "token_ids": output.token_ids,
        "num_accepted": output.num_accepted,
        "prompt_token_ids": whole.prompt_token_ids,
    }


class CompletionFormat:
    """How /v1/completions says things."""

    id_prefix = "cmpl-"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, tokenizer: Tokenizer | None, *, token_ids: bool, num_top: int | None):
        self._tokenizer = tokenizer
        self._token_ids = token_ids
        self._num_top = num_top
        self._first = 0
        """The prompt's first token, of which only the text is known."""
        self._offsets: dict[int, int] = {}
        """Per choice, where the next token's text begins; for `text_offset`."""

    def chunk(self, index: int, part: CompletionOutput, *, first: Job | None, echo: str) -> bytes:
        """A part of a text as a choice of a chunk; `first` with the first of its choice."""
        text, prompt_ids = part.text, b""
        if first is not None:
            text = echo + text
            self._offsets[index] = len(echo)
            prompt_ids = _prompt_ids(first) if self._token_ids else b""
        logprobs = b"null"
        if part.logprobs is not None:
            logprobs = _bytes(self._logprobs(index, part.logprobs))
        return b'{"index":%d,"text":%b,"logprobs":%b%b%b}' % (
            index,
            _bytes(text),
            logprobs,
            _ending(part, token_ids=self._token_ids),
            prompt_ids,
        )

    def choice(
        self, index: int, output: CompletionOutput, whole: RequestOutput, *, echo: str
    ) -> dict[str, Any]:
        """A whole text as a choice."""
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + output.text,
            "logprobs": None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._num_top is not None:
            positions: list[Position | None] = list(output.logprobs or [])
            if echo and whole.prompt_logprobs is not None:
                positions = self._prompt_positions(whole) + positions
            else:
                self._offsets[index] = len(echo)
            choice["logprobs"] = self._logprobs(index, positions)
        if whole.prompt_logprobs is not None:
            choice["prompt_logprobs"] = plain_logprobs(whole.prompt_logprobs)
        if self._token_ids:
            choice |= _token_id_fields(output, whole)
        return choice

    def _prompt_positions(self, whole: RequestOutput) -> list[Position | None]:
        """The prompt's, of which the first has no log-probability but a text."""
        assert whole.prompt_logprobs is not None, "asked for together with echo"
        self._first = whole.prompt_token_ids[0]
        return list(whole.prompt_logprobs)

    def _logprobs(self, index: int, positions: Sequence[Position | None]) -> dict[str, Any]:
        tokens, values, tops, offsets = [], [], [], []
        offset = self._offsets.get(index, 0)
        for position in positions:
            if position is None:
                text, value, top = self._text(self._first), None, None
            else:
                token_id, chosen = next(iter(position.items()))
                text, value = self._text(token_id), max(chosen.logprob, FLOOR)
                top = {
                    self._text(other): max(entry.logprob, FLOOR)
                    for other, entry in position.items()
                }
            tokens.append(text)
            values.append(value)
            tops.append(top if self._num_top else None)
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return {
            "text_offset": offsets,
            "token_logprobs": values,
            "tokens": tokens,
            "top_logprobs": tops if self._num_top else None,
        }

    def _text(self, token_id: int) -> str:
        return _token_text(self._tokenizer, token_id)


class ChatFormat:
    """How /v1/chat/completions says things."""

    id_prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer | None, *, token_ids: bool, num_top: int | None):
        self._tokenizer = tokenizer
        self._token_ids = token_ids
        self._num_top = num_top

    def chunk(self, index: int, part: CompletionOutput, *, first: Job | None, echo: str) -> bytes:
        """A part of a text as a choice of a chunk; `first`, which says who speaks, with the first of
        its choice."""
        assert not echo, "chats are not echoed"
        role, prompt_ids = b"", b""
        if first is not None:
            role = b'"role":"assistant",'
            prompt_ids = _prompt_ids(first) if self._token_ids else b""
        logprobs = b"null"
        if part.logprobs is not None:
            logprobs = _bytes(self._logprobs(part.logprobs))
        return b'{"index":%d,"delta":{%b"content":%b},"logprobs":%b%b%b}' % (
            index,
            role,
            _bytes(part.text),
            logprobs,
            _ending(part, token_ids=self._token_ids),
            prompt_ids,
        )

    def choice(
        self, index: int, output: CompletionOutput, whole: RequestOutput, *, echo: str
    ) -> dict[str, Any]:
        """A whole text as a choice."""
        assert not echo, "chats are not echoed"
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": None if output.logprobs is None else self._logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._token_ids:
            choice |= _token_id_fields(output, whole)
        return choice

    def _logprobs(self, positions: Sequence[Position]) -> dict[str, Any]:
        content = []
        for position in positions:
            entries = [self._entry(token_id, entry) for token_id, entry in position.items()]
            # the chosen token comes first; it is among the best ones only if it ranks with them
            rank = next(iter(position.values())).rank or math.inf
            best = entries if rank <= (self._num_top or 0) else entries[1:]
            best = sorted(best, key=_by_logprob)[: self._num_top or 0]
            content.append({**entries[0], "top_logprobs": best})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, entry: Logprob) -> dict[str, Any]:
        return {
            "token": _token_text(self._tokenizer, token_id),
            "logprob": max(entry.logprob, FLOOR),
            "bytes": _token_bytes(self._tokenizer, token_id),
        }


Format = CompletionFormat | ChatFormat


class ChunkFrame:
    """What all chunks of one stream begin and end with."""

    def __init__(
        self, form: Format, *, response_id: str, created: int, model: str, extra: Mapping[str, Any]
    ) -> None:
        head = {
            "id": response_id,
            "object": form.chunk_kind,
            "created": created,
            "model": model,
            **extra,
        }
        self._head = b"data: " + _bytes(head)[:-1] + b',"choices":['

    def event(self, choices: bytes, *, tail: bytes = b"") -> bytes:
        """One server-sent event. `tail` is more fields, with a comma before each."""
        return b"%b%b]%b}\n\n" % (self._head, choices, tail)


def field(name: str, value: Any) -> bytes:
    """One more field for `ChunkFrame.event`."""
    return b',"%b":%b' % (name.encode(), _bytes(value))


DONE = b"data: [DONE]\n\n"


def error_event(error: ApiError) -> bytes:
    """An error after the stream has begun."""
    return b"data: " + _bytes(error.body) + b"\n\n"


def _ending(part: CompletionOutput, *, token_ids: bool) -> bytes:
    """The fields that choices of both kinds end with."""
    if part.finish_reason is None:
        ending = b',"finish_reason":null'
    else:
        ending = b',"finish_reason":"%b","stop_reason":%b' % (
            part.finish_reason.encode(),
            _bytes(part.stop_reason),
        )
    if token_ids:
        ending += b',"token_ids":%b,"num_accepted":%d' % (_bytes(part.token_ids), part.num_accepted)
    return ending


def _by_logprob(entry: dict[str, Any]) -> float:
    return -float(entry["logprob"])


def _prompt_ids(job: Job) -> bytes:
    return b',"prompt_token_ids":' + _bytes(job.prompt_token_ids)


def _token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def _token_bytes(tokenizer: Tokenizer | None, token_id: int) -> list[int] | None:
    return None if tokenizer is None else list(tokenizer.token_bytes(token_id))


_bytes = msgspec.json.Encoder().encode

"""Chats as prompts: the model's own Jinja template, or a plain one for models that have none.

    messages ──checked──> roles and texts ──template, sandboxed──> text ──> token ids

A template is a program of whoever published the model: it runs in Jinja's sandbox and whatever it
raises is reported as an error of the request.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from paceline.runtime.errors import ConfigError, ModelError, PromptError
from paceline.runtime.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", *SPECIAL_TOKENS)
"""What `chat_template_kwargs` may not replace."""

PLAIN_TEMPLATE = """\
{% for message in messages %}
{% if message.role == 'assistant' %}
{{ message.content }}

{% else %}
{% for line in message.content.splitlines() %}
# {{ line }}
{% endfor %}
{% endif %}
{% endfor %}
"""
"""For models without one, such as those that continue code: what people say becomes comments, what the model said
stands as it is."""


class ChatTemplate:
    """Turns messages into a prompt.

    `ChatTemplate(tokenizer)` takes the model's own template, or the plain one; `file` replaces it.
    Raises ConfigError or ModelError for one that is no Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, *, file: str | None = None) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.chat_template
        source = PLAIN_TEMPLATE if own is None else own
        if file is not None:
            source = _read(file)
        self._plain = source is PLAIN_TEMPLATE
        self._knows_developer = self._plain or "developer" in source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            text = " ".join(str(error).split())
            if file is not None:
                raise ConfigError(f"{file} is no Jinja template: {text}") from None
            raise ModelError(f"{tokenizer.folder}: its chat template is no Jinja: {text}") from None
        self._tokens = {name: tokenizer.special_token(name) or "" for name in SPECIAL_TOKENS}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a chat. `settings` are the template's own variables. Raises PromptError."""
        for name in settings or {}:
            if name in RESERVED:
                raise PromptError(f"chat_template_kwargs may not set {name}")
        turns = [self._turn(message, i) for i, message in enumerate(messages)]
        if not turns:
            raise PromptError("messages is empty")
        try:
            return self._template.render(
                **(settings or {}),
                **self._tokens,
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except _Refusal as error:
            raise PromptError(f"messages: the chat template says: {error}") from None
        except Exception as error:  # of a program that is not ours
            reason = " ".join(str(error).split())
            raise PromptError(f"messages do not fit the chat template: {reason}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of what `render` gave. A template writes its own special tokens, so none are
        added, except to the plain one, which has none."""
        return self._tokenizer.encode(text, add_special_tokens=self._plain)

    def _turn(self, message: Mapping[str, Any], index: int) -> dict[str, Any]:
        where = f"messages[{index}]"
        role = message.get("role")
        if role not in ROLES:
            raise PromptError(f"{where}.role must be one of {', '.join(ROLES)}, found {role!r:.40}")
        if message.get("tool_calls"):
            raise PromptError(f"{where}.tool_calls: tools are not supported")
        if role == "developer" and not self._knows_developer:
            role = "system"
        turn = {"role": role, "content": _content(message.get("content"), where)}
        if isinstance(message.get("name"), str):
            turn["name"] = message["name"]
        return turn


def _content(content: Any, where: str) -> str:
    """A message's text, from a string or from parts of type text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PromptError(f"{where}.content must be a string or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", None) or not isinstance(text, str):
            raise PromptError(f"{where}.content: only parts of type text are supported")
        texts.append(text)
    return "\n".join(texts)


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - so named and typed by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refusal(Exception):  # noqa: N818 - it is the template's, not an error of ours
    """A template called `raise_exception`."""


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """What templates on the hub expect to find."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes for HTML, which a prompt is not."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read chat_template {path}: {error}") from None

"""Everything that decides a training run; `--help` is written from here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from paceline.runtime.config import readable, reject_unknown
from paceline.runtime.errors import ConfigError

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]
Policy = Literal["attention", "block"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. The same settings on the same machine give the same weights."""

    target: Annotated[
        str, Meta(description="The model to imitate: a folder, a hub id, or `embedded`.")
    ]
    data: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            description="Text to learn from: files and folders of UTF-8 text, each a document, and .jsonl files "
            "whose lines have `text` or `token_ids`.",
        ),
    ]
    output: Annotated[
        str,
        Meta(
            description="Where the drafter goes, a Hugging Face folder; the run's own files in training/ below it."
        ),
    ]
    drafter: Annotated[
        str | None, Meta(description="A model to start from: a folder or a hub id.")
    ] = None
    shape: Annotated[
        dict[str, Any] | None,
        Meta(
            description="Or a shape to start anew, as JSON: what differs from the target's config.json, such as "
            '{"num_hidden_layers": 8, "hidden_size": 512}.'
        ),
    ] = None
    steps: Annotated[int, Meta(ge=1, description="Optimizer steps.")] = 1000
    batch_size: Annotated[int, Meta(ge=1, description="Windows of a step.")] = 16
    micro_batch_size: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Windows that are in memory at once; all of a step if not given."),
    ] = None
    length: Annotated[int, Meta(ge=16, description="Tokens of a window.")] = 256
    learning_rate: Annotated[
        float, Meta(gt=0, description="At its highest; then it falls to zero along a cosine.")
    ] = 5e-4
    warmup: Annotated[
        float, Meta(ge=0, lt=1, description="Part of the steps in which it rises.")
    ] = 0.03
    weight_decay: Annotated[float, Meta(ge=0, description="AdamW's, of matrices.")] = 0.01
    max_grad_norm: Annotated[float, Meta(gt=0, description="Longer gradients are shortened.")] = 1.0
    divergence: Annotated[
        Divergence,
        Meta(
            description="What is made small between target and drafter; tvd is the chance that a draft is rejected."
        ),
    ] = "forward_kl"
    next_token_weight: Annotated[
        float,
        Meta(ge=0, le=1, description="Part of the loss that is the text's own next token."),
    ] = 0.0
    grouped_weight: Annotated[
        float,
        Meta(ge=0, description="Weight of the loss with layers side by side; exact rows weigh 1."),
    ] = 0.7
    layer_parallel_sizes: Annotated[
        tuple[Annotated[int, Meta(ge=2)], ...],
        Meta(min_length=1, description="Group sizes; each step draws one."),
    ] = (2, 3, 4)
    layer_parallel_policies: Annotated[
        tuple[Policy, ...],
        Meta(min_length=1, description="What runs side by side; each step draws one."),
    ] = ("attention", "block")
    exact_layers: Annotated[
        tuple[int, ...],
        Meta(description="Layers that always run alone; negative ones count from the end."),
    ] = (0, -1)
    num_speculative_tokens: Annotated[
        int,
        Meta(ge=2, description="Drafts of a round: the first from an exact row, the rest grouped."),
    ] = 5
    own_text: Annotated[
        int, Meta(ge=0, description="Texts to let the target write first, begun by pieces of data.")
    ] = 0
    own_text_share: Annotated[
        float, Meta(gt=0, le=1, description="Part of the windows that is cut from these.")
    ] = 0.33
    own_text_temperatures: Annotated[
        tuple[Annotated[float, Meta(ge=0)], ...],
        Meta(min_length=1, description="They are written at these temperatures in turn."),
    ] = (0.0, 0.8)
    held_out: Annotated[
        float, Meta(gt=0, lt=1, description="Part of the data that is only measured on.")
    ] = 0.02
    evaluation_windows: Annotated[int, Meta(ge=1, description="Windows of a measurement.")] = 32
    evaluate_every: Annotated[int, Meta(ge=1, description="Steps between measurements.")] = 100
    checkpoint_every: Annotated[
        int,
        Meta(
            ge=1, description="Steps between checkpoints; the same command goes on from the last."
        ),
    ] = 100
    seed: Annotated[int, Meta(ge=0, description="Of everything that is drawn.")] = 0
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Meta(
            description="Of products; weights are kept in float32. auto: bfloat16 where it is fast."
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="auto takes a GPU where there is one.")
    ] = "auto"


def make_settings(values: Mapping[str, Any]) -> Settings:
    """From plain values, texts included. Raises ConfigError, in one line, for unknown keys and bad
    values."""
    given = {key.replace("-", "_"): value for key, value in values.items()}
    reject_unknown(given, Settings.__struct_fields__, what="setting")
    if isinstance(given.get("shape"), str):
        given["shape"] = _json_object(given["shape"])
    try:
        settings = msgspec.convert(given, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(readable(str(error))) from None
    if (settings.drafter is None) == (settings.shape is None):
        raise ConfigError("give either drafter, a model to start from, or shape, to start anew")
    if settings.length < 2 * settings.num_speculative_tokens:
        raise ConfigError(
            f"num_speculative_tokens {settings.num_speculative_tokens} need a length of twice as many tokens, "
            f"not {settings.length}"
        )
    return settings


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"shape is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"shape must be a JSON object, found {text!r}")
    return value

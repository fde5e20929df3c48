"""The command line: `paceline serve`, `generate`, `submit`, `plan`, `doctor`, `top` and `check-lossless`.

Flags are the fields of `EngineConfig`, `ServerConfig`, `FleetConfig` and `SamplingParams`, so that they
are written once. Exit codes: 0 done, 1 the engine failed or a check did, 2 the user can mend it, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, get_args

import msgspec

from paceline.runtime.config import (
    EngineConfig,
    FleetConfig,
    ServerConfig,
    make_config,
    read_yaml,
    readable,
    reject_unknown,
)
from paceline.runtime.errors import ConfigError, PacelineError, UserError
from paceline.runtime.llm import LLM
from paceline.runtime.sampling.params import validate
from paceline.runtime.types import SamplingParams

EMBEDDED_DEFAULTS: dict[str, Any] = {
    "speculative_config": {
        "model": "embedded/drafter",
        "layer_parallel_size": 4,
        "layer_parallel_policy": "block",
    },
}
"""Without --model the embedded pair does the real job: a layer-parallel drafter, and two ranks where there are."""


class _Parser(argparse.ArgumentParser):
    """One clear line and exit code 2, without the usage block."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        args = parser().parse_args(argv)
        code: int = args.run(args)
        return code
    except UserError as error:
        print(f"paceline: {error}", file=sys.stderr)
        return 2
    except PacelineError as error:
        print(f"paceline: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("paceline: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@contextlib.contextmanager
def open_llm(settings: dict[str, Any]) -> Iterator[LLM]:
    """An `LLM` where the config says: on Ray unless told otherwise."""
    settings = dict(settings)
    backend = settings.setdefault("distributed_executor_backend", "ray")
    if backend == "ray":
        from paceline.actors.app import ray_llm

        llm = ray_llm(**settings)
    else:
        llm = LLM(**settings)
    with llm:
        yield llm


def engine_settings(
    args: argparse.Namespace, *, spare_cores: int = 0, num_engines: int = 1
) -> dict[str, Any]:
    """Flags over the config file over the embedded pair's defaults, which leave `spare_cores` to
    others and share the rest between `num_engines`."""
    given = {
        name: value
        for name, value in vars(args).items()
        if name in EngineConfig.__struct_fields__ and value is not None
    }
    file = read_yaml(args.config) if args.config else {}
    structs = (EngineConfig, ServerConfig, FleetConfig, SamplingParams)
    known = tuple(name for struct in structs for name in struct.__struct_fields__)
    reject_unknown(file, known, what=f"key in {args.config}")
    settings = {k: v for k, v in file.items() if k in EngineConfig.__struct_fields__} | given
    if "model" not in settings:
        settings = EMBEDDED_DEFAULTS | settings
        alone = make_config({**settings, "tensor_parallel_size": 1})
        cores = ((os.cpu_count() or 1) - spare_cores) // num_engines
        cores -= alone.num_ranks - alone.world_size  # a drafter that is ahead has its own
        one = settings.get("distributed_executor_backend") == "uni" or cores < 2
        settings.setdefault("tensor_parallel_size", 1 if one else 2)
    return settings


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Flags over the config file. The command line is greedy unless told otherwise."""
    file = read_yaml(args.config) if args.config else {}
    fields = SamplingParams.__struct_fields__
    values: dict[str, Any] = {"temperature": 0.0, "max_tokens": 128}
    values |= {key: value for key, value in file.items() if key in fields}
    values |= {k: v for k, v in vars(args).items() if k in fields and v is not None}
    if values.get("n", 1) != 1:
        raise ConfigError("n: a command line shows one text per prompt")
    for name in ("logit_bias", "structured_outputs"):
        if isinstance(values.get(name), str):
            values[name] = _json_object(values[name], what=name)
    try:
        params = msgspec.convert(values, SamplingParams, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(readable(str(error))) from None
    validate(params)  # `LLM` would too, but only once its ranks are up
    return params


def parser() -> argparse.ArgumentParser:
    """Of all commands. Raises ConfigError, not SystemExit, for what it does not know."""
    from paceline.actors.commands import check_lossless, doctor, generate, plan, serve, submit, top

    parser = _Parser(prog="paceline", description="Lossless speculative decoding on Ray.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for command in (serve, generate, check_lossless, submit, plan, doctor, top):
        first_line = str(command.__doc__).splitlines()[0]
        sub = commands.add_parser(command.NAME, help=first_line, description=first_line)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
        if command in (submit, plan, top):  # they start no engine from flags of ours
            continue
        engine = sub.add_argument_group("engine")
        engine.add_argument(
            "--config", metavar="FILE.yaml", help="All of these flags, as a mapping."
        )
        _add_fields(engine, EngineConfig, skip=command.POSITIONAL)
        if command in (serve, doctor):
            _add_fields(sub.add_argument_group("server"), ServerConfig, skip=())
            _add_fields(sub.add_argument_group("engines that serve together"), FleetConfig, skip=())
        else:  # --seed is the engine's; a command line shows one text per prompt
            _add_fields(sub.add_argument_group("sampling"), SamplingParams, skip=("seed", "n"))
    return parser


def _add_fields(
    group: argparse._ArgumentGroup, struct: type[msgspec.Struct], *, skip: tuple[str, ...]
) -> None:
    """One flag per field, its help being the field's description and its default."""
    for field in msgspec.structs.fields(struct):
        if field.name in skip:
            continue
        kind, help_text = _unwrap(field.type)
        flag = "--" + field.name.replace("_", "-")
        if field.default is not None:
            help_text += f" (default: {field.default})"
        help_text = help_text.replace("%", "%%")
        if kind is bool:
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=help_text
            )
        else:
            choices = get_args(kind) if str(kind).startswith("typing.Literal") else None
            parse = _PARSERS.get(kind, str)
            group.add_argument(
                flag,
                type=parse,
                choices=choices,
                default=None,
                help=help_text,
                metavar=None if choices else "X",
            )


def _unwrap(annotation: Any) -> tuple[Any, str]:
    """`Annotated[int | None, Meta(description=...)]` to `int` and the description."""
    info = msgspec.inspect.type_info(annotation)
    text = ""
    while isinstance(info, msgspec.inspect.Metadata):
        text = (info.extra_json_schema or {}).get("description", text)
        info = info.type
    if isinstance(info, msgspec.inspect.UnionType):
        info = next(t for t in info.types if not isinstance(t, msgspec.inspect.NoneType))
    if isinstance(info, msgspec.inspect.LiteralType):
        return _literal(info.values), text
    kinds: dict[type, type] = {
        msgspec.inspect.IntType: int,
        msgspec.inspect.FloatType: float,
        msgspec.inspect.BoolType: bool,
        msgspec.inspect.VarTupleType: tuple,
    }
    return kinds.get(type(info), str), text


def _literal(values: tuple[Any, ...]) -> Any:
    from typing import Literal

    return Literal[values]


def _json_object(text: str, *, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{what} must be a JSON object, found {text!r}")
    return value


def _token_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected ids with commas between, found {text!r}"
        ) from None


_PARSERS: dict[type, Callable[[str], Any]] = {
    int: int,
    float: float,
    tuple: _token_list,
}
"""How a flag's text becomes a value; texts stay as they are, JSON among them."""

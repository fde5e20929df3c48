"""`python -m paceline.runtime.spec.distill`: the settings as flags, the drafter's folder at the end."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import msgspec

from paceline.runtime.config import read_yaml
from paceline.runtime.errors import ConfigError, PacelineError, UserError
from paceline.runtime.spec.distill.settings import Settings, make_settings


class _Parser(argparse.ArgumentParser):
    """One clear line and exit code 2, without the usage block."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the exit code: 0 done, 1 failed, 2 the user can mend it, 130 interrupted."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    try:
        given = {k: v for k, v in vars(_parser().parse_args(argv)).items() if v is not None}
        file = given.pop("config", None)
        settings = make_settings((read_yaml(file) if file else {}) | given)
        from transformers.utils.logging import disable_progress_bar

        from paceline.runtime.spec.distill.training import Trainer

        disable_progress_bar()
        print(f"written: {Trainer(settings).run()}")
    except PacelineError as error:
        print(f"distill: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(
            "distill: interrupted; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m paceline.runtime.spec.distill",
        description="Train a drafter to imitate a target.",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="All of these, as a mapping.")
    hints = get_type_hints(Settings, include_extras=True)
    for field in msgspec.structs.fields(Settings):
        kind, meta = get_args(hints[field.name])[:2]
        text = meta.description
        if not field.required and field.default is not None:
            text += f" (default: {_shown(field.default)})"
        several: dict[str, Any] = {"nargs": "+"} if _is_tuple(kind) else {}
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            metavar="X",
            help=text.replace("%", "%%"),
            **several,
        )
    return parser


def _is_tuple(kind: Any) -> bool:
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return get_origin(kind) is tuple


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    sys.exit(main())

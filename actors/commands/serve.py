"""Serve a model to many users: the OpenAI API over HTTP, gRPC beside it, a page at /.

One engine, or several that serve together: some read prompts, others write texts.

bind ──> examine ──> engines ──> serving ──signal──> draining ──> closed, exit 0
 |          |           |           └──no engine left, and none to come──> exit 1
 └ exit 2 ──┴───────────┘           a second signal ends it at once
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import msgspec

from paceline.actors.engine_set import is_fleet
from paceline.actors.fleet import open_engines
from paceline.actors.supervisor import Supervisor
from paceline.runtime import logs
from paceline.runtime.config import (
    EngineConfig,
    FleetConfig,
    ServerConfig,
    check_fleet,
    make_config,
    make_fleet,
    read_yaml,
    readable,
)
from paceline.runtime.errors import ConfigError
from paceline.runtime.preflight import examine
from paceline.runtime.tls import check_tls
from paceline.runtime.tracing import otlp_target

logger = logging.getLogger(__name__)

NAME = "serve"
POSITIONAL: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("served", nargs="?", metavar="MODEL", help="The same as --model.")


def run(args: argparse.Namespace) -> int:
    from paceline.actors.frontends.auth import check_access
    from paceline.actors.frontends.grpc import reserve
    from paceline.actors.frontends.http import bind

    if args.served is not None:
        if args.model is not None and args.model != args.served:
            raise ConfigError(f"two models are named: {args.served} and {args.model}")
        args.model = args.served
    server, settings, config = read_settings(args)
    otlp_target(server)  # to refuse a wrong one before anything is started
    logs.configure(config, role="supervisor", log_requests=not server.disable_log_requests)
    check_access(server)
    check_tls(server, config)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(bind(server.host, server.port)))
        if server.grpc_port is not None:
            held = stack.enter_context(contextlib.closing(reserve(server.host, server.grpc_port)))
            server = msgspec.structs.replace(server, grpc_port=held.getsockname()[1])
        check = stack.enter_context(_terminable())
        facts = examine(config)
        check()
        supervisor = Supervisor(
            facts,
            config,
            server,
            settings,
            listener,
            open_engines=lambda on_change: open_engines(
                config, facts, settings, on_change=on_change, drain_s=server.shutdown_timeout
            ),
        )
        name = server.served_model_name or config.model
        return supervisor.run(
            lambda ports, engines: print(
                f"paceline: {name} is ready at {' and '.join(_urls(server, ports))}"
                f"{_by(engines) if is_fleet(settings, config) else ''}",
                flush=True,
            )
        )


def _urls(server: ServerConfig, ports: tuple[int, ...]) -> list[str]:
    http = "http" if server.ssl_certfile is None else "https"
    return [
        f"{scheme}{'s' if http == 'https' and scheme == 'grpc' else ''}://{_place(server.host, port)}"
        for scheme, port in zip((http, "grpc"), ports, strict=False)
    ]


def _by(engines: list[str]) -> str:
    *names, last = engines
    return f", served by {', '.join(names)} and {last}" if names else f", served by {last}"


def read_settings(args: argparse.Namespace) -> tuple[ServerConfig, FleetConfig, EngineConfig]:
    """What is to be served, how, and by which engines. Raises ConfigError."""
    from paceline.actors.cli import engine_settings

    server = server_config(args)
    settings = make_fleet(_given(args, FleetConfig))
    config = make_config(
        {
            "distributed_executor_backend": "ray",
            **engine_settings(args, spare_cores=1, num_engines=settings.num_engines),
        }
    )
    check_fleet(settings, config)
    if settings.decode_tensor_parallel_size is not None and not is_fleet(settings, config):
        size = settings.decode_tensor_parallel_size
        config = msgspec.structs.replace(config, tensor_parallel_size=size)
    return server, settings, config


def server_config(args: argparse.Namespace) -> ServerConfig:
    """Flags over the config file. Raises ConfigError."""
    try:
        return msgspec.convert(_given(args, ServerConfig), ServerConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(readable(str(error))) from None


def _given(args: argparse.Namespace, struct: type[msgspec.Struct]) -> dict[str, Any]:
    """What flags, or else the config file, say of a struct's fields."""
    fields = struct.__struct_fields__
    file = read_yaml(args.config) if args.config else {}
    values: dict[str, Any] = {key: value for key, value in file.items() if key in fields}
    return values | {k: v for k, v in vars(args).items() if k in fields and v is not None}


@contextlib.contextmanager
def _terminable() -> Iterator[Callable[[], None]]:
    """While the engine loads, SIGTERM is an interrupt like Ctrl-C, so that it is taken down. Yields what
    raises KeyboardInterrupt if there was one: a library may have kept it to itself."""
    told = False

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal told
        told = True
        raise KeyboardInterrupt

    def check() -> None:
        if told:
            raise KeyboardInterrupt

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

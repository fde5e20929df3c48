"""Serve a model to many users: the OpenAI API over HTTP, gRPC beside it, a page at /.

One engine, or several that serve together: some read prompts, others write texts.

bind ──> examine ──> connect ──> serving ──signal──> draining ──> closed, exit 0
 |          |           |           └──engine lost──> exit 1
 └ exit 2 ──┴───────────┘           a second signal ends it at once
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

import msgspec

from paceline.actors.fleet import Fleet, is_fleet, open_fleet
from paceline.runtime.async_llm import AsyncLLM
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
from paceline.runtime.engine import EngineClient
from paceline.runtime.errors import ConfigError, EngineError
from paceline.runtime.preflight import Facts, examine
from paceline.runtime.types import EngineStatus, TransferTotals

logger = logging.getLogger(__name__)

NAME = "serve"
POSITIONAL: tuple[str, ...] = ()
STATS_EVERY_S = 10.0
CLOSE_GRACE_S = 2.0
"""How long connections may take to end once their requests have."""


class Door(Protocol):
    """A running front end."""

    @property
    def port(self) -> int: ...

    async def stop(self, grace_s: float, /) -> None:
        """Take nothing new, end what is left after the grace."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("served", nargs="?", metavar="MODEL", help="The same as --model.")


def run(args: argparse.Namespace) -> int:
    import uvloop

    from paceline.actors.cli import engine_settings
    from paceline.actors.frontends.http import bind

    if args.served is not None:
        if args.model is not None and args.model != args.served:
            raise ConfigError(f"two models are named: {args.served} and {args.model}")
        args.model = args.served
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
    _log_to_stderr()
    with contextlib.closing(bind(server.host, server.port)) as listener, _terminable() as check:
        facts = examine(config)
        client = _open(config, facts, settings)
        try:
            check()
            work = serve(
                client, facts, config, server, listener, num_writers=settings.decode_replicas
            )
            return uvloop.run(work)
        finally:
            client.close()


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


async def serve(
    client: EngineClient,
    facts: Facts,
    config: EngineConfig,
    server: ServerConfig,
    listener: socket.socket,
    *,
    num_writers: int = 1,
) -> int:
    """Serve until a signal comes or the engine is lost; the exit code. `num_writers` engines can each
    run as many requests as the config says."""
    from paceline.actors.frontends import http
    from paceline.runtime.metrics import Metrics

    name = http.model_name(config, server)
    spec = config.speculative_config
    metrics = Metrics(
        name,
        version=http.version(),
        num_speculative_tokens=0 if spec is None else spec.num_speculative_tokens,
        vllm_names=server.enable_vllm_metric_names,
    )
    llm = AsyncLLM(client, facts, config, observer=metrics, num_engines=num_writers)
    fleet = client if isinstance(client, Fleet) else None
    app = http.make_app(llm, facts, config, server, exposition=metrics.exposition, fleet=fleet)
    doors: list[Door] = []
    try:
        with _stop_signals() as stop:
            llm.start()
            doors.append(await http.start(app, listener))
            urls = [f"http://{_place(server.host, doors[0].port)}"]
            if server.grpc_port is not None:
                from paceline.actors.frontends import grpc

                doors.append(await grpc.start(llm, facts, config, server))
                urls.append(f"grpc://{_place(server.host, doors[1].port)}")
            by = "" if fleet is None else f", served by {_names(fleet)}"
            print(f"paceline: {name} is ready at {' and '.join(urls)}{by}", flush=True)
            await _until_stopped(llm, stop, log_stats=not server.disable_log_stats)
            if llm.lost is not None:
                raise EngineError(f"the engine is lost: {llm.lost}")
            logger.info("stopping: %d requests may finish", llm.num_in_flight)
            await llm.drain(timeout_s=server.shutdown_timeout)
    finally:
        for door in doors:
            await door.stop(CLOSE_GRACE_S)
        await llm.close()
    return 0


async def _until_stopped(llm: AsyncLLM, stop: asyncio.Event, *, log_stats: bool) -> None:
    """Return at a signal or when the engine is lost; tell meanwhile how fast it is."""
    waiters = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(llm.wait_lost())]
    before, before_s = llm.status(), time.monotonic()
    try:
        while True:
            done, _ = await asyncio.wait(
                waiters, timeout=STATS_EVERY_S, return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                return
            now, now_s = llm.status(), time.monotonic()
            if log_stats and now.num_steps != before.num_steps:
                logger.info("%s", _stats(before, now, now_s - before_s))
            before, before_s = now, now_s
    finally:
        for waiter in waiters:
            waiter.cancel()


def _stats(before: EngineStatus, now: EngineStatus, seconds: float) -> str:
    """One line on what happened between two statuses."""
    drafted = now.drafted - before.drafted
    line = (
        f"{(now.generation_tokens - before.generation_tokens) / seconds:.0f} tokens/s written, "
        f"{(now.prompt_tokens - before.prompt_tokens) / seconds:.0f} tokens/s read; "
        f"{now.num_running} running, {now.num_waiting} waiting; "
        f"KV {1 - now.num_free_blocks / max(1, now.num_blocks):.0%} used"
    )
    if drafted > 0:
        line += f"; {(now.accepted - before.accepted) / drafted:.0%} of drafts accepted"
    return line + _transfer_stats(before.transfers, now.transfers)


def _transfer_stats(before: TransferTotals, now: TransferTotals) -> str:
    """What moved between engines; nothing if nothing did."""
    fetched, failed = now.fetched - before.fetched, now.failed - before.failed
    text = ""
    if fetched > 0:
        late_ms = 1e3 * (now.unoverlapped_s - before.unoverlapped_s) / fetched
        text = (
            f"; {fetched} prompts fetched, {(now.num_bytes - before.num_bytes) / 1e6:.1f} MB, "
            f"{late_ms:.0f} ms of each not overlapped"
        )
    return f"{text}; {failed} fetches failed" if failed > 0 else text


def _names(fleet: Fleet) -> str:
    *names, last = [each.engine_id for each in fleet.engines()]
    return f"{', '.join(names)} and {last}" if names else last


def _open(config: EngineConfig, facts: Facts, settings: FleetConfig) -> EngineClient:
    if is_fleet(settings, config):
        return open_fleet(config, facts, settings)
    return _connect(config, facts)


def _connect(config: EngineConfig, facts: Facts) -> EngineClient:
    if config.distributed_executor_backend == "ray":
        from paceline.actors import app

        return app.connect(config, facts)
    from paceline.runtime import local

    return local.connect(config, facts)


@contextlib.contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    """An event that the first signal sets; the second ends the process."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


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


def _log_to_stderr() -> None:
    log = logging.getLogger("paceline")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

"""Both doors of a server with an engine behind them, on an event loop in a thread of its own, for
tests that come in through a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from tests.engines import NUM_BLOCKS, FakeEngine, fake_facts

from paceline.actors.frontends import grpc as grpc_door
from paceline.actors.frontends import http as http_door
from paceline.runtime.async_llm import AsyncLLM
from paceline.runtime.config import EngineConfig, ServerConfig
from paceline.runtime.tls import server_tls

T = TypeVar("T")

TIMEOUT_S = 20.0


class Doors:
    """A server. `stop` it after the test."""

    def __init__(
        self,
        folder: Path,
        engine: FakeEngine,
        config: EngineConfig,
        *,
        key: str | None = None,
        http: bool = True,
        **server: Any,
    ) -> None:
        """`server` are settings of it."""
        self.engine = engine
        self.facts = fake_facts(folder)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.llm: AsyncLLM
        self.grpc: grpc_door.GrpcServer
        self.http: http_door.HttpServer | None = None
        server_config = ServerConfig(grpc_port=0, api_key=key, **server)
        self._tls = server_tls(server_config)
        self.do(self._start(config, server_config, http))

    async def _start(self, config: EngineConfig, server_config: ServerConfig, http: bool) -> None:
        self.llm = AsyncLLM(self.engine, self.facts, config)
        self.llm.start()
        self.grpc = await grpc_door.start(self.llm, self.facts, config, server_config)
        if http:
            app = http_door.make_app(self.llm, self.facts, config, server_config)
            listener = socket.create_server((server_config.host, 0))
            listener.setblocking(False)
            self.http = await http_door.start(app, listener, tls=self._tls)

    @property
    def grpc_url(self) -> str:
        return f"grpc{'' if self._tls is None else 's'}://127.0.0.1:{self.grpc.port}"

    @property
    def http_url(self) -> str:
        assert self.http is not None, "expected the HTTP door to be open"
        return f"http{'' if self._tls is None else 's'}://127.0.0.1:{self.http.port}"

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT_S)

    def settles(self) -> bool:
        """Whether nothing runs or is held any more, soon."""
        return eventually(
            lambda: (
                self.engine.idle
                and self.llm.num_in_flight == 0
                and self.engine.status().num_free_blocks == NUM_BLOCKS
            )
        )

    def stop(self) -> None:
        self.do(self.grpc.stop(0))
        if self.http is not None:
            self.do(self.http.stop(0))
        self.do(self.llm.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)


def eventually(condition: Callable[[], bool], *, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True

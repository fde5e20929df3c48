"""A server of the same settings, started to be tried and ended again.

It runs as `paceline serve` does, in processes of its own, but listens on free ports of this machine
alone, under a key that is made up: what it is asked comes from here.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import httpx
import msgspec
import yaml

from paceline.actors.checks.check import Finding, failed, ok
from paceline.runtime.config import EngineConfig, FleetConfig, ServerConfig
from paceline.runtime.errors import DeadlineError, EngineError

READY = re.compile(r"paceline: .* is ready at (http://\S+?) and (grpc://[^\s,]+)")
GRACE_S = 30.0
"""What a start may take beyond the time for loading, and an end."""


class Trial(NamedTuple):
    """A server that serves."""

    url: str
    grpc_url: str
    api_key: str
    process: subprocess.Popen[str]

    def client(self, *, timeout_s: float) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s)

    def stop(self) -> Finding:
        """Whether it ends as it should when it is told to."""
        began_s = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return failed(f"it does not end within {GRACE_S:.0f} s of SIGTERM")
        seconds = time.monotonic() - began_s
        text = f"ended with exit code {code}, {seconds:.1f} s after SIGTERM"
        return ok(text) if code == 0 else failed(text, "it should have been 0")


@contextlib.contextmanager
def trial(config: EngineConfig, settings: FleetConfig) -> Iterator[Trial]:
    """Raises EngineError, in the server's own words, where it does not come up."""
    key = secrets.token_urlsafe(16)
    server = ServerConfig(port=0, grpc_port=0, shutdown_timeout=1.0, disable_log_requests=True)
    with tempfile.TemporaryDirectory(prefix="paceline-doctor-") as folder:
        path = Path(folder) / "settings.yaml"
        path.write_text(yaml.safe_dump(_settings(config, settings, server)))
        log_path = Path(folder) / "log"
        with log_path.open("w+") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "paceline", "serve", "--config", str(path)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PACELINE_API_KEY": key},
            )
            try:
                url, grpc_url = _wait_ready(process, log, config.load_timeout_s + GRACE_S)
                yield Trial(url=url, grpc_url=grpc_url, api_key=key, process=process)
            finally:
                _end(process)


def _settings(
    config: EngineConfig, settings: FleetConfig, server: ServerConfig
) -> dict[str, object]:
    """As a config file has them. Whatever can be read elsewhere is: a transfer that is never made is not
    tried."""
    routed = msgspec.structs.replace(settings, routing_policy="always")
    found: dict[str, object] = {}
    for struct in (config, routed, server):
        found |= msgspec.to_builtins(struct)
    return found


def _wait_ready(process: subprocess.Popen[str], log: IO[str], timeout_s: float) -> tuple[str, str]:
    assert process.stdout is not None
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout_s, give_up)
    timer.start()
    try:
        for line in process.stdout:
            if ready := READY.match(line):
                return ready[1], ready[2]
    finally:
        timer.cancel()
    if late.is_set():
        raise DeadlineError(f"waited {timeout_s:.0f} s for the server to be ready")
    process.wait(GRACE_S)
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    last = lines[-1] if lines else f"exit code {process.returncode}, and nothing in its log"
    raise EngineError(f"the server did not start: {last.removeprefix('paceline: ')}")


def _end(process: subprocess.Popen[str]) -> None:
    """However it is."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(GRACE_S)
    if process.stdout is not None:
        process.stdout.close()

"""Server processes of a benchmark: started, waited for, stopped with all that they started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path


class StartError(Exception):
    """A server did not come up; one line says why."""


@contextlib.contextmanager
def serving(
    command: Sequence[str],
    *,
    ready: Callable[[str], str | None],
    deadline_s: float,
    env: Mapping[str, str] | None = None,
    on_start: Callable[[int], None] = lambda _: None,
    on_end: Callable[[int | None], None] = lambda _: None,
    log: str | None = None,
) -> Iterator[str]:
    """A server process, started, waited for and stopped; the URL it serves.

    `ready` is shown all that the server has written and answers the URL once it can be used;
    `on_start` is told the process's id, `on_end` its exit code, None if it did not end, before what it
    left behind is ended. What it writes goes to the file `log`, if that is to be kept.
    Raises StartError if the process ends or the deadline passes before.
    """
    with tempfile.TemporaryFile("w+") if log is None else Path(log).open("w+") as written:
        process = subprocess.Popen(
            command,
            stdout=written,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # so that what it starts can be ended with it
        )
        on_start(process.pid)

        def said() -> str:
            size = os.fstat(written.fileno()).st_size
            return os.pread(written.fileno(), size, 0).decode(errors="replace")

        try:
            deadline = time.monotonic() + deadline_s
            while (url := ready(said())) is None:
                if process.poll() is not None:
                    raise StartError(f"exit code {process.returncode}: {_reason(said())}")
                if time.monotonic() > deadline:
                    raise StartError(f"not ready within {deadline_s:g} s: {_reason(said())}")
                time.sleep(0.1)
            yield url
        finally:
            _stop(process, on_end)


def ready_line(said: str) -> str | None:
    """`paceline serve` says where it is."""
    match = re.search(r"is ready at (http[^\s,]+)[\s,]", said)
    return match[1] if match else None


def paceline_command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "paceline", "serve", *flags, "--port", "0"]


def _reason(said: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w*(Error|error|Exception)\b|^paceline:", line)]
    return (errors or lines or ["it wrote nothing"])[-1][:400]


def _stop(process: subprocess.Popen[bytes], on_end: Callable[[int | None], None]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=45)
    on_end(process.returncode)
    with contextlib.suppress(ProcessLookupError):  # what it left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

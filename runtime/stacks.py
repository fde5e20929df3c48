"""What a process is doing, asked from outside, even if it hangs in compiled code and holds the
interpreter: its stacks, by a signal.

    allow()  in the process:  SIGUSR2 ──> every thread's stack into a memfd
    take()   from outside:    signal, wait, read the memfd through /proc
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from pathlib import Path

import psutil

ANSWER_S = 2.0
_NAME = "paceline-stacks"


def allow() -> None:
    """From now on this process tells its stacks when asked. Nothing is left behind when it ends."""
    fd = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    faulthandler.register(signal.SIGUSR2, file=fd, all_threads=True)


def take(pid: int, *, timeout_s: float = ANSWER_S) -> str:
    """The stacks of all threads of a process of this host and user, most recent call first; where
    there are none to be had, why."""
    try:
        process = psutil.Process(pid)
        told = _memfd(pid)
        if told is None:
            return f"process {pid} ({process.status()}) does not tell its stacks"
        before = told.stat().st_size
        os.kill(pid, signal.SIGUSR2)
        size = _settled_size(told, before, deadline_s=time.monotonic() + timeout_s)
        if size == before:
            return f"process {pid} says nothing: it is {process.status()}"
        with told.open("rb") as file:
            file.seek(before)
            return file.read(size - before).decode(errors="replace").strip()
    except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
        return f"process {pid} is gone"
    except OSError as error:
        return f"process {pid} cannot be asked: {error.strerror}"


def _memfd(pid: int) -> Path | None:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if _NAME in str(link.readlink()):
                return link
        except FileNotFoundError:  # closed meanwhile
            continue
    return None


def _settled_size(told: Path, before: int, *, deadline_s: float) -> int:
    """The file's size once it has grown and stands still, or at the deadline."""
    last = before
    while time.monotonic() < deadline_s:
        time.sleep(0.05)
        size = told.stat().st_size
        if size > before and size == last:
            return size
        last = size
    return last

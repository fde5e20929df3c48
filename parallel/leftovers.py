"""What processes that were killed leave in shared memory and in /tmp, for others of this user to take away."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import psutil

_SHM = Path("/dev/shm")
_REGISTERED = re.compile(r"__KMP_REGISTERED_LIB_(\d+)_(\d+)")
"""OpenMP's note of which process has loaded it, and of which user: a page that it takes back when it ends by itself."""


def sweep_after(pids: Collection[int], *, timeout_s: float) -> None:
    """`sweep`, once these processes of this host are gone, or the time is over."""
    deadline_s = time.monotonic() + timeout_s
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    sweep()


def prefix() -> str:
    """How the name of a temporary folder begins that is to be swept away if this process is killed."""
    return f"paceline-{_namespace()}-{os.getpid()}-"


def sweep(folder: Path = _SHM) -> int:
    """Remove what processes of this user have left that are no more; how many things there were."""
    count = 0
    for path in Path(tempfile.gettempdir()).glob(f"paceline-{_namespace()}-*"):
        pid = path.name.split("-")[2]
        if not pid.isdigit() or psutil.pid_exists(int(pid)) or path.stat().st_uid != os.getuid():
            continue
        shutil.rmtree(path, ignore_errors=True)
        count += 1
    for path in folder.glob("__KMP_REGISTERED_LIB_*"):
        named = _REGISTERED.fullmatch(path.name)
        if named is None or int(named[2]) != os.getuid() or psutil.pid_exists(int(named[1])):
            continue
        path.unlink(missing_ok=True)
        count += 1
    return count


def _namespace() -> int:
    """Of process ids: who shares our /tmp from another container has ids that mean nothing here."""
    return Path("/proc/self/ns/pid").stat().st_ino

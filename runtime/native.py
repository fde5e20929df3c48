"""C++ that lies beside the Python calling it: compiled once per machine, loaded with ctypes.

Imports nothing heavy: processes without torch use it too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno")
BUILD_TIMEOUT_S = 120.0

LOAD_ERRORS = (OSError, subprocess.SubprocessError, AttributeError)
"""What loading a library and finding its functions may raise."""


def load_library(source: Path) -> ctypes.CDLL:
    """Built first where it is not there yet, in a few seconds. Raises one of LOAD_ERRORS."""
    path = library_path(source)
    if not path.exists():
        _build(source, path)
    return ctypes.CDLL(str(path))


def library_path(source: Path) -> Path:
    """One file per source with the headers beside it, flags and processor."""
    sources = [source, *sorted(source.parent.glob("*.h"))]
    facts = (
        b"".join(each.read_bytes() for each in sources),
        " ".join(FLAGS),
        platform.processor(),
        _cpu_flags(),
    )
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "paceline" / f"{source.stem}-{name}.so"


def function(
    library: ctypes.CDLL, name: str, signature: tuple[type, ...], *, result: type | None = None
) -> Callable[..., Any]:
    """Raises AttributeError where the library lacks it."""
    found = getattr(library, name)
    found.argtypes, found.restype = signature, result
    return found  # type: ignore[no-any-return]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(source: Path, path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # ranks may build at once
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, "-shared", "-fPIC", "-o", str(made), str(source)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            raise OSError((done.stderr.strip().splitlines() or ["compiler failed"])[0])
        made.replace(path)

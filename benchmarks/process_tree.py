"""What every process of a server holds: memory, files, threads; and how that grows.

    supervisor ── frontend            its child that listens where clients knock
             ├── engine ── rank ── link
             └── Ray's own            raylet, GCS, agents, idle workers; actors of ours run in its workers

Memory that is a process's own is what it has written and nobody else can read: anonymous pages. Pages of libraries are
left out, for which process has them to itself changes with whatever else runs on the machine (in USS they count, 15 MB
of them in a rank). Memory that processes share counts for each by its share (PSS).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.census import shared_files

MB = 1e6
_RAYS_OWN = (
    "raylet",
    "gcs_server",
    "DashboardAgent",
    "RuntimeEnvAgent",
    "dashboard",
    "log_monitor",
    "monitor.py",
    "runtime_env",
    "ray::IDLE",
)
"""What their command lines hold, the first that fits being the name."""
RAYS_OWN = "Ray: "
"""How their names begin."""


class Sample(NamedTuple):
    """Of one process at one moment."""

    at_s: float
    own_mb: float
    pss_mb: float
    rss_mb: float
    num_fds: int
    num_threads: int


class Slope(NamedTuple):
    """Of a straight line through samples, by least squares."""

    per_hour: float
    standard_error: float | None
    """None where there are too few samples to tell."""


@dataclass(slots=True, kw_only=True)
class Watched:
    """A process and what was seen of it."""

    pid: int
    name: str
    is_rays: bool
    samples: list[Sample] = field(default_factory=list)

    def after(self, at_s: float) -> list[Sample]:
        return [sample for sample in self.samples if sample.at_s >= at_s]


class ProcessTree:
    """A process and all below it, as they come and go."""

    def __init__(self, root: int, *, port: int) -> None:
        """`port`: where clients knock."""
        self._root = psutil.Process(root)
        self._port = port
        self._began_s = time.monotonic()
        self._known: dict[tuple[int, float], Watched] = {}
        self._shared_bytes: list[tuple[float, int]] = []

    @property
    def watched(self) -> list[Watched]:
        """All ever seen, the root first."""
        return list(self._known.values())

    @property
    def shared_bytes(self) -> list[tuple[float, int]]:
        """Of files in /dev/shm that they map: seconds since the beginning, and bytes."""
        return self._shared_bytes

    def now_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began_s

    def look(self) -> dict[int, Sample]:
        """Sample every process that there is; by its id."""
        at_s, seen, shared = self.now_s(), {}, set[str]()
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(
                psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess
            ):
                key = (process.pid, process.create_time())
                if key not in self._known:
                    self._known[key] = self._watch(process)
                memory = process.memory_full_info()
                sample = Sample(
                    at_s=at_s,
                    own_mb=_anonymous_bytes(process.pid) / MB,
                    pss_mb=memory.pss / MB,
                    rss_mb=memory.rss / MB,
                    num_fds=process.num_fds(),
                    num_threads=process.num_threads(),
                )
                self._known[key].samples.append(sample)
                seen[process.pid] = sample
                shared |= shared_files(process)
        self._shared_bytes.append((at_s, sum(_size(path) for path in shared)))
        return seen

    def _watch(self, process: psutil.Process) -> Watched:
        name = name_of(process, root=self._root, port=self._port)
        return Watched(pid=process.pid, name=name, is_rays=name.startswith(RAYS_OWN))


def name_of(process: psutil.Process, *, root: psutil.Process, port: int) -> str:
    """What a process of a server is. Frontends are told from engines by their `port`. Raises
    psutil.Error for one that is gone."""
    words = process.cmdline()
    line = " ".join(words)
    if process == root:
        return "supervisor"
    if "paceline.runtime.transfer.process" in line:
        return "link"
    for own in _RAYS_OWN:
        if own in line:
            return f"{RAYS_OWN}{own.removesuffix('.py')}"
    if words and words[0].startswith("ray::"):
        return words[0].split(".")[0].split()[0].removeprefix("ray::")
    if "resource_tracker" in line:
        return "resource tracker"
    if "spawn_main" not in line:
        return Path(words[0]).name if words else process.name()
    if any(each.laddr.port == port for each in process.net_connections("tcp")):
        return "frontend"
    return "engine" if process.ppid() == root.pid else "rank"


def slope(samples: Sequence[Sample], what: str) -> Slope:
    """How a quantity grows per hour, and how sure that is."""
    count = len(samples)
    if count < 3:
        return Slope(0.0, None)
    hours = [sample.at_s / 3600 for sample in samples]
    values = [float(getattr(sample, what)) for sample in samples]
    middle, mean = sum(hours) / count, sum(values) / count
    spread = sum((hour - middle) ** 2 for hour in hours)
    found = sum((h - middle) * (v - mean) for h, v in zip(hours, values, strict=True)) / spread
    rest = sum((v - mean - found * (h - middle)) ** 2 for h, v in zip(hours, values, strict=True))
    return Slope(found, math.sqrt(rest / (count - 2) / spread))


def _anonymous_bytes(pid: int) -> int:
    """Raises psutil.NoSuchProcess where it has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    line = next(line for line in rollup.splitlines() if line.startswith("Anonymous:"))
    return int(line.split()[1]) * 1024


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:  # removed, though still mapped
        return 0

"""What a server holds that nobody asks for anything, and what is left when it has ended.

idle ──> Holdings ──load, strikes──> idle ──> Holdings: what is more is leaked
                                              ended: whatever is left is leaked
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.census import marked, shared_files
from benchmarks.process_tree import RAYS_OWN
from benchmarks.strikes import Server

SHARED = Path("/dev/shm")
SETTLE_S = 15.0
"""What is still held so long after the last request is leaked."""
END_S = 5.0
"""What processes get to end after the server's own."""
LOOK_EVERY_S = 0.5
HANG_UP_S = 0.1
"""What a frontend gets to see that a connection has ended."""
RAYS_IDLE = f"{RAYS_OWN}ray::IDLE"
"""Workers that Ray keeps in stock: their number is its own business."""
RAYS_SOCKETS = 2
"""Connections that Ray keeps between its processes, and ours in it, come and go: so many more are none
that leaked."""
RAYS_FILES = "ray"
"""A Ray session keeps its logs for people to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Of a server, at one moment."""

    fds: Mapping[tuple[str, int], int]
    """Open files of each process, by its name and id."""
    blocks: int
    """KV blocks that cannot be handed out."""
    requests: int
    """That engines have."""
    shared: Mapping[str, int]
    """Bytes of each file in shared memory."""
    files: int
    """In its temporary folder."""

    @property
    def processes(self) -> Counter[str]:
        """By name."""
        return Counter(name for name, _ in self.fds if name != RAYS_IDLE)

    def beyond(self, before: Holdings) -> Counter[str]:
        """What it is more than `before`, by kind."""
        more_shared = len(self.shared) - len(before.shared)
        return +Counter(
            {
                "KV blocks": self.blocks - before.blocks,
                "requests": self.requests - before.requests,
                "processes": (self.processes - before.processes).total(),
                "file descriptors": sum(self.more_fds(before).values()),
                "shared memory": more_shared,
                "temporary files": self.files - before.files,
            }
        )

    def more_fds(self, before: Holdings) -> dict[str, int]:
        """Open files that processes have more than they had, or than those had whose place they
        took. By name; Ray's own processes left out."""
        usual: dict[str, int] = {}
        for (name, _), number in before.fds.items():
            usual[name] = max(number, usual.get(name, 0))
        slack = RAYS_SOCKETS if any(name.startswith(RAYS_OWN) for name in usual) else 0
        more: Counter[str] = Counter()
        for key, number in self.fds.items():
            name = key[0]
            if name in usual and not name.startswith(RAYS_OWN):
                found = number - before.fds.get(key, usual[name])
                more[name] += found if found > slack else 0
        return dict(+more)


class Watch:
    """Over what a server holds, and over what is not its own on the same machine."""

    def __init__(self, folder: Path, *, mark: str) -> None:
        """Before the server is started. All its temporary files are to lie in `folder`, and all its
        processes to bear the mark."""
        self._folder, self._mark = folder, mark
        self._others = _listed()
        """Files in shared memory that are not the server's."""
        self._seen: set[psutil.Process] = set()
        """The server's processes."""

    async def settled(self, server: Server, before: Holdings | None = None) -> Holdings:
        """What a server holds once that does not change, or is no more than it was `before`. Raises
        OSError where no frontend answers."""
        deadline_s = time.monotonic() + SETTLE_S
        latest = await self._holdings(server)
        while time.monotonic() < deadline_s:
            await asyncio.sleep(LOOK_EVERY_S)
            earlier, latest = latest, await self._holdings(server)
            if (not latest.beyond(before)) if before is not None else (latest == earlier):
                break
        return latest

    def left(self, *, timeout_s: float = END_S) -> Counter[str]:
        """What is left of a server that has ended."""
        deadline_s = time.monotonic() + timeout_s
        while (found := self._left()) and time.monotonic() < deadline_s:
            time.sleep(LOOK_EVERY_S)
        return found

    def end_the_rest(self) -> None:
        """Whatever processes of it still live."""
        for process in self._living():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    async def _holdings(self, server: Server) -> Holdings:
        status = await server.status()
        server.hang_up()  # a connection more or less is not the server's doing
        await asyncio.sleep(HANG_UP_S)
        members = status["status"]["members"]
        processes = await asyncio.to_thread(server.processes)
        self._seen |= {process for process, _ in processes}
        return await asyncio.to_thread(
            lambda: Holdings(
                fds=_fds(processes),
                blocks=sum(each["num_blocks"] - each["num_free_blocks"] for each in members),
                requests=sum(each["num_running"] + each["num_waiting"] for each in members),
                shared=self._shared({process.pid for process, _ in processes}),
                files=len(self._files()),
            )
        )

    def _left(self) -> Counter[str]:
        living = self._living()
        return +Counter(
            {
                "processes": len(living),
                "shared memory": len(self._shared({each.pid for each in living})),
                "temporary files": len(self._files()),
            }
        )

    def _living(self) -> set[psutil.Process]:
        """The server's processes, those included that have overwritten their mark."""
        return {each for each in self._seen if _lives(each)} | set(marked(self._mark))

    def _shared(self, own: Iterable[int]) -> dict[str, int]:
        """Files in shared memory that were not there before, and that no process but the `own` maps."""
        new = {path: size for path, size in _listed().items() if path not in self._others}
        for process in psutil.process_iter() if new else ():
            if process.pid not in own:
                for path in shared_files(process) & new.keys():
                    del new[path]
        return new

    def _files(self) -> list[Path]:
        return [each for each in self._folder.iterdir() if each.name != RAYS_FILES]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _fds(processes: Iterable[tuple[psutil.Process, str]]) -> dict[tuple[str, int], int]:
    found = {}
    for process, name in processes:
        with contextlib.suppress(psutil.Error):
            found[name, process.pid] = process.num_fds()
    return found


def _listed() -> dict[str, int]:
    found = {}
    for each in SHARED.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[str(each)] = each.stat().st_size
    return found

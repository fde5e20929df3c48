"""The processes of a fleet on this machine, and what they hold.

    this process ── engine ── rank ── link        an engine of one rank may be that rank itself
                       └── resource tracker       the interpreter's

Everything that is started while a mark stands in the environment inherits it. So whatever of it
outlives its parent is still found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "PACELINE_CENSUS"
_LINK, _TRACKER, _CHILD = "paceline.runtime.transfer.process", "resource_tracker", "spawn_main"
_PIDFD_GETFD = 438
"""The same number on every architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    process: psutil.Process
    links: tuple[psutil.Process, ...]
    """One, but for the moment between a death and its successor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTree:
    """An engine's processes."""

    process: psutil.Process
    ranks: tuple[Rank, ...]

    @property
    def links(self) -> list[psutil.Process]:
        return [link for rank in self.ranks for link in rank.links]


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """A fleet's processes at one moment."""

    engines: tuple[EngineTree, ...]
    """Children of this process."""

    @staticmethod
    def take() -> Census:
        return Census(engines=tuple(_engines(psutil.Process())))

    def strays(self, mark: str) -> list[psutil.Process]:
        """All that bear the mark, or are this process's children, and belong to no engine."""
        me = psutil.Process()
        known = {me.pid}
        for engine in self.engines:
            known |= {engine.process.pid, *(each.process.pid for each in engine.ranks)}
            known |= {link.pid for link in engine.links}
        found = {each.pid: each for each in (*_children(me), *marked(mark))}
        return [
            each
            for pid, each in found.items()
            if pid not in known and not (_kind(each) == _TRACKER and _parent(each) in known)
        ]

    def unowned_memory(self) -> set[int]:
        """KV pools and boards that links map and that are of no rank that lives, by inode."""
        ranks = [rank for engine in self.engines for rank in engine.ranks]
        owned = [_memory(rank.process) for rank in ranks]
        mapped = [_memory(link) for rank in ranks for link in rank.links]
        return set().union(*mapped) - set().union(*owned)


def _engines(me: psutil.Process) -> Iterator[EngineTree]:
    for process in _children(me):
        if _kind(process) != _CHILD:
            continue
        below = _children(process)
        ranks = [each for each in below if _kind(each) == _CHILD]
        if any(_kind(each) == _LINK for each in below):
            ranks.append(process)
        yield EngineTree(
            process=process,
            ranks=tuple(Rank(process=each, links=tuple(_links(each))) for each in ranks),
        )


def ports(link: psutil.Process) -> set[int]:
    """Where a link listens; empty while it starts and when it is gone."""
    try:
        found = link.net_connections("tcp")
    except psutil.Error:
        return set()
    return {each.laddr.port for each in found if each.status == psutil.CONN_LISTEN}


def cut(link: psutil.Process, port: int) -> int:
    """End every connection that a link has accepted on its port, as if the other side had. How many
    there were."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        holder = os.pidfd_open(link.pid)
    except ProcessLookupError:
        return 0
    number = 0
    try:
        for name in _fds(link):
            copy = libc.syscall(_PIDFD_GETFD, holder, name, 0)
            if copy >= 0:
                number += _shut(copy, port)
    finally:
        os.close(holder)
    return number


def _shut(fd: int, port: int) -> bool:
    """Whether it was a connection to that port."""
    try:
        connection = socket.socket(fileno=fd)
    except OSError:  # no socket
        os.close(fd)
        return False
    with connection, contextlib.suppress(OSError):  # not connected
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        connection.getpeername()
        if connection.getsockname()[1] == port:
            connection.shutdown(socket.SHUT_RDWR)
            return True
    return False


def shared_files(process: psutil.Process) -> set[str]:
    """Files in shared memory that a process maps, those without a name left out."""
    return {path for _, path in _maps(process) if path.startswith("/dev/shm/")}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children())
    except psutil.NoSuchProcess:
        return []


def _links(process: psutil.Process) -> Iterator[psutil.Process]:
    return (each for each in _children(process) if _kind(each) == _LINK)


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def _kind(process: psutil.Process) -> str:
    """What a process is for; empty for the dead and for strangers."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return ""
    text = " ".join(command[1:])
    return next((kind for kind in (_LINK, _TRACKER, _CHILD) if kind in text), "")


def marked(mark: str) -> Iterator[psutil.Process]:
    """All processes of this machine that bear a mark, whatever has become of their parents."""
    wanted = f"{MARK}={mark}".encode()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):  # gone, or another user's
            if wanted in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                yield process


def _memory(process: psutil.Process) -> set[int]:
    return {inode for inode, path in _maps(process) if path.startswith("/memfd:paceline-")}


def _maps(process: psutil.Process) -> Iterator[tuple[int, str]]:
    """Inode and path of every file that a process maps."""
    try:
        text = Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return
    for match in re.finditer(r"^\S+ \S+ \S+ \S+ (\d+) +(/\S+)", text, re.MULTILINE):
        yield int(match[1]), match[2]


def _fds(process: psutil.Process) -> list[int]:
    try:
        return [int(each.name) for each in Path(f"/proc/{process.pid}/fd").iterdir()]
    except OSError:
        return []

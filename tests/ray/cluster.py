"""A Ray cluster on this machine: a head with a job server, and a second node, a raylet each."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from paceline.actors.jobs import Jobs
from paceline.parallel.launch import free_port
from paceline.runtime.errors import UserError

RAY = str(Path(sys.executable).parent / "ray")
START_S = 90.0
GONE_S = 20.0
MARK = "PACELINE_TEST_CLUSTER"
OBJECT_STORE_BYTES = 100_000_000


class Cluster(NamedTuple):
    """A started cluster."""

    gcs: str
    """What `ray_address` takes."""
    jobs: str
    """What `paceline submit --address` takes."""
    env: dict[str, str]
    """The environment that it was started in, and commands of tests are to be: whatever comes of them has
    it too, and is known by that."""

    def processes(self) -> list[psutil.Process]:
        """Paceline's, wherever they come from: those of a job, and those of a command beside it."""
        return [
            process
            for process in psutil.process_iter()
            if _is_paceline(process) and _environ(process).get(MARK) == self.env[MARK]
        ]

    def shared_memory(self) -> set[Path]:
        """What these have of it now."""
        maps = [each.path for process in self.processes() for each in _maps(process)]
        return {Path(path) for path in maps if path.startswith("/dev/shm/") and "KMP" not in path}

    def assert_nothing_left(self, *, shared_memory: Collection[Path] = (), port: int) -> None:
        """No process of Paceline, none of its folders, nothing of that memory, nobody at that port."""
        deadline_s = time.monotonic() + GONE_S
        while left := [
            *self.processes(),
            *Path(self.env["TMPDIR"]).glob("paceline-*"),
            *(path for path in shared_memory if path.exists()),
        ]:
            assert time.monotonic() < deadline_s, f"left behind: {left}"
            time.sleep(0.2)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))


def _is_paceline(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return False
    return any(part in command for part in ("ray::Shard", "ray::Coordinator", "paceline"))


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _maps(process: psutil.Process) -> list[Any]:
    try:
        return process.memory_maps()
    except psutil.Error:
        return []


@contextmanager
def started_cluster(
    env: Mapping[str, str], *, num_nodes: int = 2, cpus: int = 2
) -> Iterator[Cluster]:
    """A cluster of nodes with `cpus` each, whose processes and files are gone afterwards."""
    gcs, dashboard = free_port(), free_port()
    # not pytest's folder: the sockets in it need short paths
    folder = tempfile.mkdtemp(prefix="ray-test-")
    first = ("--head", f"--port={gcs}", f"--dashboard-port={dashboard}")
    more = (f"--address=127.0.0.1:{gcs}",)
    nodes: list[subprocess.Popen[bytes]] = []
    env = {**env, MARK: folder, "TMPDIR": f"{folder}/tmp"}
    Path(env["TMPDIR"]).mkdir()
    try:
        for index in range(num_nodes):
            command = [RAY, "start", *(more if index else first), "--block", f"--num-cpus={cpus}"]
            ours = ["--node-ip-address=127.0.0.1", f"--object-store-memory={OBJECT_STORE_BYTES}"]
            # nodes that share a folder unpack what jobs bring over each other
            ours.append(f"--temp-dir={folder}/{index}")
            ours.append(f"--dashboard-agent-listen-port={free_port()}")
            nodes.append(
                subprocess.Popen(
                    [*command, *ours],
                    env=env,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
            if not index:
                _await_jobs(f"http://127.0.0.1:{dashboard}")
        yield Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", env)
    finally:
        _end(nodes)
        shutil.rmtree(folder, ignore_errors=True)


def _await_jobs(address: str) -> None:
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            Jobs(address)
            return
        except UserError:
            assert time.monotonic() < deadline_s, f"no job server at {address} in {START_S:.0f} s"
            time.sleep(0.2)


def _end(nodes: list[subprocess.Popen[bytes]]) -> None:
    """At once: a node that is told to end gracefully first waits for others."""
    processes = [psutil.Process(node.pid) for node in nodes if node.poll() is None]
    processes += [child for process in processes for child in process.children(recursive=True)]
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)
    for node in nodes:
        node.wait(10)

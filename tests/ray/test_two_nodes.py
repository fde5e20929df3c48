"""Two nodes that are really two: a link that delays, loses and is cut, and a Ray cluster over it."""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.nodes import Host, HostProcess, Link, missing, two_hosts
from tests.ray.conftest import environment

ROOT = Path(__file__).parents[2]
GCS = "10.77.0.1:6379"
SIZE = 16 << 20  # bytes of a transfer
PATTERN = bytes(range(251))  # what it repeats: an offset is never mistaken for another

RECEIVE = """
import hashlib, socket
with socket.create_server(("", 5000)) as server:
    server.settimeout(60)
    print("listening", flush=True)
    peer, _ = server.accept()
    peer.settimeout(60)
    digest = hashlib.sha256()
    while data := peer.recv(1 << 20):
        digest.update(data)
print(digest.hexdigest(), flush=True)
"""
SEND = """
import socket, sys
data = bytes(range(251)) * (int(sys.argv[1]) // 251)
with socket.create_connection(("10.77.0.1", 5000), timeout=60) as peer:
    peer.sendall(data)
"""
ROUND_TRIPS = """
import socket, time
took = []
for _ in range(5):
    began = time.monotonic()
    try:
        socket.create_connection(("10.77.0.1", 5999), timeout=20)
    except ConnectionRefusedError:
        took.append(time.monotonic() - began)
print(min(took))
"""
ONE_ACTOR_EACH = """
import json, socket, time, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

@ray.remote(num_cpus=1)
class Where:
    def address(self):
        return ray.util.get_node_ip_address(), socket.gethostname()

ray.init(log_to_driver=False)
deadline = time.monotonic() + 30
while len(nodes := [node["NodeID"] for node in ray.nodes() if node["Alive"]]) < 2:
    assert time.monotonic() < deadline, nodes
    time.sleep(0.05)
pinned = [NodeAffinitySchedulingStrategy(node_id=node, soft=False) for node in nodes]
actors = [Where.options(scheduling_strategy=each).remote() for each in pinned]
print(json.dumps(ray.get([actor.address.remote() for actor in actors], timeout=60)))
"""
# As a test that is killed: its hosts are up, something runs there, and nobody cleans up.
KILLED = """
import subprocess, sys, time
from tests.nodes import two_hosts
with two_hosts() as (a, b, link):
    stays = "import time; print('up', flush=True); time.sleep(1000)"
    daemon = a.run(["setsid", sys.executable, "-c", stays], stdout=subprocess.PIPE)
    print(daemon.stdout.readline(), end="", flush=True)
    time.sleep(1000)
"""

Net = tuple[Host, Host, Link]


@pytest.fixture(autouse=True, scope="module")
def _able() -> None:
    """Skips with the reason where this machine can have no hosts."""
    lacking = missing()
    if lacking is not None:
        pytest.skip(lacking)


@pytest.fixture
def net() -> Iterator[Net]:
    """Two hosts and a link without delay and loss."""
    with two_hosts() as hosts_and_link:
        yield hosts_and_link


def line(process: subprocess.Popen[str], *, timeout_s: float) -> str:
    """The next line that a process prints."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], timeout_s)
    assert readable, f"no line in {timeout_s:.0f} s"
    return process.stdout.readline().strip()


def transfer(net: Net) -> tuple[HostProcess, HostProcess]:
    """A receiver on host a, listening, and a sender on host b that has just been started."""
    a, b, _ = net
    receiver = a.run([sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE)
    assert line(receiver, timeout_s=20) == "listening"
    return receiver, b.run([sys.executable, "-c", SEND, str(SIZE)])


def is_whole(receiver: HostProcess) -> bool:
    """Whether what arrives is what was sent."""
    sent = hashlib.sha256(PATTERN * (SIZE // len(PATTERN))).hexdigest()
    return line(receiver, timeout_s=60) == sent


def test_a_round_trip_takes_twice_the_delay(net: Net) -> None:
    _, b, link = net

    def round_trip_s() -> float:
        return float(b.output([sys.executable, "-c", ROUND_TRIPS], timeout_s=60))

    link.set(delay_s=0.03)
    assert round_trip_s() >= 0.06
    link.set(delay_s=0.0)
    assert round_trip_s() < 0.06


def test_tcp_repairs_what_the_link_loses(net: Net) -> None:
    _, _, link = net
    link.set(delay_s=0.001, loss=0.01)
    receiver, _ = transfer(net)
    assert is_whole(receiver)
    assert all(way.lost < 0.03 * way.carried for way in link.stats())
    assert sum(way.lost for way in link.stats()) > 0


@pytest.mark.parametrize("delay_s", [0.0, 0.002])
def test_a_cut_stops_a_transfer_in_the_middle_and_healed_it_goes_on(
    net: Net, delay_s: float
) -> None:
    _, _, link = net
    link.set(delay_s=delay_s)
    link.cut(after_bytes=SIZE // 2)
    receiver, sender = transfer(net)
    link.await_cut(timeout_s=30)
    carried = sum(way.carried_bytes for way in link.stats())
    assert SIZE // 2 <= carried < SIZE // 2 + (1 << 16)
    with pytest.raises(subprocess.TimeoutExpired):
        receiver.wait(0.5)
    assert sum(way.carried_bytes for way in link.stats()) == carried
    assert sum(way.severed for way in link.stats()) > 0
    link.heal()
    assert is_whole(receiver)
    assert sender.wait(20) == 0


def test_hosts_share_neither_memory_nor_processes_nor_loopback(net: Net) -> None:
    a, b, _ = net
    a.output(["touch", "/dev/shm/of-a"], timeout_s=10)
    receiver = a.run([sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE)
    assert line(receiver, timeout_s=20) == "listening"
    shown = b.output(["sh", "-c", "hostname; ls /dev/shm; ls -d /proc/[0-9]*"], timeout_s=10)
    assert shown.splitlines()[0] == b.name
    assert "of-a" not in shown
    assert len(shown.splitlines()) <= 4, "expected the first process, sh and ls"
    assert not Path("/dev/shm/of-a").exists()
    try_own = "import socket; socket.create_connection(('127.0.0.1', 5000), timeout=5)"
    with pytest.raises(AssertionError, match="ConnectionRefusedError"):
        b.output([sys.executable, "-c", try_own], timeout_s=20)


def test_a_host_that_is_powered_off_takes_its_processes_along_and_leaves_the_other(
    net: Net,
) -> None:
    a, b, link = net
    link.cut(after_bytes=SIZE // 2)
    receiver, sender = transfer(net)
    link.await_cut(timeout_s=30)
    b.power_off()
    link.heal()
    assert sender.poll() is not None
    assert receiver.poll() is None
    assert a.output(["hostname"], timeout_s=10).strip() == a.name


def test_a_killed_test_leaves_nothing() -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert line(killed, timeout_s=30) == "up"
        left = psutil.Process(killed.pid).children(recursive=True)
        commands = [" ".join(process.cmdline()) for process in left]
    finally:
        killed.kill()
        killed.wait(10)
    assert sum("unshare" in command for command in commands) == 2, commands
    assert any("time.sleep(1000)" in command for command in commands), commands
    _, alive = psutil.wait_procs(left, timeout=10)
    assert alive == []


def start_ray(net: Net) -> dict[str, str]:
    """A Ray node on each host, one CPU each; the environment of a command that joins them.

    No file of one is seen by the other, so each writes the session's folder anew. They end with
    their hosts.
    """
    a, b, _ = net
    env = environment(OMP_NUM_THREADS="1")
    common = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = ["--head", "--port=6379", "--include-dashboard=false"]
    for host, flags in ((a, head), (b, [f"--address={GCS}"])):
        start = ["ray", "start", *flags, f"--node-ip-address={host.address}", *common]
        host.output(start, env, timeout_s=90)
    return {**env, "RAY_ADDRESS": GCS}


def test_ray_places_an_actor_on_each_host(net: Net) -> None:
    a, b, link = net
    link.set(delay_s=0.001, loss=0.01)
    env = start_ray(net)
    placed = json.loads(a.output([sys.executable, "-c", ONE_ACTOR_EACH], env, timeout_s=90))
    assert sorted(map(tuple, placed)) == [(a.address, a.name), (b.address, b.name)]

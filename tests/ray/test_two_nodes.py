"""Two nodes that are really two: a link that delays, loses and is cut, a Ray cluster over it, and on
that an engine that reads prompts on one node for an engine on the other."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests.fleet_process import Ask, Report, Serve
from tests.nodes import Host, HostProcess, Link, missing, two_hosts
from tests.ray.conftest import environment

from paceline.runtime.config import make_config
from paceline.runtime.engine import Engine
from paceline.runtime.local import local_engine
from paceline.runtime.preflight import examine
from paceline.runtime.types import EngineStatus, Request, SamplingParams

ROOT = Path(__file__).parents[2]
GCS = "10.77.0.1:6379"
SIZE = 16 << 20  # bytes of a transfer
MAX_TOKENS = 24
PAGES_BYTES = 2 * 6 * 4 * 2 * 16 * 32 * 4  # models, layers, heads, K and V, tokens, dim, float32
MIDDLE = 1 << 20  # bytes over the link, of 13 PAGES_BYTES for a prompt of 199 tokens
CUT_S = 4.0  # TCP mends shorter ones by itself: a connection is given up after 3 s of silence
LEASE_S, FETCH_S = 8.0, 9.0
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
ADD_UP = """
import sys, torch
from paceline.parallel.launch import join, leave
from paceline.parallel.rank import RankSpec
spec = RankSpec(
    rank=int(sys.argv[1]), local_rank=0, local_size=1, target_size=2, draft_size=0,
    master_addr="10.77.0.1", master_port=5001, timeout_s=30,
)
world = join(spec).world.collectives
print(world.name, world.all_reduce_(torch.tensor([1.0 + spec.rank])).tolist(), flush=True)
leave()
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


def test_ranks_on_two_hosts_meet_whatever_their_names_lead_to(net: Net) -> None:
    a, b, _ = net
    env = environment(OMP_NUM_THREADS="1")
    ranks = []
    for rank, host in enumerate((a, b)):
        host.output(["hostname", "has-no-address"], timeout_s=10)
        argv = [sys.executable, "-c", ADD_UP, str(rank)]
        ranks.append(host.run(argv, env, stdout=subprocess.PIPE))
    assert [line(rank, timeout_s=60) for rank in ranks] == ["gloo [3.0]"] * 2


# ------------------------------------------------------------------------------- a Ray cluster over both


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray node on each host, the head on a. They end with their hosts."""

    a: Host
    b: Host
    link: Link
    env: dict[str, str]
    """Of a command that joins."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """No file of one is seen by the other, so each writes the session's folder anew. a has far more CPUs,
    so that the first of several engines goes there, whatever an earlier test has not given back yet, and
    the second to b. Ray gives no node up while the link is cut: by itself it may after ten seconds, for
    it tries again only now and then."""
    with two_hosts() as (a, b, link):
        env = environment(OMP_NUM_THREADS="1", RAY_health_check_failure_threshold="100")
        common = ["--object-store-memory=100000000", "--disable-usage-stats"]
        head = ["--head", "--port=6379", "--include-dashboard=false", "--num-cpus=16"]
        for host, flags in ((a, head), (b, [f"--address={GCS}", "--num-cpus=8"])):
            start = ["ray", "start", *flags, f"--node-ip-address={host.address}", *common]
            host.output(start, env, timeout_s=90)
        yield Cluster(a=a, b=b, link=link, env={**env, "RAY_ADDRESS": GCS})


def test_ray_places_an_actor_on_each_host(cluster: Cluster) -> None:
    a, b = cluster.a, cluster.b
    cluster.link.set(delay_s=0.001, loss=0.01)
    placed = json.loads(a.output([sys.executable, "-c", ONE_ACTOR_EACH], cluster.env, timeout_s=90))
    cluster.link.set(delay_s=0.0, loss=0.0)
    assert sorted(map(tuple, placed)) == [(a.address, a.name), (b.address, b.name)]


# ---------------------------------------------------------- prompts read on b, texts written on a


@dataclass(kw_only=True)
class Apart:
    """A fleet whose process is on host a, with the engine that writes, so that only what goes to and
    from the engine that reads crosses the link; and one engine that does both, here."""

    fleet: HostProcess
    link: Link
    alone: Engine
    latest: Report
    num_asked: int = 0

    def requests(self, *lengths: int) -> tuple[Request, ...]:
        """With prompts that nobody has read: greedy, sampled, greedy ..."""
        made = []
        for length in lengths:
            seed = self.num_asked = self.num_asked + 1
            prompt = random.Random(seed).choices(range(61), k=length)
            params = SamplingParams(temperature=0.8 * (seed % 2), max_tokens=MAX_TOKENS)
            made.append(
                Request(
                    request_id=f"text-{seed}",
                    prompt_token_ids=tuple(prompt),
                    params=params,
                    seed=seed,
                    max_tokens=MAX_TOKENS,
                )
            )
        return tuple(made)

    def ask(self, requests: tuple[Request, ...] = ()) -> None:
        assert self.fleet.stdin is not None
        self.fleet.stdin.write(msgspec.json.encode(Ask(requests=requests)).decode() + "\n")
        self.fleet.stdin.flush()

    def listen(self, *, timeout_s: float = 60.0) -> Report:
        self.latest = report_of(self.fleet, timeout_s=timeout_s)
        return self.latest

    def wait_idle(self) -> None:
        """Until both engines hold nothing for anybody, as of when every text so far had its prompt."""
        deadline = time.monotonic() + LEASE_S + 30
        while True:
            read, written = self.reads.transfers, self.writes.transfers
            is_told = written.fetched + written.failed == self.num_asked
            is_fresh = is_told and read.produced + read.expired == self.num_asked
            if is_fresh and is_idle(self.reads) and is_idle(self.writes):
                return
            assert time.monotonic() < deadline, f"never came to be: {self.latest}"
            self.ask()
            self.listen()

    def expected(self, requests: tuple[Request, ...]) -> dict[str, list[int]]:
        texts: dict[str, list[int]] = {each.request_id: [] for each in requests}
        self.alone.submit(list(requests))
        deadline = time.monotonic() + 60
        num_left = len(texts)
        while num_left:
            assert time.monotonic() < deadline, "the engine that does both does not end"
            for delta in self.alone.step():
                texts[delta.request_id] += delta.token_ids
                num_left -= delta.finish_reason is not None
        return texts

    @property
    def reads(self) -> EngineStatus:
        return self._member("prefill")

    @property
    def writes(self) -> EngineStatus:
        return self._member("decode")

    def _member(self, role: str) -> EngineStatus:
        (found,) = (each for each in self.latest.members if each.role == role)
        return found


def report_of(fleet: HostProcess, *, timeout_s: float) -> Report:
    said = line(fleet, timeout_s=timeout_s)
    assert said, "the fleet's process has ended"
    return msgspec.json.decode(said, type=Report)


def is_idle(status: EngineStatus) -> bool:
    """Whether nothing is held for anybody."""
    totals = status.transfers
    held = status.num_blocks - status.num_free_blocks
    return held == 0 and totals.producing == totals.fetching == status.num_running == 0


@pytest.fixture(scope="module")
def served(
    cluster: Cluster, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Apart]:
    shape = {"num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 32}
    settings: dict[str, Any] = {
        "model": str(tiny(seed=0, **shape)),
        "dtype": "float32",
        "device": "cpu",
        "kv_cache_memory": "32MiB",
        "speculative_config": {
            "model": str(tiny(seed=0, noise=0.03, **shape)),
            "draft_length": "fixed",
        },
    }
    transfer = {
        "kv_role": "kv_consumer",
        "data_plane": "grpc",
        "draft_kv": "transfer",
        "chunk_bytes": 1 << 16,
        "lease_s": LEASE_S,
        "timeout_s": FETCH_S,
    }
    serve = Serve(
        config={
            **settings,
            "distributed_executor_backend": "ray",
            "ray_address": GCS,
            "kv_transfer_config": transfer,
        },
        fleet={
            "decode_replicas": 1,
            "routing_policy": "always",
            "engine_placement": "spread",
            "restart_engines": False,
        },
        then=("prefill",),
    )
    fleet = cluster.a.run(
        [sys.executable, "-m", "tests.fleet_process"],
        {**cluster.env, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path_factory.mktemp("fleet"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with fleet:
        assert fleet.stdin is not None
        fleet.stdin.write(msgspec.json.encode(serve).decode() + "\n")
        fleet.stdin.flush()
        config = make_config({**settings, "distributed_executor_backend": "uni"})
        alone = local_engine(config, examine(config))
        try:
            latest = report_of(fleet, timeout_s=120)
            yield Apart(fleet=fleet, link=cluster.link, alone=alone, latest=latest)
        finally:
            alone.close()
            fleet.stdin.close()
            try:
                fleet.wait(30)
            finally:
                fleet.kill()


@pytest.fixture
def apart(served: Apart) -> Iterator[Apart]:
    """With a link that is whole, and engines that hold nothing, before and after."""
    served.link.heal()
    served.link.set(delay_s=0.0, loss=0.0)
    served.wait_idle()
    yield served
    served.link.heal()


@pytest.mark.parametrize(("delay_s", "loss"), [(0.0, 0.0), (0.005, 0.01)])
def test_texts_whose_prompts_are_read_on_another_host_are_those_of_one_engine(
    apart: Apart, cluster: Cluster, delay_s: float, loss: float
) -> None:
    where = [each.links.addresses[0].rpartition(":")[0] for each in (apart.reads, apart.writes)]
    assert where == [cluster.b.address, cluster.a.address]
    for host in (cluster.a, cluster.b):
        names = host.output(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'"], timeout_s=10)
        actors = Counter(re.findall(r"^ray::(Shard|Coordinator)", names, re.MULTILINE))
        assert actors == {"Shard": 1, "Coordinator": 1}, "a step crosses no link"
    apart.link.set(delay_s=delay_s, loss=loss)
    before = apart.writes.transfers
    requests = apart.requests(100, 128, 153, 200)
    apart.ask(requests)
    assert apart.listen().texts == apart.expected(requests)
    apart.wait_idle()
    now = apart.writes.transfers
    assert (now.fetched, now.failed) == (before.fetched + 4, before.failed)
    assert apart.writes.accepted > 0, "it drafts"


def test_a_transfer_whose_link_is_cut_in_the_middle_goes_on_from_there(apart: Apart) -> None:
    before = apart.writes.transfers
    requests = apart.requests(160, 199)
    apart.link.cut(after_bytes=MIDDLE)
    apart.ask(requests)
    apart.link.await_cut(timeout_s=20)
    time.sleep(CUT_S)
    apart.link.heal()
    assert apart.listen().texts == apart.expected(requests)
    apart.wait_idle()
    now = apart.writes.transfers
    assert now.num_resumed > before.num_resumed
    assert (now.fetched, now.failed) == (before.fetched + 2, before.failed)
    payload = (10 + 13) * PAGES_BYTES
    assert payload <= now.num_bytes - before.num_bytes < 1.05 * payload


def test_a_prompt_that_a_cut_link_keeps_too_long_is_read_where_its_text_is_written(
    apart: Apart,
) -> None:
    before = apart.writes.transfers
    requests = apart.requests(199)
    apart.link.cut(after_bytes=MIDDLE)
    apart.ask(requests)
    apart.link.await_cut(timeout_s=20)
    assert apart.listen().texts == apart.expected(requests)
    apart.link.heal()
    after = apart.requests(100)
    apart.ask(after)
    assert apart.listen().texts == apart.expected(after)
    apart.wait_idle()
    now = apart.writes.transfers
    assert (now.fetched, now.failed) == (before.fetched + 1, before.failed + 1)

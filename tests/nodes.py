"""Two hosts on one machine, and the link between them: with delay, with loss, cut and healed.

    host paceline-a, 10.77.0.1                                    host paceline-b, 10.77.0.2
    its own network, processes, ── TUN ──> relay process ── TUN ──> its own network, processes,
    hostname, /dev/shm, /tmp/ray <── TUN ── delay, loss, cut <── TUN ── hostname, /dev/shm, /tmp/ray

A host is a first process in namespaces of its own, which sees the rest of the file system as it
is. It waits for the end of a pipe that the test holds; when it ends, the kernel ends all others of
the host and takes its network away, so that nothing outlives the test, however that ends. The relay
is a process of its own for the same reason, and so that it does not share the test's interpreter
lock.

    with two_hosts(delay_s=0.005, loss=0.01) as (a, b, link):
        server = a.run(["python", "server.py"])
        link.cut()
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

PATIENCE_S = 10.0  # for a host to come up and go down, for the relay to answer
MTU = 9000  # as in a data centre
UNDER_WAY_BYTES = 64 << 20  # most of one direction; more is dropped, as a router does

_TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_UNSHARE = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")
_SPACES = {
    "--net": "net",
    "--mount": "mnt",
    "--uts": "uts",
    "--ipc": "ipc",
    "--pid": "pid_for_children",
}

# The kernel reaps the children of a process that ignores their end: a first process inherits many.
_FIRST_PROCESS = """
mount -t tmpfs -o mode=1777 private /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs private /tmp/ray
hostname "$1"
printf '127.0.0.1 localhost\\n%s\\n' "$2" > /dev/shm/hosts
mount --bind /dev/shm/hosts /etc/hosts
rm /dev/shm/hosts
mount --bind /dev/null /etc/resolv.conf
ip link set lo up
trap '' CHLD
echo ready
exec cat
"""
# A default route, because "which address is mine?" is asked by routing to some far address.
_NETWORK = """
ip link set dev "$1" name link0
ip link set dev link0 addrgenmode none mtu "$2" txqueuelen 10000
ip link set dev link0 up
ip address add "$3/24" dev link0
ip route add default dev link0
"""


def missing() -> str | None:
    """What this machine lacks for two hosts; None if nothing."""
    if os.geteuid() != 0:
        return "two hosts need root"
    absent = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if absent:
        return f"two hosts need {' and '.join(absent)} (iproute2, util-linux)"
    try:
        os.close(_tunnel()[0])
    except OSError as error:
        return f"two hosts need {_TUN}: {error.strerror}"
    tried = subprocess.run(
        [*_UNSHARE, "mount", "-t", "tmpfs", "private", "/dev/shm"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return f"two hosts need namespaces: {tried.stderr.strip()}" if tried.returncode else None


class HostProcess(subprocess.Popen[str]):
    """A command on a host. Its process group gets the signals: what is seen from here only waits
    for the command."""

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.killpg(self.pid, sig)


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of the two, up for as long as `two_hosts` or until `power_off`."""

    name: str
    address: str
    first: subprocess.Popen[str]
    started: list[HostProcess] = field(default_factory=list)

    def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        cwd: Path | None = None,
        stdin: int | IO[str] | None = subprocess.DEVNULL,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
    ) -> HostProcess:
        """Start a command on this host, in a process group of its own."""
        spaces = [f"{flag}=/proc/{self.first.pid}/ns/{name}" for flag, name in _SPACES.items()]
        process = HostProcess(
            ["nsenter", *spaces, f"--wdns={cwd or Path.cwd()}", *argv],
            env=env,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def output(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        cwd: Path | None = None,
        timeout_s: float,
    ) -> str:
        """What a command prints that ends well. Raises AssertionError with all it said when it
        fails, TimeoutExpired when it has not ended in time; then it is killed."""
        process = self.run(argv, env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with process:
            try:
                said, complained = process.communicate(timeout=timeout_s)
            finally:
                process.kill()
        assert process.returncode == 0, f"{argv[0]} on {self.name}: {said}{complained}"
        return said

    def power_off(self) -> None:
        """End every process of this host, at once, and its network. Returns when they are gone."""
        for stream in (self.first.stdin, self.first.stdout):
            if stream is not None:
                stream.close()
        self.first.wait(PATIENCE_S)
        for process in self.started:
            process.wait(PATIENCE_S)

    def await_ready(self) -> None:
        """Return when the first process has made its namespaces; AssertionError if it does not."""
        assert self.first.stdout is not None
        readable, _, _ = select.select([self.first.stdout], [], [], PATIENCE_S)
        assert readable, f"waited {PATIENCE_S:.0f} s for the namespaces of {self.name}"
        assert self.first.stdout.readline() == "ready\n", f"{self.name} has no namespaces"


@dataclass(kw_only=True)
class Way:
    """What one direction of the link has done so far, in packets."""

    carried: int = 0
    carried_bytes: int = 0
    lost: int = 0  # drawn by `loss`
    severed: int = 0  # sent or under way while the link was cut
    overflowed: int = 0  # beyond UNDER_WAY_BYTES


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins the two hosts. Neither notices a cut but by silence: the devices stay up."""

    control: socket.socket

    def set(self, *, delay_s: float | None = None, loss: float | None = None) -> None:
        """Change the delay of one way, or the share of packets lost, for packets from now on."""
        self._ask(delay_s=delay_s, loss=loss)

    def cut(self, *, after_bytes: int = 0) -> None:
        """Carry that many more bytes, both ways together, then lose everything, also what is under
        way."""
        self._ask(cut_after=after_bytes)

    def heal(self) -> None:
        self._ask(cut_after=-1)

    def stats(self) -> tuple[Way, Way]:
        """From a to b, from b to a."""
        there, back = self._ask()["ways"]
        return Way(**there), Way(**back)

    def await_cut(self, *, timeout_s: float) -> None:
        """Return when the bytes of `cut` have gone over; AssertionError if they have not in time."""
        deadline = time.monotonic() + timeout_s
        while not self._ask()["cut"]:
            assert time.monotonic() < deadline, f"the cut was not reached in {timeout_s:.0f} s"
            time.sleep(0.002)

    def _ask(self, **command: float | None) -> Any:
        self.control.send(json.dumps(command).encode())
        return json.loads(self.control.recv(4096))


@contextmanager
def two_hosts(
    *, delay_s: float = 0.0, loss: float = 0.0, seed: int = 0, mtu: int = MTU
) -> Iterator[tuple[Host, Host, Link]]:
    """Two hosts and their link, for as long as the context lasts.

    `delay_s` is that of one way, so a round trip takes twice as long; `loss` is the share of
    packets lost, drawn from `seed`. Look at `missing()` first.
    """
    addresses = {"paceline-a": "10.77.0.1", "paceline-b": "10.77.0.2"}
    known = "\n".join(f"{address} {name}" for name, address in addresses.items())
    with ExitStack() as stack:
        hosts, ends = [], []
        for name, address in addresses.items():
            first = subprocess.Popen(
                [*_UNSHARE, "sh", "-ec", _FIRST_PROCESS, "sh", name, known],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            host = Host(name=name, address=address, first=first)
            stack.callback(host.power_off)
            host.await_ready()
            end, device = _tunnel()
            stack.callback(os.close, end)
            subprocess.run(
                ["ip", "link", "set", "dev", device, "netns", str(first.pid)],
                check=True,
                timeout=PATIENCE_S,
            )
            plug_in = ["sh", "-ec", _NETWORK, "sh", device, str(mtu), address]
            host.output(plug_in, timeout_s=PATIENCE_S)
            hosts.append(host)
            ends.append(end)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(PATIENCE_S)
        with theirs:
            passed = (theirs.fileno(), *ends)
            relay = subprocess.Popen(
                [sys.executable, "-ES", __file__, *map(str, (*passed, seed))],
                pass_fds=passed,
                start_new_session=True,
            )
        stack.callback(relay.wait, PATIENCE_S)
        stack.callback(ours.close)
        link = Link(control=ours)
        link.set(delay_s=delay_s, loss=loss)
        yield hosts[0], hosts[1], link


def _tunnel() -> tuple[int, str]:
    """A new network device and its name: one reads what it sends, and writes what it receives."""
    end = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH22x", b"paceline%d", _IFF_TUN | _IFF_NO_PI)
        answer = fcntl.ioctl(end, _TUNSETIFF, request)
    except OSError:
        os.close(end)
        raise
    return end, answer[:16].rstrip(b"\0").decode()


class _Relay:
    """Carries packets between two devices, and does what it is told."""

    def __init__(self, ends: tuple[int, int], *, seed: int) -> None:
        self.ends = ends
        self.ways = (Way(), Way())
        self.under_way: tuple[deque[tuple[float, bytes]], ...] = (deque(), deque())
        self.under_way_bytes = [0, 0]
        self.draw = random.Random(seed).random
        self.delay_s = 0.0
        self.loss = 0.0
        self.uncut_bytes = float("inf")  # still to be carried, both ways together

    def serve(self, control: socket.socket) -> None:
        """Until the other end of `control` is closed. The answer to each of its messages says
        what was carried, and whether the link is cut."""
        sources: list[Any] = [control, *self.ends]
        while True:
            readable, _, _ = select.select(sources, [], [], self.next_due_s())
            self.deliver()
            for source in readable:
                if source is control:
                    message = control.recv(4096)
                    if not message:
                        return
                    self.obey(**json.loads(message))
                    ways = [asdict(way) for way in self.ways]
                    control.send(json.dumps({"ways": ways, "cut": self.uncut_bytes <= 0}).encode())
                    continue
                try:
                    self.read(self.ends.index(source))
                except OSError:  # the host is gone
                    sources.remove(source)

    def obey(
        self,
        *,
        delay_s: float | None = None,
        loss: float | None = None,
        cut_after: int | None = None,
    ) -> None:
        """Change what is given; a negative `cut_after` heals."""
        self.delay_s = self.delay_s if delay_s is None else delay_s
        self.loss = self.loss if loss is None else loss
        if cut_after is not None:
            self.uncut_bytes = float("inf") if cut_after < 0 else cut_after
            self.sever_if_cut()

    def next_due_s(self) -> float | None:
        """How long until a packet arrives; None if none is under way."""
        due = [packets[0][0] for packets in self.under_way if packets]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def deliver(self) -> None:
        """Write what has been under way for long enough."""
        now = time.monotonic()
        for index, packets in enumerate(self.under_way):
            while packets and packets[0][0] <= now:
                packet = packets.popleft()[1]
                self.under_way_bytes[index] -= len(packet)
                self.write(index, packet)

    def read(self, index: int) -> None:
        """Take the packets that a host sends, but not for so long that the other has to wait."""
        way, packets = self.ways[index], self.under_way[index]
        for _ in range(64):
            try:
                packet = os.read(self.ends[index], 65536)
            except BlockingIOError:
                return
            if self.uncut_bytes <= 0:
                way.severed += 1
            elif self.loss and self.draw() < self.loss:
                way.lost += 1
            elif self.under_way_bytes[index] + len(packet) > UNDER_WAY_BYTES:
                way.overflowed += 1
            elif self.delay_s or packets:
                before = packets[-1][0] if packets else 0.0  # none overtakes another
                packets.append((max(before, time.monotonic() + self.delay_s), packet))
                self.under_way_bytes[index] += len(packet)
            else:
                self.write(index, packet)

    def write(self, index: int, packet: bytes) -> None:
        """Hand a packet to the host it is for; what that cannot take is carried all the same."""
        with suppress(OSError):
            os.write(self.ends[1 - index], packet)
        self.ways[index].carried += 1
        self.ways[index].carried_bytes += len(packet)
        self.uncut_bytes -= len(packet)
        self.sever_if_cut()

    def sever_if_cut(self) -> None:
        if self.uncut_bytes > 0:
            return
        for index, packets in enumerate(self.under_way):
            self.ways[index].severed += len(packets)
            packets.clear()
            self.under_way_bytes[index] = 0


if __name__ == "__main__":
    control_fd, *tunnels, drawn_from = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the test that ends us
    _Relay((tunnels[0], tunnels[1]), seed=drawn_from).serve(socket.socket(fileno=control_fd))

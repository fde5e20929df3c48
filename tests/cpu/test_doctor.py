"""`paceline doctor` finds what is wrong, one check at a time, and says what to do about it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.doors import Doors
from tests.engines import FakeEngine, fake_facts, saying, serving

from paceline.actors.checks import cluster, machine, ranks, trial
from paceline.actors.checks import config as configured
from paceline.actors.checks.check import Check, Finding, failed, make, ok, skipped, warning
from paceline.actors.checks.server import Server, hop_times, sums
from paceline.actors.cli import main
from paceline.actors.commands import doctor
from paceline.runtime.config import EngineConfig, FleetConfig, ServerConfig, make_config
from paceline.runtime.errors import EngineError

NO_RAY = EngineConfig(distributed_executor_backend="mp")


def raises(error: Exception) -> Finding:
    raise error


# ----------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (EngineError("rank 0 died"), "rank 0 died"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
)
def test_a_check_that_raises_has_failed(error: Exception, text: str) -> None:
    made = make(Check("x", lambda: raises(error)))
    assert (made.finding.verdict, made.finding.text) == ("failed", text)


def test_a_check_that_hangs_has_failed_and_keeps_nobody() -> None:
    came_back = threading.Event()

    def hang() -> Finding:
        came_back.wait(20)
        return ok("late")

    began_s = time.monotonic()
    made = make(Check("x", hang, timeout_s=0.1))
    came_back.set()
    assert time.monotonic() - began_s < 5
    assert made.finding.text == "did not end within 0 s"


# ---------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize(
    ("line", "is_met"),
    [
        ("msgspec>=0.1", True),
        ("msgspec>=900", False),
        ("no-such-package", False),
        ("no-such-package; extra == 'dev'", True),
        ("no-such-package; python_version < '3'", True),
    ],
)
def test_what_is_missing_or_too_old_is_named(line: str, is_met: bool) -> None:
    assert bool(machine.unmet([line])) is not is_met


def test_this_machine_is_one_that_the_tests_run_on() -> None:
    assert machine.packages().verdict == "ok"
    assert machine.compiler().verdict in ("ok", "warning")


def test_a_processor_tells_what_it_can_do(tmp_path: Path, monkeypatch: Any) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("model name\t: x\nflags\t\t: fpu amx_bf16 avx512bw\nflags\t\t: other\n")
    monkeypatch.setattr(machine, "CPUINFO", told)
    assert machine.cpu_flags() == {"fpu", "amx_bf16", "avx512bw"}
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert machine.cpu_flags() == frozenset()


def test_a_machine_without_a_compiler_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    found = machine.compiler()
    assert found.verdict == "warning"
    assert "g++" in found.advice


def test_little_shared_memory_and_few_files_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MIN_SHM_BYTES", 1 << 60)
    monkeypatch.setattr(machine, "MIN_FILES", 1 << 40)
    found = machine.limits()
    assert found.verdict == "warning"
    assert "--shm-size" in found.advice
    assert "ulimit -n" in found.advice


def test_two_ranks_of_this_machine_add_up() -> None:
    found = ranks.collectives(EngineConfig(device="cpu", disable_custom_all_reduce=True))
    assert found.verdict == "ok"
    assert found.facts["path"] == "gloo"
    assert found.facts["microseconds"] > 0


# --------------------------------------------------------------------------------------------- settings


def test_a_port_in_use_fails_and_says_which() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for server in (ServerConfig(port=port), ServerConfig(port=0, grpc_port=port)):
            found = make(Check("ports", lambda server=server: configured.ports(server))).finding
            assert found.verdict == "failed"
            assert str(port) in found.text
    assert configured.ports(ServerConfig(port=0, grpc_port=0)).verdict == "ok"


@pytest.mark.parametrize(
    ("server", "verdict"),
    [
        (ServerConfig(), "ok"),
        (ServerConfig(host="0.0.0.0"), "warning"),
        (ServerConfig(host="0.0.0.0", api_key="k"), "ok"),
        (ServerConfig(ssl_certfile="/nowhere.pem"), "failed"),
    ],
)
def test_doors_that_are_open_to_all_are_noticed(
    server: ServerConfig, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PACELINE_API_KEY", raising=False)
    look = Check("access", lambda: configured.access(server, EngineConfig()))
    assert make(look).finding.verdict == verdict


def test_a_collector_that_does_not_listen_is_noticed() -> None:
    assert configured.traces(ServerConfig()).verdict == "skipped"
    with socket.create_server(("127.0.0.1", 0)) as collector:
        url = f"http://127.0.0.1:{collector.getsockname()[1]}"
        server = ServerConfig(otlp_traces_endpoint=url)
        assert configured.traces(server).verdict == "ok"
    assert configured.traces(server).verdict == "warning"


def test_a_model_that_is_not_there_fails() -> None:
    look = Check("model", lambda: configured.model(make_config({"model": "/no/such/folder"})))
    assert make(look).finding.verdict == "failed"


# -------------------------------------------------------------------------------------------------- Ray


def test_engines_that_need_no_ray_have_none_looked_at() -> None:
    assert cluster.cluster(NO_RAY, FleetConfig()).verdict == "skipped"
    assert cluster.authentication(NO_RAY).verdict == "skipped"


def test_more_ranks_than_this_machine_has_devices_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = EngineConfig(distributed_executor_backend="ray", tensor_parallel_size=4096)
    found = cluster.cluster(config, FleetConfig())
    assert found.verdict == "failed"
    assert "--ray-address" in found.advice


def test_a_cluster_that_is_not_there_fails_at_once() -> None:
    config = EngineConfig(distributed_executor_backend="ray", ray_address="127.0.0.1:1")
    found = make(Check("placement", lambda: cluster.cluster(config, FleetConfig()))).finding
    assert found.verdict == "failed"
    assert "cannot reach Ray at 127.0.0.1:1" in found.text
    assert "RAY_AUTH_MODE" in found.advice


def test_the_ranks_of_all_engines_are_counted() -> None:
    config = EngineConfig(tensor_parallel_size=1)
    settings = FleetConfig(prefill_replicas=1, decode_replicas=2, prefill_tensor_parallel_size=4)
    sizes = [each.world_size for each in cluster.engines(config, settings)]
    assert sizes == [4, 1, 1]
    assert cluster.engines(config, FleetConfig()) == [config]


@pytest.mark.parametrize(
    ("environ", "verdict"),
    [
        ({}, "skipped"),
        ({"RAY_ADDRESS": "h:1"}, "warning"),
        ({"RAY_ADDRESS": "h:1", "RAY_AUTH_MODE": "disabled"}, "warning"),
        ({"RAY_AUTH_MODE": "token", "HOME": "/nowhere"}, "failed"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "hidden"}, "ok"),
    ],
)
def test_a_cluster_that_asks_nobody_is_noticed(environ: dict[str, str], verdict: str) -> None:
    config = EngineConfig(distributed_executor_backend="ray")
    found = cluster.authentication(config, environ=environ)
    assert found.verdict == verdict
    assert "hidden" not in str(found)


# ----------------------------------------------------------------------------------------------- servers


def test_hops_are_what_each_figure_has_more_than_those_inside_it() -> None:
    before = dict.fromkeys(("total", "queue", "prefill", "decode"), (0.0, 0.0))
    now = {"total": (2.0, 2.0), "queue": (0.2, 2.0), "prefill": (0.6, 2.0), "decode": (1.0, 2.0)}
    hops = hop_times(before, now, wall_s=1.5)
    assert hops == pytest.approx(
        {"HTTP": 0.5, "frontend and link": 0.1, "queue": 0.1, "prefill": 0.3, "decode": 0.5}
    )
    assert hop_times(now, now, wall_s=1.0) == {}


def test_sums_are_read_from_the_exposition() -> None:
    text = (
        "# TYPE paceline:request_queue_time_seconds histogram\n"
        'paceline:request_queue_time_seconds_bucket{le="+Inf"} 4\n'
        "paceline:request_queue_time_seconds_sum 2.5\n"
        "paceline:request_queue_time_seconds_count 4\n"
    )
    assert sums(text)["queue"] == (2.5, 4.0)
    assert sums(text)["total"] == (0.0, 0.0)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with serving(FakeEngine(step_s=0.002), fake_facts(tmp_path)) as served:
        yield served.url


def test_a_server_that_runs_is_asked_through_every_hop(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json", "--url", url]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    verdicts = {each["name"]: each["verdict"] for each in told["checks"]}
    assert verdicts == {
        "packages": "ok",
        "health": "ok",
        "version": "ok",
        "engines": "ok",
        "HTTP round trip": "ok",
        "gRPC round trip": "skipped",
        "KV transfer": "skipped",
    }
    (trip,) = [each for each in told["checks"] if each["name"] == "HTTP round trip"]
    hops = [f"{hop}_s" for hop in ("HTTP", "frontend and link", "queue", "prefill", "decode")]
    assert sum(trip["facts"][hop] for hop in hops) == pytest.approx(
        trip["facts"]["wall_s"], abs=0.02
    )


def test_a_server_that_hangs_or_wants_a_key_fails_and_the_rest_is_still_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PACELINE_API_KEY", raising=False)
    server = ServerConfig(api_key="k")
    with serving(FakeEngine(), fake_facts(tmp_path), server=server) as served:
        assert main(["doctor", "--url", served.url]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "wants a key" in out
    assert "failed: engines, HTTP round trip" in out


def test_both_doors_are_tried_where_both_are_known(tmp_path: Path) -> None:
    doors = Doors(tmp_path, FakeEngine(step_s=0.001), EngineConfig(), key="k")
    try:
        headers = {"authorization": "Bearer k"}
        with httpx.Client(base_url=doors.http_url, headers=headers, timeout=20) as client:
            server = Server(client=client, grpc_url=doors.grpc_url, api_key="k")
            assert server.grpc().verdict == "ok"
            wrong = Server(client=client, grpc_url=doors.grpc_url, api_key="wrong")
            assert make(Check("gRPC", wrong.grpc)).finding.verdict == "failed"
    finally:
        doors.stop()


def test_a_server_that_writes_too_little_is_not_well(tmp_path: Path) -> None:
    engine = FakeEngine(saying("no", end=False))
    with (
        serving(engine, fake_facts(tmp_path)) as served,
        httpx.Client(base_url=served.url, timeout=20) as client,
    ):
        found = make(Check("HTTP", Server(client=client).http)).finding
    assert found.verdict == "failed"
    assert "16 tokens were asked for, 2 came" in found.text


def test_a_trial_that_does_not_start_says_why_in_the_servers_words() -> None:
    config = make_config({"model": "/no/such/folder", "distributed_executor_backend": "mp"})
    words = r"the server did not start: .*/no/such/folder"
    with pytest.raises(EngineError, match=words), trial.trial(config, FleetConfig()):
        pass


# ----------------------------------------------------------------------------------------------- command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only checks that take no time."""
    found = {"a": ok("fine"), "b": warning("odd", "mend it"), "c": skipped("no need")}
    checks = [Check(name, lambda each=each: each) for name, each in found.items()]
    monkeypatch.setattr(doctor, "_checks", lambda *_: checks)


@pytest.mark.usefixtures("quick")
def test_warnings_do_not_fail_it_and_their_advice_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--no-round-trip"]) == 0
    out = capsys.readouterr().out
    assert "mend it" in out
    assert out.splitlines()[-1] == "fine, but look at: b"
    assert "\x1b" not in out


def test_nothing_is_started_where_a_check_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_checks", lambda *_: [Check("a", lambda: failed("broken"))])
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["checks"][-1]["text"] == "not before the above is mended"


def test_settings_that_cannot_be_read_end_it_with_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--tensor-parallel-size", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_server_is_started_asked_through_every_hop_and_ended(
    capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    flags = ["--distributed-executor-backend", "mp", "--tensor-parallel-size", "1"]
    code = main(["doctor", "--json", *flags, "--speculative-config", "null", "--model", "embedded"])
    told = json.loads(capsys.readouterr().out)
    assert code == 0, told
    verdicts = {each["name"]: each["verdict"] for each in told["checks"][3:]}
    assert verdicts == {
        "start": "ok",
        "health": "ok",
        "version": "ok",
        "engines": "ok",
        "HTTP round trip": "ok",
        "gRPC round trip": "ok",
        "KV transfer": "skipped",
        "stop": "ok",
    }

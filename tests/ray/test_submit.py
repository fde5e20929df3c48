"""Paceline as a job of a cluster of two nodes: what it says, how it ends, and what it leaves: nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from tests.ray.cluster import Cluster

from paceline.parallel.launch import free_port

READY_S = 120.0

SERVE_YAML = """
model: embedded
tensor_parallel_size: 2
speculative_config: {model: embedded/drafter, layer_parallel_size: 4}
shutdown_timeout: 60.0
"""


def submit(cluster: Cluster, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paceline", "submit", "--address", cluster.jobs, *args],
        capture_output=True,
        text=True,
        timeout=180,
        env={**cluster.env, **more},
        check=False,
    )


def await_ready(cluster: Cluster, job: str, url: str) -> None:
    deadline_s = time.monotonic() + READY_S
    while True:
        try:
            assert httpx.get(f"{url}/health", timeout=10.0).status_code == 200
            return
        except httpx.TransportError:
            if time.monotonic() >= deadline_s:
                pytest.fail(f"nobody serves: {submit(cluster, '--logs', job, '--no-wait').stdout}")
            time.sleep(0.2)


def test_the_exit_code_is_that_of_the_job(cluster: Cluster) -> None:
    done = submit(
        cluster, "--submission-id", "fails", "--", "generate", "--model", "/no/model", "x"
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "/no/model" in done.stdout
    assert submit(cluster, "--status", "fails").stdout == "FAILED\n"
    again = submit(cluster, "--submission-id", "fails", "--", "generate", "x")
    assert again.returncode == 2
    assert "already exists" in again.stderr
    assert len(again.stderr.splitlines()) == 1


def test_a_stopped_server_finishes_what_it_writes_and_leaves_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    port = free_port()
    config = tmp_path / "my.yaml"
    config.write_text(f"{SERVE_YAML}port: {port}\n")
    sent = submit(cluster, "--config", str(config), "--no-wait")
    assert sent.returncode == 0, sent.stderr
    job, url = sent.stdout.strip(), f"http://127.0.0.1:{port}"
    await_ready(cluster, job, url)
    assert submit(cluster, "--status", job).stdout == "RUNNING\n"
    body = {"prompt": "def f(", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60.0) as stream:
        lines = stream.iter_lines()
        next(lines)
        shared_memory = cluster.shared_memory()
        stopping = submit(cluster, "--stop", job)
        said = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert stopping.stdout == "STOPPED\n", stopping.stderr
    assert said[-1]["choices"][0]["finish_reason"] == "length"
    assert "is ready at" in submit(cluster, "--logs", job, "--no-wait").stdout
    assert shared_memory, "expected something that could be left"
    cluster.assert_nothing_left(shared_memory=shared_memory, port=port)


@pytest.mark.parametrize("stops", [False, True])
def test_interrupting_leaves_the_job_unless_told_to_stop_it(cluster: Cluster, stops: bool) -> None:
    flags = ["--stop-on-interrupt"] if stops else []
    job = f"interrupted-{stops}"
    serve = ["--submission-id", job, "--", "serve", "--port", str(free_port())]
    following = subprocess.Popen(
        [sys.executable, "-m", "paceline", "submit", "--address", cluster.jobs, *flags, *serve],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cluster.env,
    )
    assert following.stderr is not None
    assert following.stderr.readline() == f"paceline: submitted job {job}\n"
    following.send_signal(signal.SIGINT)
    _, said = following.communicate(timeout=60)
    assert following.returncode == 130
    assert ("goes on" in said) != stops
    if not stops:
        submit(cluster, "--stop", job)
    assert submit(cluster, "--status", job).stdout == "STOPPED\n"


def test_a_refused_token_says_what_to_set(cluster: Cluster, tmp_path: Path) -> None:
    done = submit(cluster, "--status", "any", RAY_AUTH_MODE="token", HOME=str(tmp_path))
    assert done.returncode == 2
    assert "set RAY_AUTH_MODE here as where the cluster was started" in done.stderr
    assert len(done.stderr.splitlines()) == 1

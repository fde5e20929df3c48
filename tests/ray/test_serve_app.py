"""Paceline under a real Ray Serve: one replica in a placement group of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.ray.cluster import Cluster

from paceline.parallel.launch import free_port

START_S = 120.0
SERVE = str(Path(sys.executable).parent / "serve")

PROGRAM = """
import sys
import ray
from ray import serve

from paceline.actors.serve_app import build_app

ray.init(log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(build_app({
    "model": "embedded",
    "tensor_parallel_size": "2",
    "disable_custom_all_reduce": True,
    "speculative_config": '{"model": "embedded/drafter", "layer_parallel_size": 4}',
    "served_model_name": "tiny",
    "api_key": "secret",
    "deployment_config": {
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 4},
    },
}))
groups = [g for g in ray.util.placement_group_table().values() if g["state"] == "CREATED"]
print("groups", len(groups), flush=True)
sys.stdin.read()
serve.shutdown()
living = [g for g in ray.util.placement_group_table().values() if g["state"] == "CREATED"]
print("left", len(living), flush=True)
"""


@pytest.fixture(scope="module")
def program(cluster: Cluster) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve with our application, and where it listens."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**cluster.env, "RAY_ADDRESS": cluster.gcs},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    said = process.stdout.readline()
    if said != "groups 1\n":
        process.kill()
        pytest.fail(said + process.communicate()[1][-3000:])
    yield process, f"http://127.0.0.1:{port}"
    process.stdin.close()
    assert process.stdout.read().splitlines()[-1] == "left 0"
    assert process.wait(60) == 0


def complete(url: str, **more: Any) -> httpx.Response:
    body = {"prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0, **more}
    headers = {"Authorization": "Bearer secret"}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60.0)


def test_a_replica_answers_as_the_server_does(program: tuple[object, str]) -> None:
    _, url = program
    answer = complete(url).json()
    assert answer["model"] == "tiny"
    assert answer["usage"]["completion_tokens"] == 8
    events = complete(url, stream=True).text.split("\n\n")
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in events if "{" in event]
    assert "".join(texts) == answer["choices"][0]["text"]
    assert len(texts) > 1


def test_keys_are_asked_for_and_health_is_not_a_secret(program: tuple[object, str]) -> None:
    _, url = program
    assert httpx.get(f"{url}/v1/models", timeout=30.0).status_code == 401
    assert httpx.get(f"{url}/health", timeout=30.0).status_code == 200

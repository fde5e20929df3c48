"""An existing cluster: by RAY_ADDRESS, and by a submitted job."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.ray.conftest import Command, environment

from paceline.parallel.launch import free_port

RAY = str(Path(sys.executable).parent / "ray")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A started Ray head with a dashboard: its address and its job server."""
    gcs, dashboard = free_port(), free_port()
    subprocess.run(
        [
            RAY,
            "start",
            "--head",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            "--num-cpus=2",
            "--disable-usage-stats",
            f"--dashboard-agent-listen-port={free_port()}",
        ],
        check=True,
        capture_output=True,
        timeout=120,
        env=environment(),
    )
    yield {"gcs": f"127.0.0.1:{gcs}", "jobs": f"http://127.0.0.1:{dashboard}"}
    subprocess.run([RAY, "stop", "--force"], capture_output=True, timeout=60, env=environment())


def test_generate_joins_the_cluster_of_ray_address(
    head: dict[str, str], paceline: Command, pair_flags: list[str]
) -> None:
    done = paceline("generate", *pair_flags, "--compare", RAY_ADDRESS=head["gcs"])
    assert done.returncode == 0, done.stderr
    assert "tokens identical" in done.stderr


def test_a_group_that_cannot_be_placed_is_given_up_at_the_deadline(
    head: dict[str, str], paceline: Command, pair_flags: list[str]
) -> None:
    flags = ["3" if flag == "2" else flag for flag in pair_flags]
    done = paceline("generate", *flags, "--placement-timeout-s", "3", RAY_ADDRESS=head["gcs"])
    assert done.returncode == 2
    assert "3 ranks need 3 CPU" in done.stderr
    assert "has 2 CPU (2 free)" in done.stderr
    assert "in 3 s" in done.stderr


def test_a_cluster_that_is_not_there_is_one_line(paceline: Command, pair_flags: list[str]) -> None:
    done = paceline("generate", *pair_flags, "--ray-address", f"127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_submitted_job_runs_to_its_end(head: dict[str, str], pair_flags: list[str]) -> None:
    prompts = pair_flags[1]
    done = subprocess.run(
        [str(ROOT / "deploy/job/generate.sh"), head["jobs"], prompts, *pair_flags[2:]],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(RAY=RAY),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    assert "drafted tokens accepted" in done.stdout

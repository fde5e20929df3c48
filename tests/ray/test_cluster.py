"""An existing cluster, by RAY_ADDRESS."""

from __future__ import annotations

from tests.ray.cluster import Cluster
from tests.ray.conftest import Command

from paceline.parallel.launch import free_port


def test_generate_joins_the_cluster_of_ray_address(
    cluster: Cluster, paceline: Command, pair_flags: list[str]
) -> None:
    done = paceline("generate", *pair_flags, "--compare", RAY_ADDRESS=cluster.gcs)
    assert done.returncode == 0, done.stderr
    assert "tokens identical" in done.stderr


def test_a_group_that_cannot_be_placed_is_given_up_at_the_deadline(
    cluster: Cluster, paceline: Command, pair_flags: list[str]
) -> None:
    flags = ["5" if flag == "2" else flag for flag in pair_flags]
    done = paceline("generate", *flags, "--placement-timeout-s", "3", RAY_ADDRESS=cluster.gcs)
    assert done.returncode == 2
    assert "5 ranks need 5 CPU" in done.stderr
    assert "has 2 CPU (2 free)" in done.stderr
    assert "in 3 s" in done.stderr


def test_a_cluster_that_is_not_there_is_one_line(paceline: Command, pair_flags: list[str]) -> None:
    done = paceline("generate", *pair_flags, "--ray-address", f"127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1

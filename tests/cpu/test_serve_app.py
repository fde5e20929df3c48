"""What Ray Serve is told of an application, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.actors import serve_app
from paceline.runtime.errors import ConfigError


@pytest.fixture(autouse=True)
def machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 8.0})


def deployment(**args: Any) -> Any:
    return serve_app.build_app(args)._bound_deployment


def test_ranks_have_a_bundle_each_beside_the_replicas_own() -> None:
    built = deployment(tensor_parallel_size=2)
    assert built._replica_config.placement_group_bundles == [{"CPU": 1}, {"GPU": 1}, {"GPU": 1}]
    config = built.init_args[0]
    assert config.ray_bundle_indices == (1, 2)
    assert config.device == "cuda"


def test_values_of_the_command_line_are_read_as_yaml() -> None:
    built = deployment(
        tensor_parallel_size="2", device="cpu", speculative_config='{"method": "ngram"}'
    )
    config = built.init_args[0]
    assert config.tensor_parallel_size == 2
    assert config.speculative_config.method == "ngram"
    assert built._replica_config.placement_group_bundles[1] == {"CPU": 1}


def test_settings_of_serve_pass_through() -> None:
    scaling = {"min_replicas": 1, "max_replicas": 5, "target_ongoing_requests": 16}
    built = deployment(shutdown_timeout=7.0, deployment_config={"autoscaling_config": scaling})
    assert built._deployment_config.autoscaling_config.target_ongoing_requests == 16
    assert built._deployment_config.graceful_shutdown_timeout_s == 7.0
    assert built._deployment_config.max_ongoing_requests == 128 + 1024


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"prt": 1}, "unknown key 'prt'"),
        ({"port": 1}, "unknown key 'port'"),
        ({"tensor_parallel_size": "two"}, "tensor_parallel_size"),
        ({"shutdown_timeout": "soon"}, "shutdown_timeout"),
        ({"model": "{"}, "model: while parsing"),
    ],
)
def test_what_cannot_be_is_one_line(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        serve_app.build_app(args)
    assert "\n" not in str(refused.value)

"""Paceline under Ray Serve: replicas that Serve places, scales, checks and ends, behind its proxy.

    serve run paceline.actors.serve_app:build_app model=my-target tensor_parallel_size=4

    Serve's proxy ──> replica ──────────> coordinator ──> shards
                      the HTTP API         all in the replica's own placement group

Each replica is one engine with the HTTP API of `paceline serve`. Needs the extra `serve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import ray
import yaml
from ray import serve
from starlette.types import ASGIApp

from paceline.actors.app import connect
from paceline.actors.frontends import http
from paceline.runtime.async_llm import AsyncLLM
from paceline.runtime.config import (
    EngineConfig,
    ServerConfig,
    make_config,
    readable,
    reject_unknown,
)
from paceline.runtime.errors import ConfigError, EngineError
from paceline.runtime.metrics import Metrics
from paceline.runtime.preflight import examine

DEPLOYMENT = "deployment_config"
"""The key whose mapping goes to Serve as it is: `autoscaling_config`, `num_replicas`, ..."""
SERVER_KEYS = (
    "served_model_name",
    "api_key",
    "api_key_file",
    "chat_template",
    "shutdown_timeout",
    "enable_vllm_metric_names",
    "per_request_spec_decode_metrics",
)
"""Settings of `paceline serve` that apply; sockets, certificates and processes are Serve's business."""
HEALTH_TIMEOUT_S = 30.0


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """The application for `serve run` and `serve deploy`, from the settings of an engine and of its API,
    and Serve's own under `deployment_config`. Values may be texts, as on a command line. Raises
    ConfigError."""
    given = {key: _parsed(key, value) for key, value in args.items()}
    reject_unknown(given, (*EngineConfig.__struct_fields__, *SERVER_KEYS, DEPLOYMENT), what="key")
    serves_own = given.pop(DEPLOYMENT, None) or {}
    try:
        server = msgspec.convert({k: given.pop(k) for k in SERVER_KEYS if k in given}, ServerConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(readable(str(error))) from None
    config = _in_replica(make_config(given))
    options = {
        # whatever else is running: the engine itself queues, and refuses past its queue
        "max_ongoing_requests": config.max_num_seqs + config.max_queued_requests,
        "graceful_shutdown_timeout_s": server.shutdown_timeout,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "ray_actor_options": {"num_cpus": 1},
        "placement_group_bundles": _bundles(config),
        **serves_own,
    }
    deployment: Any = serve.deployment(serve.ingress()(Replica), name="paceline", **options)
    return deployment.bind(config, server)


class Replica:
    """One engine and its HTTP API, in the placement group that Serve made for it."""

    def __init__(self, config: EngineConfig, server: ServerConfig) -> None:
        """Returns when the engine is loaded. Raises UserError or EngineError."""
        facts = examine(config)
        self._server = server
        self._metrics = Metrics(
            http.model_name(config, server),
            version=http.version(),
            num_speculative_tokens=0
            if config.speculative_config is None
            else config.speculative_config.num_speculative_tokens,
            vllm_names=server.enable_vllm_metric_names,
        )
        self._engine = connect(config, facts)
        self._llm = AsyncLLM(self._engine, facts, config, observer=self._metrics)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        self._llm.start()
        llm = self._llm
        return http.make_app(
            llm, llm.facts, llm.config, self._server, exposition=self._metrics.exposition
        )

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises: EngineError if no token comes."""
        if not await self._llm.check_health(timeout_s=HEALTH_TIMEOUT_S / 2):
            raise EngineError("the engine writes no tokens")

    async def __del__(self) -> None:
        """Serve has waited for the requests that it sent; those that are left end here."""
        if not hasattr(self, "_llm"):  # it did not start
            return
        await self._llm.drain(timeout_s=0.0)
        await self._llm.close()
        self._engine.close()


def _parsed(key: str, value: Any) -> Any:
    """A text of the command line, as YAML would read it."""
    if not isinstance(value, str):
        return value
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from None
    return value if parsed is None else parsed


def _in_replica(config: EngineConfig) -> EngineConfig:
    """The config of an engine whose ranks go to the bundles after the replica's own."""
    device = config.device
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"
    return msgspec.structs.replace(
        config,
        device=device,
        distributed_executor_backend="ray",
        ray_placement_group=None,
        ray_bundle_indices=tuple(range(1, 1 + config.num_ranks)),
    )


def _bundles(config: EngineConfig) -> list[dict[str, float]]:
    """The replica's own, then one device per rank."""
    rank = {"GPU" if config.device == "cuda" else "CPU": 1.0}
    return [{"CPU": 1.0}, *[rank] * config.num_ranks]

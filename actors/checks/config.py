"""What was configured: the model, ports, certificates and keys, where traces go."""

from __future__ import annotations

import contextlib
import socket
from urllib.parse import urlsplit

from paceline.actors.checks.check import Finding, ok, skipped, warning
from paceline.runtime.config import EngineConfig, ServerConfig

CONNECT_S = 3.0
PUBLIC = ("0.0.0.0", "::")


def model(config: EngineConfig) -> Finding:
    """Whether model and drafter are there, whole, and fit each other."""
    from paceline.runtime.preflight import examine

    facts = examine(config)
    arch = facts.arch
    text = (
        f"{config.model}: {arch.family}, {arch.num_layers} layers of {arch.hidden_size}, context "
        f"{facts.max_model_len}"
    )
    if config.speculative_config is not None and config.draft_size:
        text += f"; drafter {config.speculative_config.model}"
    return ok(text, family=arch.family, max_model_len=facts.max_model_len)


def ports(server: ServerConfig) -> Finding:
    """Whether the doors can be opened. Raises ConfigError where not."""
    from paceline.actors.frontends.grpc import reserve
    from paceline.actors.frontends.http import bind

    wanted = {"HTTP": server.port}
    with contextlib.closing(bind(server.host, server.port)):
        if server.grpc_port is not None:
            wanted["gRPC"] = server.grpc_port
            reserve(server.host, server.grpc_port).close()
    named = [f"{name} {port or 'any'}" for name, port in wanted.items()]
    return ok(f"free on {server.host}: {', '.join(named)}", **wanted)


def access(server: ServerConfig, config: EngineConfig) -> Finding:
    """Certificates and keys. Raises ConfigError for those that are of no use."""
    from paceline.actors.frontends.auth import load_keys
    from paceline.runtime.tls import check_tls, link_tls, server_tls

    check_tls(server, config)
    keys = load_keys(server) is not None
    doors, links = server_tls(server) is not None, link_tls(config) is not None
    text = (
        f"API keys {'asked for' if keys else 'not asked for'}, doors {'with' if doors else 'without'} TLS, "
        f"KV links {'with' if links else 'without'} TLS"
    )
    facts = {"keys": keys, "tls": doors, "link_tls": links}
    if server.host in PUBLIC and not keys:
        return warning(
            text,
            f"{server.host} is reached from everywhere: have clients send a key (PACELINE_API_KEY or "
            "--api-key-file), or listen on 127.0.0.1",
            **facts,
        )
    return ok(text, **facts)


def traces(server: ServerConfig) -> Finding:
    """Whether somebody listens where traces go. Raises ConfigError for what is no place."""
    from paceline.runtime.tracing import otlp_target

    target = otlp_target(server)
    if target is None:
        return skipped("no traces are asked for (--otlp-traces-endpoint)")
    parts = urlsplit(target.endpoint)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), CONNECT_S).close()
    except OSError as error:
        return warning(
            f"nobody listens at {target.endpoint}: {error.strerror or error}",
            "start the collector, or mend otlp_traces_endpoint; requests are served without it",
        )
    return ok(f"{target.endpoint} listens, {target.protocol}")

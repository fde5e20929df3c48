"""Everything a user can set, read once and passed down; nobody changes it afterwards.

The flags of the command line, the keys of a YAML file and the keyword arguments of `LLM` are these
fields under the same names (`tensor_parallel_size`, `--tensor-parallel-size`). Descriptions here
are the `--help` text.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from paceline.runtime.errors import ConfigError
from paceline.runtime.types import CalibrationName

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
LogLevel = Literal["debug", "info", "warning", "error"]


MOST_TREE_ROWS = 64
"""Nodes of a tree that a pass can tell apart."""


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are drafted. `--speculative-config` takes these keys as JSON."""

    method: Annotated[
        Literal["draft_model", "ngram", "combined"],
        Meta(
            description="What proposes tokens: a model, the request's own earlier tokens, or whichever pays."
        ),
    ] = "draft_model"
    model: Annotated[
        str, Meta(description="The drafter: a folder, a hub id, or `embedded/drafter`.")
    ] = "embedded/drafter"
    num_speculative_tokens: Annotated[
        int, Meta(ge=1, le=64, description="Most tokens drafted per round.")
    ] = 5
    draft_length: Annotated[
        Literal["adaptive", "fixed"],
        Meta(
            description="Draft as many as pay, by recent acceptance and load, or always num_speculative_tokens."
        ),
    ] = "adaptive"
    tree: Annotated[
        Literal["chain", "beam", "dynamic", "dynamic_threshold"],
        Meta(
            description="How drafts branch while few requests run. beam: tree_width nodes at each of "
            "num_speculative_tokens levels, the tree_nodes likeliest kept; dynamic: node after node where it "
            "promises most; dynamic_threshold: the same level by level, in fewer passes. With draft_length "
            "adaptive, trees of up to tree_nodes while these give more than chains."
        ),
    ] = "chain"
    tree_width: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="Most nodes of a level (beam), most children of a node (dynamic).",
        ),
    ] = 8
    tree_nodes: Annotated[
        int,
        Meta(ge=1, le=64, description="Most nodes of a tree: draft tokens verified in one pass."),
    ] = 32
    verification: Annotated[
        Literal["coupled", "rejection"],
        Meta(
            description="How sampled drafts are accepted. coupled: the text of a seed is the same whatever is "
            "drafted; rejection: a few more are accepted, and the text of a seed depends on draft lengths."
        ),
    ] = "coupled"
    prompt_lookup_max: Annotated[
        int, Meta(ge=1, le=32, description="Longest suffix that ngram looks for.")
    ] = 4
    prompt_lookup_min: Annotated[
        int, Meta(ge=1, le=32, description="Shortest suffix that ngram looks for.")
    ] = 2
    layer_parallel_size: Annotated[
        int,
        Meta(
            ge=1, description="Layers of the drafter that run side by side; 1 is plain speculation."
        ),
    ] = 1
    layer_groups: Annotated[
        tuple[tuple[int, ...], ...] | None,
        Meta(
            description="The groups themselves, as a list of lists; instead of layer_parallel_size."
        ),
    ] = None
    exact_layers: Annotated[
        tuple[int, ...],
        Meta(description="Layers that always run alone; negative ones count from the end."),
    ] = (0, -1)
    layer_parallel_policy: Annotated[
        Literal["attention", "block"],
        Meta(description="Run attention side by side, or attention and MLP."),
    ] = "attention"
    placement: Annotated[
        Literal["tensor", "layer"],
        Meta(description="Split every layer over the draft ranks, or give each rank whole layers."),
    ] = "tensor"
    calibration: Annotated[
        CalibrationName,
        Meta(description="After which rounds the drafter's KV is made exact again."),
    ] = "on_mismatch"
    draft_tensor_parallel_size: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Ranks the drafter runs on; the target's number if not given."),
    ] = None
    schedule: Annotated[
        Literal["lockstep", "interleaved", "adaptive", "ahead"],
        Meta(
            description="lockstep: a step drafts, then verifies. interleaved: half of the requests draft while the "
            "other half is verified, on the same ranks. adaptive: whichever of the two gives more. ahead: the "
            "drafter has ranks of its own and drafts on while the target verifies."
        ),
    ] = "lockstep"
    draft_ranks: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Ranks of the drafter's own, with schedule ahead; 1 if not given."),
    ] = None
    max_tokens_ahead: Annotated[
        Annotated[int, Meta(ge=1, le=256)] | None,
        Meta(
            description="Most drafts that wait for their verification, with schedule ahead; if not given, "
            "what a round that accepts all needs for the next: twice num_speculative_tokens and 1."
        ),
    ] = None
    dtype: Annotated[
        Dtype,
        Meta(description="The drafter computes in this; auto: as for the target."),
    ] = "auto"


class KvTransferConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How KV moves between engines. `--kv-transfer-config` takes these keys as JSON; those that vLLM
    has too mean the same."""

    kv_connector: Annotated[
        Literal["PacelineConnector"], Meta(description="The only one there is.")
    ] = "PacelineConnector"
    kv_role: Annotated[
        Literal["kv_producer", "kv_consumer", "kv_both"],
        Meta(description="What the engine is for: prefill, decode, or both."),
    ] = "kv_both"
    kv_load_failure_policy: Annotated[
        Literal["recompute", "fail"],
        Meta(description="What becomes of a request whose KV could not be fetched."),
    ] = "recompute"
    engine_id: Annotated[
        str | None, Meta(description="The engine's name among others; made up if not given.")
    ] = None
    lanes: Annotated[
        int, Meta(ge=1, le=16, description="Connections between two ranks, used side by side.")
    ] = 2
    chunk_bytes: Annotated[
        int, Meta(ge=1 << 16, le=1 << 22, description="Most payload of one message.")
    ] = 1 << 20
    credit_bytes: Annotated[
        int,
        Meta(ge=1 << 16, description="Most that is under way to one consumer rank on one lane."),
    ] = 1 << 24
    codec: Annotated[
        Literal["none", "int8"],
        Meta(description="int8 halves 16-bit KV on the wire, per token and head: lossy."),
    ] = "none"
    data_plane: Annotated[
        Literal["auto", "grpc", "shm"],
        Meta(description="auto reads shared memory where both ranks are on one host."),
    ] = "auto"
    draft_kv: Annotated[
        Literal["auto", "transfer", "rebuild"],
        Meta(
            description="Whether the drafter's KV travels too, or the drafter reads the prompt again; auto: "
            "whichever is cheaper."
        ),
    ] = "auto"
    lease_s: Annotated[
        float, Meta(gt=0, description="How long KV is held for a consumer that is not heard of.")
    ] = 30.0
    timeout_s: Annotated[
        float,
        Meta(gt=0, description="How long a fetch may take, waiting for the prefill included."),
    ] = 120.0
    max_transfers: Annotated[
        int, Meta(ge=1, le=4096, description="Most requests whose KV is offered at once.")
    ] = 128
    host: Annotated[
        str | None,
        Meta(description="Address that links listen on; that of the node if not given."),
    ] = None


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: a target, perhaps a drafter, and the ranks they run on."""

    model: Annotated[
        str,
        Meta(
            description="The target: a folder, a hub id, or `embedded` (the pair that ships with Paceline)."
        ),
    ] = "embedded"
    dtype: Annotated[
        Dtype,
        Meta(
            description="The target computes in this; auto: as stored, on a CPU bfloat16 only where it is fast."
        ),
    ] = "auto"
    tensor_parallel_size: Annotated[
        int, Meta(ge=1, description="Ranks the target is split over.")
    ] = 1
    max_model_len: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="Longest prompt and output together; the model's own limit if not given."),
    ] = None
    max_num_batched_tokens: Annotated[
        int, Meta(ge=1, description="Most rows of one pass, over all requests.")
    ] = 512
    max_num_seqs: Annotated[
        int, Meta(ge=1, le=4096, description="Most requests that run at once.")
    ] = 128
    max_queued_requests: Annotated[
        int, Meta(ge=0, description="Requests that may wait; past it a server answers 429.")
    ] = 1024
    block_size: Annotated[
        int, Meta(ge=16, le=256, multiple_of=16, description="Tokens of one KV block.")
    ] = 16
    enable_prefix_caching: Annotated[
        bool, Meta(description="Reuse the KV of prompts that begin alike.")
    ] = True
    gpu_memory_utilization: Annotated[
        float,
        Meta(gt=0, le=1, description="Part of a GPU's memory for weights and KV cache together."),
    ] = 0.9
    attention_backend: Annotated[
        Literal["auto", "flash", "sdpa"],
        Meta(
            description="On GPUs: flash reads KV blocks through FlashAttention, sdpa gathers them for "
            "torch; auto takes flash where it is installed and works. CPUs have kernels of their own."
        ),
    ] = "auto"
    enforce_eager: Annotated[
        bool,
        Meta(
            description="On GPUs, launch every operation of a pass anew; if false, passes of few rows are "
            "recorded as CUDA graphs and played. Without meaning on CPUs."
        ),
    ] = True
    kv_cache_memory: Annotated[
        str | int | None,
        Meta(
            description="KV cache of each rank, in bytes or like 4GiB; if not given, from "
            "gpu_memory_utilization, on a CPU a part of what is free."
        ),
    ] = None
    kv_sink_tokens: Annotated[
        int, Meta(ge=1, description="First tokens that requests with kv_policy sink_window keep.")
    ] = 4
    kv_window: Annotated[
        int, Meta(ge=16, description="Latest tokens that requests with kv_policy sink_window keep.")
    ] = 1024
    priority_ageing_s: Annotated[
        float,
        Meta(gt=0, description="Waiting so many seconds makes up for one level of priority."),
    ] = 30.0
    async_scheduling: Annotated[
        bool | None,
        Meta(
            description="Plan and send the next step while one runs, so that ranks of other processes need "
            "not wait for a plan. If not given, for ranks on GPUs: on a CPU it pays where they leave a core."
        ),
    ] = None
    seed: Annotated[int, Meta(description="Seeds requests that bring no seed of their own.")] = 0
    speculative_config: Annotated[
        SpeculativeConfig | None,
        Meta(description="How tokens are drafted, as JSON; null for no speculation."),
    ] = None
    kv_transfer_config: Annotated[
        KvTransferConfig | None,
        Meta(
            description="How KV moves to and from other engines, as JSON; null for an engine alone."
        ),
    ] = None
    link_certfile: Annotated[
        str | None,
        Meta(
            description="Certificate of this engine's KV links, for mutual TLS between engines; needs the "
            "DNS name paceline-link. A path that is valid on every node, as the next two."
        ),
    ] = None
    link_keyfile: Annotated[str | None, Meta(description="The private key of link_certfile.")] = (
        None
    )
    link_ca_certs: Annotated[
        str | None,
        Meta(description="Only links with a certificate of these authorities are talked to."),
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="auto takes GPUs where there are any.")
    ] = "auto"
    distributed_executor_backend: Annotated[
        Literal["ray", "mp", "uni"] | None,
        Meta(
            description="Where ranks live: Ray actors, local processes, or this process (one rank)."
        ),
    ] = None
    cpu_threads: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="Threads of each rank on a CPU; if not given, its share of the host's cores."
        ),
    ] = None
    disable_custom_all_reduce: Annotated[
        bool,
        Meta(
            description="On a CPU host, sum over ranks by Gloo, which sleeps while it waits, instead "
            "of shared memory, where a rank spins first: kinder where cores are shared."
        ),
    ] = False
    ray_address: Annotated[
        str | None,
        Meta(description="The Ray cluster to join; RAY_ADDRESS if not given, else a local one."),
    ] = None
    ray_placement_group: Annotated[
        str | None,
        Meta(
            description="Name or id of a placement group to use; that of the actor Paceline runs in if not "
            "given, else one of its own."
        ),
    ] = None
    ray_bundle_indices: Annotated[
        tuple[Annotated[int, Meta(ge=0)], ...] | None,
        Meta(
            description="Bundles of that placement group to use, in the order of ranks, like 0,1,4; all if "
            "not given."
        ),
    ] = None
    placement_timeout_s: Annotated[
        float, Meta(gt=0, description="How long to wait for the cluster to place the ranks.")
    ] = 60.0
    load_timeout_s: Annotated[
        float, Meta(gt=0, description="How long to wait for every rank to start and load its part.")
    ] = 600.0
    step_timeout_s: Annotated[
        float,
        Meta(gt=0, description="How long a step may take before the engine gives its ranks up."),
    ] = 120.0
    log_level: Annotated[
        LogLevel, Meta(description="What every process of a server or an engine logs, at least.")
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        Meta(description="Log lines for people, or one JSON object each."),
    ] = "text"

    @property
    def drafts_ahead(self) -> bool:
        """Whether the drafter has ranks of its own, apart from the target's."""
        spec = self.speculative_config
        return spec is not None and spec.schedule == "ahead"

    @property
    def draft_size(self) -> int:
        """Ranks of the drafter; 0 without one."""
        spec = self.speculative_config
        if spec is None or spec.method == "ngram":
            return 0
        if self.drafts_ahead:
            return spec.draft_ranks or 1
        return spec.draft_tensor_parallel_size or self.tensor_parallel_size

    @property
    def shared_draft_size(self) -> int:
        """Of these, those that are ranks of the target's world too."""
        return 0 if self.drafts_ahead else self.draft_size

    @property
    def interleaved(self) -> bool:
        """Whether ranks may draft for one plan while they verify another."""
        spec = self.speculative_config
        return spec is not None and spec.schedule in ("interleaved", "adaptive")

    @property
    def plans_in_flight(self) -> int:
        """Plans for different requests that ranks may have at once."""
        return 2 if self.interleaved else 1

    @property
    def world_size(self) -> int:
        """Ranks that carry out plans. Target and drafter share them from rank 0 on, and the wider of
        the two decides; a drafter that is ahead has a world of its own."""
        return max(self.tensor_parallel_size, self.shared_draft_size)

    @property
    def num_ranks(self) -> int:
        """Of all worlds together, each with a device of its own."""
        return self.world_size + self.draft_size - self.shared_draft_size


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how an engine is served."""

    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="HTTP port; 0 takes a free one.")] = 8000
    grpc_port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None,
        Meta(description="gRPC port; 0 takes a free one; none if not given."),
    ] = None
    served_model_name: Annotated[
        str | None, Meta(description="The model's name in the API; --model if not given.")
    ] = None
    api_key: Annotated[
        str | None,
        Meta(
            description="Clients must send it as a bearer token; several with commas between. Others on the "
            "host can see it: PACELINE_API_KEY in the environment or api_key_file are better."
        ),
    ] = None
    api_key_file: Annotated[
        str | None,
        Meta(
            description="One KEY or TENANT:KEY per line, # begins a comment; read again when it changes."
        ),
    ] = None
    ssl_certfile: Annotated[
        str | None,
        Meta(
            description="Serve HTTP and gRPC with TLS and this certificate; read again when it changes."
        ),
    ] = None
    ssl_keyfile: Annotated[
        str | None,
        Meta(description="The private key of ssl_certfile, unless that file has it too."),
    ] = None
    ssl_ca_certs: Annotated[
        str | None, Meta(description="Authorities of the certificates that clients bring.")
    ] = None
    ssl_cert_reqs: Annotated[
        int,
        Meta(
            ge=0,
            le=2,
            description="Client certificates: 0 none, 1 checked where one is brought (HTTP only), 2 needed.",
        ),
    ] = 0
    chat_template: Annotated[
        str | None, Meta(description="A Jinja file instead of the model's own chat template.")
    ] = None
    shutdown_timeout: Annotated[
        float,
        Meta(ge=0, description="Seconds that running requests get when the server is stopped."),
    ] = 30.0
    api_server_count: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="Frontend processes. Each has the HTTP and gRPC doors on the same ports; one "
            "that dies is replaced.",
        ),
    ] = 1
    enable_vllm_metric_names: Annotated[
        bool, Meta(description="Also expose metrics under the names vLLM gives them.")
    ] = False
    per_request_spec_decode_metrics: Annotated[
        bool, Meta(description="Report speculation with every response, asked for or not.")
    ] = False
    disable_log_stats: Annotated[
        bool, Meta(description="Do not log throughput every ten seconds.")
    ] = False
    disable_log_requests: Annotated[
        bool, Meta(description="Do not log a line for each request that ends.")
    ] = False
    otlp_traces_endpoint: Annotated[
        str | None,
        Meta(
            description="URL of an OpenTelemetry collector that gets a trace of each request; "
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT if not given, else none."
        ),
    ] = None
    otlp_traces_protocol: Annotated[
        Literal["grpc", "http/protobuf"] | None,
        Meta(
            description="What it speaks; OTEL_EXPORTER_OTLP_TRACES_PROTOCOL if not given, else grpc."
        ),
    ] = None


class FleetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many engines serve together, and how requests are spread over them."""

    prefill_replicas: Annotated[
        int, Meta(ge=0, description="Engines that read prompts for others; 0 for none.")
    ] = 0
    decode_replicas: Annotated[
        int, Meta(ge=1, description="Engines that write texts, and read prompts where that pays.")
    ] = 1
    prefill_tensor_parallel_size: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="tensor_parallel_size of engines that read prompts; without prefill_replicas, of "
            "one such engine."
        ),
    ] = None
    decode_tensor_parallel_size: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="tensor_parallel_size of engines that write texts."),
    ] = None
    routing_policy: Annotated[
        Literal["conditional", "always", "local", "round_robin"],
        Meta(
            description="Read prompts elsewhere where that is cheaper, always or never; round_robin takes "
            "turns, whatever is cached or busy."
        ),
    ] = "conditional"
    engine_placement: Annotated[
        Literal["pack", "spread"],
        Meta(description="On Ray, spread puts engines on different nodes where it can."),
    ] = "pack"
    restart_engines: Annotated[
        bool, Meta(description="Start another engine in place of one that is lost.")
    ] = True

    @property
    def num_engines(self) -> int:
        return self.prefill_replicas + self.decode_replicas


_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(value: str | int, *, what: str) -> int:
    """`4GiB`, `500MB` or a plain number. Raises ConfigError for anything else."""
    if isinstance(value, int):
        number, unit = float(value), ""
    else:
        match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", value)
        try:
            number, unit = float(match[1]), match[2].lower()  # type: ignore[index]
        except (TypeError, ValueError):
            raise ConfigError(
                f"{what} must be a number of bytes like 4GiB, found {value!r}"
            ) from None
    if unit not in _UNITS or number <= 0:
        raise ConfigError(f"{what} must be a number of bytes like 4GiB, found {value!r}")
    return int(number * _UNITS[unit])


def make_config(settings: Mapping[str, Any]) -> EngineConfig:
    """An `EngineConfig` from plain values. Raises ConfigError, in one line, for unknown keys and
    bad values."""
    values = {key.replace("-", "_"): value for key, value in settings.items()}
    reject_unknown(values, EngineConfig.__struct_fields__, what="config key")
    for name, struct in _NESTED.items():
        nested = values.get(name)
        if isinstance(nested, str):
            nested = values[name] = _json_object(nested, what=name)
        if isinstance(nested, Mapping):
            if name == "kv_transfer_config":
                nested = values[name] = _ours(nested)
            reject_unknown(nested, struct.__struct_fields__, what=f"{name} key")
    try:
        config = msgspec.convert(values, EngineConfig, from_attributes=True)
    except msgspec.ValidationError as error:
        raise ConfigError(readable(str(error))) from None
    if config.kv_cache_memory is not None:
        parse_bytes(config.kv_cache_memory, what="kv_cache_memory")
    spec = config.speculative_config
    if spec is not None and spec.prompt_lookup_min > spec.prompt_lookup_max:
        raise ConfigError("prompt_lookup_min must be at most prompt_lookup_max")
    if spec is not None:
        _check_schedule(config, spec)
    if spec is not None and spec.tree != "chain":
        _check_tree(spec)
    transfer = config.kv_transfer_config
    if transfer is not None and transfer.host in ("0.0.0.0", "::", "*"):
        raise ConfigError(
            f"kv_transfer_config.host {transfer.host} is every address of the node: name the one under "
            "which the other engines reach it"
        )
    if config.distributed_executor_backend == "uni":
        # a drafter that is ahead is a thread beside the one rank, on the same device
        widest = max(config.world_size, config.draft_size)
        if widest > 1:
            raise ConfigError(
                f"distributed_executor_backend uni has one rank; {widest} are asked for"
            )
    return config


def _check_tree(spec: SpeculativeConfig) -> None:
    """Raise ConfigError for a tree that would not be drafted, or not fit."""
    if spec.method == "ngram":
        raise ConfigError(f"tree {spec.tree} needs a draft model; ngram drafts chains")
    depth = spec.num_speculative_tokens
    if spec.tree_nodes < depth:
        raise ConfigError(
            f"tree_nodes {spec.tree_nodes} is less than one node for each of num_speculative_tokens "
            f"{depth} levels"
        )
    if spec.tree == "beam" and spec.tree_width * (depth - 1) > MOST_TREE_ROWS:
        raise ConfigError(
            f"tree_width {spec.tree_width} at {depth - 1} levels before the last makes the drafter read "
            f"{spec.tree_width * (depth - 1)} nodes, {MOST_TREE_ROWS} at most: lower tree_width or "
            "num_speculative_tokens"
        )


_NO_LINKS = (
    "with schedule ahead no KV moves between engines, a drafter with ranks of its own has no links"
)


def _check_schedule(config: EngineConfig, spec: SpeculativeConfig) -> None:
    """Raise ConfigError for settings that do not go with the schedule."""
    if spec.schedule == "adaptive" and spec.draft_length != "adaptive":
        raise ConfigError("schedule adaptive needs draft_length adaptive: both are chosen together")
    if spec.schedule != "ahead":
        for name in ("draft_ranks", "max_tokens_ahead"):
            if getattr(spec, name) is not None:
                raise ConfigError(f"{name} is for schedule ahead; the schedule is {spec.schedule}")
        return
    if spec.method != "draft_model":
        raise ConfigError(f"schedule ahead needs a draft model, method is {spec.method}")
    if spec.verification != "coupled":
        raise ConfigError(
            f"schedule ahead needs verification coupled, found {spec.verification}: drafts come without "
            "the distributions that they were drawn from"
        )
    if spec.draft_tensor_parallel_size is not None:
        raise ConfigError(
            "draft_tensor_parallel_size is of a drafter on the target's ranks; with schedule ahead say "
            "draft_ranks"
        )
    if config.kv_transfer_config is not None:
        raise ConfigError(f"kv_transfer_config: {_NO_LINKS}")


def make_fleet(settings: Mapping[str, Any]) -> FleetConfig:
    """A `FleetConfig` from plain values. Raises ConfigError, in one line, for unknown keys and bad
    values."""
    values = {key.replace("-", "_"): value for key, value in settings.items()}
    reject_unknown(values, FleetConfig.__struct_fields__, what="config key")
    if values.get("prefill_tensor_parallel_size") is not None:
        values.setdefault("prefill_replicas", 1)
    try:
        fleet = msgspec.convert(values, FleetConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(readable(str(error))) from None
    if fleet.prefill_tensor_parallel_size is not None and not fleet.prefill_replicas:
        raise ConfigError("prefill_tensor_parallel_size needs prefill_replicas of at least 1")
    return fleet


def check_fleet(fleet: FleetConfig, config: EngineConfig) -> None:
    """Raise ConfigError where engines like `config` cannot serve together."""
    if config.drafts_ahead and fleet.prefill_replicas:
        raise ConfigError(f"prefill_replicas: {_NO_LINKS}")
    transfer = config.kv_transfer_config
    if transfer is None or fleet.num_engines == 1:
        return
    if transfer.kv_role != "kv_both":
        raise ConfigError(
            f"kv_role {transfer.kv_role} is that of one engine; prefill_replicas and decode_replicas "
            "give each of several its own: leave out kv_role or those"
        )
    if transfer.engine_id is not None:
        raise ConfigError(
            f"engine_id {transfer.engine_id!r} is the name of one engine; the server names each of "
            f"{fleet.num_engines}: leave it out"
        )


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError where it cannot be read or is no mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of settings")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def reject_unknown(values: Mapping[str, Any], known: tuple[str, ...], *, what: str) -> None:
    """Raise ConfigError for the first key that is not known, naming the one probably meant."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown {what} {key!r}{hint}")


OUR_CONNECTOR = "PacelineConnector"

_NESTED: dict[str, type[msgspec.Struct]] = {
    "speculative_config": SpeculativeConfig,
    "kv_transfer_config": KvTransferConfig,
}


def _ours(given: Mapping[str, Any]) -> dict[str, Any]:
    """A kv_transfer_config in our words, from one in vLLM's or the field's."""
    values = dict(given)
    extra = values.pop("kv_connector_extra_config", None)
    if isinstance(extra, Mapping):
        values = {**extra, **values}
    roles = {"prefill": "kv_producer", "decode": "kv_consumer"}
    role = values.get("kv_role")
    if isinstance(role, str):
        values["kv_role"] = roles.get(role, role)
    connector = values.get("kv_connector")
    if isinstance(connector, str) and connector != OUR_CONNECTOR:
        raise ConfigError(
            f"kv_connector {connector!r:.80} is another project's; Paceline has {OUR_CONNECTOR}, which "
            "is also what it takes if none is named"
        )
    return values


def _json_object(text: str, *, what: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{what} is not valid JSON: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{what} must be a JSON object")
    return value


def readable(message: str) -> str:
    """msgspec says `... - at `$.name``; users know it as `name`."""
    reason, _, place = message.partition(" - at `$.")
    return f"{place.rstrip('`')}: {reason[0].lower()}{reason[1:]}" if place else message

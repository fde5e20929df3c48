"""Nothing the user wrote is skipped, and what is wrong with it fits in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from paceline.actors.cli import main
from paceline.runtime.config import (
    EngineConfig,
    FleetConfig,
    KvTransferConfig,
    ServerConfig,
    SpeculativeConfig,
    check_fleet,
    make_config,
    make_fleet,
    parse_bytes,
    read_yaml,
)
from paceline.runtime.errors import ConfigError
from paceline.runtime.types import SamplingParams

GENERATE_FLAGS = [
    "--help",
    "--prompts-file",
    "--output",
    "--compare",
    "--config",
    "--model",
    "--dtype",
    "--tensor-parallel-size",
    "--max-model-len",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--max-queued-requests",
    "--block-size",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--gpu-memory-utilization",
    "--attention-backend",
    "--enforce-eager",
    "--no-enforce-eager",
    "--kv-cache-memory",
    "--kv-sink-tokens",
    "--kv-window",
    "--priority-ageing-s",
    "--async-scheduling",
    "--no-async-scheduling",
    "--seed",
    "--speculative-config",
    "--kv-transfer-config",
    "--link-certfile",
    "--link-keyfile",
    "--link-ca-certs",
    "--device",
    "--distributed-executor-backend",
    "--cpu-threads",
    "--disable-custom-all-reduce",
    "--no-disable-custom-all-reduce",
    "--ray-address",
    "--ray-placement-group",
    "--ray-bundle-indices",
    "--placement-timeout-s",
    "--load-timeout-s",
    "--step-timeout-s",
    "--log-level",
    "--log-format",
    "--max-tokens",
    "--min-tokens",
    "--temperature",
    "--top-k",
    "--top-p",
    "--min-p",
    "--repetition-penalty",
    "--presence-penalty",
    "--frequency-penalty",
    "--logit-bias",
    "--stop",
    "--stop-token-ids",
    "--include-stop-str-in-output",
    "--no-include-stop-str-in-output",
    "--ignore-eos",
    "--no-ignore-eos",
    "--logprobs",
    "--prompt-logprobs",
    "--skip-special-tokens",
    "--no-skip-special-tokens",
    "--structured-outputs",
    "--kv-policy",
]


NO_FLAGS = [(SamplingParams, "seed"), (SamplingParams, "n")]
"""--seed is the engine's; a command line shows one text per prompt."""


def refusal(settings: dict[Any, Any]) -> str:
    """The one line that refuses these settings."""
    with pytest.raises(ConfigError) as refused:
        make_config(settings)
    line = str(refused.value)
    assert "\n" not in line
    return line


def test_defaults_alone_are_a_config() -> None:
    assert make_config({}) == EngineConfig()


def test_unknown_key_suggests_the_nearest() -> None:
    line = refusal({"tensor_paralel_size": 2})
    assert line == "unknown config key 'tensor_paralel_size'; did you mean tensor_parallel_size?"


def test_unknown_key_inside_speculative_config_suggests_the_nearest() -> None:
    line = refusal({"speculative_config": {"num_speculative_token": 2}})
    assert line == (
        "unknown speculative_config key 'num_speculative_token'; did you mean num_speculative_tokens?"
    )


def test_unknown_key_that_resembles_nothing_lists_the_known() -> None:
    line = refusal({"zzz": 1})
    assert line.startswith("unknown config key 'zzz'; known: model, dtype, tensor_parallel_size")


@pytest.mark.parametrize("key", [1, None, True])
def test_key_that_is_no_string_inside_speculative_config_is_refused(key: Any) -> None:
    assert "unknown speculative_config key" in refusal({"speculative_config": {key: 1}})


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({"tensor_parallel_size": "two"}, "tensor_parallel_size", "expected `int`, got `str`"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size", "expected `int` >= 1"),
        ({"tensor_parallel_size": 1.5}, "tensor_parallel_size", "expected `int`, got `float`"),
        ({"max_model_len": 1}, "max_model_len", "expected `int` >= 2"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens", "expected `int` >= 1"),
        ({"dtype": "int4"}, "dtype", "invalid enum value 'int4'"),
        ({"max_num_seqs": 0}, "max_num_seqs", "expected `int` >= 1"),
        ({"max_num_seqs": 4097}, "max_num_seqs", "expected `int` <= 4096"),
        ({"max_queued_requests": -1}, "max_queued_requests", "expected `int` >= 0"),
        ({"block_size": 8}, "block_size", "expected `int` >= 16"),
        ({"block_size": 24}, "block_size", "expected `int` that's a multiple of 16"),
        ({"block_size": 512}, "block_size", "expected `int` <= 256"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization", "expected `float` > 0.0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization", "expected `float` <= 1.0"),
        ({"kv_sink_tokens": 0}, "kv_sink_tokens", "expected `int` >= 1"),
        ({"kv_window": 15}, "kv_window", "expected `int` >= 16"),
        ({"priority_ageing_s": 0}, "priority_ageing_s", "expected `float` > 0.0"),
        ({"kv_cache_memory": []}, "kv_cache_memory", "expected `int | str | null`, got `array`"),
        (
            {"speculative_config": {"method": "guess"}},
            "speculative_config.method",
            "invalid enum value 'guess'",
        ),
        (
            {"speculative_config": {"prompt_lookup_max": 0}},
            "speculative_config.prompt_lookup_max",
            "expected `int` >= 1",
        ),
        ({"device": "tpu"}, "device", "invalid enum value 'tpu'"),
        ({"step_timeout_s": 0}, "step_timeout_s", "expected `float` > 0.0"),
        ({"seed": None}, "seed", "expected `int`, got `null`"),
        ({"model": ["a"]}, "model", "expected `str`, got `array`"),
        (
            {"speculative_config": {"num_speculative_tokens": 65}},
            "speculative_config.num_speculative_tokens",
            "expected `int` <= 64",
        ),
        (
            {"speculative_config": {"num_speculative_tokens": 0}},
            "speculative_config.num_speculative_tokens",
            "expected `int` >= 1",
        ),
        (
            {"speculative_config": {"calibration": "sometimes"}},
            "speculative_config.calibration",
            "invalid enum value 'sometimes'",
        ),
        (
            {"speculative_config": {"draft_tensor_parallel_size": 0}},
            "speculative_config.draft_tensor_parallel_size",
            "expected `int` >= 1",
        ),
        (
            {"speculative_config": {"exact_layers": ["first"]}},
            "speculative_config.exact_layers[0]",
            "expected `int`, got `str`",
        ),
        ({"speculative_config": 5}, "speculative_config", "expected `object | null`, got `int`"),
    ],
)
def test_wrong_type_or_range_names_the_setting_and_what_was_expected(
    settings: dict[str, Any], name: str, reason: str
) -> None:
    line = refusal(settings)
    assert line.startswith(f"{name}: {reason}")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("4KiB", 4096),
        (" 1.5 MiB ", 3 * 2**19),
        ("2gib", 2**31),
        ("500MB", 500_000_000),
        ("1kB", 1000),
        ("2GB", 2 * 10**9),
    ],
)
def test_amounts_of_memory_have_units(given: str | int, found: int) -> None:
    assert parse_bytes(given, what="kv_cache_memory") == found
    assert make_config({"kv_cache_memory": given}).kv_cache_memory == given


@pytest.mark.parametrize("given", ["4 apples", "GiB", "", "1.2.3MiB", "-1GiB", 0, -5, "0", "nan"])
def test_what_is_no_amount_of_memory_is_refused(given: str | int) -> None:
    line = refusal({"kv_cache_memory": given})
    assert line == f"kv_cache_memory must be a number of bytes like 4GiB, found {given!r}"


def test_shortest_suffix_cannot_be_longer_than_the_longest() -> None:
    line = refusal({"speculative_config": {"prompt_lookup_min": 5, "prompt_lookup_max": 4}})
    assert line == "prompt_lookup_min must be at most prompt_lookup_max"


def test_one_process_cannot_hold_two_ranks() -> None:
    line = refusal({"distributed_executor_backend": "uni", "tensor_parallel_size": 2})
    assert line == "distributed_executor_backend uni has one rank; 2 are asked for"


def test_dashes_are_underscores() -> None:
    assert make_config({"tensor-parallel-size": 3}) == EngineConfig(tensor_parallel_size=3)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            {"tree": "dynamic", "draft_length": "fixed", "method": "ngram"},
            "tree dynamic needs a draft model; ngram drafts chains",
        ),
        (
            {"tree": "beam", "draft_length": "fixed", "tree_nodes": 4},
            "tree_nodes 4 is less than one node for each of num_speculative_tokens 5 levels",
        ),
        (
            {"tree": "beam", "draft_length": "fixed", "tree_width": 17},
            "makes the drafter read 68 nodes, 64 at most: lower tree_width or num_speculative_tokens",
        ),
    ],
)
def test_tree_that_would_not_be_drafted_is_refused(spec: dict[str, Any], reason: str) -> None:
    assert reason in refusal({"speculative_config": spec})


def test_speculative_config_may_be_a_json_string() -> None:
    config = make_config({"speculative_config": '{"model": "m", "num_speculative_tokens": 3}'})
    assert config.speculative_config == SpeculativeConfig(model="m", num_speculative_tokens=3)


def test_json_string_and_mapping_mean_the_same() -> None:
    mapping = {"layer_groups": [[0], [1, 2]], "exact_layers": [0]}
    text = '{"layer_groups": [[0], [1, 2]], "exact_layers": [0]}'
    assert make_config({"speculative_config": mapping}) == make_config({"speculative_config": text})


def test_speculative_config_may_be_a_struct() -> None:
    spec = SpeculativeConfig(num_speculative_tokens=2)
    assert make_config({"speculative_config": spec}).speculative_config == spec


@pytest.mark.parametrize("nothing", [None, "null"])
def test_null_speculative_config_means_no_speculation(nothing: str | None) -> None:
    config = make_config({"speculative_config": nothing})
    assert config.speculative_config is None
    assert config.draft_size == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{model: x}", "speculative_config is not valid JSON"),
        ("[1]", "speculative_config must be a JSON object"),
        ('"x"', "speculative_config must be a JSON object"),
    ],
)
def test_bad_json_in_speculative_config_is_refused(text: str, reason: str) -> None:
    assert reason in refusal({"speculative_config": text})


@pytest.mark.parametrize(
    ("target", "drafter", "world"), [(1, None, 1), (2, None, 2), (2, 1, 2), (1, 3, 3)]
)
def test_wider_of_target_and_drafter_is_the_world(
    target: int, drafter: int | None, world: int
) -> None:
    spec = SpeculativeConfig(draft_tensor_parallel_size=drafter)
    config = EngineConfig(tensor_parallel_size=target, speculative_config=spec)
    assert config.world_size == world
    assert config.draft_size == (drafter or target)


def test_drafting_without_a_model_needs_no_rank() -> None:
    spec = SpeculativeConfig(method="ngram", draft_tensor_parallel_size=4)
    config = EngineConfig(tensor_parallel_size=2, speculative_config=spec)
    assert (config.draft_size, config.world_size) == (0, 2)


@pytest.mark.parametrize(
    ("settings", "plans", "interleaved"),
    [
        ({}, 1, False),
        ({"async_scheduling": True}, 1, False),
        ({"speculative_config": {}}, 1, False),
        ({"speculative_config": {"schedule": "interleaved"}}, 2, True),
    ],
)
def test_a_second_plan_is_in_flight_where_that_is_wanted(
    settings: dict[str, Any], plans: int, interleaved: bool
) -> None:
    config = make_config(settings)
    assert (config.plans_in_flight, config.interleaved) == (plans, interleaved)


@pytest.mark.parametrize(("target", "draft_ranks", "drafter"), [(1, None, 1), (4, 2, 2)])
def test_a_drafter_that_is_ahead_has_ranks_of_its_own(
    target: int, draft_ranks: int | None, drafter: int
) -> None:
    spec = {"schedule": "ahead", "draft_ranks": draft_ranks}
    config = make_config({"tensor_parallel_size": target, "speculative_config": spec})
    assert config.drafts_ahead
    assert (config.world_size, config.draft_size) == (target, drafter)
    assert config.num_ranks == target + drafter
    assert config.shared_draft_size == 0


def test_in_lockstep_all_ranks_are_of_one_world() -> None:
    config = make_config(
        {"tensor_parallel_size": 2, "speculative_config": {"draft_tensor_parallel_size": 3}}
    )
    assert not config.drafts_ahead
    assert (config.world_size, config.num_ranks, config.shared_draft_size) == (3, 3, 3)
    assert EngineConfig(tensor_parallel_size=2).num_ranks == 2


@pytest.mark.parametrize(
    ("spec", "more", "reason"),
    [
        (
            {"schedule": "adaptive", "draft_length": "fixed"},
            {},
            "schedule adaptive needs draft_length adaptive",
        ),
        ({"method": "ngram"}, {}, "schedule ahead needs a draft model, method is ngram"),
        ({"verification": "rejection"}, {}, "schedule ahead needs verification coupled"),
        ({"draft_tensor_parallel_size": 2}, {}, "with schedule ahead say draft_ranks"),
        ({}, {"kv_transfer_config": {}}, "with schedule ahead no KV moves between engines"),
        ({"schedule": "lockstep", "draft_ranks": 1}, {}, "draft_ranks is for schedule ahead"),
        (
            {"schedule": "lockstep", "max_tokens_ahead": 1},
            {},
            "max_tokens_ahead is for schedule ahead",
        ),
        (
            {"draft_ranks": 2},
            {"distributed_executor_backend": "uni"},
            "distributed_executor_backend uni has one rank; 2 are asked for",
        ),
    ],
)
def test_what_does_not_go_with_a_schedule_is_refused(
    spec: dict[str, Any], more: dict[str, Any], reason: str
) -> None:
    assert reason in refusal({"speculative_config": {"schedule": "ahead", **spec}, **more})


def test_a_drafter_that_is_ahead_may_share_the_device_of_one_rank() -> None:
    spec = {"schedule": "ahead"}
    config = make_config({"distributed_executor_backend": "uni", "speculative_config": spec})
    assert (config.world_size, config.draft_size) == (1, 1)


def test_engines_that_draft_ahead_cannot_read_prompts_for_each_other() -> None:
    config = make_config({"speculative_config": {"schedule": "ahead"}})
    with pytest.raises(ConfigError, match="prefill_replicas: with schedule ahead no KV moves"):
        check_fleet(make_fleet({"prefill_replicas": 1}), config)
    check_fleet(make_fleet({"decode_replicas": 2}), config)


def test_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        EngineConfig().seed = 1  # type: ignore[misc]


# ----------------------------------------------------------------------------------------------- YAML


def yaml_file(folder: Path, text: str | bytes) -> str:
    path = folder / "paceline.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_yaml_keys_may_have_dashes(tmp_path: Path) -> None:
    assert read_yaml(yaml_file(tmp_path, "max-model-len: 64\n")) == {"max_model_len": 64}


def test_empty_yaml_sets_nothing(tmp_path: Path) -> None:
    assert read_yaml(yaml_file(tmp_path, "# nothing yet\n")) == {}


def test_nested_yaml_becomes_a_speculative_config(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "speculative-config:\n  num_speculative_tokens: 7\n")
    spec = make_config(read_yaml(path)).speculative_config
    assert spec == SpeculativeConfig(num_speculative_tokens=7)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: [unclosed", "is not valid YAML"),
        ("model: a: b", "is not valid YAML"),
        ("- a\n- b\n", "must hold a mapping"),
        ("just words", "must hold a mapping"),
        (b"\xff\xfe\x00bad", "is not valid"),
    ],
)
def test_bad_yaml_is_refused_in_one_line(tmp_path: Path, text: str | bytes, reason: str) -> None:
    path = yaml_file(tmp_path, text)
    with pytest.raises(ConfigError, match=reason) as refused:
        read_yaml(path)
    assert path in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent.yaml: No such file"):
        read_yaml(str(tmp_path / "absent.yaml"))


# ----------------------------------------------------------------------- engines that serve together


def test_a_size_for_prefill_means_one_engine_that_does_it() -> None:
    assert make_fleet({}) == FleetConfig()
    assert make_fleet({"prefill-tensor-parallel-size": 2}).prefill_replicas == 1
    assert make_fleet({"prefill_tensor_parallel_size": 2, "prefill_replicas": 3}).num_engines == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prefil_replicas": 1}, "did you mean prefill_replicas?"),
        ({"decode_replicas": 0}, "decode_replicas: expected `int` >= 1"),
        ({"routing_policy": "best"}, "routing_policy: invalid enum value 'best'"),
        ({"prefill_tensor_parallel_size": 2, "prefill_replicas": 0}, "needs prefill_replicas"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_fleet(settings)


VLLM_SHAPED = {
    "kv_connector": "PacelineConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "fail",
    "kv_connector_extra_config": {"lanes": 4},
}


def test_a_kv_transfer_config_in_vllms_shape_means_the_same() -> None:
    config = make_config({"kv_transfer_config": msgspec.json.encode(VLLM_SHAPED).decode()})
    assert config.kv_transfer_config == KvTransferConfig(kv_load_failure_policy="fail", lanes=4)
    check_fleet(make_fleet({"prefill_replicas": 1}), config)
    for alias, role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        found = make_config({"kv_transfer_config": {"kv_role": alias}}).kv_transfer_config
        assert found == KvTransferConfig(kv_role=role)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["NixlConnector", "MooncakeConnector", "paceline"])
def test_another_projects_connector_is_refused_with_the_name_of_ours(name: str) -> None:
    line = refusal({"kv_transfer_config": {"kv_connector": name}})
    assert name in line
    assert "PacelineConnector" in line


@pytest.mark.parametrize(
    ("transfer", "words"),
    [({"kv_role": "prefill"}, "kv_role kv_producer"), ({"engine_id": "mine"}, "engine_id 'mine'")],
)
def test_what_is_one_engines_is_refused_for_several(transfer: dict[str, str], words: str) -> None:
    config = make_config({"kv_transfer_config": transfer})
    check_fleet(make_fleet({}), config)
    with pytest.raises(ConfigError, match=words):
        check_fleet(make_fleet({"prefill_replicas": 1}), config)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*"])
def test_links_have_an_address_that_others_can_reach(host: str) -> None:
    line = refusal({"kv_transfer_config": {"host": host}})
    assert f"kv_transfer_config.host {host} is every address of the node" in line


# -------------------------------------------------------------------------------------- the fields


def fields() -> list[Any]:
    return [
        pytest.param(struct, field, id=f"{struct.__name__}.{field.name}")
        for struct in (
            EngineConfig,
            SpeculativeConfig,
            KvTransferConfig,
            ServerConfig,
            FleetConfig,
            SamplingParams,
        )
        for field in msgspec.structs.fields(struct)
    ]


@pytest.mark.parametrize(("struct", "field"), fields())
def test_every_field_has_a_default(
    struct: type[msgspec.Struct], field: msgspec.structs.FieldInfo
) -> None:
    assert not field.required


@pytest.mark.parametrize(("struct", "field"), fields())
def test_every_field_has_a_description(
    struct: type[msgspec.Struct], field: msgspec.structs.FieldInfo
) -> None:
    info = inspect.type_info(field.type)
    assert isinstance(info, inspect.Metadata)
    description = (info.extra_json_schema or {}).get("description", "")
    assert description.endswith(".")


def test_flags_of_generate_change_only_on_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--help"])
    assert ended.value.code == 0
    options = capsys.readouterr().out.partition("options:")[2]
    starts = re.findall(r"^  ((?:-h, )?--.*)$", options, flags=re.MULTILINE)
    flags = [flag for start in starts for flag in re.findall(r"(?<![\w-])--[a-z-]+", start)]
    assert list(dict.fromkeys(flags)) == GENERATE_FLAGS


@pytest.mark.parametrize("struct", [EngineConfig, SamplingParams])
def test_help_says_what_every_setting_does(
    struct: type[msgspec.Struct], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in msgspec.structs.fields(struct):
        info = inspect.type_info(field.type)
        assert isinstance(info, inspect.Metadata)
        description = (info.extra_json_schema or {})["description"]
        if (struct, field.name) not in NO_FLAGS:
            assert " ".join(description.split()) in shown

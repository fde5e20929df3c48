"""The command line in this process, on tiny models: what it writes, and how it refuses.

Every refusal is exit code 2 and one line on standard error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel

from paceline.actors.cli import main

SaveModel = Callable[..., tuple[Path, PreTrainedModel]]
MakeLlama = Callable[..., LlamaConfig]

OUTPUT_KEYS = {
    "prompt",
    "text",
    "token_ids",
    "finish_reason",
    "tokens_per_second",
    "rounds",
    "drafted",
    "accepted",
    "draft_ms",
    "verify_ms",
    "calibrate_ms",
}
PROMPTS = ([1, 2, 3, 4, 5], [9, 8, 7])


@pytest.fixture(scope="module")
def target(save_model: SaveModel, llama_config: MakeLlama) -> Path:
    """A model without a tokenizer, whose context is 128 tokens."""
    return save_model(llama_config())[0]


@pytest.fixture(scope="module")
def drafter(save_model: SaveModel, llama_config: MakeLlama) -> Path:
    """The target's equal: it agrees until its layers run side by side."""
    return save_model(llama_config())[0]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of prompts, as token ids."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in PROMPTS))
    return path


@pytest.fixture
def arguments(target: Path, prompts: Path) -> list[str]:
    """A command that works, to be spoilt."""
    return [
        "generate",
        *("--model", str(target)),
        *("--prompts-file", str(prompts)),
        *("--distributed-executor-backend", "uni"),
        *("--max-tokens", "12"),
    ]


@pytest.fixture
def speculation(drafter: Path) -> list[str]:
    """Flags that add a layer-parallel drafter."""
    spec = {
        "model": str(drafter),
        "layer_parallel_size": 2,
        "num_speculative_tokens": 3,
        "draft_length": "fixed",
    }
    return ["--speculative-config", json.dumps(spec)]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """`refused(argv)`: the one line of a command that the user must mend."""

    def run(argv: list[str]) -> str:
        capsys.readouterr()
        assert main(argv) == 2
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert len(lines) == 1, said.err
        assert "Traceback" not in said.err
        assert said.out == ""
        prefix, _, reason = lines[0].partition(": ")
        assert prefix == "paceline"
        return reason

    return run


@pytest.fixture
def records(tmp_path: Path) -> Callable[[list[str]], list[dict[str, Any]]]:
    """`records(argv)`: what a command that succeeds writes with --output."""

    def run(argv: list[str]) -> list[dict[str, Any]]:
        path = tmp_path / "output.jsonl"
        assert main([*argv, "--output", str(path)]) == 0
        return [json.loads(line) for line in path.read_text().splitlines()]

    return run


Refused = Callable[[list[str]], str]
Records = Callable[[list[str]], list[dict[str, Any]]]


# ------------------------------------------------------------------------------------ what it writes


def test_output_has_one_line_per_prompt_with_exactly_these_keys(
    arguments: list[str], speculation: list[str], records: Records
) -> None:
    found = records([*arguments, *speculation])
    assert len(found) == len(PROMPTS)
    assert [set(record) for record in found] == [OUTPUT_KEYS] * len(PROMPTS)


def test_output_says_what_was_generated_and_why_it_ended(
    arguments: list[str], records: Records
) -> None:
    for record in records([*arguments, "--ignore-eos"]):
        assert len(record["token_ids"]) == 12
        assert record["finish_reason"] == "length"
        assert record["text"] == ""
        assert record["prompt"] is None


def test_output_without_speculation_has_drafted_nothing(
    arguments: list[str], records: Records
) -> None:
    for record in records(arguments):
        assert record["drafted"] == record["accepted"] == 0
        assert record["draft_ms"] == record["calibrate_ms"] == 0.0
        assert record["verify_ms"] > 0.0


def test_output_with_speculation_accounts_for_every_token(
    arguments: list[str], speculation: list[str], records: Records
) -> None:
    for record in records([*arguments, *speculation, "--ignore-eos"]):
        assert record["drafted"] > 0
        # the first token comes with the prompt; every round emits one besides what it accepts
        assert record["accepted"] + record["rounds"] + 1 == len(record["token_ids"])
        assert record["draft_ms"] > 0.0


def test_speculation_changes_no_token(
    arguments: list[str], speculation: list[str], records: Records
) -> None:
    plain = [record["token_ids"] for record in records(arguments)]
    assert [record["token_ids"] for record in records([*arguments, *speculation])] == plain


def test_stop_token_ends_a_text(arguments: list[str], records: Records) -> None:
    third = records([*arguments, "--ignore-eos"])[0]["token_ids"][2]
    record = records([*arguments, "--ignore-eos", "--stop-token-ids", f"{third},96"])[0]
    assert record["finish_reason"] == "stop"
    assert record["token_ids"][-1] == third


def test_same_seed_samples_the_same_text(arguments: list[str], records: Records) -> None:
    sampled = [*arguments, "--temperature", "1.0"]
    texts = [
        [record["token_ids"] for record in records([*sampled, "--seed", seed])]
        for seed in ("7", "7", "8")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_compare_says_that_tokens_are_identical(
    arguments: list[str], speculation: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *speculation, "--compare"]) == 0
    said = capsys.readouterr().err
    assert "tokens identical with and without speculation (2 prompts)" in said
    assert "times as fast" in said


def test_compare_of_samples_claims_no_identity(
    arguments: list[str], speculation: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *speculation, "--compare", "--temperature", "1.0"]) == 0
    said = capsys.readouterr().err
    assert "identical" not in said
    assert "distributions do not" in said


def test_screen_says_where_the_time_went(
    arguments: list[str], speculation: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *speculation]) == 0
    said = capsys.readouterr().err
    for stage in ("calibrate", "draft", "verify", "coordinate", "drafted tokens accepted"):
        assert stage in said


def test_text_goes_to_standard_output(
    target: Path,
    save_model: SaveModel,
    llama_config: MakeLlama,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = save_model(llama_config(vocab_size=3))
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "one": 1, "two": 2}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    uni = ["--distributed-executor-backend", "uni", "--ignore-eos"]
    assert main(["generate", "one two", "--model", str(folder), "--max-tokens", "4", *uni]) == 0
    words = capsys.readouterr().out.split()
    assert len(words) == 4
    assert set(words) <= {"?", "one", "two"}


# ------------------------------------------------------------------------------------------- --config


def write_yaml(folder: Path, **settings: Any) -> str:
    path = folder / "engine.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return str(path)


def test_config_file_means_the_same_as_flags(
    tmp_path: Path,
    target: Path,
    drafter: Path,
    prompts: Path,
    arguments: list[str],
    speculation: list[str],
    records: Records,
) -> None:
    path = write_yaml(
        tmp_path,
        model=str(target),
        speculative_config=json.loads(speculation[1]),
        **{"distributed-executor-backend": "uni", "max-tokens": 12, "temperature": 0.7, "seed": 3},
    )
    by_file = records(["generate", "--prompts-file", str(prompts), "--config", path])
    sampling = ["--temperature", "0.7", "--seed", "3"]
    by_flags = records([*arguments, *speculation, *sampling])
    for one, other in zip(by_file, by_flags, strict=True):
        for key in ("token_ids", "finish_reason", "rounds", "drafted", "accepted"):
            assert one[key] == other[key]


def test_flags_win_over_the_config_file(
    tmp_path: Path, arguments: list[str], records: Records
) -> None:
    path = write_yaml(tmp_path, model="/absent", max_tokens=3, ignore_eos=True)
    for record in records([*arguments, "--config", path]):  # which sets model and max_tokens
        assert len(record["token_ids"]) == 12


def test_boolean_of_the_config_file_can_be_undone(
    tmp_path: Path, arguments: list[str], records: Records, refused: Refused
) -> None:
    first = records([*arguments, "--ignore-eos"])[0]["token_ids"][0]
    path = write_yaml(tmp_path, ignore_eos=True, stop_token_ids=[first])
    record = records([*arguments, "--config", path, "--no-ignore-eos"])[0]
    assert record["token_ids"] == [first]


def test_unknown_key_of_the_config_file_suggests_the_nearest(
    tmp_path: Path, arguments: list[str], refused: Refused
) -> None:
    path = write_yaml(tmp_path, max_token=3)
    line = refused([*arguments, "--config", path])
    assert line == f"unknown key in {path} 'max_token'; did you mean max_tokens?"


def test_bad_yaml_is_refused(tmp_path: Path, arguments: list[str], refused: Refused) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("model: [unclosed\n  and: more")
    assert "is not valid YAML" in refused([*arguments, "--config", str(path)])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tensor_parallel_size": "many"}, "tensor_parallel_size: expected `int`, got `str`"),
        ({"temperature": "hot"}, "temperature: expected `float`, got `str`"),
        ({"stop_token_ids": 5}, "stop_token_ids: expected `array`, got `int`"),
    ],
)
def test_bad_value_in_the_config_file_names_its_key(
    tmp_path: Path, arguments: list[str], refused: Refused, settings: dict[str, Any], reason: str
) -> None:
    assert refused([*arguments, "--config", write_yaml(tmp_path, **settings)]) == reason


# -------------------------------------------------------------------------------------------- refusals


def test_missing_folder_is_refused(arguments: list[str], refused: Refused) -> None:
    assert refused([*arguments, "--model", "./absent"]) == "no such model folder: ./absent"


def test_truncated_weights_are_refused(
    arguments: list[str], refused: Refused, save_model: SaveModel, llama_config: MakeLlama
) -> None:
    folder, _ = save_model(llama_config())
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    line = refused([*arguments, "--model", str(folder)])
    assert line.startswith(f"{path} is truncated or no safetensors file (1000 bytes)")


def test_prompt_longer_than_the_context_is_refused(
    arguments: list[str], prompts: Path, refused: Refused
) -> None:
    prompts.write_text(json.dumps({"prompt_token_ids": [1] * 128}))
    assert refused(arguments) == (
        "the prompt has 128 tokens, the context holds 128 with at least one to generate"
    )


def test_text_that_would_outgrow_the_context_ends_at_its_limit(
    arguments: list[str], prompts: Path, records: Records
) -> None:
    prompts.write_text(json.dumps({"prompt_token_ids": [1] * 125}))
    (record,) = records([*arguments, "--ignore-eos"])
    assert (len(record["token_ids"]), record["finish_reason"]) == (3, "length")


def test_more_ranks_than_devices_are_refused(arguments: list[str], refused: Refused) -> None:
    more = ["--distributed-executor-backend", "mp", "--tensor-parallel-size", "64"]
    line = refused([*arguments, *more, "--device", "cpu"])
    assert line.startswith("64 ranks need 64 cpu devices, this machine has")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--temperature", "-1"], "temperature must be 0 (greedy) or at least 1e-05, found -1.0"),
        (["--temperature", "nan"], "temperature must be 0 (greedy) or at least 1e-05, found nan"),
        (["--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (["--top-p", "0"], "top_p must be above 0 and at most 1, found 0.0"),
        (["--top-k", "-2"], "top_k must be positive, or 0 or -1 to keep all, found -2"),
        (["--min-p", "2"], "min_p must be from 0 to 1, found 2.0"),
        (["--max-tokens", "0"], "max_tokens must be at least 1, found 0"),
        (["--max-model-len", "999"], "max_model_len 999 exceeds the model's own limit of 128"),
        (["--tensor-parallel-size", "0"], "tensor_parallel_size: expected `int` >= 1"),
        (["--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
        (["--stop-token-ids", "a,b"], "argument --stop-token-ids: "),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--speculative-config", "{bad"], "speculative_config is not valid JSON"),
        (["--speculative-config", "[]"], "speculative_config must be a JSON object"),
        (
            ["--speculative-config", '{"num_speculative_tokns": 2}'],
            "unknown speculative_config key 'num_speculative_tokns'; did you mean num_spec",
        ),
        (["--speculative-config", '{"model": "./absent"}'], "no such model folder: ./absent"),
        (["--compare"], "--compare needs a --speculative-config to compare with"),
        (["--output", "absent/folder/out.jsonl"], "--output: no folder absent/folder"),
        (["--config", "absent.yaml"], "cannot read absent.yaml: No such file or directory"),
        (["--prompts-file", "absent.jsonl"], "cannot read absent.jsonl: No such file"),
        (["a second prompt"], "give either PROMPT or --prompts-file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flag_is_refused_by_name(
    arguments: list[str], refused: Refused, flags: list[str], reason: str
) -> None:
    assert refused([*arguments, *flags]).startswith(reason)


def test_refusal_of_a_flag_does_not_show_the_code_behind_it(
    arguments: list[str], refused: Refused
) -> None:
    assert "_token_list" not in refused([*arguments, "--stop-token-ids", "a,b"])


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["generate"]])
def test_command_that_says_too_little_is_refused(refused: Refused, argv: list[str]) -> None:
    assert refused(argv)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ('"a string"', "expected"),
        ('{"prompt": 5}', "expected"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "expected"),
        ('{"prompt_token_ids": ["a"]}', "expected"),
        ('{"prompt_token_ids": [true]}', "expected"),
        ('{"text": "a"}', "expected"),
    ],
)
def test_bad_line_of_the_prompts_file_is_named(
    arguments: list[str], prompts: Path, refused: Refused, line: str, reason: str
) -> None:
    prompts.write_text(f'{{"prompt_token_ids": [1]}}\n\n{line}\n')
    assert refused(arguments).startswith(f"{prompts}:3: {reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\n\n", "has no prompts"),
        (b'{"prompt_token_ids": []}', "the prompt is empty"),
        (b'{"prompt_token_ids": [1, 97]}', "token id 97 is outside the vocabulary of 97"),
        (b'{"prompt_token_ids": [-1]}', "token id -1 is outside the vocabulary of 97"),
        (b'{"prompt": "words"}', "has no tokenizer; give prompt_token_ids"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
    ],
)
def test_prompt_that_cannot_be_served_is_refused(
    arguments: list[str], prompts: Path, refused: Refused, text: bytes, reason: str
) -> None:
    prompts.write_bytes(text)
    assert reason in refused(arguments)

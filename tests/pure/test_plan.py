"""The cost model: its equations, the tables they were worked out for, what was published, and `paceline plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.actors import cli
from paceline.actors.commands import plan as command
from paceline.parallel.layer import exact_groups, layer_groups
from paceline.runtime.config import make_config
from paceline.runtime.costmodel import acceptance, memory, passes
from paceline.runtime.costmodel.gpus import GPUS, find_gpu
from paceline.runtime.costmodel.passes import EAGER, GRAPHS, Execution, Load, Machine
from paceline.runtime.costmodel.plan import Wish, make_plan
from paceline.runtime.costmodel.rounds import Drafting, Setting, choices, drafts_of, evaluate
from paceline.runtime.costmodel.shapes import SHAPES, Shape, known_shape
from paceline.runtime.costmodel.transfers import apart, prefill_s
from paceline.runtime.errors import ConfigError, ModelError

ROOT = Path(__file__).parents[2]
SIZING = ROOT / "deploy" / "sizing.md"


def machine_of(gpu: str = "H100", *, execution: Execution = GRAPHS, **more: Any) -> Machine:
    values: dict[str, Any] = {"gpus_per_node": 8, "network": 50e9} | more
    return Machine(gpu=find_gpu(gpu), execution=execution, **values)


def setting_of(**more: Any) -> Setting:
    values: dict[str, Any] = {
        "target": SHAPES["Llama-3.1-70B"],
        "drafter": SHAPES["Llama-3.2-1B"],
        "machine": machine_of(),
        "ranks": 8,
        "batch": 1,
        "context": 4096,
        "acceptance": 0.75,
        "utilization": 0.9,
    }
    return Setting(**values | more)


def one_row(context: int, *, rows: int = 1) -> Load:
    return Load(rows=rows, sequences=1, context=context, outputs=rows)


# ------------------------------------------------------------------------------------------ acceptance

LENGTHS = {  # draft's cost over verifying's: best length (speed-up) at acceptance 0.5, 0.6, ... 0.9
    0.02: [(4, 1.79), (6, 2.17), (8, 2.76), (11, 3.82), (19, 6.37)],
    0.05: [(3, 1.63), (4, 1.92), (6, 2.35), (8, 3.09), (13, 4.67)],
    0.1: [(2, 1.46), (3, 1.67), (4, 1.98), (6, 2.47), (10, 3.43)],
    0.2: [(1, 1.25), (2, 1.40), (3, 1.58), (4, 1.87), (7, 2.37)],
    0.4: [(1, 1.07), (1, 1.14), (2, 1.22), (2, 1.36), (4, 1.58)],
}


@pytest.mark.parametrize("cost", LENGTHS)
def test_the_best_draft_length_is_that_of_the_design(cost: float) -> None:
    found = [acceptance.best_draft_length(chance / 10, cost) for chance in range(5, 10)]
    assert [(length, round(speedup, 2)) for length, speedup in found] == LENGTHS[cost]


@given(st.floats(0.05, 0.95), st.floats(0.01, 0.9))
def test_no_other_draft_length_is_better(chance: float, cost: float) -> None:
    _, best = acceptance.best_draft_length(chance, cost)
    others = [acceptance.chain_tokens(chance, n) / (1 + n * cost) for n in range(200)]
    assert best == pytest.approx(max(others))


@given(st.floats(0.0, 0.99), st.integers(0, 30))
def test_tokens_of_a_chain_are_the_geometric_series(chance: float, length: int) -> None:
    series = (1 - chance ** (length + 1)) / (1 - chance)
    assert acceptance.chain_tokens(chance, length) == pytest.approx(series)


def test_the_first_draft_of_a_round_is_exact_and_the_others_are_not() -> None:
    drafting = Drafting(
        num_speculative_tokens=3, layer_parallel_size=4, draft_tensor_parallel_size=1
    )
    drafts = drafts_of(setting_of(acceptance=0.7), drafting)
    assert drafts.round_tokens == pytest.approx(1 + 0.7 + 0.7 * 0.65 + 0.7 * 0.65**2)


WORKED = {  # a draft pass over verifying, attention's share: tokens per verification with N = 1 .. 5
    (0.25, 0.19): [2.00, 2.06, 2.04, 2.01, 1.85],
    (0.25, 0.60): [2.00, 2.27, 2.34, 2.35, 2.19],
    (0.35, 0.19): [1.64, 1.69, 1.68, 1.66, 1.53],
    (0.35, 0.60): [1.64, 1.90, 1.97, 1.99, 1.86],
}


@pytest.mark.parametrize(("draft_cost", "attention"), WORKED)
def test_the_worked_example_of_choosing_a_layer_parallel_size(
    draft_cost: float, attention: float
) -> None:
    found = []
    for size, accepted in enumerate((0.70, 0.69, 0.67, 0.65, 0.58), start=1):
        collective = 0.0 if size == 1 else 0.01
        grouped = passes.side_by_side_speedup(attention, size, collective_share=collective)
        drafting = 5 * draft_cost / passes.drafting_speedup(grouped, 5)
        found.append(round(acceptance.tree_tokens(accepted, 5) / (1 + drafting), 2))
    assert found == WORKED[draft_cost, attention]


# ---------------------------------------------------------------------------------------- sizes

PUBLISHED_BILLIONS = {  # parameters, from the models' cards
    "Llama-3.1-8B": 8.03,
    "Llama-3.1-70B": 70.6,
    "Llama-3.1-405B": 406,
    "Llama-3.2-1B": 1.24,
    "Llama-3.2-3B": 3.21,
    "Mistral-7B-v0.3": 7.25,
    "Qwen2-0.5B": 0.49,
    "Qwen2-1.5B": 1.54,
    "Qwen2-7B": 7.62,
    "Qwen2-72B": 72.7,
    "Qwen2.5-3B": 3.09,
    "Qwen2.5-14B": 14.8,
    "Qwen2.5-32B": 32.8,
    "Qwen3-0.6B": 0.6,
    "Qwen3-1.7B": 1.72,
    "Qwen3-8B": 8.19,
    "Qwen3-32B": 32.8,
}


@pytest.mark.parametrize("model", PUBLISHED_BILLIONS)
def test_the_shapes_have_as_many_parameters_as_the_models(model: str) -> None:
    assert SHAPES[model].num_params / 1e9 == pytest.approx(PUBLISHED_BILLIONS[model], rel=0.01)


def test_attention_is_a_fifth_of_a_layers_weights_and_less_in_small_models() -> None:
    models = ("Llama-3-8B", "Llama-3.2-1B", "Qwen2-7B", "Qwen2-0.5B")
    shares = [round(SHAPES[model].attention_share, 2) for model in models]
    assert shares == [0.19, 0.17, 0.13, 0.12]


def test_a_model_is_known_by_its_hub_id_too() -> None:
    assert known_shape("meta-llama/Meta-Llama-3-70B-Instruct") is SHAPES["Llama-3-70B"]
    assert known_shape("Qwen/Qwen2.5-7B-Instruct") is SHAPES["Qwen2.5-7B"]
    assert known_shape("Qwen/Qwen2.5-7") is None


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_hold_equal_parts_where_everything_divides(ranks: int) -> None:
    shape = SHAPES["Llama-3.1-70B"]
    part = memory.held(shape, ranks=ranks)
    assert part.weights == shape.num_params * 2 // ranks
    assert part.kv_per_token == shape.kv_bytes_per_token // ranks


def test_where_ranks_outnumber_kv_heads_each_still_holds_one() -> None:
    shape = SHAPES["Qwen2-1.5B"]  # two KV heads
    part = memory.held(shape, ranks=8)
    assert part.kv_per_token == shape.kv_bytes_per_token // 2
    assert part.weights > shape.num_params * 2 / 8


def test_layers_side_by_side_spread_few_kv_heads_over_more_ranks() -> None:
    shape = SHAPES["Qwen2-1.5B"]
    groups = layer_groups(shape.num_layers, size=4)
    alone, grouped = (memory.held(shape, ranks=8, groups=g) for g in (None, groups))
    assert grouped.kv_per_token < alone.kv_per_token / 2
    assert grouped.attention < alone.attention


def test_copies_of_a_drafter_take_what_the_published_placement_says() -> None:
    """A drafter of 8B in bfloat16 is 16 GB on each of four GPUs, beside 17.6 GB of a target of 70B over eight."""
    setting = setting_of(drafter=SHAPES["Llama-3-8B"])
    drafting = Drafting(
        num_speculative_tokens=5,
        layer_parallel_size=4,
        draft_tensor_parallel_size=4,
        placement="layer",
    )
    found = evaluate(setting, drafting).memory
    assert found.drafter / 1e9 == pytest.approx(16.06, abs=0.01)
    assert found.target / 1e9 == pytest.approx(17.64, abs=0.01)
    assert found.kv_per_token == 128 * 1024 + 320 * 1024 // 8


# ---------------------------------------------------------------------------------------- times

PASSES_MS = [  # model, context, link: TP1, TP2, TP4, published placement on 4, one wide layer over 4
    ("Llama-3-8B", 2048, "nvlink", (6.3, 4.1, 2.7, 5.4, 2.3)),
    ("Llama-3-8B", 2048, "pcie", (6.3, 6.1, 4.6, 5.7, 3.5)),
    ("Llama-3-8B", 131072, "nvlink", (12.7, 7.3, 4.3, 7.4, 4.2)),
    ("Llama-3.2-3B", 2048, "nvlink", (3.1, 2.4, 1.7, 2.5, 1.4)),
    ("Llama-3.2-3B", 2048, "pcie", (3.1, 4.0, 3.4, 2.7, 2.4)),
    ("Llama-3.2-3B", 131072, "pcie", (8.6, 6.8, 4.8, 4.5, 4.2)),
    ("Llama-3.2-1B", 2048, "nvlink", (1.27, 1.11, 0.88, 1.10, 0.66)),
    ("Llama-3.2-1B", 2048, "pcie", (1.27, 2.07, 1.84, 1.25, 1.26)),
    ("Llama-3.2-1B", 131072, "pcie", (2.9, 2.9, 2.2, 1.85, 1.85)),
]
"""The design's estimates for one pass of a drafter on H100s, worked out by hand from the same assumptions."""


@pytest.mark.parametrize(("model", "context", "link", "expected"), PASSES_MS)
def test_a_drafters_pass_takes_what_the_design_worked_out(
    model: str, context: int, link: str, expected: tuple[float, ...]
) -> None:
    machine, shape = machine_of(), SHAPES[model]
    if link == "pcie":
        gpu = dataclasses.replace(machine.gpu, has_nvlink=False, link=128e9)
        machine = dataclasses.replace(machine, gpu=gpu)
    load, groups = one_row(context), layer_groups(shape.num_layers, size=4)
    found = [passes.split_pass(shape, load, machine=machine, ranks=r) for r in (1, 2, 4)]
    found.append(passes.whole_pass(shape, load, machine=machine, ranks=4, groups=groups))
    found.append(passes.split_pass(shape, load, machine=machine, ranks=4, groups=groups))
    assert [1e3 * each.total_s for each in found] == pytest.approx(expected, rel=0.11)


def test_a_target_of_70b_takes_what_the_design_worked_out() -> None:
    shape, load = SHAPES["Llama-3-70B"], one_row(2048)
    found = [
        1e3 * passes.split_pass(shape, load, machine=machine_of(), ranks=r).total_s for r in (4, 8)
    ]
    assert found == pytest.approx([16.4, 9.8], rel=0.03)


def test_few_rows_cost_what_one_does_and_many_cost_arithmetic() -> None:
    shape, machine = SHAPES["Llama-3-70B"], machine_of()

    def seconds(rows: int) -> float:
        return passes.split_pass(shape, one_row(512, rows=rows), machine=machine, ranks=8).total_s

    assert seconds(16) < 1.05 * seconds(1)
    assert seconds(4096) > 7 * seconds(512)


def test_a_pass_launched_kernel_by_kernel_takes_what_the_host_needs() -> None:
    shape, load = SHAPES["Llama-3.2-1B"], one_row(512)
    eager = passes.split_pass(shape, load, machine=machine_of(execution=EAGER), ranks=1)
    assert eager.total_s == eager.launches_s == pytest.approx(16 * 61 * 6e-6)
    assert eager.device_s == passes.split_pass(shape, load, machine=machine_of(), ranks=1).total_s


def test_sums_over_nodes_take_longer_and_those_of_one_rank_nothing() -> None:
    machine = machine_of(gpus_per_node=4)
    assert machine.all_reduce_s(1e6, ranks=1) == 0
    assert machine.all_reduce_s(0, ranks=8) == pytest.approx(40e-6)
    assert machine.all_reduce_s(1e6, ranks=8) > 3 * machine.all_reduce_s(1e6, ranks=4)


@given(st.sampled_from(sorted(SHAPES)), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5))
def test_groups_of_one_are_the_model_in_turn_and_larger_ones_never_slower(
    model: str, ranks: int, size: int
) -> None:
    shape, machine, load = SHAPES[model], machine_of(), one_row(2048)
    exact = exact_groups(shape.num_layers)
    plain = passes.split_pass(shape, load, machine=machine, ranks=ranks)
    assert passes.split_pass(shape, load, machine=machine, ranks=ranks, groups=exact) == plain
    groups = layer_groups(shape.num_layers, size=size)
    grouped = passes.split_pass(shape, load, machine=machine, ranks=ranks, groups=groups)
    assert grouped.total_s <= plain.total_s


# ------------------------------------------------------------------------------------------ published figures

EASYSPEC = Execution(name="eager", attention_launches=28, mlp_launches=12, launch_s=20e-6)
"""Their stack as far as it is known: eager PyTorch with modules in the manner of transformers, about 28 launches per
attention of about 40 per layer; 20 us each, so that a layer takes 0.8 ms as such stacks do. Assumed."""
EASYSPEC_PAIRS = [
    ("Llama-3-70B", "Llama-3-8B"),
    ("Llama-3.3-70B", "Llama-3.2-1B"),
    ("Qwen2-72B", "Qwen2-7B"),
    ("Qwen2-72B", "Qwen2-0.5B"),
    ("Qwen2.5-32B", "Qwen2.5-0.5B"),
]


def easyspec(target: str, drafter: str, *, accepted: float) -> tuple[float, float]:
    """Predicted speed-up of drafting by layers side by side, and of all over tensor-parallel decoding: trees of depth 5
    and width 12, N = 4, drafter whole on its ranks, on 8 A100s."""
    machine, draft = machine_of("A100-80", execution=EASYSPEC), SHAPES[drafter]

    def verify_s(rows: int) -> float:
        load = one_row(512, rows=rows)
        return passes.split_pass(SHAPES[target], load, machine=machine, ranks=8).total_s

    exact_s = passes.split_pass(draft, one_row(512, rows=5), machine=machine, ranks=1).total_s
    level = one_row(512, rows=12)
    sequential_s = passes.split_pass(draft, level, machine=machine, ranks=1).total_s
    groups = layer_groups(draft.num_layers, size=4)
    grouped_s = passes.whole_pass(draft, level, machine=machine, ranks=4, groups=groups).total_s
    drafting_s = exact_s + 4 * grouped_s
    tokens = acceptance.tree_tokens(accepted, 5)
    return 5 * sequential_s / drafting_s, tokens * verify_s(1) / (drafting_s + verify_s(61))


def test_drafting_gains_what_easyspec_reports_within_15_percent() -> None:
    """Published: up to 1.62."""
    gains = [easyspec(*pair, accepted=0.9)[0] for pair in EASYSPEC_PAIRS]
    assert max(gains) == pytest.approx(1.62, rel=0.15)
    assert max(gains) == pytest.approx(1.61, abs=0.01)


def test_the_best_speed_up_that_easyspec_reports_is_not_explained() -> None:
    """Published: 4.17 with a target of 72B. Even with every draft kept the model says less: sizing.md tells why."""
    most = max(easyspec(*pair, accepted=1.0)[1] for pair in EASYSPEC_PAIRS if "72B" in pair[0])
    assert most == pytest.approx(3.15, abs=0.01)
    assert most < 0.85 * 4.17


def test_the_assumed_loss_of_acceptance_is_within_what_easyspec_reports() -> None:
    """Published: at most 7 %, with 4 layers side by side the best and 5 worse."""
    assert 1 - acceptance.KEPT[4] == pytest.approx(0.07, abs=0.005)
    assert acceptance.KEPT[5] < 1 - 0.07 - 0.05


# ------------------------------------------------------------------------------------------------- rounds


def test_a_round_is_the_sum_of_its_stages() -> None:
    setting = setting_of()
    drafting = Drafting(
        num_speculative_tokens=4, layer_parallel_size=4, draft_tensor_parallel_size=2
    )
    found = evaluate(setting, drafting)
    made = found.round
    assert made.total_s == pytest.approx(
        made.exact_s + made.grouped_s + made.verify_s + made.telling_s
    )
    assert found.tokens_per_s == pytest.approx(made.tokens / made.total_s)
    assert made.grouped_s < 3 * made.exact_s, "three grouped passes beside an exact one"


def test_the_fastest_way_comes_first_and_none_without_room_for_the_batch() -> None:
    setting = setting_of()
    found = choices(setting, draft_ranks=[1, 8])
    assert found[0].tokens_per_s == max(each.tokens_per_s for each in found)
    assert {each.drafting.placement for each in found if each.drafting} == {"tensor", "layer"}
    crowded = dataclasses.replace(setting, batch=10_000)
    assert choices(crowded, draft_ranks=[1, 8]) == []


def test_drafts_get_fewer_as_the_batch_grows() -> None:
    lengths = []
    for batch in (1, 64, 256):
        setting = setting_of(batch=batch, context=1024, machine=machine_of("H200"))
        best = choices(setting, sizes=[1], draft_ranks=[8])[0].drafting
        assert best is not None
        lengths.append(best.num_speculative_tokens)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def plan_of(setting: Setting, wish: Wish | None = None, **more: Any) -> Any:
    values: dict[str, Any] = {"prompt": 3072, "output": 1024, "chunk": 512, "num_engines": 4}
    return make_plan(setting, wish or Wish(), **values | more)


def test_a_drafter_that_does_not_pay_is_not_advised() -> None:
    found = plan_of(setting_of(acceptance=0.05))
    assert found.best is found.plain
    assert found.speedup == 1.0
    assert found.ways, "they are shown all the same"


def test_what_the_user_fixed_is_kept() -> None:
    wish = Wish(num_speculative_tokens=7, layer_parallel_size=3, placement="tensor")
    (way,) = plan_of(setting_of(), wish).ways
    assert way.drafting is not None
    assert (way.drafting.num_speculative_tokens, way.drafting.layer_parallel_size) == (7, 3)


@pytest.mark.parametrize(
    ("wish", "more", "reason"),
    [
        (Wish(), {"ranks": 1}, "weights take 141.1 GB of each H100 of 80 GB: raise"),
        (Wish(), {"batch": 4096}, "leave room for .* tokens, not for 16,777,216"),
        (Wish(placement="layer", layer_parallel_size=1), {}, "placement layer needs"),
        (Wish(layer_parallel_size=2), {"drafter": None}, "no --speculative-model"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(
    wish: Wish, more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan_of(setting_of(**more), wish)


# ------------------------------------------------------------------------------- prefill and decode apart


def test_reading_a_long_prompt_takes_its_arithmetic_and_its_sums() -> None:
    setting, rows = setting_of(drafter=None), 8192
    flops = 2 * 69.5e9 * rows + 2 * 80 * 64 * 128 * rows**2
    arithmetic_s = flops / (8 * 0.6 * 989e12)
    sums_s = 161 * setting.machine.all_reduce_s(4 * rows * 8192, ranks=8)
    read_s = prefill_s(setting, rows, chunk=rows, draft_ranks=0)
    assert read_s == pytest.approx(arithmetic_s + sums_s, rel=0.02)


def apart_of(
    setting: Setting, *, prompt: int = 3072, output: int = 256, num_engines: int = 4
) -> Any:
    choice = evaluate(setting, None)
    return apart(setting, choice, prompt=prompt, output=output, chunk=512, num_engines=num_engines)


def test_kv_hides_behind_reading_from_the_rate_that_is_named_on() -> None:
    setting = setting_of(batch=16)
    rate = apart_of(setting).hiding_rate

    def waited(network: float) -> Any:
        machine = dataclasses.replace(setting.machine, network=network)
        return apart_of(dataclasses.replace(setting, machine=machine))

    fast, slow = waited(1.01 * rate), waited(0.5 * rate)
    assert fast.waited_s == pytest.approx(fast.transfer_s / (80 * 6))
    assert slow.waited_s > 0.4 * slow.transfer_s


def test_reading_apart_pays_with_engines_enough_long_prompts_and_a_fast_network() -> None:
    setting = setting_of(batch=32)
    assert apart_of(setting, prompt=4000, output=96).pays
    assert not apart_of(setting, prompt=4000, output=96, num_engines=1).pays
    assert not apart_of(setting, prompt=200, output=3000).pays, "nearly nothing to read"
    machine = dataclasses.replace(setting.machine, network=1e5)
    slow = dataclasses.replace(setting, machine=machine)
    assert not apart_of(slow, prompt=4000, output=96).pays


# --------------------------------------------------------------------------------------------- the command


def run(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(list(argv))) == 0
    return capsys.readouterr().out


PAIR = ["--model", "Llama-3.1-70B", "--speculative-model", "Llama-3.2-1B", "--gpu", "H100"]


def test_the_command_it_advises_is_one_that_is_understood(
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--gpus", "16", "--nodes", "2", "--batch", "64", "--context", "16384", "--json"]
    found = json.loads(run([*PAIR, *more], capsys))
    line = found["advice"][0]
    words = shlex.split(line)
    assert words[:3] == ["paceline", "serve", "Llama-3.1-70B"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    for name in ("--decode-replicas", "--engine-placement"):
        flags.pop(name)
    values = {name[2:]: int(v) if v.isdecimal() else v for name, v in flags.items()}
    config = make_config({"model": words[2], **values})
    assert config.tensor_parallel_size == 8
    assert config.max_model_len == 16384
    assert config.speculative_config is not None
    assert config.speculative_config.model == "Llama-3.2-1B"
    best = found["best"]["drafting"]
    assert config.speculative_config.layer_parallel_size == best["layer_parallel_size"]


def test_everything_the_answer_rests_on_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run([*PAIR, "--gpus", "8", "--acceptance", "0.8"], capsys)
    for needed in (
        "3.35 TB/s",
        "data sheet",
        "acceptance 0.8",
        "launches",
        "nothing here was measured",
    ):
        assert needed in shown


def test_a_folder_is_read_instead_of_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = command.find_shape(str(tmp_path), context=4096)
    assert shape == Shape(
        num_layers=3,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ff_size=128,
        vocab_size=1000,
    )
    with pytest.raises(ConfigError, match="exceeds the model's own limit of 4096"):
        command.find_shape(str(tmp_path), context=8192)


@pytest.mark.parametrize(
    ("argv", "error", "reason"),
    [
        (
            ["--model", "Llama-9", "--gpu", "H100"],
            ModelError,
            "no such model.*known by name: Llama",
        ),
        (
            ["--model", "Llama-3.1-8B", "--gpu", "TPU"],
            ConfigError,
            "unknown GPU 'TPU'; known: B200",
        ),
        ([*PAIR, "--gpus", "9", "--nodes", "2"], ConfigError, "do not divide"),
        ([*PAIR, "--tensor-parallel-size", "2"], ConfigError, "is more than --gpus 1"),
        (
            [*PAIR, "--gpus", "8", "--draft-tensor-parallel-size", "9"],
            ConfigError,
            "the target's 8",
        ),
        ([*PAIR, "--gpus", "8", "--prompt-len", "4096"], ConfigError, "leaves nothing to write"),
    ],
)
def test_wrong_input_is_told_in_a_line(
    argv: list[str],
    error: type[Exception],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(error, match=reason) as told:
        run(argv, capsys)
    assert "\n" not in str(told.value)


def test_it_is_a_command_of_paceline_and_wrong_input_is_the_users(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", *PAIR, "--gpus", "8"]) == 0
    assert "paceline serve" in capsys.readouterr().out
    assert cli.main(["plan", *PAIR, "--acceptance", "2"]) == 2
    assert "--acceptance: expected a number above 0 and at most 1" in capsys.readouterr().err


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_is_found_by_its_name_and_has_a_source(gpu: Any) -> None:
    assert find_gpu(gpu.name.lower().replace("-", " ")) is gpu
    assert "NVIDIA" in gpu.source
    assert 100 < gpu.bf16_flops / gpu.bandwidth < 450, "operations per byte, as of all of them"


# ---------------------------------------------------------------------------------------------- the page


def quoted() -> list[tuple[str, str]]:
    """Commands in the page and what it says they print."""
    blocks = re.findall(
        r"^    \$ (paceline plan .*(?:\\\n.*)*)\n((?:    .*\n|\n)*?)(?=^\S|\Z)",
        SIZING.read_text(),
        re.M,
    )
    return [(line, re.sub("^    ", "", out, flags=re.M).strip("\n")) for line, out in blocks]


def test_the_page_quotes_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    pairs = quoted()
    assert len(pairs) >= 3
    for line, out in pairs:
        words = shlex.split(line.replace("\\\n", " "))
        shown = "\n".join(each.rstrip() for each in run(words[2:], capsys).splitlines())
        assert shown.strip("\n") == out, line

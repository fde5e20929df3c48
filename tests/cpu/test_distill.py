"""Distillation: the grouped form is the runtime's, runs resume, and what comes out loads everywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.cpu.conftest import SHAPE
from tests.paged import Place, ScatteredBlocks
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.utils.logging import disable_progress_bar

from paceline import LLM, SamplingParams
from paceline.parallel.launch import solo_mesh
from paceline.runtime.config import EngineConfig, make_config
from paceline.runtime.errors import ConfigError
from paceline.runtime.loading import load
from paceline.runtime.models.weights import find_model
from paceline.runtime.preflight import examine
from paceline.runtime.requests import TokensPrompt
from paceline.runtime.spec.distill.__main__ import main
from paceline.runtime.spec.distill.data import Windows, hold_out, read_documents
from paceline.runtime.spec.distill.grouped import Form, cut_rounds, exact_pass, forms, grouped_pass
from paceline.runtime.spec.distill.loss import acceptance, divergence, objective
from paceline.runtime.spec.distill.settings import Settings, make_settings
from paceline.runtime.spec.distill.training import Trainer

VOCABULARY, LAYERS = 61, 6
LENGTH = 24

Run = Callable[..., Settings]


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    disable_progress_bar()


@pytest.fixture
def run(tiny: Callable[..., Path], tmp_path: Path) -> Run:
    """`run(**changes)`: settings of a short run of a tiny pair on random documents."""
    rng = np.random.default_rng(0)
    lines = [{"token_ids": rng.integers(VOCABULARY, size=60).tolist()} for _ in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(**changes: Any) -> Settings:
        values: dict[str, Any] = {
            "target": str(tiny()),
            "drafter": str(tiny(seed=7)),
            "data": [str(data)],
            "output": str(tmp_path / "output"),
            "steps": 6,
            "batch_size": 4,
            "length": LENGTH,
            "learning_rate": 3e-3,
            "held_out": 0.2,
            "dtype": "float32",
        }
        return make_settings(values | changes)

    return make


# The grouped form.


@pytest.mark.parametrize("policy", ["attention", "block"])
@pytest.mark.parametrize(("family", "size"), [("llama", 2), ("llama", 4), ("qwen3", 3)])
def test_grouped_rows_are_what_the_runtime_drafts_from(
    tiny: Callable[..., Path], save_model: Any, family: str, size: int, policy: str
) -> None:
    """Each round by itself: the runtime reads exactly up to its start, then feeds its drafts."""
    folder = tiny() if family == "llama" else save_model(Qwen3Config(**SHAPE, head_dim=8))[0]
    text = torch.randint(VOCABULARY, (18,), generator=torch.Generator())
    speculative = {
        "model": str(folder),
        "dtype": "float32",
        "layer_parallel_size": size,
        "layer_parallel_policy": policy,
    }
    config = make_config(
        {"model": str(folder), "max_num_seqs": 2, "speculative_config": speculative}
    )
    drafter = load(config, solo_mesh()).draft_model
    assert drafter is not None
    runtime, model = drafter.model, _transformers(folder)
    rounds = cut_rounds(18, num_drafts=4, offset=1, device=torch.device("cpu"))
    assert rounds.positions_U.tolist() == [2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16]
    groups = tuple(group.layers for group in runtime.decoder.groups)
    assert len(groups) < runtime.decoder.arch.num_layers
    form = Form(policy=policy, size=size, groups=groups)  # type: ignore[arg-type]
    with torch.inference_mode():
        _, cache = exact_pass(model, text[None])
        h = grouped_pass(model, text[None, rounds.positions_U], rounds, form=form, exact=cache)
        found = model.lm_head(h)[0]
        blocks = ScatteredBlocks(32)
        for number, start in enumerate((1, 5, 9, 13)):
            place = Place(blocks)

            def feed(ids: torch.Tensor, start: int, place: Place = place) -> Any:
                segment = place.segment(start=start, num_rows=len(ids))
                return runtime.rows(ids, [segment])

            runtime.decoder.exact(feed(text[: start + 1], 0))
            for depth in range(3):
                at = start + 1 + depth
                h_1E = drafter._layer_parallel.grouped(feed(text[at : at + 1], at))
                expected = runtime.decoder.logits(h_1E)[0]
                assert (found[3 * number + depth] - expected).abs().max() < 1e-4


def test_a_form_of_single_layers_is_the_exact_pass(tiny: Callable[..., Path]) -> None:
    model = _transformers(tiny())
    text = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator())
    rounds = cut_rounds(20, num_drafts=5, offset=0, device=torch.device("cpu"))
    at = rounds.positions_U
    with torch.inference_mode():
        exact, cache = exact_pass(model, text)
        for policy in ("attention", "block"):
            single = Form(policy=policy, size=1, groups=_groups(1))  # type: ignore[arg-type]
            grouped = grouped_pass(model, text[:, at], rounds, form=single, exact=cache)
            assert (grouped - exact[:, at]).abs().max() < 1e-5
            paired = Form(policy=policy, size=2, groups=_groups(2))  # type: ignore[arg-type]
            other = grouped_pass(model, text[:, at], rounds, form=paired, exact=cache)
            assert (other - exact[:, at]).abs().max() > 1e-2


def test_forms_are_those_that_group_something_each_once(run: Run) -> None:
    sizes = {"layer_parallel_sizes": [2, 4, 9], "layer_parallel_policies": ["block"]}
    assert [form.name for form in forms(run(**sizes), num_layers=LAYERS)] == ["block 2", "block 4"]
    assert forms(run(), num_layers=3) == []


# The loss.


def test_divergences_are_zero_for_equals_and_tvd_is_the_chance_of_rejection() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 5, 7, 11, generator=generator)
    for kind in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        assert divergence(kind, ours, ours).abs() < 1e-6  # type: ignore[arg-type]
        assert divergence(kind, ours, theirs) > 0.05  # type: ignore[arg-type]
    sampled, _ = acceptance(ours, theirs)
    assert torch.allclose(divergence("tvd", ours, theirs), 1 - sampled.mean(), atol=1e-6)
    forward, reverse = (
        torch.nn.functional.kl_div(
            a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum"
        )
        for a, b in ((ours, theirs), (theirs, ours))
    )
    assert torch.allclose(divergence("forward_kl", ours, theirs), forward / 35)
    assert torch.allclose(divergence("reverse_kl", ours, theirs), reverse / 35)


def test_next_token_weight_moves_from_the_target_to_the_text() -> None:
    ours, theirs = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(0))
    text = torch.arange(12).view(3, 4) % 9
    ends = [
        objective(ours, theirs, text, kind="forward_kl", next_token_weight=weight)
        for weight in (0.0, 0.25, 1.0)
    ]
    assert torch.allclose(ends[0], divergence("forward_kl", ours, theirs))
    assert torch.allclose(ends[2], torch.nn.functional.cross_entropy(ours.mT, text))
    assert torch.allclose(ends[1], 0.75 * ends[0] + 0.25 * ends[2])


# The data.


def test_held_out_documents_are_never_learnt_from() -> None:
    documents = [np.full(10 + i, i, dtype=np.int32) for i in range(20)]
    learnt, held_out = hold_out(documents, 0.2)
    assert len(learnt) + len(held_out) == 20
    assert 0.1 < sum(map(len, held_out)) / sum(map(len, documents)) < 0.4
    assert {int(d[0]) for d in learnt}.isdisjoint({int(d[0]) for d in held_out})
    again = hold_out(documents[::-1], 0.2)[1]
    assert [d.tolist() for d in again] == [d.tolist() for d in held_out]
    (first,), (rest,) = hold_out([np.arange(100, dtype=np.int32)], 0.2)
    assert (first.tolist(), rest.tolist()) == (list(range(80)), list(range(80, 100)))


def test_an_epoch_has_every_window_once_whatever_is_asked_for_first() -> None:
    documents = [np.arange(40, dtype=np.int32), np.arange(40, 83, dtype=np.int32)]
    windows = Windows(documents, length=8, seed=3, what="the data")
    assert windows.per_epoch == 10
    first = [windows[i].tolist() for i in range(20)]
    assert len({i for window in first[:10] for i in window}) == 80
    assert first[:10] != first[10:]
    other = Windows(documents, length=8, seed=3, what="the data")
    assert [other[i].tolist() for i in reversed(range(20))] == first[::-1]


def test_documents_are_read_from_folders_files_and_lines(tmp_path: Path) -> None:
    facts = examine(make_config({"model": "embedded"}))
    assert facts.tokenizer is not None
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "copy.py").write_text("x = 1\n")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "lines.jsonl").write_text('{"text": "y = 2\\n"}\n\n{"token_ids": [5, 6]}\n')
    found = [d.tolist() for d in read_documents([str(tmp_path)], facts)]
    encode = facts.tokenizer.encode
    assert found == [[*encode("x = 1\n"), 0], [*encode("y = 2\n"), 0], [5, 6]]


# Runs.


def test_loss_falls_and_the_folder_loads_in_paceline_and_transformers(run: Run) -> None:
    settings = run(steps=30, evaluate_every=10, grouped_weight=1.0)
    folder = Trainer(settings).run()
    kept = [json.loads(line) for line in (folder / "training/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [0, 10, 20, 30]
    before, after = kept[0]["held_out"], kept[-1]["held_out"]
    assert set(after) == {"exact", *(f"{p} {n}" for n in (2, 3, 4) for p in ("attention", "block"))}
    for name, (sampled, _) in after.items():
        assert sampled > before[name][0] + 0.02
    assert not (folder / "training/checkpoint.pt").exists()

    prompt = list(range(10))
    with torch.no_grad():
        ids = _transformers(folder).generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False
        )
    with LLM(str(folder), dtype="float32") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=8)
        (output,) = llm.generate(TokensPrompt(prompt_token_ids=prompt), params)
    assert output.outputs[0].token_ids == ids[0, 10:].tolist()


def test_a_run_that_was_cut_off_ends_in_the_same_weights(run: Run, tmp_path: Path) -> None:
    whole = Trainer(run(output=str(tmp_path / "whole")))
    for _ in range(6):
        whole.take_step()
    first = Trainer(run())
    for _ in range(3):
        first.take_step()
    first.save_checkpoint()
    first.take_step()  # lost
    second = Trainer(run())
    assert second.step == 3
    for _ in range(3):
        second.take_step()
    for name, weight in whole.drafter.state_dict().items():
        assert torch.equal(weight, second.drafter.state_dict()[name]), name


def test_micro_batches_are_the_same_step(run: Run, tmp_path: Path) -> None:
    settings = [run(), run(output=str(tmp_path / "parts"), micro_batch_size=3)]
    whole, parts = (Trainer(each) for each in settings)
    losses = [whole.take_step(), parts.take_step()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in whole.drafter.state_dict().items():
        assert torch.allclose(weight, parts.drafter.state_dict()[name], atol=1e-4), name


def test_target_writes_texts_that_are_learnt_from(run: Run) -> None:
    settings = run(own_text=6, own_text_share=1.0, grouped_weight=0.0, steps=1)
    trainer = Trainer(settings)
    assert set(trainer.take_step()) == {"exact"}
    texts = (trainer.folder / "own_text.jsonl").read_text()
    assert [len(json.loads(line)["token_ids"]) for line in texts.splitlines()] == [LENGTH] * 6
    assert Trainer(settings).folder == trainer.folder  # and they are not written again
    assert (trainer.folder / "own_text.jsonl").read_text() == texts


def test_a_shape_starts_anew_with_the_targets_tokenizer(run: Run, tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 8, "head_dim": 4}
    text = tmp_path / "text"
    text.write_text("def f(x):\n    return x\n" * 40)
    settings = run(
        target="embedded",
        drafter=None,
        shape=json.dumps(shape),
        data=[str(text)],
        steps=1,
        batch_size=1,
    )
    folder = Trainer(settings).run()
    assert (folder / "tokenizer.json").read_bytes() == (
        find_model("embedded") / "tokenizer.json"
    ).read_bytes()
    facts = examine(
        make_config({"model": "embedded", "speculative_config": {"model": str(folder)}})
    )
    assert facts.tokenizer is not None
    made = examine(make_config({"model": str(folder)})).arch
    assert (made.num_layers, made.hidden_size, made.head_dim) == (2, 16, 4)
    assert made.num_heads == facts.arch.num_heads
    assert made.dtype == "bfloat16"


# What cannot be.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drafter": None}, "either drafter"),
        ({"shape": {"num_hidden_layers": 2}}, "either drafter"),
        ({"drafter": None, "shape": "[2"}, "not valid JSON"),
        ({"drafter": None, "shape": {"num_layers": 2}}, "did you mean num_hidden_layers"),
        ({"drafter": None, "shape": {"num_attention_heads": 3}}, "shape:"),
        ({"drafter": None, "shape": {"vocab_size": 7}}, "vocab_size is the target's, 61"),
        ({"drafter": "embedded/drafter"}, "vocabulary"),
        ({"divergence": "kl"}, "divergence"),
        ({"steps": 0}, "steps"),
        ({"step": 5}, "did you mean steps"),
        ({"exact_layers": [9]}, "exact layer 9 does not exist"),
        ({"length": 300}, "sees 256 tokens"),
        ({"length": 200}, "fewer than one window of 201"),
        ({"data": ["/no/such/file"]}, "cannot read /no/such/file"),
        ({"data": [__file__]}, "the target has no tokenizer"),
        ({"num_speculative_tokens": 20}, "need a length of twice as many tokens, not 24"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(run: Run, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=said) as found:
        Trainer(run(**changes))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "data.jsonl:1 is not valid JSON"),
        ('{"prompt": "x"}', "neither `text` nor `token_ids`"),
        ('{"token_ids": [61]}', "outside the vocabulary of 61"),
    ],
)
def test_damaged_lines_are_named(run: Run, line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=said):
        Trainer(run())


def test_an_output_is_one_runs(run: Run) -> None:
    Trainer(run(learning_rate=1.0))  # nothing was done yet
    Trainer(run()).save_checkpoint()
    with pytest.raises(ConfigError, match="a run with another learning_rate, seed") as found:
        Trainer(run(learning_rate=1.0, seed=5))
    assert "\n" not in str(found.value)
    Trainer(run()).run()
    with pytest.raises(ConfigError, match="already holds a model"):
        Trainer(run())


def test_command_says_one_line_and_ends_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--target", "embedded", "--nonsense"]) == 2
    assert main(["--target", "embedded"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("distill: unrecognized arguments: --nonsense")
    assert said[1] == "distill: Object missing required field `data`"


def test_flags_on_the_page_exist() -> None:
    page = (Path(__file__).parents[2] / "deploy/distill.md").read_text()
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", page)}
    known = {*Settings.__struct_fields__, *EngineConfig.__struct_fields__, "config", "help"}
    assert {"own_text", "grouped_weight"} <= flags <= known


def _transformers(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def _groups(size: int) -> Any:
    from paceline.parallel.layer import layer_groups

    return layer_groups(LAYERS, size=size)

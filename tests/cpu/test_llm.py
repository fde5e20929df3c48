"""`LLM` in one process: speculation changes nothing but the time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from paceline import LLM, SamplingParams
from paceline.runtime.errors import ConfigError, EngineError, PromptError
from paceline.runtime.lossless import check_distribution, check_greedy
from paceline.runtime.outputs import RequestOutput
from paceline.runtime.requests import Prompt, TokensPrompt

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
AS_TOKENS: list[Prompt] = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]


def open_llm(tiny: Callable[..., Path], *, engine: Any = None, **speculative: object) -> LLM:
    """A pair that drafts as much as it may: models as small as that would not pay for it."""
    drafter = str(tiny(seed=0, noise=0.03))
    given = {
        "model": drafter,
        "num_speculative_tokens": 4,
        "draft_length": "fixed",
        **speculative,
    }
    return LLM(str(tiny(seed=0)), dtype="float32", speculative_config=given, **(engine or {}))


def texts(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def with_tokenizer(folder: Path, copy: Path) -> Path:
    """A copy of a model with a tokenizer of 50 words, fewer than any of these vocabularies."""
    shutil.copytree(folder, copy)
    words = Tokenizer(WordLevel({f"word{i}": i for i in range(50)}, unk_token="word0"))
    words.save(str(copy / "tokenizer.json"))
    return copy


@pytest.mark.parametrize("calibration", ["every_round", "on_mismatch", "never"])
@pytest.mark.parametrize("policy", ["attention", "block"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_greedy_text_does_not_depend_on_the_drafter(
    tiny: Callable[..., Path], size: int, policy: str, calibration: str
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    with open_llm(
        tiny, layer_parallel_size=size, layer_parallel_policy=policy, calibration=calibration
    ) as llm:
        plain = llm.generate(AS_TOKENS, params, num_draft_tokens=0)
        drafted = llm.generate(AS_TOKENS, params)
    assert [o.outputs[0].token_ids for o in drafted] == [o.outputs[0].token_ids for o in plain]
    assert all(o.metrics is not None and o.metrics.accepted > 0 for o in drafted)


def test_greedy_text_does_not_depend_on_the_draft_length(
    tiny: Callable[..., Path],
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    with open_llm(tiny, layer_parallel_size=2) as llm:
        texts = [
            [o.outputs[0].token_ids for o in llm.generate(AS_TOKENS, params, num_draft_tokens=n)]
            for n in (0, 1, 2, 3, 4)
        ]
    assert all(text == texts[0] for text in texts)


def test_sampled_text_is_a_function_of_its_seed(tiny: Callable[..., Path]) -> None:
    params = [
        SamplingParams(temperature=1.0, max_tokens=20, seed=seed, ignore_eos=True)
        for seed in (1, 2, 1)
    ]
    with open_llm(tiny, layer_parallel_size=2) as llm:
        together = llm.generate([AS_TOKENS[0]] * 3, params)
        alone = llm.generate([AS_TOKENS[0]], params[1])
    texts = [o.outputs[0].token_ids for o in together]
    assert texts[0] == texts[2] != texts[1]
    assert alone[0].outputs[0].token_ids == texts[1]


@pytest.mark.parametrize("draft_length", ["fixed", "adaptive"])
@pytest.mark.parametrize("method", ["draft_model", "ngram", "combined"])
def test_sampled_text_does_not_depend_on_who_drafts_and_how_much(
    tiny: Callable[..., Path], method: str, draft_length: str
) -> None:
    params = [
        SamplingParams(temperature=0.9, max_tokens=32, seed=i, top_p=0.95, frequency_penalty=0.5)
        for i in range(3)
    ]
    with open_llm(tiny, method=method, draft_length=draft_length) as llm:
        plain = llm.generate(AS_TOKENS, params, num_draft_tokens=0)
        drafted = llm.generate(AS_TOKENS, params)
    assert texts(drafted) == texts(plain)


@pytest.mark.parametrize("method", ["draft_model", "ngram", "combined"])
def test_greedy_text_does_not_depend_on_the_method(tiny: Callable[..., Path], method: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    with open_llm(tiny, method=method) as llm:
        plain = llm.generate(AS_TOKENS, params, num_draft_tokens=0)
        drafted = llm.generate(AS_TOKENS, params)
    assert texts(drafted) == texts(plain)
    assert sum(o.metrics.accepted for o in drafted if o.metrics is not None) > 0


def test_requests_beyond_the_blocks_take_turns_and_keep_their_texts(
    tiny: Callable[..., Path],
) -> None:
    """A pool of one longest request, for twelve of them: most are preempted on the way."""
    params = [SamplingParams(temperature=0.9, max_tokens=60, seed=i) for i in range(12)]
    prompts = [TokensPrompt(prompt_token_ids=[i, 5, 7, *range(20)]) for i in range(12)]
    each = 6 * 2 * 2 * 16 * 8 * 4  # target and drafter: layers, KV heads, keys and values
    small = {"kv_cache_memory": 2 * each * 16, "enable_prefix_caching": False}
    with open_llm(tiny, layer_parallel_size=2) as llm:
        expected = [llm.generate(p, one)[0] for p, one in zip(prompts, params, strict=True)]
    with open_llm(tiny, layer_parallel_size=2, engine=small) as llm:
        assert llm.status().num_blocks == 16
        found = llm.generate(prompts, params)
        status = llm.status()
    assert texts(found) == texts(expected)
    assert status.num_preemptions > 0
    assert status.num_free_blocks == status.num_blocks


def test_cached_prefixes_change_no_text(tiny: Callable[..., Path]) -> None:
    shared = [(7 * i) % 61 for i in range(70)]
    prompts = [TokensPrompt(prompt_token_ids=[*shared, i]) for i in range(4)]
    params = SamplingParams(temperature=0.8, max_tokens=20, seed=5, ignore_eos=True)
    found = []
    for caching in (False, True):
        with open_llm(
            tiny, layer_parallel_size=2, engine={"enable_prefix_caching": caching}
        ) as llm:
            for _ in range(2):
                outputs = [llm.generate(prompt, params)[0] for prompt in prompts]
                found.append(texts(outputs))
            assert (outputs[-1].num_cached_tokens >= 64) is caching
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
@pytest.mark.parametrize("policy", ["attention", "block"])
def test_sampling_with_drafts_has_the_targets_distribution(
    tiny: Callable[..., Path], policy: str, verification: str
) -> None:
    """End to end: prompts, drafts, verification, KV of both models. The control shows that the test has power."""
    params = SamplingParams(temperature=1.0, top_k=6)
    with open_llm(
        tiny,
        layer_parallel_size=2,
        layer_parallel_policy=policy,
        num_speculative_tokens=2,
        verification=verification,
    ) as llm:
        found = check_distribution(llm, AS_TOKENS[0], samples=1000, params=params)
    assert found.powerful, found
    assert found.passed, found


def test_greedy_check_reports_no_difference(tiny: Callable[..., Path]) -> None:
    with open_llm(tiny, layer_parallel_size=2) as llm:
        found = check_greedy(llm, list(AS_TOKENS), max_tokens=24, near_tie=0.0)
    assert found.passed
    assert found.differences == ()
    assert found.tokens == 72


def test_prompts_are_read_in_chunks_without_changing_the_text(tiny: Callable[..., Path]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    long = TokensPrompt(prompt_token_ids=[(5 * i * i + i) % 61 for i in range(90)])
    texts = []
    for chunk in (7, 40, 512):
        with LLM(str(tiny(seed=0)), dtype="float32", max_num_batched_tokens=chunk) as llm:
            texts.append(llm.generate(long, params)[0].outputs[0].token_ids)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("vocab_size", [50, 70])
def test_drafter_may_pad_its_vocabulary_otherwise(
    tiny: Callable[..., Path], tmp_path: Path, vocab_size: int
) -> None:
    target = str(with_tokenizer(tiny(seed=0), tmp_path / "target"))
    drafter = str(with_tokenizer(tiny(seed=0, vocab_size=vocab_size), tmp_path / "drafter"))
    given = {"model": drafter, "layer_parallel_size": 2}
    with (
        LLM(target, dtype="float32") as plain,
        LLM(target, dtype="float32", speculative_config=given) as speculative,
    ):
        greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        expected = plain.generate(AS_TOKENS, greedy)
        found = speculative.generate(AS_TOKENS, greedy)
        hot = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
        sampled = speculative.generate(AS_TOKENS, hot)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]
    assert all(max(o.outputs[0].token_ids) < 61 for o in sampled)


def test_two_engines_live_in_one_process(tiny: Callable[..., Path]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    with open_llm(tiny) as one, LLM(str(tiny(seed=4)), dtype="float32") as two:
        first = one.generate(AS_TOKENS, params)
        other = two.generate(AS_TOKENS, params)
        again = one.generate(AS_TOKENS, params)
    assert [o.outputs[0].token_ids for o in first] == [o.outputs[0].token_ids for o in again]
    assert [o.outputs[0].token_ids for o in first] != [o.outputs[0].token_ids for o in other]


def test_leaving_a_stream_early_frees_its_requests(tiny: Callable[..., Path]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)
    with open_llm(tiny) as llm:
        for _ in llm.stream(llm.jobs(AS_TOKENS, params)):
            break
        after = llm.generate(AS_TOKENS, params)
        status = llm.status()
    assert [len(o.outputs[0].token_ids) for o in after] == [50, 50, 50]
    assert (status.num_running, status.num_waiting) == (0, 0)
    assert status.num_free_blocks == status.num_blocks


def test_max_tokens_is_cut_to_the_context(tiny: Callable[..., Path]) -> None:
    with LLM(str(tiny(seed=0)), dtype="float32", max_model_len=20) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True)
        output = llm.generate(AS_TOKENS[0], params)[0]
        assert len(output.outputs[0].token_ids) == 15
        assert output.outputs[0].finish_reason == "length"
        with pytest.raises(PromptError, match="the context holds 20"):
            llm.generate(TokensPrompt(prompt_token_ids=[1] * 20), params)


def test_bad_prompts_and_parameters_are_refused(tiny: Callable[..., Path]) -> None:
    with LLM(str(tiny(seed=0)), dtype="float32") as llm:
        for prompt, words in (
            (TokensPrompt(prompt_token_ids=[]), "empty"),
            (TokensPrompt(prompt_token_ids=[61]), "outside the vocabulary"),
            ("text", "no tokenizer"),
        ):
            with pytest.raises(PromptError, match=words):
                llm.generate(prompt)
        with pytest.raises(PromptError, match="temperature"):
            llm.generate(AS_TOKENS[0], SamplingParams(temperature=-1.0))
    with pytest.raises(EngineError, match="closed"):
        llm.generate(AS_TOKENS[0])


def test_groups_that_do_not_fit_the_drafter_are_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="once each and in order"):
        open_llm(tiny, layer_groups=[[0], [2, 1], [3, 4, 5]])
    with pytest.raises(ConfigError, match="exact layer 9"):
        open_llm(tiny, layer_parallel_size=2, exact_layers=[9])

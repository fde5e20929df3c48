"""One rank under hand-made plans: whatever is scheduled, a request's text is its own.

The reference is the emulation of tests/tiny.py for what the target says, and the worker's own text,
written alone, without drafts, in one piece, for everything drawn from it.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cpu.test_lossless_rules import assert_exact, compare
from tests.plans import Driver, MakeWorker, Share, Text, num_accepted, outputs
from tests.tiny import Emulation
from torch import Tensor

from paceline.runtime.types import (
    DrafterName,
    SamplingParams,
    StepPlan,
    StepResult,
    StructuredOutputs,
)

torch.set_num_threads(1)

PROMPTS = [
    [3, 1, 4, 1, 5],
    [9, 2, 6],
    [(5 * i * i + i) % 61 for i in range(50)],
    [7, 7, 8, 7, 7, 8, 7, 7, 8, 7, 7],
]
LENGTH = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
HOT = SamplingParams(temperature=0.8, max_tokens=LENGTH, ignore_eos=True)
MIXED = [
    GREEDY,
    HOT,
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, max_tokens=LENGTH, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, max_tokens=LENGTH, presence_penalty=0.7, logprobs=2),
]
DRAFT_MODELS: dict[str, dict[str, Any]] = {
    "exact": {},
    "pairs": {"layer_parallel_size": 2},
    "pairs, every round": {"layer_parallel_size": 2, "calibration": "every_round"},
    "pairs, never": {"layer_parallel_size": 2, "calibration": "never"},
    "blocks of four": {"layer_parallel_size": 4, "layer_parallel_policy": "block"},
    "placed by layer": {"layer_parallel_size": 2, "placement": "layer"},
}


@pytest.fixture(scope="module")
def alone(make_worker: MakeWorker) -> Callable[[list[int], SamplingParams, int], list[int]]:
    """`alone(prompt, params, seed)`: the text written with nothing beside it and nothing drafted."""

    @cache
    def write(prompt: tuple[int, ...], params: SamplingParams, seed: int) -> list[int]:
        driver = Driver(make_worker())
        (found,) = driver.write(driver.add("alone", prompt, params, seed=seed))
        return found

    return lambda prompt, params, seed: write(tuple(prompt), params, seed)


Alone = Callable[[list[int], SamplingParams, int], list[int]]


def add_all(driver: Driver, params: list[SamplingParams]) -> list[Text]:
    return [
        driver.add(str(i), prompt, each, seed=10 + i)
        for i, (prompt, each) in enumerate(zip(PROMPTS, params, strict=True))
    ]


def expected_of(alone: Alone, params: list[SamplingParams]) -> list[list[int]]:
    return [
        alone(prompt, each, 10 + i)
        for i, (prompt, each) in enumerate(zip(PROMPTS, params, strict=True))
    ]


# -------------------------------------------------------------------------------------- against others


def emulated_logits(folder: Path, token_ids: list[int]) -> Tensor:
    return Emulation(folder).logits(
        token_ids, start=0, groups=[[layer] for layer in range(6)], policy="attention"
    )


def emulated_greedy(folder: Path, prompt: list[int], *, count: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(int(emulated_logits(folder, token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_greedy_text_is_the_emulation_s_whatever_the_chunks(
    tiny: Callable[..., Path], make_worker: MakeWorker, native: bool, chunk: int
) -> None:
    driver = Driver(make_worker(native=native))
    found = driver.write(*add_all(driver, [GREEDY] * 4), chunk=chunk)
    for prompt, output in zip(PROMPTS, found, strict=True):
        assert output == emulated_greedy(tiny(seed=0), prompt, count=LENGTH)


@pytest.mark.parametrize("drafts", [0, 3])
def test_logprobs_are_those_of_the_emulation(
    tiny: Callable[..., Path], make_worker: MakeWorker, native: bool, drafts: int
) -> None:
    driver = Driver(make_worker(native=native, layer_parallel_size=2))
    params = SamplingParams(temperature=0.8, max_tokens=LENGTH, logprobs=3)
    text = driver.add("a", PROMPTS[0], params, seed=4)
    beside = driver.add("b", PROMPTS[1], GREEDY)
    driver.write(text, beside, drafts=drafts)
    logprobs = emulated_logits(tiny(seed=0), text.token_ids).log_softmax(-1)
    entries = [entry for result in text.results for entry in result.logprobs]
    assert [entry.token_id for entry in entries] == text.output
    for position, entry in enumerate(entries, start=len(PROMPTS[0]) - 1):
        row = logprobs[position]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
        best = row.topk(3)
        assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
        assert [each for _, each in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert not any(result.logprobs for result in beside.results)


@pytest.mark.parametrize("chunk", [1, 7, 20, 512])
def test_prompt_logprobs_are_those_of_the_emulation_whatever_the_chunks(
    tiny: Callable[..., Path], make_worker: MakeWorker, alone: Alone, native: bool, chunk: int
) -> None:
    driver = Driver(make_worker(native=native))
    params = SamplingParams(temperature=0.0, max_tokens=9, prompt_logprobs=1)
    text = driver.add("a", PROMPTS[2], params)
    beside = driver.add("b", PROMPTS[3], HOT, seed=1)
    written = driver.write(text, beside, chunk=chunk)
    assert written == [alone(PROMPTS[2], GREEDY, 0)[:9], alone(PROMPTS[3], HOT, 1)]
    logprobs = emulated_logits(tiny(seed=0), PROMPTS[2]).log_softmax(-1)
    entries = [entry for result in text.results for entry in result.prompt_logprobs]
    assert [entry.token_id for entry in entries] == PROMPTS[2][1:]
    for row, entry in zip(logprobs, entries, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [token_id for token_id, _ in entry.top] == [int(row.argmax())]
    assert not any(result.prompt_logprobs for result in beside.results)


# -------------------------------------------------------------------------------- drafts change nothing


@pytest.mark.parametrize("drafts", [1, 4])
@pytest.mark.parametrize("name", DRAFT_MODELS)
def test_text_does_not_depend_on_the_draft_model(
    make_worker: MakeWorker, alone: Alone, native: bool, name: str, drafts: int
) -> None:
    driver = Driver(make_worker(native=native, **DRAFT_MODELS[name]))
    texts = add_all(driver, MIXED)
    assert driver.write(*texts, drafts=drafts) == expected_of(alone, MIXED)
    for text in texts:
        assert num_accepted(text) > 0, "a drafter that is never right proves nothing"


def test_text_does_not_depend_on_n_grams(
    make_worker: MakeWorker, alone: Alone, native: bool
) -> None:
    """A prompt that makes the target repeat itself is what they are for."""
    long = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    driver = Driver(make_worker(native=native, method="ngram"))
    assert "draft_model" not in driver.worker._drafters
    texts = [driver.add(str(i), prompt, long) for i, prompt in enumerate(PROMPTS)]
    found = driver.write(*texts, drafts=4, drafter="ngram")
    assert found == [alone(prompt, long, 0) for prompt in PROMPTS]
    assert num_accepted(*texts) > 5


def test_sampled_text_does_not_depend_on_n_grams(
    make_worker: MakeWorker, alone: Alone, native: bool
) -> None:
    driver = Driver(make_worker(native=native, method="ngram", prompt_lookup_min=1))
    texts = add_all(driver, MIXED)
    assert driver.write(*texts, drafts=4, drafter="ngram") == expected_of(alone, MIXED)
    assert any(result.num_drafted for text in texts for result in text.results)


def test_first_token_may_be_drafted_after_already(make_worker: MakeWorker, alone: Alone) -> None:
    """Where the last chunk of a prompt reaches its end, the same step drafts."""
    driver = Driver(make_worker(layer_parallel_size=2))
    texts = add_all(driver, MIXED)
    driver.step([Share(text=text, num_tokens=text.unread, num_drafts=4) for text in texts])
    assert all(text.results[0].num_drafted == 4 for text in texts)
    assert driver.write(*texts, drafts=4) == expected_of(alone, MIXED)


def test_only_those_who_ask_are_drafted_for(make_worker: MakeWorker) -> None:
    driver = Driver(make_worker(method="combined"))
    texts = add_all(driver, [GREEDY] * 4)
    driver.step([Share(text=text, num_tokens=text.unread) for text in texts])
    result = driver.step(
        [
            Share(text=texts[0], num_tokens=1),
            Share(text=texts[1], num_tokens=1, num_drafts=3),
            Share(text=texts[2], num_tokens=1, num_drafts=1),
            Share(text=texts[3], num_tokens=1, num_drafts=5, drafter="ngram"),
        ]
    )
    drafted = [each.num_drafted for each in result.results]
    assert drafted[:3] == [0, 3, 1]
    assert result.num_rows == 4 + sum(drafted)
    assert result.times.draft_ms > 0
    assert result.times.verify_ms > 0


# --------------------------------------------------------------------------------- any schedule at all


@pytest.mark.parametrize("kv_policy", ["full", "sink_window"])
@settings(deadline=None, max_examples=8, derandomize=True)
@given(seed=st.integers(0, 2**16), name=st.sampled_from(sorted(DRAFT_MODELS)))
def test_no_schedule_changes_a_text(
    make_worker: MakeWorker, native: bool, kv_policy: str, seed: int, name: str
) -> None:
    """Chunks, drafts, drafters, lagging readers, skipped steps and preemptions in any mixture."""
    params = [_with_policy(each, kv_policy) for each in MIXED]
    settings_ = {"method": "combined", "kv_window": 16, **DRAFT_MODELS[name]}
    driver = Driver(make_worker(native=native, **settings_), seed=seed)
    texts = add_all(driver, params)
    choices = random.Random(seed)
    while going := [text for text in texts if not text.done]:
        taking = [text for text in going if choices.random() < 0.8] or going[:1]
        shares = []
        for text in taking:
            if text.known and choices.random() < 0.05:
                driver.preempt(text)
            count = text.unread if choices.random() < 0.7 else choices.randint(1, text.unread)
            shares.append(
                Share(
                    text=text,
                    num_tokens=count,
                    num_drafts=choices.randint(0, 5) if count == text.unread else 0,
                    drafter=choices.choice(["draft_model", "ngram"]),
                    read_draft=choices.random() < 0.5,
                )
            )
        driver.step(shares)
    plain = Driver(make_worker(native=native, **settings_), seed=seed + 1)
    for text, prompt, each, i in zip(texts, PROMPTS, params, itertools.count()):
        again = plain.add(f"plain-{i}", prompt, each, seed=10 + i)
        assert outputs(text) == plain.write(again, read_draft=False)


def _with_policy(params: SamplingParams, kv_policy: str) -> SamplingParams:
    return msgspec.structs.replace(params, kv_policy=kv_policy, max_tokens=LENGTH)


# ------------------------------------------------------------------------------------------- each apart


def test_together_is_alone(make_worker: MakeWorker, alone: Alone, native: bool) -> None:
    driver = Driver(make_worker(native=native))
    assert driver.write(*add_all(driver, MIXED)) == expected_of(alone, MIXED)


@pytest.mark.parametrize("drafts", [0, 3])
def test_preempted_request_resumes_with_the_same_tokens(
    make_worker: MakeWorker, alone: Alone, native: bool, drafts: int
) -> None:
    driver = Driver(make_worker(native=native, layer_parallel_size=2))
    texts = add_all(driver, MIXED)
    for _ in range(3):
        driver.step([Share(text=t, num_tokens=t.unread, num_drafts=drafts and 2) for t in texts])
    before = [list(text.blocks) for text in texts]
    assert all(0 < len(text.output) < LENGTH for text in texts)
    for text in texts[1:]:
        driver.preempt(text)
    random.Random(1).shuffle(driver.blocks.free)
    assert driver.write(*texts, drafts=drafts, chunk=20) == expected_of(alone, MIXED)
    for text, old in zip(texts[1:], before[1:], strict=True):
        assert text.blocks[: len(old)] != old


def test_blocks_of_a_forgotten_request_may_be_used_at_once(
    make_worker: MakeWorker, alone: Alone, native: bool
) -> None:
    """In the very plan that forgets it."""
    driver = Driver(make_worker(native=native, layer_parallel_size=2))
    first = driver.add("0", PROMPTS[2], HOT, seed=12)
    driver.write(first, drafts=3)
    driver.forget(first)
    driver.blocks.free = first.blocks + driver.blocks.free[-6:]  # and hardly any others
    again = driver.add("0", PROMPTS[1], HOT, seed=11)
    driver.write(again, drafts=3)
    assert outputs(again) == [alone(PROMPTS[1], HOT, 11)]


@pytest.mark.parametrize("num_draft_cached", [0, 16, 32])
@pytest.mark.parametrize("drafts", [0, 3])
def test_start_from_another_s_blocks_writes_the_same(
    make_worker: MakeWorker, alone: Alone, native: bool, drafts: int, num_draft_cached: int
) -> None:
    """A prefix cache hands out blocks whose KV is there, the drafter's as far as it is exact."""
    driver = Driver(make_worker(native=native, layer_parallel_size=2))
    first = driver.add("first", PROMPTS[2], GREEDY)
    driver.write(first, drafts=3)
    exact = first.results[-1].draft_exact
    assert exact >= 48
    prompt = [*PROMPTS[2][:40], 1, 2, 3]
    second = driver.add("second", prompt, HOT, seed=8)
    driver.share_prefix(second, first, num_blocks=2, num_draft_cached=num_draft_cached)
    result = driver.step([Share(text=second, num_tokens=second.unread, read_draft=True)])
    assert result.num_rows == len(prompt) - 32
    assert second.results[0].draft_exact == len(prompt)
    driver.write(second, drafts=drafts)
    assert outputs(second) == [alone(prompt, HOT, 8)]
    if drafts:
        assert num_accepted(second) > 0
    # and the first one's blocks are as they were
    driver.write(first)
    assert outputs(first) == [alone(PROMPTS[2], GREEDY, 0)]


def test_drafter_with_cached_kv_drafts_what_one_that_read_it_all_drafts(
    make_worker: MakeWorker,
) -> None:
    """The number accepted shows whether its KV is right: text never does."""
    counts = []
    for num_draft_cached in (0, 32):
        driver = Driver(make_worker(layer_parallel_size=2))
        first = driver.add("first", PROMPTS[2], GREEDY)
        driver.write(first, drafts=3)
        second = driver.add("second", [*PROMPTS[2][:40], 1, 2, 3], GREEDY)
        driver.share_prefix(second, first, num_blocks=2, num_draft_cached=num_draft_cached)
        driver.write(second, drafts=4)
        counts.append([(r.num_drafted, r.num_accepted) for r in second.results])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", DRAFT_MODELS)
def test_drafter_that_lags_behind_catches_up(
    make_worker: MakeWorker, alone: Alone, native: bool, name: str
) -> None:
    """It has read nothing when it is asked, in the middle of a text: it reads first."""
    driver = Driver(make_worker(native=native, **DRAFT_MODELS[name]))
    texts = add_all(driver, MIXED)
    for _ in range(9):
        driver.step([Share(text=text, num_tokens=text.unread) for text in texts])
    assert all(text.results[-1].draft_exact == 0 for text in texts)
    assert driver.write(*texts, drafts=4, read_draft=False) == expected_of(alone, MIXED)
    assert all(num_accepted(text) > 0 for text in texts)


def test_late_drafter_drafts_what_one_that_kept_up_drafts(make_worker: MakeWorker) -> None:
    rounds = []
    for read_draft in (True, False):
        driver = Driver(make_worker())
        text = driver.add("a", PROMPTS[2], GREEDY)
        for _ in range(9):
            driver.step([Share(text=text, num_tokens=text.unread, read_draft=read_draft)])
        driver.write(text, drafts=4)
        rounds.append([(r.num_drafted, r.num_accepted) for r in text.results[9:]])
    assert rounds[0] == rounds[1]


def test_backlog_beyond_a_pass_is_read_in_several(make_worker: MakeWorker, alone: Alone) -> None:
    driver = Driver(make_worker(layer_parallel_size=2, max_num_batched_tokens=16))
    texts = add_all(driver, MIXED)
    driver.step([Share(text=text, num_tokens=text.unread) for text in texts])
    assert driver.write(*texts, drafts=4, read_draft=False) == expected_of(alone, MIXED)
    assert num_accepted(*texts) > 0


def test_reported_exactness_is_that_of_the_drafter(make_worker: MakeWorker) -> None:
    """The scheduler registers drafter KV for reuse by it."""
    driver = Driver(make_worker(layer_parallel_size=2, calibration="never"))
    text = driver.add("a", PROMPTS[2], GREEDY)
    driver.step([Share(text=text, num_tokens=30, read_draft=True)])
    assert text.results[-1].draft_exact == 30
    driver.step([Share(text=text, num_tokens=5)])
    assert text.results[-1].draft_exact == 30
    driver.step([Share(text=text, num_tokens=15, read_draft=True)])
    assert text.results[-1].draft_exact == 50
    driver.write(text, drafts=3)
    assert text.results[-1].draft_exact == 50, "never calibrated"


def test_text_with_a_window_goes_on_in_a_constant_number_of_blocks(
    make_worker: MakeWorker, native: bool
) -> None:
    """Beyond the context, while others use the blocks behind its window."""
    params = SamplingParams(temperature=0.0, max_tokens=150, kv_policy="sink_window")
    written = []
    for drafts in (0, 3):
        worker = make_worker(
            native=native, layer_parallel_size=2, kv_window=24, kv_sink_tokens=2, max_model_len=64
        )
        driver = Driver(worker)
        text = driver.add("a", PROMPTS[2], params)
        gone = 1
        while not text.done:
            driver.step(
                [
                    Share(
                        text=text,
                        num_tokens=text.unread,
                        num_drafts=drafts if text.output else 0,
                        read_draft=True,
                    )
                ]
            )
            while (gone + 1) * 16 <= text.seen - 24:
                driver.blocks.free.insert(0, text.blocks[gone])
                gone += 1
            assert len(text.blocks) - gone <= 4
        assert len(set(text.blocks)) < len(text.blocks), "it has come back to blocks of its own"
        written += outputs(text)
        if drafts:
            assert num_accepted(text) > 0
    assert written[0] == written[1]


def test_what_a_window_leaves_out_changes_the_text(make_worker: MakeWorker) -> None:
    """Else the tests above would show nothing."""
    found = []
    for kv_policy in ("full", "sink_window"):
        driver = Driver(make_worker(kv_window=16))
        params = _with_policy(GREEDY, kv_policy)
        found += driver.write(driver.add("a", PROMPTS[2], params))
    assert found[0] != found[1]


# -------------------------------------------------------------------------------------------- rejection


def test_rejection_accepts_more_than_the_coupled_rule(make_worker: MakeWorker) -> None:
    hot = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True)
    shares = []
    for verification in ("coupled", "rejection"):
        driver = Driver(make_worker(layer_parallel_size=2, verification=verification))
        texts = [driver.add(str(i), PROMPTS[i % 4], hot, seed=i) for i in range(8)]
        driver.write(*texts, drafts=3)
        drafted = sum(result.num_drafted for text in texts for result in text.results)
        shares.append(num_accepted(*texts) / drafted)
    assert 0.1 < shares[0] < shares[1] < 1.0


def test_greedy_text_does_not_depend_on_the_rule(make_worker: MakeWorker, alone: Alone) -> None:
    driver = Driver(make_worker(layer_parallel_size=2, verification="rejection"))
    texts = add_all(driver, [GREEDY] * 4)
    assert driver.write(*texts, drafts=3) == expected_of(alone, [GREEDY] * 4)


@pytest.mark.parametrize("rule", ["coupled", "rejection", "rejection of n-grams"])
def test_drafted_texts_come_as_often_as_the_target_makes_them(
    tiny: Callable[..., Path], make_worker: MakeWorker, rule: str
) -> None:
    """All texts of three tokens, top 4, against the law that the emulation computes."""
    drafter: DrafterName = "ngram" if "n-grams" in rule else "draft_model"
    prompt = [7, 7, 8, 7, 7, 8, 7, 7, 8, 7, 7]
    params = SamplingParams(temperature=1.2, top_k=4, max_tokens=3, ignore_eos=True)
    settings_ = {"verification": rule.split()[0], "max_num_seqs": 64, "layer_parallel_size": 2}
    driver = Driver(make_worker(method="combined", prompt_lookup_min=1, **settings_))
    counts: Counter[tuple[int, ...]] = Counter()
    drafted = 0
    for batch in range(40):
        texts = [driver.add(f"{batch}-{i}", prompt, params, seed=60 * batch + i) for i in range(60)]
        # drafted for from the first token on
        while going := [text for text in texts if not text.done]:
            driver.step(
                [
                    Share(text=text, num_tokens=text.unread, num_drafts=2, drafter=drafter)
                    for text in going
                ]
            )
        counts.update(tuple(output) for output in outputs(*texts))
        drafted += sum(result.num_drafted for text in texts for result in text.results)
        driver.forget(*texts)
    assert drafted > counts.total()
    law = {
        tuple(path): chance
        for path, chance in _paths(tiny(seed=0), prompt, length=3, temperature=1.2, top_k=4)
    }
    assert sum(law.values()) == pytest.approx(1.0)
    assert set(counts) <= set(law)
    assert_exact(compare(counts, law))


def _paths(
    folder: Path, prompt: list[int], *, length: int, temperature: float, top_k: int
) -> list[tuple[list[int], float]]:
    """Every continuation and how probable the target makes it."""
    if length == 0:
        return [([], 1.0)]
    logits = emulated_logits(folder, prompt)[-1].double() / temperature
    best = logits.topk(top_k)
    found = []
    for token_id, chance in zip(
        best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True
    ):
        for path, rest in _paths(
            folder,
            [*prompt, token_id],
            length=length - 1,
            temperature=temperature,
            top_k=top_k,
        ):
            found.append(([token_id, *path], chance * rest))
    return found


# ----------------------------------------------------------------------------------------------- plans


def test_plan_for_nothing_does_nothing(make_worker: MakeWorker) -> None:
    worker = make_worker()
    assert worker.step(StepPlan(step=7, scheduled=())) == StepResult(step=7)
    assert worker.step(StepPlan(step=8, scheduled=(), finished=("nobody",))) == StepResult(step=8)


def test_finished_requests_are_forgotten(make_worker: MakeWorker) -> None:
    driver = Driver(make_worker())
    texts = add_all(driver, [GREEDY] * 4)
    driver.write(*texts)
    assert set(driver.worker.sequences) == {"0", "1", "2", "3"}
    driver.forget(*texts[1:])
    driver.step([])
    assert set(driver.worker.sequences) == {"0"}


def test_a_grammar_that_cannot_be_kept_is_its_request_s_error_alone(
    make_worker: MakeWorker, alone: Alone
) -> None:
    """These models have no tokenizer: a frontend should have refused."""
    driver = Driver(make_worker(layer_parallel_size=2))
    shaped = SamplingParams(
        temperature=0.0, max_tokens=LENGTH, structured_outputs=StructuredOutputs(regex="a+")
    )
    bad, good = driver.add("bad", PROMPTS[0], shaped), driver.add("good", PROMPTS[1], HOT, seed=11)
    driver.step([Share(text=text, num_tokens=text.unread) for text in (bad, good)])
    assert bad.results[0].error is not None
    assert "needs a tokenizer" in bad.results[0].error
    assert good.results[0].error is None
    driver.forget(bad)
    assert driver.write(good, drafts=2) == [alone(PROMPTS[1], HOT, 11)]


@pytest.mark.parametrize("block", [-1, 10_000])
def test_block_that_does_not_exist_is_refused(make_worker: MakeWorker, block: int) -> None:
    driver = Driver(make_worker())
    text = driver.add("a", [1, 2, 3], GREEDY)
    driver.blocks.free.insert(0, block)
    with pytest.raises(AssertionError, match="expected blocks below"):
        driver.step([Share(text=text, num_tokens=3)])


def test_rows_without_blocks_are_refused(make_worker: MakeWorker) -> None:
    driver = Driver(make_worker(), block_size=32)  # hands out too few
    text = driver.add("a", list(range(20)), GREEDY)
    with pytest.raises(AssertionError, match="expected rows within the blocks"):
        driver.step([Share(text=text, num_tokens=20)])


def test_rank_says_what_it_holds(make_worker: MakeWorker) -> None:
    facts = make_worker(method="combined", layer_parallel_size=2).facts()
    for part in ("rank 0", "cpu", "target float32, KV", "drafter float32", "drafter n-gram"):
        assert part in facts

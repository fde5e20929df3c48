"""One rank that drafts trees: texts are those of plain decoding, and the KV of both models is what it
would be without branches.

The reference is the worker itself under plans without drafts, which test_worker.py holds against an
emulation.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cpu.test_lossless_rules import assert_exact, compare
from tests.paged import read_kv
from tests.plans import Driver, MakeWorker, Share, Text, num_accepted, outputs

from paceline.runtime.kv.pool import BlockTable
from paceline.runtime.models.model import Model
from paceline.runtime.types import DraftShape, SamplingParams, TreeKind

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
    SamplingParams(temperature=0.0, max_tokens=LENGTH, presence_penalty=0.7, min_tokens=20),
]
TREES = {
    "beam": DraftShape(kind="beam", width=6, nodes=20),
    "dynamic": DraftShape(kind="dynamic", width=4, nodes=12),
    "dynamic_threshold": DraftShape(kind="dynamic_threshold", width=4, nodes=16),
}
DRAFT_MODELS: dict[str, dict[str, Any]] = {
    "exact": {},
    "pairs": {"layer_parallel_size": 2},
    "pairs, never": {"layer_parallel_size": 2, "calibration": "never"},
    "blocks of four": {"layer_parallel_size": 4, "layer_parallel_policy": "block"},
}


@pytest.fixture(scope="module")
def plain(make_worker: MakeWorker) -> list[list[int]]:
    """What `MIXED` write without drafts."""
    driver = Driver(make_worker())
    return driver.write(*add_all(driver))


def add_all(driver: Driver, params: list[SamplingParams] = MIXED) -> list[Text]:
    return [
        driver.add(str(i), prompt, each, seed=10 + i)
        for i, (prompt, each) in enumerate(zip(PROMPTS, params, strict=True))
    ]


# ----------------------------------------------------------------------------------- trees change nothing


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("name", DRAFT_MODELS)
def test_text_does_not_depend_on_the_tree(
    make_worker: MakeWorker, plain: list[list[int]], name: str, kind: str
) -> None:
    driver = Driver(make_worker(**DRAFT_MODELS[name]))
    texts = add_all(driver)
    assert driver.write(*texts, drafts=5, tree=TREES[kind]) == plain
    for text in texts:
        assert num_accepted(text) > 0, "a drafter that is never right proves nothing"
        assert max(result.num_accepted for result in text.results) > 1


def test_trees_accept_more_than_chains(make_worker: MakeWorker) -> None:
    rounds = []
    for tree in (None, TREES["beam"]):
        driver = Driver(make_worker())
        texts = add_all(driver)
        driver.write(*texts, drafts=5, tree=tree)
        rounds.append(sum(len(text.results) for text in texts))
    assert rounds[1] < 0.8 * rounds[0]


def test_a_chain_beside_trees_is_the_chain_it_would_be(
    make_worker: MakeWorker, plain: list[list[int]]
) -> None:
    """Of all requests of a step some may branch and some not."""
    counts = []
    for tree in (None, TREES["beam"]):
        driver = Driver(make_worker(layer_parallel_size=2))
        texts = add_all(driver)
        driver.step([Share(text=t, num_tokens=t.unread, read_draft=True) for t in texts])
        while going := [text for text in texts if not text.done]:
            driver.step(
                [
                    Share(text=t, num_tokens=1, num_drafts=4, tree=tree if t in texts[2:] else None)
                    for t in going
                ]
            )
        assert outputs(*texts) == plain
        counts.append([[(r.num_drafted, r.num_accepted) for r in t.results] for t in texts[:2]])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kv_policy", ["full", "sink_window"])
@settings(deadline=None, max_examples=2, derandomize=True)
@given(seed=st.integers(0, 2**16), name=st.sampled_from(sorted(DRAFT_MODELS)))
def test_no_schedule_of_trees_changes_a_text(
    make_worker: MakeWorker, native: bool, kv_policy: str, seed: int, name: str
) -> None:
    """Chunks, trees, chains, n-grams, lagging readers and preemptions in any mixture, the trees deeper
    than some windows."""
    params = [_with_policy(each, kv_policy) for each in MIXED]
    settings_ = {"method": "combined", "kv_window": 16, "kv_sink_tokens": 2, **DRAFT_MODELS[name]}
    driver = Driver(make_worker(native=native, **settings_), seed=seed)
    texts = add_all(driver, params)
    choices = random.Random(seed)
    while going := [text for text in texts if not text.done]:
        shares = []
        for text in going:
            if text.known and choices.random() < 0.05:
                driver.preempt(text)
            count = text.unread if choices.random() < 0.7 else choices.randint(1, text.unread)
            num_drafts = choices.randint(0, 6) if count == text.unread else 0
            branches = num_drafts > 0 and choices.random() < 0.7
            ngram = not branches and choices.random() < 0.5
            shares.append(
                Share(
                    text=text,
                    num_tokens=count,
                    num_drafts=num_drafts,
                    drafter="ngram" if ngram else "draft_model",
                    read_draft=choices.random() < 0.5,
                    tree=choices.choice(list(TREES.values())) if branches else None,
                )
            )
        driver.step(shares)
    again = Driver(make_worker(native=native, **settings_), seed=seed + 1)
    assert outputs(*texts) == again.write(*add_all(again, params), read_draft=False)


def _with_policy(params: SamplingParams, kv_policy: str) -> SamplingParams:
    return msgspec.structs.replace(params, kv_policy=kv_policy)


@pytest.mark.parametrize("params", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_logprobs_are_of_the_path_that_was_kept(
    make_worker: MakeWorker, params: SamplingParams
) -> None:
    asked = msgspec.structs.replace(params, logprobs=2)
    found = []
    for drafts in (0, 5):
        driver = Driver(make_worker())
        text = driver.add("a", PROMPTS[0], asked, seed=4)
        driver.write(text, drafts=drafts, tree=TREES["dynamic"])
        entries = [entry for result in text.results for entry in result.logprobs][:LENGTH]
        assert [entry.token_id for entry in entries] == text.output[:LENGTH]
        found.append(entries)
    for a, b in zip(*found, strict=True):
        assert a.token_id == b.token_id
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert a.rank == b.rank


# ------------------------------------------------------------------------------------------- the KV behind


def kv_of(model: Model, blocks: list[int], *, num_rows: int) -> list[torch.Tensor]:
    table = BlockTable()
    table.extend(blocks)
    groups = range(len(model.pool.groups))
    return [read_kv(model.pool, group, table, num_rows=num_rows) for group in groups]


@pytest.mark.parametrize("kind", TREES)
def test_kv_after_trees_is_that_of_reading_the_text(
    make_worker: MakeWorker, native: bool, kind: str
) -> None:
    """Of the target, and of a drafter without groups, which is always exact."""
    worker = make_worker(native=native)
    driver = Driver(worker)
    texts = add_all(driver)
    driver.write(*texts, drafts=5, tree=TREES[kind])
    target, drafter = worker.target, worker._models.draft_model
    assert target is not None
    assert drafter is not None
    for text in texts:
        exact = text.results[-1].draft_exact
        assert exact >= text.seen - 1
        found = [
            kv_of(target, text.blocks, num_rows=text.seen),
            kv_of(drafter.model, text.blocks, num_rows=exact),
        ]
        fresh = driver.add(f"{text.name} again", text.token_ids[:-1], GREEDY)
        driver.step([Share(text=fresh, num_tokens=text.seen, read_draft=True)])
        expected = [
            kv_of(target, fresh.blocks, num_rows=text.seen),
            kv_of(drafter.model, fresh.blocks, num_rows=exact),
        ]
        for ours, theirs in zip(found, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert (a - b).abs().max() < 1e-4
        driver.forget(fresh)


@pytest.mark.parametrize("calibration", ["every_round", "on_mismatch"])
def test_calibration_after_trees_is_exact(make_worker: MakeWorker, calibration: str) -> None:
    """Grouped rows of a tree count for nothing; those that an exact pass has written are what a fresh
    prefill writes."""
    worker = make_worker(layer_parallel_size=2, calibration=calibration)
    driver = Driver(worker)
    text = driver.add("a", PROMPTS[2], HOT, seed=3)
    driver.write(text, drafts=4, tree=TREES["beam"])
    drafter = worker._models.draft_model
    assert drafter is not None
    exact = text.results[-1].draft_exact
    assert len(PROMPTS[2]) < exact <= text.seen
    found = kv_of(drafter.model, text.blocks, num_rows=exact)
    fresh = driver.add("b", text.token_ids, GREEDY)
    driver.step([Share(text=fresh, num_tokens=exact, read_draft=True)])
    for a, b in zip(found, kv_of(drafter.model, fresh.blocks, num_rows=exact), strict=True):
        assert (a - b).abs().max() < 1e-4


def test_a_path_through_all_levels_calls_for_no_calibration(make_worker: MakeWorker) -> None:
    worker = make_worker(layer_parallel_size=2)
    driver = Driver(worker)
    text = driver.add("a", PROMPTS[0], HOT, seed=3)
    driver.step([Share(text=text, num_tokens=text.unread, read_draft=True)])
    tree = DraftShape(kind="beam", width=12, nodes=60)
    seen = set()
    for _ in range(12):
        before = text.results[-1].draft_exact
        driver.step([Share(text=text, num_tokens=1, num_drafts=2, tree=tree)])
        full = text.results[-1].num_accepted == 2
        rows = worker.sequences["a"].draft_rows
        assert rows._mismatch == (not full)
        assert rows.exact >= before
        seen.add(full)
    assert seen == {True, False}


# ---------------------------------------------------------------------------------------------- rejection


@pytest.mark.parametrize("kind", TREES)
def test_greedy_text_does_not_depend_on_the_rule(make_worker: MakeWorker, kind: str) -> None:
    driver = Driver(make_worker(verification="rejection"))
    plain, drafted = driver.add("a", PROMPTS[0], GREEDY), driver.add("b", PROMPTS[0], GREEDY)
    assert driver.write(plain) == driver.write(drafted, drafts=4, tree=TREES[kind])


@pytest.mark.parametrize("kind", ["beam", "dynamic", "dynamic_threshold"])
def test_texts_by_rejection_come_as_often_as_the_target_makes_them(
    make_worker: MakeWorker, kind: TreeKind
) -> None:
    """All texts of three tokens, top 3, against the law that the target's log-probabilities give."""
    worker = make_worker(verification="rejection", max_num_seqs=64, layer_parallel_size=2)
    driver = Driver(worker)
    params = SamplingParams(temperature=1.2, top_k=3, max_tokens=3, ignore_eos=True)
    shape = DraftShape(kind=kind, width=2, nodes=4)
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for batch in range(12):
        texts = [
            driver.add(f"{batch}-{i}", PROMPTS[3], params, seed=60 * batch + i) for i in range(60)
        ]
        while going := [text for text in texts if not text.done]:
            driver.step(
                [
                    Share(text=text, num_tokens=text.unread, num_drafts=2, tree=shape)
                    for text in going
                ]
            )
        counts.update(tuple(output) for output in outputs(*texts))
        accepted += num_accepted(*texts)
        driver.forget(*texts)
    assert accepted > 0.5 * counts.total()
    law = dict(_paths(driver, PROMPTS[3], length=3))
    assert sum(law.values()) == pytest.approx(1.0)
    assert set(counts) <= set(law)
    assert_exact(compare(counts, law))


def _paths(
    driver: Driver, prompt: list[int], *, length: int
) -> list[tuple[tuple[int, ...], float]]:
    """Every continuation by the target's three best tokens, and its chance at temperature 1.2."""
    if length == 0:
        return [((), 1.0)]
    asked = SamplingParams(temperature=0.0, max_tokens=1, logprobs=3)
    text = driver.add(f"law {prompt}", prompt, asked)
    driver.write(text)
    (entry,) = text.results[-1].logprobs
    driver.forget(text)
    ids = [token_id for token_id, _ in entry.top]
    laws = (torch.tensor([each for _, each in entry.top]).double() / 1.2).softmax(-1).tolist()
    return [
        ((token_id, *rest), chance * below)
        for token_id, chance in zip(ids, laws, strict=True)
        for rest, below in _paths(driver, [*prompt, token_id], length=length - 1)
    ]

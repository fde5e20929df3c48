"""Many requests at once, some cancelled and some preempted: every text is the one it would have got alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from paceline.runtime.config import make_config
from paceline.runtime.engine import Engine
from paceline.runtime.local import local_engine
from paceline.runtime.preflight import Facts, examine
from paceline.runtime.requests import RequestFactory
from paceline.runtime.types import Request, SamplingParams, StructuredOutputs

LAYER_PARALLEL = {"layer_parallel_size": 4, "layer_parallel_policy": "block"}
CASES = {
    "draft model": {"method": "draft_model", **LAYER_PARALLEL},
    "n-grams": {"method": "ngram"},
    "both": {"method": "combined", **LAYER_PARALLEL},
    "none": None,
}


def mixed_params(number: int, choices: random.Random) -> SamplingParams:
    """Every parameter that changes a text turns up in some request."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0.0, "frequency_penalty": 0.6, "presence_penalty": 0.2},
        {"temperature": 0.0, "logit_bias": {10: 3.0, 11: -100.0}, "min_tokens": 12},
        {"temperature": 0.9, "structured_outputs": StructuredOutputs(regex="[a-z ]{8,60}")},
        {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    ]
    longest = choices.randrange(60, 100) if number % 3 == 1 else choices.randrange(4, 40)
    kind = kinds[number % len(kinds)]
    ignore_eos = number % 5 != 0 and "structured_outputs" not in kind
    return SamplingParams(
        seed=number,
        ignore_eos=ignore_eos,
        max_tokens=max(longest, kind.get("min_tokens", 0)),
        **kind,
    )


class Load:
    """Requests on an engine, step by step."""

    def __init__(self, engine: Engine, facts: Facts) -> None:
        self.engine, self._facts = engine, facts
        self.texts: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}

    def run(self, requests: list[Request], *, on_step: Callable[[int], None] | None = None) -> None:
        self.texts |= {request.request_id: [] for request in requests}
        self.engine.submit(requests)
        step = 0
        while self.engine.has_work:
            for delta in self.engine.poll():
                self.texts[delta.request_id] += delta.token_ids
                if delta.finish_reason is not None:
                    assert delta.request_id not in self.ends, "a request ended twice"
                    self.ends[delta.request_id] = delta.finish_reason
                assert delta.error is None, delta.error
            self.engine.scheduler.check()
            if on_step is not None:
                on_step(step)
            step += 1


@pytest.fixture(params=CASES)
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    config = make_config(
        {
            "dtype": "float32",
            "max_model_len": 160,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 96,
            "kv_cache_memory": "5MiB",
            "speculative_config": CASES[request.param],
        }
    )
    facts = examine(config)
    engine = local_engine(config, facts)
    yield Load(engine, facts)
    engine.close()


def test_every_finished_text_equals_its_solo_run_and_every_block_is_free_afterwards(
    load: Load,
) -> None:
    choices = random.Random(0)
    config = make_config({"max_model_len": 160})
    facts = examine(config)
    factory = RequestFactory(facts, config)
    shared = [choices.randrange(4000) for _ in range(70)]
    jobs = []
    for number in range(64):
        own = [choices.randrange(4000) for _ in range(choices.randrange(1, 14))]
        prompt = shared[: choices.randrange(20, 40)] + own if number % 3 == 0 else own
        jobs.append(
            factory.make(
                {"prompt_token_ids": prompt},
                mixed_params(number, choices),
                request_id=f"r{number}",
                priority=choices.randrange(-1, 2),
            )
        )
    requests = [request for job in jobs for request in job.requests]
    to_cancel = [request.request_id for request in requests if int(request.seed) % 2]
    order = random.Random(1)
    order.shuffle(to_cancel)

    def cancel(step: int) -> None:
        if step >= 40 and step % 2 == 0 and to_cancel:
            load.engine.abort([to_cancel.pop()])

    load.run(requests, on_step=cancel)
    status = load.engine.status()
    assert status.num_preemptions > 0, "the pool was too large for this test to mean anything"
    assert status.prefix_hits > 0, "no prefix was shared"
    assert status.num_free_blocks == status.num_blocks
    assert set(load.ends) == {request.request_id for request in requests}
    finished = [each for each in requests if load.ends[each.request_id] != "abort"]
    assert len(finished) >= 32
    assert len(finished) < 60, "nobody was cancelled in time"
    together = {each.request_id: load.texts[each.request_id] for each in finished}
    for request in finished:
        load.texts.clear()
        load.ends.clear()
        load.run([request])
        assert load.texts[request.request_id] == together[request.request_id], request


def test_a_cancelled_request_gives_its_blocks_back_at_once(load: Load) -> None:
    config = make_config({"max_model_len": 160})
    job = RequestFactory(examine(config), config).make(
        {"prompt_token_ids": list(range(1, 60))}, SamplingParams(max_tokens=50, temperature=0.0)
    )
    load.engine.submit(list(job.requests))
    load.engine.poll()
    status = load.engine.status()
    assert status.num_free_blocks < status.num_blocks
    load.engine.abort([job.requests[0].request_id])
    status = load.engine.status()
    assert status.num_free_blocks == status.num_blocks
    assert [delta.finish_reason for delta in load.engine.poll()] == ["abort"]

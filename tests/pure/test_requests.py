"""From prompts to requests: what is refused, what is resolved, what a request carries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engines import END, VOCAB_SIZE, fake_facts, ids_of

from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import PromptError
from paceline.runtime.preflight import Facts
from paceline.runtime.requests import RequestFactory, child_id, job_id
from paceline.runtime.types import SamplingParams, StructuredOutputs

CONTEXT = 64


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return fake_facts(tmp_path_factory.mktemp("fake"), max_model_len=CONTEXT)


@pytest.fixture
def factory(facts: Facts) -> RequestFactory:
    return RequestFactory(facts, EngineConfig(seed=1000))


def without_tokenizer(facts: Facts) -> Facts:
    return Facts(
        arch=facts.arch,
        max_model_len=facts.max_model_len,
        eos_token_ids=facts.eos_token_ids,
        tokenizer=None,
    )


def test_a_text_prompt_is_tokenised(factory: RequestFactory) -> None:
    for prompt in ("hé", {"prompt": "hé"}):
        job = factory.make(prompt, SamplingParams())  # type: ignore[arg-type]
        assert job.prompt == "hé"
        assert job.prompt_token_ids == ids_of("hé")
        assert job.requests[0].prompt_token_ids == tuple(ids_of("hé"))


def test_a_prompt_of_tokens_is_taken_as_it_is(factory: RequestFactory) -> None:
    job = factory.make({"prompt_token_ids": [1, 2, END]}, SamplingParams())
    assert job.prompt is None
    assert job.requests[0].prompt_token_ids == (1, 2, END)


def test_n_texts_are_n_requests_with_their_own_ids_and_seeds(factory: RequestFactory) -> None:
    job = factory.make("hi", SamplingParams(n=3, seed=7), request_id="mine")
    assert [r.request_id for r in job.requests] == ["mine-0", "mine-1", "mine-2"]
    assert [r.seed for r in job.requests] == [7, 8, 9]
    assert {r.params.n for r in job.requests} == {1}
    assert job.params.n == 3


def test_requests_without_a_seed_get_the_engines_and_a_running_number(
    factory: RequestFactory, facts: Facts
) -> None:
    def seeds(factory: RequestFactory) -> list[int]:
        jobs = [factory.make("hi", SamplingParams(n=n)) for n in (1, 2, 1)]
        return [request.seed for job in jobs for request in job.requests]

    assert seeds(factory) == [1000, 1001, 1002, 1003]
    assert seeds(RequestFactory(facts, EngineConfig(seed=1000))) == [1000, 1001, 1002, 1003]


def test_made_up_ids_do_not_repeat(factory: RequestFactory) -> None:
    jobs = [factory.make("hi", SamplingParams(n=2)) for _ in range(3)]
    assert len({job.request_id for job in jobs}) == 3


@given(st.lists(st.tuples(st.text("a-0", max_size=6), st.integers(0, 12)), unique=True, min_size=2))
def test_no_two_texts_share_an_id_whatever_ids_clients_choose(jobs: list[tuple[str, int]]) -> None:
    assert len({child_id(name, index) for name, index in jobs}) == len(jobs)
    assert all(job_id(child_id(name, index)) == name for name, index in jobs)


@pytest.mark.parametrize(("asked", "resolved"), [(None, 62), (10, 10), (62, 62), (500, 62)])
def test_max_tokens_is_bounded_by_the_context(
    factory: RequestFactory, asked: int | None, resolved: int
) -> None:
    request = factory.make("hi", SamplingParams(max_tokens=asked)).requests[0]
    assert (request.max_tokens, request.params.max_tokens) == (resolved, resolved)


def test_a_window_that_moves_on_has_no_such_bound(factory: RequestFactory) -> None:
    long = SamplingParams(max_tokens=500, kv_policy="sink_window")
    assert factory.make("x" * 100, long).requests[0].max_tokens == 500


def test_what_the_engine_must_know_goes_with_every_request(factory: RequestFactory) -> None:
    job = factory.make(
        "hi", SamplingParams(n=2), priority=-5, cache_salt="tenant", num_draft_tokens=0
    )
    for request in job.requests:
        assert (request.priority, request.cache_salt, request.num_draft_tokens) == (-5, "tenant", 0)
        assert request.eos_token_ids == (END,)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [VOCAB_SIZE]}, f"token id {VOCAB_SIZE} is outside"),
        ({"prompt_token_ids": [3, -1]}, "token id -1 is outside"),
        ({"prompt_token_ids": [True]}, "a prompt is"),
        ({"prompt_token_ids": "abc"}, "a prompt is"),
        ({}, "a prompt is"),
        ({"prompt": 5}, "prompt must be a string"),
        ("half \ud800", "half a surrogate pair"),
        ("x" * CONTEXT, f"the prompt has {CONTEXT} tokens, the context holds {CONTEXT}"),
    ],
)
def test_a_bad_prompt_is_refused_in_one_line(
    factory: RequestFactory, prompt: Any, message: str
) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        factory.make(prompt, SamplingParams())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "how", "name"),
    [
        ({"temperature": -1.0}, {}, "temperature"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, {}, "logit_bias"),
        ({"stop_token_ids": (VOCAB_SIZE,)}, {}, "stop_token_ids"),
        ({"stop": "\udcff"}, {}, "stop"),
        ({}, {"request_id": ""}, "request_id"),
        ({}, {"request_id": "x" * 257}, "request_id"),
        ({}, {"request_id": "two\nlines"}, "request_id"),
        ({}, {"num_draft_tokens": -1}, "num_draft_tokens"),
        ({}, {"num_draft_tokens": 65}, "num_draft_tokens"),
        ({}, {"priority": 2**31}, "priority"),
        ({}, {"priority": -(2**31)}, "priority"),
        ({}, {"cache_salt": "\ud800"}, "cache_salt"),
        ({}, {"cache_salt": "x" * 2000}, "cache_salt"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(
    factory: RequestFactory, params: dict[str, Any], how: dict[str, Any], name: str
) -> None:
    with pytest.raises(PromptError, match=f"^{name}"):
        factory.make("hi", SamplingParams(**params), **how)


def test_a_grammar_that_the_engine_could_not_compile_is_refused(factory: RequestFactory) -> None:
    good = SamplingParams(structured_outputs=StructuredOutputs(regex="[0-9]+"))
    assert factory.make("hi", good).requests[0].params.structured_outputs is not None
    bad = SamplingParams(structured_outputs=StructuredOutputs(regex="(["))
    with pytest.raises(PromptError, match=r"^structured_outputs\.regex"):
        factory.make("hi", bad)


def test_without_a_tokenizer_only_token_ids_are_served(facts: Facts) -> None:
    factory = RequestFactory(without_tokenizer(facts), EngineConfig(model="bare"))
    assert factory.make({"prompt_token_ids": [1]}, SamplingParams()).prompt_token_ids == [1]
    with pytest.raises(PromptError, match="bare has no tokenizer"):
        factory.make("hi", SamplingParams())
    with pytest.raises(PromptError, match=r"^stop needs a tokenizer"):
        factory.make({"prompt_token_ids": [1]}, SamplingParams(stop="x"))


def test_the_front_of_a_server_imports_neither_torch_nor_ray() -> None:
    modules = "requests, outputs, async_llm, chat, preflight"
    code = f"import sys; from paceline.runtime import {modules}; print({{'torch', 'ray'}} & set(sys.modules))"
    folder = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=folder
    )
    assert done.stdout.strip() == "set()", done.stderr

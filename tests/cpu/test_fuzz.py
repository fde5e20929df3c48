"""Thousands of bodies that nobody meant to send, made from our own OpenAPI description, against a whole server: no
crash, no 5xx, no block left held.

`FUZZ_EXAMPLES` sets how many bodies per route and kind; continuous integration takes a few.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from tests.engines import serving

from paceline.runtime.config import make_config
from paceline.runtime.local import connect
from paceline.runtime.models.weights import find_model
from paceline.runtime.preflight import examine

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
relaxed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(tiny(vocab_size=4096, num_hidden_layers=2), folder, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("embedded") / name, folder / name)
    config = make_config(
        {
            "model": str(folder),
            "max_model_len": 128,
            "max_num_seqs": 16,
            "kv_cache_memory": "8MiB",
            "distributed_executor_backend": "uni",
            "speculative_config": {"method": "ngram"},
        }
    )
    facts = examine(config)
    client = connect(config, facts)
    try:
        with serving(client, facts, config=config) as served:
            yield served.url
            _blocks_are_free(served.url)
    finally:
        client.close()


def _blocks_are_free(url: str) -> None:
    deadline = time.monotonic() + 30.0
    while True:
        status = httpx.get(f"{url}/live/status", timeout=10.0).json()["status"]
        if status["num_running"] == status["num_waiting"] == 0:
            break
        assert time.monotonic() < deadline, f"requests are left: {status}"
        time.sleep(0.1)
    assert status["num_free_blocks"] == status["num_blocks"], status


def _modest(body: Any) -> Any:
    """The same request for fewer and shorter texts: what is tested is what comes in."""
    if isinstance(body, dict):
        for name, most in (("n", 2), ("max_tokens", 4), ("max_completion_tokens", 4)):
            if type(body.get(name)) is int and body[name] > most:
                body[name] = most
    return body


def _refused_or_answered(response: httpx.Response) -> None:
    assert response.status_code < 500, (response.status_code, response.text[:500])
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"]
        assert error["type"]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: str(mode.value))
@pytest.mark.parametrize("route", ROUTES)
def test_bodies_made_from_the_description_get_an_answer_or_a_refusal(
    url: str, route: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found = []

    @relaxed
    @given(case=schema[route]["POST"].as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        case.body = _modest(case.body)
        response = httpx.request(**_request(case, url), timeout=30.0)
        found.append(response.status_code)
        _refused_or_answered(response)

    run()
    assert len(found) >= EXAMPLES // 2, "the description was not explored"
    _blocks_are_free(url)


def _request(case: Any, url: str) -> dict[str, Any]:
    given = case.as_transport_kwargs(base_url=url)
    allowed = ("method", "url", "headers", "params", "json", "content", "data")
    request = {key: value for key, value in given.items() if key in allowed}
    if isinstance(request.get("data"), bytes | str):
        request["content"] = request.pop("data")
    return request


@relaxed
@given(body=st.binary(max_size=200), route=st.sampled_from(ROUTES))
def test_bytes_that_are_no_body_are_refused(url: str, body: bytes, route: str) -> None:
    response = httpx.post(url + route, content=body, headers={"Content-Type": "application/json"})
    _refused_or_answered(response)


def test_clients_that_leave_in_the_middle_leave_nothing_behind(url: str) -> None:
    body = {"prompt": "x", "max_tokens": 120, "stream": True, "ignore_eos": True}
    for _ in range(20):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30.0) as response:
            next(response.iter_lines())
    _blocks_are_free(url)

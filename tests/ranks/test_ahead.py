"""A drafter that is ahead in processes of its own: killed, or two ranks wide, texts are the same."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from paceline.parallel.leftovers import sweep
from paceline.runtime.config import make_config
from paceline.runtime.engine import Engine
from paceline.runtime.local import LocalDraftRanks, local_engine
from paceline.runtime.preflight import examine
from paceline.runtime.types import Request, SamplingParams, StepResult

SOON_S = 60.0


@pytest.fixture
def engine(tiny: Callable[..., Path]) -> Any:
    """`engine(**settings)`: a target that takes its time where it has drafts, as one that is worth
    drafting for does, and a drafter in processes of its own."""
    made: list[Engine] = []

    def start(*, step_s: float, draft_ranks: int = 1, **settings: Any) -> Engine:
        config = make_config(
            {
                "model": str(tiny(seed=0)),
                "dtype": "float32",
                "kv_cache_memory": "16MiB",
                "disable_custom_all_reduce": True,
                "speculative_config": {
                    "model": str(tiny(seed=0, noise=0.03)),
                    "num_speculative_tokens": 3,
                    "draft_length": "fixed",
                    "schedule": "ahead",
                    "draft_ranks": draft_ranks,
                    "layer_parallel_size": 2,
                },
                **settings,
            }
        )
        served = local_engine(config, examine(config))
        made.append(served)
        receive = served.executor.receive

        def slow() -> StepResult:
            tails = served.scheduler.tails
            assert tails is not None
            if len(tails):
                time.sleep(step_s)
            return receive()

        served.executor.receive = slow  # type: ignore[method-assign]
        return served

    yield start
    for each in made:
        each.close()


def write(
    engine: Engine,
    name: str,
    *,
    drafts: int | None = None,
    max_tokens: int = 30,
    then: Callable[[], None] | None = None,
) -> tuple[list[list[int]], int]:
    """Three texts, greedy and sampled, and how many of their drafts were accepted. `then` is called once
    some tokens have come."""
    requests = [
        Request(
            request_id=f"{name}-{number}",
            prompt_token_ids=tuple(range(5, 15 + number)),
            params=SamplingParams(temperature=0.9 * (number % 2)),
            seed=number,
            max_tokens=max_tokens,
            num_draft_tokens=drafts,
        )
        for number in range(3)
    ]
    engine.submit(requests)
    found: dict[str, list[int]] = {each.request_id: [] for each in requests}
    left, accepted, deadline_s = set(found), 0, time.monotonic() + SOON_S
    while left:
        assert time.monotonic() < deadline_s, f"{left} have not ended"
        for delta in engine.poll():
            found[delta.request_id] += delta.token_ids
            accepted += delta.num_accepted
            if delta.finish_reason is not None:
                assert delta.finish_reason == "length", delta.error
                left.remove(delta.request_id)
        if then is not None and all(len(text) >= 4 for text in found.values()):
            then()
            then = None
    assert then is None, "the texts were over too soon"
    return list(found.values()), accepted


def draft_ranks_of(engine: Engine) -> list[psutil.Process]:
    assert engine.ahead is not None
    running = engine.ahead._running
    assert isinstance(running, LocalDraftRanks)
    return [psutil.Process(each.pid) for each in running._processes]


def wait_until_drafting(engine: Engine) -> None:
    assert engine.ahead is not None
    deadline_s = time.monotonic() + SOON_S
    while engine.ahead._starting is not None:
        assert time.monotonic() < deadline_s
        engine.check()
        time.sleep(0.02)


def test_texts_go_on_without_a_killed_drafter_and_with_the_next_one(engine: Any) -> None:
    served: Engine = engine(step_s=0.01)
    expected, none = write(served, "plain", drafts=0)
    assert none == 0
    before = draft_ranks_of(served)
    found, _ = write(served, "killed", then=before[0].kill)
    assert found == expected
    wait_until_drafting(served)
    found, accepted = write(served, "after")
    assert found == expected
    assert accepted > 0
    status = served.status()
    assert status.num_restarts == 1
    assert [rank.split(",")[0] for rank in status.ranks] == ["rank 0", "draft rank 0"]
    assert sweep() == 0, "nothing is left in shared memory"


def test_two_draft_ranks_draft_what_one_does_for_a_target_of_one(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)  # three ranks, on whatever there is
    served: Engine = engine(draft_ranks=2, step_s=0.1)
    expected, _ = write(served, "plain", drafts=0, max_tokens=12)
    found, accepted = write(served, "drafted", max_tokens=12)
    assert found == expected
    assert accepted > 0
    assert len(served.status().ranks) == 3

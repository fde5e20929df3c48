"""Ranks are killed, hang or run out of memory in the midst of texts: these are what they would have been."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from paceline.parallel.leftovers import sweep
from paceline.runtime.config import make_config
from paceline.runtime.engine import Engine
from paceline.runtime.local import LocalRanks, local_engine
from paceline.runtime.preflight import examine
from paceline.runtime.types import Request, SamplingParams

SOON_S = 60.0
_names = (f"r{number}" for number in itertools.count())
MEMORY = 320 * 2**20
"""What the steps of a rank may take."""


@pytest.fixture
def engine(tiny: Callable[..., Path]) -> Any:
    """`engine(shape, **settings)`: over two ranks in processes of their own."""
    made: list[Engine] = []

    def start(shape: dict[str, int] | None = None, **settings: Any) -> Engine:
        model = str(tiny(**(shape or {})))
        config = make_config(
            {
                "model": model,
                "dtype": "float32",
                "tensor_parallel_size": 2,
                "distributed_executor_backend": "mp",
                "kv_cache_memory": "16MiB",
                "speculative_config": {"model": model, "num_speculative_tokens": 3},
                **settings,
            }
        )
        made.append(local_engine(config, examine(config)))
        return made[-1]

    yield start
    for each in made:
        each.close()


def asks(count: int, *, max_tokens: int) -> list[Request]:
    """Greedy and sampled in turn."""
    return [
        Request(
            request_id=next(_names),
            prompt_token_ids=tuple(range(5, 15 + number)),
            params=SamplingParams(temperature=0.9 * (number % 2)),
            seed=number,
            max_tokens=max_tokens,
        )
        for number in range(count)
    ]


def texts(
    engine: Engine, requests: list[Request], *, then: Callable[[], None] | None = None
) -> list[list[int]]:
    """Every request's tokens. `then` is called once some have come."""
    engine.submit(requests)
    found: dict[str, list[int]] = {each.request_id: [] for each in requests}
    left, deadline_s = set(found), time.monotonic() + SOON_S
    while left:
        assert time.monotonic() < deadline_s, f"{left} have not ended"
        for delta in engine.poll():
            found[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                assert delta.finish_reason == "length", delta.error
                left.remove(delta.request_id)
        if then is not None and all(len(text) >= 4 for text in found.values()):
            then()
            then = None
    assert then is None, "the texts were over too soon"
    return list(found.values())


def ranks_of(engine: Engine) -> list[psutil.Process]:
    running = engine.executor._running  # type: ignore[attr-defined]
    assert isinstance(running, LocalRanks)
    return [psutil.Process(each.pid) for each in running._processes]


def test_texts_go_on_when_a_rank_is_killed(engine: Any) -> None:
    served: Engine = engine()
    expected = texts(served, asks(4, max_tokens=30))
    before = ranks_of(served)
    found = texts(served, asks(4, max_tokens=30), then=before[1].kill)
    assert found == expected
    assert served.status().num_restarts == 1
    assert not any(each.is_running() for each in before), "the other one is ended too"
    assert sweep() == 0, "nothing is left in shared memory"


def test_interleaved_texts_are_the_targets_own_and_go_on_when_a_rank_is_killed(
    engine: Any,
) -> None:
    """Two plans are in flight, and the text is that of one rank without drafts."""
    alone: Engine = engine(
        tensor_parallel_size=1, distributed_executor_backend="uni", speculative_config=None
    )
    expected = texts(alone, asks(5, max_tokens=30))
    drafts = {"num_speculative_tokens": 3, "draft_length": "fixed", "layer_parallel_size": 2}
    drafts["model"] = alone.executor._worker.config.model  # type: ignore[attr-defined]
    served: Engine = engine(speculative_config={"schedule": "interleaved", **drafts})
    assert texts(served, asks(5, max_tokens=30)) == expected
    status = served.status()
    assert status.drafted > 0
    assert all("while drafting" in rank for rank in status.ranks), "with collectives of its own"
    killed = ranks_of(served)[1]

    def kill() -> None:
        assert served._in_flight, "a plan is in flight while the last one's tokens are passed on"
        killed.kill()

    assert texts(served, asks(5, max_tokens=30), then=kill) == expected
    assert served.status().num_restarts == 1
    assert sweep() == 0, "nothing is left in shared memory"


def test_a_rank_that_hangs_is_found_and_the_stacks_of_all_are_logged(
    engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    served: Engine = engine(step_timeout_s=4.0)
    expected = texts(served, asks(2, max_tokens=20))
    stopped = ranks_of(served)[1]
    with caplog.at_level(logging.ERROR, logger="paceline"):
        found = texts(
            served, asks(2, max_tokens=20), then=lambda: os.kill(stopped.pid, signal.SIGSTOP)
        )
    assert found == expected
    assert "rank 0 hangs:" in caplog.text
    assert "in run_rank" in caplog.text, "where rank 0 waits for the other"
    assert f"process {stopped.pid} says nothing: it is stopped" in caplog.text


def test_memory_that_runs_out_makes_steps_smaller_and_ends_nobody(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities of a long prompt over a large vocabulary want more than there is, at once."""
    started = LocalRanks.__init__

    def limited(ranks: LocalRanks, *args: Any, **more: Any) -> None:
        started(ranks, *args, **more)
        limits.append(ranks)

    limits: list[LocalRanks] = []
    monkeypatch.setattr(LocalRanks, "__init__", limited)
    shape = {"vocab_size": 60_000, "max_position_embeddings": 2048}
    served: Engine = engine(shape, max_num_batched_tokens=1024, speculative_config=None)
    texts(served, asks(2, max_tokens=4))
    for process in ranks_of(served):
        size = process.memory_info().vms + MEMORY
        process.rlimit(psutil.RLIMIT_AS, (size, size))
    small, large = asks(2, max_tokens=12)
    large = Request(
        request_id=large.request_id,
        prompt_token_ids=tuple(range(5, 1005)),
        params=SamplingParams(temperature=0.0, prompt_logprobs=1),
        seed=0,
        max_tokens=4,
    )
    found = texts(served, [small, large])
    assert [len(text) for text in found] == [12, 4]
    assert served.status().num_restarts == 1
    assert served.scheduler.limits.max_num_batched_tokens == 512

"""Users' streams over several engines: `AsyncLLM` does not know that there is more than one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.engines import REPLY, FakeEngine, fake_facts, ids_of

from paceline.actors.router import Member, Router
from paceline.runtime import async_llm
from paceline.runtime.async_llm import AsyncLLM
from paceline.runtime.config import EngineConfig
from paceline.runtime.errors import EngineError
from paceline.runtime.outputs import empty_output
from paceline.runtime.types import Request, SamplingParams

SOON_S = 20.0
PROMPT = "once upon a time, and a very good time it was"


def resuming(request: Request) -> Sequence[int]:
    """What `REPLY`, again and again, goes on with after what was written elsewhere."""
    ids = ids_of(REPLY)
    start = len(request.output_token_ids)
    return [ids[i % len(ids)] for i in range(start, request.max_tokens)]


def lost(engine_id: str, error: EngineError) -> None:
    """It stays away."""


def test_streams_survive_the_loss_of_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_llm, "POLL_S", 0.05)
    engines = [FakeEngine(resuming, step_s=0.005) for _ in range(3)]
    router = Router(
        [Member(f"{i}", "both", engine) for i, engine in enumerate(engines)], on_lost=lost
    )

    async def read(llm: AsyncLLM, number: int) -> str:
        stream = await llm.submit(f"{number} {PROMPT}", SamplingParams(max_tokens=200))
        total = empty_output(stream.job)
        async with stream:
            async for output in stream:
                total.add(output)
                if number == 0 and len(total.outputs[0].token_ids) > 60:
                    engines[1].fail()
                    engines[2].fail()
        assert total.outputs[0].finish_reason == "length"
        return total.outputs[0].text

    async def main() -> None:
        llm = AsyncLLM(router, fake_facts(tmp_path), EngineConfig())
        llm.start()
        try:
            texts = await asyncio.wait_for(
                asyncio.gather(*(read(llm, i) for i in range(12))), SOON_S
            )
            assert await llm.check_health(timeout_s=SOON_S)
        finally:
            await llm.close()
        assert texts == [(REPLY * 10)[:200]] * 12
        assert any(request.output_token_ids for request in engines[0].submitted)
        assert llm.status().members[0].engine_id == "0"

    asyncio.run(main())
    router.close()
    assert all(engine.closed for engine in engines)

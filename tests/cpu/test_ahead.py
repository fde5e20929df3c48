"""A drafter that is ahead: what it drafts, in which blocks, and that texts are the target's own.

Where drafter and target run side by side the target is slowed down, as one that is worth drafting for
is slow: models as small as these would be done before any draft came.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import LLM, SamplingParams
from paceline.parallel.launch import solo_mesh
from paceline.runtime.ahead.drafting import AheadDrafter
from paceline.runtime.ahead.messages import Close, Commit, Sync, Tails
from paceline.runtime.config import EngineConfig, make_config
from paceline.runtime.engine import Engine
from paceline.runtime.loading import Loaded, load
from paceline.runtime.outputs import RequestOutput
from paceline.runtime.requests import Prompt, TokensPrompt
from paceline.runtime.sampling.batch import SampleState
from paceline.runtime.sequence import Sequence as TextOnRank
from paceline.runtime.spec.calibrate import Calibration, DraftRows
from paceline.runtime.spec.drafter import Ask
from paceline.runtime.types import Request, StepResult, StructuredOutputs

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
AS_TOKENS: list[Prompt] = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(
    temperature=0.9, top_p=0.95, frequency_penalty=0.5, seed=7, max_tokens=40, ignore_eos=True
)
BLOCK_BYTES = 2 * 6 * 2 * 2 * 16 * 8 * 4
"""Of both models: layers, KV heads, keys and values, tokens, width, bytes of a number."""
STEP_S = 0.004
LONG_S = 30.0


# -------------------------------------------------------------------------------------- one draft rank


def settings(tiny: Callable[..., Path], *, engine: Any = None, **speculative: Any) -> EngineConfig:
    return make_config(
        {
            "model": str(tiny(seed=0)),
            "dtype": "float32",
            "kv_cache_memory": "8MiB",
            "distributed_executor_backend": "uni",
            "speculative_config": {
                "model": str(tiny(seed=0, noise=0.03)),
                "num_speculative_tokens": 4,
                "schedule": "ahead",
                "layer_parallel_size": 2,
                **speculative,
            },
            **(engine or {}),
        }
    )


def request(
    request_id: str, prompt: Sequence[int], params: SamplingParams = GREEDY, **more: Any
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=params,
        seed=7,
        max_tokens=params.max_tokens or 1,
        **more,
    )


def sync(
    request_id: str, prompt: Sequence[int], params: SamplingParams = GREEDY, *, num_ahead: int = 5
) -> Sync:
    asked = request(request_id, prompt, params)
    return Sync(request=asked, generation=1, num_ahead=num_ahead)


def drafts_of(tails: Tails | None) -> dict[str, tuple[int, ...]]:
    return {} if tails is None else {each.request_id: each.token_ids for each in tails.tails}


def drained(drafter: AheadDrafter) -> dict[str, list[int]]:
    """All drafts until every tail is full."""
    found: dict[str, list[int]] = {}
    while (tails := drafter.draft()) is not None:
        for request_id, token_ids in drafts_of(tails).items():
            found.setdefault(request_id, []).extend(token_ids)
    return found


class Lockstep:
    """The same drafter in rounds: draft, verify, commit."""

    def __init__(self, loaded: Loaded, prompt: Sequence[int], params: SamplingParams) -> None:
        assert loaded.draft_model is not None
        self._model = loaded.draft_model
        asked = request("a", prompt, params)
        rows = DraftRows(calibration=Calibration.ON_MISMATCH, grouped=loaded.grouped)
        self.text = TextOnRank(request=asked, token_ids=[*prompt], seen=0, draft_rows=rows)
        device = torch.device("cpu")
        self.text.sample = SampleState(asked, vocab_size=loaded.vocab_size, device=device)
        self.text.table.extend(range(8))

    def draft(self, count: int) -> list[int]:
        with torch.inference_mode():
            ((draft,), _) = self._model.propose([Ask(sequence=self.text, num_tokens=count)], [])
        return list(draft.token_ids)

    def commit(self, token_ids: Sequence[int], *, num_drafted: int, num_accepted: int) -> None:
        self._model.verified(self.text, num_drafted=num_drafted, num_accepted=num_accepted)
        self.text.commit(token_ids)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_are_those_of_lockstep(tiny: Callable[..., Path], params: SamplingParams) -> None:
    config = settings(tiny)
    ahead = AheadDrafter(config, load(config, solo_mesh()), rank=0)
    lockstep = Lockstep(load(config, solo_mesh()), PROMPTS[0], params)
    ahead.take([sync("a", PROMPTS[0], params, num_ahead=4)])
    first = lockstep.draft(4)
    assert drained(ahead)["a"] == first
    # one that is wrong: both read what follows from their exact rows on
    wrong = (first[2] + 1) % 61
    ahead.take([Commit(request_id="a", base=5, token_ids=(*first[:2], wrong))])
    lockstep.commit([*first[:2], wrong], num_drafted=4, num_accepted=2)
    second = lockstep.draft(4)
    assert drained(ahead)["a"] == second
    # all are right, and the target's own token is what the drafter would have drafted next
    longer = Lockstep(load(config, solo_mesh()), PROMPTS[0], params)
    longer.draft(4)
    longer.commit([*first[:2], wrong], num_drafted=4, num_accepted=2)
    own = longer.draft(5)[4]
    ahead.take([Commit(request_id="a", base=8, token_ids=(*second, own))])
    lockstep.commit([*second, own], num_drafted=4, num_accepted=4)
    assert drained(ahead)["a"] == lockstep.draft(4)


@pytest.mark.parametrize("calibration", ["on_mismatch", "every_round"])
def test_after_a_difference_a_text_is_drafted_for_as_if_it_had_been_read_anew(
    tiny: Callable[..., Path], calibration: str
) -> None:
    config = settings(tiny, calibration=calibration)
    used, fresh = (AheadDrafter(config, load(config, solo_mesh()), rank=0) for _ in range(2))
    used.take([sync("a", PROMPTS[2])])
    (draft, *_) = drained(used)["a"]
    other = (draft + 1) % 61
    used.take([Commit(request_id="a", base=7, token_ids=(other, 2))])
    fresh.take([sync("a", [*PROMPTS[2], other, 2])])
    assert drained(used) == drained(fresh)


def test_without_calibration_rows_stay_as_they_were_drafted(tiny: Callable[..., Path]) -> None:
    config = settings(tiny, calibration="never")
    drafter = AheadDrafter(config, load(config, solo_mesh()), rank=0)
    drafter.take([sync("a", PROMPTS[2])])
    drafts = drained(drafter)["a"]
    drafter.take([Commit(request_id="a", base=7, token_ids=(*drafts[:3], (drafts[3] + 1) % 61))])
    tails = drafter.draft()
    assert tails is not None
    assert tails.passes[0].num_rows == 1, "only the token that it had not seen"


def test_every_round_is_made_exact_where_that_is_asked_for(tiny: Callable[..., Path]) -> None:
    config = settings(tiny, calibration="every_round")
    drafter = AheadDrafter(config, load(config, solo_mesh()), rank=0)
    drafter.take([sync("a", PROMPTS[2])])
    drafts = drained(drafter)["a"]
    drafter.take([Commit(request_id="a", base=7, token_ids=tuple(drafts[:3]))])
    tails = drafter.draft()
    assert tails is not None
    assert tails.passes[0].num_rows == 5, "the five drafts, of which it had only read four"


def test_a_prompt_is_read_in_chunks_beside_the_drafts_of_others(tiny: Callable[..., Path]) -> None:
    config = settings(tiny, engine={"max_num_batched_tokens": 160})
    drafter = AheadDrafter(config, load(config, solo_mesh()), rank=0)
    prompt = [index % 61 for index in range(150)]
    drafter.take([sync("a", PROMPTS[0], num_ahead=9)])
    assert drafts_of(drafter.draft()).keys() == {"a"}
    drafter.take([sync("b", prompt)])
    drafting = [set(drafts_of(drafter.draft())) for _ in range(4)]
    assert drafting == [{"a"}, {"a"}, {"a"}, {"a", "b"}], "forty tokens of the prompt at a time"
    alone = AheadDrafter(config, load(config, solo_mesh()), rank=0)
    alone.take([sync("b", prompt)])
    assert drafts_of(alone.draft()).keys() == {"b"}, "and at once where nobody waits"


def test_a_prefix_that_was_read_is_not_read_again(tiny: Callable[..., Path]) -> None:
    config = settings(tiny)
    drafter = AheadDrafter(config, load(config, solo_mesh()), rank=0)
    prompt = [index % 61 for index in range(40)]
    drafter.take([sync("a", prompt)])
    first = drained(drafter)["a"]
    drafter.take([Close(request_id="a"), sync("b", prompt)])
    tails = drafter.draft()
    assert tails is not None
    assert tails.passes[0].num_rows == 8, "two blocks of sixteen are there"
    assert [*drafts_of(tails)["b"], *drained(drafter)["b"]] == first


def test_texts_beyond_the_blocks_wait_for_them_in_turn(tiny: Callable[..., Path]) -> None:
    memory = {"kv_cache_memory": 18 * BLOCK_BYTES, "enable_prefix_caching": False}
    config = settings(tiny, engine=memory)
    drafter = AheadDrafter(config, load(config, solo_mesh()), rank=0)
    prompt = [index % 61 for index in range(140)]
    drafter.take([sync("a", prompt), sync("b", prompt), sync("c", PROMPTS[0])])
    assert set(drained(drafter)) == {"a"}, "c does not overtake b"
    drafter.take([Close(request_id="a")])
    assert set(drained(drafter)) == {"b", "c"}


def test_a_request_told_anew_takes_the_place_of_the_old_one(tiny: Callable[..., Path]) -> None:
    config = settings(tiny)
    drafter = AheadDrafter(config, load(config, solo_mesh()), rank=0)
    drafter.take([sync("a", PROMPTS[0])])
    first = drained(drafter)["a"]
    drafter.take([sync("a", PROMPTS[0])])
    assert drained(drafter)["a"] == first


# ----------------------------------------------------------------------------------------- the engine


def open_llm(tiny: Callable[..., Path], *, engine: Any = None, **speculative: Any) -> LLM:
    given = {
        "model": str(tiny(seed=0, noise=0.03)),
        "num_speculative_tokens": 4,
        "draft_length": "fixed",
        "schedule": "ahead",
        "layer_parallel_size": 2,
        **speculative,
    }
    llm = LLM(
        str(tiny(seed=0)),
        dtype="float32",
        distributed_executor_backend="uni",
        speculative_config=given,
        **{"kv_cache_memory": "8MiB", **(engine or {})},
    )
    slow_down(engine_of(llm))
    return llm


def engine_of(llm: LLM) -> Engine:
    assert isinstance(llm._client, Engine)
    return llm._client


def slow_down(engine: Engine) -> None:
    receive = engine.executor.receive

    def slow() -> StepResult:
        time.sleep(STEP_S)
        return receive()

    engine.executor.receive = slow  # type: ignore[method-assign]


def texts(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def accepted(outputs: list[RequestOutput]) -> int:
    return sum(each.metrics.accepted for each in outputs if each.metrics is not None)


@pytest.mark.parametrize("draft_length", ["fixed", "adaptive"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_text_is_that_of_plain_decoding(
    tiny: Callable[..., Path], params: SamplingParams, draft_length: str
) -> None:
    with open_llm(tiny, draft_length=draft_length) as llm:
        plain = llm.generate(AS_TOKENS, params, num_draft_tokens=0)
        drafted = llm.generate(AS_TOKENS, params)
        status = llm.status()
    assert texts(drafted) == texts(plain)
    assert accepted(drafted) > 0
    assert accepted(plain) == 0
    passes = [each for step in status.steps for each in step.draft_passes]
    assert passes
    assert all(begin < end for begin, end in (each.span for each in passes))
    last = status.steps[-1]
    assert last.verify_span is not None
    assert passes[-1].span[0] < last.verify_span[1], "on one clock"
    assert "draft rank 0" in status.ranks[1]


def test_requests_beyond_the_blocks_take_turns_and_keep_their_texts(
    tiny: Callable[..., Path],
) -> None:
    params = [SamplingParams(temperature=0.9, max_tokens=60, seed=i) for i in range(10)]
    prompts: list[Prompt] = [
        TokensPrompt(prompt_token_ids=[i, 5, 7, *range(20)]) for i in range(10)
    ]
    memory = {"kv_cache_memory": 18 * BLOCK_BYTES, "max_num_seqs": 8}
    with open_llm(tiny, engine=memory) as llm:
        plain = llm.generate(prompts, params, num_draft_tokens=0)
        drafted = llm.generate(prompts, params)
        assert llm.status().num_preemptions > 0
        engine_of(llm).scheduler.check()
    assert texts(drafted) == texts(plain)
    assert accepted(drafted) > 0


def test_what_is_aborted_is_drafted_for_no_more_and_the_others_go_on(
    tiny: Callable[..., Path],
) -> None:
    with open_llm(tiny) as llm:
        expected = texts(llm.generate(AS_TOKENS, GREEDY, num_draft_tokens=0))
        engine = engine_of(llm)
        jobs = llm.jobs(AS_TOKENS, GREEDY)
        engine.submit([job.requests[0] for job in jobs])
        names = [job.requests[0].request_id for job in jobs]
        found: dict[str, list[int]] = {name: [] for name in names}
        left, deadline_s = set(names), time.monotonic() + LONG_S
        while left:
            assert time.monotonic() < deadline_s
            for delta in engine.poll():
                found[delta.request_id] += delta.token_ids
                if delta.finish_reason is not None:
                    left.remove(delta.request_id)
            if names[0] in left and len(found[names[0]]) >= 5:
                engine.abort(names[:1])
        assert 5 <= len(found[names[0]]) < 40
        assert found[names[0]] == expected[0][: len(found[names[0]])]
        assert [found[name] for name in names[1:]] == expected[1:]
        assert engine.scheduler.tails is not None
        assert engine.scheduler.tails.take_orders() == [], "the drafter has been told of all ends"


def test_requests_may_ask_for_fewer_drafts_and_get_them(tiny: Callable[..., Path]) -> None:
    with open_llm(tiny) as llm:
        plain = llm.generate(AS_TOKENS, GREEDY, num_draft_tokens=0)
        drafted = llm.generate(AS_TOKENS, GREEDY, num_draft_tokens=1)
    assert texts(drafted) == texts(plain)
    for each in drafted:
        assert each.metrics is not None
        assert len(each.metrics.accepted_at) <= 2
    assert accepted(drafted) > 0


def test_drafts_are_shaped_as_the_text_is() -> None:
    shaped = SamplingParams(
        temperature=0.8,
        seed=3,
        max_tokens=40,
        repetition_penalty=1.2,
        min_tokens=4,
        structured_outputs=StructuredOutputs(json_object=True),
    )
    with LLM(
        distributed_executor_backend="uni",
        dtype="float32",
        speculative_config={"schedule": "ahead", "draft_length": "fixed"},
    ) as llm:
        (plain,) = llm.generate(["def f(x):"], shaped, num_draft_tokens=0)
        (drafted,) = llm.generate(["def f(x):"], shaped)
    assert texts([drafted]) == texts([plain])
    assert accepted([drafted]) > 0


def test_a_text_with_a_window_is_written_without_drafts(tiny: Callable[..., Path]) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=40, ignore_eos=True, kv_policy="sink_window"
    )
    with open_llm(tiny, engine={"kv_window": 16}) as llm:
        (output,) = llm.generate(AS_TOKENS[:1], params)
    assert len(output.outputs[0].token_ids) == 40
    assert output.metrics is not None
    assert output.metrics.drafted == 0


def test_a_drafter_that_fails_is_started_anew_and_no_text_suffers(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_llm(tiny) as llm:
        plain = llm.generate(AS_TOKENS, GREEDY, num_draft_tokens=0)
        working, calls = AheadDrafter.draft, [0]

        def failing(drafter: AheadDrafter) -> Tails | None:
            calls[0] += 1
            if calls[0] == 6:
                raise RuntimeError("no more")
            return working(drafter)

        monkeypatch.setattr(AheadDrafter, "draft", failing)
        drafted = llm.generate(AS_TOKENS, GREEDY)
        again = llm.generate(AS_TOKENS, GREEDY)
        status = llm.status()
    assert texts(drafted) == texts(again) == texts(plain)
    assert accepted(again) > 0
    assert status.num_restarts == 1


def test_a_drafter_that_fails_again_and_again_is_given_up(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(drafter: AheadDrafter) -> Tails | None:
        raise RuntimeError("no more")

    with open_llm(tiny) as llm:
        plain = llm.generate(AS_TOKENS, GREEDY, num_draft_tokens=0)
        monkeypatch.setattr(AheadDrafter, "draft", failing)
        deadline_s = time.monotonic() + LONG_S
        while "nothing is drafted" not in caplog.text:
            assert time.monotonic() < deadline_s
            assert texts(llm.generate(AS_TOKENS, GREEDY)) == texts(plain)

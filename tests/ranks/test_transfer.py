"""Read on one engine, written on another: the tokens of one engine doing both, whatever the sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.certificates import Authority
from tests.disaggregated import Engine, halves, text, write_apart

from paceline.runtime.tls import LINK_NAME
from paceline.runtime.types import Request, SamplingParams, TokenDelta

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(
    temperature=0.9, top_k=20, presence_penalty=0.3, repetition_penalty=1.2, logprobs=2
)
BLOCK = 16
LENGTHS = [1, BLOCK - 1, BLOCK, 3 * BLOCK + 5, 70]
_names = (f"r{number}" for number in itertools.count())

Engines = Callable[[str, int], Engine]


def ask(
    length: int, params: SamplingParams, *, drafts: int | None = None, salt: str = "", seed: int = 5
) -> Request:
    """A prompt of that many tokens, not seen before under a salt of its own."""
    prompt = tuple((7 * i * i + 3 * i + length) % 50 + 3 for i in range(length))
    return Request(
        request_id=next(_names),
        prompt_token_ids=prompt,
        params=params,
        seed=seed,
        max_tokens=14,
        num_draft_tokens=drafts,
        cache_salt=salt or next(_names),
    )


def again(request: Request, **more: Any) -> Request:
    return msgspec.structs.replace(request, request_id=next(_names), **more)


def logprobs(deltas: list[TokenDelta]) -> list[float]:
    return [each.logprob for delta in deltas for each in delta.logprobs]


@pytest.fixture(scope="module")
def engines(tiny: Callable[..., Path]) -> Iterator[Engines]:
    """`engines(role, size)`: started once. Prefill and decode engines have blocks of other sizes."""
    made: dict[tuple[str, int], Engine] = {}

    def get(role: str, size: int) -> Engine:
        if (role, size) not in made:
            made[role, size] = Engine.start(
                f"{role}-{size}",
                model=str(tiny(seed=0)),
                dtype="float32",
                tensor_parallel_size=size,
                block_size=BLOCK if role == "decode" else 2 * BLOCK,
                max_num_batched_tokens=32,
                speculative_config={
                    "model": str(tiny(seed=0, noise=0.03)),
                    "num_speculative_tokens": 4,
                    "draft_length": "fixed",
                    "layer_parallel_size": 2,
                },
                transfer={"data_plane": "grpc"},
            )
        return made[role, size]

    yield get
    for engine in made.values():
        engine.client.close()


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafts", [0, None], ids=["plain", "speculative"])
def test_tokens_are_those_of_one_engine(
    engines: Engines, prefill: int, decode: int, params: SamplingParams, drafts: int | None
) -> None:
    reads, writes = engines("prefill", prefill), engines("decode", decode)
    accepted = fetched = 0
    for length in LENGTHS:
        request = ask(length, params, drafts=drafts)
        expected = writes.write(again(request, cache_salt="alone"))
        before = writes.latest.transfers
        found = write_apart(request, reads, writes)
        writes.wait(lambda before=before: writes.latest.transfers.fetched > before.fetched)
        assert text(found) == text(expected)
        for theirs, ours in zip(logprobs(found), logprobs(expected), strict=True):
            assert theirs == pytest.approx(ours, abs=1e-4)
        assert writes.latest.transfers.failed == 0
        last = found[-1].metrics
        assert last is not None
        accepted += last.accepted
        fetched += 1
    assert drafts == 0 or accepted > fetched, "the drafter's KV came with it"
    reads.wait(reads.idle)
    writes.wait(writes.idle)


@pytest.mark.parametrize("where", ["prefill", "decode", "both"])
def test_a_prefix_that_is_cached_on_either_side_changes_nothing_but_the_work(
    engines: Engines, where: str
) -> None:
    reads, writes = engines("prefill", 2), engines("decode", 1)
    request = ask(70, SAMPLED, salt=f"prefix {where}")
    expected = text(writes.write(again(request, cache_salt="alone")))
    head = again(request, prompt_token_ids=request.prompt_token_ids[:50], max_tokens=1)
    for engine in (reads, writes):
        if where in ("both", "prefill" if engine is reads else "decode"):
            engine.write(again(head))
    before = writes.latest.transfers.num_bytes
    found = write_apart(request, reads, writes)
    assert text(found) == expected
    writes.wait(lambda: writes.latest.transfers.num_bytes > before)
    moved = writes.latest.transfers.num_bytes - before
    pages = 5 if where == "prefill" else 2  # of 70 tokens, 48 are there
    page_bytes = 2 * BLOCK * 16 * 4 * 6  # K and V of 16 values in each of 6 layers, float32
    assert moved > pages * page_bytes, "target pages"
    assert moved < 2 * (pages + 1) * page_bytes, "and no more than both models'"
    first = next(delta for delta in found if delta.token_ids)
    assert first.num_cached_tokens == (32 if where != "decode" else 0), "blocks of 32 over there"


def test_a_prefix_that_is_shared_in_the_very_step_that_writes_it_is_sent_when_it_is_written(
    engines: Engines,
) -> None:
    reads, writes = engines("prefill", 1), engines("decode", 1)
    first = ask(32, GREEDY)
    for number in range(4):  # a cold cache each time
        pair = [again(first, cache_salt=f"step {number}") for _ in range(2)]
        expected = text(writes.write(again(first, cache_salt=f"alone {number}")))
        both = [halves(request, reads) for request in pair]
        reads.client.submit([reading for reading, _ in both])
        writes.client.submit([writing for _, writing in both])
        writes.wait(lambda pair=pair: all(writes.ended(each.request_id) for each in pair))
        assert [text(writes.deltas[each.request_id]) for each in pair] == [expected] * 2


def test_the_prompts_log_probabilities_come_along(engines: Engines) -> None:
    reads, writes = engines("prefill", 1), engines("decode", 2)
    request = ask(40, msgspec.structs.replace(GREEDY, prompt_logprobs=1, logprobs=1))
    expected = writes.write(again(request))
    found = write_apart(request, reads, writes)
    for each in (expected, found):
        assert len(each[0].prompt_logprobs) == 39
    for a, b in zip(found[0].prompt_logprobs, expected[0].prompt_logprobs, strict=True):
        assert a.token_id == b.token_id
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert found[0].logprobs[0].token_id == found[0].token_ids[0]


def test_a_text_that_was_begun_elsewhere_goes_on_as_it_would_have(engines: Engines) -> None:
    reads, writes = engines("prefill", 1), engines("decode", 1)
    request = ask(40, SAMPLED)
    expected = text(writes.write(again(request)))
    for apart in (True, False):
        rest = again(request, output_token_ids=expected[:6], cache_salt=next(_names))
        found = write_apart(rest, reads, writes) if apart else writes.write(rest)
        assert text(found) == expected[6:]


def test_a_drafter_whose_kv_does_not_travel_reads_the_prompt_once_more(engines: Engines) -> None:
    reads, writes = engines("prefill", 1), engines("decode", 1)
    request = ask(60, GREEDY)
    accepted = []
    for fetch_draft in (True, False):
        found = write_apart(
            again(request, cache_salt=next(_names)), reads, writes, fetch_draft=fetch_draft
        )
        last = found[-1].metrics
        assert last is not None
        accepted.append((text(found), last.accepted_at))
    assert accepted[0] == accepted[1], "full acceptance from the first round on, either way"


def test_an_engine_of_another_model_is_refused_and_the_prompt_is_read_here(
    engines: Engines, tiny: Callable[..., Path]
) -> None:
    other = Engine.start("other", model=str(tiny(seed=9)), dtype="float32")
    writes = engines("decode", 1)
    try:
        request = ask(40, GREEDY)
        expected = text(writes.write(again(request, cache_salt="alone")))
        before = writes.latest.transfers
        assert text(write_apart(request, other, writes)) == expected
        writes.wait(lambda: writes.latest.transfers.failed == before.failed + 1)
        refused = write_apart(ask(40, GREEDY), other, writes, recompute=False)
        assert refused[-1].finish_reason == "error"
        assert "weights" in str(refused[-1].error), "the difference is named"
    finally:
        other.client.close()


def test_a_client_that_leaves_frees_both_sides_within_a_second(engines: Engines) -> None:
    reads, writes = engines("prefill", 1), engines("decode", 1)
    request = ask(100, msgspec.structs.replace(GREEDY, ignore_eos=True))
    reading, writing = halves(request, reads)
    writes.client.submit([writing])  # nobody reads it yet: it waits
    writes.wait(lambda: writes.latest.transfers.fetching == 1)
    assert not writes.idle()
    writes.client.abort([request.request_id])
    writes.wait(writes.idle, timeout_s=1.0)
    reads.client.submit([reading])  # too late: whoever wanted it has gone
    reads.wait(lambda: reads.ended(request.request_id))
    reads.wait(reads.idle, timeout_s=1.0)


def test_engines_with_certificates_move_kv_between_each_other_and_with_no_other(
    engines: Engines, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    signed = authority.sign("link", LINK_NAME)
    secure = [
        Engine.start(
            name,
            model=str(tiny(seed=0)),
            dtype="float32",
            link_certfile=signed.cert,
            link_keyfile=signed.key,
            link_ca_certs=authority.path,
            transfer={"data_plane": "grpc"},
        )
        for name in ("reads", "writes")
    ]
    reads, writes = secure
    try:
        request = ask(40, GREEDY, drafts=0)
        expected = text(engines("decode", 1).write(again(request, cache_salt="alone")))
        assert text(write_apart(request, reads, writes)) == expected
        writes.wait(lambda: writes.latest.transfers.fetched == 1)
        open_to_all = engines("prefill", 1)
        refused = write_apart(
            ask(40, GREEDY, drafts=0), open_to_all, writes, recompute=False, lease_s=0.5
        )
        assert refused[-1].finish_reason == "error"
    finally:
        for each in secure:
            each.client.close()

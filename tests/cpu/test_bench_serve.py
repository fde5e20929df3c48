"""The load generator and the comparison with peers: what they count, and what they do when something fails."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks import peers, report, serve, servers
from benchmarks.client import Acceptance, Answer, Client, read_counters
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engines import END, FakeEngine, fake_facts, serving

from paceline.runtime.config import EngineConfig, ServerConfig, SpeculativeConfig
from paceline.runtime.models.weights import find_model
from paceline.runtime.preflight import Facts
from paceline.runtime.tokenizer import Tokenizer

ASK = serve.Ask(token_ids=[1, 2, 3], max_tokens=10)
FORM = serve.Form(model="m")
CHUNKS: list[dict[str, Any]] = [
    {"id": "a", "choices": [{"index": 0, "text": "héllo\n", "finish_reason": None}]},
    {"id": "a", "choices": [{"index": 0, "text": ""}], "usage": None},
    {"id": "a", "choices": [{"index": 0, "text": "da", "finish_reason": "length"}]},
    {"id": "a", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}},
]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return fake_facts(tmp_path_factory.mktemp("fake"))


def stream_of(chunks: Sequence[Any], *, newline: str = "\n", done: bool = True) -> bytes:
    events = [f"data: {json.dumps(chunk)}" for chunk in chunks] + ["data: [DONE]"] * done
    return "".join(event + 2 * newline for event in events).encode()


def read(*pieces: bytes, status: int = 200) -> Answer:
    answer = Answer()
    for piece in pieces:
        answer.feed(piece)
    answer.close(status)
    return answer


def answer_of(
    *,
    start_s: float = 0.0,
    arrivals_s: Sequence[float],
    num_tokens: int,
    end_s: float | None = None,
) -> Answer:
    """An answer as if it had been measured."""
    answer = read(stream_of(CHUNKS))
    answer.start_s, answer.arrivals_s = start_s, list(arrivals_s)
    answer.end_s = arrivals_s[-1] if end_s is None else end_s
    assert answer.usage is not None
    answer.usage.completion_tokens = num_tokens
    return answer


def run_of(
    *answers: Answer, duration_s: float = 10.0, counters: Acceptance | None = None
) -> serve.Run:
    return serve.Run(
        answers=list(answers),
        duration_s=duration_s,
        cpu_s=0.001,
        counters=counters or Acceptance(),
    )


def load(
    url: str,
    asks: Sequence[serve.Ask],
    *,
    form: serve.Form = FORM,
    timeout_s: float = 20.0,
    **pace: Any,
) -> serve.Run:
    async def main() -> serve.Run:
        client = Client(url, api_key=None, timeout_s=timeout_s)
        try:
            return await serve.load(client, form, asks, serve.Pace(**pace))
        finally:
            client.close()

    return asyncio.run(main())


# What is read


@settings(max_examples=60, deadline=None)
@given(data=st.data(), newline=st.sampled_from(["\n", "\r\n"]))
def test_a_stream_cut_anywhere_reads_the_same(data: st.DataObject, newline: str) -> None:
    whole = stream_of(CHUNKS, newline=newline)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=12)))
    answer = read(*(whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)))
    assert answer.error is None
    assert "".join(answer.text) == "héllo\nda"
    assert (answer.num_tokens, len(answer.arrivals_s), answer.num_chunks) == (7, 2, 4)


def test_a_chat_that_opens_with_the_role_alone_has_not_begun() -> None:
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    answer = read(stream_of([role]), stream_of([thought, CHUNKS[-1]]))
    assert len(answer.arrivals_s) == 1
    assert answer.arrivals_s[0] == answer.end_s


def test_a_text_that_shows_nothing_ends_with_its_last_event() -> None:
    answer = read(stream_of([{"choices": [{"text": ""}]}, CHUNKS[-1]]))
    assert answer.error is None
    assert answer.ttft_s == answer.e2el_s > 0


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b'{"error": {"message": "too many"}}', 429, "HTTP 429: .*too many"),
        (stream_of(CHUNKS[:3]), 200, "no usage"),
        (stream_of([]), 200, "no choices"),
        (b"data: {oops\n\n", 200, "not a chunk"),
        (stream_of([CHUNKS[0], {"error": {"message": "the engine is lost"}}]), 200, "is lost"),
    ],
)
def test_an_answer_that_is_none_says_why(body: bytes, status: int, reason: str) -> None:
    assert re.search(reason, str(read(body, status=status).error))


VLLM_METRICS = """
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="t"} 100.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="t"} 1.79e+09
vllm:spec_decode_num_drafts_total{engine="1",model_name="t"} 20.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="t"} 240.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="t"} 90.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="t",position="0"} 60.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="t",position="1"} 30.0
"""
COUNTED = Acceptance(drafts=120, draft_tokens=240, accepted_tokens=90, accepted_at=(60, 30))


def test_the_counters_of_a_server_are_summed_over_its_engines() -> None:
    assert read_counters(VLLM_METRICS) == COUNTED


def test_counters_exposed_under_two_prefixes_count_once() -> None:
    assert read_counters(VLLM_METRICS + VLLM_METRICS.replace("vllm:", "paceline:")) == COUNTED


def test_a_server_without_counters_drafted_nothing() -> None:
    assert read_counters("process_cpu_seconds_total 3.0\n") is None
    assert Acceptance().row() == {}


def test_acceptance_has_vllms_keys() -> None:
    assert COUNTED.row() == {
        "spec_decode_acceptance_rate": 37.5,
        "spec_decode_acceptance_length": 1.75,
        "spec_decode_num_drafts": 120,
        "spec_decode_draft_tokens": 240,
        "spec_decode_accepted_tokens": 90,
        "spec_decode_per_position_acceptance_rates": [0.5, 0.25],
    }


def test_answers_that_tell_their_acceptance_are_believed_before_counters() -> None:
    spec = {
        "num_spec_steps": 10,
        "num_draft_tokens": 20,
        "num_accepted_draft_tokens": 9,
        "acceptance_histogram": [4, 3, 3],
    }
    last = {**CHUNKS[-1], "metrics": {"speculative_decoding": spec}}
    answers = [read(stream_of([*CHUNKS[:3], last])) for _ in range(2)]
    row = serve.summary(run_of(*answers, counters=COUNTED))
    assert row["spec_decode_num_drafts"] == 20
    assert row["spec_decode_acceptance_length"] == 1.9
    assert row["spec_decode_per_position_acceptance_rates"] == [0.6, 0.3]
    plain = serve.summary(run_of(read(stream_of(CHUNKS)), counters=COUNTED))
    assert plain["spec_decode_num_drafts"] == 120


# What is counted


def test_the_summary_has_the_figures_one_gets_by_hand() -> None:
    first = answer_of(arrivals_s=[1.0, 1.5, 3.0], num_tokens=5)
    second = answer_of(start_s=2.0, arrivals_s=[2.2], num_tokens=1)
    failed = read(b"no", status=500)
    row = serve.summary(
        run_of(first, second, failed), percentiles=(50.0, 99.9), percentile_metrics=("ttft",)
    )
    assert (row["completed"], row["failed"]) == (2, 1)
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (6, 6)
    assert row["request_throughput"] == 0.2
    assert row["output_throughput"] == 0.6
    assert row["total_token_throughput"] == 1.2
    assert row["request_goodput"] is None
    assert row["mean_ttft_ms"] == pytest.approx(600)
    assert row["median_ttft_ms"] == row["p50_ttft_ms"] == pytest.approx(600)
    assert row["std_ttft_ms"] == pytest.approx(400)
    assert row["p99.9_ttft_ms"] == pytest.approx(999.2)
    assert row["mean_tpot_ms"] == pytest.approx(500), "one token has no time per further token"
    assert row["mean_itl_ms"] == pytest.approx(1000)
    assert row["mean_e2el_ms"] == pytest.approx(1600)
    assert "p50_tpot_ms" not in row
    assert row["max_concurrent_requests"] == 2
    # of the first five tokens 5/3 come with each event: two events and the second answer's in one second
    assert row["max_output_tokens_per_s"] == pytest.approx(10 / 3)


def test_a_run_in_which_everything_failed_still_has_a_row() -> None:
    row = serve.summary(run_of(read(b"no", status=500)))
    assert (row["completed"], row["failed"], row["output_throughput"]) == (0, 1, 0.0)


def test_goodput_counts_the_requests_that_keep_every_limit() -> None:
    quick = answer_of(arrivals_s=[0.1, 0.2], num_tokens=2)
    late = answer_of(arrivals_s=[0.5, 0.6], num_tokens=2)
    slow = answer_of(arrivals_s=[0.1, 0.9], num_tokens=2)
    run = run_of(quick, late, slow)
    assert serve.summary(run, goodput_ms={"ttft": 200})["request_goodput"] == pytest.approx(0.2)
    both = serve.summary(run, goodput_ms={"ttft": 200, "tpot": 200})
    assert both["request_goodput"] == pytest.approx(0.1)


@settings(max_examples=20, deadline=None)
@given(
    rate=st.floats(0.5, 500), burstiness=st.sampled_from([0.25, 1.0, 4.0]), seed=st.integers(0, 99)
)
def test_requests_arrive_at_the_rate_and_as_bursty_as_asked(
    rate: float, burstiness: float, seed: int
) -> None:
    pace = serve.Pace(request_rate=rate, burstiness=burstiness, seed=seed)
    arrivals = pace.arrivals_s(4001)
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    assert arrivals == pace.arrivals_s(4001)
    assert statistics.fmean(gaps) * rate == pytest.approx(1, rel=0.2)
    spread = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert spread == pytest.approx(1 / math.sqrt(burstiness), rel=0.25)


def test_without_a_rate_all_arrive_at_once() -> None:
    assert serve.Pace().arrivals_s(3) == [0.0, 0.0, 0.0]


# What is asked


def test_random_prompts_have_no_special_tokens(facts: Facts) -> None:
    assert facts.tokenizer is not None
    asks = serve.random_asks(facts.tokenizer, count=20, input_len=500, output_len=4, seed=0)
    used = {token_id for ask in asks for token_id in ask.token_ids}
    assert used == set(range(END))
    assert all(len(ask.token_ids) == 500 and ask.max_tokens == 4 for ask in asks)


def test_conversations_give_their_first_question_and_the_length_of_its_answer(
    facts: Facts, tmp_path: Path
) -> None:
    assert facts.tokenizer is not None
    path = tmp_path / "talks.json"
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}]))
    asks = serve.sharegpt_asks(str(path), facts.tokenizer, count=3, output_len=None, seed=0)
    assert asks == [serve.Ask(token_ids=list(b"hi"), max_tokens=5)] * 3
    path.write_text("[]")
    with pytest.raises(SystemExit, match="holds no conversation"):
        serve.sharegpt_asks(str(path), facts.tokenizer, count=1, output_len=None, seed=0)


def test_a_body_has_no_field_that_openai_does_not_know_unless_asked_for(facts: Facts) -> None:
    known = {"model", "temperature", "stream", "stream_options", "prompt", "max_tokens"}
    assert set(json.loads(FORM.body(ASK))) == known
    extra = serve.Form(model="m", ignore_eos=True, extra_body={"cache_salt": "x"})
    assert set(json.loads(extra.body(ASK))) == known | {"ignore_eos", "cache_salt"}
    chat = serve.Form(model="m", endpoint="/v1/chat/completions", tokenizer=facts.tokenizer)
    body = json.loads(chat.body(serve.Ask(token_ids=list(b"hi"), max_tokens=3)))
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert body["max_completion_tokens"] == 3


def test_every_system_gets_prompts_that_no_other_run_has_had() -> None:
    tokenizer = Tokenizer(find_model("embedded"))
    first, second = (
        peers.make_work(
            tokenizer,
            path=None,
            round_number=number,
            repetitions=2 - number,
            num_alone=3,
            max_tokens=9,
        )
        for number in range(2)
    )
    runs = [first.warm, second.warm, *(some for w in (first, second) for _, _, some in w.runs())]
    asks = [tuple(ask.token_ids) for some in runs for ask in some]
    assert len(set(asks)) == len(asks) == 2 * 36 + 3 * (3 + 36)
    order = [(repetition, in_flight, len(some)) for repetition, in_flight, some in first.runs()]
    assert order == [(0, 1, 3), (0, 36, 36), (1, 1, 3), (1, 36, 36)]


# Against our front end


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("told", [True, False])
def test_our_server_is_measured(facts: Facts, endpoint: str, told: bool) -> None:
    config = EngineConfig(speculative_config=SpeculativeConfig(num_speculative_tokens=2))
    server = ServerConfig(served_model_name="m", per_request_spec_decode_metrics=told)
    form = serve.Form(model="m", endpoint=endpoint, tokenizer=facts.tokenizer, ignore_eos=True)
    asks = [serve.Ask(token_ids=list(b"hi"), max_tokens=30)] * 12
    with serving(FakeEngine(tokens_per_step=3), facts, config=config, server=server) as served:
        run = load(served.url, asks, form=form, max_concurrency=5)
    row = serve.summary(run)
    assert (row["completed"], row["failed"]) == (12, 0), [a.error for a in run.answers]
    assert row["total_output_tokens"] == 12 * 30
    assert row["max_concurrent_requests"] == 5
    assert row["spec_decode_num_drafts"] == 12 * 10
    assert row["spec_decode_acceptance_length"] == 3.0
    assert row["num_chunks"] < row["total_output_tokens"], "an event holds several tokens"


def test_the_command_measures_a_server_and_writes_both_forms(
    facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert facts.tokenizer is not None
    flags = ["--tokenizer", str(facts.tokenizer.folder), "--dataset-name", "random"]
    flags += ["--num-prompts", "6", "--num-warmups", "2", "--max-concurrency", "1", "3"]
    flags += ["--random-input-len", "9", "--random-output-len", "7", "--goodput", "ttft:60000"]
    flags += ["--output", str(tmp_path / "report.json"), "--result-dir", str(tmp_path / "saved")]
    flags += ["--save-result", "--save-detailed", "--api-key", "secret"]
    engine = FakeEngine()
    with serving(engine, facts, server=ServerConfig(served_model_name="m")) as served:
        monkeypatch.setattr(sys, "argv", ["serve", "--base-url", served.url, *flags])
        serve.main()
    made = json.loads((tmp_path / "report.json").read_text())
    assert [row["max_concurrency"] for row in made["rows"]] == [1, 3]
    assert all(row["completed"] == 6 for row in made["rows"])
    assert "secret" not in json.dumps(made)
    saved = [json.loads(path.read_text()) for path in (tmp_path / "saved").iterdir()]
    assert {flat["max_concurrency"] for flat in saved} == {1, 3}
    assert saved[0]["output_lens"] == [7] * 6
    assert saved[0]["request_goodput"] == pytest.approx(saved[0]["request_throughput"])
    prompts = [request.prompt_token_ids for request in engine.submitted]
    assert len(set(prompts)) == len(prompts) == 2 * (6 + 2)


# Against servers that misbehave

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def scripted(handle: Handler) -> AsyncIterator[Client]:
    """A client of a server that does exactly what a test says."""
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}", api_key=None, timeout_s=1.0)
    try:
        yield client
    finally:
        client.close()
        server.close()


async def request_on(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        (line for line in head.split(b"\r\n") if line.lower().startswith(b"content-l")), b":0"
    )
    return await reader.readexactly(int(length.split(b":")[1]))


def whole(body: bytes, *, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


def test_a_connection_serves_one_request_after_another() -> None:
    made = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal made
        made += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                await request_on(reader)
                writer.write(whole(stream_of(CHUNKS)))

    async def main() -> list[str | None]:
        async with scripted(handle) as client:
            return [(await client.ask("/x", b"{}")).error for _ in range(4)]

    assert asyncio.run(main()) == [None] * 4
    assert made == 1


def test_a_connection_the_server_closes_or_that_failed_is_not_used_again() -> None:
    made, told = 0, False

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal made, told
        made += 1
        await request_on(reader)
        if made == 1:  # says so
            writer.write(whole(stream_of(CHUNKS), more="Connection: close\r\n"))
        elif made == 2:  # in the midst of an answer
            writer.write(whole(stream_of(CHUNKS))[:-5])
            writer.close()
        elif made == 3:  # never answers, and is told that nobody waits any more
            with contextlib.suppress(ConnectionError):
                await reader.read()
            told = True
        elif made == 4:
            writer.write(b"what?\r\n\r\n")
        else:
            writer.write(whole(stream_of(CHUNKS)))

    async def main() -> list[str | None]:
        async with scripted(handle) as client:
            return [(await client.ask("/x", b"{}")).error for _ in range(5)]

    start_s = time.monotonic()
    fine, cut, late, odd, last = asyncio.run(main())
    assert time.monotonic() - start_s < 10, "one deadline of a second"
    assert fine is None
    assert "closed the connection" in str(cut)
    assert "within 1 s" in str(late)
    assert "not HTTP" in str(odd)
    assert last is None
    assert made == 5
    assert told


def test_a_connection_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal made
        made += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                await request_on(reader)
                writer.write(whole(stream_of(CHUNKS)))

    async def main() -> None:
        async with scripted(handle) as client:
            await client.ask("/x", b"{}")
            monkeypatch.setattr("benchmarks.client.IDLE_S", 0.0)
            await client.ask("/x", b"{}")

    asyncio.run(main())
    assert made == 2


def test_events_are_timed_when_they_come() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_on(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (CHUNKS[:1], CHUNKS[2:]):
            await asyncio.sleep(0.15)
            body = stream_of(piece, done=False)
            writer.write(b"%x\r\n%b\r\n" % (len(body), body))
        writer.write(b"0\r\n\r\n")

    async def main() -> Answer:
        async with scripted(handle) as client:
            return await client.ask("/x", b"{}")

    answer = asyncio.run(main())
    assert answer.error is None
    assert 0.14 < answer.ttft_s < 0.5
    assert len(answer.itl_s) == 1
    assert 0.1 < answer.itl_s[0] < 0.5
    assert answer.e2el_s == pytest.approx(answer.ttft_s + answer.itl_s[0])


def test_nobody_listening_is_a_failed_request() -> None:
    run = load("http://127.0.0.1:9", [ASK])
    row = serve.summary(run)
    assert (row["completed"], row["failed"]) == (0, 1)
    assert run.answers[0].error


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(SystemExit, match="--base-url must look like"):
        Client("localhost:8000", api_key=None, timeout_s=1.0)


# Servers of a benchmark's own


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def ready_word(said: str) -> str | None:
    return "http://x" if "ready" in said else None


def test_a_server_is_gone_after_its_use_and_what_it_started_too(tmp_path: Path) -> None:
    note = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with servers.serving(script(code), ready=ready_word, deadline_s=20) as url:
        assert url == "http://x"
        child = int(note.read_text())
        os.kill(child, 0)
    assert _gone(child)


def _gone(pid: int) -> bool:
    """Within a second: nobody may have taken its exit code yet."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return False


def test_a_server_that_ends_says_why() -> None:
    code = "import sys; print('loading', flush=True); sys.exit('paceline: no such model: x')"
    with (
        pytest.raises(servers.StartError, match="exit code 1: paceline: no such model: x"),
        servers.serving(script(code), ready=ready_word, deadline_s=20),
    ):
        pass


def test_a_server_that_is_never_ready_is_given_up() -> None:
    start = time.monotonic()
    with (
        pytest.raises(servers.StartError, match=r"not ready within 0.5 s"),
        servers.serving(script("import time; time.sleep(60)"), ready=ready_word, deadline_s=0.5),
    ):
        pass
    assert time.monotonic() - start < 20


def test_the_ready_line_of_our_server_names_its_url() -> None:
    said = (
        "INFO loading\npaceline: embedded is ready at http://127.0.0.1:41 and grpc://127.0.0.1:42\n"
    )
    assert servers.ready_line(said) == "http://127.0.0.1:41"
    assert servers.ready_line("paceline: loading\n") is None
    assert servers.ready_line(said[: said.index(":41")]) is None, "half a line"


# The comparison


def system_of(kind: str, setting: str, speed: float | str, calls: list[str]) -> peers.System:
    """A system of a known speed, or one that fails."""

    def measure(work: peers.Work) -> list[report.Row]:
        calls.append(f"{kind} {setting}")
        if isinstance(speed, str):
            raise servers.StartError(speed)
        return [
            {
                "repetition": repetition,
                "concurrency": in_flight,
                "duration": 100.0 / (speed * in_flight),
                "total_output_tokens": 100,
                "output_throughput": speed * in_flight,
                "texts": [f"{ask.token_ids[0]}" for ask in asks],
            }
            for repetition, in_flight, asks in work.runs()
        ]

    return peers.System(kind=kind, setting=setting, measure=measure)


def test_best_is_compared_with_best_and_a_failure_is_shown() -> None:
    calls: list[str] = []
    systems = [
        system_of("paceline", "plain", 10.0, calls),
        system_of("paceline", "ngram", 30.0, calls),
        system_of("vllm", "plain", 15.0, calls),
        system_of("vllm", "ngram", "exit code 1: no kernel", calls),
    ]
    work = peers.Work(warm=[], alone=[[ASK]], together=[[ASK] * 36])
    rows: list[report.Row] = []
    peers.compare(systems, [work, work], rows)
    assert calls[:4] == [system.name for system in systems]
    assert calls[4:] == calls[3::-1], "the second round goes backwards"
    assert peers.ratios(rows) == pytest.approx(
        {"batch1_over_vllm_best": 2.0, "concurrent36_over_vllm_best": 2.0}
    )
    assert (peers.best(rows, "paceline", 1) or ("", 0))[0] == "paceline ngram"
    lines = {line["system"]: line for line in peers.table(rows)}
    assert "no kernel" in lines["vllm ngram"]["note"]
    assert lines["vllm ngram"]["1: tok/s"] == ""
    assert lines["vllm plain"]["36: tok/s"] == "540"
    assert lines["vllm plain"]["same text"] == "2/2"


def test_a_system_that_failed_once_is_not_the_best() -> None:
    good = {"kind": "vllm", "concurrency": 1, "total_output_tokens": 100, "round": 0}
    rows = [
        {**good, "system": "vllm plain", "duration": 1.0},
        {**good, "system": "vllm ngram", "duration": 0.1},
        {"kind": "vllm", "system": "vllm ngram", "round": 1, "error": "ended"},
    ]
    assert peers.best(rows, "vllm", 1) == ("vllm plain", 100.0)
    assert peers.ratios(rows) == {}


def test_a_server_that_fails_a_request_is_not_measured(facts: Facts) -> None:
    # the fake engine's context holds 512 tokens
    asks = [[serve.Ask(token_ids=[1] * 600, max_tokens=4)]]
    warm = [serve.Ask(token_ids=[1], max_tokens=4)] * 3
    work = peers.Work(warm=warm, alone=asks, together=asks)
    with (
        serving(FakeEngine(), facts, server=ServerConfig(served_model_name="m")) as served,
        pytest.raises(servers.StartError, match="1 of 1 requests failed 1 at once: HTTP 400"),
    ):
        asyncio.run(peers.measure_server(served.url, work, model="m"))


def test_the_settings_of_all_three_runtimes_are_systems() -> None:
    args = peers._parser().parse_args(["--vllm-python", "py", "--vllm-cores", "auto", "0"])
    args.systems = ["paceline", "vllm"]
    names = [system.name for system in peers.make_systems(args)]
    assert names == [
        "paceline plain",
        "paceline draft_model",
        "paceline ngram",
        "paceline combined",
        *("vllm plain, cores auto", "vllm draft_model, cores auto", "vllm ngram, cores auto"),
        *("vllm plain, cores 0", "vllm draft_model, cores 0", "vllm ngram, cores 0"),
    ]
    with pytest.raises(SystemExit, match="--systems names none of"):
        peers.make_systems(peers._parser().parse_args(["--systems", "sglang"]))


def test_a_peer_that_cannot_be_started_says_so() -> None:
    args = peers._parser().parse_args(["--vllm-python", sys.executable, "--ready-timeout", "60"])
    work = peers.Work(warm=[ASK], alone=[], together=[])
    with pytest.raises(servers.StartError, match=r"exit code 1: .*vllm"):
        peers.vllm_system("plain", None, args=args, cores="auto").measure(work)


def test_pairs_and_limits_are_read_from_flags() -> None:
    assert peers._pair("LD_PRELOAD=a:b") == ("LD_PRELOAD", "a:b")
    assert serve._goodput("ttft:200") == ("ttft", 200.0)
    for read_flag, bad in (
        (peers._pair, "x"),
        (serve._goodput, "itl:3"),
        (serve._metric_names, "x"),
    ):
        with pytest.raises(argparse.ArgumentTypeError):
            read_flag(bad)


def test_vllm_gets_the_openmp_it_asks_for(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    assert "iomp" not in peers._preloads(str(python))
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    assert str(openmp) in peers._preloads(str(python)).split(":")

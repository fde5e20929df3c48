"""Frontends and an engine loop, over sockets: what is asked for comes back to who asked, and the end
of an engine is heard of by all.

The engine's ranks are played by an executor that counts; only the last tests start a process with a
model.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from paceline import LLM, SamplingParams
from paceline.runtime import engine as engine_module
from paceline.runtime import engine_loop, link
from paceline.runtime.config import EngineConfig, make_config
from paceline.runtime.engine import MOST_IN_VAIN, Engine
from paceline.runtime.engine_loop import run_engine
from paceline.runtime.errors import EngineError, ShardError, UserError
from paceline.runtime.link import Abort, LinkAddress, LinkClient, LinkServer, Submit
from paceline.runtime.local import InProcess, connect
from paceline.runtime.preflight import examine
from paceline.runtime.requests import Prompt, TokensPrompt
from paceline.runtime.schedule.scheduler import make_scheduler
from paceline.runtime.types import (
    WIRE_VERSION,
    EngineStatus,
    Request,
    RequestResult,
    ScheduledRequest,
    StepPlan,
    StepResult,
    TokenDelta,
)

LONG_S = 30.0
"""A deadline that only a hanging test meets."""
NUM_BLOCKS = 64


class Counting:
    """An executor whose texts count on from the last token of the prompt."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        """Raised in the next step."""
        self.dead: Exception | None = None
        """Raised when it is asked whether ranks live."""
        self.pause_s = 0.0
        self.closed = False
        self.num_blocks, self.ranks = NUM_BLOCKS, ("rank 0, counting",)
        self.hopeless = False
        """Whether ranks that have ended cannot be started anew."""
        self.num_starts = self.num_steps = 0
        self._next: dict[str, int] = {}
        self._unread: dict[str, int] = {}

    def send(self, plan: StepPlan) -> None:
        self._sent = plan

    def receive(self) -> StepResult:
        self.num_steps += 1
        if self.failure is not None:
            raise self.failure
        time.sleep(self.pause_s)
        plan = self._sent
        return StepResult(step=plan.step, results=tuple(self._result(s) for s in plan.scheduled))

    def _result(self, scheduled: ScheduledRequest) -> RequestResult:
        request_id, request = scheduled.request_id, scheduled.request
        if request is not None:
            token_ids = (*request.prompt_token_ids, *scheduled.output_token_ids)
            self._next[request_id] = token_ids[-1] + 1
            self._unread[request_id] = len(token_ids) - scheduled.num_cached
        self._unread[request_id] -= scheduled.num_tokens
        if self._unread[request_id]:
            return RequestResult(request_id=request_id)
        token_id = self._next[request_id]
        self._next[request_id] += 1
        self._unread[request_id] = 1
        return RequestResult(request_id=request_id, token_ids=(token_id,))

    def check(self) -> None:
        if self.dead is not None:
            raise self.dead

    def end_ranks(self) -> None:
        self._next.clear()
        self._unread.clear()

    def start_ranks(self) -> None:
        if self.hopeless:
            raise self.failure or self.dead or AssertionError("nothing had failed")
        self.num_starts += 1
        self.failure = self.dead = None

    def close(self) -> None:
        self.closed = True


class Served:
    """An engine loop in a thread, and the frontends that linked up with it."""

    def __init__(self, folder: Path) -> None:
        self.executor = Counting()
        config = make_config({"max_num_seqs": 8})
        scheduler = make_scheduler(config, max_model_len=512, num_blocks=NUM_BLOCKS)
        self.engine = Engine(scheduler, self.executor)
        self.server = LinkServer(f"ipc://{folder}/commands", f"ipc://{folder}/news")
        self.address = self.server.address
        self.gone: str | None = None
        """What frontends are told when they ask whether the engine lives."""
        self.lost: str | None = "still running"
        self._closing = threading.Event()
        self._clients: list[LinkClient] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.lost = run_engine(self.engine, self.server, wanted=lambda: not self._closing.is_set())

    def frontend(self) -> LinkClient:
        client = LinkClient(self.address, watch=lambda: self.gone)
        self._clients.append(client)
        return client

    def say(self, body: bytes, *, to: str) -> None:
        """Send raw bytes to one of the engine's sockets."""
        kind = zmq.PUSH if to == self.address.commands else zmq.DEALER
        with zmq.Context() as context, context.socket(kind) as socket:
            socket.setsockopt(zmq.LINGER, 5000)
            socket.connect(to)
            socket.send(body)

    def join(self) -> None:
        self._thread.join(LONG_S)
        assert not self._thread.is_alive(), "the engine loop did not end"

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._closing.set()
        self.join()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(link, "WATCH_EVERY_S", 0.02)
    monkeypatch.setattr(link, "STATUS_EVERY_S", 0.0)
    monkeypatch.setattr(engine_loop, "IDLE_S", 0.02)
    made = Served(tmp_path)
    yield made
    made.close()


def request(name: str, first: int = 0, *, max_tokens: int = 5) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=(1, 2, first),
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        max_tokens=max_tokens,
    )


def collect(client: LinkClient, *names: str) -> dict[str, list[TokenDelta]]:
    """All that comes, until each of these has ended."""
    found: dict[str, list[TokenDelta]] = {}
    ended: set[str] = set()
    deadline = time.monotonic() + LONG_S
    while not ended >= set(names):
        assert time.monotonic() < deadline, f"waited for {names}, have {found}"
        for delta in client.poll(0.1):
            found.setdefault(delta.request_id, []).append(delta)
            if delta.finish_reason is not None:
                assert delta.request_id not in ended
                ended.add(delta.request_id)
    return found


def tokens(deltas: list[TokenDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def wait_until(condition: Callable[[], bool], *, within_s: float = LONG_S) -> float:
    """How long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + within_s, "waited in vain"
        time.sleep(0.01)
    return time.monotonic() - started


# ---------------------------------------------------------------------------------------- there and back


def test_a_request_comes_back_token_by_token_and_ends_once(served: Served) -> None:
    client = served.frontend()
    client.submit([request("a", 10), request("b", 20, max_tokens=3)])
    found = collect(client, "a", "b")
    assert {name: tokens(deltas) for name, deltas in found.items()} == {
        "a": [11, 12, 13, 14, 15],
        "b": [21, 22, 23],
    }
    for deltas in found.values():
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == "length"
        assert deltas[-1].metrics is not None


def test_nothing_is_lost_of_what_is_asked_for_at_once(served: Served) -> None:
    """Commands and news have a connection each, and the first command may come before the hello."""
    served.frontend().submit([request("busy", max_tokens=500)])
    for number in range(30):
        client = served.frontend()
        client.submit([request(str(number), 7, max_tokens=100)])
        assert tokens(collect(client, str(number))[str(number)]) == list(range(8, 108))


def test_requests_that_could_never_run_end_in_an_error(served: Served) -> None:
    client = served.frontend()
    client.submit([request("long", max_tokens=5000), request("short")])
    found = collect(client, "long", "short")
    (only,) = found["long"]
    assert only.finish_reason == "error"
    assert only.error is not None
    assert "the context holds 512" in only.error
    assert tokens(found["short"]) == [1, 2, 3, 4, 5]


def test_an_aborted_request_ends_and_frees_its_blocks(served: Served) -> None:
    client = served.frontend()
    served.executor.pause_s = 0.005
    client.submit([request("a", max_tokens=400), request("b", max_tokens=3)])
    wait_until(lambda: any(delta.request_id == "a" for delta in client.poll(0.1)))
    client.abort(["a", "nobody"])
    found = collect(client, "a")
    assert found["a"][-1].finish_reason == "abort"
    wait_until(lambda: not client.poll(0.05) and client.status().num_running == 0)
    assert client.status().num_free_blocks == NUM_BLOCKS


def test_status_tells_how_the_engine_is(served: Served) -> None:
    client = served.frontend()
    client.submit([request("a")])
    collect(client, "a")
    wait_until(lambda: not client.poll(0.05) and client.status().generation_tokens == 5)
    status = client.status()
    assert status.ranks == ("rank 0, counting",)
    assert (status.num_blocks, status.num_running, status.prompt_tokens) == (NUM_BLOCKS, 0, 3)


def test_every_step_is_reported_once(served: Served) -> None:
    client = served.frontend()
    client.submit([request("a", max_tokens=20)])
    collect(client, "a")
    steps: list[object] = []

    def all_are_here() -> bool:
        client.poll(0.02)
        status = client.status()
        steps.extend(status.steps)
        return status.num_steps >= 20 and len(steps) >= status.num_steps

    wait_until(all_are_here)
    assert len(steps) == client.status().num_steps
    assert client.status().steps == ()


def test_poll_gives_up_when_its_time_is_over(served: Served) -> None:
    client = served.frontend()
    started = time.monotonic()
    assert client.poll(0.1) == []
    assert 0.1 <= time.monotonic() - started < 5.0


# ---------------------------------------------------------------------------------------- many frontends


def test_a_frontend_gets_only_what_it_asked_for(served: Served) -> None:
    clients = [served.frontend() for _ in range(3)]
    for number, client in enumerate(clients):
        client.submit([request(f"{number}-{i}", 100 * number + i) for i in range(4)])
    for number, client in enumerate(clients):
        names = [f"{number}-{i}" for i in range(4)]
        found = collect(client, *names)
        assert sorted(found) == names
        for i, name in enumerate(names):
            first = 100 * number + i
            assert tokens(found[name]) == [first + k for k in range(1, 6)]


def test_a_name_that_another_frontend_uses_takes_nothing_from_it(served: Served) -> None:
    served.executor.pause_s = 0.002
    first, second = served.frontend(), served.frontend()
    first.submit([request("same", 10, max_tokens=50)])
    wait_until(lambda: bool(first.poll(0.1)))
    second.submit([request("same", 20)])
    (refused,) = collect(second, "same")["same"]
    assert refused.finish_reason == "error"
    assert refused.error is not None
    assert "in use" in refused.error
    assert tokens(collect(first, "same")["same"])[-1] == 60


def test_a_frontend_that_leaves_does_not_disturb_the_others(served: Served) -> None:
    leaving, staying = served.frontend(), served.frontend()
    leaving.submit([request("a", max_tokens=100)])
    staying.submit([request("b", max_tokens=100)])
    leaving.close()
    assert tokens(collect(staying, "b")["b"]) == list(range(1, 101))


def test_one_thread_may_submit_while_another_waits(served: Served) -> None:
    client = served.frontend()
    names = [str(i) for i in range(50)]

    def submit() -> None:
        for name in names:
            client.submit([request(name, int(name))])

    thread = threading.Thread(target=submit)
    thread.start()
    found = collect(client, *names)
    thread.join()
    assert all(tokens(found[name]) == [int(name) + k for k in range(1, 6)] for name in names)


# ------------------------------------------------------------------------------------ what is no message


BAD_BYTES = [
    b"",
    b"\xc1",
    b"not MessagePack",
    msgspec.msgpack.encode([1, 2]),
    msgspec.msgpack.encode({"type": "reboot"}),
    msgspec.msgpack.encode({"type": "submit", "frontend": b"x", "requests": [{"request_id": 5}]}),
    msgspec.msgpack.encode({"type": "submit", "frontend": b"", "requests": []}),
    msgspec.msgpack.encode({"type": "abort", "request_ids": "all", "really": True}),
    msgspec.msgpack.encode(Submit(frontend=b"x", requests=(request("a"),)))[:-3],
]


@pytest.mark.parametrize("body", BAD_BYTES, ids=repr)
@pytest.mark.parametrize("socket", ["commands", "news"])
def test_bytes_that_are_no_command_do_not_stop_the_engine(
    served: Served, socket: str, body: bytes
) -> None:
    client = served.frontend()
    served.say(body, to=getattr(served.address, socket))
    client.submit([request("b", 7)])
    assert tokens(collect(client, "b")["b"]) == [8, 9, 10, 11, 12]
    assert served.lost == "still running"


def test_requests_of_a_frontend_that_nobody_knows_are_served_and_forgotten(served: Served) -> None:
    """Their deltas have nowhere to go."""
    stranger = Submit(frontend=b"stranger", requests=(request("s", max_tokens=20),))
    served.say(msgspec.msgpack.encode(stranger), to=served.address.commands)
    client = served.frontend()
    client.submit([request("a")])
    assert sorted(collect(client, "a")) == ["a"]
    wait_until(lambda: not client.poll(0.05) and client.status().num_running == 0)
    assert client.status().num_free_blocks == NUM_BLOCKS


def test_a_frontend_of_another_version_is_ignored(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    newer = Submit(frontend=b"x", requests=(request("n"),), version=WIRE_VERSION + 1)
    served.say(msgspec.msgpack.encode(newer), to=served.address.commands)
    wait_until(lambda: "ignored a frontend of version" in caplog.text)
    client = served.frontend()
    client.submit([request("a")])
    collect(client, "a")
    client.poll(0.05)
    assert client.status().generation_tokens in (0, 5)


def test_news_that_is_none_is_an_engine_error(tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(f"ipc://{tmp_path}/news")
        address = LinkAddress(commands=f"ipc://{tmp_path}/c", news=f"ipc://{tmp_path}/news")
        greeter = threading.Thread(target=_send_nonsense, args=(router,))
        greeter.start()
        with pytest.raises(EngineError, match="the engine sent what is no news"):
            LinkClient(address, watch=lambda: None).poll(LONG_S)
        greeter.join()


def _send_nonsense(router: zmq.Socket[bytes]) -> None:
    frontend, _ = router.recv_multipart()
    router.send_multipart((frontend, b"\xc1"))


def test_a_command_is_told_from_another() -> None:
    for command in (Abort(request_ids=("a",)), Submit(frontend=b"x", requests=(request("a"),))):
        body = msgspec.msgpack.encode(command)
        assert msgspec.msgpack.decode(body, type=Submit | Abort) == command


# -------------------------------------------------------------------------------------- the engine's end


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (EngineError("its ranks have moved"), "its ranks have moved"),
        (
            ShardError("rank 1 died: killed"),
            f"ranks ended {MOST_IN_VAIN + 1} times in a row without a token: rank 1 died: killed",
        ),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_every_frontend_hears_that_the_engine_is_lost(
    served: Served, failure: Exception, words: str
) -> None:
    """In the middle of a text, or with nothing to do."""
    working, idle = served.frontend(), served.frontend()
    for client in (working, idle):
        client.submit([request(str(id(client)))])
        collect(client, str(id(client)))
    served.executor.failure, served.executor.hopeless = failure, True
    working.submit([request("a")])
    for client in (working, idle):
        with pytest.raises(EngineError) as lost:
            collect(client, "a")
        assert str(lost.value) == words
    served.join()
    assert served.lost == words
    assert served.executor.closed


def test_ranks_that_end_in_a_step_are_started_anew_and_the_texts_go_on(served: Served) -> None:
    client = served.frontend()
    served.executor.pause_s = 0.01
    client.submit([request("a", max_tokens=20), request("b", max_tokens=20)])
    deltas = [*client.poll(LONG_S), *client.poll(LONG_S)]
    served.executor.failure = ShardError("rank 0 died: killed")
    while not {"a", "b"} <= {d.request_id for d in deltas if d.finish_reason is not None}:
        deltas += client.poll(LONG_S)
    for name in ("a", "b"):
        text = [token for d in deltas if d.request_id == name for token in d.token_ids]
        assert text == list(range(text[0], text[0] + 20)), "none lost, none repeated"
    assert served.executor.num_starts == 1
    wait_until(lambda: bool(client.poll(0.05)) or client.status().num_restarts == 1)
    assert not client.status().restarting


def test_ranks_that_end_while_others_load_are_started_once_more(served: Served) -> None:
    client = served.frontend()
    start = served.executor.start_ranks
    failures = [ShardError("rank 1 died: killed")] * (MOST_IN_VAIN - 1)

    def fail_first() -> None:
        if failures:
            raise failures.pop()
        start()

    served.executor.start_ranks = fail_first  # type: ignore[method-assign]
    served.executor.failure = ShardError("rank 0 died: killed")
    client.submit([request("a", max_tokens=9)])
    assert tokens(collect(client, "a")["a"]) == list(range(1, 10))


def test_what_a_frontend_still_had_on_the_way_when_it_ended_is_nobodys(tmp_path: Path) -> None:
    """Sockets are read in turn: its last requests come after the word that it has ended."""
    server = LinkServer(f"ipc://{tmp_path}/commands", f"ipc://{tmp_path}/news")
    greeted = threading.Event()

    def greet() -> None:
        while not greeted.is_set():
            server.receive(wait_s=0.01)
            server.send([], EngineStatus)

    thread = threading.Thread(target=greet)
    thread.start()
    dead, watcher = (
        LinkClient(server.address, watch=lambda: None, frontend=name) for name in (b"f0", b"f1")
    )
    greeted.set()
    thread.join()
    asked: set[str] = set()
    for number in range(2):  # whose turn it is at first is not known
        for name in "abc":
            dead.submit([request(f"{name}{number}")])
        time.sleep(0.05)
        watcher.forget(b"f0")
        time.sleep(0.05)
        for command in server.receive(wait_s=0.0):
            if isinstance(command, Submit):
                asked |= {each.request_id for each in command.requests}
            else:
                asked -= set(command.request_ids)
    assert asked == set()
    for end in (dead, watcher, server):
        end.close()


def test_a_frontend_that_links_up_again_goes_before_its_last_connection(served: Served) -> None:
    links = [LinkClient(served.address, watch=lambda: None, frontend=b"f0") for _ in range(2)]
    links[1].submit([request("a")])
    assert tokens(collect(links[1], "a")["a"])
    for link_up in links:
        link_up.close()


def test_ranks_that_end_again_and_again_are_given_up(served: Served) -> None:
    client = served.frontend()

    def end_again() -> None:
        served.executor.num_starts += 1

    served.executor.start_ranks = end_again  # type: ignore[method-assign]
    served.executor.failure = ShardError("rank 0 died: killed")
    client.submit([request(name, max_tokens=3) for name in "abcdefgh"])
    with pytest.raises(EngineError, match=f"ended {MOST_IN_VAIN + 1} times in a row"):
        collect(client, "never")
    assert served.executor.num_starts == MOST_IN_VAIN


def test_an_engine_whose_own_rank_cannot_be_loaded_again_can_still_be_closed() -> None:
    worker = SimpleNamespace(
        config=EngineConfig(), num_blocks=1, facts=lambda: "", close=lambda: None
    )
    made: list[Any] = [worker]
    alone = InProcess(lambda: made.pop())
    alone.end_ranks()
    with pytest.raises(IndexError):
        alone.start_ranks()
    alone.close()


def test_steps_of_nobody_find_a_rank_that_hangs_and_take_no_token_from_anybody(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "IDLE_STEP_S", 0.0)
    client = served.frontend()
    for name in "abc":
        before = served.executor.num_steps
        wait_until(lambda before=before: served.executor.num_steps > before + 1)  # type: ignore[misc]
        client.submit([request(name, max_tokens=5)])
        deltas = collect(client, name)[name]
        assert len([token for delta in deltas for token in delta.token_ids]) == 5
    served.executor.failure = ShardError("rank 0 says nothing")
    wait_until(lambda: bool(client.poll(0.05)) or client.status().num_restarts == 1)


def test_a_rank_that_dies_while_there_is_nothing_to_do_is_noticed(served: Served) -> None:
    client = served.frontend()
    client.submit([request("a")])
    collect(client, "a")
    served.executor.dead = ShardError("rank 0 died: killed")
    wait_until(lambda: bool(client.poll(0.05)) or client.status().num_restarts == 1)
    client.submit([request("b")])
    collect(client, "b")


def test_an_engine_that_is_gone_without_a_word_is_found_by_asking(served: Served) -> None:
    client = served.frontend()
    client.poll(0.05)
    served.gone = "the engine ended with exit code -9"
    served.executor.pause_s = LONG_S  # no news of its own
    with pytest.raises(EngineError, match="the engine ended with exit code -9"):
        wait_until(lambda: bool(client.poll(LONG_S)))
    served.executor.pause_s = 0.0


def test_closing_ends_the_engine_once_and_refuses_what_follows(served: Served) -> None:
    closed = []
    client = LinkClient(served.address, watch=lambda: None, on_close=lambda: closed.append(1))
    client.close()
    client.close()
    assert closed == [1]
    for action in (lambda: client.submit([request("a")]), lambda: client.abort(["a"])):
        with pytest.raises(EngineError, match="closed"):
            action()


def test_an_engine_that_is_no_longer_wanted_closes_its_ranks(served: Served) -> None:
    served.close()
    assert served.lost is None
    assert served.executor.closed


# ---------------------------------------------------------------------------------- a process and a model


@pytest.fixture
def no_process_left() -> Iterator[None]:
    """After the test this process has no more children than before, and no socket folder is left."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    folders = set(Path("/tmp").glob("paceline-*"))
    yield
    mine = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    assert [c.cmdline() for c in mine if "resource_tracker" not in " ".join(c.cmdline())] == []
    assert set(Path("/tmp").glob("paceline-*")) <= folders


def engine_pid() -> int:
    (child,) = (
        c
        for c in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(c.cmdline())
    )
    return int(child.pid)


def test_an_engine_process_writes_what_an_engine_in_this_one_writes(
    tiny: Callable[..., Path], no_process_left: None
) -> None:
    prompts: list[Prompt] = [
        TokensPrompt(prompt_token_ids=[3, 1, 4, 1, 5]),
        TokensPrompt(prompt_token_ids=[9, 2, 6]),
    ]
    params = SamplingParams(temperature=0.8, max_tokens=20, seed=3, ignore_eos=True)
    given: dict[str, Any] = {
        "dtype": "float32",
        "speculative_config": {"model": str(tiny(seed=0, noise=0.03))},
    }
    texts = []
    for how in (None, connect):
        with LLM(str(tiny(seed=0)), connect=how, **given) as llm:
            outputs = llm.generate(prompts, params)
            texts.append([output.outputs[0].token_ids for output in outputs])
    assert texts[0] == texts[1]


def test_a_killed_engine_process_is_an_error_within_seconds(
    tiny: Callable[..., Path], no_process_left: None
) -> None:
    with LLM(str(tiny(seed=0)), dtype="float32", connect=connect) as llm:
        long = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True)
        stream = llm.stream(llm.jobs([TokensPrompt(prompt_token_ids=[1, 2, 3])] * 8, long))
        next(stream)
        os.kill(engine_pid(), signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(EngineError, match="the engine ended with exit code -9"):
            list(stream)
        assert time.monotonic() - started < 10.0


def test_a_model_that_a_rank_refuses_is_refused_in_its_own_words(
    tiny: Callable[..., Path], no_process_left: None, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    good = tiny(seed=0)
    tensors = load_file(good / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((good / "config.json").read_text())
    config = make_config({"model": str(tmp_path)})
    with pytest.raises(UserError, match=r"lacks the tensor model\.norm\.weight"):
        connect(config, examine(config))


def test_an_engine_process_ends_with_its_parent(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """However that ended, and takes its files away."""
    code = (
        "import os, psutil\n"
        "from paceline.runtime.config import make_config\n"
        "from paceline.runtime.local import connect\n"
        "from paceline.runtime.preflight import examine\n"
        "if __name__ == '__main__':\n"
        f"    config = make_config({{'model': {str(tiny(seed=0))!r}}})\n"
        "    client = connect(config, examine(config))\n"
        "    children = psutil.Process().children(recursive=True)\n"
        "    print(*(c.pid for c in children), flush=True)\n"
        "    os._exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 3, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_hangs_ends_with_its_parent_too(tmp_path: Path) -> None:
    code = (
        "import multiprocessing, os, sys, time\n"
        "from pathlib import Path\n"
        "from paceline.runtime.orphans import end_with_parent\n"
        "def hang(folder):\n"
        "    end_with_parent(grace_s=0.1, first=(folder / 'left').touch)\n"
        "    (folder / 'pid').write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(tmp_path)!r})\n"
        "    multiprocessing.get_context('spawn').Process(target=hang, args=(folder,)).start()\n"
        "    while not (folder / 'pid').exists():\n"
        "        time.sleep(0.01)\n"
        "    os._exit(3)\n"
    )
    program = tmp_path / "program.py"
    program.write_text(code)
    done = subprocess.run([sys.executable, program], timeout=LONG_S, check=False)
    assert done.returncode == 3
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not psutil.pid_exists(pid))
    assert (tmp_path / "left").exists()

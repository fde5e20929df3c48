"""Engines come, fail, drain and go; every request ends once with the text of its own, no token lost
or repeated."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.fleets import SimEngine, Told, World, make_request, run, text_of

from paceline.actors import router as router_module
from paceline.actors.router import Member, Router
from paceline.actors.routing.policies import POLICIES
from paceline.runtime import link
from paceline.runtime.errors import EngineError
from paceline.runtime.link import LinkClient, LinkServer, Submit
from paceline.runtime.types import (
    EngineRole,
    EngineStatus,
    Request,
    TokenDelta,
    TransferTotals,
)

LONG_S = 20.0
"""A deadline that only a hanging test meets."""


def fleet(
    world: World, *roles: EngineRole, policy: Any = "conditional", **settings: Any
) -> tuple[Router, list[SimEngine]]:
    engines = [SimEngine(world, name=f"{i}") for i in range(len(roles))]
    members = [
        Member(f"{i}", role, each)
        for i, (role, each) in enumerate(zip(roles, engines, strict=True))
    ]
    router = Router(members, policy=policy, clock=world.clock, **settings)
    return router, engines


def ignore(engine_id: str, error: EngineError) -> None:
    """Somebody sees to it that another engine comes."""


def finish(world: World, router: Router, told: Told, *names: str) -> None:
    run(world, lambda: router.poll(0.0), told, names=names)


def check(told: Told, *requests: Request) -> None:
    for request in requests:
        assert told.token_ids[request.request_id] == text_of(request)
        (end,) = told.ends[request.request_id]
        assert end.finish_reason == "length"
        assert end.metrics is not None
        assert end.metrics.num_tokens == request.max_tokens


# -------------------------------------------------------------------------------------------------- death


def test_a_text_goes_on_elsewhere_after_the_tokens_that_were_passed_on() -> None:
    world, told = World(), Told()
    router, engines = fleet(world, "decode", "decode")
    request = make_request("a", 64, max_tokens=30)
    router.submit([request])
    writer = next(each for each in engines if each.submitted)
    other = next(each for each in engines if each is not writer)
    while len(told.token_ids.get("a", ())) < 10:
        world.advance(0.01)
        told.hear(router.poll(0.0))
    world.advance(0.05)  # written, and never heard of
    writer.die()
    finish(world, router, told, "a")
    check(told, request)
    (again,) = other.submitted
    assert list(again.output_token_ids) == text_of(request)[: len(again.output_token_ids)]
    assert len(again.output_token_ids) >= 10
    assert again.max_tokens == 30


def test_what_a_resumed_text_was_told_once_is_not_told_again() -> None:
    world, told = World(), Told()
    router, engines = fleet(world, "decode", on_lost=ignore)
    router.submit([make_request("a", 64, max_tokens=9)])
    while not told.token_ids.get("a"):
        world.advance(0.01)
        told.hear(router.poll(0.0))
    engines[0].die()
    router.poll(0.0)
    odd = Odd()
    router.add_member(Member("odd", "decode", odd))
    router.poll(0.0)
    (name,) = [each.request_id for each in odd.submitted]
    assert name != "a"
    odd.out = [TokenDelta(request_id=name, token_ids=(5,), num_cached_tokens=48)]
    (delta,) = router.poll(0.0)
    assert (delta.request_id, delta.token_ids, delta.num_cached_tokens) == ("a", (5,), 0)
    odd.out = [
        TokenDelta(request_id="a", token_ids=(6,)),  # its name of before means nobody
        TokenDelta(request_id=name, token_ids=(7,), finish_reason="length"),
        TokenDelta(request_id=name, finish_reason="abort"),
    ]
    (delta,) = router.poll(0.0)
    assert (delta.request_id, delta.token_ids, delta.finish_reason) == ("a", (7,), "length")


class Odd:
    """A client that says what it is told to say."""

    def __init__(self) -> None:
        self.submitted: list[Request] = []
        self.aborted: list[str] = []
        self.out: list[TokenDelta] = []
        self.told = EngineStatus()
        self.closed = threading.Event()

    def submit(self, requests: list[Request]) -> None:
        self.submitted += requests

    def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    def poll(self, wait_s: float = 1.0) -> list[TokenDelta]:
        out, self.out = self.out, []
        return out

    def status(self) -> EngineStatus:
        return self.told

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("when", ["reading", "read"])
def test_a_prompt_whose_reader_dies_before_the_first_token_is_read_by_another(when: str) -> None:
    world, told = World(transfer_s=1.0), Told()
    router, engines = fleet(world, "prefill", "prefill", "decode", policy="always")
    request = make_request("a", 400, max_tokens=6)
    router.submit([request])
    first = next(each for each in engines[:2] if each.submitted)
    second = next(each for each in engines[:2] if each is not first)
    world.advance(0.01 if when == "reading" else 0.5)
    told.hear(router.poll(0.0))
    assert not told.token_ids
    first.die()
    finish(world, router, told, "a")
    check(told, request)
    assert len(second.submitted) == 1
    assert engines[2].aborted == ["a"], "it need not wait for a fetch that cannot succeed"
    assert world.now_s < 104.0


def test_a_reader_that_dies_after_the_handover_takes_nothing_along() -> None:
    world, told = World(), Told()
    router, engines = fleet(world, "prefill", "decode", policy="always")
    request = make_request("a", 400, max_tokens=20)
    router.submit([request])
    while not told.token_ids.get("a"):
        world.advance(0.01)
        told.hear(router.poll(0.0))
    engines[0].die()
    finish(world, router, told, "a")
    check(told, request)
    assert len(engines[1].submitted) == 1


def test_a_prefill_engine_writes_where_nobody_else_is_left() -> None:
    world, told = World(), Told()
    router, engines = fleet(world, "prefill", "decode")
    requests = [make_request(f"{i}", 400, max_tokens=20, seed=i) for i in range(4)]
    router.submit(requests)
    world.advance(0.1)
    engines[1].die()
    finish(world, router, told, *(each.request_id for each in requests))
    check(told, *requests)


def test_a_lone_engine_that_is_lost_is_the_routers_own_loss() -> None:
    world = World()
    router, engines = fleet(world, "both")
    router.submit([make_request("a")])
    engines[0].die("rank 1 died")
    with pytest.raises(EngineError, match="rank 1 died"):
        router.poll(0.0)
    with pytest.raises(EngineError, match="rank 1 died"):
        router.submit([make_request("b")])


def test_requests_wait_for_an_engine_that_is_started_anew() -> None:
    world, told = World(), Told()
    lost: list[tuple[str, str]] = []
    router, engines = fleet(
        world, "both", on_lost=lambda engine_id, error: lost.append((engine_id, str(error)))
    )
    requests = [make_request("a", 40, max_tokens=30), make_request("b", 40, max_tokens=9, seed=1)]
    router.submit(requests[:1])
    for _ in range(5):
        world.advance(0.02)
        told.hear(router.poll(0.0))
    engines[0].die()
    assert router.poll(0.0) == []
    assert lost == [("0", "rank 0 died")]
    router.submit(requests[1:])
    assert router.status().num_waiting == 2
    world.advance(50.0)
    assert router.poll(0.0) == []
    router.add_member(Member("0", "both", SimEngine(world)))
    finish(world, router, told, "a", "b")
    check(told, *requests)


def test_patience_ends_with_an_error() -> None:
    world, told = World(), Told()
    router, engines = fleet(world, "both", on_lost=ignore, resume_s=7.0)
    router.submit([make_request("a")])
    engines[0].die()
    assert router.poll(0.0) == []
    world.advance(6.9)
    assert router.poll(0.0) == []
    world.advance(0.2)
    (delta,) = router.poll(0.0)
    assert (delta.request_id, delta.finish_reason) == ("a", "error")
    assert delta.error is not None
    assert "waited 7 s" in delta.error
    told.hear([delta])
    router.add_member(Member("1", "both", SimEngine(world)))
    router.submit([make_request("a")])
    finish(world, router, Told(), "a")


def test_an_engine_that_refuses_a_submission_is_lost_and_its_requests_go_elsewhere() -> None:
    world, told = World(), Told()
    router, engines = fleet(world, "decode", "decode", "decode")
    requests = [make_request(f"{i}", 40, seed=i) for i in range(9)]
    engines[0].die()
    engines[2].die()
    router.submit(requests)
    assert router.member_ids == ("1",)
    finish(world, router, told, *(each.request_id for each in requests))
    check(told, *requests)


# -------------------------------------------------------------------------------- aborting, draining, ids


def test_an_abort_reaches_both_engines_and_ends_once() -> None:
    world, told = World(), Told()
    router, engines = fleet(world, "prefill", "decode", policy="always")
    router.submit([make_request("a", 4000, max_tokens=500)])
    router.abort(["a", "nobody"])
    assert [engine.aborted for engine in engines] == [["a"], ["a"]]
    finish(world, router, told, "a")
    (end,) = told.ends["a"]
    assert end.finish_reason == "abort"
    world.advance(1.0)
    assert router.poll(0.0) == []
    assert [engine.num_texts for engine in engines] == [0, 0]


def test_an_aborted_request_is_not_written_elsewhere_when_its_engine_dies() -> None:
    world = World()
    router, engines = fleet(world, "decode", "decode")
    router.submit([make_request("a", max_tokens=500)])
    writer = next(each for each in engines if each.submitted)
    router.abort(["a"])
    writer.die()
    (delta,) = router.poll(0.0)
    assert delta.finish_reason == "abort"
    assert sum(len(each.submitted) for each in engines) == 1


def test_a_waiting_request_can_be_aborted() -> None:
    router = Router(on_lost=ignore)
    router.submit([make_request("a")])
    router.abort(["a"])
    (delta,) = router.poll(LONG_S)
    assert (delta.request_id, delta.finish_reason) == ("a", "abort")
    router.close()


def test_an_id_that_is_in_use_is_refused() -> None:
    world = World()
    router, engines = fleet(world, "both")
    router.submit([make_request("a", max_tokens=50)])
    router.submit([make_request("a", max_tokens=50)])
    (delta,) = router.poll(0.0)
    assert delta.error == "request id a is in use"
    assert len(engines[0].submitted) == 1


def test_a_draining_engine_finishes_what_it_has_gets_nothing_new_and_is_closed() -> None:
    world, told = World(), Told()
    router, engines = fleet(world, "prefill", "decode", "decode", policy="always")
    requests = [make_request(f"{i}", 300, max_tokens=40, seed=i) for i in range(8)]
    router.submit(requests[:4])
    world.advance(0.2)
    router.drain_member("0")
    router.drain_member("1")
    before = [len(engine.submitted) for engine in engines]
    assert before[1] > 0
    router.submit(requests[4:])
    assert [len(engine.submitted) for engine in engines] == [before[0], before[1], before[2] + 4]
    finish(world, router, told, *(each.request_id for each in requests))
    router.poll(0.0)
    check(told, *requests)
    assert router.member_ids == ("2",)
    router.close()
    assert all(engine.closed for engine in engines)


def test_an_engine_taken_away_at_once_loses_no_text() -> None:
    world, told = World(), Told()
    router, engines = fleet(world, "decode", "decode")
    requests = [make_request(f"{i}", 300, max_tokens=40, seed=i) for i in range(6)]
    router.submit(requests)
    for _ in range(10):
        world.advance(0.05)
        told.hear(router.poll(0.0))
    router.remove_member("0")
    finish(world, router, told, *(each.request_id for each in requests))
    check(told, *requests)
    with pytest.raises(KeyError):
        router.remove_member("0")
    with pytest.raises(ValueError, match="there is an engine 1 already"):
        router.add_member(Member("1", "both", engines[0]))


# ------------------------------------------------------------------------------- any order of all of it


class AnyOrder(RuleBasedStateMachine):
    """Requests, deaths, drains and arrivals, interleaved at random with time."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def start(self, policy: Any) -> None:
        self.world, self.told = World(transfer_s=0.05), Told()
        self.router = Router(policy=policy, clock=self.world.clock, on_lost=ignore, patience_s=1e6)
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()
        self.engines: dict[str, SimEngine] = {}
        self.add("both")

    @rule(role=st.sampled_from(["prefill", "decode", "both"]))
    def add(self, role: EngineRole) -> None:
        if len(self.engines) < 6:
            name = f"{len(self.world.engines)}"
            self.engines[name] = SimEngine(self.world, name=name)
            self.router.add_member(Member(name, role, self.engines[name]))

    @rule(
        prompt=st.integers(1, 200),
        max_tokens=st.integers(1, 12),
        seed=st.integers(0, 3),
        session=st.sampled_from(["", "s"]),
    )
    def submit(self, prompt: int, max_tokens: int, seed: int, session: str) -> None:
        name = f"r{len(self.requests)}"
        request = make_request(name, prompt, max_tokens=max_tokens, seed=seed, session_id=session)
        self.requests[name] = request
        self.router.submit([request])

    @rule(seconds=st.sampled_from([0.001, 0.02, 0.1]), poll=st.booleans())
    def let_time_pass(self, seconds: float, poll: bool) -> None:
        self.world.advance(seconds)
        if poll:
            self.told.hear(self.router.poll(0.0))

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), how=st.sampled_from(["die", "drain", "remove"]))
    def take_away(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.engines)))
        engine = self.engines.pop(name)
        if how == "die":
            engine.die()
        elif name in self.router.member_ids:
            (self.router.drain_member if how == "drain" else self.router.remove_member)(name)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.router.abort([name])
        self.aborted.add(name)

    @invariant()
    def texts_are_true_so_far(self) -> None:
        for name, token_ids in self.told.token_ids.items():
            assert token_ids == text_of(self.requests[name])[: len(token_ids)]

    def teardown(self) -> None:
        if not hasattr(self, "router"):
            return
        self.add("decode")
        finish(self.world, self.router, self.told, *self.requests)
        assert sorted(self.told.ends) == sorted(self.requests)
        for name, (end,) in self.told.ends.items():
            if end.finish_reason == "length":
                assert self.told.token_ids[name] == text_of(self.requests[name])
            else:
                assert end.finish_reason == "abort"
                assert name in self.aborted
        self.router.poll(0.0)
        for state in self.router._members.values():
            assert state.idle
            assert (state.num_started, state.num_unread, state._unread) == (0, 0, {})
        assert self.router._dispatcher._routed == {}
        assert self.router._dispatcher._by_name == {}
        self.router.close()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


# ----------------------------------------------------------------------------------------------- status


def test_the_status_is_the_sum_and_no_total_ever_falls() -> None:
    clients = [Odd(), Odd()]
    router = Router(
        [Member("p", "prefill", clients[0]), Member("d", "decode", clients[1])], on_lost=ignore
    )
    for i, client in enumerate(clients):
        client.told = EngineStatus(
            num_running=1 + i,
            num_blocks=10,
            num_free_blocks=4,
            block_size=16,
            prompt_tokens=100 * (1 + i),
            accepted_at_position=(3, 1)[: 1 + i],
            ranks=(f"rank {i}",),
            transfers=TransferTotals(fetching=1, fetched=5, num_bytes=7),
        )
    router.poll(0.0)
    status = router.status()
    assert (status.num_running, status.num_blocks, status.num_free_blocks) == (3, 20, 8)
    assert (status.prompt_tokens, status.accepted_at_position) == (300, (6, 1))
    assert status.ranks == ("p: rank 0", "d: rank 1")
    assert [(m.engine_id, m.role, m.prompt_tokens) for m in status.members] == [
        ("p", "prefill", 100),
        ("d", "decode", 200),
    ]
    assert (status.transfers.fetching, status.transfers.fetched) == (2, 10)
    router.remove_member("d")
    status = router.status()
    assert (status.num_running, status.num_blocks, status.prompt_tokens) == (1, 10, 300)
    assert (status.transfers.fetching, status.transfers.num_bytes) == (1, 14)
    assert [m.engine_id for m in status.members] == ["p"]
    router.close()
    assert clients[1].closed.wait(LONG_S)


def test_every_step_is_reported_once() -> None:
    world = World()
    router, engines = fleet(world, "decode", "decode")
    router.submit([make_request(f"{i}", 40, seed=i, max_tokens=20) for i in range(4)])
    told, steps = Told(), 0
    while len(told.ends) < 4:
        world.advance(0.03)
        told.hear(router.poll(0.0))
        steps += len(router.status().steps)
    assert steps == sum(each._num_steps for each in engines) == router.status().num_steps


# -------------------------------------------------------------------------------------- real sockets


class Echo:
    """An engine behind a link that answers each request with its last prompt token."""

    def __init__(self, folder: Any, name: str) -> None:
        self.server = LinkServer(f"ipc://{folder}/{name}c", f"ipc://{folder}/{name}n")
        self.gone: str | None = None
        self.mute = threading.Event()
        self.statuses: list[EngineStatus] = []
        """To be sent, one by one."""
        self._status = EngineStatus()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.client = LinkClient(self.server.address, watch=lambda: self.gone, on_close=self.close)

    def _run(self) -> None:
        while not self._ending.is_set():
            deltas = []
            for command in self.server.receive(wait_s=0.01):
                if isinstance(command, Submit) and not self.mute.is_set():
                    deltas += [
                        TokenDelta(
                            request_id=each.request_id,
                            token_ids=each.prompt_token_ids[-1:],
                            finish_reason="length",
                        )
                        for each in command.requests
                    ]
            self.server.send(deltas, self._next_status)
        self.server.close()

    def _next_status(self) -> EngineStatus:
        if self.statuses:
            self._status = self.statuses.pop(0)
            return self._status
        return EngineStatus(num_steps=self._status.num_steps)

    def close(self) -> None:
        self._ending.set()
        self._thread.join(LONG_S)


def later(action: Callable[[], object]) -> threading.Thread:
    """Do something once the other thread waits, or a little before."""
    thread = threading.Timer(0.05, action)
    thread.daemon = True
    thread.start()
    return thread


def test_one_poll_waits_for_all_links_at_once_and_hears_of_what_changes(tmp_path: Any) -> None:
    echoes = [Echo(tmp_path, f"{i}") for i in range(3)]
    router = Router(
        [Member(f"{i}", "both", echo.client) for i, echo in enumerate(echoes[:2])],
        policy="round_robin",
        on_lost=ignore,
    )
    names = [f"{i}" for i in range(40)]
    thread = later(lambda: router.submit([make_request(n, (1, int(n))) for n in names]))
    told, deadline = Told(), time.monotonic() + LONG_S
    while len(told.ends) < 40 and time.monotonic() < deadline:
        told.hear(router.poll(LONG_S))
    assert told.token_ids == {n: [int(n)] for n in names}
    thread.join()

    echoes[0].mute.set()
    echoes[1].mute.set()
    router.submit([make_request("a", (1, 5)), make_request("b", (1, 6))])
    echoes[0].gone = echoes[1].gone = "it was killed"
    thread = later(lambda: router.add_member(Member("2", "both", echoes[2].client)))
    while len(told.ends) < 42 and time.monotonic() < deadline:
        told.hear(router.poll(LONG_S))
    thread.join()
    assert told.token_ids["a"] == [5]
    assert told.token_ids["b"] == [6]
    assert router.member_ids == ("2",)
    router.close()


def test_a_link_tells_every_block_event_once_and_the_latest_of_each_block(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "STATUS_EVERY_S", 0.0)
    echo = Echo(tmp_path, "e")
    echo.statuses += [
        EngineStatus(num_steps=1, stored_blocks=(b"a", b"b")),
        EngineStatus(num_steps=2, stored_blocks=(b"c",), removed_blocks=(b"a", b"b")),
        EngineStatus(num_steps=3, stored_blocks=(b"a",)),
    ]
    client, deadline = echo.client, time.monotonic() + LONG_S
    while client._status.num_steps < 3:
        assert time.monotonic() < deadline, "the statuses did not come"
        client.poll(0.05)
    status = client.status()
    assert (status.stored_blocks, status.removed_blocks) == ((b"c", b"a"), (b"b",))
    status = client.status()
    assert (status.num_steps, status.stored_blocks, status.removed_blocks) == (3, (), ())
    client.close()


def test_a_poll_that_waits_hears_of_a_new_member_at_once(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "WATCH_EVERY_S", LONG_S)
    echo = Echo(tmp_path, "e")
    router = Router(on_lost=ignore)
    router.submit([make_request("a", (1, 5))])
    thread = later(lambda: router.add_member(Member("e", "both", echo.client)))
    started = time.monotonic()
    told = Told()
    while not told.ends and time.monotonic() < started + LONG_S:
        told.hear(router.poll(LONG_S))
    assert told.token_ids == {"a": [5]}
    assert time.monotonic() - started < LONG_S / 2
    thread.join()
    router.close()


def test_closing_ends_a_poll_that_waits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "WATCH_EVERY_S", LONG_S)
    monkeypatch.setattr(link, "STATUS_EVERY_S", LONG_S)
    echo = Echo(tmp_path, "e")
    router = Router([Member("e", "both", echo.client)])
    thread = later(router.close)
    started = time.monotonic()
    with pytest.raises(EngineError, match="closed"):
        router.poll(LONG_S)
    assert time.monotonic() - started < LONG_S / 2
    thread.join()
    router.close()


def test_the_router_needs_neither_torch_nor_numpy_nor_ray_nor_grpc() -> None:
    code = (
        "import sys, paceline.actors.router\n"
        "print([m for m in ('torch', 'numpy', 'ray', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"

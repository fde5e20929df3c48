"""Where requests go: to cached prefixes, to idle engines, elsewhere only where that pays."""

from __future__ import annotations

import logging
import random
import statistics
from typing import Any

import pytest
from tests.fleets import SimEngine, Told, World, make_request, run

from paceline.actors.router import Member, Router
from paceline.actors.routing.costs import CLIP, Line, draft_shares
from paceline.actors.routing.policies import EXPLORE_EVERY, PolicyName
from paceline.actors.routing.roster import MemberState, Roster
from paceline.runtime.types import EngineRole, EngineStatus, KvLinks, Request


class Scene:
    """A router over simulated engines."""

    def __init__(
        self,
        *roles: EngineRole,
        policy: PolicyName = "conditional",
        engine: dict[str, Any] | None = None,
        world: World | None = None,
        **settings: Any,
    ) -> None:
        self.world = world or World()
        self.engines = [SimEngine(self.world, **(engine or {})) for _ in roles]
        self.router = Router(
            [
                Member(f"{role}-{i}", role, engine)
                for i, (role, engine) in enumerate(zip(roles, self.engines, strict=True))
            ],
            policy=policy,
            clock=self.world.clock,
            **settings,
        )
        self.told = Told()
        self.asked: list[str] = []

    def submit(self, request: Request) -> tuple[int, int | None]:
        """Who writes and who reads."""
        before = [len(engine.submitted) for engine in self.engines]
        self.router.submit([request])
        self.asked.append(request.request_id)
        writer = reader = None
        for i, engine in enumerate(self.engines):
            for each in engine.submitted[before[i] :]:
                if each.produce is None:
                    writer = i
                else:
                    reader = i
        assert writer is not None
        return writer, reader

    def finish(self) -> None:
        run(self.world, lambda: self.router.poll(0.0), self.told, names=self.asked)

    def serve(self, *requests: Request) -> None:
        for request in requests:
            self.submit(request)
        self.finish()


# -------------------------------------------------------------------------------------------- estimates


def test_a_line_is_learnt_from_a_wrong_prior() -> None:
    line = Line(fixed_s=0.01, per_unit_s=1e-4, scale=1000)
    for i in range(60):
        size = 100 + 700 * (i % 5)
        line.observe(size, 0.5 + 0.003 * size)
    assert line.at(2000) == pytest.approx(6.5, rel=0.05)
    assert line.at(0) == pytest.approx(0.5, rel=0.3)


def test_one_accident_is_forgotten_and_a_change_is_followed() -> None:
    line = Line(fixed_s=0.0, per_unit_s=1e-3, scale=1000)
    for _ in range(20):
        line.observe(1000, 1.0)
    line.observe(1000, 3600.0)
    assert line.at(1000) < CLIP
    for _ in range(30):
        line.observe(1000, 1.0)
    assert line.at(1000) < 1.5
    for _ in range(40):
        line.observe(1000, 50.0)
    assert line.at(1000) == pytest.approx(50.0, rel=0.1)


def test_sizes_of_one_kind_do_not_bend_the_line_below_zero() -> None:
    line = Line(fixed_s=0.1, per_unit_s=1e-2, scale=100)
    for size, seconds in [(500, 0.0), (510, 9.0), (505, 0.0)] * 20:
        line.observe(size, seconds)
    assert all(line.at(size) >= 0 for size in (0, 1, 500, 10_000))


# ------------------------------------------------------------------------------------- prefixes and load


@pytest.mark.parametrize("policy", ["conditional", "always", "local"])
def test_a_prompt_goes_where_its_beginning_was_read(policy: PolicyName) -> None:
    scene = Scene("decode", "decode", "decode", policy=policy)
    scene.serve(*(make_request(f"{i}", 320, seed=i, max_tokens=8) for i in range(3)))
    places = {i: k for k in range(3) for i in range(3) if named(scene.engines[k], f"{i}")}
    assert len(set(places.values())) == 3, "spread while nothing was cached"
    scene.world.advance(60.0)  # expectations are over: what counts is what engines said
    for i in (2, 0, 1, 1, 0):
        again = make_request(f"again {i} {len(scene.asked)}", 320, seed=i, max_tokens=8)
        assert scene.submit(again)[0] == places[i]
        scene.finish()


def named(engine: SimEngine, request_id: str) -> bool:
    return any(each.request_id == request_id for each in engine.submitted)


def test_requests_sent_in_one_moment_are_spread_before_any_status_tells_of_them() -> None:
    scene = Scene("decode", "decode", "decode", "decode")
    scene.router.submit([make_request(f"{i}", 400, seed=i) for i in range(20)])
    assert [len(engine.submitted) for engine in scene.engines] == [5, 5, 5, 5]


def test_a_cached_prefix_does_not_outweigh_a_long_queue() -> None:
    scene = Scene("decode", "decode")
    scene.serve(make_request("first", 64, seed=1))
    home = next(i for i in range(2) if scene.engines[i].submitted)
    for i in range(12):
        scene.router._members[f"decode-{home}"].on_sent(
            f"{i}", num_unread=4000, num_blocks=0, now_s=scene.world.now_s
        )
    assert scene.submit(make_request("second", 64, seed=1))[0] != home


def test_a_prompt_whose_first_token_has_come_is_no_longer_in_the_queue() -> None:
    """Although the last status, which is older, still counts it."""
    scene = Scene("decode", "decode")
    scene.submit(make_request("long", 8000, seed=1))
    engine = scene.engines[0]
    scene.router.poll(0.0)
    assert scene.router._members["decode-0"].queue_tokens == 8000
    stale = engine.status()
    engine.status = lambda: stale  # type: ignore[method-assign]
    while "long" not in scene.told.first_s:
        scene.world.advance(0.1)
        scene.told.hear(scene.router.poll(0.0))
    assert scene.router._members["decode-0"].queue_tokens == 0


def test_an_engine_without_free_blocks_is_the_last_choice() -> None:
    scene = Scene("decode", "decode", engine={"num_blocks": 40})
    first, _ = scene.submit(make_request("big", 500, max_tokens=100, seed=1))
    scene.router.poll(0.0)
    for i in range(3):
        assert scene.submit(make_request(f"{i}", 120, seed=2 + i))[0] != first
        scene.router.poll(0.0)
    scene.submit(make_request("too much for both", 400, seed=9))


def test_round_robin_alternates_whatever_is_cached() -> None:
    scene = Scene("prefill", "decode", "prefill", "decode", policy="round_robin")
    places = [scene.submit(make_request(f"{i}", 64, seed=1)) for i in range(4)]
    assert places == [(1, 0), (3, 2), (1, 0), (3, 2)]


def test_without_prefix_caching_nothing_is_believed_to_be_cached() -> None:
    scene = Scene("decode", "decode", enable_prefix_caching=False)
    for i in range(6):
        scene.submit(make_request(f"{i}", 64, seed=1))
    assert [len(engine.submitted) for engine in scene.engines] == [3, 3]


# -------------------------------------------------------------------------------- where prompts are read


def busy(scene: Scene, num_texts: int, *, at: int) -> None:
    """Let an engine write so many texts."""
    scene.router._members[scene.router.member_ids[at]].num_started += num_texts


def test_a_long_prompt_is_read_elsewhere_while_others_write_and_a_short_one_is_not() -> None:
    scene = Scene("prefill", "decode")
    assert scene.submit(make_request("idle", 4000, seed=1)) == (1, None)
    scene.finish()
    busy(scene, 8, at=1)
    assert scene.submit(make_request("long", 4000, seed=2)) == (1, 0)
    assert scene.submit(make_request("short", 30, seed=3)) == (1, None)
    assert scene.submit(make_request("the same again", 4000, seed=1)) == (1, None)


def test_a_long_prompt_is_read_here_where_the_prefill_engine_has_a_long_queue() -> None:
    scene = Scene("prefill", "decode")
    busy(scene, 1, at=1)
    assert scene.submit(make_request("0", 2000, seed=1)) == (1, 0)
    for i in range(1, 5):
        scene.submit(make_request(f"{i}", 2000, seed=1 + i))
    readers = [each.produce is not None for each in scene.engines[0].submitted]
    assert 1 <= len(readers) <= 4
    assert len(scene.engines[1].submitted) == 5
    assert sum(each.fetch is None for each in scene.engines[1].submitted) >= 1


def test_a_slow_transfer_is_learnt_and_tried_again_when_it_may_have_become_fast() -> None:
    world = World(transfer_s=30.0)
    scene = Scene("prefill", "decode", world=world)

    def remote_of(count: int, start: int) -> int:
        """How many of so many prompts are read elsewhere."""
        remote = 0
        for i in range(count):
            busy(scene, 3, at=1)
            remote += (
                scene.submit(make_request(f"{start + i}", 1000, seed=start + i))[1] is not None
            )
            busy(scene, -3, at=1)
            scene.finish()
        return remote

    assert remote_of(EXPLORE_EVERY, 0) <= 6, "it was found to be slow"
    assert 1 <= remote_of(3 * EXPLORE_EVERY, 1000) <= 4, "it is tried now and then"
    world.transfer_s = 0.0
    remote_of(10 * EXPLORE_EVERY, 2000)
    assert remote_of(20, 3000) >= 19, "it was found to be fast again"


@pytest.mark.parametrize("policy", ["conditional", "always", "round_robin"])
def test_what_cannot_be_fetched_is_read_where_it_is_written_and_said_once(
    policy: PolicyName, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene("prefill", "decode", policy=policy)
    scene.engines[0].fingerprint = {"model": "m", "kv dtype": "bfloat16"}
    scene.router.poll(0.0)
    with caplog.at_level(logging.WARNING):
        for i in range(5):
            busy(scene, 9, at=1)
            assert scene.submit(make_request(f"{i}", 2000, seed=i)) == (1, None)
    (record,) = caplog.records
    assert "kv dtype: nothing here, bfloat16 there" in record.getMessage()


@pytest.mark.parametrize("policy", ["always", "round_robin"])
def test_links_that_do_not_serve_lossy_kv_and_short_prompts_stay_local(policy: PolicyName) -> None:
    scene = Scene("prefill", "decode", policy=policy)
    assert scene.submit(make_request("long", 200)) == (1, 0)
    assert scene.submit(make_request("short", 31, seed=1)) == (1, None)
    lossy = make_request("lossy", 200, seed=2, kv_policy="sink_window")
    assert scene.submit(lossy) == (1, None)
    scene.engines[0].addresses = ()
    scene.finish()
    assert scene.submit(make_request("no links", 200, seed=3)) == (1, None)


def test_a_drafter_that_differs_forbids_only_its_own_kv() -> None:
    scene = Scene("prefill", "decode", policy="always")
    scene.submit(make_request("equal", 200))
    scene.engines[0].fingerprint = {"model": "m", "draft.model": "other"}
    scene.finish()
    assert scene.submit(make_request("different", 200, seed=1)) == (1, 0)
    drafts = [(r.produce.read_draft, w.fetch.fetch_draft) for r, w in pairs(scene)]
    assert drafts == [(True, True), (False, False)]


def pairs(scene: Scene) -> list[tuple[Any, Any]]:
    reads = {each.request_id: each for each in scene.engines[0].submitted}
    return [(reads[each.request_id], each) for each in scene.engines[1].submitted]


SHAPES = {
    "kv dtype": "bfloat16",
    "config.num_hidden_layers": "24",
    "config.hidden_size": "256",
    "config.intermediate_size": "704",
    "config.num_attention_heads": "8",
    "config.num_key_value_heads": "4",
    "draft.kv dtype": "bfloat16",
    "draft.config.num_hidden_layers": "8",
    "draft.config.hidden_size": "128",
    "draft.config.intermediate_size": "352",
    "draft.config.num_attention_heads": "4",
    "draft.config.num_key_value_heads": "2",
}


def test_the_drafters_part_of_bytes_and_work_follows_from_the_shapes() -> None:
    shares = draft_shares(SHAPES)
    assert shares is not None
    assert shares.of_bytes == pytest.approx(8 * 64 / (8 * 64 + 24 * 128))
    assert shares.of_work == pytest.approx(8 / 24 / 4, rel=0.01)
    assert draft_shares({"config.hidden_size": "256"}) is None
    assert draft_shares(SHAPES | {"draft.config.hidden_size": "null"}) is None


@pytest.mark.parametrize(("per_token_s", "travels"), [(0.0, True), (1e-6, True), (1e-3, False)])
def test_the_drafters_kv_travels_unless_that_delays_more_than_computing_it_again(
    per_token_s: float, travels: bool
) -> None:
    roster = Roster()
    both = [MemberState(Member(name, "both", SimEngine(World()))) for name in ("p", "d")]
    for each in both:
        links = KvLinks(addresses=("here:1",), fingerprint=SHAPES)
        each.status = EngineStatus(links=links)
        roster.members[each.engine_id] = each
    for size in (100, 1000, 2000, 4000):
        for _ in range(20):
            roster.transfer("p", "d").observe(size, 0.01 + per_token_s * size)
    assert roster.draft_travels(*both) is travels


def test_both_sides_of_a_transfer_agree() -> None:
    scene = Scene("prefill", "decode", policy="always")
    scene.submit(make_request("a", 200, max_tokens=50))
    ((reads, writes),) = pairs(scene)
    assert reads.produce.transfer_id == writes.fetch.transfer_id
    assert writes.fetch.addresses == scene.engines[0].addresses
    assert (reads.max_tokens, reads.num_draft_tokens) == (1, 0)
    assert (writes.max_tokens, writes.num_draft_tokens, writes.produce) == (50, None, None)
    assert reads.fetch is None
    assert reads.prompt_token_ids == writes.prompt_token_ids


# --------------------------------------------------------------------------------------------- sessions


def test_a_session_stays_and_moves_when_its_engine_is_far_too_busy() -> None:
    scene = Scene("decode", "decode", "decode")

    def ask(session: str) -> int:
        number = len(scene.asked)
        return scene.submit(make_request(f"{number}", 50, seed=number, session_id=session))[0]

    homes = {name: ask(name) for name in "abcdef"}
    for _ in range(3):
        for name in "fedcba":
            assert ask(name) == homes[name]
    scene.finish()
    home = scene.router._members[f"decode-{homes['a']}"]
    home.on_sent("much", num_unread=100_000, num_blocks=0, now_s=scene.world.now_s)
    home.status = scene.engines[homes["a"]].status()
    moved = ask("a")
    assert moved != homes["a"]
    home.on_read("much")
    assert ask("a") == moved, "it does not come back for nothing"
    scene.router.drain_member(f"decode-{moved}")
    assert ask("a") != moved


# -------------------------------------------------------------------------------------------- simulation


def mixed(scene: Scene, *, rate: float, long_share: float, num: int = 150) -> float:
    """Mean seconds from arrival to end of a mix of long prompts and short chats."""
    chance, world, arrives_s = random.Random(7), scene.world, scene.world.now_s
    arrivals = []
    for i in range(num):
        arrives_s += chance.expovariate(rate)
        is_long = chance.random() < long_share
        request = make_request(
            f"{i}",
            chance.randrange(2000, 6000) if is_long else chance.randrange(20, 250),
            max_tokens=chance.randrange(10, 60) if is_long else chance.randrange(30, 200),
            seed=i,
        )
        arrivals.append((arrives_s, request))
    waiting = list(reversed(arrivals))
    while len(scene.told.ends) < num:
        due_s = waiting[-1][0] if waiting else world.next_s
        world.advance(max(0.0, min(world.next_s, due_s) - world.now_s))
        while waiting and waiting[-1][0] <= world.now_s:
            scene.router.submit([waiting.pop()[1]])
        scene.told.hear(scene.router.poll(0.0), now_s=world.now_s)
    return statistics.mean(scene.told.end_s[r.request_id] - at_s for at_s, r in arrivals)


@pytest.mark.parametrize(("rate", "long_share"), [(3.0, 0.15), (6.0, 0.15), (3.0, 0.4)])
def test_conditional_beats_always_and_never_reading_elsewhere(
    rate: float, long_share: float
) -> None:
    policies: tuple[PolicyName, ...] = ("conditional", "always", "local")
    took = {
        policy: mixed(Scene("prefill", "decode", policy=policy), rate=rate, long_share=long_share)
        for policy in policies
    }
    assert took["conditional"] < min(took["always"], took["local"])


@pytest.mark.parametrize("transfer_s", [0.0, 3.0])
def test_conditional_does_not_lose_whatever_transfers_cost(transfer_s: float) -> None:
    policies: tuple[PolicyName, ...] = ("conditional", "always", "local")
    took = {}
    for policy in policies:
        world = World(transfer_s=transfer_s)
        scene = Scene("prefill", "decode", policy=policy, world=world)
        took[policy] = mixed(scene, rate=2.0, long_share=0.1)
    assert took["conditional"] < 1.05 * min(took["always"], took["local"])

"""Two schedulers and the links between them, in any order of events: every text is its own, no block
is read or written by two, and all are free in the end.

Links here copy what the fake workers wrote, slot by slot and late, fail, go on writing after they
were told to stop, and let leases end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pure.test_scheduler import BLOCK, Heard, Run, make, make_request, solo

from paceline.runtime.errors import PromptError
from paceline.runtime.schedule.transfers import TransferEnd
from paceline.runtime.transfer.messages import Cancel, Complete, Fetch, Offer, Withdraw
from paceline.runtime.types import Event, Handover, KvFetch, KvProduce, Request, TokenDelta

SLOTS = 4


def produce(request: Request, *, read_draft: bool = True) -> Request:
    """The copy of a request that only reads its prompt."""
    wanted = KvProduce(transfer_id=f"t-{request.request_id}", lease_s=30.0, read_draft=read_draft)
    most = len(request.output_token_ids) + 1
    return msgspec.structs.replace(request, produce=wanted, max_tokens=most, num_draft_tokens=0)


def fetch(request: Request, **more: Any) -> Request:
    wanted = KvFetch(
        transfer_id=f"t-{request.request_id}",
        addresses=("here:1",),
        lease_s=30.0,
        timeout_s=60.0,
        **more,
    )
    return msgspec.structs.replace(request, fetch=wanted)


@dataclass
class Link:
    """One transfer between the two engines."""

    offer: Offer | None = None
    fetch: Fetch | None = None
    handover: Handover | None = None
    withdrawn: str | None = None
    cancelled: bool = False
    moved: int = 0
    """Tokens copied so far, from the fetch's first on."""
    producer_ended: bool = False
    consumer_ended: bool = False


@dataclass
class Pair:
    """A prefill engine, a decode engine, and everything between them."""

    prefill: Run
    decode: Run
    links: dict[str, Link] = field(default_factory=dict)

    def add(self, request: Request, *, remote: bool) -> None:
        if remote:
            self.prefill.add(produce(request))
            request = fetch(request)
        self.decode.add(request)

    def step(self, run: Run) -> None:
        """As many plans as may be in flight, and the earliest answered."""
        while self.send(run):
            pass
        self.receive(run)

    def send(self, run: Run) -> bool:
        sent = run.scheduler.may_plan and run.send()
        self.obey(run)
        return sent

    def receive(self, run: Run) -> None:
        if run.in_flight:
            run.receive()
        self.obey(run)

    def abort(self, request_id: str) -> None:
        for run in (self.prefill, self.decode):
            if request_id in run.heard:
                run.abort(request_id)
                self.obey(run)

    def obey(self, run: Run) -> None:
        """What the scheduler wants of its links."""
        for order in run.scheduler.transfers.take_orders():
            link = self.links.setdefault(order.transfer_id, Link())
            match order:
                case Offer():
                    assert len(order.block_ids) * BLOCK >= order.num_tokens
                    link.offer = order
                case Fetch():
                    assert len(order.block_ids) * BLOCK >= order.num_tokens
                    link.fetch, link.moved = order, order.num_cached
                case Complete():
                    link.handover = order.handover
                case Withdraw():
                    link.withdrawn = order.reason
                case Cancel():
                    link.cancelled = True

    def hear(self, run: Run, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            run.heard[delta.request_id].hear(delta)

    def carry(self, transfer_id: str, chance: random.Random) -> None:
        """A link's next act."""
        link = self.links[transfer_id]
        if link.consumer_ended and not link.producer_ended and link.offer is not None:
            self.end_producer(transfer_id, error=None if link.handover else "released early")
        elif link.fetch is None or link.consumer_ended:
            return
        elif link.cancelled:
            if chance.random() < 0.5:
                self.scribble(link)
            else:
                self.end_consumer(transfer_id, error="cancelled")
        elif link.withdrawn is not None or link.producer_ended:
            self.scribble(link)
            self.end_consumer(transfer_id, error="withdrawn")
        elif link.offer is not None:
            self.copy(link, chance)
            if link.handover is not None and link.moved == link.fetch.num_tokens:
                self.end_consumer(transfer_id)

    def copy(self, link: Link, chance: random.Random) -> None:
        offer, wanted = link.offer, link.fetch
        assert offer is not None
        assert wanted is not None
        source, sink = self.prefill.worker, self.decode.worker
        request_id = offer.transfer_id.removeprefix("t-")
        known = source.known.get(request_id)
        written = offer.num_tokens if link.handover is not None else (known.seen if known else 0)
        until = min(written, link.moved + chance.randint(1, 9))
        tokens = self.decode.heard[request_id].request
        for position in range(link.moved, until):
            slot = (offer.block_ids[position // BLOCK], position % BLOCK)
            ids = (*tokens.prompt_token_ids, *tokens.output_token_ids)
            expected = hash(tuple([*ids][: position + 1]))
            assert source.target[slot] == expected, "an offered block holds another's KV"
            to = (wanted.block_ids[position // BLOCK], position % BLOCK)
            sink.target[to] = expected
            if wanted.want_draft and position >= wanted.num_draft_cached and slot in source.drafter:
                sink.drafter[to] = source.drafter[slot]
        link.moved = max(link.moved, until)
        if wanted.want_draft and link.handover is not None:
            for position in range(wanted.num_draft_cached, link.handover.draft_exact):
                slot = (offer.block_ids[position // BLOCK], position % BLOCK)
                to = (wanted.block_ids[position // BLOCK], position % BLOCK)
                sink.drafter[to] = source.drafter[slot]

    def scribble(self, link: Link) -> None:
        """Late bytes: until it says it has ended, a link may write into the blocks it was given."""
        assert link.fetch is not None
        for position in range(link.fetch.num_cached, link.fetch.num_tokens):
            to = (link.fetch.block_ids[position // BLOCK], position % BLOCK)
            self.decode.worker.target[to] = -1
            self.decode.worker.drafter[to] = -1

    def flush(self) -> None:
        """Every plan is answered."""
        for run in (self.prefill, self.decode):
            while run.in_flight:
                self.receive(run)

    def end_consumer(self, transfer_id: str, *, error: str | None = None) -> None:
        link = self.links[transfer_id]
        link.consumer_ended = True
        handover = None if error else link.handover
        if handover is not None and link.fetch is not None and not link.fetch.want_draft:
            handover = msgspec.structs.replace(handover, draft_exact=0)
        end = TransferEnd(transfer_id=transfer_id, error=error, handover=handover)
        self.hear(self.decode, self.decode.scheduler.transferred(end))
        self.decode.scheduler.check()

    def end_producer(self, transfer_id: str, *, error: str | None = None) -> None:
        self.links[transfer_id].producer_ended = True
        end = TransferEnd(transfer_id=transfer_id, error=error)
        self.hear(self.prefill, self.prefill.scheduler.transferred(end))
        self.obey(self.prefill)
        self.prefill.scheduler.check()

    def finish(self, chance: random.Random) -> None:
        """Until everything has ended; leases end what nobody fetched."""
        for _ in range(3000):
            for run in (self.prefill, self.decode):
                self.step(run)
            for transfer_id, link in self.links.items():
                self.carry(transfer_id, chance)
                if link.offer is not None and not link.producer_ended and link.fetch is None:
                    self.end_producer(transfer_id, error="lease expired")
            if all(not run.scheduler._requests for run in (self.prefill, self.decode)):
                break
        self.flush()
        for transfer_id, link in self.links.items():
            if link.offer is not None and not link.producer_ended:
                self.end_producer(transfer_id, error="lease expired")
            if link.fetch is not None and not link.consumer_ended:
                self.end_consumer(transfer_id, error="cancelled")
        for run in (self.prefill, self.decode):
            self.step(run)
            run.scheduler.check()
            assert run.scheduler._pool.num_free == run.scheduler.limits.num_blocks
            assert not run.worker.known, "the ranks still hold what is over"
            totals = run.scheduler.status().transfers
            assert (totals.producing, totals.fetching) == (0, 0)


def pair(*, drafts: int = 0, num_blocks: int = 64, **more: Any) -> Pair:
    return Pair(
        prefill=Run(make(num_blocks=num_blocks, drafts=drafts, num_slots=SLOTS, **more)),
        decode=Run(make(num_blocks=num_blocks, drafts=drafts, num_slots=SLOTS, **more)),
    )


def check_text(heard: Heard) -> None:
    expected, reason, stop = solo(heard.request)
    done = len(heard.request.output_token_ids)
    assert heard.last is not None, f"{heard.request.request_id} never ended"
    if heard.last.finish_reason == "abort":
        assert heard.token_ids == expected[done : done + len(heard.token_ids)]
        return
    assert heard.token_ids == expected[done:]
    assert (heard.last.finish_reason, heard.last.stop_token_id) == (reason, stop)


@pytest.mark.parametrize("prompt", [1, BLOCK - 1, BLOCK, BLOCK + 1, 23, 40])
@pytest.mark.parametrize("drafts", [0, 3])
def test_a_prompt_read_elsewhere_gives_the_text_it_would_have_had(prompt: int, drafts: int) -> None:
    both = pair(drafts=drafts)
    request = make_request(prompt=prompt, max_tokens=12)
    both.add(request, remote=True)
    both.finish(random.Random(0))
    check_text(both.decode.heard["a"])
    assert both.decode.worker.drafted > 0 or not drafts
    status = both.decode.scheduler.status()
    assert (status.transfers.fetched, status.prompt_tokens) == (1, 0), "not a token was read here"
    other = both.prefill.scheduler.status()
    assert other.transfers.produced == 1
    assert other.generation_tokens + status.generation_tokens == len(
        both.decode.heard["a"].token_ids
    )


def test_the_first_round_after_a_fetch_drafts_from_the_fetched_kv_of_the_drafter() -> None:
    both = pair(drafts=3)
    both.add(make_request(prompt=30, max_tokens=20), remote=True)
    for _ in range(100):
        both.step(both.prefill)
        both.carry("t-a", random.Random(1)) if "t-a" in both.links else None
        plan = both.decode.scheduler.schedule()
        both.obey(both.decode)
        if plan.scheduled:
            break
    (first,) = plan.scheduled
    assert (first.num_cached, first.num_draft_cached) == (30, 30)
    assert (first.num_tokens, first.num_draft_tokens) == (1, 3)


def test_a_request_whose_kv_cannot_be_had_is_read_here() -> None:
    both = pair(drafts=2)
    both.decode.add(fetch(make_request(prompt=30, max_tokens=8)))
    both.step(both.decode)
    assert both.decode.scheduler.status().num_free_blocks < 64, "reserved before it is asked for"
    both.end_consumer("t-a", error="nobody there")
    both.finish(random.Random(0))
    check_text(both.decode.heard["a"])
    assert both.decode.scheduler.status().transfers.failed == 1


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (None, [Event.FETCHED, Event.FIRST_TOKEN]),
        ("nobody there", [Event.FETCHED, Event.SCHEDULED, Event.FIRST_TOKEN]),
    ],
)
def test_a_request_remembers_how_its_kv_came_or_why_not(
    error: str | None, after: list[Event]
) -> None:
    both = pair()
    if error is None:
        both.add(make_request(prompt=30, max_tokens=8), remote=True)
    else:
        both.decode.add(fetch(make_request(prompt=30, max_tokens=8)))
        both.step(both.decode)
        both.end_consumer("t-a", error=error)
    both.finish(random.Random(0))
    last = both.decode.heard["a"].last
    assert last is not None
    assert last.metrics is not None
    assert last.metrics.fetch is not None
    assert (last.metrics.fetch.num_tokens, last.metrics.fetch.error) == (30, error)
    events = [event for event, _ in last.metrics.events]
    assert events == [Event.QUEUED, Event.SCHEDULED, *after, Event.FINISHED]


def test_or_ends_in_an_error_where_that_is_wanted() -> None:
    both = pair()
    both.decode.add(fetch(make_request(prompt=30), recompute=False))
    both.step(both.decode)
    both.end_consumer("t-a", error="nobody there")
    last = both.decode.heard["a"].last
    assert last is not None
    assert last.finish_reason == "error"
    assert "nobody there" in str(last.error)


@pytest.mark.parametrize("wrong", [{"seed": 1}, {"position": 30}, {"token_ids": ()}])
def test_a_handover_of_another_sampler_state_is_not_believed(wrong: dict[str, Any]) -> None:
    both = pair()
    both.decode.add(fetch(make_request(prompt=30, max_tokens=8)))
    both.step(both.decode)
    right = {"token_ids": (99,), "seed": 0, "position": 31, "draft_exact": 0}
    both.links["t-a"].handover = Handover(**(right | wrong))
    both.end_consumer("t-a")
    both.finish(random.Random(0))
    check_text(both.decode.heard["a"])


def test_an_abandoned_fetch_keeps_its_blocks_until_the_links_have_ended_it() -> None:
    both = pair()
    both.decode.add(fetch(make_request(prompt=30)))
    both.step(both.decode)
    reserved = both.decode.scheduler.status().num_free_blocks
    both.abort("a")
    assert both.links["t-a"].cancelled
    assert both.decode.scheduler.status().num_free_blocks == reserved
    both.end_consumer("t-a", error="cancelled")
    assert both.decode.scheduler.status().num_free_blocks == 64


def test_what_is_offered_is_held_after_its_request_has_ended() -> None:
    both = pair()
    both.prefill.add(produce(make_request(prompt=30)))
    for _ in range(5):
        both.step(both.prefill)
    last = both.prefill.heard["a"].last
    assert last is not None
    assert last.finish_reason == "length"
    assert both.prefill.scheduler.status().num_free_blocks < 64
    both.end_producer("t-a", error="lease expired")
    assert both.prefill.scheduler.status().num_free_blocks == 64
    assert both.prefill.scheduler.status().transfers.expired == 1


def test_what_is_held_for_a_consumer_that_will_not_come_can_be_let_go() -> None:
    both = pair()
    both.prefill.add(produce(make_request(prompt=30)))
    for _ in range(5):
        both.step(both.prefill)
    scheduler = both.prefill.scheduler
    for name in ("another", "a"):
        assert scheduler.abort(name) is None
    withdrawals = [Withdraw(transfer_id="t-a", reason="aborted")]
    assert scheduler.transfers.take_orders() == withdrawals
    assert scheduler.status().num_free_blocks < 64
    both.end_producer("t-a", error="withdrawn: aborted")
    assert scheduler.status().num_free_blocks == 64
    scheduler.abort("a")
    assert scheduler.transfers.take_orders() == []


def test_no_more_is_offered_at_once_than_there_are_slots() -> None:
    both = pair(rows=64, seats=16, num_blocks=200)
    for number in range(SLOTS + 3):
        both.prefill.add(produce(make_request(f"r{number}", prompt=8)))
    for _ in range(5):
        both.step(both.prefill)
    assert sum(link.offer is not None for link in both.links.values()) == SLOTS
    both.end_producer("t-r0")
    both.step(both.prefill)
    assert sum(link.offer is not None for link in both.links.values()) == SLOTS + 1


def test_a_waiting_request_that_is_aborted_refuses_whoever_waits_for_it() -> None:
    both = pair()
    both.prefill.add(produce(make_request(prompt=8)))
    both.abort("a")
    assert both.links["t-a"].withdrawn == "aborted"


def test_whoever_lacks_a_block_waits_for_the_links_rather_than_take_theirs() -> None:
    both = pair(num_blocks=10, rows=2)
    both.prefill.add(make_request("local", prompt=4, max_tokens=24))
    both.step(both.prefill)
    both.prefill.add(produce(make_request("remote", prompt=24)))
    for _ in range(40):
        both.step(both.prefill)
    assert both.prefill.scheduler.status().num_preemptions == 0
    assert both.prefill.heard["remote"].last is not None, "nothing kept it from being read"
    assert both.prefill.heard["local"].last is None, "it waits"
    both.end_producer("t-remote")
    for _ in range(40):
        both.step(both.prefill)
    check_text(both.prefill.heard["local"])


def test_a_resumed_text_goes_on_where_it_was() -> None:
    both = pair(drafts=2)
    whole = make_request(prompt=10, max_tokens=20)
    written = tuple(solo(whole)[0][:7])
    resumed = msgspec.structs.replace(whole, output_token_ids=written)
    both.add(resumed, remote=True)
    both.add(msgspec.structs.replace(resumed, request_id="b"), remote=False)
    both.finish(random.Random(0))
    for name in ("a", "b"):
        heard = both.decode.heard[name]
        check_text(heard)
        assert heard.last is not None
        assert heard.last.metrics is not None
        assert heard.last.metrics.num_tokens == 20
        assert heard.last.metrics.at(Event.FIRST_TOKEN) is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output_token_ids": (1, 2, 3), "max_tokens": 3}, "written already"),
        ({"kv_policy": "sink_window"}, "stays where it is"),
    ],
)
def test_what_cannot_be_moved_is_refused(change: dict[str, Any], words: str) -> None:
    params = {key: change.pop(key) for key in ("kv_policy",) if key in change}
    request = msgspec.structs.replace(fetch(make_request(prompt=8, **params)), **change)
    with pytest.raises(PromptError, match=words):
        make(num_slots=1).add(request)


def test_an_engine_without_links_moves_nothing() -> None:
    with pytest.raises(PromptError, match="kv_transfer_config"):
        make().add(fetch(make_request(prompt=8)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_history_of_transfers_leaves_texts_whole_and_blocks_free(data: st.DataObject) -> None:
    draw = data.draw
    chance = random.Random(draw(st.integers(0, 10_000)))
    size = {"num_blocks": draw(st.integers(10, 40)), "rows": draw(st.integers(2, 24))}
    both = pair(
        flights=draw(st.sampled_from([1, 1, 2, 2])),
        async_scheduling=draw(st.booleans()),
        drafts=draw(st.sampled_from([0, 0, 3])),
        seats=draw(st.integers(1, 6)),
        adaptive=draw(st.booleans()),
        enable_prefix_caching=draw(st.booleans()),
        **size,
    )
    shared = tuple(range(100, 112))
    count = 0
    for _ in range(draw(st.integers(5, 40))):
        act = chance.randrange(10)
        if act == 0 and count < 12:
            tail = tuple(chance.randrange(7) for _ in range(chance.randint(1, 14)))
            head = shared[: chance.choice([0, 4, 8, 12])]
            request = make_request(
                f"r{count}",
                prompt=(*head, *tail),
                max_tokens=chance.randint(1, 12),
                eos_token_ids=(6,) if chance.random() < 0.3 else (),
                prompt_logprobs=0 if chance.random() < 0.2 else None,
            )
            if chance.random() < 0.25:  # an engine that reads for others may write too
                both.prefill.add(request)
            else:
                both.add(request, remote=chance.random() < 0.8)
            count += 1
        elif act == 1 and count and chance.random() < 0.4:
            both.abort(f"r{chance.randrange(count)}")
        elif act == 2:
            both.step(both.prefill)
        elif act == 3:
            both.step(both.decode)
        elif act in (7, 8, 9):
            run = both.prefill if chance.random() < 0.5 else both.decode
            {7: both.send, 8: lambda each: each.draft(), 9: both.receive}[act](run)
        elif act in (4, 5) and both.links:
            both.carry(chance.choice(sorted(both.links)), chance)
        elif act == 6 and both.links and chance.random() < 0.3:
            transfer_id = chance.choice(sorted(both.links))
            link = both.links[transfer_id]
            if link.fetch is not None and not link.consumer_ended:
                both.scribble(link)
                both.end_consumer(transfer_id, error="the link broke")
            elif link.offer is not None and not link.producer_ended and link.consumer_ended:
                both.end_producer(transfer_id, error="lease expired")
    both.finish(chance)
    for heard in both.decode.heard.values():
        check_text(heard)
    for heard in both.prefill.heard.values():
        if heard.request.produce is None:
            check_text(heard)

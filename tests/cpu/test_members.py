"""A router's members are the engines that live, however the router and the engines come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import cast

import pytest
from tests.doors import eventually
from tests.engines import FakeEngine

from paceline.actors.members import MemberKeeper, Wanted
from paceline.actors.router import Member, Router
from paceline.runtime.engine import EngineClient


class Members:
    """The part of a router that a keeper sees."""

    def __init__(self) -> None:
        self.there: dict[str, Member] = {}
        self.loses_all = False
        """Whether it loses its members just after it has been asked for them."""

    @property
    def member_ids(self) -> tuple[str, ...]:
        found = tuple(self.there)
        if self.loses_all:
            self.there.clear()
        return found

    def add_member(self, member: Member) -> None:
        self.there[member.engine_id] = member

    def drain_member(self, engine_id: str) -> None:
        del self.there[engine_id]

    def remove_member(self, engine_id: str) -> None:
        del self.there[engine_id]


@pytest.fixture
def router() -> Members:
    return Members()


@pytest.fixture
def keeper(router: Members) -> Iterator[MemberKeeper]:
    made = MemberKeeper(cast(Router, router), on_drained=str)
    yield made
    made.close()


def wanted(
    name: str, *, draining: bool = False, link: Callable[[], EngineClient] = FakeEngine
) -> Wanted:
    return Wanted(engine_id=name, role="both", draining=draining, link=link)


def test_an_engine_that_does_not_answer_yet_keeps_no_other_waiting(
    router: Members, keeper: MemberKeeper
) -> None:
    answers = threading.Event()

    def link() -> EngineClient:
        answers.wait(10.0)
        return FakeEngine()

    keeper.tell([wanted("restarting", link=link), wanted("ready")])
    assert eventually(lambda: set(router.there) == {"ready"})
    keeper.tell([wanted("restarting", link=link)])
    assert eventually(lambda: router.there == {})
    answers.set()
    assert eventually(lambda: set(router.there) == {"restarting"})


@pytest.mark.parametrize("then", [(), (wanted("a", draining=True),)], ids=["removed", "drained"])
def test_one_that_the_router_loses_at_the_same_time_stops_nothing(
    router: Members, keeper: MemberKeeper, then: tuple[Wanted, ...]
) -> None:
    keeper.tell([wanted("a")])
    assert eventually(lambda: set(router.there) == {"a"})
    router.loses_all = True
    keeper.tell(then)
    assert eventually(lambda: router.there == {})
    router.loses_all = False
    keeper.tell([wanted("b")])
    assert eventually(lambda: set(router.there) == {"b"})

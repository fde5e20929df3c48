"""Keeps a router's members those engines that live, whoever tells of them.

    tell(engines) ──> wanted ──> [one thread] ──> router.add_member, drain_member, remove_member
                         ^                            │
                         └── what the router has lost ┘  linked up with again, if it is still wanted

What is wanted is stated whole each time, so no message about a change can be missed. Each engine is
linked up with by a thread of its own: one whose ranks are being started anew does not answer for a while.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from paceline.actors.router import Member, Router
from paceline.runtime.engine import EngineClient
from paceline.runtime.errors import EngineError
from paceline.runtime.types import EngineRole

logger = logging.getLogger(__name__)

AGAIN_S = 1.0
"""How soon a member is linked up with again that was lost and should be there."""
CLOSE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An engine that a router shall know."""

    engine_id: str
    role: EngineRole
    draining: bool
    link: Callable[[], EngineClient]
    """Opens a way to it. Raises EngineError."""


class MemberKeeper:
    """For one router. Any thread may `tell`."""

    def __init__(self, router: Router, *, on_drained: Callable[[str], None]) -> None:
        """`on_drained` hears of engines that were draining and have nothing of this router's left."""
        self._router = router
        self._on_drained = on_drained
        self._wanted: dict[str, Wanted] = {}
        self._draining: set[str] = set()
        """Told to the router."""
        self._reported: set[str] = set()
        """Told to `on_drained`."""
        self._linking: set[str] = set()
        """Those that a thread is linking up with."""
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="members", daemon=True)
        self._thread.start()

    def tell(self, engines: Iterable[Wanted]) -> None:
        """All engines that live, from now on."""
        with self._changed:
            self._wanted = {each.engine_id: each for each in engines}
            self._changed.notify_all()

    def is_wanted(self, engine_id: str) -> bool:
        with self._changed:
            return engine_id in self._wanted

    def close(self) -> None:
        """The router is the caller's to close."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._changed:
                wanted = self._wanted
            try:
                self._reconcile(wanted)
            except EngineError:  # the router is closed or has lost its last member
                if self._closing.is_set():
                    return
            with self._changed:
                if self._wanted is wanted and not self._closing.is_set():
                    self._changed.wait(AGAIN_S)

    def _reconcile(self, wanted: dict[str, Wanted]) -> None:
        with self._changed:
            linking = set(self._linking)
        there = set(self._router.member_ids)  # now: who is linked up with by now is there
        for engine_id in there - wanted.keys():
            with contextlib.suppress(KeyError):  # the router has just lost it
                self._router.remove_member(engine_id)
        for each in wanted.values():
            if each.engine_id in linking:
                continue
            if each.draining:
                self._drain(each.engine_id, is_there=each.engine_id in there)
            elif each.engine_id not in there:
                self._link(each)
        self._draining &= wanted.keys()
        self._reported &= wanted.keys()

    def _drain(self, engine_id: str, *, is_there: bool) -> None:
        if is_there and engine_id not in self._draining:
            self._draining.add(engine_id)
            with contextlib.suppress(KeyError):  # the router has just lost it
                self._router.drain_member(engine_id)
        elif not is_there and engine_id not in self._reported:
            self._reported.add(engine_id)
            self._on_drained(engine_id)

    def _link(self, each: Wanted) -> None:
        with self._changed:
            self._linking.add(each.engine_id)
        name = f"link {each.engine_id}"
        threading.Thread(target=self._add, args=(each,), name=name, daemon=True).start()

    def _add(self, each: Wanted) -> None:
        """A thread's: it may wait for long."""
        try:
            client = each.link()
            try:
                self._router.add_member(Member(each.engine_id, each.role, client))
            except BaseException:
                client.close()
                raise
        except EngineError as error:
            if not self._closing.is_set():
                logger.warning("cannot link up with engine %s: %s", each.engine_id, error)
        finally:
            with self._changed:
                self._linking.discard(each.engine_id)

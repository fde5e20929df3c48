"""The engine's own thread or process: commands in, a step, news out, again.

    LinkServer ──Submit, Abort──> Engine.submit, abort
                                  Engine.poll: one step
    LinkServer <──Batch─────────  deltas, status

It ends when told to, or when the engine is lost; then every frontend is told why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from paceline.runtime.engine import Engine
from paceline.runtime.errors import EngineError
from paceline.runtime.link import LinkServer, Submit
from paceline.runtime.notes import Notes

logger = logging.getLogger(__name__)

IDLE_S = 0.2
"""How long an idle engine sleeps at most before it looks whether it is still wanted, and whether its
ranks live."""


def run_engine(
    engine: Engine,
    link: LinkServer,
    *,
    wanted: Callable[[], bool],
    notes: Notes | None = None,
) -> str | None:
    """Serve until `wanted` is false. Why the engine was lost, if it was. Closes both. `notes` are
    passed on."""
    lost = None
    wakers = () if engine.links is None else (engine.links.socket,)
    try:
        while wanted():
            for command in link.receive(wait_s=0.0 if engine.has_work else IDLE_S, wakers=wakers):
                if isinstance(command, Submit):
                    engine.submit(list(command.requests))
                else:
                    engine.abort(list(command.request_ids))
            if not engine.has_work:
                engine.check()
            link.send(
                engine.poll(),
                engine.status,
                stored=engine.scheduler.stored_blocks,
                urgent=engine.failure is not None,
            )
            for note in () if notes is None else notes.take():
                link.tell(note)
    except Exception as error:  # whatever it is, clients must hear of it rather than wait
        logger.exception("engine lost")
        lost = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        link.lost(lost)
    finally:
        engine.close()
        link.close()
    return lost

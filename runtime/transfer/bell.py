"""Something may have changed: look again."""

from __future__ import annotations

import asyncio


class Bell:
    """Wakes all who wait, and nobody who comes later. One event loop's.

    while not ready():  await bell.wait()      nothing is missed: no other task runs in between
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Until the next ring, under the caller's deadline."""
        await self._event.wait()

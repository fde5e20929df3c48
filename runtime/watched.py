"""Files that others replace while a program runs, such as the ones of a Kubernetes Secret."""

from __future__ import annotations

import os
from collections.abc import Iterable


class WatchedFiles:
    """Tells whether any of some files has changed: by inode, size and time, through links."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = tuple(paths)
        self._seen = self._look()

    def changed(self) -> bool:
        """Whether one is another than at the last call, or when this was made."""
        before, self._seen = self._seen, self._look()
        return before != self._seen

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  pathlib's costs more, and keys are looked at per call
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns

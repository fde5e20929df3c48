"""A process that ends with the one that started it, even if it loads or hangs just then."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable


def end_with_parent(*, grace_s: float, first: Callable[[], object] = lambda: None) -> None:
    """From now on this process, which `multiprocessing` has started, ends `grace_s` after its parent at
    the latest, and calls `first` before that. In a thread, as signals of the kernel's would come when
    the parent's thread ends that has started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "expected a process that multiprocessing has started"

    def wait() -> None:
        parent.join()
        time.sleep(grace_s)
        first()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()

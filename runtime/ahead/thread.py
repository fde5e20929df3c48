"""A drafter that is ahead in a thread of the engine's process, on the device of the target.

For one device, and for trying the schedule without processes. The two take turns where Python runs and
work side by side where torch does.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading

import torch

from paceline.parallel.mesh import Mesh
from paceline.runtime.ahead.channel import OrderReceiver, OrderSender
from paceline.runtime.ahead.drafting import AheadDrafter
from paceline.runtime.ahead.rank import serve
from paceline.runtime.config import EngineConfig
from paceline.runtime.loading import Loaded

END_S = 10.0
"""What the thread may take for the pass it is in."""


class DraftThread:
    """Satisfies `DraftRanks`. A thread that hangs cannot be ended: it is left behind."""

    def __init__(self, config: EngineConfig, mesh: Mesh, loaded: Loaded) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-")
        self._stopped = threading.Event()
        self.channel = OrderSender(
            f"ipc://{self._folder.name}/orders", num_ranks=1, watch=self._dead
        )
        self._thread = threading.Thread(
            target=self._run, args=(config, mesh, loaded), name="drafter", daemon=True
        )
        self._thread.start()

    def stacks(self) -> list[str]:
        return ["the drafter is a thread of this process"]

    def kill(self) -> None:
        self.close()

    def close(self) -> None:
        self._stopped.set()
        self.channel.close()
        self._thread.join(END_S)
        self._folder.cleanup()

    def _run(self, config: EngineConfig, mesh: Mesh, loaded: Loaded) -> None:
        channel = OrderReceiver(self.channel.address, rank=0)
        try:
            with _own_stream(mesh.device):
                serve(
                    AheadDrafter(config, loaded, rank=0),
                    channel,
                    mesh,
                    step_timeout_s=config.step_timeout_s,
                    alive=lambda: not self._stopped.is_set(),
                )
        finally:
            channel.close()

    def _dead(self) -> str | None:
        return None if self._thread.is_alive() else "the drafter's thread has ended"


def _own_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """On a GPU, a queue of work beside that of the target's thread, behind what has loaded the models."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(stream)

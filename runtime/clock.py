"""Measuring the stages of a step."""

from __future__ import annotations

import time

import torch


class StageClock:
    """Milliseconds between laps. On a GPU a lap waits for the work that this thread has queued so far,
    so that it is counted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        now = time.perf_counter()
        elapsed_ms = (now - self._last) * 1e3
        self._last = now
        return elapsed_ms

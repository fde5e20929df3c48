"""What reading, transferring and writing take on each engine, learnt while they serve.

    seconds = fixed + per_unit x units      of a prompt: tokens to read
                                            of a transfer: tokens that travel
                                            of a step: texts written side by side

Old observations fade, so that an engine that has become slower or faster is seen as it is. A prior
of little weight stands in for what has not been seen, and keeps the slope sane where all
observations are of one length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from paceline.runtime.types import Event, StepStats, TokenDelta

FADE = 1 / 12
"""The share of the past that each observation replaces."""
CLIP = 8.0
"""An observation beyond so many times what was expected counts as that much: it may be an accident,
and if it is not, the next ones will say so too."""
CLIP_FREE_S = 0.01
"""Below this nothing is clipped."""
RELIEF_S = 0.1
"""What takes so much less than expected, and less than a quarter of it, is believed at once: who is
thought to be slow is seldom asked, and would be thought so for long."""
SURE = 3
"""Observations before the estimate may call one an accident."""


class Line:
    """Seconds as a straight line over a size: exponentially fading least squares, with neither the
    fixed nor the growing part below zero."""

    def __init__(
        self, *, fixed_s: float, per_unit_s: float, scale: float, weight: float = 0.3
    ) -> None:
        """A prior that passes through the sizes 0 and `scale`."""
        self._prior = (fixed_s, per_unit_s, scale, weight)
        self._moments = [0.0] * 5
        self.num_seen = 0
        self.fixed_s, self.per_unit_s = fixed_s, per_unit_s

    def at(self, size: float) -> float:
        """Seconds for a size."""
        return self.fixed_s + self.per_unit_s * size

    def observe(self, size: float, seconds: float) -> None:
        """Learn from one case."""
        expected_s, kept = self.at(size), 1.0 - FADE
        if self.num_seen >= SURE:
            seconds = min(seconds, max(CLIP_FREE_S, CLIP * expected_s))
        if seconds < expected_s / 4 and expected_s - seconds > RELIEF_S:
            kept = 0.5
        self.num_seen += 1
        new = (1.0, size, seconds, size * size, size * seconds)
        self._moments = [kept * old + each for old, each in zip(self._moments, new, strict=True)]
        self._solve()

    def _solve(self) -> None:
        fixed_s, per_unit_s, scale, weight = self._prior
        w, x, y, xx, xy = self._moments
        half, end_s = weight / 2, fixed_s + per_unit_s * scale
        w += weight
        x += half * scale
        y += half * (fixed_s + end_s)
        xx += half * scale * scale
        xy += half * scale * end_s
        spread = w * xx - x * x
        slope = max(0.0, (w * xy - x * y) / spread) if spread > 0 else 0.0
        fixed = (y - slope * x) / w
        if fixed < 0:
            fixed, slope = 0.0, xy / xx
        self.fixed_s, self.per_unit_s = fixed, slope


def reading() -> Line:
    """Seconds to read a prompt, by its tokens that are not cached."""
    return Line(fixed_s=0.005, per_unit_s=2e-4, scale=1024)


def transferring() -> Line:
    """Seconds from the end of a remote prefill to the first token here, by tokens that travel."""
    return Line(fixed_s=0.01, per_unit_s=2e-6, scale=1024)


def stepping() -> Line:
    """Seconds of a step in which texts are only written, by their number."""
    return Line(fixed_s=0.02, per_unit_s=5e-4, scale=16)


ROWS_PER_TEXT = 16
"""A step with more rows for each of its requests reads a prompt."""


@dataclass(slots=True)
class MemberCosts:
    """Of one engine."""

    read: Line = field(default_factory=reading)
    step: Line = field(default_factory=stepping)

    def on_prefill(self, ended: TokenDelta) -> None:
        """A prompt was read there, from its first token on."""
        metrics = ended.metrics
        if metrics is None:
            return
        seconds = metrics.between(Event.SCHEDULED, Event.FIRST_TOKEN)
        num_read = metrics.num_prompt_tokens - metrics.num_cached_tokens
        if seconds is not None and num_read > 0:
            self.read.observe(num_read, seconds)

    def on_step(self, step: StepStats) -> None:
        if step.num_requests > 0 and step.num_rows <= ROWS_PER_TEXT * step.num_requests:
            self.step.observe(step.num_requests, step.seconds)


class DraftShares(NamedTuple):
    """The drafter beside its target, per token of a prompt."""

    of_bytes: float
    """Of all KV, the drafter's part."""
    of_work: float
    """Of the target's arithmetic, what the drafter needs."""


def draft_shares(fingerprint: Mapping[str, str]) -> DraftShares | None:
    """From the shapes that two engines compare before they exchange KV; None where they are not
    told."""
    try:
        target, draft = (_shape(fingerprint, prefix) for prefix in ("", "draft."))
    except (KeyError, ValueError):
        return None
    return DraftShares(draft[0] / (draft[0] + target[0]), draft[1] / target[1])


def _shape(fingerprint: Mapping[str, str], prefix: str) -> tuple[float, float]:
    """Bytes of KV and multiplications per token."""

    def number(name: str) -> int:
        return int(fingerprint[f"{prefix}config.{name}"])

    layers, width = number("num_hidden_layers"), number("hidden_size")
    kv = number("num_key_value_heads") * width // number("num_attention_heads")
    itemsize = 4 if fingerprint[f"{prefix}kv dtype"] == "float32" else 2
    work = 2 * width * width + 2 * width * kv + 3 * width * number("intermediate_size")
    return layers * kv * itemsize, layers * work


class OutputLength:
    """How many tokens a text is likely to get."""

    def __init__(self, prior: float = 128.0) -> None:
        self._mean = prior

    def expect(self, most: int) -> float:
        return min(self._mean, most)

    def observe(self, num_tokens: int) -> None:
        self._mean += FADE * (num_tokens - self._mean)

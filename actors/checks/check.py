"""One check: a function that looks at one thing and says how it is, within a deadline.

    ok        as it should be
    warning   works, but not as well as it could
    failed    Paceline will not work like this
    skipped   cannot be looked at here, or need not

A check that raises has failed; one that hangs too. Either says so and the next one runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from paceline.runtime.errors import PacelineError

Verdict = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found."""

    verdict: Verdict
    text: str
    advice: str = ""
    """What to do about it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same for machines: plain values."""


class Check(NamedTuple):
    """A function and what it is about."""

    name: str
    look: Callable[[], Finding]
    timeout_s: float = 20.0


class Checked(NamedTuple):
    """A check that has been made."""

    name: str
    finding: Finding
    seconds: float


def ok(text: str, **facts: Any) -> Finding:
    return Finding(verdict="ok", text=text, facts=facts)


def warning(text: str, advice: str, **facts: Any) -> Finding:
    return Finding(verdict="warning", text=text, advice=advice, facts=facts)


def failed(text: str, advice: str = "", **facts: Any) -> Finding:
    return Finding(verdict="failed", text=text, advice=advice, facts=facts)


def skipped(text: str) -> Finding:
    return Finding(verdict="skipped", text=text)


def make(check: Check) -> Checked:
    """Look, in a thread that is left behind if it does not come back."""
    found: list[Finding] = []
    began_s = time.monotonic()

    def look() -> None:
        try:
            found.append(check.look())
        except PacelineError as error:
            found.append(failed(str(error)))
        except Exception as error:  # whatever it is: the other checks shall be made
            found.append(failed(f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=look, name=f"check {check.name}", daemon=True)
    thread.start()
    thread.join(check.timeout_s)
    finding = (
        found[0]
        if found
        else failed(f"did not end within {check.timeout_s:.0f} s", "see what it waits for")
    )
    return Checked(check.name, finding, time.monotonic() - began_s)

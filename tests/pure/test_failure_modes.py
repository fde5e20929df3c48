"""The page of failure modes says what the code does: its log lines, flags, metrics and times are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from paceline.runtime.config import EngineConfig, FleetConfig, KvTransferConfig, ServerConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "deploy" / "failure-modes.md").read_text()
SPANS = [
    " ".join(span.split())
    for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.S))
]
FLAGS = sorted({word for span in SPANS for word in span.split() if word.startswith("--")})
LINES = sorted({span for span in SPANS if ("…" in span and span != "…") or span.endswith("hangs:")})
METRICS = sorted({span.removeprefix("paceline:") for span in SPANS if span.startswith("paceline:")})


def sources() -> str:
    """Our code, its strings joined and what they fill in replaced by an ellipsis."""
    files = [path for folder in ("runtime", "actors") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text() for path in sorted(files))
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    return re.sub(r"%\.?\d*[sdgf]|\{[^{}]*\}", "…", text)


SOURCES = sources()


@pytest.mark.parametrize("line", LINES)
def test_every_log_line_is_one_that_is_logged(line: str) -> None:
    assert line in SOURCES or line.replace("…:", "……:") in SOURCES


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_one_there_is(flag: str) -> None:
    if flag == "--temp-dir":  # Ray's
        return
    name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    known = {
        each
        for struct in (EngineConfig, ServerConfig, FleetConfig)
        for each in struct.__struct_fields__
    }
    assert name in known


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_one_that_is_exposed(metric: str) -> None:
    assert f'{metric.removesuffix("_total")}"' in SOURCES


def test_times_are_those_of_the_code() -> None:
    from paceline.actors import engine_set, supervisor
    from paceline.actors.frontends import http
    from paceline.runtime import async_llm, engine, link
    from paceline.runtime.schedule import scheduler

    def default(struct: type[msgspec.Struct], name: str) -> float:
        (found,) = (each.default for each in msgspec.structs.fields(struct) if each.name == name)
        return float(found)

    placed, loaded = (default(EngineConfig, f"{what}_timeout_s") for what in ("placement", "load"))
    step_s = default(EngineConfig, "step_timeout_s")
    for said in (
        f"`--load-timeout-s` ({loaded:g} s)",
        f"`--load-timeout-s` together ({placed + loaded:g} s)",
        f"`--step-timeout-s` ({step_s:g} s)",
        f"`--shutdown-timeout` ({default(ServerConfig, 'shutdown_timeout'):g} s)",
        f"`timeout_s` ({default(KvTransferConfig, 'timeout_s'):g} s)",
        f"`lease_s`, {default(KvTransferConfig, 'lease_s'):g} s",
        f"after {engine_set.BACKOFF_S[0]:g} s, then 2 s, up to {engine_set.BACKOFF_S[1]:g} s",
        f"within {supervisor.STEADY_S:g} s, up to {supervisor.BACKOFF_S[1]:g} s more",
        f"not turned for {supervisor.SILENT_S:g} s",
        f"silence, {link.SILENT_S:g} s after",
        f"answers 503 after {http.HEALTH_TIMEOUT_S:g} s",
        f"between {async_llm.RETRY_S[0]:g} and {async_llm.RETRY_S[1]:g} s",
        f"large for {scheduler.CAUTIOUS_S:g} s",
        f"within {http.TLS_REFRESH_S:g} s",
    ):
        assert said in " ".join(PAGE.split()), said
    assert (scheduler.GUILTY, scheduler.TRIED_ALONE, engine.MOST_IN_VAIN) == (3, 2, 5)

"""Paceline as a user starts it: a command, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.ray.cluster import Cluster, started_cluster

Command = Callable[..., subprocess.CompletedProcess[str]]


def environment(**extra: str) -> dict[str, str]:
    """That of somebody who activated our virtual environment and knows of no cluster."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**clean, "PATH": path, "RAY_AUTH_MODE": "disabled", **extra}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with two CPUs each, for all tests that want them."""
    with started_cluster(environment()) as started:
        yield started


@pytest.fixture
def paceline(tmp_path: Path) -> Command:
    """Run `paceline ARGS`; never longer than three minutes."""

    def run(*args: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "paceline", *args],
            capture_output=True,
            text=True,
            timeout=180,
            cwd=tmp_path,
            env=environment(**extra),
            check=False,
        )

    return run


@pytest.fixture
def pair_flags(tiny: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Flags for a tiny pair on two ranks, and two prompts."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [[3, 1, 4, 1, 5], [9, 2, 6]]
    prompts.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in lines))
    speculative = {
        "model": str(tiny(seed=0, noise=0.03)),
        "layer_parallel_size": 2,
        "draft_length": "fixed",
    }
    flags = {
        "--prompts-file": str(prompts),
        "--model": str(tiny(seed=0)),
        "--dtype": "float32",
        "--tensor-parallel-size": "2",
        "--speculative-config": json.dumps(speculative),
        "--max-tokens": "16",
    }
    return [part for flag in flags.items() for part in flag]


def leftovers(before: set[int]) -> list[str]:
    """Paceline and Ray processes that were not there before."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        text = " ".join(process.info["cmdline"] or [])
        if process.info["pid"] not in before and (
            "ray::" in text or "raylet" in text or "gcs_server" in text
        ):
            found.append(text[:80])
    return found


@pytest.fixture
def nothing_left_running() -> Any:
    """After the test, no process, no socket folder and no shared-memory file of ours is left."""
    before = {process.pid for process in psutil.process_iter()}
    files = set(Path("/dev/shm").glob("deepspeed_*")) | set(Path("/tmp").glob("paceline-*"))
    yield
    ending = [p for p in psutil.process_iter() if p.pid not in before and "ray" in p.name()]
    psutil.wait_procs(ending, timeout=10)
    assert leftovers(before) == []
    assert set(Path("/dev/shm").glob("deepspeed_*")) | set(Path("/tmp").glob("paceline-*")) <= files

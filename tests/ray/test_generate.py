"""`paceline generate` on a local Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from tests.ray.conftest import Command, environment

from paceline.actors.app import ray_llm
from paceline.runtime.types import SamplingParams

pytestmark = pytest.mark.usefixtures("nothing_left_running")


def test_generate_writes_the_same_tokens_with_and_without_speculation(
    paceline: Command, pair_flags: list[str], tmp_path: Path
) -> None:
    done = paceline("generate", *pair_flags, "--compare", "--output", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "tokens identical with and without speculation (2 prompts)" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["rounds"] < 15, "some drafts are accepted"
        assert line["accepted"] <= line["drafted"]


def test_more_ranks_than_devices_are_refused_with_what_each_node_has(
    paceline: Command, pair_flags: list[str]
) -> None:
    flags = ["64" if flag == "2" else flag for flag in pair_flags]
    done = paceline("generate", *flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    for part in ("64 ranks need 64 CPU", "this machine has", "lower tensor_parallel_size"):
        assert part in done.stderr


def test_a_damaged_model_is_refused_before_anything_starts(
    paceline: Command, pair_flags: list[str], tmp_path: Path
) -> None:
    started = time.monotonic()
    done = paceline("generate", *pair_flags, "--model", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nowhere" in done.stderr
    assert time.monotonic() - started < 60


def test_interrupting_ends_every_process(pair_flags: list[str], tmp_path: Path) -> None:
    flags = ["100000" if flag == "16" else flag for flag in pair_flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "paceline", "generate", *flags, "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment(),
    )
    assert process.stdout is not None
    deadline = time.monotonic() + 120
    while not any("Shard" in " ".join(p.cmdline()) for p in _children(process.pid)):
        assert time.monotonic() < deadline, "no shard came up"
        assert process.poll() is None, "the command ended by itself"
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def _children(pid: int) -> list[psutil.Process]:
    try:
        return [p for p in psutil.Process(pid).children(recursive=True) if p.is_running()]
    except psutil.NoSuchProcess:
        return []


def test_a_killed_shard_is_started_anew_and_every_text_goes_on(pair_flags: list[str]) -> None:
    given = dict(zip(pair_flags[::2], pair_flags[1::2], strict=True))
    with ray_llm(
        given["--model"],
        dtype="float32",
        tensor_parallel_size=2,
        speculative_config=json.loads(given["--speculative-config"]),
    ) as llm:
        jobs = llm.jobs(
            [{"prompt_token_ids": [1, 2, 3]}] * 50,
            SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True),
        )
        num_tokens: Counter[int] = Counter()
        for number, output in llm.stream(jobs):
            if not num_tokens:
                _kill_one_shard()
            num_tokens[number] += sum(len(part.token_ids) for part in output.outputs)
        assert num_tokens == dict.fromkeys(range(50), 200)
        assert llm.status().num_restarts == 1


def _kill_one_shard() -> None:
    """Whichever; the other then waits in a collective for a rank that will not come."""
    shards = [p for p in _children(os.getpid()) if "Shard" in " ".join(p.cmdline())]
    assert len(shards) == 2, [p.cmdline() for p in shards]
    shards[1].kill()

"""What `paceline submit` sends, and what it refuses before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from paceline.actors import jobs
from paceline.actors.cli import main


class SentJob:
    """Stands in for a job server, and remembers what came."""

    sent: Mapping[str, Any]

    def __init__(self, address: str) -> None:
        self.address = address

    def submit(self, entrypoint: str, *, runtime_env: Mapping[str, Any], job_id: str | None) -> str:
        folder = Path(runtime_env["working_dir"])
        SentJob.sent = {
            "entrypoint": entrypoint,
            "files": sorted(path.name for path in folder.iterdir()),
            "config": {path.name: path.read_text() for path in folder.glob("*.yaml")},
            "env": runtime_env["env_vars"],
        }
        return job_id or "made-up"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> type[SentJob]:
    monkeypatch.setattr(jobs, "Jobs", SentJob)
    return SentJob


def test_a_job_serves_unless_told_otherwise(server: type[SentJob]) -> None:
    assert main(["submit", "--no-wait"]) == 0
    assert server.sent["entrypoint"] == "python -m paceline serve"
    assert main(["submit", "--no-wait", "--", "--port", "8001"]) == 0
    assert server.sent["entrypoint"] == "python -m paceline serve --port 8001"
    assert main(["submit", "--no-wait", "--", "generate", "a b"]) == 0
    assert server.sent["entrypoint"] == "python -m paceline generate 'a b'"


def test_package_config_and_folder_are_sent_along(server: type[SentJob], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "prompts.jsonl").write_text("")
    (tmp_path / "work" / "my.yaml").write_text("seed: 1\n")
    (tmp_path / "my.yaml").write_text("seed: 2\n")
    flags = ["--config", str(tmp_path / "my.yaml"), "--working-dir", str(tmp_path / "work")]
    assert main(["submit", "--no-wait", *flags]) == 0
    assert server.sent["entrypoint"] == "python -m paceline serve --config my.yaml"
    assert server.sent["files"] == ["my.yaml", "paceline", "prompts.jsonl"]
    assert server.sent["config"] == {"my.yaml": "seed: 2\n"}, "the named one, not the folder's"


def test_without_upload_the_nodes_own_package_runs(server: type[SentJob]) -> None:
    assert main(["submit", "--no-wait", "--no-upload"]) == 0
    assert server.sent["files"] == []


def test_a_stopped_server_gets_its_time_before_it_is_killed(
    server: type[SentJob], tmp_path: Path
) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("shutdown_timeout: 99.5\n")
    assert main(["submit", "--no-wait", "--config", str(config)]) == 0
    assert server.sent["env"] == {"RAY_JOB_STOP_WAIT_TIME_S": "115"}


def test_the_environment_is_passed_by_name_or_by_value(
    server: type[SentJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_API_KEY", "secret")
    assert main(["submit", "--no-wait", "--env", "PACELINE_API_KEY", "--env", "A=b=c"]) == 0
    assert server.sent["env"]["PACELINE_API_KEY"] == "secret"
    assert server.sent["env"]["A"] == "b=c"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--", "dance"], "a job is one of serve, generate, check-lossless, found 'dance'"),
        (["--", "serve", "--prt", "1"], "unrecognized arguments: --prt"),
        (["--", "--config", "x.yaml"], "--config goes before the --"),
        (["--config", "/no/file.yaml"], "cannot read /no/file.yaml"),
        (["--working-dir", "/no/folder"], "--working-dir /no/folder: No such file"),
        (["--env", "PACELINE_UNSET"], "there is no PACELINE_UNSET in this environment"),
        (["--status", "a", "--", "serve"], "need a job's id and nothing to run"),
        (["--status", "a", "--stop", "a"], "not allowed with argument"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_sent(
    server: type[SentJob], flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *flags]) == 2
    line = capsys.readouterr().err
    assert reason in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("head:8265", "is like http://head:8265, found 'head:8265'"),
        ("http://127.0.0.1:9", "cannot reach the job server of Ray at http://127.0.0.1:9"),
    ],
)
def test_a_job_server_that_is_not_there_is_one_line(
    address: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "--address", address, "--status", "any"]) == 2
    line = capsys.readouterr().err
    assert reason in line
    assert line.count("\n") == 1

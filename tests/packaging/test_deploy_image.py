"""deploy/Dockerfile, as far as it can be checked without building it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy/Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEPS = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()


def stage(name: str) -> list[str]:
    """The instructions of a stage and of those it begins with."""
    start = next(i for i, step in enumerate(STEPS) if re.fullmatch(rf"FROM \S+ AS {name}", step))
    rest = STEPS[start + 1 :]
    end = next((i for i, step in enumerate(rest) if step.startswith("FROM ")), len(rest))
    base = STEPS[start].split()[1]
    known = any(step.endswith(f" AS {base}") for step in STEPS)
    return [*(stage(base) if known else []), *rest[:end]]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("no hadolint")
    done = subprocess.run(
        [hadolint, "--no-color", "-"], input=TEXT, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_pinned_to_a_patch_release_that_the_project_takes() -> None:
    (version,) = re.findall(r"^ARG PYTHON=(\d+\.\d+)\.\d+-slim-\w+$", TEXT, flags=re.MULTILINE)
    assert f">={version}" == PROJECT["requires-python"]
    assert TEXT.count(f"/usr/local/lib/python{version}/site-packages") == 4
    bases = {step.split()[1] for step in STEPS if step.startswith("FROM ")}
    stages = {step.split()[3] for step in STEPS if step.startswith("FROM ")}
    assert bases - stages == {"python:${PYTHON}", "scratch"}


def test_every_package_is_held_to_the_constraints() -> None:
    installs = re.findall(r"pip install .*?(?= && |$)", "\n".join(STEPS), flags=re.MULTILINE)
    assert installs
    assert [each for each in installs if "-c constraints.txt" not in each] == []


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        source
        for step in STEPS
        if step.startswith("COPY ") and "--from" not in step
        for source in step.split()[1:-1]
    }
    assert copied == kept
    assert [each for each in sorted(kept) if not (ROOT / each).exists()] == []


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_runs_as_nobody_in_particular_and_starts_the_server(target: str) -> None:
    steps = stage(target)
    users = [step.split()[1] for step in steps if step.startswith("USER ")]
    assert users == ["1000"]
    assert 'ENTRYPOINT ["tini", "--", "paceline"]' in steps
    assert "paceline" in PROJECT["scripts"]
    assert any(step.startswith("HEALTHCHECK ") for step in steps)
    copied = [step for step in steps if "--from=" in step]
    assert all(f"--from=build-{target} " in step for step in copied)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", TEXT))))
def test_modules_that_it_runs_exist(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_the_extra_it_installs_exists() -> None:
    extras = re.findall(r"'\.\[(\w+)\]'", TEXT)
    assert set(extras) == {"serve"}
    assert "serve" in PROJECT["optional-dependencies"]

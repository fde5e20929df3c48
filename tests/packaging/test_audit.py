"""The dependency audit fails for a vulnerability, and only for one; and never passes what it did not look up."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / ".ci" / "audit.py"


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("audit", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ALLOWED", tmp_path / "audit-allowed.txt")
    module.ALLOWED.write_text("CVE-2 only on Windows\n")
    return module


def package(name: str, *vulnerabilities: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "version": "1", "vulns": list(vulnerabilities)}


UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}
BAD = {"id": "PYSEC-9", "aliases": ["CVE-9"], "fix_versions": ["2"]}
ALLOWED = {"id": "PYSEC-2", "aliases": ["CVE-2"], "fix_versions": []}


@pytest.mark.parametrize(
    ("answers", "code", "words"),
    [
        ([[package("a"), package("b")]], 0, ["2 of 2 packages looked up at pypi", "CVE-2 in"]),
        ([[package("a", BAD), package("b")]], 1, ["VULNERABLE a 1: PYSEC-9, fixed in 2"]),
        ([[package("a", ALLOWED)]], 0, ["1 of 1"]),
        ([[package("a", ALLOWED, BAD)]], 1, ["VULNERABLE a 1: PYSEC-9"]),
        ([[package("a"), UNKNOWN]], 0, ["1 of 2", "NOT looked up: torch"]),
        ([[UNKNOWN], [package("a", BAD)]], 1, ["at osv", "VULNERABLE"]),
        ([None, [package("a")]], 0, ["1 of 1 packages looked up at osv"]),
        ([[UNKNOWN], None], 0, ["SKIPPED, no vulnerability service answers"]),
        ([None, None], 0, ["SKIPPED"]),
    ],
)
def test_what_the_services_answer_decides(
    audit: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answers: list[Any],
    code: int,
    words: list[str],
) -> None:
    left = iter(answers)

    def ask(service: str, *, timeout_s: float) -> Any:
        found = next(left)
        return None if found is None else {"dependencies": found}

    monkeypatch.setattr(audit, "ask", ask)
    assert audit.main() == code
    shown = capsys.readouterr().out
    assert all(each in shown for each in words)


def test_a_service_that_takes_too_long_or_answers_nonsense_is_none(
    audit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_long(command: list[str], **how: Any) -> None:
        raise subprocess.TimeoutExpired(command, how["timeout"])

    monkeypatch.setattr(audit.subprocess, "run", too_long)
    assert audit.ask("pypi", timeout_s=1) is None
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: None)
    assert audit.ask("pypi", timeout_s=1) is None, "it wrote no report"


def test_nothing_is_allowed_without_a_reason(audit: Any) -> None:
    assert audit.read_allowed("# none\nCVE-2 only on Windows  # really\n") == {
        "CVE-2": "only on Windows"
    }
    with pytest.raises(ValueError, match="CVE-1 is allowed without a reason"):
        audit.read_allowed("CVE-1 # a comment is none\n")


def test_the_list_of_the_repository_can_be_read(audit: Any) -> None:
    audit.read_allowed(PATH.with_name("audit-allowed.txt").read_text())
    assert sum(audit.TIMEOUTS_S.values()) < 60

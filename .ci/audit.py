"""Looks every pinned package up in a database of known vulnerabilities, and fails if one is found.

    constraints.txt ──pip-audit──> PyPI, else OSV ──> vulnerable: exit 1
                                                      nobody answers: said so, exit 0

pip-audit calls a package that the service does not know "skipped" and is content; an index without
the service knows none, and so would pass everything. What was not looked up is therefore counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PINS = ROOT / "constraints.txt"
ALLOWED = Path(__file__).with_name("audit-allowed.txt")
TIMEOUTS_S = {"pypi": 40, "osv": 15}
"""By service, in the order they are asked."""

Report = dict[str, Any]


def main() -> int:
    reasons = read_allowed(ALLOWED.read_text())
    for service, timeout_s in TIMEOUTS_S.items():
        report = ask(service, timeout_s=timeout_s)
        if report is None or not audited(report):
            continue
        return judge(report, reasons, service=service)
    print(
        "dependency audit: SKIPPED, no vulnerability service answers from here; nothing was looked up"
    )
    return 0


def ask(service: str, *, timeout_s: float) -> Report | None:
    """What pip-audit reports; None where it could not."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        command = [
            *(sys.executable, "-m", "pip_audit", "--requirement", str(PINS), "--no-deps"),
            *("--disable-pip", "--progress-spinner", "off", "--vulnerability-service", service),
            *("--timeout", "5", "--format", "json", "--output", str(output)),
        ]
        try:
            subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
            report: Report = json.loads(output.read_text())
        except (subprocess.TimeoutExpired, OSError, ValueError):
            return None
    return report


def audited(report: Report) -> list[Report]:
    """The packages that were looked up."""
    return [each for each in report["dependencies"] if "vulns" in each]


def judge(report: Report, reasons: dict[str, str], *, service: str) -> int:
    """Tell what was found. 1 if any of it is not allowed."""
    found, used = [], set()
    for package in audited(report):
        for vulnerability in package["vulns"]:
            names = {vulnerability["id"], *vulnerability.get("aliases", ())}
            used |= names & reasons.keys()
            if not names & reasons.keys():
                fixed = ", ".join(vulnerability.get("fix_versions", ())) or "nothing yet"
                found.append(
                    f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}"
                )
    total, looked_up = len(report["dependencies"]), len(audited(report))
    print(f"dependency audit: {looked_up} of {total} packages looked up at {service}")
    unknown = sorted(each["name"] for each in report["dependencies"] if "vulns" not in each)
    if unknown:
        print(f"dependency audit: NOT looked up: {', '.join(unknown)}")
    for name in sorted(reasons.keys() - used):
        print(f"dependency audit: {name} in {ALLOWED.name} is not found any more: take it out")
    for line in found:
        print(f"dependency audit: VULNERABLE {line}")
    return 1 if found else 0


def read_allowed(text: str) -> dict[str, str]:
    """Reasons by vulnerability. Raises ValueError for one without."""
    reasons = {}
    for line in text.splitlines():
        entry = line.partition("#")[0].strip()
        if entry:
            name, _, reason = entry.partition(" ")
            if not reason.strip():
                raise ValueError(f"{ALLOWED.name}: {name} is allowed without a reason")
            reasons[name] = reason.strip()
    return reasons


if __name__ == "__main__":
    sys.exit(main())

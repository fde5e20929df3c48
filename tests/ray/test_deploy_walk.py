"""deploy/README.md, walked: its commands one after the other, in a clean checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
from tests.packaging.deploy_readme import ROOT, blocks
from tests.ray.cluster import Cluster

from paceline.parallel.launch import free_port

LIMIT_S = 240
WALKED = {
    section: [block for block in found if block.use == "walked"]
    for section, found in groupby(blocks(), key=lambda block: block.section)
}
TEXTS = {"A Ray cluster": '"finish_reason":"length"', "Python": "Return"}
"""Something that the models wrote."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git has or would take, and nothing that was built from them."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def script(section: str, *, ports: dict[str, int]) -> str:
    """The blocks of a section as one program, on ports of our own."""
    parts = ["set -euo pipefail"]
    for number, block in enumerate(WALKED[section]):
        text = block.text
        for port, ours_instead in ports.items():
            text = text.replace(port, str(ours_instead))
        if block.language == "python":
            text = f"python - <<'BLOCK{number}'\n{text}BLOCK{number}\n"
        parts.append(text)
    return "\n".join(parts)


@pytest.mark.parametrize("section", ["A Ray cluster", "Python"])
def test_the_path_can_be_walked(section: str, cluster: Cluster, checkout: Path) -> None:
    http = free_port()
    done = subprocess.run(
        ["bash", "-c", script(section, ports={"8000": http, "50051": free_port()})],
        cwd=checkout,
        env={
            **cluster.env,
            "RAY_API_SERVER_ADDRESS": cluster.jobs,
            "PYTHONPATH": str(checkout / ".src"),
            "PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert TEXTS[section] in done.stdout
    cluster.assert_nothing_left(port=http)


def test_what_is_walked_is_all_that_needs_neither_cluster_nor_container() -> None:
    assert {section for section, found in WALKED.items() if found} == set(TEXTS)

"""What killed processes leave is taken away; what living ones have is not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from paceline.parallel import leftovers


def test_only_what_belongs_to_nobody_any_more_is_swept_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    pid, uid = int(gone.stdout), os.getuid()
    ours = leftovers.prefix()
    theirs = ours.replace(f"-{os.getpid()}-", f"-{pid}-")
    elsewhere = f"paceline-1-{pid}-x"
    for name in (f"{ours}x", f"{theirs}x", elsewhere, "paceline-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    shm = tmp_path / "shm"
    shm.mkdir()
    for name in (f"{pid}_{uid}", f"{os.getpid()}_{uid}", f"{pid}_{uid + 1}"):
        (shm / f"__KMP_REGISTERED_LIB_{name}").touch()
    assert leftovers.sweep(shm) == 2
    left = {path.name for path in tmp_path.iterdir()} - {"shm"}
    assert left == {f"{ours}x", elsewhere, "paceline-x"}
    assert {path.name.removeprefix("__KMP_REGISTERED_LIB_") for path in shm.iterdir()} == {
        f"{os.getpid()}_{uid}",
        f"{pid}_{uid + 1}",
    }

"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tests.tiny import save_tiny

# The same examples in every run, so that a failure is the change's; `--hypothesis-profile=random` looks for new ones.
# However busy the machine is: an example may take its time.
_patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", _patient, derandomize=True, database=None)
settings.register_profile("random", _patient)
settings.load_profile("repeatable")


# Several files at a time: what one leaves for another to find must not be looked at by a third.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="pt-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)


# Who runs the tests in the background of a shell has Ctrl-C ignored, and so would all processes of theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """What a test sets up to be logged, and where, is its own, and nothing that a fixture of a whole
    module has left."""
    root, ours = logging.getLogger(), logging.getLogger("paceline")
    logging.disable(logging.NOTSET)
    ours.setLevel(logging.NOTSET)
    ours.propagate = True
    logging.getLogger("paceline.requests").disabled = False
    handlers, level = list(root.handlers), root.level
    told = {key: value for key, value in os.environ.items() if key.startswith("PACELINE_LOG_")}
    yield
    for key in [key for key in os.environ if key.startswith("PACELINE_LOG_")]:
        del os.environ[key]
    os.environ.update(told)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a small random Llama; the same arguments give the same folder."""
    made: dict[str, Path] = {}

    def make(**shape: object) -> Path:
        name = "-".join(f"{key}_{value}" for key, value in sorted(shape.items())) or "plain"
        if name not in made:
            made[name] = save_tiny(tmp_path_factory.mktemp("tiny"), **shape)  # type: ignore[arg-type]
        return made[name]

    return make


@pytest.fixture(scope="session", params=[True, False], ids=["kernels", "torch"])
def native(request: pytest.FixtureRequest) -> bool:
    """Whether to compute with the compiled kernels: either form of what comes in two."""
    from paceline.runtime.layers.cpu_kernels import load_kernels

    if request.param and load_kernels() is None:
        pytest.skip("no C++ compiler")
    return bool(request.param)

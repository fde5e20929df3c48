"""Fixtures that every folder of tests may use."""

from __future__ import annotations

from collections.abc import Callable
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

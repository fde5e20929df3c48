"""The front door opens fast: nothing heavy is loaded before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import paceline

HEAVY = ("torch", "ray", "transformers", "numpy", "deepspeed", "fastapi", "grpc")


def loaded_by(module: str) -> set[str]:
    """Which heavy packages a fresh interpreter has after importing a module."""
    code = f"import sys, {module}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "paceline",
        "paceline.runtime.types",
        "paceline.runtime.config",
        "paceline.runtime.errors",
        "paceline.runtime.engine",
        "paceline.runtime.executor",
        "paceline.runtime.channel",
        "paceline.runtime.link",
        "paceline.runtime.engine_loop",
        "paceline.runtime.events",
        "paceline.runtime.stages",
        "paceline.runtime.logs",
        "paceline.runtime.tracing",
        "paceline.runtime.client",
        "paceline.runtime.sampling.params",
        "paceline.runtime.spec.ngram",
        "paceline.runtime.schedule.scheduler",
        "paceline.runtime.spec.tree",
        "paceline.runtime.spec.calibrate",
        "paceline.parallel.shard",
        "paceline.parallel.layer",
        "paceline.parallel.rank",
    ],
)
def test_pure_module_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(module) == set()


def test_coordinator_loads_ray_but_not_torch() -> None:
    loaded = loaded_by("paceline.actors.coordinator")
    assert "ray" in loaded
    assert not loaded & {"torch", "transformers", "deepspeed"}


def test_public_names_change_only_on_purpose() -> None:
    assert paceline.__all__ == [
        "LLM",
        "AsyncClient",
        "Client",
        "CompletionOutput",
        "RequestOutput",
        "SamplingParams",
        "StructuredOutputs",
        "__version__",
    ]


@pytest.mark.parametrize("name", paceline.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(paceline, name) is not None


def test_dir_shows_the_public_names() -> None:
    assert dir(paceline) == sorted(paceline.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'paceline' has no attribute 'Engine'"):
        _ = paceline.Engine

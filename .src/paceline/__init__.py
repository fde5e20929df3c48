"""Paceline: lossless speculative decoding on Ray, with a drafter whose layers run side by side.

The front door. Names resolve on first use, so that ``import paceline`` loads neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.runtime.client import AsyncClient, Client
    from paceline.runtime.llm import LLM
    from paceline.runtime.outputs import CompletionOutput, RequestOutput
    from paceline.runtime.types import SamplingParams, StructuredOutputs

__version__ = "0.1.0"

_HOMES = {
    "LLM": "paceline.runtime.llm",
    "AsyncClient": "paceline.runtime.client",
    "Client": "paceline.runtime.client",
    "CompletionOutput": "paceline.runtime.outputs",
    "RequestOutput": "paceline.runtime.outputs",
    "SamplingParams": "paceline.runtime.types",
    "StructuredOutputs": "paceline.runtime.types",
}

__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'paceline' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)

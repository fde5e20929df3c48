"""Finding a model and reading slices of its safetensors, without ever holding a whole tensor that
is not needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from paceline.runtime.errors import ModelError

EMBEDDED = "embedded"
"""The name of the pair that ships with the package: `embedded` is its target, `embedded/drafter`
its drafter."""

_EMBEDDED_FOLDERS = {
    EMBEDDED: "target",
    f"{EMBEDDED}/target": "target",
    f"{EMBEDDED}/drafter": "drafter",
}


def find_model(model: str) -> Path:
    """The folder of a local path, of the embedded pair, or of a hub id (downloaded on first use).

    Raises ModelError, in one line, for anything that leads to no folder.
    """
    if model in _EMBEDDED_FOLDERS:
        return Path(__file__).parent / "embedded" / _EMBEDDED_FOLDERS[model]
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"{model} is a file; a model is a Hugging Face folder with config.json and safetensors"
        )
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(f"no such model folder: {model}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]
            )
        )
    except Exception as error:  # whatever the hub or the network says, the user needs one line
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model} is neither a folder nor to be had from the hub: {reason}"
        ) from None


class Checkpoint:
    """The safetensors of one folder, single or sharded, opened lazily and read by slices."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._home = self._index()

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def read(self, name: str, *, rows: range | None = None, columns: range | None = None) -> Tensor:
        """A copy of a tensor, or of a contiguous block of its rows and columns, as stored.

        Raises ModelError where the tensor is missing or its file is damaged.
        """
        if name not in self._home:
            raise ModelError(f"{self.folder} lacks the tensor {name}")
        try:
            part = self._file(self._home[name]).get_slice(name)
            if len(part.get_shape()) == 1:
                block: Tensor = part[_slice(rows)]
            else:
                block = part[_slice(rows), _slice(columns)]
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{self.folder / self._home[name]} cannot be read: {error}") from None
        return block

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Raises ModelError where the stored shape is not what config.json promises."""
        if name not in self._home:
            raise ModelError(f"{self.folder} lacks the tensor {name}")
        found = list(self._file(self._home[name]).get_slice(name).get_shape())
        if found != list(shape):
            raise ModelError(
                f"{self.folder}: {name} has shape {found}, config.json says {list(shape)}"
            )

    def _index(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                home = dict(json.loads(index.read_text())["weight_map"].items())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{index} is damaged: {error}") from None
            missing = sorted({file for file in home.values() if not (self.folder / file).exists()})
            if missing:
                raise ModelError(f"{self.folder} lacks {', '.join(missing)}")
            return dict(home)
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{self.folder} has no safetensors files")
        return {name: file for file in files for name in self._file(file).keys()}  # noqa: SIM118

    def _file(self, name: str) -> Any:
        if name not in self._files:
            path = self.folder / name
            try:
                self._files[name] = safetensors.safe_open(path, framework="pt")
            except (safetensors.SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path} is truncated or no safetensors file ({path.stat().st_size} bytes): {error}"
                ) from None
        return self._files[name]


def _slice(part: range | None) -> slice:
    return slice(None) if part is None else slice(part.start, part.stop)

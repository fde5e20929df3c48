"""The code generated from .proto files is the code that is committed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).parents[2] / "proto"


def test_generated_code_is_what_the_proto_files_give(tmp_path: Path) -> None:
    folder = tmp_path / "paceline" / "proto"
    folder.mkdir(parents=True)
    names = sorted(path.name for path in PROTO.glob("*.proto"))
    for name in names:
        shutil.copy(PROTO / name, folder)
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I",
        ".",
        "--python_out=.",
        "--pyi_out=.",
    ]
    subprocess.run(
        [*command, *(f"paceline/proto/{name}" for name in names)],
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    made = {path.name: path.read_text() for path in folder.glob("*_pb2.py*")}
    kept = {path.name: path.read_text() for path in PROTO.glob("*_pb2.py*")}
    assert kept, "expected generated files in proto/"
    assert kept == made, "run `make proto`"


def test_generated_modules_import_beside_the_other_package_named_proto() -> None:
    code = "import proto, paceline.proto.vllm_engine_pb2 as v; print(v.DESCRIPTOR.package)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "vllm.grpc.engine"

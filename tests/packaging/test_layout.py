"""The tree keeps the promises its packaging rests on, and the wheel holds what it must."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("runtime", "actors", "parallel", "proto")
EMBEDDED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
READ_AT_RUN_TIME = {
    "runtime/layers/cpu_kernels.cpp",
    "runtime/layers/cpu_attention.h",
    "runtime/layers/cpu_pass.h",
    "runtime/layers/cpu_products.h",
    "runtime/layers/cpu_rows.h",
    "runtime/layers/cpu_vectors.h",
    "runtime/transfer/kernels.cpp",
    "actors/frontends/page.html",
}
"""Files that are no Python and that the package needs."""
TALKS_TO_TORCH_DISTRIBUTED = {"parallel/collectives.py", "parallel/launch.py"}


def sources(*folders: str) -> list[Path]:
    """Our Python files, in all folders or the given ones, each once although links lead there too."""
    wanted = folders or (*OURS, "tests", "benchmarks", "deploy", ".src", ".ci")
    found = {path.resolve() for folder in wanted for path in (ROOT / folder).rglob("*.py")}
    assert found, f"expected Python files in {wanted}"
    return sorted(found)


def imports(path: Path) -> Iterator[str]:
    """Every absolute module name a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(packages: set[str], paths: list[Path]) -> set[str]:
    """The files, relative to the root, that import one of the packages or anything inside them."""
    return {
        str(path.relative_to(ROOT))
        for path in paths
        for name in imports(path)
        if any(name == package or name.startswith(package + ".") for package in packages)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in a wheel built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=240,
    )
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_proto_is_no_regular_package() -> None:
    assert (ROOT / "proto").is_dir()
    assert not (ROOT / "proto" / "__init__.py").exists()


def test_top_level_name_proto_is_not_ours() -> None:
    code = "import importlib.util as u; s = u.find_spec('proto'); print(s.origin if s else 'none')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    origin = done.stdout.strip()
    assert origin == "none" or Path(origin).parent.parent.name == "site-packages"


@pytest.mark.parametrize("name", OURS)
def test_folder_imports_under_paceline(name: str) -> None:
    spec = importlib.util.find_spec(f"paceline.{name}")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (place,) = set(spec.submodule_search_locations)
    assert Path(place).resolve() == ROOT / name


def test_nothing_imports_our_folders_by_their_bare_names() -> None:
    assert offenders(set(OURS), sources()) == set()


def test_only_collectives_and_launch_talk_to_torch_distributed_and_deepspeed() -> None:
    found = offenders({"torch.distributed", "deepspeed"}, sources(*OURS))
    assert found == TALKS_TO_TORCH_DISTRIBUTED


def test_only_the_ends_of_grpc_import_proto() -> None:
    found = offenders({"paceline.proto"}, sources("runtime", "actors", "parallel"))
    assert {
        path
        for path in found
        if not path.startswith(("runtime/client/", "runtime/transfer/"))
        and path != "actors/frontends/grpc.py"
    } == set()


@pytest.mark.parametrize("package", ["pickle", "cloudpickle", "dill", "marshal", "shelve"])
def test_nothing_is_unpickled(package: str) -> None:
    assert offenders({package}, sources(*OURS)) == set()


def test_only_actors_import_ray() -> None:
    found = offenders({"ray"}, sources("runtime", "parallel"))
    assert found == set()


def test_only_handles_make_remote_calls() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in sources(*OURS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "remote"
        and not (isinstance(node.func.value, ast.Name) and node.func.value.id == "ray")
    }
    assert found == {"actors/handles.py"}


def test_no_file_is_named_after_nothing() -> None:
    vague = {"utils", "util", "common", "helpers", "misc"}
    assert [path for path in sources() if path.stem in vague] == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in sources(*OURS)
        if ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert silent == []


def test_wheel_holds_every_source_file(wheel: set[str]) -> None:
    wanted = {f"paceline/{path.relative_to(ROOT)}" for path in sources(*OURS)}
    assert "paceline/runtime/engine.py" in wanted
    assert wanted <= wheel


def test_wheel_holds_what_is_read_at_run_time(wheel: set[str]) -> None:
    assert {path for path in READ_AT_RUN_TIME if f"paceline/{path}" not in wheel} == set()


def test_wheel_holds_the_front_door(wheel: set[str]) -> None:
    assert {"paceline/__init__.py", "paceline/__main__.py", "paceline/py.typed"} <= wheel


@pytest.mark.parametrize("part", ["target", "drafter"])
def test_wheel_holds_the_embedded_pair(wheel: set[str], part: str) -> None:
    folder = f"paceline/runtime/models/embedded/{part}"
    assert {f"{folder}/{name}" for name in EMBEDDED_FILES} <= wheel


def test_wheel_holds_nothing_beside_the_package(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"paceline"}
    assert "paceline/proto/__init__.py" not in wheel

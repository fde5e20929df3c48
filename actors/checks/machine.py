"""This machine: software, devices, compilers, limits."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from paceline.actors.checks.check import Finding, failed, ok, warning

TOLD = ("torch", "ray", "transformers", "deepspeed", "grpcio")
"""Packages whose versions people ask for."""
MIN_SHM_BYTES = 2**30
MIN_FILES = 4096
MIN_FREE_BYTES = 2 * 2**30
CPUINFO, SHM = Path("/proc/cpuinfo"), Path("/dev/shm")


def packages() -> Finding:
    """Whether everything Paceline needs is installed, new enough."""
    versions = {"python": platform.python_version(), "paceline": _version("paceline") or "?"}
    versions |= {name: _version(name) or "missing" for name in TOLD}
    wrong = unmet(importlib.metadata.requires("paceline") or ())
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    if wrong:
        advice = f"pip install --upgrade {' '.join(repr(each) for each in wrong)}"
        return failed(f"{text}; missing or too old: {', '.join(wrong)}", advice, **versions)
    return ok(text, **versions)


def unmet(requirements: Iterable[str]) -> list[str]:
    """Those that what is installed does not meet; extras are left out."""
    wrong = []
    for line in requirements:
        each = Requirement(line)
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        version = _version(each.name)
        if version is None or not each.specifier.contains(version, prereleases=True):
            wrong.append(f"{each.name}{each.specifier}")
    return wrong


def devices() -> Finding:
    """GPUs, or else what the CPU can do."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        sizes = [torch.cuda.mem_get_info(i) for i in range(len(names))]
        text = "; ".join(
            f"cuda:{i} {name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
            for i, (name, (free, total)) in enumerate(zip(names, sizes, strict=True))
        )
        return ok(text, gpus=names, cuda=torch.version.cuda)
    num_cores, flags = os.cpu_count() or 1, cpu_flags()
    has = [name for name in ("avx512bw", "avx512_bf16", "amx_bf16") if name in flags]
    text = f"no GPU; {num_cores} cores with {', '.join(has) or 'none of AVX-512, bf16, AMX'}"
    facts = {"cores": num_cores, "flags": has, "gpus": []}
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return ok(f"{text}: bfloat16 is fast here", **facts)
    return warning(
        text,
        "models run in float32 here, which --dtype auto chooses: expect half the speed",
        **facts,
    )


def cpu_flags() -> frozenset[str]:
    """What the processor says that it can do; empty where nobody tells."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(found.partition(":")[2].split())


def compiler() -> Finding:
    """What kernels are compiled with, on their first use on a machine."""
    path = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return warning(
            "no C++ compiler",
            "install g++ (apt-get install g++): without it attention, KV transfers and sums over ranks "
            "run several times slower on a CPU",
        )
    done = subprocess.run(
        [path, "--version"], capture_output=True, text=True, timeout=10, check=False
    )
    line = (done.stdout.splitlines() or [path])[0]
    if shutil.which("ninja") is None and not _version("ninja"):
        return warning(f"{line}, no ninja", "pip install ninja: DeepSpeed compiles its sum with it")
    return ok(line, path=path)


def kernels() -> Finding:
    """Whether Paceline's own compile and load."""
    from paceline.runtime.layers import cpu_kernels
    from paceline.runtime.transfer import kernels

    loaded = {
        "attention": cpu_kernels.load_kernels() is not None,
        "KV transfer": kernels.load_kernels() is not None,
    }
    missing = [name for name, there in loaded.items() if not there]
    if missing:
        return warning(
            f"not compiled: {' and '.join(missing)}; the slower form is used",
            "the log has the compiler's words; XDG_CACHE_HOME must be a folder that can be written",
            **loaded,
        )
    return ok(f"{' and '.join(loaded)}: compiled and loaded", **loaded)


def limits() -> Finding:
    """Shared memory, open files, memory."""
    shm = shutil.disk_usage(SHM) if SHM.is_dir() else None
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = psutil.virtual_memory().available
    facts = {
        "shm_free_bytes": None if shm is None else shm.free,
        "open_files": num_files,
        "memory_free_bytes": free,
    }
    text = (
        f"/dev/shm {_gib(shm.free) if shm else 'missing'} free, "
        f"{'any number of' if num_files == resource.RLIM_INFINITY else num_files} open files, "
        f"{_gib(free)} of memory free"
    )
    advice = []
    if shm is None or shm.free < MIN_SHM_BYTES:
        advice.append(
            "give /dev/shm 1 GiB at least (docker run --shm-size, an emptyDir of medium Memory): ranks sum "
            "there and Ray keeps objects there"
        )
    if num_files != resource.RLIM_INFINITY and num_files < MIN_FILES:
        advice.append(f"ulimit -n {MIN_FILES}: every client's connection is an open file")
    if free < MIN_FREE_BYTES:
        advice.append("free some memory: weights and KV cache come on top of what is in use")
    return warning(text, "; ".join(advice), **facts) if advice else ok(text, **facts)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

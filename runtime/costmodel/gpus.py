"""GPUs, as their makers describe them, and what is assumed of all of them.

Figures are those of the data sheets: decimal gigabytes, dense bfloat16 without sparsity, links with both directions
together. What a program gets of them is less; the shares below are assumptions, and `paceline plan` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.runtime.errors import ConfigError

BANDWIDTH_SHARE = 0.8
"""Of the memory bandwidth, what reading weights and KV gets. Assumed."""
ARITHMETIC_SHARE = 0.6
"""Of the dense bfloat16 rate, what passes over many rows get. Assumed."""
NVLINK_LATENCY_S = 10e-6
PCIE_LATENCY_S = 40e-6
"""An all-reduce of few bytes among the GPUs of a node. Assumed; NCCL's published figures for small messages scatter
around them."""
NETWORK_LATENCY_S = 30e-6
"""What an all-reduce of few bytes takes longer where its ranks stand on several nodes. Assumed, for RDMA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU."""

    name: str
    memory_bytes: float
    bandwidth: float
    """Of its memory, bytes per second."""
    bf16_flops: float
    """Dense, per second."""
    link: float
    """To the other GPUs of its node, bytes per second, both directions together."""
    has_nvlink: bool
    source: str

    @property
    def read_rate(self) -> float:
        """Bytes per second that a pass reads."""
        return BANDWIDTH_SHARE * self.bandwidth

    @property
    def flops(self) -> float:
        """Operations per second of a pass over many rows."""
        return ARITHMETIC_SHARE * self.bf16_flops

    @property
    def all_reduce_latency_s(self) -> float:
        return NVLINK_LATENCY_S if self.has_nvlink else PCIE_LATENCY_S


def _gpu(
    name: str,
    *,
    gb: float,
    tb_s: float,
    tflops: float,
    nvlink: float = 0.0,
    pcie: float,
    source: str,
) -> Gpu:
    """In the units of data sheets: GB, TB/s, TFLOPS, GB/s."""
    return Gpu(
        name=name,
        memory_bytes=gb * 1e9,
        bandwidth=tb_s * 1e12,
        bf16_flops=tflops * 1e12,
        link=(nvlink or pcie) * 1e9,
        has_nvlink=nvlink > 0,
        source=source,
    )


GPUS = (
    _gpu(
        "B200",
        gb=180,
        tb_s=8.0,
        tflops=2250,
        nvlink=1800,
        pcie=128,
        source="NVIDIA HGX B200 data sheet (1,000 W)",
    ),
    _gpu(
        "H200",
        gb=141,
        tb_s=4.8,
        tflops=989,
        nvlink=900,
        pcie=128,
        source="NVIDIA H200 Tensor Core GPU data sheet (SXM)",
    ),
    _gpu(
        "H100",
        gb=80,
        tb_s=3.35,
        tflops=989,
        nvlink=900,
        pcie=128,
        source="NVIDIA H100 Tensor Core GPU data sheet (SXM)",
    ),
    _gpu(
        "H100-NVL",
        gb=94,
        tb_s=3.9,
        tflops=835,
        nvlink=600,
        pcie=128,
        source="NVIDIA H100 Tensor Core GPU data sheet (NVL)",
    ),
    _gpu(
        "H100-PCIe",
        gb=80,
        tb_s=2.0,
        tflops=756,
        pcie=128,
        source="NVIDIA H100 PCIe product brief PB-11133 (without bridges)",
    ),
    _gpu(
        "A100-80",
        gb=80,
        tb_s=2.039,
        tflops=312,
        nvlink=600,
        pcie=64,
        source="NVIDIA A100 Tensor Core GPU data sheet (SXM, 80 GB)",
    ),
    _gpu(
        "A100-40",
        gb=40,
        tb_s=1.555,
        tflops=312,
        nvlink=600,
        pcie=64,
        source="NVIDIA A100 Tensor Core GPU data sheet (SXM, 40 GB)",
    ),
    _gpu("L40S", gb=48, tb_s=0.864, tflops=362, pcie=64, source="NVIDIA L40S data sheet"),
    _gpu("L4", gb=24, tb_s=0.3, tflops=121, pcie=64, source="NVIDIA L4 data sheet"),
    _gpu("A10", gb=24, tb_s=0.6, tflops=125, pcie=64, source="NVIDIA A10 data sheet"),
    _gpu(
        "RTX-4090",
        gb=24,
        tb_s=1.008,
        tflops=165,
        pcie=64,
        source="NVIDIA Ada GPU architecture white paper (FP32 accumulation)",
    ),
)

_ALIASES = {"A100": "A100-80", "H100-SXM": "H100", "H200-SXM": "H200", "A100-80GB": "A100-80"}


def find_gpu(name: str) -> Gpu:
    """By its name, however written. Raises ConfigError for one that is not in the table."""
    wanted = name.upper().replace(" ", "-").replace("_", "-")
    wanted = _ALIASES.get(wanted, wanted)
    for gpu in GPUS:
        if gpu.name.upper() == wanted:
            return gpu
    raise ConfigError(f"unknown GPU {name!r}; known: {', '.join(gpu.name for gpu in GPUS)}")

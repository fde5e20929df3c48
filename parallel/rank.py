"""One rank's place among the others, as plain numbers: what is sent to a process so that it can
join. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What one rank must know to find the others."""

    rank: int
    local_rank: int
    """Its place among the ranks of its host."""
    local_size: int
    """How many ranks its host has: shared memory serves only where all are on one."""
    target_size: int
    """0 in a world that only drafts."""
    draft_size: int
    """0 in one without a draft model."""
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    device: str = "cpu"
    """"cpu" or "cuda"."""
    device_index: int = 0
    """Which of the GPUs that this process can see."""
    shared_memory: bool = True
    """Whether ranks of one CPU host may sum through memory that they share."""
    interleaved: bool = False
    """Whether ranks draft while they verify: the two then need collectives of their own."""
    num_threads: int | None = None
    """Of each rank on a CPU; its share of the host's cores among those of this engine if not given."""
    timeout_s: float = 120.0

    @property
    def world_size(self) -> int:
        return max(self.target_size, self.draft_size)

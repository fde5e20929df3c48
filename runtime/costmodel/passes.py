"""How long one forward pass takes: what it reads, what it computes, its collectives, its kernels' launches.

    device    attention  |  MLP  |  head     each the longer of reading its weights and KV, and its arithmetic
              + a fixed part per block + an all-reduce or two per layer
    host      so many launches per block, one after another

A pass takes the longer of the two. Launched one by one, small passes take what the host does; captured as CUDA graphs,
what the device does.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.parallel.layer import Groups, exact_groups
from paceline.runtime.costmodel.gpus import NETWORK_LATENCY_S, Gpu
from paceline.runtime.costmodel.memory import Held, held
from paceline.runtime.costmodel.shapes import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How kernels get to the device."""

    name: str
    attention_s: float = 12e-6
    """On the device beside reading and arithmetic, per attention block. Assumed."""
    mlp_s: float = 8e-6
    """Likewise per MLP."""
    attention_launches: int = 0
    mlp_launches: int = 0
    launch_s: float = 0.0
    """Of the host's time, each."""
    step_s: float = 0.0
    """Of a round, on the host: schedule, tell the ranks, hear from them. Assumed."""


GRAPHS = Execution(name="graphs", step_s=200e-6)
"""Captured as CUDA graphs."""
EAGER = Execution(
    name="eager", attention_launches=50, mlp_launches=11, launch_s=6e-6, step_s=200e-6
)
"""Operation by operation, as Paceline runs on GPUs today: launches counted in its layers, the time of each assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where ranks run."""

    gpu: Gpu
    execution: Execution
    gpus_per_node: int
    network: float
    """Between nodes, bytes per second of a GPU, one direction."""

    def all_reduce_s(self, num_bytes: float, *, ranks: int) -> float:
        """Among the first ranks: a latency, and what a ring sends."""
        if ranks == 1:
            return 0.0
        rate, latency_s = self.gpu.link / 2, self.gpu.all_reduce_latency_s
        if ranks > self.gpus_per_node:
            rate, latency_s = min(rate, self.network), latency_s + NETWORK_LATENCY_S
        return latency_s + 2 * (ranks - 1) / ranks * num_bytes / rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What goes through a pass."""

    rows: float
    """Tokens, of all sequences."""
    sequences: int
    context: float
    """Tokens that each row sees, on average."""
    outputs: float
    """Rows whose logits are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Seconds of a pass, by what takes them."""

    attention_s: float
    mlp_s: float
    head_s: float
    collectives_s: float
    launches_s: float
    """The host's; beside the device's, not on top."""
    busy_s: float
    """Of the device's time, reading and computing: what another pass beside this one cannot have as well. The rest is
    waiting, for other ranks or for a kernel to begin."""

    @property
    def device_s(self) -> float:
        return self.attention_s + self.mlp_s + self.head_s + self.collectives_s

    @property
    def total_s(self) -> float:
        return max(self.device_s, self.launches_s)


def split_pass(
    shape: Shape, load: Load, *, machine: Machine, ranks: int, groups: Groups | None = None
) -> Pass:
    """A model split over ranks by heads and feed-forward units; groups of layers are one wide layer each
    (placement `tensor`): one attention call and one sum for the group, an MLP and a sum for each layer."""
    groups = groups or exact_groups(shape.num_layers)
    sums = 1 + sum(1 + len(group) for group in groups) if ranks > 1 else 0
    return _pass(
        shape,
        held(shape, ranks=ranks, groups=groups),
        load,
        machine=machine,
        heads=shape.num_heads / ranks,
        attentions=len(groups),
        sums=sums,
        sum_s=machine.all_reduce_s(4 * load.rows * shape.hidden_size, ranks=ranks),
    )


def whole_pass(shape: Shape, load: Load, *, machine: Machine, ranks: int, groups: Groups) -> Pass:
    """A model that stands whole on every rank; of a group each rank runs the attention of the layers it owns, and the
    results are gathered (placement `layer`, EasySpec's): one gathering per group, every MLP on every rank."""
    whole = held(shape, ranks=1)
    turns = sum(-(-len(group) // ranks) for group in groups)
    gathered = [len(group) for group in groups if len(group) > 1 and ranks > 1]
    rows_bytes = 4 * load.rows * shape.hidden_size
    share = turns / shape.num_layers
    mine = Held(
        attention=int(share * whole.attention),
        mlp=whole.mlp,
        tables=whole.tables,
        head=whole.head,
        kv_per_token=int(share * whole.kv_per_token),
    )
    sums_s = sum(machine.all_reduce_s(count * rows_bytes, ranks=ranks) for count in gathered)
    return _pass(
        shape,
        mine,
        load,
        machine=machine,
        heads=share * shape.num_heads,
        attentions=turns,
        sums=len(gathered),
        sum_s=sums_s / len(gathered) if gathered else 0.0,
    )


def _pass(
    shape: Shape,
    part: Held,
    load: Load,
    *,
    machine: Machine,
    heads: float,
    attentions: int,
    sums: int,
    sum_s: float,
) -> Pass:
    """`heads`: query heads per layer here; `attentions`: calls; `sums`: collectives of `sum_s` each."""
    gpu, execution, layers = machine.gpu, machine.execution, shape.num_layers
    scores = 4 * layers * heads * shape.head_dim * load.rows * load.context  # and mixing values
    kv_bytes = part.kv_per_token * load.sequences * load.context

    def block_s(num_bytes: float, *, more_bytes: float = 0.0, more_flops: float = 0.0) -> float:
        flops = 2 * num_bytes / shape.itemsize * load.rows + more_flops
        return max((num_bytes + more_bytes) / gpu.read_rate, flops / gpu.flops)

    attention_s = block_s(part.attention, more_bytes=kv_bytes, more_flops=scores)
    mlp_s = block_s(part.mlp)
    launches = attentions * execution.attention_launches + layers * execution.mlp_launches + sums
    head_flops = 2 * part.head / shape.itemsize * load.outputs
    head_s = max(part.head / gpu.read_rate, head_flops / gpu.flops)
    return Pass(
        attention_s=attention_s + attentions * execution.attention_s,
        mlp_s=mlp_s + layers * execution.mlp_s,
        head_s=head_s,
        collectives_s=sums * sum_s,
        launches_s=launches * execution.launch_s,
        busy_s=attention_s + mlp_s + head_s,
    )


def side_by_side_speedup(
    attention_share: float, size: int, *, collective_share: float = 0.0
) -> float:
    """Of grouped layers over the same ones in turn, if attention takes this share of a layer's time and a gathering
    that of a layer."""
    return 1.0 / ((1 - attention_share) + attention_share / size + collective_share)


def drafting_speedup(grouped_speedup: float, num_drafts: int) -> float:
    """Of a round's drafting, whose first pass is exact."""
    return num_drafts / (1 + (num_drafts - 1) / grouped_speedup)

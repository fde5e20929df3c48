"""From a config to models on a rank: which part to read, in which dtype, with room for how many
tokens."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from paceline.parallel.collectives import Alone
from paceline.parallel.layer import Groups, check_groups, exact_groups, layer_groups
from paceline.parallel.mesh import Axis, Mesh
from paceline.runtime.config import EngineConfig, SpeculativeConfig
from paceline.runtime.errors import ConfigError
from paceline.runtime.models.arch import Architecture, context_length, read_architecture
from paceline.runtime.models.llama import load_decoder
from paceline.runtime.models.model import Model
from paceline.runtime.models.weights import Checkpoint, find_model
from paceline.runtime.spec.calibrate import Calibration
from paceline.runtime.spec.draft_model import DraftModel
from paceline.runtime.spec.layer_parallel import LayerParallel, Placement, Policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_target(config: EngineConfig, mesh: Mesh, *, num_regions: int) -> Model | None:
    """This rank's part of the target; None on a rank that only drafts."""
    if not mesh.target.member:
        return None
    folder = find_model(config.model)
    arch = read_architecture(folder)
    return _load(
        folder,
        arch,
        groups=exact_groups(arch.num_layers),
        axis=mesh.target,
        dtype=_target_dtype(config.dtype, arch, mesh.device),
        mesh=mesh,
        num_regions=num_regions,
        max_len=context_length(config.max_model_len, arch),
    )


def load_drafter(config: EngineConfig, mesh: Mesh, *, num_regions: int) -> DraftModel | None:
    """This rank's part of the drafter; None without speculation or on a rank that does not
    draft."""
    spec = config.speculative_config
    if spec is None or not mesh.draft.member:
        return None
    folder = find_model(spec.model)
    arch = read_architecture(folder)
    target = read_architecture(find_model(config.model))
    placement = Placement(spec.placement)
    # placement `layer`: every rank holds all of it, and the ranks meet only between layers
    axis = (
        mesh.draft if placement is Placement.TENSOR else Axis(size=1, index=0, collectives=Alone())
    )
    model = _load(
        folder,
        arch,
        groups=draft_groups(spec, arch),
        axis=axis,
        dtype=_drafter_dtype(spec.dtype, arch, mesh.device),
        mesh=mesh,
        num_regions=num_regions,
        max_len=context_length(config.max_model_len, target),
        vocab_size=target.vocab_size,
    )
    layer_parallel = LayerParallel(
        model.decoder,
        policy=Policy(spec.layer_parallel_policy),
        placement=placement,
        axis=mesh.draft,
    )
    return DraftModel(
        model,
        layer_parallel,
        calibration=Calibration(spec.calibration),
        axis=mesh.draft,
        vocab_size=target.vocab_size,
    )


def draft_groups(spec: SpeculativeConfig, arch: Architecture) -> Groups:
    """The drafter's groups of layers. Raises ConfigError for groups that do not fit the model."""
    try:
        if spec.layer_groups is not None:
            groups = check_groups(spec.layer_groups, num_layers=arch.num_layers)
        else:
            groups = layer_groups(
                arch.num_layers, size=spec.layer_parallel_size, exact=spec.exact_layers
            )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for group in groups:
        if arch.windows and len({arch.windows[layer] for layer in group}) > 1:
            raise ConfigError(
                f"layers {list(group)} have sliding windows of different sizes and cannot be grouped"
            )
    return groups


def _load(
    folder: Path,
    arch: Architecture,
    *,
    groups: Groups,
    axis: Axis,
    dtype: torch.dtype,
    mesh: Mesh,
    num_regions: int,
    max_len: int,
    vocab_size: int | None = None,
) -> Model:
    # products of a few rows are latency, not bandwidth, on a CPU: float32 attention is three times
    # as fast there
    kv_dtype = torch.float32 if mesh.device.type == "cpu" else dtype
    _check_room(
        arch, mesh.device, num_slots=num_regions * max_len, ranks=axis.size, width=kv_dtype.itemsize
    )
    decoder = load_decoder(
        Checkpoint(folder),
        arch,
        groups=groups,
        axis=axis,
        dtype=dtype,
        device=mesh.device,
        vocab_size=vocab_size,
    )
    return Model(
        decoder, num_regions=num_regions, max_len=max_len, kv_dtype=kv_dtype, device=mesh.device
    )


def _target_dtype(wanted: str, arch: Architecture, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type != "cpu":
        return DTYPES[arch.dtype]
    return torch.bfloat16 if arch.dtype == "bfloat16" and fast_bfloat16() else torch.float32


def _drafter_dtype(wanted: str, arch: Architecture, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        return DTYPES[wanted]
    # one row through small matrices: measured 4 us in float32 against 16 in bfloat16 (384 x 128)
    return torch.float32 if device.type == "cpu" else DTYPES[arch.dtype]


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _check_room(
    arch: Architecture, device: torch.device, *, num_slots: int, ranks: int, width: int
) -> None:
    heads = -(-arch.num_kv_heads // ranks)
    wanted = num_slots * arch.num_layers * heads * arch.head_dim * 2 * width
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    if wanted > free:
        raise ConfigError(
            f"a KV cache of {num_slots} tokens needs {wanted / 2**30:.1f} GiB on each rank, {free / 2**30:.1f} are "
            "free; lower max_model_len"
        )

"""From a config to models on a rank: which part to read, in which dtype, with room for how many KV
blocks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from paceline.parallel.collectives import Alone
from paceline.parallel.layer import Groups, check_groups, exact_groups, layer_groups
from paceline.parallel.mesh import Axis, Mesh
from paceline.runtime.config import EngineConfig, SpeculativeConfig, parse_bytes
from paceline.runtime.errors import ConfigError
from paceline.runtime.kv.pool import block_bytes
from paceline.runtime.layers.cpu_kernels import load_kernels, supports
from paceline.runtime.layers.flash import read_pages
from paceline.runtime.models.arch import Architecture, context_length, read_architecture
from paceline.runtime.models.graphs import Recorder, record_cuda
from paceline.runtime.models.llama import Decoder, load_decoder
from paceline.runtime.models.model import Model, units_of
from paceline.runtime.models.weights import Checkpoint, find_model
from paceline.runtime.sampling.grammar import GrammarCompiler
from paceline.runtime.spec.draft_model import DraftModel
from paceline.runtime.spec.layer_parallel import LayerParallel, Placement, Policy
from paceline.runtime.tokenizer import Tokenizer, has_tokenizer

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_KV_BYTES = 4 * 2**30
"""Of all ranks of a host together, where nothing is said; less where memory is short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a rank has, once every rank has it."""

    target: Model | None
    """None on a rank that only drafts."""
    draft_model: DraftModel | None
    """None without one or on a rank that does not draft."""
    num_blocks: int
    """KV blocks of each pool, the same on every rank."""
    vocab_size: int
    grouped: bool
    """Whether any layers of the draft model run side by side."""
    grammars: GrammarCompiler | None
    """Where tokens are chosen and the model has a tokenizer."""

    @property
    def is_small(self) -> bool:
        """Whether neither model leaves torch much to do in a step of few rows."""
        drafter = None if self.draft_model is None else self.draft_model.model
        return all(model.is_small for model in (self.target, drafter) if model is not None)


def load(config: EngineConfig, mesh: Mesh, *, target: Model | None = None) -> Loaded:
    """This rank's part of both models. All ranks must call it: they agree on the number of
    blocks. `target` is one already loaded, for several drafters to share in turn."""
    folder = find_model(config.model)
    arch = read_architecture(folder)
    max_len = context_length(config.max_model_len, arch)
    decoder = None if target is None else target.decoder
    if decoder is None and mesh.target.member:
        decoder = load_decoder(
            Checkpoint(folder),
            arch,
            groups=exact_groups(arch.num_layers),
            axis=mesh.target,
            dtype=_dtype(config.dtype, arch, mesh.device),
            device=mesh.device,
        )
    drafter, layer_parallel = _load_drafter(config, mesh, vocab_size=arch.vocab_size)
    if target is not None:
        num_blocks = target.pool.num_blocks
    else:
        decoders = [each for each in (decoder, drafter) if each is not None]
        num_blocks = _num_blocks(config, mesh, decoders, max_len=max_len)

    def model(decoder: Decoder, axis: Axis) -> Model:
        return Model(
            decoder,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_len=max_len,
            kv_dtype=_kv_dtype(decoder, mesh.device),
            device=mesh.device,
            shared=config.kv_transfer_config is not None,
            record=recorder(config, axis, mesh.device),
            attention=page_reader(config, decoder, mesh.device),
        )

    draft_model = None
    if drafter is not None and layer_parallel is not None:
        assert config.speculative_config is not None
        draft_model = DraftModel(
            model(drafter, mesh.draft),
            layer_parallel,
            axis=mesh.draft,
            max_rows=max(config.max_num_batched_tokens, config.max_num_seqs),
            rejection=config.speculative_config.verification == "rejection",
        )
    return Loaded(
        target=target if target is not None or decoder is None else model(decoder, mesh.target),
        draft_model=draft_model,
        num_blocks=num_blocks,
        vocab_size=arch.vocab_size,
        grouped=layer_parallel is not None and layer_parallel.any_group,
        grammars=_grammars(folder, vocab_size=arch.vocab_size) if mesh.rank0 else None,
    )


def recorder(config: EngineConfig, axis: Axis, device: torch.device) -> Recorder | None:
    """What records a model's passes of few rows, where that is wanted and can be: sums over ranks
    must be recorded too."""
    sums = axis.size == 1 or axis.collectives.name == "nccl"
    if config.enforce_eager or device.type != "cuda" or not sums:
        return None
    return record_cuda(device)


def page_reader(config: EngineConfig, decoder: Decoder, device: torch.device) -> str:
    """What reads this model's KV pages on a GPU; nothing where torch shall gather them. Raises
    ConfigError where `attention_backend` asks for what is not to be had."""
    wanted = config.attention_backend
    if wanted == "sdpa" or (wanted == "auto" and device.type == "cpu"):
        return ""
    dtype = decoder.groups[0].dtype
    try:
        return read_pages(decoder.arch, device, dtype=dtype, block_size=config.block_size)
    except ConfigError as error:
        if wanted != "auto":
            raise ConfigError(f"attention_backend {wanted}: {error}") from error
        logger.warning("attention goes through torch's own, over gathered KV: %s", error)
        return ""


def _grammars(folder: Path, *, vocab_size: int) -> GrammarCompiler | None:
    if not has_tokenizer(folder):
        return None
    return GrammarCompiler(Tokenizer(folder).fast, vocab_size=vocab_size)


def _load_drafter(
    config: EngineConfig, mesh: Mesh, *, vocab_size: int
) -> tuple[Decoder | None, LayerParallel | None]:
    spec = config.speculative_config
    if spec is None or not config.draft_size or not mesh.draft.member:
        return None, None
    folder = find_model(spec.model)
    arch = read_architecture(folder)
    placement = Placement(spec.placement)
    axis = mesh.draft
    if placement is Placement.LAYER:
        # every rank holds the whole drafter
        axis = Axis(size=1, index=0, collectives=Alone())
    decoder = load_decoder(
        Checkpoint(folder),
        arch,
        groups=draft_groups(spec, arch),
        axis=axis,
        dtype=_dtype(spec.dtype, arch, mesh.device),
        device=mesh.device,
        vocab_size=vocab_size,
    )
    policy = Policy(spec.layer_parallel_policy)
    return decoder, LayerParallel(decoder, policy=policy, placement=placement, axis=mesh.draft)


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


def _num_blocks(config: EngineConfig, mesh: Mesh, decoders: list[Decoder], *, max_len: int) -> int:
    """KV blocks that fit on every rank. Raises ConfigError where not even one longest request
    does."""
    each = sum(
        block_bytes(
            units_of(decoder),
            head_dim=decoder.arch.head_dim,
            block_size=config.block_size,
            dtype=_kv_dtype(decoder, mesh.device),
        )
        for decoder in decoders
    )
    room = _room(config, mesh)
    longest = -(-max_len // config.block_size)
    # more than every request at its longest, and as much again to remember prefixes by, is no use
    most = 2 * config.max_num_seqs * longest
    mine = min(room // each, most, 2**24 - 1) if each else most
    given = torch.tensor([mine], dtype=torch.float32, device=mesh.device)
    num_blocks = int(mesh.world.collectives.all_gather(given).min().item())
    if num_blocks < longest:
        raise ConfigError(
            f"the KV cache holds {num_blocks * config.block_size} tokens, a request of max_model_len "
            f"{max_len} needs more; lower max_model_len or raise "
            + ("gpu_memory_utilization" if mesh.device.type == "cuda" else "kv_cache_memory")
        )
    return num_blocks


def _room(config: EngineConfig, mesh: Mesh) -> int:
    """Bytes for KV on this rank."""
    if config.kv_cache_memory is not None:
        wanted = parse_bytes(config.kv_cache_memory, what="kv_cache_memory")
        if mesh.device.type == "cpu" and wanted > psutil.virtual_memory().available:
            free = psutil.virtual_memory().available / 2**30
            raise ConfigError(
                f"kv_cache_memory asks for {wanted / 2**30:.1f} GiB on each rank, {free:.1f} are free"
            )
        return wanted
    if mesh.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(mesh.device)
        return max(0, int(free - (1.0 - config.gpu_memory_utilization) * total))
    num_ranks = max(mesh.world.size, config.num_ranks)
    return min(CPU_KV_BYTES, psutil.virtual_memory().available // 4) // num_ranks


def _kv_dtype(decoder: Decoder, device: torch.device) -> torch.dtype:
    """The weights' own, where products of it are fast: on a CPU in bfloat16 only our kernels are."""
    dtype = decoder.groups[0].dtype
    head_dim = decoder.arch.head_dim
    if device.type == "cpu" and not (supports(device, dtype, head_dim=head_dim) and load_kernels()):
        return torch.float32
    return dtype


def _dtype(wanted: str, arch: Architecture, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type != "cpu":
        return DTYPES[arch.dtype]
    # float32 is a few microseconds faster for one row of a small matrix that is in the cache, and
    # three times slower for six rows or a matrix that is not
    return torch.bfloat16 if arch.dtype == "bfloat16" and fast_bfloat16() else torch.float32


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

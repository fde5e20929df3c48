"""Target and drafter as transformers has them, and the folder that comes of the drafter."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from paceline.runtime.config import make_config, reject_unknown
from paceline.runtime.errors import ConfigError, ModelError
from paceline.runtime.loading import DTYPES, fast_bfloat16
from paceline.runtime.models.arch import read_architecture
from paceline.runtime.models.weights import find_model
from paceline.runtime.preflight import Facts, examine
from paceline.runtime.spec.distill.settings import Settings

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def check_models(settings: Settings) -> Facts:
    """What is known of the target. Raises ModelError where target and drafter cannot be a pair, or
    ConfigError where a window is longer than a model sees."""
    values: dict[str, object] = {"model": settings.target}
    if settings.drafter is not None:
        values["speculative_config"] = {"model": settings.drafter}
    facts = examine(make_config(values))
    folders = [settings.target] + ([settings.drafter] if settings.drafter else [])
    for folder in folders:
        arch = read_architecture(find_model(folder))
        seen = min([arch.max_position, *(window for window in arch.windows if window)])
        if settings.length > seen:
            raise ConfigError(f"length {settings.length}, but {folder} sees {seen} tokens")
    return facts


def load_target(settings: Settings, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model to imitate, frozen."""
    return _load(find_model(settings.target), device=device, dtype=dtype).requires_grad_(False)


def load_drafter(settings: Settings, *, device: torch.device) -> PreTrainedModel:
    """The model to train, in float32. Raises ConfigError for a shape that cannot be."""
    if settings.drafter is not None:
        return _load(find_model(settings.drafter), device=device, dtype=torch.float32)
    config = _shaped(settings)
    torch.manual_seed(settings.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=_attention(device)
    )
    return model.to(device).eval()


def save_drafter(drafter: PreTrainedModel, settings: Settings) -> None:
    """A folder that Paceline, transformers and vLLM load. Casts `drafter` itself, to what it came
    from or its target is stored in: training is over."""
    output, target = Path(settings.output), find_model(settings.target)
    stored = read_architecture(find_model(settings.drafter or settings.target)).dtype
    drafter.to(DTYPES[stored]).save_pretrained(output)
    for name in TOKENIZER_FILES:
        if (target / name).exists():
            shutil.copyfile(target / name, output / name)


def pick_device(settings: Settings) -> torch.device:
    """Raises ConfigError for a GPU that is not there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no GPU here")
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def pick_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """Of products."""
    if settings.dtype == "auto":
        fast = device.type == "cuda" or fast_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


def _load(folder: Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=_attention(device)
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from None
    return model.to(device).eval()  # nothing drops out: the drafter is trained as it will run


def _attention(device: torch.device) -> str:
    # torch's fused attention is ten times slower here than written-out products where heads are small,
    # windows short and cores shared
    return "eager" if device.type == "cpu" else "sdpa"


def _shaped(settings: Settings) -> PreTrainedConfig:
    base = AutoConfig.from_pretrained(find_model(settings.target))
    values, shape = base.to_dict(), settings.shape or {}
    reject_unknown(shape, tuple(values), what="key of shape")
    for per_layer in ("layer_types", "max_window_layers"):
        values.pop(per_layer, None)
    try:
        config: PreTrainedConfig = type(base)(**(values | shape))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"shape: {' '.join(str(error).split())}") from None
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"shape: {config.num_attention_heads} heads cannot share {config.num_key_value_heads} KV heads"
        )
    if config.vocab_size != base.vocab_size:
        raise ConfigError(f"shape: vocab_size is the target's, {base.vocab_size}")
    return config

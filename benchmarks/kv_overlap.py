"""How much of a transfer is left when the prompt has been read, for prompts of several lengths.

    prefill     on the engine that reads: from its first step to its first token, by its own clock
    un-overlapped   from the client's hearing of that first token to its hearing of it from the engine
                    that writes: everything that reading elsewhere adds after the prompt is read

Two engines of one rank each on this machine, KV over gRPC on loopback, a random model whose context is
long enough. Part of `benchmarks.kv`.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks import report
from paceline.runtime.config import make_config
from paceline.runtime.link import LinkClient
from paceline.runtime.local import connect
from paceline.runtime.preflight import examine
from paceline.runtime.types import Event, KvFetch, KvProduce, Request, SamplingParams, TokenDelta

LENGTHS = (512, 1024, 2048, 4096, 8192)
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
"""32 KiB of KV for each token, 100 million multiplications."""
WAIT_S = 120.0


def overlap(made: report.Report, *, rounds: int, lengths: tuple[int, ...] = LENGTHS) -> None:
    """One row for each prompt; the ratio is the worst length's median."""
    with tempfile.TemporaryDirectory() as folder:
        _save_random(Path(folder))
        with _engine(folder, "prefill") as prefill, _engine(folder, "decode") as decode:
            _ask(prefill, decode, length=256, seed=999)  # warm
            for number in range(rounds):
                for length in lengths:
                    row = _ask(prefill, decode, length=length, seed=number)
                    made.rows.append({"what": "overlap", "round": number, **row})
    rows = [row for row in made.rows if row["what"] == "overlap"]
    shares = {
        length: median(row["unoverlapped_share"] for row in rows if row["tokens"] == length)
        for length in lengths
    }
    made.ratios["unoverlapped_share"] = max(shares.values())
    made.notes["unoverlapped_share by prompt tokens"] = {
        str(length): round(share, 4) for length, share in shares.items()
    }


def _save_random(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    width, heads = SHAPE["hidden_size"], SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    ff, generator = SHAPE["intermediate_size"], torch.Generator().manual_seed(0)

    def weight(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * 0.05).bfloat16()

    tensors = {
        "model.embed_tokens.weight": weight(SHAPE["vocab_size"], width),
        "model.norm.weight": torch.ones(width).bfloat16(),
    }
    for layer in range(SHAPE["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": torch.ones(width).bfloat16(),
            prefix + "post_attention_layernorm.weight": torch.ones(width).bfloat16(),
            prefix + "mlp.gate_proj.weight": weight(ff, width),
            prefix + "mlp.up_proj.weight": weight(ff, width),
            prefix + "mlp.down_proj.weight": weight(width, ff),
        }
        for name, size in (("q", (heads, width)), ("k", (heads, width)), ("v", (heads, width))):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = weight(*size)
        tensors[prefix + "self_attn.o_proj.weight"] = weight(width, heads)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SHAPE))


@contextmanager
def _engine(folder: str, name: str) -> Iterator[LinkClient]:
    config = make_config(
        {
            "model": folder,
            "distributed_executor_backend": "mp",
            "kv_cache_memory": "1GiB",
            "kv_transfer_config": {"engine_id": name, "data_plane": "grpc"},
        }
    )
    client = connect(config, examine(config))
    try:
        _wait(client, lambda: bool(client.status().links.addresses))
        yield client
    finally:
        client.close()


def _ask(prefill: LinkClient, decode: LinkClient, *, length: int, seed: int) -> report.Row:
    """One prompt that is read on one engine for the other."""
    choices, transfer_id = random.Random(f"{length} {seed}"), uuid.uuid4().hex
    request = Request(
        request_id=transfer_id,
        prompt_token_ids=tuple(choices.randrange(4096) for _ in range(length)),
        params=SamplingParams(temperature=0.0, ignore_eos=True),
        seed=0,
        max_tokens=4,
    )
    produce = KvProduce(transfer_id=transfer_id, lease_s=WAIT_S)
    fetch = KvFetch(
        transfer_id=transfer_id,
        addresses=_links(prefill),
        lease_s=WAIT_S,
        timeout_s=WAIT_S,
        recompute=False,
    )
    before = _settled(decode)
    decode.submit([msgspec.structs.replace(request, fetch=fetch)])
    prefill.submit([msgspec.structs.replace(request, produce=produce, max_tokens=1)])
    read = _first(prefill, request)
    read_at_s = time.perf_counter()
    written = _first(decode, request)
    late_s = time.perf_counter() - read_at_s
    assert written.error is None, written.error
    _end(decode, request)
    after = _settled(decode)
    assert read.metrics is not None
    prefill_s = read.metrics.between(Event.SCHEDULED, Event.FIRST_TOKEN)
    assert prefill_s is not None
    return {
        "tokens": length,
        "prefill_s": prefill_s,
        "unoverlapped_s": late_s,
        "unoverlapped_share": late_s / prefill_s,
        "link_unoverlapped_s": after.unoverlapped_s - before.unoverlapped_s,
        "megabytes": (after.num_bytes - before.num_bytes) / 1e6,
    }


def _links(client: LinkClient) -> tuple[str, ...]:
    return client.status().links.addresses


def _settled(client: LinkClient) -> Any:
    """Totals of transfers once none is under way."""
    _wait(client, lambda: not client.status().transfers.fetching)
    deadline = time.monotonic() + 0.3  # a status comes ten times per second
    while time.monotonic() < deadline:
        client.poll(0.1)
    return client.status().transfers


def _first(client: LinkClient, request: Request) -> TokenDelta:
    """A request's first words."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for delta in client.poll(1.0):
            if delta.request_id == request.request_id and (delta.token_ids or delta.finish_reason):
                return delta
    raise SystemExit(f"no token in {WAIT_S:g} s")


def _end(client: LinkClient, request: Request) -> None:
    client.abort([request.request_id])
    _wait(client, lambda: client.status().num_running == 0)


def _wait(client: LinkClient, done: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {WAIT_S:g} s for an engine")
        client.poll(0.05)

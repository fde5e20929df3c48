"""How near a step on one GPU comes to what its memory allows, and what layer parallelism saves there.

In process, without Ray, random weights of published shapes, so that no file need be had:

    decode    Llama 3.1 8B's shape, bfloat16, one request: a pass, its logits, the best token read by
              the host, as in a step of the engine; launched anew and played from a graph, with KV
              gathered and with pages that FlashAttention reads, where that is to be had
    bound     the bytes that such a pass must read, at the bandwidth of a copy on the device
    draft     Llama 3.2 1B's shape: a round of 5 drafts, exact and with layers side by side, with
              graphs and without; the host reads once at the end

Where there is no GPU it runs a small shape on the CPU: that shows that it runs, and no more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import report
from paceline.parallel.collectives import Alone
from paceline.parallel.layer import Groups, exact_groups, layer_groups
from paceline.parallel.mesh import Axis
from paceline.runtime.costmodel.shapes import SHAPES, Shape
from paceline.runtime.errors import ConfigError
from paceline.runtime.inputs import Segment
from paceline.runtime.kv.pool import BlockTable
from paceline.runtime.layers.flash import read_pages
from paceline.runtime.models.arch import Architecture, Rope
from paceline.runtime.models.graphs import record_cuda
from paceline.runtime.models.llama import Decoder, load_decoder
from paceline.runtime.models.model import Model
from paceline.runtime.models.weights import Checkpoint
from paceline.runtime.spec.layer_parallel import LayerParallel, Placement, Policy

EXPECTED = {"decode_over_copy_bound": (">=", 0.8)}
BLOCK_SIZE = 256
"""What torch's own FlashAttention can read."""
CONTEXT = 256
"""Tokens in the KV before the first that is timed."""
DRAFTS = 5

LLAMA_8B, LLAMA_1B = SHAPES["Llama-3.1-8B"], SHAPES["Llama-3.2-1B"]


def small(shape: Shape) -> Shape:
    """The same with a hundredth of the weights."""
    return replace(
        shape,
        vocab_size=4096,
        hidden_size=shape.hidden_size // 8,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        ff_size=shape.ff_size // 8,
    )


def architecture(shape: Shape) -> Architecture:
    """A Llama of this shape."""
    return Architecture(
        family="llama",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        ff_size=shape.ff_size,
        norm_eps=1e-5,
        max_position=131072,
        rope=Rope(theta=500000.0),
        tied_embeddings=shape.tied_embeddings,
        dtype="bfloat16",
    )


class Noise(Checkpoint):
    """Random weights of any shape, made where they are wanted."""

    def __init__(self, arch: Architecture, device: torch.device) -> None:
        self.folder = Path("noise")
        self._arch, self._device = arch, device
        self._random = torch.Generator(device).manual_seed(0)

    def __contains__(self, name: str) -> bool:
        return True

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """All shapes are as they should be."""

    def read(self, name: str, *, rows: range | None = None, columns: range | None = None) -> Tensor:
        arch, heads = self._arch, self._arch.num_heads * self._arch.head_dim
        if "norm" in name:
            return torch.ones(arch.hidden_size, device=self._device)
        inputs = {"o_proj": heads, "down_proj": arch.ff_size}.get(
            name.split(".")[-2], arch.hidden_size
        )
        num_rows = arch.hidden_size if rows is None else len(rows)
        num_columns = inputs if columns is None else len(columns)
        weight = torch.randn(
            num_rows, num_columns, device=self._device, generator=self._random, dtype=torch.float32
        )
        return weight * inputs**-0.5


class Request:
    """One, with a context that nobody has computed: its keys and values are zeros."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._table = BlockTable()
        self._table.extend(range(model.pool.num_blocks))

    def token(self, run: Callable[..., Tensor], token_T: Tensor, *, position: int) -> Tensor:
        """The best token after this one, `[1]`, on the device."""
        segment = Segment(num_rows=1, end=position + 1, table=self._table)
        h_TE = run(self._model.rows(token_T, [segment]))
        return self._model.decoder.logits(h_TE).argmax(-1)


class Text(Request):
    """One that goes on, token by token."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._latest_T, self._position = model.tokens([1]), CONTEXT

    def step(self) -> None:
        """A pass, its logits, and the best token on the host."""
        run = self._model.decoder.exact
        self._latest_T = self.token(run, self._latest_T, position=self._position)
        self._latest_T.tolist()
        self._position += 1


class Way(NamedTuple):
    """How passes are run."""

    played: bool
    attention: str
    """What reads pages; nothing where they are gathered."""


def make_model(decoder: Decoder, device: torch.device, way: Way) -> Model:
    return Model(
        decoder,
        num_blocks=CONTEXT * 4 // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        max_len=1024,
        kv_dtype=decoder.groups[0].dtype,
        device=device,
        record=record_cuda(device) if way.played else None,
        attention=way.attention,
    )


def make_decoder(shape: Shape, device: torch.device, *, groups: Groups) -> Decoder:
    arch = architecture(shape)
    return load_decoder(
        Noise(arch, device),
        arch,
        groups=groups,
        axis=Axis(size=1, index=0, collectives=Alone()),
        dtype=torch.bfloat16,
        device=device,
    )


def copied_per_s(device: torch.device, *, num_bytes: int) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.ones(num_bytes // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    seconds = timed(device, lambda: target.copy_(source), repeats=20)
    return 2 * num_bytes / median(seconds)


def timed(device: torch.device, run: Callable[[], object], *, repeats: int) -> list[float]:
    found = []
    for number in range(repeats + 3):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if number >= 3:
            found.append(time.perf_counter() - start)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def must_read(shape: Shape) -> int:
    """Bytes of a pass of one row: all weights but those of the embedding that are no head's, and the
    KV of the context."""
    layers = shape.num_layers * (shape.attention_params + shape.mlp_params)
    weights = (layers + shape.embedding_params) * shape.itemsize
    return weights + CONTEXT * shape.kv_bytes_per_token


def decode(device: torch.device, shape: Shape, *, tokens: int) -> list[report.Row]:
    """Seconds per token, launched and played."""
    decoder = make_decoder(shape, device, groups=exact_groups(shape.num_layers))
    rows = []
    for way in ways(device, decoder):
        model = make_model(decoder, device, way)
        rows.append(row("token", way, timed(device, Text(model).step, repeats=tokens)))
    return rows


def draft(device: torch.device, shape: Shape, *, rounds: int) -> list[report.Row]:
    """Seconds per round of drafts, exact and side by side, launched and played."""
    decoder = make_decoder(shape, device, groups=layer_groups(shape.num_layers, size=4))
    rows = []
    for way in ways(device, decoder):
        model = make_model(decoder, device, way)
        request, first = Request(model), model.tokens([1])
        forms: dict[str, Callable[..., Tensor]] = {"exact": decoder.exact}
        for policy in Policy:
            forms[f"N = 4, {policy.value}"] = LayerParallel(
                decoder, policy=policy, placement=Placement.TENSOR, axis=decoder.axis
            ).grouped
        for name, form in forms.items():
            run = partial(one_round, request, form, first)
            rows.append(row(name, way, timed(device, run, repeats=rounds)))
    return rows


def row(what: str, way: Way, seconds: list[float]) -> report.Row:
    return {"what": what, **way._asdict(), "ms": median(seconds) * 1e3, "all": seconds}


def one_round(request: Request, form: Callable[..., Tensor], first: Tensor) -> None:
    """Drafts one after another; the host reads all of them at the end."""
    token_T, drafts = first, []
    for number in range(DRAFTS):
        token_T = request.token(form, token_T, position=CONTEXT + number)
        drafts.append(token_T)
    torch.cat(drafts).tolist()


def fastest_of(rows: list[report.Row]) -> dict[str, float]:
    """Milliseconds of each thing timed, done the best way."""
    best: dict[str, float] = {}
    for each in rows:
        best[each["what"]] = min(each["ms"], best.get(each["what"], math.inf))
    return best


def ways(device: torch.device, decoder: Decoder) -> list[Way]:
    """All that can be had here."""
    if device.type != "cuda":
        return [Way(played=False, attention="")]
    readers = [""]
    try:
        found = read_pages(decoder.arch, device, dtype=torch.bfloat16, block_size=BLOCK_SIZE)
        readers.append(found)
    except ConfigError as error:
        report.say(str(error))
    return [Way(played, attention) for attention in readers for played in (False, True)]


@torch.inference_mode()
def main() -> None:
    args = vars(report.parser(__doc__).parse_args())
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    large, drafter = (LLAMA_8B, LLAMA_1B) if on_gpu else (small(LLAMA_8B), small(LLAMA_1B))
    count = 16 if args["quick"] else 128
    settings: dict[str, Any] = {
        "device": str(device),
        "target": "Llama 3.1 8B's shape" if on_gpu else "a small shape",
        "drafter": "Llama 3.2 1B's shape" if on_gpu else "a small shape",
        "context": CONTEXT,
        "drafts": DRAFTS,
        "samples": count,
    }
    made = report.Report(name="gpu", settings=settings, expected=EXPECTED if on_gpu else {})
    report.say(f"a copy on {device}")
    bandwidth = copied_per_s(device, num_bytes=2**31 if on_gpu else 2**26)
    bound_ms = must_read(large) / bandwidth * 1e3
    report.say("tokens of the target")
    made.rows += decode(device, large, tokens=count)
    report.say("rounds of the drafter")
    made.rows += draft(device, drafter, rounds=count)
    made.ratios["decode_over_copy_bound"] = bound_ms / fastest_of(made.rows)["token"]
    for played in sorted({row["played"] for row in made.rows}):
        drafting = fastest_of([each for each in made.rows if each["played"] == played])
        drafting.pop("token")
        exact = drafting.pop("exact")
        name = "grouped_drafting_speedup" + ("_played" if played else "")
        made.ratios[name] = exact / min(drafting.values())
    if on_gpu:
        launched, played = (
            fastest_of([each for each in made.rows if each["played"] == played])["token"]
            for played in (False, True)
        )
        made.ratios["played_over_launched"] = launched / played
    made.notes["copy, GB/s read and written"] = round(bandwidth / 1e9, 1)
    made.notes["bound, ms per token"] = round(bound_ms, 4)
    columns = ["what", "played", "attention", "ms"]
    made.print(columns, [{key: each[key] for key in columns} for each in made.rows])
    made.write(args["output"])


if __name__ == "__main__":
    main()

"""Requests whose texts are known beforehand, and a load of them on an engine that may be struck.

one engine, no faults ──> Known ──┐
                                  Load ── submit ──> engine ── deltas ──> Asked: ok, wrong, ...
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from paceline.runtime import local
from paceline.runtime.config import EngineConfig
from paceline.runtime.engine import EngineClient
from paceline.runtime.errors import EngineError
from paceline.runtime.preflight import Facts
from paceline.runtime.types import EngineStatus, Request, SamplingParams, TokenDelta

SHORTEST, LONGEST = 20, 1500
"""Tokens of a prompt."""
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
}

Outcome = Literal["ok", "wrong", "error", "left", "hung"]


class Known(NamedTuple):
    """A request and its text."""

    request: Request
    token_ids: tuple[int, ...]


@dataclass(slots=True, eq=False, kw_only=True)
class Asked:
    """A request under way, and what came of it."""

    request: Request
    expected: tuple[int, ...]
    asked_s: float
    token_ids: list[int] = field(default_factory=list)
    told_s: list[float] = field(default_factory=list)
    """When tokens came."""
    ended_s: float | None = None
    outcome: Outcome | None = None
    error: str = ""
    left: bool = False
    """Its client has gone."""

    def hear(self, delta: TokenDelta, *, now_s: float) -> None:
        self.token_ids += delta.token_ids
        if delta.token_ids:
            self.told_s.append(now_s)
        if delta.finish_reason is not None:
            self.end(self._judged(delta), now_s=now_s)

    def end(self, outcome: Outcome, *, now_s: float, error: str = "") -> None:
        self.ended_s, self.outcome, self.error = now_s, outcome, error or self.error

    def _judged(self, delta: TokenDelta) -> Outcome:
        found = tuple(self.token_ids)
        if delta.finish_reason in ("length", "stop"):
            return "ok" if found == self.expected else "wrong"
        if found != self.expected[: len(found)]:
            return "wrong"
        if self.left and delta.finish_reason == "abort":
            return "left"
        self.error = delta.error or f"ended by {delta.finish_reason}"
        return "error"


class Load:
    """Keeps `width` requests under way while it is wanted. A thread of its own polls the engine; all
    methods are for another one."""

    def __init__(
        self,
        engine: EngineClient,
        known: Sequence[Known],
        *,
        width: int,
        hung_s: float,
        rng: random.Random,
    ) -> None:
        """A request that has not ended `hung_s` after the last fault will not."""
        self.ended: list[Asked] = []
        self.failure: str | None = None
        """Why the engine itself failed; nothing comes any more then."""
        self.last_fault_s = time.monotonic()
        self._engine = engine
        self._known = known
        self._width = width
        self._hung_s = hung_s
        self._rng = rng
        self._names = itertools.count()
        self._lock = threading.Lock()
        self._live: dict[str, Asked] = {}
        self._wanted = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def start(self) -> None:
        self._wanted = True

    def stop(self) -> None:
        """Ask for nothing more."""
        self._wanted = False

    def close(self) -> None:
        """What has not ended until now is hung."""
        self._wanted, self._closing = False, True
        self._thread.join(5.0)
        for asked in self.live():
            asked.end("hung", now_s=time.monotonic(), error=self.failure or "")
            self._forget(asked)

    def live(self) -> list[Asked]:
        with self._lock:
            return list(self._live.values())

    def leave(self, asked: Iterable[Asked]) -> None:
        """As if their clients had gone."""
        with self._lock:
            names = [each.request.request_id for each in asked if each.outcome is None]
            for name in names:
                self._live[name].left = True
        self._engine.abort(names)

    def status(self) -> EngineStatus:
        return self._engine.status()

    def _run(self) -> None:
        try:
            while not self._closing:
                if self._wanted:
                    self._ask()
                deltas = self._engine.poll(0.05)
                with self._lock:
                    self._take(deltas, time.monotonic())
        except EngineError as error:
            self.failure = f"{type(error).__name__}: {error}"

    def _ask(self) -> None:
        new = []
        with self._lock:
            while len(self._live) < self._width:
                known = self._rng.choice(self._known)
                # half of the prompts are new to all engines
                salt = "" if self._rng.random() < 0.5 else f"{self._rng.random()}"
                name = f"r{next(self._names)}"
                request = msgspec.structs.replace(known.request, request_id=name, cache_salt=salt)
                self._live[name] = Asked(
                    request=request, expected=known.token_ids, asked_s=time.monotonic()
                )
                new.append(request)
        if new:
            self._engine.submit(new)

    def _take(self, deltas: Iterable[TokenDelta], now_s: float) -> None:
        for delta in deltas:
            asked = self._live.get(delta.request_id)
            if asked is None:
                self._spoke_late(delta.request_id)
                continue
            asked.hear(delta, now_s=now_s)
            if asked.outcome is not None:
                self._forget(asked)
        for asked in list(self._live.values()):
            if now_s - max(asked.asked_s, self.last_fault_s) > self._hung_s:
                asked.end("hung", now_s=now_s)
                self._forget(asked)

    def _spoke_late(self, name: str) -> None:
        for asked in self.ended:
            if asked.request.request_id == name and asked.outcome != "hung":
                asked.outcome, asked.error = "wrong", "spoke after its end"

    def _forget(self, asked: Asked) -> None:
        del self._live[asked.request.request_id]
        self.ended.append(asked)


def make_known(
    config: EngineConfig, facts: Facts, *, count: int, rng: random.Random
) -> list[Known]:
    """Requests, every other one sampled, and their texts as one engine alone writes them."""
    requests = []
    for number in range(count):
        params = SamplingParams(ignore_eos=True, temperature=0.0)
        if number % 2:
            params = SamplingParams(
                ignore_eos=True, temperature=0.9, top_p=0.95, presence_penalty=0.2
            )
        length = round(SHORTEST * (LONGEST / SHORTEST) ** (number / max(1, count - 1)))
        requests.append(
            Request(
                request_id=f"{number}",
                prompt_token_ids=tuple(rng.choices(range(3, facts.arch.vocab_size), k=length)),
                params=params,
                seed=number,
                max_tokens=rng.randint(8, 64),
            )
        )
    engine = local.local_engine(config, facts)
    texts: defaultdict[str, list[int]] = defaultdict(list)
    try:
        engine.submit(requests)
        while engine.has_work:
            for delta in engine.poll():
                texts[delta.request_id] += delta.token_ids
    finally:
        engine.close()
    return [Known(request, tuple(texts[request.request_id])) for request in requests]


def save_model(folder: Path, *, noise: float) -> str:
    """A Llama of random weights, small so that engines start soon. Noise on them makes a drafter of
    the same model that mostly agrees with it."""
    import torch
    from safetensors.torch import save_file

    width, wide = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    heads = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    draws, noises = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)

    def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        base = torch.randn(rows, columns, generator=draws)
        return (base + noise * torch.randn(rows, columns, generator=noises)) * scale * columns**-0.5

    tensors = {
        "model.embed_tokens.weight": normal(SHAPE["vocab_size"], width, width**0.5),
        "lm_head.weight": normal(SHAPE["vocab_size"], width, 4.0),
        "model.norm.weight": torch.ones(width),
    }
    for layer in range(SHAPE["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = torch.ones(width)
        for name in "qkv":
            tensors[f"{at}self_attn.{name}_proj.weight"] = normal(heads, width)
        tensors[f"{at}self_attn.o_proj.weight"] = normal(width, heads)
        for name in ("gate", "up"):
            tensors[f"{at}mlp.{name}_proj.weight"] = normal(wide, width)
        tensors[f"{at}mlp.down_proj.weight"] = normal(width, wide)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        **SHAPE,
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)

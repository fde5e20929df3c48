"""What the tests ask ranks to do. Every rank runs the same function."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from tests.paged import Place, ScatteredBlocks

from paceline.parallel.layer import exact_groups
from paceline.parallel.mesh import Mesh
from paceline.parallel.region import share
from paceline.parallel.tensor import best, gather_vocabulary
from paceline.runtime.config import make_config
from paceline.runtime.engine import Engine
from paceline.runtime.layers import cpu_pass
from paceline.runtime.loading import load
from paceline.runtime.local import InProcess
from paceline.runtime.models.arch import read_architecture
from paceline.runtime.models.llama import load_decoder
from paceline.runtime.models.model import Model
from paceline.runtime.models.weights import Checkpoint
from paceline.runtime.schedule.scheduler import make_scheduler
from paceline.runtime.types import Request, SamplingParams
from paceline.runtime.worker import Worker

LONGEST = 256
NUM_BLOCKS = 16


def one_model(mesh: Mesh, folder: Path) -> Model:
    """A target in float32."""
    arch = read_architecture(folder)
    decoder = load_decoder(
        Checkpoint(folder),
        arch,
        groups=exact_groups(arch.num_layers),
        axis=mesh.target,
        dtype=torch.float32,
        device=mesh.device,
    )
    return Model(
        decoder,
        num_blocks=NUM_BLOCKS,
        block_size=16,
        max_len=LONGEST,
        kv_dtype=torch.float32,
        device=mesh.device,
    )


def logits(mesh: Mesh, folder: str, token_ids: list[int], chunks: list[int]) -> list[list[float]]:
    """The target's logits of every token, fed in chunks."""
    model = one_model(mesh, Path(folder))
    decoder = model.decoder
    place = Place(ScatteredBlocks(NUM_BLOCKS))
    rows, start = [], 0
    with torch.inference_mode():
        for size in chunks:
            ids = model.tokens(token_ids[start : start + size])
            h = decoder.exact(model.rows(ids, [place.segment(start=start, num_rows=size)]))
            rows.append(
                gather_vocabulary(
                    decoder.logits(h), axis=decoder.axis, widths=decoder.vocabulary_widths
                )
            )
            start += size
    return [[float(x) for x in row] for row in torch.cat(rows)]


def grouped_logits(
    mesh: Mesh, folder: str, prompt: list[int], token_ids: list[int], speculative: dict[str, Any]
) -> list[list[float]]:
    """The drafter's logits: the prompt exact, then each token in a grouped pass of its own."""
    config = make_config(
        {
            "model": folder,
            "tensor_parallel_size": mesh.target.size,
            "speculative_config": {"model": folder, "dtype": "float32", **speculative},
        }
    )
    drafter = load(config, mesh).draft_model
    if drafter is None:
        return []
    model, decoder = drafter.model, drafter.model.decoder
    place = Place(ScatteredBlocks(NUM_BLOCKS))
    found = []
    with torch.inference_mode():
        whole = place.segment(start=0, num_rows=len(prompt))
        decoder.exact(model.rows(model.tokens(prompt), [whole]))
        for offset, token_id in enumerate(token_ids):
            one = place.segment(start=len(prompt) + offset, num_rows=1)
            rows = model.rows(model.tokens([token_id]), [one])
            part = decoder.logits(drafter._layer_parallel.grouped(rows))
            found.append(
                gather_vocabulary(part, axis=decoder.axis, widths=decoder.vocabulary_widths)[0]
            )
    return [[float(x) for x in row] for row in found]


def generate(
    mesh: Mesh, settings: dict[str, Any], prompts: list[list[int]], params: SamplingParams
) -> list[dict[str, Any]]:
    """Continue prompts with a whole engine on every rank."""
    sizes = {"tensor_parallel_size": mesh.target.size}
    if settings.get("speculative_config"):
        speculative = {
            **settings["speculative_config"],
            "draft_tensor_parallel_size": mesh.draft.size,
        }
        settings = {**settings, "speculative_config": speculative}
    config = make_config({**settings, **sizes})
    worker = Worker(config, mesh)
    scheduler = make_scheduler(config, max_model_len=LONGEST, num_blocks=worker.num_blocks)
    engine = Engine(scheduler, InProcess(lambda: worker))
    requests = [
        Request(
            request_id=str(number),
            prompt_token_ids=tuple(prompt),
            params=params,
            seed=(params.seed or 0) + number,
            max_tokens=params.max_tokens or LONGEST - len(prompt),
        )
        for number, prompt in enumerate(prompts)
    ]
    engine.submit(requests)
    texts: dict[str, dict[str, Any]] = {
        r.request_id: {"token_ids": [], "accepted": 0} for r in requests
    }
    while scheduler.has_work:
        for delta in engine.step():
            texts[delta.request_id]["token_ids"] += delta.token_ids
            texts[delta.request_id]["accepted"] += delta.num_accepted
        scheduler.check()
    assert scheduler.status().num_free_blocks == worker.num_blocks
    return list(texts.values())


def shares(mesh: Mesh, num_bytes: int) -> tuple[str, list[str]]:
    """What this rank reads in memory that all have in common, where each has written; and what names
    of it are left."""
    region = share(mesh.world, num_bytes)
    if region is None:
        return "none", []
    ctypes.memset(region.address + mesh.rank, ord("a") + mesh.rank, 1)
    mesh.world.collectives.all_reduce_(torch.zeros(1))
    read = ctypes.string_at(region.address, mesh.world.size).decode()
    return read, [path.name for path in Path("/dev/shm").glob("paceline-*")]


def many_sums(mesh: Mesh, folder: str, num_passes: int) -> tuple[bool, int]:
    """Whether passes run whole on several ranks, and how many different results a pass has when it is
    run again and again."""
    model = one_model(mesh, Path(folder))
    place = Place(ScatteredBlocks(NUM_BLOCKS))
    results = set()
    with torch.inference_mode():
        for _ in range(num_passes):
            rows = model.rows(model.tokens([1, 2, 3]), [place.segment(start=0, num_rows=3)])
            results.add(tuple(model.decoder.exact(rows).flatten().tolist()))
    return rows.small is not None and rows.small.runs_whole, len(results)


def waits_for_nobody(mesh: Mesh, folder: str) -> str:
    """What a rank says whose neighbour does not come to a pass."""
    before = cpu_pass.SUM_TIMEOUT_S
    cpu_pass.SUM_TIMEOUT_S = 0.5
    try:
        model = one_model(mesh, Path(folder))
    finally:
        cpu_pass.SUM_TIMEOUT_S = before
    if not mesh.rank0:
        return ""
    rows = model.rows(model.tokens([1]), [Place(ScatteredBlocks(4)).segment(start=0, num_rows=1)])
    assert rows.small is not None
    try:
        rows.small.whole(rows, "exact")
    except TimeoutError as error:
        return str(error)
    return "computed"


def collectives(mesh: Mesh) -> dict[str, Any]:
    """Each verb once, on numbers that depend on the rank."""
    comm, rank = mesh.world.collectives, mesh.rank
    total = comm.all_reduce_(torch.full((3, 5), float(rank + 1)))
    rows = comm.all_gather(torch.tensor([[float(rank), 2.0**23 + rank]]))
    told = torch.tensor([7, 2**24 - 1, 0]) if rank == 0 else torch.zeros(3, dtype=torch.int64)
    comm.broadcast_(told)
    half = comm.all_reduce_(torch.full((4,), float(rank + 1), dtype=torch.bfloat16))
    return {
        "name": comm.name,
        "sum": total.tolist(),
        "rows": rows.tolist(),
        "told": told.tolist(),
        "half": half.float().tolist(),
    }


def best_of_ties(mesh: Mesh) -> list[int]:
    """Rows whose best logits are equal, within a rank and across ranks."""
    row = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 1.0, 5.0, 5.0], [0.0, 1.0, 2.0, 4.0]])
    here = row.chunk(mesh.world.size, dim=1)[mesh.rank].contiguous()
    offset = mesh.rank * here.shape[1]
    together = best(here, offset=offset, axis=mesh.world).tolist()
    alone = [int(best(one[None], offset=offset, axis=mesh.world)) for one in here]
    assert together == alone
    return [int(token_id) for token_id in together]


def num_blocks(mesh: Mesh, settings: dict[str, Any]) -> int:
    """The KV blocks that ranks of unequal memory agree on: the later the rank, the less it has."""
    unequal = {**settings, "kv_cache_memory": 10**6 // (1 + mesh.rank)}
    config = make_config({**unequal, "tensor_parallel_size": mesh.target.size})
    return load(config, mesh).num_blocks

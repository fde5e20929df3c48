"""What trees gain in accepted tokens per round over chains, at equal numbers of drafted nodes: counts, not times.

Every prompt is continued by one engine after another, in process, in float32; under coupled verification and greedily
all of them write the same text, which is checked. `passes` are the drafter's after its first: what the drafts cost it.

    chain        one token after another
    beam         depth x width, the best nodes overall kept: EasySpec's tree (12 wide, all kept), EAGLE-2's (10 wide)
    dynamic      DySpec, node after node; dynamic_threshold: level after level

Where verification is coupled, children are ranked by the race that the target will run, noise and all
(`runtime/sampling/ranking.py`); where it is by rejection, a beam takes the likeliest by the drafter's law alone, as the
trees of EasySpec and EAGLE-2 do, and is right as often as under any rule that draws the target's token afresh. So
`foreseen_over_likeliest` is what knowing the noise is worth to the same beam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import prompts, report
from paceline.parallel.launch import solo_mesh
from paceline.runtime.config import EngineConfig, make_config
from paceline.runtime.engine import Engine
from paceline.runtime.inputs import Rows
from paceline.runtime.layers.cpu_chain import SmallChains
from paceline.runtime.loading import Loaded, load
from paceline.runtime.local import InProcess
from paceline.runtime.preflight import examine
from paceline.runtime.schedule.scheduler import make_scheduler
from paceline.runtime.spec.layer_parallel import LayerParallel
from paceline.runtime.types import Request, SamplingParams, StepPlan
from paceline.runtime.worker import Worker

EXPECTED = {
    "easyspec_tree_over_chain_greedy": (">=", 1.2),
    "easyspec_tree_over_chain_sampled": (">=", 1.2),
    "dynamic_over_easyspec_tree_greedy": (">=", 1.0),
    "foreseen_over_likeliest": (">=", 1.0),
}
RULES = (("greedy", 0.0, "coupled"), ("coupled", 0.8, "coupled"), ("rejection", 0.8, "rejection"))
"""Name, temperature, verification."""


@dataclass(frozen=True)
class Setting:
    """How drafts are shaped."""

    tree: str
    depth: int
    width: int = 1
    nodes: int = 1

    @property
    def name(self) -> str:
        if self.tree == "chain":
            return f"chain {self.depth}"
        return f"{self.tree} {self.depth} x {self.width}, {self.nodes} nodes"


CHAIN, EASYSPEC = Setting("chain", 5), Setting("beam", 5, 12, 60)
DYNAMIC, AS_DEEP = Setting("dynamic", 10, 12, 60), Setting("dynamic", 5, 12, 60)
"""DySpec bounds no depth; and the same no deeper than EasySpec's tree."""
SETTINGS = [
    CHAIN,
    Setting("chain", 10),
    *[
        Setting(tree, depth, width, nodes)
        for nodes, depth, width in ((16, 5, 4), (32, 5, 8))
        for tree in ("beam", "dynamic", "dynamic_threshold")
    ],
    EASYSPEC,
    AS_DEEP,
    Setting("dynamic_threshold", 5, 12, 60),
    Setting("beam", 7, 10, 60),
    DYNAMIC,
    Setting("dynamic_threshold", 10, 12, 60),
]


class PassCount:
    """Counts the drafter's passes after the first of each round."""

    def __init__(self) -> None:
        self.passes = 0
        plain = LayerParallel.grouped

        def counted(drafter: LayerParallel, rows: Rows) -> torch.Tensor:
            self.passes += 1
            return plain(drafter, rows)

        LayerParallel.grouped = counted  # type: ignore[assignment, method-assign]
        in_one_call = SmallChains.draft_on

        def drafted_on(
            chains: SmallChains, token_ids: Any, draws: Any, tables: Any, counts: Any, form: Any
        ) -> list[list[int]]:
            self.passes += counts[0]
            return in_one_call(chains, token_ids, draws, tables, counts, form)

        SmallChains.draft_on = drafted_on  # type: ignore[assignment, method-assign]


def config_of(setting: Setting, verification: str, args: dict[str, Any]) -> EngineConfig:
    return make_config(
        {
            "model": args["model"],
            "dtype": "float32",
            "max_num_seqs": 1,
            "enable_prefix_caching": False,
            "kv_cache_memory": "128MiB",
            "speculative_config": {
                "model": args["speculative_model"],
                "dtype": "float32",
                "num_speculative_tokens": setting.depth,
                "draft_length": "fixed",
                "verification": verification,
                "tree": setting.tree,
                "tree_width": setting.width,
                "tree_nodes": max(setting.nodes, setting.depth),
            },
        }
    )


def run_prompt(
    config: EngineConfig, loaded: Loaded, request: Request, *, max_model_len: int
) -> tuple[list[int], report.Row]:
    """One request through an engine of its own: its text, and what its rounds gave."""
    worker = Worker(config, solo_mesh(), loaded=loaded)
    scheduler = make_scheduler(config, max_model_len=max_model_len, num_blocks=loaded.num_blocks)
    engine = Engine(scheduler, InProcess(lambda: worker))
    engine.submit([request])
    text: list[int] = []
    while True:
        for delta in engine.step():
            text += delta.token_ids
            if delta.metrics is not None:
                worker.step(StepPlan(step=-1, scheduled=(), finished=(request.request_id,)))
                metrics = delta.metrics
                counts = {
                    "rounds": metrics.rounds,
                    "drafted": metrics.drafted,
                    "accepted": metrics.accepted,
                    "accepted_at": list(metrics.accepted_at),
                }
                return text, counts


def table_of(rows: list[report.Row]) -> list[report.Row]:
    """One line per rule and setting."""
    lines: list[report.Row] = []
    for rule, _, _ in RULES:
        for setting in SETTINGS:
            mine = [r for r in rows if r["rule"] == rule and r["setting"] == setting.name]
            rounds = sum(row["rounds"] for row in mine)
            line: report.Row = {"rule": rule, "setting": setting.name}
            for name in ("accepted", "drafted", "passes"):
                line[f"{name}/round"] = sum(row[name] for row in mine) / max(1, rounds)
            lines.append(line)
    return lines


def ratios_of(lines: list[report.Row]) -> dict[str, float]:
    """The same as ratios, at 60 nodes."""
    accepted = {(line["rule"], line["setting"]): line["accepted/round"] for line in lines}

    def ratio(rule: str, a: Setting, b: Setting, base: str | None = None) -> float:
        return float(accepted[rule, a.name] / accepted[base or rule, b.name])

    found = {}
    for rule, name in (("greedy", "greedy"), ("coupled", "sampled"), ("rejection", "by_rejection")):
        found[f"easyspec_tree_over_chain_{name}"] = ratio(rule, EASYSPEC, CHAIN)
        found[f"dynamic_over_easyspec_tree_{name}"] = ratio(rule, DYNAMIC, EASYSPEC)
        found[f"as_deep_dynamic_over_easyspec_tree_{name}"] = ratio(rule, AS_DEEP, EASYSPEC)
    found["foreseen_over_likeliest"] = ratio("coupled", EASYSPEC, EASYSPEC, "rejection")
    return found


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=96)
    args = vars(parser.parse_args())
    torch.set_num_threads(1)
    count, max_tokens = (2, 32) if args["quick"] else (args["prompts"], args["max_tokens"])
    facts = examine(config_of(CHAIN, "coupled", args))
    assert facts.tokenizer is not None, "expected a model with a tokenizer"
    given = prompts.given(args["prompts_file"], facts.tokenizer, count=count, length=128)
    counting = PassCount()
    loaded: dict[str, Loaded] = {}
    for _, _, verification in RULES:
        if verification not in loaded:
            config = config_of(CHAIN, verification, args)
            target = loaded["coupled"].target if loaded else None
            loaded[verification] = load(config, solo_mesh(), target=target)
    made = report.Report(
        name="trees",
        settings={**args, "prompts": count, "prompt_tokens": 128, "max_tokens": max_tokens},
        expected=EXPECTED,
    )
    different = 0
    for number, prompt in enumerate(given):
        for rule, temperature, verification in RULES:
            params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
            request = Request(
                request_id="r",
                prompt_token_ids=tuple(prompt),
                params=params,
                seed=number,
                max_tokens=max_tokens,
            )
            expected: list[int] = []
            for setting in SETTINGS:
                before = counting.passes
                text, counts = run_prompt(
                    config_of(setting, verification, args),
                    loaded[verification],
                    request,
                    max_model_len=facts.max_model_len,
                )
                passes = counting.passes - before
                row = {"prompt": number, "rule": rule, "setting": setting.name, **counts}
                made.rows.append({**row, "passes": passes})
                expected = expected or text
                different += rule != "rejection" and text != expected
        report.say(f"  prompt {number + 1}/{len(given)}")
    lines = table_of(made.rows)
    made.ratios = ratios_of(lines)
    made.notes["texts that differ where all should be the same"] = different
    made.print(list(lines[0]), lines)
    made.notes["table"] = lines
    made.write(args["output"])


if __name__ == "__main__":
    main()

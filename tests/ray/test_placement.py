"""Engines in somebody else's placement group: a trainer's, or one that a config names."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.ray.cluster import Cluster

PROGRAM = """
import json, sys
import ray
from ray.util.placement_group import placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from paceline import SamplingParams
from paceline.actors.app import ray_llm
from paceline.runtime.errors import PacelineError

ray.init(log_to_driver=False)
group = placement_group([{"CPU": 1}] * 3, name="trainers", strategy="SPREAD")
assert group.wait(60)


def generate(**settings):
    try:
        with ray_llm(sys.argv[1], dtype="float32", disable_custom_all_reduce=True, **settings) as llm:
            params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
            tokens = llm.generate([{"prompt_token_ids": [3, 1, 4]}], params)[0].outputs[0].token_ids
            living = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
            return {"tokens": len(tokens), "groups": len(living)}
    except PacelineError as error:
        return {"error": str(error)}


@ray.remote(num_cpus=0)
class Trainer:
    def generate(self, model, **settings):
        sys.argv = ["", model]
        return generate(**settings)


inside = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
trainer = Trainer.options(scheduling_strategy=inside).remote()
call = lambda **settings: ray.get(trainer.generate.remote(sys.argv[1], **settings), timeout=120)
answers = {
    "within": call(tensor_parallel_size=2, ray_bundle_indices=(2, 0)),
    "too many": call(tensor_parallel_size=4),
    "no such bundle": call(ray_bundle_indices=(7,)),
    "named": generate(tensor_parallel_size=1, ray_placement_group="trainers"),
    "misnamed": generate(ray_placement_group="trainer"),
    "indices of nothing": generate(ray_bundle_indices=(0,)),
}
answers["state"] = placement_group_table(group)["state"]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(cluster: Cluster, tiny: Callable[..., Path]) -> dict[str, Any]:
    """What engines said that were asked for inside a group of three bundles, and beside it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny(seed=0))],
        capture_output=True,
        text=True,
        timeout=180,
        env={**cluster.env, "RAY_ADDRESS": cluster.gcs},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.parametrize("how", ["within", "named"])
def test_an_engine_uses_the_group_around_it_and_makes_none(answers: Any, how: str) -> None:
    assert answers[how] == {"tokens": 4, "groups": 1}


def test_the_group_outlives_the_engines_in_it(answers: Any) -> None:
    assert answers["state"] == "CREATED"


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            "too many",
            "4 ranks need 4 CPU, one each, and may use 3 of the placement group around them",
        ),
        ("no such bundle", "has 7 1 times, and the placement group has bundles 0 to 2"),
        (
            "misnamed",
            "no placement groups are named 'trainer' in this cluster; there are: trainers",
        ),
        ("indices of nothing", "run Paceline inside one, or name it by ray_placement_group"),
    ],
)
def test_a_group_that_does_not_fit_is_refused_in_a_line(
    answers: Any, case: str, reason: str
) -> None:
    assert reason in answers[case]["error"]
    assert "\n" not in answers[case]["error"]

"""Time lines are drawn from a plan's JSON and from a benchmark's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import timeline


def row(rank: int, stage: str, start_ms: float, end_ms: float, group: int = 0) -> dict[str, Any]:
    return {"rank": rank, "stage": stage, "start_ms": start_ms, "end_ms": end_ms, "group": group}


SHARED = [row(0, "draft", 0.0, 1.0), row(0, "verify", 0.5, 2.0, group=1)]
APART = [row(0, "verify", 0.0, 3.0), row(1, "calibrate", 0.0, 1.0), row(1, "draft", 1.0, 4.0)]


def test_every_schedule_is_a_panel_and_every_rank_a_lane() -> None:
    figure = timeline.draw({"lockstep": SHARED, "ahead": APART, "none": []}, title="t")
    panels = figure.get_axes()
    assert [panel.get_title(loc="left") for panel in panels] == ["lockstep", "ahead"]
    assert [len(panel.get_yticks()) for panel in panels] == [1, 2]
    assert {panel.get_xlim() for panel in panels} == {(0.0, 2.0)}, "as long as the shortest"


def test_the_legend_names_what_is_drawn_and_nothing_else() -> None:
    def named(rows: list[dict[str, Any]]) -> list[str]:
        (legend,) = timeline.draw({"a": rows}, title="t").legends
        return [text.get_text() for text in legend.get_texts()]

    assert named(APART) == ["target: verify", "drafter: exact pass", "drafter: further passes"]
    assert named(SHARED)[-1] == "second half of the batch"
    assert named([row(0, "prefill", 0.0, 1.0)]) == ["prefill"], "a stage it does not know"


@pytest.mark.parametrize(
    "data",
    [
        {
            "question": {
                "model": "T",
                "speculative_model": "D",
                "num_gpus": 2,
                "setting": {"batch": 1, "machine": {"gpu": {"name": "H100"}}},
            },
            "timelines": {"ahead": APART},
        },
        {
            "benchmark": "pipeline",
            "hardware": {"cpu": "c"},
            "commit": "1",
            "notes": {"timelines": {"ahead": APART}},
        },
    ],
    ids=["simulated", "measured"],
)
def test_a_file_becomes_a_picture(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    monkeypatch.setattr(sys, "argv", ["timeline", str(path)])
    timeline.main()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_file_without_time_lines_is_said_to_be_one() -> None:
    with pytest.raises(SystemExit, match="no time lines"):
        timeline.timelines_of({"notes": {}})

"""How long a study's plan takes to expand, and its rows to analyse: processor time, one thread.

    python benchmarks/studies.py

The rows are made: 90 bases and 90 models tuned from them, 24 tasks, three draws of demonstrations;
`tests/cohorts.py` says how. No model is loaded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from keepshot.report.study import write_study_report
from keepshot.study.arms import arms
from keepshot.study.document import RECORD, StudyDocument
from keepshot.study.findings import findings
from keepshot.study.frame import score_frame
from keepshot.study.grid import expand
from keepshot.study.spec import StudySpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

MODELS, TASKS, ITEMS = 90, 24, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the page is written too")
    place = parser.parse_args().out
    times: dict[str, float] = {}
    grid = timed(times, "plan", lambda: expand(StudySpec.from_mapping(grid_of(), source="made")))
    made_items = importlib.import_module("cohorts").made_items
    items = made_items(MODELS, TASKS, ITEMS, degraded=20)
    labels = [SimpleNamespace(label=name) for name in items["model"].unique()]
    spec: Any = SimpleNamespace(models=labels, targets=("compositions",))
    timed(times, "scores", lambda: score_frame(items))
    done: Any = SimpleNamespace(tuned={})
    listed = timed(times, "arms", lambda: arms(spec, done, items, {}))
    kinds = {f"task-{number:02d}": f"kind {number % 4}" for number in range(TASKS)}
    found = timed(times, "findings", lambda: findings(items, kinds))
    times["analysis"] = times["scores"] + times["arms"] + times["findings"]
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        document = StudyDocument(
            name="made", question="Made rows.", total=len(grid.units), done=0, failed=0,
            arms=listed, findings=found, failures=[],
        )  # fmt: skip
        (place / RECORD).write_text(document.to_json(), encoding="utf-8")
        timed(times, "page", lambda: write_study_report(place))
    rounded = {name: round(seconds, 2) for name, seconds in times.items()}
    print(json.dumps({"rows": len(items), "cells": len(grid.cells), "seconds": rounded}))


def timed(times: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    begun = time.process_time()
    result = work()
    times[name] = time.process_time() - begun
    return result


def grid_of() -> dict[str, Any]:
    """Return a study of 10,000 cells: 50 models, each tuned 99 ways, asked on two splits."""
    return {
        "models": [f"model-{number}" for number in range(50)],
        "targets": ["support", "extract-phone", "worked-sums"],
        "recipes": {"full": {"vary": {"learning_rate": [n * 1e-5 for n in range(1, 12)]}}},
        "seeds": [0, 1, 2],
        "asks": {"few": {"tasks": ["core", "target"], "splits": ["validation", "test"]}},
    }


if __name__ == "__main__":
    main()

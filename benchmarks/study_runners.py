"""One study by one process, by two started by hand, and by two workers of Ray: times and overhead.

    python benchmarks/study_runners.py                      # about 50 minutes on two idle cores
    python benchmarks/study_runners.py --ways "two processes,Ray"    # half of it
    python benchmarks/study_runners.py --models 2 --steps 40 --items 4 --rounds 1   # that it works

Models are trained from scratch, tuned twice each and asked composed tasks. Every way starts in an
empty directory; all must end in the same rows. Seconds are of whole commands, from the start of the
first process to the end of the last. Ray's own start is in its time: the longer the study, the less
it weighs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from keepshot.study.costs import overhead_of
from keepshot.study.directory import UnitRecord

WAYS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "two processes": (2, ()),
    "Ray": (1, ("--engine", "ray", "--workers", "2")),
}
"""Processes started by hand, and what they are told."""
KEYS = ["unit", "task", "shots", "seed", "item"]


def study_of(models: int, steps: int, items: int) -> dict[str, Any]:
    """Return a study of that many models trained from scratch, two tunings of each."""
    made = {"architecture": "llama", "width": 64, "depth": 3, "steps": steps}
    return {
        "name": "runners",
        "models": [
            {"name": f"m{seed}", "family": "m", "from_scratch": {**made, "seed": seed}}
            for seed in range(models)
        ],
        "targets": ["compositions"],
        "shared": {"batch_size": 16, "steps": max(2, steps // 4)},
        "recipes": {"full": {"method": {"name": "full"}}, "lora": {"method": {"name": "lora"}}},
        "asks": {
            "composed": {
                "tasks": ["composed"], "settings": ["direct", "gold"], "shots": [4],
                "limit": items,
            }
        },
    }  # fmt: skip


def run(way: str, file: Path, out: Path) -> float:
    """Run the study in one way; returns seconds."""
    number, arguments = WAYS[way]
    command = [sys.executable, "-m", "keepshot", "study", str(file), "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    runners = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL) for _ in range(number)
    ]  # fmt: skip
    if any([runner.wait() for runner in runners]):
        raise SystemExit(f"{way}: a runner failed; try {' '.join(command)}")
    return time.perf_counter() - began


def overhead(out: Path) -> float:
    """Return the share of runners' time that is neither loading nor work."""
    texts = (path.read_text("utf-8") for path in (out / "units").glob("*.json"))
    found = overhead_of(UnitRecord.model_validate_json(text) for text in texts)
    assert found is not None
    return found.share


def rows(out: Path) -> pd.DataFrame:
    """Return the frame in an order that does not depend on who did what."""
    return pd.read_parquet(out / "frame.parquet").sort_values(KEYS).reset_index(drop=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS), help="which, the first is divided by")
    asked = parser.parse_args()
    ways = [way.strip() for way in asked.ways.split(",")]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    shares: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        file, first = Path(scratch) / "study.yaml", None
        content = study_of(asked.models, asked.steps, asked.items)
        file.write_text(yaml.safe_dump(content), "utf-8")
        for number in range(asked.rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                out = Path(scratch) / f"{way} {number}"
                seconds[way].append(run(way, file, out))
                shares[way].append(overhead(out))
                first = rows(out) if first is None else first
                pd.testing.assert_frame_equal(first, rows(out))
                print(f"{way}: {seconds[way][-1]:.1f} s", file=sys.stderr, flush=True)
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    print(f"| way | seconds (range) | overhead | times as fast as {ways[0]} |")
    print("|---|---|---|---|")
    for way, median in medians.items():
        found = seconds[way]
        spread = f"{median:.1f} ({min(found):.1f} to {max(found):.1f})"
        share = 100 * statistics.median(shares[way])
        print(f"| {way} | {spread} | {share:.1f} % | {medians[ways[0]] / median:.2f} |")
    print(json.dumps({"seconds": seconds, "overhead": shares, "asked": vars(asked)}))


if __name__ == "__main__":
    main()

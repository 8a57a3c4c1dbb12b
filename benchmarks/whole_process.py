"""The same lm-eval command with `--model hf` and with `--model keepshot`: whole processes.

    python benchmarks/whole_process.py [--rounds 3]

SmolLM2-135M in float32, 16 fixed demonstrations, 200 two-choice and 115 four-choice questions, from
typing the command to its end: start, loading, tasks, scoring, metrics. Rounds alternate.
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

from keepshot.assets import AssetStore
from keepshot.models.loading import load
from keepshot.tasks.catalog import load_task

MODEL = "smollm2-135m-instruct"
TASKS = (("word-feeling", 200), ("english-french", 115))
SHOTS = 16
YAML = """task: {name}_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}.jsonl
    validation: {folder}/{name}-shots.jsonl
output_type: multiple_choice
test_split: test
fewshot_split: validation
fewshot_config: {{sampler: first_n}}
doc_to_text: "Q: {{{{q}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: a
metric_list: [{{metric: acc}}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="time whole lm-eval commands")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    store = AssetStore.from_environment(os.environ)
    where = {"hf": str(load(MODEL, store).path), "keepshot": MODEL}
    seconds: dict[str, list[float]] = {"hf": [], "keepshot": []}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task, count in TASKS:
            write_task(task, count, folder, store)
        for number in range(rounds):
            for tool in ("hf", "keepshot") if number % 2 == 0 else ("keepshot", "hf"):
                took, found[tool] = run(tool, where[tool], folder)
                seconds[tool].append(took)
                print(f"{tool}: {took:.1f} s {found[tool]}", flush=True)
    assert found["hf"] == found["keepshot"], found
    theirs, ours = (statistics.median(seconds[tool]) for tool in ("hf", "keepshot"))
    print(
        f"median of {rounds}: hf {theirs:.1f} s, keepshot {ours:.1f} s, {theirs / ours:.1f} times"
    )


def write_task(name: str, count: int, folder: Path, store: AssetStore) -> None:
    task = load_task(name, store)
    parts = {name: (*task.test, *task.validation)[:count], f"{name}-shots": task.draw(SHOTS, 0)}
    for part, examples in parts.items():
        rows = [
            {"q": e.input, "choices": list(e.choices or ()), "a": (e.choices or ()).index(e.output)}
            for e in examples
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
    (folder / f"{name}.yaml").write_text(YAML.format(name=name, folder=folder), encoding="utf-8")


def run(tool: str, model: str, folder: Path) -> tuple[float, dict[str, float]]:
    out = folder / tool
    command = [sys.executable, "-m", "keepshot", "lm-eval", "run", "--model", tool]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
    command += ["--tasks", ",".join(str(folder / f"{task}.yaml") for task, _ in TASKS)]
    command += ["--num_fewshot", str(SHOTS), "--batch_size", "16", "--output_path", str(out)]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    took = time.perf_counter() - started
    newest = max(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    results = json.loads(newest.read_text("utf-8"))["results"]
    return took, {task: values["acc,none"] for task, values in results.items()}


if __name__ == "__main__":
    main()

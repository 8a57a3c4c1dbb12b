"""A path of 11 lambdas over suite `core`: one keepshot process beside mergekit with lm-eval's `hf`.

Run by `blending.py --part sweep`. The pair is SmolLM2-135M-Instruct and itself with noise of a
twentieth of each tensor's size, both in float32; 4 fixed demonstrations, `--questions` test
questions of each of the 15 tasks, the same prompts for both.

- *Measures alone*: the seconds of all 11 measures added up, inside the same process; what the sweep
  costs beyond them is changing the weights, comparing the two models first, and restoring the base.
- *The other way*: for each of `--lambdas` (3), one mergekit process that writes a checkpoint and
  one `lm-eval run --model hf` process that scores it, both from their start to their end; scaled
  to 11. The whole keepshot process, loading both models included, stands against that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from keepshot.assets import AssetStore
from keepshot.models.shards import open_checkpoint
from keepshot.tasks.catalog import SUITES, load_task
from keepshot.tasks.task import Task

MODEL = "smollm2-135m-instruct"
LAMS = [number / 10 for number in range(11)]
OTHER_WAY = (0.5, 0.3, 0.7)
SHOTS = 4
NOISE = 0.05
YAML = """task: {name}_path
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}.jsonl
test_split: test
doc_to_text: "{{{{prompt}}}}"
target_delimiter: ""
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}]
"""
EXACT = """output_type: generate_until
doc_to_target: "{{gold}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 12}
filter_list:
  - {name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}
metric_list: [{metric: exact_match}]
"""


def sweep_part(root: Path, given: argparse.Namespace) -> None:
    store = AssetStore.from_environment(os.environ)
    base, tuned = root / "base", root / "tuned"
    make_pair(base, tuned, store)
    command = [sys.executable, __file__, str(base), str(tuned), str(given.questions)]
    started = time.perf_counter()
    found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    ours = time.perf_counter() - started
    print(
        f"keepshot, {len(LAMS)} lambdas, {given.questions} questions of {found['tasks']} tasks: "
        f"{ours:.1f} s; the sweep {found['sweep']:.1f} s, its {len(LAMS)} measures alone "
        f"{found['alone']:.1f} s: {found['sweep'] / found['alone']:.3f} times (1.1 asked)",
        flush=True,
    )
    if not given.mergekit:
        return
    for name in SUITES["core"]:
        write_task(load_task(name, store), given.questions, root)
    lams = OTHER_WAY[: given.lambdas]
    took = [other_way(lam, root, given.mergekit, found["scores"]) for lam in lams]
    scaled = sum(took) / len(took) * len(LAMS)
    print(
        f"mergekit and lm-eval: {', '.join(f'{seconds:.1f}' for seconds in took)} s for lambda "
        f"{', '.join(map(str, lams))}; {scaled:.0f} s scaled to {len(LAMS)}: "
        f"{scaled / ours:.1f} times (15 asked)"
    )


def make_pair(base: Path, tuned: Path, store: AssetStore) -> None:
    """Copy the embedded model, and write it again with noise of a fixed share of every tensor."""
    if (tuned / "config.json").is_file():
        return
    from keepshot.models.loading import load

    shutil.copytree(load(MODEL, store).path, base, dirs_exist_ok=True)
    shutil.copytree(base, tuned, dirs_exist_ok=True)
    generator = np.random.default_rng(0)
    for tensor in open_checkpoint(tuned).tensors.values():
        values = np.memmap(tensor.file, np.float32, "r+", tensor.offset, (tensor.num_elements,))
        size = np.float32(NOISE) * np.sqrt(np.mean(np.square(values)))
        values += size * generator.standard_normal(len(values), dtype=np.float32)
        values.flush()


def write_task(task: Task, count: int, folder: Path) -> None:
    """Write a task for lm-eval with whole prompts, so that both tools read the same tokens."""
    demonstrations = task.draw(SHOTS, 0)
    rows: list[dict[str, object]] = []
    for example in task.test[:count]:
        prompt = task.template.context(demonstrations, example)
        if task.kind == "choice":
            choices = list(example.choices or ())
            said = [task.template.continuation(choice) for choice in choices]
            rows.append({"prompt": prompt, "choices": said, "gold": choices.index(example.output)})
        else:
            rows.append({"prompt": prompt, "gold": example.output})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{task.name}.jsonl").write_text(text, encoding="utf-8")
    content = YAML.format(name=task.name, folder=folder)
    content += CHOICE if task.kind == "choice" else EXACT
    (folder / f"{task.name}.yaml").write_text(content, encoding="utf-8")


def other_way(lam: float, root: Path, mergekit: str, ours: dict[str, dict[str, float]]) -> float:
    """Write a checkpoint and score it, as is done without keepshot; return the seconds."""
    from blending import merge_file

    out, recipe = root / "merged", root / "merge.yaml"
    shutil.rmtree(out, ignore_errors=True)
    text = merge_file("linear", root / "base", root / "tuned", lam, "float32")
    recipe.write_text(text, encoding="utf-8")
    tasks = ",".join(str(root / f"{name}.yaml") for name in SUITES["core"])
    command = [sys.executable, "-m", "keepshot", "lm-eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={out},dtype=float32", "--device", "cpu"]
    command += ["--tasks", tasks, "--num_fewshot", "0", "--batch_size", "16"]
    command += ["--output_path", str(root / "scores")]
    started = time.perf_counter()
    subprocess.run([mergekit, str(recipe), str(out)], check=True, capture_output=True)
    merged = time.perf_counter() - started
    subprocess.run(command, check=True, capture_output=True)
    took = time.perf_counter() - started
    file = max((root / "scores").rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    results = json.loads(file.read_text("utf-8"))["results"]
    theirs: dict[str, float] = {}
    for name, values in results.items():
        score = next(v for key, v in values.items() if key.startswith(("acc,", "exact_match,")))
        theirs[name.removesuffix("_path")] = score
    own = ours[str(lam)]
    worst = max(own, key=lambda name: abs(theirs[name] - own[name]))
    print(
        f"lambda {lam}: mergekit {merged:.1f} s, lm-eval {took - merged:.1f} s; mean score "
        f"{np.mean(list(theirs.values())):.3f}, keepshot's {np.mean(list(own.values())):.3f} "
        f"(furthest apart: {worst}, {theirs[worst] - own[worst]:+.3f})",
        flush=True,
    )
    shutil.rmtree(out)
    return took


def ours(base: Path, tuned: Path, questions: int) -> None:
    """Sweep in this process, and print what it took as one line of JSON."""
    from keepshot.blending.sweep import sweep
    from keepshot.models.checkpoint import TensorReader
    from keepshot.models.loading import load
    from keepshot.scoring.engine import Engine
    from keepshot.scoring.evaluate import Plan, measure

    store = AssetStore.from_environment(os.environ)
    model = load(str(base), store, dtype="float32")
    with TensorReader(tuned) as reader:
        state = {name: reader.read(name) for name in reader.names}
    tasks = tuple(load_task(name, store) for name in SUITES["core"])
    plan = Plan(tasks, (SHOTS,), (0,), split="test", limit=questions)
    engine = Engine(model)
    alone: list[float] = []
    scores: dict[str, dict[str, float]] = {}

    def at(lam: float) -> None:
        started = time.perf_counter()
        items = measure(model, plan, arm="path", lam=lam, engine=engine).items
        alone.append(time.perf_counter() - started)
        for task in tasks:
            own = [item.correct for item in items if item.task == task.name]
            scores.setdefault(str(lam), {})[task.name] = sum(own) / len(own)

    started = time.perf_counter()
    sweep(model, state, LAMS, at)
    took = time.perf_counter() - started
    print(json.dumps({"sweep": took, "alone": sum(alone), "tasks": len(tasks), "scores": scores}))


if __name__ == "__main__":
    ours(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

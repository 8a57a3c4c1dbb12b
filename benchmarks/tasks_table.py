"""Measure every embedded task on demonstrations and validation items, and write docs/tasks.md.

    python benchmarks/tasks_table.py --scores build/tasks.json --out docs/tasks.md

Scores already in the JSON file are kept, so that a run that was stopped goes on, and one task can
be measured anew with `--tasks NAME --renew`. Test items are never read.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from keepshot.assets import AssetStore
from keepshot.models.loading import LanguageModel, load
from keepshot.records import write_text
from keepshot.scoring.engine import Engine
from keepshot.scoring.evaluate import Plan, measure
from keepshot.tasks.catalog import CATALOG, SUITES, load_task
from keepshot.tasks.task import Task

MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
SHOTS = (0, 1, 4, 8)
SEEDS = (0, 1)
LIMIT = 24

Scores = dict[str, dict[str, float]]
"""`model/task/fingerprint` -> shots -> score."""


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(description="measure every embedded task, write the table")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", default=list(CATALOG))
    parser.add_argument("--scores", type=Path, required=True, help="JSON file of scores")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--renew", action="store_true", help="measure again what is there already")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    store = AssetStore.from_environment(os.environ)
    scores: Scores = {}
    if arguments.scores.exists():
        scores = json.loads(arguments.scores.read_text(encoding="utf-8"))
    tasks = {name: load_task(name, store) for name in CATALOG}
    for reference in arguments.models:
        missing = [
            tasks[name]
            for name in arguments.tasks
            if arguments.renew or key(reference, tasks[name]) not in scores
        ]
        if missing:
            model = load(reference, store)
            for task in missing:
                scores[key(reference, task)] = score(model, task)
                write_text(json.dumps(scores, indent=1) + "\n", arguments.scores)
                Console(stderr=True).print(reference, task.name, scores[key(reference, task)])
    if arguments.out:
        write_text(document(tasks, scores, arguments.models), arguments.out)


def key(reference: str, task: Task) -> str:
    """Return what a score is filed under: a changed task is measured anew."""
    return f"{reference}/{task.name}/{task.fingerprint()}"


def score(model: LanguageModel, task: Task) -> dict[str, float]:
    """Return the mean score at each number of shots, over items and draws."""
    plan = Plan(tasks=(task,), shots=SHOTS, seeds=SEEDS, split="validation", limit=LIMIT)
    items = measure(model, plan, arm=model.reference, engine=Engine(model)).items
    values = {shots: [item.correct for item in items if item.shots == shots] for shots in SHOTS}
    return {str(shots): sum(found) / len(found) for shots, found in values.items()}


def document(tasks: Mapping[str, Task], scores: Scores, models: Sequence[str]) -> str:
    """Return the Markdown page."""
    groups = {
        "Suite `core` (a part of `full`)": SUITES["core"],
        "Further tasks of suite `full`": [n for n in SUITES["full"] if n not in SUITES["core"]],
        "Suite `anchors`": SUITES["anchors"],
        "Suite `guard`": SUITES["guard"],
        "The demo's target": [
            name
            for name, entry in CATALOG.items()
            if entry.role == "target" and entry.domain != "instructions"
        ],
        "In no suite": [
            name
            for name, entry in CATALOG.items()
            if entry.role == "suite" and name not in SUITES["full"]
        ],
    }
    parts = [INTRODUCTION.strip()]
    for title, names in groups.items():
        if names:
            parts += [f"## {title}", table([tasks[name] for name in names], scores, models)]
    return "\n\n".join([*parts, LEFT_OUT.strip()]) + "\n"


def table(tasks: Sequence[Task], scores: Scores, models: Sequence[str]) -> str:
    """Return one Markdown table, with a row of means below several tasks."""
    head = ["task", "question and answer", "kind", "chance", "source", "n"]
    rows = [head + [f"{model} {' / '.join(map(str, SHOTS))}" for model in models]]
    rows.append(["---"] * len(rows[0]))
    for task in tasks:
        sizes = [task.demonstrations, task.validation, task.test, task.train]
        counts = " / ".join(str(len(split)) for split in sizes if split)
        shown = CATALOG[task.name]
        row = [f"`{task.name}`", task.description, task.kind, f"{task.chance:.2f}".lstrip("0")]
        cells = [cell([scores.get(key(model, task))]) for model in models]
        rows.append([*row, f"{shown.source}; {shown.licence}", counts, *cells])
    if len(tasks) > 1:
        cells = [cell([scores.get(key(model, task)) for task in tasks]) for model in models]
        rows.append(["mean", "", "", "", "", "", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(found: Sequence[dict[str, float] | None]) -> str:
    """Return the scores at each number of shots, averaged over tasks."""
    known = [scores for scores in found if scores is not None]
    if len(known) < len(found):
        return "not measured"
    means = [sum(scores[str(shots)] for scores in known) / len(known) for shots in SHOTS]
    return " / ".join(f"{mean:.2f}" for mean in means)


INTRODUCTION = f"""
# Tasks

What the embedded tasks ask, where they come from, and what the two embedded models make of them.
`choice` tasks are judged by the log-likelihood of each choice, `exact` ones by greedy decoding.
`n` is the number of demonstrations / validation / test (/ training) items. The scores are at
{", ".join(map(str, SHOTS))} shots, over the first {LIMIT} validation items (fewer where a task has
fewer) and {len(SEEDS)} draws of demonstrations (at 0 shots there is nothing to draw); their
standard error is about .05 to .1 for a task. No test item was read. Written by

    python benchmarks/tasks_table.py --scores build/tasks.json --out docs/tasks.md

A task is in a suite if SmolLM2 scores from .15 to .95 at 4 shots (exact), or if one of the models
is clearly above chance at 4 shots (choice). The anchors, from which the keep term draws its
prompts, share neither words nor kind of rule with these suites; suite `guard`, which is asked while
a model trains, shares no kind of rule with either. Five tasks of suite `composed`, which is for
studies, have an anchor's rule, in capitals (`third-capitals`, `food-capitals`) or twice
(`second-twice`, `animal-twice`, `third-number-twice`): where those anchors train, a run refuses to
measure them. `support` is what the demo tunes on. `instructions` and `instructions-homogeneous` are
general data to tune on (docs/guide/keeping.md).
"""

LEFT_OUT = """
## Tried and left out

On SmolLM2 at 4 shots, 24 validation items, one draw (measured once, before the suites were fixed):

| task | kind | chance | SmolLM2, 4 shots |
| --- | --- | --- | --- |
| two digits minus one | exact | 0 | .12 |
| addition under an unknown sign (`8 $ 16`) | exact | 0 | .00 (tens and ones only: .14 to .21) |
| counting the things in a list | exact | 0 | .00 |
| four numbers of a sequence to the fifth | exact | 0 | .12 (24 items, two draws) |
| `15:40` to `3.40 pm` | exact | 0 | .15 (24 items, two draws; 7 of 48) |
| Roman numerals | exact | 0 | .00 |
| English noun to French / Spanish, in free form | exact | 0 | .00 / .04 |
| French / Spanish noun to English, in free form | exact | 0 | .08 / .08 (Gemma .42 / .46) |
| the opposite of a word, among four random words | choice | .25 | 1.00 |
| the odd one out of four words | choice | .25 | .25 |
| a word to one of three meaningless names | choice | .33 | .25 |
| a sentence's topic to one of five signs | choice | .20 | .25 |
| a remark's feeling to one of two meaningless names | choice | .50 | .54 |
| odd and even numbers to one of two signs | choice | .50 | .62 (0 shots: .46) |
"""


if __name__ == "__main__":
    main()

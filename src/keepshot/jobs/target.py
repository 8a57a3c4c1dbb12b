"""The task that a run tunes for: an embedded one, or a user's file split once by seed."""

from __future__ import annotations

from pathlib import Path

from keepshot.assets import AssetStore
from keepshot.errors import TaskError
from keepshot.tasks.catalog import TUNABLE, is_path, load_task
from keepshot.tasks.source import read_examples_file
from keepshot.tasks.task import Task, group_by_input, seeded

MIN_ROWS = 20
VALIDATION_SHARE, MOST_VALIDATION = 0.1, 100
TEST_SHARE, MOST_TEST = 0.2, 200


def load_target(name: str, store: AssetStore, *, seed: int = 0) -> Task:
    """Return the target with `train`, `validation` and `test` filled.

    A file is split by seed into 20 % test (at most 200), 10 % validation (at most 100) and the
    rest to train on; rows that ask the same thing stay together.

    Raises:
        TaskError: if there is no such task or file, a row cannot be used, there are too few, or an
            embedded task has nothing to train on.
    """
    if is_path(name):
        return _split_file(Path(name), seed)
    task = load_task(name, store, to_tune=True)
    if not task.train:
        raise TaskError(
            f"task {name!r} is for measuring and has nothing to train on; "
            f"tune on {', '.join(sorted(TUNABLE))}, or on a file of your own with --data FILE"
        )
    return task


def _split_file(path: Path, seed: int) -> Task:
    content = read_examples_file(path)
    groups = group_by_input(content.examples)
    if len(groups) < MIN_ROWS:
        raise TaskError(
            f"{path}: {len(groups)} different questions are too few to tune on and to measure; "
            f"give at least {MIN_ROWS}"
        )
    order = seeded("target", seed).permutation(len(groups))
    num_test = min(MOST_TEST, round(TEST_SHARE * len(groups)))
    num_validation = min(MOST_VALIDATION, round(VALIDATION_SHARE * len(groups)))
    shuffled = [groups[index] for index in order]
    test, validation = shuffled[:num_test], shuffled[num_test : num_test + num_validation]
    train = shuffled[num_test + num_validation :]
    return Task(
        name=path.name,
        kind="choice" if content.examples[0].choices else "exact",
        version=1,
        domain="user",
        description=path.name,
        demonstrations=(),
        # One wording of each question is asked; all of its rows are learned from.
        validation=tuple(group[0] for group in validation),
        test=tuple(group[0] for group in test),
        train=tuple(example for group in train for example in group),
        template=content.template,
    )

"""What is measured must be apart from what is trained on: the target, anchors, general data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from keepshot.errors import ConfigError
from keepshot.prompts import Example
from keepshot.tasks.catalog import CATALOG
from keepshot.tasks.source import Row
from keepshot.tasks.task import Task


def check_apart(measured: Sequence[Task], trained: Mapping[str, Iterable[Row]]) -> None:
    """Check that no measured question occurs, with its answer, among what is trained on.

    The same words may be asked about in different ways (a country's capital, its people), so that
    question and answer count together.

    Args:
        measured: the tasks of the measurement.
        trained: rows by the name of where they are from, such as `anchor task 'x'`.

    Raises:
        ConfigError: naming the first pair that overlaps.
    """
    for name, rows in trained.items():
        seen = {_pair(row) for row in rows if isinstance(row, Example)}
        for task in measured:
            asked = task.demonstrations + task.validation + task.test
            shared = [example for example in asked if _pair(example) in seen]
            if shared:
                raise ConfigError(
                    f"{name} holds {len(shared)} of the {len(asked)} questions of measured task "
                    f"{task.name!r}, such as {shared[0].input[:40]!r}; "
                    "what is trained on cannot show what is kept: leave one of them out"
                )


def check_target_apart(measured: Sequence[Task], target: Task) -> None:
    """Check that no measured question is among those that the target trains and chooses on.

    Raises:
        ConfigError: naming the first task that overlaps.
    """
    check_apart(measured, {f"target {target.name!r}": target.train + target.validation})


def check_rules_apart(measured: Sequence[Task], anchors: Iterable[Task]) -> None:
    """Check that no measured task is of an anchor's kind of rule, on whatever words.

    This is about embedded anchors; which tasks of a user's are alike cannot be known.

    Args:
        measured: the tasks of the measurement.
        anchors: the tasks that keep terms draw their prompts from.

    Raises:
        ConfigError: naming the first pair that does.
    """
    rules: dict[str, str] = {}
    for task in anchors:
        if task.name in CATALOG and CATALOG[task.name].role == "anchor":
            rules.setdefault(CATALOG[task.name].rule, task.name)
    for task in measured:
        rule = CATALOG[task.name].rule if task.name in CATALOG else None
        if rule in rules:
            raise ConfigError(
                f"anchor task {rules[rule]!r} has the rule of measured task {task.name!r} "
                f"({rule}); what is trained on cannot show what is kept: leave one of them out"
            )


def _pair(example: Example) -> tuple[str, str]:
    return example.input.strip().casefold(), example.output.strip().casefold()

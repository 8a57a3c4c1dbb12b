"""What is measured must be apart from what is trained on: anchors, and general data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from keepshot.errors import ConfigError
from keepshot.prompts import Example
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


def _pair(example: Example) -> tuple[str, str]:
    return example.input.strip().casefold(), example.output.strip().casefold()

"""A study whose units take a moment and need no model; run as a program, it is one runner of it.

    python tests/study_work.py DIRECTORY LOG [UNIT SIGNAL]

Every unit is noted in LOG when it begins and when it ends, by the process that does it. UNIT sends
SIGNAL (a number; 0 sleeps) to its own process each time it is done.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from keepshot.jobs.apart import done_apart
from keepshot.progress import Silent
from keepshot.records import ItemResult
from keepshot.study.directory import StudyDirectory
from keepshot.study.grid import Grid, Unit, expand
from keepshot.study.runner import Outcome, Perform, Tally, Terms, work
from keepshot.study.spec import StudySpec

SECONDS = 0.02


class Watched(Silent):
    """Keeps what a runner says."""

    def __init__(self) -> None:
        self.tallies: list[Tally] = []
        self.notes: list[str] = []

    def tally(self, tally: Tally) -> None:
        self.tallies.append(tally)

    def note(self, text: str) -> None:
        self.notes.append(text)


def moment_spec(models: int = 3) -> StudySpec:
    """3 bases, 6 tunings; each of the 9 models is asked on two splits: 24 units."""
    content = {
        "models": [f"model-{number}" for number in range(models)],
        "targets": ["support"],
        "recipes": {"plain": {"steps": 1}, "other": {"steps": 2}},
        "asks": {"one": {"tasks": ["addition"], "splits": ["validation", "test"]}},
    }
    return StudySpec.from_mapping(content, source="moment")


def row_of(unit: Unit) -> ItemResult:
    """The row that a unit finds, the same whenever and wherever it is done."""
    return ItemResult(
        arm=unit.subject.label, model=unit.subject.model, lam=None, task="addition",
        split=unit.split, shots=0, seed=0, item="1", question="1 + 1", gold="2",
        answer=unit.id, choices=[], log_likelihoods=[], correct=1.0,
        correct_per_character=None, format_failure=0.0, label_leakage=0.0,
    )  # fmt: skip


def performing(directory: StudyDirectory, log: Path, seconds: float = SECONDS):
    """What a unit does: a file for a model, or a row; with two lines in the log."""

    def note(word: str, unit: Unit) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {word} {unit.id}\n")

    def perform(unit: Unit) -> Outcome:
        note("begins", unit)
        if unit.needs is not None:
            assert directory.has_model(unit.needs), "its model must be there"
        time.sleep(seconds)
        items = None
        if unit.kind == "tune":
            folder = directory.model(unit.id)
            folder.mkdir(exist_ok=True)
            (folder / "tuning.json").write_text("{}", encoding="utf-8")
        else:
            items = [row_of(unit)]
        note("ends", unit)
        return Outcome(items=items, work_seconds=seconds)

    return perform


@dataclass(frozen=True)
class Deadly:
    """Units that end their process, by the number of the signal."""

    directory: Path
    log: Path
    signals: dict[str, int]
    unit: Unit | None = None


def deadly_perform(job: Deadly) -> Callable[[Unit], Outcome]:
    """Do units as `performing` does, but for those that kill."""
    plain = performing(StudyDirectory(job.directory), job.log, 0.0)

    def perform(unit: Unit) -> Outcome:
        found = plain(unit)
        if unit.id in job.signals:
            os.kill(os.getpid(), job.signals[unit.id])
            time.sleep(60)  # after a signal of 0, which does nothing
        return found

    return perform


def deadly_in_child(job: Deadly) -> Outcome:
    assert job.unit is not None
    found = deadly_perform(job)(job.unit)
    return replace(found, processor_seconds=7.0, peak_bytes=12345)


def deadly_apart(job: Deadly) -> Perform:
    """The same in a process of its own."""
    return lambda unit: done_apart(deadly_in_child, replace(job, unit=unit))


def opened(path: Path) -> tuple[Grid, StudyDirectory]:
    """The grid, and its directory ready to be worked on."""
    spec = moment_spec()
    directory = StudyDirectory(path)
    directory.open("name: moment\n", spec.fingerprint())
    return expand(spec), directory


if __name__ == "__main__":
    grid, directory = opened(Path(sys.argv[1]))
    print("ready", flush=True)
    if len(sys.argv) > 3:
        deadly = Deadly(directory.path, Path(sys.argv[2]), {sys.argv[3]: int(sys.argv[4])})
        terms = Terms(apart=deadly_apart(deadly))
        work(grid, directory, deadly_perform(deadly), Watched(), terms)
    else:
        work(grid, directory, performing(directory, Path(sys.argv[2])), Watched())

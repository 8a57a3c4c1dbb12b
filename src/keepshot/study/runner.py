"""Does the units of a study, one after the other, beside any number of other runners.

Only schedules: what a unit does is a callback. A unit is claimed, done, and its record written
once; a fault becomes a record with its traceback and stops nothing but what needs that unit. What
was not recorded when a process ended is done again by whoever comes next, and apart from its own
process, so that a unit that ends its process every time is found out and the runner goes on.
"""

from __future__ import annotations

import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from keepshot.errors import UserError, is_full_disk
from keepshot.progress import Progress
from keepshot.records import InstructionRow, ItemResult, ModelRecord, TrainingRecord
from keepshot.study.attempts import FaultApartError, ProcessDiedError
from keepshot.study.costs import Overhead
from keepshot.study.directory import Claimed, StudyDirectory, UnitRecord
from keepshot.study.grid import Grid, Unit

POLL_SECONDS = 0.5
"""Between two looks at what other runners have finished, where nothing else is left to do."""


@dataclass(frozen=True)
class Outcome:
    """What a unit found, and what it took."""

    items: list[ItemResult] | None = None
    """Rows of a measurement; None for tuning."""
    instructions: list[InstructionRow] | None = None
    """Rows of instructions that were put; None where none were."""
    model: ModelRecord | None = None
    training: TrainingRecord | None = None
    loading_seconds: float = 0.0
    work_seconds: float = 0.0
    tokens: int = 0
    task_versions: dict[str, int] = field(default_factory=dict[str, int])
    processor_seconds: float | None = None
    """Of the process that did it, where that was another."""
    peak_bytes: int | None = None
    """As `processor_seconds`."""


Perform = Callable[[Unit], Outcome]


@dataclass(frozen=True)
class Terms:
    """What a runner may do."""

    limit_seconds: float | None = None
    """No unit is begun after this time; what is begun is finished."""
    keep_models: bool = False
    """Keep tuned models that nothing needs any more."""
    apart: Perform | None = None
    """Does one unit in a process of its own, once a process was lost at it. It raises
    `ProcessDiedError` if that one ends too, and `FaultApartError` for a fault."""


USUAL = Terms()


@dataclass(frozen=True)
class Tally:
    """How far a study is."""

    total: int
    done: int
    failed: int
    running: tuple[str, ...]
    """Labels of the units that some runner is at."""
    seconds_left: float | None
    """At the pace of what is recorded, shared among the runners; None where nothing is."""
    overhead: Overhead | None = None
    """Of the units that are done, where it was asked for."""

    @property
    def left(self) -> int:
        """Units neither recorded nor at work."""
        return self.total - self.done - self.failed - len(self.running)


class Watch(Progress, Protocol):
    """What a runner tells of itself."""

    def tally(self, tally: Tally) -> None:
        """Say how far the study is."""
        ...


def work(
    grid: Grid,
    directory: StudyDirectory,
    perform: Perform,
    watch: Watch,
    terms: Terms = USUAL,
) -> Tally:
    """Do units until none is left, or until no more may be begun.

    Args:
        grid: the units.
        directory: their place, opened.
        perform: does one unit.
        watch: told of every unit.
        terms: how long, and what it leaves.

    Returns:
        How far the study then is, counting what other runners did.

    Raises:
        StudyError: if a record is of another version.
        OutputError: if the disk is full: nothing further could be recorded.
    """
    runner = _Runner(grid, directory, perform, watch, terms)
    limit_seconds, keep_models = terms.limit_seconds, terms.keep_models
    began = time.monotonic()
    while True:
        runner.settle()
        watch.tally(tally(grid, directory))
        todo = runner.todo()
        if not todo:
            directory.drop_left_claims()
            break
        if limit_seconds is not None and time.monotonic() - began >= limit_seconds:
            break
        if not any(runner.attempt(unit) for unit in runner.in_order(todo)):
            time.sleep(POLL_SECONDS)
        if not keep_models:
            runner.drop_models()
    if not keep_models:
        runner.drop_models()
    return tally(grid, directory)


def tally(grid: Grid, directory: StudyDirectory) -> Tally:
    """Return how far a study is, by its directory."""
    records = directory.records(grid.units)
    running = [c.unit for c in directory.running() if c.unit in grid.units]
    active = tuple(grid.units[unit].label for unit in running if unit not in records)
    failed = sum(record.status == "failed" for record in records.values())
    left = [unit for identity, unit in grid.units.items() if identity not in records]
    return Tally(
        total=len(grid.units),
        done=len(records) - failed,
        failed=failed,
        running=active,
        seconds_left=_time_left(grid, records, left, max(1, len(active))),
    )


def failures(grid: Grid, directory: StudyDirectory) -> list[UnitRecord]:
    """Return the records of what failed, in the order of the grid."""
    records = directory.records(grid.units)
    return [r for unit in grid.units if (r := records.get(unit)) and r.status == "failed"]


class _Runner:
    def __init__(
        self,
        grid: Grid,
        directory: StudyDirectory,
        perform: Perform,
        watch: Watch,
        terms: Terms,
    ) -> None:
        self.grid, self.directory, self.perform, self.watch = grid, directory, perform, watch
        self.apart = terms.apart
        self.dependents = grid.dependents
        self.held: tuple[str, str | None] | None = None
        self.unmade: set[str] = set()
        """Makers whose record is there and whose model could not be made again."""

    def settle(self) -> None:
        """Record as failed what needs a tuned model that there will not be."""
        records = self.directory.records(self.grid.units)
        for unit in self.grid.units.values():
            if unit.id in records:
                continue
            causes = [records[one] for one in unit.requires if one in records]
            lost = [one for one in causes if one.status != "done" or one.unit in self.unmade]
            if not lost:
                continue
            cause = lost[0]
            why = cause.reason or "its model could not be made again"
            reason = f"needs `{cause.label}`, which failed: {why}"
            self.directory.write_unclaimed(
                _record(unit, Outcome(), 0.0, status="failed", reason=reason)
            )

    def todo(self) -> list[Unit]:
        """Return what is not settled, and makers whose deleted model is needed once more."""
        records = self.directory.records(self.grid.units)
        found: list[Unit] = []
        for unit in self.grid.units.values():
            again = unit.kind != "measure" and self._is_wanted(unit, records)
            if unit.id not in records or again:
                found.append(unit)
        return found

    def in_order(self, todo: Sequence[Unit]) -> list[Unit]:
        """Return what can be begun: first what needs the models in memory, last what others do."""
        records = self.directory.records(self.grid.units)
        waiting = {unit.id for unit in todo}
        others = {self.grid.units[c.unit].holds for c in self.directory.running()
                  if c.unit in self.grid.units}  # fmt: skip
        ready = [
            unit
            for unit in todo
            if all(one in records and one not in waiting for one in unit.requires)
        ]
        return sorted(ready, key=lambda unit: (unit.holds != self.held, unit.holds in others))

    def attempt(self, unit: Unit) -> bool:
        """Do a unit; returns False where another runner has it or has done it."""
        with self.directory.claimed(unit.id, lambda: self._still_open(unit)) as claim:
            if claim is None:
                return False
            self.watch.tally(tally(self.grid, self.directory))
            self.watch.stage(unit.label)
            self._do(unit, claim)
        return True

    def drop_models(self) -> None:
        """Delete the tuned models of which everything is settled."""
        records = self.directory.records(self.grid.units)
        for identity, needing in self.dependents.items():
            if self.directory.model(identity).exists() and all(u in records for u in needing):
                self.directory.drop_model(identity)

    def _do(self, unit: Unit, claim: Claimed) -> None:
        began, spent = time.perf_counter(), time.process_time()
        found = Outcome()
        try:
            found = self._performed(unit)
            record = _record(unit, found, time.perf_counter() - began, claim=claim)
        except Exception as error:
            if is_full_disk(error) or is_full_disk(error.__cause__ or error):
                raise
            reason, trace = _told(error)
            record = _record(
                unit, Outcome(), time.perf_counter() - began, claim=claim, status="failed",
                reason=reason, trace=trace,
            )  # fmt: skip
            first, _, _ = reason.partition("\n")
            self.watch.note(f"failed: {unit.label}: {first}")
            if unit.id in self.directory.records([unit.id]):
                self.unmade.add(unit.id)
        spent = time.process_time() - spent + (found.processor_seconds or 0.0)
        record = record.model_copy(update={"processor_seconds": spent})
        self.directory.write(record, found.items, claim, found.instructions)

    def _performed(self, unit: Unit) -> Outcome:
        """Do a unit here, or in a process of its own where one was lost at it."""
        tried = self.directory.attempts(unit.id)
        while tried.any and self.apart is not None:
            tried.check()
            self.held = None
            try:
                return self.apart(unit)
            except ProcessDiedError as error:
                tried = self.directory.note_death(unit.id, error.death)
                self.watch.note(f"its process ended: {unit.label}: {error.death.words}")
        tried.check()
        self.held = unit.holds
        return self.perform(unit)

    def _still_open(self, unit: Unit) -> bool:
        records = self.directory.records([unit.id, *self.dependents.get(unit.id, ())])
        return unit.id not in records or (unit.kind != "measure" and self._is_wanted(unit, records))

    def _is_wanted(self, unit: Unit, records: dict[str, UnitRecord]) -> bool:
        """Say whether what is recorded as done must be repeated for its model."""
        record = records.get(unit.id)
        if record is None or record.status == "failed" or unit.id in self.unmade:
            return False
        needed = any(one not in records for one in self.dependents[unit.id])
        return needed and not self.directory.has_model(unit.id)


def _record(
    unit: Unit,
    found: Outcome,
    seconds: float,
    *,
    claim: Claimed | None = None,
    status: str = "done",
    reason: str | None = None,
    trace: str | None = None,
) -> UnitRecord:
    content = {
        "unit": unit.id, "kind": unit.kind, "label": unit.label, "status": status,
        "seconds": seconds, "loading_seconds": found.loading_seconds,
        "work_seconds": found.work_seconds, "tokens": found.tokens,
        "peak_bytes": found.peak_bytes or peak_bytes(),
        "model": found.model, "training": found.training, "task_versions": found.task_versions,
        "reason": reason, "trace": trace, "by": f"{claim.host} {claim.pid}" if claim else "",
        "ended": time.time() if claim else None,
    }  # fmt: skip
    return UnitRecord.model_validate(content)


def _told(error: Exception) -> tuple[str, str]:
    """Return what a record says of a fault: its reason, and its traceback."""
    if isinstance(error, FaultApartError):
        return error.fault.reason, error.fault.trace
    return reason_of(error), traceback.format_exc()


def reason_of(error: Exception) -> str:
    """Return the lines that a user is shown, or the last one of a traceback; never nothing."""
    if isinstance(error, UserError):
        return str(error) or type(error).__name__
    told = traceback.TracebackException.from_exception(error)
    told.__notes__ = None  # they come last, and may be about anything, or empty
    return list(told.format_exception_only())[-1].strip()


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _time_left(
    grid: Grid, records: dict[str, UnitRecord], left: Iterable[Unit], runners: int
) -> float | None:
    """Return seconds at the mean pace of units of the same kind, ask and stage."""
    paces: dict[tuple[str, ...], list[float]] = {}
    for identity, record in records.items():
        if record.status == "done":
            for key in _alike(grid.units[identity]):
                paces.setdefault(key, []).append(record.seconds)
    total = 0.0
    for unit in left:
        seconds = next((paces[key] for key in _alike(unit) if key in paces), None)
        if seconds is None:
            return None
        total += sum(seconds) / len(seconds)
    return total / runners


def _alike(unit: Unit) -> list[tuple[str, ...]]:
    """Return what a unit's time may be like, the likeliest first."""
    subject = unit.subject
    recipe = subject.recipe or ""
    return [
        (unit.kind, subject.model, recipe, unit.ask or "", unit.split, subject.stage),
        (unit.kind, subject.model, unit.ask or "", unit.split),
        (unit.kind, subject.model),
        (unit.kind,),
    ]

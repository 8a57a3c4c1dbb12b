"""What a study's units cost by their records: overhead, idle time, means. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from keepshot.study.directory import UnitRecord


@dataclass(frozen=True)
class Overhead:
    """Time of runners that went into no loading, making, tuning or scoring."""

    units: int
    """Of those done."""
    seconds: float
    """From their beginnings to their ends."""
    beside_seconds: float
    """Of these, neither loading nor work: tasks, tokens, grading, records."""
    idle_seconds: float
    """Between two units of one process, waiting for others included."""

    @property
    def share(self) -> float:
        """Of all the time of runners between their first unit and their last."""
        return (self.beside_seconds + self.idle_seconds) / (self.seconds + self.idle_seconds)

    @property
    def words(self) -> str:
        """One line."""
        idle = self.idle_seconds / (self.seconds + self.idle_seconds)
        return (
            f"overhead {100 * self.share:.1f} % (all but loading, making, tuning and scoring; "
            f"{100 * idle:.1f} % idle between units), {self.units} units"
        )


def overhead_of(records: Iterable[UnitRecord]) -> Overhead | None:
    """Return what the units that are done took besides their work; None where none is."""
    done = [record for record in records if record.status == "done"]
    seconds = sum(record.seconds for record in done)
    if seconds <= 0.0:
        return None
    worked = sum(record.loading_seconds + record.work_seconds for record in done)
    return Overhead(len(done), seconds, max(0.0, seconds - worked), _idle_seconds(done))


def _idle_seconds(done: Iterable[UnitRecord]) -> float:
    """Return the time between two units that one process did, where their ends are known."""
    by_runner: dict[str, list[tuple[float, float]]] = {}
    for record in done:
        if record.ended is not None and record.by:
            span = record.ended - record.seconds, record.ended
            by_runner.setdefault(record.by, []).append(span)
    idle = 0.0
    for spans in map(sorted, by_runner.values()):
        for (_, ended), (began, _) in itertools.pairwise(spans):
            idle += max(0.0, began - ended)
    return idle


@dataclass(frozen=True)
class Recorded:
    """Means over units of one kind that are done."""

    units: int
    tokens: float
    seconds: float
    processor_seconds: float | None
    """None where some unit's was not counted."""
    peak_bytes: int | None
    """The most that any of their processes had held by then."""


def recorded(records: Sequence[UnitRecord]) -> Recorded | None:
    """Return the means of the units that are done; None where none is."""
    done = [record for record in records if record.status == "done"]
    if not done:
        return None
    counted = [record.processor_seconds for record in done if record.processor_seconds > 0.0]
    return Recorded(
        units=len(done),
        tokens=fmean(record.tokens for record in done),
        seconds=fmean(record.seconds for record in done),
        processor_seconds=fmean(counted) if len(counted) == len(done) else None,
        peak_bytes=max((record.peak_bytes or 0 for record in done), default=0) or None,
    )

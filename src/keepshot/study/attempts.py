"""What is known of attempts at a unit that ended with their process, and when that is enough.

A claim that its runner left behind says that the unit was begun and not that it was to blame: the
runner may have been killed by its user or have lost its machine. So such a unit is begun again in
a process of its own, and only deaths that the waiting runner lived to see count against the unit.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from keepshot.errors import StudyError

SEEN_LIMIT = 2
"""Deaths of a unit's own process, seen by its runner, after which it is not begun again."""
LOST_LIMIT = 20
"""Runners that were gone while at a unit, after which it is not begun again."""
CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP")


class Death(BaseModel):
    """How the process of a unit ended, as seen by the runner that waited for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    how: str
    """Name of the signal, or `exit status N`."""
    peak_bytes: int | None = None
    """Most memory it was seen to hold."""
    machine_bytes: int | None = None
    """Of memory that the machine has."""
    trace: str = ""
    """Where it was at a fatal signal that can be told, else empty."""

    @property
    def words(self) -> str:
        """Say what was seen."""
        if self.peak_bytes is None:
            return self.how
        machine = f" of the machine's {_gb(self.machine_bytes)}" if self.machine_bytes else ""
        return f"{self.how} at a peak of {_gb(self.peak_bytes)}{machine}"


class Attempts(BaseModel):
    """Attempts at one unit that came to nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lost: tuple[str, ...] = ()
    """Claims, by their tokens, whose runner was gone: each counts once, whoever finds it."""
    deaths: tuple[Death, ...] = ()

    @property
    def any(self) -> bool:
        """Whether the unit must be begun in a process of its own."""
        return bool(self.lost or self.deaths)

    def with_lost(self, token: str) -> Attempts:
        """Return these and one more claim that its runner left behind."""
        if token in self.lost:
            return self
        return self.model_copy(update={"lost": (*self.lost, token)})

    def with_seen(self, death: Death) -> Attempts:
        """Return these and one more death."""
        return self.model_copy(update={"deaths": (*self.deaths, death)})

    def check(self) -> None:
        """Refuse to begin the unit once more.

        Raises:
            UnitDiedError: if it ended too many processes.
        """
        if len(self.deaths) >= SEEN_LIMIT:
            last = self.deaths[-1]
            times = len(self.lost) + len(self.deaths)
            error = UnitDiedError(
                f"begun {times} times, and its process ended each time: the last by {last.words};\n"
                f"{_advice(last)}"
            )
            if last.trace:
                error.add_note(last.trace)
            raise error
        if len(self.lost) >= LOST_LIMIT:
            raise UnitDiedError(
                f"begun {len(self.lost)} times, and its runner was gone each time before it ended;"
                "\nif they were killed for want of memory, use fewer --workers; --retry begins it "
                "again"
            )


class UnitDiedError(StudyError):
    """A unit that is not begun again, because its process ended each time."""


class ProcessDiedError(Exception):
    """The process that did a unit apart ended without an answer."""

    def __init__(self, death: Death) -> None:
        super().__init__(death.words)
        self.death = death


@dataclass(frozen=True)
class Fault:
    """What went wrong in the process that did a unit apart, in a form that another can show."""

    reason: str
    trace: str
    is_full_disk: bool = False


class FaultApartError(Exception):
    """A unit that was done apart met a fault, and its process lived to tell."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault


def death_of(
    exit_code: int, peak_bytes: int | None, machine_bytes: int | None, trace: str
) -> Death:
    """Return what an exit code says: the negative of a signal's number, or a status.

    Example:
        >>> death_of(-9, 4_000_000_000, 8_000_000_000, "").words
        "SIGKILL at a peak of 4.0 GB of the machine's 8.0 GB"
    """
    try:
        how = signal.Signals(-exit_code).name if exit_code < 0 else f"exit status {exit_code}"
    except ValueError:
        how = f"signal {-exit_code}"
    return Death(how=how, peak_bytes=peak_bytes, machine_bytes=machine_bytes, trace=trace)


def _advice(last: Death) -> str:
    if last.how == "SIGKILL":
        return (
            "most likely memory ran out: free some or use fewer --workers, or make the unit smaller"
            "\n(model, dtype, batch_size); then --retry begins it again"
        )
    if last.how in CRASHES:
        return "a library crashed, at the lines in its record's trace; --retry begins it again"
    return "its record's trace may say more; --retry begins it again"


def _gb(size: int | None) -> str:
    return f"{(size or 0) / 1e9:.1f} GB"

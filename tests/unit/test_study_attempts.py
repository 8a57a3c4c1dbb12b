"""Units that end their process: found out by those who live, and never in the way of the others."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import study_work
from keepshot.errors import OutputError, TaskError
from keepshot.jobs.apart import done_apart
from keepshot.study.attempts import (
    LOST_LIMIT,
    SEEN_LIMIT,
    Attempts,
    FaultApartError,
    ProcessDiedError,
    UnitDiedError,
    death_of,
)
from keepshot.study.directory import StudyDirectory
from keepshot.study.runner import Terms, failures, work
from study_work import Deadly, Watched, deadly_apart, deadly_perform, opened, performing

PROGRAM = Path(study_work.__file__)


def began(log: Path, unit: str) -> int:
    lines = [line.split() for line in log.read_text("utf-8").splitlines()]
    return sum(words[1:] == ["begins", unit] for words in lines)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    assert runner.stdout.readline() == "ready\n"
    return runner


def test_a_unit_that_kills_its_process_fails_after_three_and_the_others_are_done(
    tmp_path: Path,
) -> None:
    """It takes the first runner with it; the second lives through it."""
    grid, directory = opened(tmp_path / "s")
    log = tmp_path / "log"
    unit = next(u for u in grid.units.values() if u.kind == "tune" and len(grid.dependents[u.id]))
    first, second = (start(tmp_path / "s", log, unit.id, 9) for _ in range(2))
    # One of the two meets the unit first and is gone; the other takes it over.
    assert sorted([first.wait(60), second.wait(60)]) == [-signal.SIGKILL, 0]
    [record, *needing] = sorted(failures(grid, directory), key=lambda r: r.unit != unit.id)
    assert began(log, unit.id) == 1 + SEEN_LIMIT
    assert record.unit == unit.id
    lines = str(record.reason).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(
        "begun 3 times, and its process ended each time: the last by SIGKILL"
    )
    assert "GB of the machine's" in lines[0]
    assert "--workers" in lines[1]
    assert "--retry" in lines[2]
    assert {r.unit for r in needing} == set(grid.dependents[unit.id])
    records = directory.records(grid.units)
    assert sum(r.status == "done" for r in records.values()) == 24 - 1 - len(needing)
    # Left as it is by whoever comes next; forgotten, it is begun as if for the first time.
    work(grid, directory, performing(directory, log, 0.0), Watched())
    assert began(log, unit.id) == 3
    directory.forget(r.unit for r in failures(grid, directory))
    assert not directory.attempts(unit.id).any
    assert work(grid, directory, performing(directory, log, 0.0), Watched()).done == 24
    assert began(log, unit.id) == 4


def test_runners_that_are_killed_do_not_use_up_a_units_attempts(tmp_path: Path) -> None:
    """More kills of a runner than a unit has attempts, all at the same unit: it is done at last."""
    grid, directory = opened(tmp_path / "s")
    log = tmp_path / "log"
    unit = next(iter(grid.units.values()))
    log.touch()
    for _ in range(SEEN_LIMIT + 1):
        seen = began(log, unit.id)
        runner = start(tmp_path / "s", log, unit.id, 0)  # sleeps in the middle, or its child does
        while began(log, unit.id) == seen:
            time.sleep(0.005)
        runner.kill()
        runner.wait()
    assert not directory.records([unit.id])
    alive = Deadly(directory.path, log, {})
    terms = Terms(apart=deadly_apart(alive))
    assert work(grid, directory, deadly_perform(alive), Watched(), terms).done == 24
    record = directory.records([unit.id])[unit.id]
    assert record.peak_bytes == 12345, "it was done apart"
    assert record.processor_seconds >= 7.0
    assert not directory.attempts(unit.id).any, "what is done has no attempts"


def test_an_interrupted_or_failing_unit_is_no_lost_attempt(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")

    def interrupted(_: object) -> study_work.Outcome:
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            work(grid, directory, interrupted, Watched())
    assert not any(directory.attempts(unit).any for unit in grid.units)
    assert directory.running() == []


def test_a_lost_claim_counts_once_whoever_finds_it(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")
    unit = next(iter(grid.units))
    claim = '{"unit": "%s", "host": "h", "pid": 1, "started": null, "token": "%s"}'
    stale = StudyDirectory(directory.path, stale_seconds=-1.0)
    for token, lost in (("a", 1), ("a", 1), ("b", 2)):
        (directory.path / "claims" / unit).write_text(claim % (unit, token), "utf-8")
        with stale.claimed(unit, lambda: True) as mine:
            assert mine is not None
            assert len(stale.attempts(unit).lost) == lost


def test_limits_and_their_words() -> None:
    lost = Attempts(lost=tuple(map(str, range(LOST_LIMIT - 1))))
    lost.check()
    with pytest.raises(UnitDiedError, match="its runner was gone each time"):
        lost.with_lost("another").check()
    crash = death_of(-signal.SIGSEGV, 10**9, None, "File model.py, line 3")
    assert crash.words == "SIGSEGV at a peak of 1.0 GB"
    with pytest.raises(UnitDiedError, match="a library crashed") as caught:
        Attempts().with_seen(crash).with_seen(crash).check()
    assert caught.value.__notes__ == ["File model.py, line 3"]
    assert death_of(3, None, None, "").words == "exit status 3"
    assert death_of(-64, None, None, "").how in ("SIGRTMAX", "signal 64")


# -- one call apart ------------------------------------------------------------------------------


def fall(how: str) -> int:
    match how:
        case "mended":
            raise TaskError("a row is too long;\ndrop it")
        case "full":
            raise OutputError("x: the disk is full") from OSError(28, "No space left on device")
        case "fault":
            raise ZeroDivisionError("ours")
        case "crash":
            import ctypes

            ctypes.string_at(0)
        case "leave":
            sys.exit(5)
        case "grow":
            block = bytearray(200_000_000)
            block[::4096] = b"x" * len(block[::4096])
            time.sleep(0.5)
            signal.raise_signal(signal.SIGKILL)
    return 0


def test_what_happens_apart_is_told_here() -> None:
    with pytest.raises(FaultApartError) as caught:
        done_apart(fall, "mended")
    assert caught.value.fault.reason == "a row is too long;\ndrop it"
    with pytest.raises(FaultApartError) as caught:
        done_apart(fall, "fault")
    assert caught.value.fault.reason == "ZeroDivisionError: ours"
    assert 'raise ZeroDivisionError("ours")' in caught.value.fault.trace
    with pytest.raises(OutputError, match="disk is full") as full:
        done_apart(fall, "full")
    assert isinstance(full.value.__cause__, OSError)


def test_a_process_that_dies_apart_says_how() -> None:
    with pytest.raises(ProcessDiedError) as caught:
        done_apart(fall, "crash")
    assert caught.value.death.how == "SIGSEGV"
    assert "in fall" in caught.value.death.trace, "the line is told"
    with pytest.raises(ProcessDiedError, match="exit status 5"):
        done_apart(fall, "leave")
    with pytest.raises(ProcessDiedError) as caught:
        done_apart(fall, "grow")
    assert caught.value.death.how == "SIGKILL"
    assert 200_000_000 < (caught.value.death.peak_bytes or 0) < 500_000_000

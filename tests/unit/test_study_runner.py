"""The runner and its directory: nothing lost, nothing twice, faults are records."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import study_work
from keepshot.errors import OutputError, StudyError, TaskError
from keepshot.records import read_items
from keepshot.study.directory import StudyDirectory, UnitRecord, _host
from keepshot.study.grid import Unit
from keepshot.study.runner import Outcome, Terms, failures, reason_of, tally, work
from study_work import Watched, opened, performing, row_of

PROGRAM = Path(study_work.__file__)


def events(log: Path, word: str) -> Counter[str]:
    lines = [line.split() for line in log.read_text("utf-8").splitlines()]
    return Counter(line[2] for line in lines if line[1] == word)


def check_results(place: Path) -> None:
    """Every record is there, done, with the rows that its unit always finds."""
    grid, directory = opened(place)
    records = directory.records(grid.units)
    assert set(records) == set(grid.units)
    assert {record.status for record in records.values()} == {"done"}
    for unit in grid.units.values():
        if unit.kind == "measure":
            assert read_items(directory.rows(unit.id)) == [row_of(unit)]
    assert not list((place / "models").iterdir()), "models that nothing needs are deleted"
    assert not list((place / "claims").glob("[a-z]*"))


def test_all_units_are_done_once_and_models_deleted(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")
    log, watch = tmp_path / "log", Watched()
    most: list[int] = []
    perform = performing(directory, log, 0.0)

    def counting(unit: Unit) -> Outcome:
        most.append(len(list((tmp_path / "s" / "models").glob("tune-*"))))
        return perform(unit)

    found = work(grid, directory, counting, watch)
    assert (found.total, found.done, found.failed, found.left) == (24, 24, 0, 0)
    assert set(events(log, "begins").values()) == {1}
    assert max(most) == 1, "one tuned model on disk at a time"
    check_results(tmp_path / "s")
    again = work(grid, directory, perform, watch)
    assert again.done == 24
    assert sum(events(log, "begins").values()) == 24
    counts = [t.done for t in watch.tallies]
    assert counts == sorted(counts)
    assert any(t.running and t.seconds_left is not None for t in watch.tallies)


def test_models_stay_where_they_are_kept(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")
    work(
        grid,
        directory,
        performing(directory, tmp_path / "log", 0.0),
        Watched(),
        Terms(keep_models=True),
    )
    assert len(list((tmp_path / "s" / "models").iterdir())) == 6


def test_a_fault_is_a_record_and_stops_only_what_needs_it(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")
    plain = performing(directory, tmp_path / "log", 0.0)

    def perform(unit: Unit) -> Outcome:
        if unit.kind == "tune" and unit.subject.model == "model-0":
            raise ZeroDivisionError("a fault of ours")
        if unit.kind == "measure" and unit.subject == grid.cells[-1].subject:
            raise TaskError("the row is too long;\ndrop it")
        return plain(unit)

    watch = Watched()
    found = work(grid, directory, perform, watch)
    # 2 tunings with 4 measurements that need them, and 2 measurements of the last model
    assert (found.done, found.failed) == (24 - 8, 8)
    assert len(watch.notes) == 4, "what merely needs a failed unit is not said again"
    records = failures(grid, directory)
    kinds = Counter((r.reason or "").split("`")[0].split(":")[0] for r in records)
    assert kinds == {"ZeroDivisionError": 2, "needs ": 4, "the row is too long;\ndrop it": 2}
    first = next(r for r in records if r.kind == "tune")
    assert "a fault of ours" in (first.trace or "")
    assert "Traceback" in (first.trace or "")
    assert all("a fault of ours" in (r.reason or "") for r in records if "needs" in str(r.reason))
    # Starting again leaves failures as they are; forgetting them does them again.
    begun = sum(events(tmp_path / "log", "begins").values())
    assert work(grid, directory, plain, Watched()).failed == 8
    assert sum(events(tmp_path / "log", "begins").values()) == begun
    directory.forget(record.unit for record in failures(grid, directory))
    # The last model is needed again and was deleted: it is tuned again, without a second record.
    written = directory.path / "units" / f"{grid.cells[-1].unit}.json"
    assert not written.exists()
    assert work(grid, directory, plain, Watched()).done == 24
    assert sum(events(tmp_path / "log", "begins").values()) == begun + 8 + 1
    check_results(tmp_path / "s")


def test_the_reason_is_the_fault_and_not_a_note_that_was_added_to_it() -> None:
    """An empty note left a reason of no lines, which ended the runner that wanted its first."""
    for note in ("", "see the manual", "two\nlines"):
        fault = ValueError("too wide")
        fault.add_note(note)
        assert reason_of(fault) == "ValueError: too wide"
    assert reason_of(AssertionError()) == "AssertionError"
    assert reason_of(TaskError("")) == "TaskError"


def test_a_model_that_cannot_be_made_again_fails_what_needs_it(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")
    plain = performing(directory, tmp_path / "log", 0.0)
    work(grid, directory, plain, Watched())
    directory.forget([grid.cells[-1].unit])

    def broken(unit: Unit) -> Outcome:
        raise TaskError("gone")

    found = work(grid, directory, broken, Watched())
    assert (found.done, found.failed) == (23, 1)
    assert "could not be made again" in str(failures(grid, directory)[0].reason)


def test_a_full_disk_stops_the_runner(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")

    def full(unit: Unit) -> Outcome:
        raise OutputError("x: the disk is full") from OSError(28, "No space left on device")

    with pytest.raises(OutputError):
        work(grid, directory, full, Watched())
    assert directory.records(grid.units) == {}
    assert directory.running() == []


def test_no_unit_is_begun_after_the_limit(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")
    perform = performing(directory, tmp_path / "log", 0.02)
    found = work(grid, directory, perform, Watched(), Terms(limit_seconds=0.1))
    assert 1 <= found.done < 24
    assert found.left == 24 - found.done
    assert work(grid, directory, perform, Watched()).done == 24


def test_two_runners_share_the_work(tmp_path: Path) -> None:
    """Two processes at once: every unit begins once, and both do some."""
    place, log = tmp_path / "s", tmp_path / "log"
    runners = [start(place, log) for _ in range(2)]
    for runner in runners:
        assert runner.wait(60) == 0
    assert set(events(log, "begins").values()) == {1}
    assert sum(events(log, "ends").values()) == 24
    check_results(place)
    doers = {line.split()[0] for line in log.read_text("utf-8").splitlines()}
    assert len(doers) == 2


def start(place: Path, log: Path) -> subprocess.Popen[str]:
    runner = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(place), str(log)], stdout=subprocess.PIPE, text=True
    )
    assert runner.stdout is not None
    assert runner.stdout.readline() == "ready\n"
    return runner


def kill_and_finish(tmp_path: Path, kills: int, seed: int) -> None:
    """Kill runners at random points, one after the other; then let one finish."""
    place, log = tmp_path / "s", tmp_path / "log"
    random_ = random.Random(seed)
    log.touch()
    for _ in range(kills):
        lines = len(log.read_text("utf-8").splitlines()) + random_.randint(0, 3)
        runner = start(place, log)
        while len(log.read_text("utf-8").splitlines()) < lines and runner.poll() is None:
            time.sleep(0.001)
        time.sleep(random_.uniform(0.0, 0.03))
        runner.send_signal(signal.SIGKILL)
        assert runner.wait() == -signal.SIGKILL, "it was killed while there was work"
    grid, directory = opened(place)
    survived = {p: p.read_bytes() for p in (place / "units").glob("*.json")}
    assert 0 < len(survived) < 24
    work(grid, directory, performing(directory, log, 0.0), Watched())
    check_results(place)
    assert all(path.read_bytes() == content for path, content in survived.items())
    repeated = sum(count - 1 for count in events(log, "begins").values())
    # A kill costs the unit at work, and its model where that was deleted too early: never.
    assert repeated <= kills


def test_killed_ten_times_runners_lose_and_repeat_nothing(tmp_path: Path) -> None:
    kill_and_finish(tmp_path, kills=10, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 5))
def test_the_same_at_other_points(tmp_path: Path, seed: int) -> None:
    kill_and_finish(tmp_path, kills=10, seed=seed)


def test_a_claim_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")
    unit = next(iter(grid.units))
    with directory.claimed(unit, lambda: True) as mine:
        assert mine is not None
        other = StudyDirectory(directory.path)
        with other.claimed(unit, lambda: True) as theirs:
            assert theirs is None
        assert [claim.unit for claim in other.running()] == [unit]
        # As if the number of this process were that of another one, started later.
        claim_path = directory.path / "claims" / unit
        written = json.loads(claim_path.read_text("utf-8"))
        claim_path.write_text(json.dumps({**written, "started": "1", "token": "x"}), "utf-8")
        assert other.running() == []
        with other.claimed(unit, lambda: True) as theirs:
            assert theirs is not None
            record = UnitRecord.model_validate(
                {"unit": unit, "kind": "measure", "label": "late", "status": "done"}
            )
            assert not directory.write(record, None, mine), "it was taken over meanwhile"
            assert directory.write(record, None, theirs)
    assert not (directory.path / "claims" / unit).exists()


def test_a_claim_that_outlived_its_record_is_dropped_at_the_end(tmp_path: Path) -> None:
    """As of a runner that was killed between its last record and the end of its claim."""
    grid, directory = opened(tmp_path / "s")
    perform = performing(directory, tmp_path / "log", 0.0)
    work(grid, directory, perform, Watched())
    path = directory.path / "claims" / next(iter(grid.units))
    claim = {"unit": path.name, "host": _host(), "pid": 1, "started": "1", "token": "t"}
    path.write_text(json.dumps(claim), "utf-8")
    work(grid, directory, perform, Watched())
    check_results(directory.path)


def test_a_claim_of_another_machine_goes_stale(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")
    unit = next(iter(grid.units))
    path = directory.path / "claims" / unit
    claim = {"unit": unit, "host": "elsewhere", "pid": 1, "started": None, "token": "t"}
    path.write_text(json.dumps(claim), "utf-8")
    assert [found.host for found in directory.running()] == ["elsewhere"]
    os.utime(path, (time.time() - 61.0,) * 2)
    assert directory.running() == []
    with directory.claimed(unit, lambda: True) as mine:
        assert mine is not None


def test_a_claim_is_refused_where_the_work_was_done_meanwhile(tmp_path: Path) -> None:
    _, directory = opened(tmp_path / "s")
    with directory.claimed("unit", lambda: False) as mine:
        assert mine is None
    assert directory.running() == []


def test_a_runner_waits_for_what_another_is_at(tmp_path: Path) -> None:
    """All that is left needs a model that another runner is making."""
    grid, directory = opened(tmp_path / "s")
    plain = performing(directory, tmp_path / "log", 0.0)
    slow = next(u for u in reversed(grid.units.values()) if u.kind == "tune")
    entered, release = threading.Event(), threading.Event()

    def waiting(unit: Unit) -> Outcome:
        if unit == slow:
            entered.set()
            release.wait(10)
        return plain(unit)

    first = threading.Thread(target=work, args=(grid, directory, waiting, Watched()))
    first.start()
    assert entered.wait(10)
    second = StudyDirectory(directory.path)
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(work(grid, second, plain, Watched()).done))
    other.start()
    time.sleep(0.2)
    assert other.is_alive()
    release.set()
    first.join(20)
    other.join(20)
    assert found == [24]
    assert set(events(tmp_path / "log", "begins").values()) == {1}


def test_records_of_other_versions_are_refused_by_name(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")
    work(grid, directory, performing(directory, tmp_path / "log", 0.0), Watched())
    path = directory.path / "units" / f"{next(iter(grid.units))}.json"
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, "schema": 2, "keepshot": "9.1"}), "utf-8")
    with pytest.raises(StudyError, match=r"keepshot 9\.1 as a record of version 2") as caught:
        tally(grid, StudyDirectory(directory.path))
    assert path.name in str(caught.value)
    path.write_text('{"schema": 1, "unit"', "utf-8")
    with pytest.raises(StudyError, match="delete it"):
        tally(grid, StudyDirectory(directory.path))
    # Same version of records, other keepshot: read.
    path.write_text(json.dumps({**content, "keepshot": "0.0.9"}), "utf-8")
    assert tally(grid, StudyDirectory(directory.path)).done == 24


def test_a_record_that_is_forgotten_while_others_are_read_is_none(tmp_path: Path) -> None:
    """Another runner with `--retry` deletes failures: what was listed is gone when it is read."""
    grid, directory = opened(tmp_path / "s")
    work(grid, directory, performing(directory, tmp_path / "log", 0.0), Watched())
    gone = next(iter(grid.units))
    path = tmp_path / "s" / "units" / f"{gone}.json"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    assert set(StudyDirectory(tmp_path / "s").records(grid.units)) == set(grid.units) - {gone}


def test_a_directory_belongs_to_one_study(tmp_path: Path) -> None:
    grid, directory = opened(tmp_path / "s")
    work(grid, directory, performing(directory, tmp_path / "log", 0.0), Watched())
    with pytest.raises(StudyError, match="holds another study"):
        directory.open("name: other\n", "other")
    directory.open("name: other\n", "other", overwrite=True)
    assert len(directory.records(grid.units)) == 24, "records are kept"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="already exists"):
        StudyDirectory(tmp_path / "full").open("", "x")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "models" / "models").mkdir(parents=True)
    with pytest.raises(OutputError, match="already exists"):
        StudyDirectory(tmp_path / "models").open("", "x")


def test_runners_that_start_at_once_share_the_directory(tmp_path: Path) -> None:
    for number in range(20):
        place, barrier = tmp_path / str(number), threading.Barrier(4)

        def start(place: Path = place, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            StudyDirectory(place).open("name: s\n", "s")

        with ThreadPoolExecutor(4) as pool:
            for started in [pool.submit(start) for _ in range(4)]:
                started.result()
        assert (place / "fingerprint").read_text("utf-8") == "s\n"


def test_a_directory_whose_first_runner_was_killed_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "s" / "units").mkdir(parents=True)
    (tmp_path / "s" / ".lock").touch()
    StudyDirectory(tmp_path / "s").open("name: s\n", "s")
    assert (tmp_path / "s" / "models").is_dir()


def test_a_failure_that_another_runner_does_again_is_no_failure(tmp_path: Path) -> None:
    grid, ours = opened(tmp_path / "s")
    unit = next(iter(grid.units))
    failed = UnitRecord(unit=unit, kind="tune", label="one", status="failed", reason="once")
    ours.write_unclaimed(failed)
    assert ours.records([unit])[unit].status == "failed"
    theirs = StudyDirectory(tmp_path / "s")
    theirs.forget([unit])
    theirs.write_unclaimed(failed.model_copy(update={"status": "done", "reason": ""}))
    assert ours.records([unit])[unit].status == "done"

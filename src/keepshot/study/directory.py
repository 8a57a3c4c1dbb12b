"""A study's directory: records written once, and claims that keep two runners apart.

    study.yaml  units/ID.json (the record, last)  units/ID.parquet (rows)  models/ID  claims/ID
    attempts/ID (of a unit whose process or runner was gone before it ended)

A claim names its process and is touched while that lives; one whose process is gone, or that was
not touched for a minute, is taken over and noted as an attempt that was lost. All that decides who
does what happens under one lock, which the system releases with the process. Knows nothing of
models.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shutil
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keepshot import __version__
from keepshot.errors import OutputError, StudyError
from keepshot.outputs import claim, output_error, write_text
from keepshot.records import (
    InstructionRow,
    ItemResult,
    ModelRecord,
    TrainingRecord,
    write_instructions,
    write_items,
)
from keepshot.study.attempts import Attempts, Death

RECORD_SCHEMA = 1
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
MARK, STUDY, LOCK = "fingerprint", "study.yaml", ".lock"
FOLDERS = ("units", "models", "claims", "attempts")
MAKING = "making.json"
"""Beside a model that was made: how."""
Status = Literal["done", "failed"]


class UnitRecord(BaseModel):
    """What came of one unit; its presence means that the unit is settled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = Field(default=RECORD_SCHEMA, alias="schema")
    keepshot: str = __version__
    unit: str
    kind: Literal["make", "tune", "measure"]
    label: str
    status: Status
    seconds: float = 0.0
    """Of this unit, loading included."""
    loading_seconds: float = 0.0
    work_seconds: float = 0.0
    """Of making, tuning or scoring alone."""
    processor_seconds: float = 0.0
    """Of all processors together, loading included; 0 where it was not counted yet."""
    tokens: int = 0
    """Read by the model: of training samples, or of prompts once shared."""
    peak_bytes: int | None = None
    """Most memory of the process so far."""
    model: ModelRecord | None = None
    training: TrainingRecord | None = None
    task_versions: dict[str, int] = Field(default_factory=dict)
    reason: str | None = None
    """Of a failure: one to three lines."""
    trace: str | None = None
    """Of a failure: its traceback."""
    by: str = ""
    """Host and process."""
    ended: float | None = None
    """When, in seconds since 1970 by the clock of its machine."""

    def to_json(self) -> str:
        """Return the text of the record's file."""
        return self.model_dump_json(by_alias=True, indent=1)


@dataclass(frozen=True)
class Claimed:
    """Who does a unit at the moment."""

    unit: str
    host: str
    pid: int
    started: str | None
    token: str


class StudyDirectory:
    """The place of one study, shared by any number of runners."""

    def __init__(self, path: Path, *, stale_seconds: float = STALE_SECONDS) -> None:
        self.path = path.absolute()
        self._stale_seconds = stale_seconds
        self._known: dict[str, UnitRecord] = {}

    def open(self, spec_text: str, fingerprint: str, *, overwrite: bool = False) -> None:
        """Make the directory for a study, or check that it is of this one.

        Args:
            spec_text: the study as YAML.
            fingerprint: of the study.
            overwrite: go on with another study here; records that both share are kept.

        Raises:
            StudyError: if it is of another study.
            OutputError: if it cannot be written, or holds something else.
        """
        self.check_place(overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(error, self.path) from error
        mark = self.path / MARK
        with self._lock():
            found = mark.read_text("utf-8").strip() if mark.exists() else fingerprint
            if found != fingerprint and not overwrite:
                raise StudyError(
                    f"{self.path}: holds another study ({self.path / STUDY} differs from what is "
                    "asked);\nname another with --out, or add --overwrite to go on here with the "
                    "new one, which keeps the records that both share"
                )
            try:
                for name in FOLDERS:
                    (self.path / name).mkdir(exist_ok=True)
            except OSError as error:
                raise output_error(error, self.path) from error
            write_text(spec_text, self.path / STUDY)
            write_text(fingerprint + "\n", mark)

    def check_place(self, *, overwrite: bool = False) -> None:
        """Check that a study may begin here, or has begun, without writing anything.

        Raises:
            OutputError: if it cannot be written, or holds something else.
        """
        try:
            claim(self.path, overwrite=overwrite)
        except OutputError:
            if not self._is_begun():
                raise

    def _is_begun(self) -> bool:
        """Say whether a study is here, or nothing but what one begins with.

        Of runners that start at once one may look while another has not marked the place yet.
        """
        if (self.path / MARK).exists():
            return True
        if not (self.path / LOCK).exists():
            return False
        names = {entry.name for entry in self.path.iterdir()} - {*FOLDERS, LOCK, STUDY}
        return all(name.startswith((f".{STUDY}", f".{MARK}")) for name in names - {MARK})

    # -- records ---------------------------------------------------------------------------

    def records(self, units: Iterable[str]) -> dict[str, UnitRecord]:
        """Return the records that there are of these units; files of what is done are read once.

        Raises:
            StudyError: if a record is of another version, or cannot be read.
        """
        there = {name for name in os.listdir(self.path / "units") if name.endswith(".json")}
        found: dict[str, UnitRecord] = {}
        for unit in units:
            if f"{unit}.json" not in there:
                self._known.pop(unit, None)
                continue
            record = self._known.get(unit)
            if record is None:
                try:
                    record = _read_record(self.path / "units" / f"{unit}.json")
                except FileNotFoundError:
                    continue  # forgotten since the listing, by one who does failures again
            if record.status == "done":  # what failed may be done again by another
                self._known[unit] = record
            found[unit] = record
        return found

    def write(
        self,
        record: UnitRecord,
        items: list[ItemResult] | None,
        claim: Claimed,
        instructions: list[InstructionRow] | None = None,
    ) -> bool:
        """Write a unit's rows and its record, unless another has taken it over.

        Returns:
            Whether the record is this one.
        """
        if items is not None:
            write_items(items, self.rows(record.unit))
        if instructions is not None:
            write_instructions(instructions, self.instructions(record.unit))
        with self._lock():
            mine = self._read_claim(record.unit)
            if mine is None or mine.token != claim.token:
                return False
            if record.status == "done":
                self._attempts_path(record.unit).unlink(missing_ok=True)
            return self._write_once(record)

    def write_unclaimed(self, record: UnitRecord) -> None:
        """Write the record of a unit that nobody can do."""
        with self._lock():
            self._write_once(record)

    def rows(self, unit: str) -> Path:
        """Return where a unit's rows are."""
        return self.path / "units" / f"{unit}.parquet"

    def instructions(self, unit: str) -> Path:
        """Return where a unit's rows of instructions are, if it put any."""
        return self.path / "units" / f"{unit}.instructions.parquet"

    def forget(self, units: Iterable[str]) -> None:
        """Delete the records of units, and what is known of attempts; they are done again."""
        with self._lock():
            for unit in units:
                self._drop_claim_left(unit)
                self._attempts_path(unit).unlink(missing_ok=True)
                (self.path / "units" / f"{unit}.json").unlink(missing_ok=True)
                self._known.pop(unit, None)

    def _write_once(self, record: UnitRecord) -> bool:
        path = self.path / "units" / f"{record.unit}.json"
        if path.exists():
            return False
        write_text(record.to_json(), path)
        return True

    # -- models of its own -----------------------------------------------------------------

    def model(self, unit: str) -> Path:
        """Return where the model that a unit makes lies."""
        return self.path / "models" / unit

    def has_model(self, unit: str) -> bool:
        """Say whether it lies there whole: `tuning.json` or `making.json` comes last."""
        return any((self.model(unit) / name).exists() for name in ("tuning.json", MAKING))

    def drop_model(self, unit: str) -> None:
        """Delete it."""
        away = self.path / "models" / f".{unit}.{secrets.token_hex(4)}"
        with self._lock(), contextlib.suppress(FileNotFoundError):
            self.model(unit).replace(away)
        shutil.rmtree(away, ignore_errors=True)

    # -- claims ----------------------------------------------------------------------------

    @contextmanager
    def claimed(self, unit: str, again: Callable[[], bool]) -> Generator[Claimed | None]:
        """Hold a unit within the block; yields None where another holds it.

        Args:
            unit: what is claimed.
            again: asked once nobody else can claim: whether it is still to be done.
        """
        claim = Claimed(unit, _host(), os.getpid(), _start_of(os.getpid()), secrets.token_hex(8))
        with self._lock():
            free = not self._is_held(unit) and again()
            if free:
                left = self._read_claim(unit)
                if left is not None:  # before it is overwritten, so that no kill loses it
                    self._note(unit, self.attempts(unit).with_lost(left.token))
                write_text(json.dumps(claim.__dict__), self._claim_path(unit))
        if not free:
            yield None
            return
        stop = threading.Event()
        path = self._claim_path(unit)
        beat = threading.Thread(target=_keep_fresh, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield claim
        finally:
            stop.set()
            beat.join()
            with self._lock():
                mine = self._read_claim(unit)
                if mine is not None and mine.token == claim.token:
                    path.unlink(missing_ok=True)

    def running(self) -> list[Claimed]:
        """Return the claims whose process is at work."""
        names = sorted(p.name for p in (self.path / "claims").iterdir() if p.name[0] != ".")
        with self._lock():
            held = [name for name in names if self._is_held(name)]
            claims = [self._read_claim(name) for name in held]
        return [claim for claim in claims if claim is not None]

    def drop_left_claims(self) -> None:
        """Delete the claims of runners that are gone, once nothing is left to do.

        A runner that was killed just after its last record leaves one.
        """
        with self._lock():
            for path in (self.path / "claims").glob("[!.]*"):
                self._drop_claim_left(path.name)

    # -- attempts that came to nothing -------------------------------------------------------

    def attempts(self, unit: str) -> Attempts:
        """Return what is known of attempts at a unit that ended with their process."""
        try:
            return Attempts.model_validate_json(self._attempts_path(unit).read_text("utf-8"))
        except (FileNotFoundError, ValidationError):
            return Attempts()

    def note_death(self, unit: str, death: Death) -> Attempts:
        """Add a death to a unit's attempts, and return them; its claim must be held."""
        with self._lock():
            found = self.attempts(unit).with_seen(death)
            self._note(unit, found)
        return found

    def _note(self, unit: str, attempts: Attempts) -> None:
        write_text(attempts.model_dump_json(), self._attempts_path(unit))

    def _attempts_path(self, unit: str) -> Path:
        return self.path / "attempts" / unit

    def _is_held(self, unit: str) -> bool:
        claim, path = self._read_claim(unit), self._claim_path(unit)
        if claim is None:
            return False
        if claim.host == _host():
            return _start_of(claim.pid) == claim.started and _is_alive(claim.pid)
        # Both times are the file system's own: clocks of two machines may differ.
        probe = self.path / "claims" / ".now"
        probe.touch()
        with contextlib.suppress(FileNotFoundError):
            return probe.stat().st_mtime - path.stat().st_mtime < self._stale_seconds
        return False

    def _drop_claim_left(self, unit: str) -> None:
        """Delete a claim whose runner is gone; the lock must be held."""
        if not self._is_held(unit):
            self._claim_path(unit).unlink(missing_ok=True)

    def _read_claim(self, unit: str) -> Claimed | None:
        try:
            return Claimed(**json.loads(self._claim_path(unit).read_text("utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _claim_path(self, unit: str) -> Path:
        return self.path / "claims" / unit

    def _lock(self) -> FileLock:
        return FileLock(self.path / LOCK)


def _read_record(path: Path) -> UnitRecord:
    try:
        content: Any = json.loads(path.read_text("utf-8"))
        schema = content["schema"]
        if schema == RECORD_SCHEMA:
            return UnitRecord.model_validate(content)
    except (ValueError, KeyError, TypeError, ValidationError):
        raise StudyError(
            f"{path}: cannot be read as the record of a unit; delete it, and the unit is done again"
        ) from None
    raise StudyError(
        f"{path}: written by keepshot {content.get('keepshot')} as a record of version {schema}, "
        f"and this is keepshot {__version__}, which reads version {RECORD_SCHEMA};\n"
        "go on with that version, or start in another directory with --out"
    )


def _keep_fresh(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


def _host() -> str:
    """Return what tells processes apart that cannot see each other: machine and name space."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{platform.node()} {space}".strip()


def _start_of(pid: int) -> str | None:
    """Return when a process started, so that its number is not taken for that of another."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # A process that was killed and not yet waited for is there, and does nothing.
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True

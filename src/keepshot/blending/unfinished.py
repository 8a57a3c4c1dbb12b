"""The directory of an unfinished blend: found again after a kill, never mistaken for another.

Work goes on in `.NAME.partial` beside the final place. It carries the fingerprint of what was
asked and what the inputs were, so that only the same blend of the same files goes on in it: their
size and time of change, and the sha256 of all that the shards written so far were made of.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from keepshot.blending.hashing import Hashing, Mark
from keepshot.errors import ModelError, OutputError, UserError
from keepshot.outputs import claim, follow_umask, output_error, write_text

_STATE = ".blend.json"
_LOCK = ".lock"


@dataclass(frozen=True)
class Input:
    """A file that is read, and its name in the note."""

    name: str
    file: Path

    def state(self) -> dict[str, int]:
        """Return what tells at a glance that a file was touched."""
        status = self.file.stat()
        return {"size": status.st_size, "changed": status.st_mtime_ns}


class Unfinished:
    """The directory to work in, with its note of what the inputs were when work began."""

    def __init__(self, folder: Path, fingerprint: str, inputs: Sequence[Input]) -> None:
        """Begin work on inputs as they are now."""
        self.folder = folder
        self._inputs = inputs
        self._state: dict[str, Any] = {
            "fingerprint": fingerprint,
            "inputs": {entry.name: entry.state() for entry in inputs},
        }

    def note(self, marks: Mapping[str, Mark]) -> None:
        """Write down how far the inputs are hashed, for who goes on from here."""
        hashed = {name: [mark.position, mark.sha256] for name, mark in marks.items()}
        content = json.dumps({**self._state, "hashed": hashed}, indent=1)
        write_text(content, self.folder / _STATE)

    def check_untouched(self) -> None:
        """Raise ModelError if an input was touched since work began."""
        for entry in self._inputs:
            if entry.state() != self._state["inputs"][entry.name]:
                raise ModelError(f"{entry.file}: changed while it was read; write the blend again")


@contextmanager
def unfinished(
    out_dir: Path,
    fingerprint: str,
    inputs: Sequence[Input],
    hashing: Hashing | None,
    worth_keeping: Callable[[Path], bool],
    *,
    overwrite: bool = False,
) -> Generator[Unfinished]:
    """Yield the directory to work in, with what an earlier try left; it becomes `out_dir`.

    Args:
        out_dir: the final place; empty or absent unless `overwrite`.
        fingerprint: of all that determines the bytes written.
        inputs: the files read.
        hashing: of these files, by name, not started; None compares size and time of change alone.
        worth_keeping: says whether an interrupted try left parts that save work.
        overwrite: begin again, and replace what lies at `out_dir`.

    Raises:
        OutputError: if `out_dir` holds something, an unfinished blend of other settings lies
            there, another process works in it, or the disk is full.
        ModelError: if an input changed since the blend was begun.
    """
    claim(out_dir, overwrite=overwrite)
    folder = unfinished_path(out_dir)
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    known = _read_state(folder)
    if known is not None:
        _check_same(known, fingerprint, inputs, hashing, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK, timeout=0)
        with _held(lock, folder):
            work = Unfinished(folder, fingerprint, inputs)
            work.note(_marks(known))
            yield work
            work.check_untouched()
            (folder / _STATE).unlink()
        (folder / _LOCK).unlink(missing_ok=True)
        follow_umask(folder)
        _put_in_place(folder, out_dir)
    except (KeyboardInterrupt, SystemExit):
        _tidy(folder, worth_keeping)
        raise
    except OSError as error:
        kept = _tidy(folder, worth_keeping)
        raise _explained(error, out_dir, folder if kept else None) from error
    except UserError as error:
        if not isinstance(error, _Busy):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def unfinished_path(out_dir: Path) -> Path:
    """Return where an unfinished blend lies."""
    return out_dir.absolute().parent / f".{out_dir.name}.partial"


class _Busy(OutputError):
    """Another process works there; what it has done is left alone."""


@contextmanager
def _held(lock: FileLock, folder: Path) -> Generator[None]:
    try:
        lock.acquire()
    except Timeout:
        raise _Busy(
            f"{folder}: another process is writing this blend; wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _read_state(folder: Path) -> Mapping[str, Any] | None:
    """Return what an earlier try noted; a directory without a note is begun again."""
    try:
        found = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        known = {key: found[key] for key in ("fingerprint", "inputs", "hashed")}
        _marks(known)
        return known
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _marks(known: Mapping[str, Any] | None) -> dict[str, Mark]:
    """Return how far an earlier try had hashed the inputs."""
    hashed = known["hashed"] if known is not None else {}
    return {name: Mark(int(place), str(digest)) for name, (place, digest) in hashed.items()}


def _check_same(
    known: Mapping[str, Any],
    fingerprint: str,
    inputs: Sequence[Input],
    hashing: Hashing | None,
    folder: Path,
) -> None:
    if known["fingerprint"] != fingerprint:
        raise OutputError(
            f"{folder}: an unfinished blend of other settings lies there; add --overwrite to "
            "discard it, or name another with --out"
        )
    marks = {name: mark for name, mark in _marks(known).items() if hashing is not None}
    differing = hashing.differing(marks) if hashing is not None else None
    for entry in inputs:
        before, now = known["inputs"].get(entry.name), entry.state()
        same = before == now
        if before is not None and before["size"] == now["size"] and entry.name in marks:
            # Hashed to its end, content alone decides, whoever touched the file.
            same = same or marks[entry.name].position == now["size"]
        if not same or entry.name == differing:
            raise ModelError(
                f"{entry.file}: changed since this blend was begun (in {folder}); "
                "add --overwrite to begin again"
            )


def _put_in_place(folder: Path, out_dir: Path) -> None:
    if out_dir.exists():
        shutil.rmtree(out_dir)
    folder.replace(out_dir)
    for directory in (out_dir, out_dir.absolute().parent):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _tidy(folder: Path, worth_keeping: Callable[[Path], bool]) -> bool:
    if worth_keeping(folder):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _explained(error: OSError, out_dir: Path, kept: Path | None) -> Exception:
    told = output_error(error, out_dir)
    if kept is None or not isinstance(told, OutputError):
        return told
    return OutputError(
        f"{told}\nwhat is whole lies in {kept}: the same command goes on from it, or remove it"
    )

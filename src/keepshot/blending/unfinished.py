"""The directory of an unfinished blend: found again after a kill, never mistaken for another.

Work goes on in `.NAME.partial` beside the final place. It carries the fingerprint of what was
asked and what the inputs were, so that only the same blend of the same files goes on in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from keepshot.errors import ModelError, OutputError, UserError
from keepshot.outputs import claim, follow_umask, output_error, write_text

_STATE = ".blend.json"
_LOCK = ".lock"


@dataclass(frozen=True)
class Input:
    """A file that is read: its name for the record, and its sha256 where it was asked for."""

    name: str
    file: Path
    sha256: str | None = None

    def state(self) -> dict[str, Any]:
        """Return what tells this content from another."""
        status = self.file.stat()
        return {"size": status.st_size, "changed": status.st_mtime_ns, "sha256": self.sha256}


@contextmanager
def unfinished(
    out_dir: Path,
    fingerprint: str,
    inputs: list[Input],
    worth_keeping: Callable[[Path], bool],
    *,
    overwrite: bool = False,
) -> Generator[Path]:
    """Yield the directory to work in, with what an earlier try left; it becomes `out_dir`.

    Args:
        out_dir: the final place; empty or absent unless `overwrite`.
        fingerprint: of all that determines the bytes written.
        inputs: the files read.
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
        _check_same(known, fingerprint, inputs, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "fingerprint": fingerprint,
            "inputs": {entry.name: entry.state() for entry in inputs},
        }
        lock = FileLock(folder / _LOCK, timeout=0)
        with _held(lock, folder):
            write_text(json.dumps(state, indent=1), folder / _STATE)
            yield folder
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
        return {"fingerprint": found["fingerprint"], "inputs": dict(found["inputs"])}
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _check_same(
    known: Mapping[str, Any], fingerprint: str, inputs: list[Input], folder: Path
) -> None:
    if known["fingerprint"] != fingerprint:
        raise OutputError(
            f"{folder}: an unfinished blend of other settings lies there; add --overwrite to "
            "discard it, or name another with --out"
        )
    for entry in inputs:
        before, now = known["inputs"].get(entry.name), entry.state()
        both_hashed = bool(before and before["sha256"] and now["sha256"])
        compared = ("sha256",) if both_hashed else ("size", "changed")
        if before is None or any(before[key] != now[key] for key in compared):
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

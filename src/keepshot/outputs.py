"""Files and directories that appear under their names whole, or not at all.

Loads nothing but the standard library, so that writing need not wait for what reads records.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keepshot.errors import OutputError, UserError, is_full_disk


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, path) from error
    temporary = _beside(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise output_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


class Journal:
    """JSON lines by key that grow as answers come, so that a stopped run goes on where it was.

    Not safe to append to from several threads at once.
    """

    def __init__(self, path: Path | None, fields: Sequence[str]) -> None:
        """Keep rows with `key` and these fields at `path`; None keeps none."""
        self._path, self._fields = path, ("key", *fields)

    def read(self) -> dict[str, tuple[Any, ...]]:
        """Return the fields of each row by its key; a line cut off by a kill is passed over."""
        if self._path is None or not self._path.exists():
            return {}
        found: dict[str, tuple[Any, ...]] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                key, *values = [row[field] for field in self._fields]
            except (ValueError, KeyError, TypeError):
                continue
            found[key] = tuple(values)
        return found

    def append(self, key: str, *values: Any) -> None:
        """Add one row."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dict(zip(self._fields, (key, *values), strict=True))).encode() + b"\n"
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill cut the last line off: it stays alone
                    line = b"\n" + line
            file.write(line)


@contextmanager
def building_directory(out_dir: Path, *, overwrite: bool = False) -> Generator[Path]:
    """Yield a temporary directory that becomes `out_dir` when the block ends without error.

    Raises:
        OutputError: if `out_dir` already holds something and `overwrite` is false, if it cannot
            be written, or if the disk is full.
    """
    claim(out_dir, overwrite=overwrite)
    try:
        temporary = _beside(out_dir)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise output_error(error, out_dir) from error
    try:
        yield temporary
        follow_umask(temporary)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        temporary.replace(out_dir)
    except Exception as error:
        # What safetensors and torch cannot write comes in classes of their own.
        told = output_error(error, out_dir)
        if told is error:
            raise
        raise told from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def claim(out_dir: Path, *, overwrite: bool = False) -> None:
    """Check, before any work, that `out_dir` can be written and holds nothing worth keeping.

    Raises:
        OutputError: saying why not and what to do.
    """
    try:
        there = out_dir.exists()
    except OSError as error:
        raise output_error(error, out_dir) from error
    if there and not out_dir.is_dir():
        raise OutputError(f"{out_dir}: is a file; name a directory that does not exist yet")
    if there and any(out_dir.iterdir()) and not overwrite:
        raise OutputError(
            f"{out_dir}: already exists; add --overwrite to replace it, or name another with --out"
        )
    existing = next(parent for parent in out_dir.absolute().parents if parent.exists())
    try:
        # Only writing shows whether a place can be written: permissions do not say it for root.
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise output_error(error, out_dir) from error


_UNWRITABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT,
    errno.ENAMETOOLONG,
}  # fmt: skip
_PROBE_BYTES = 4096


def output_error(error: Exception, path: Path) -> Exception:
    """Return what the user is told where a place cannot be written; other faults as they are."""
    if isinstance(error, UserError):
        return error
    if is_full_disk(error):
        return OutputError(f"{path}: the disk is full; free some space or choose another --out")
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return OutputError(f"{path}: cannot be written ({error.strerror}); choose another --out")
    return error


def follow_umask(folder: Path) -> None:
    """Give every file the mode of one that is simply opened: safetensors makes its own 0600."""
    probe = _beside(folder / "mode")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _beside(path: Path) -> Path:
    """Return a hidden name of its own beside `path`; what is made there follows the umask."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")

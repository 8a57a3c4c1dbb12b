"""Files and directories that appear under their names whole, or not at all.

Loads nothing but the standard library, so that writing need not wait for what reads records.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from keepshot.errors import OutputError


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
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise output_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def building_directory(out_dir: Path, *, overwrite: bool = False) -> Generator[Path]:
    """Yield a temporary directory that becomes `out_dir` when the block ends without error.

    Raises:
        OutputError: if `out_dir` already holds something and `overwrite` is false, if it cannot
            be written, or if the disk is full.
    """
    claim(out_dir, overwrite=overwrite)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
        temporary.chmod(0o755)
    except OSError as error:
        raise output_error(error, out_dir) from error
    try:
        yield temporary
        if out_dir.exists():
            shutil.rmtree(out_dir)
        temporary.replace(out_dir)
    except OSError as error:
        raise output_error(error, out_dir) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def claim(out_dir: Path, *, overwrite: bool = False) -> None:
    """Check, before any work, that `out_dir` can be written and holds nothing worth keeping.

    Raises:
        OutputError: saying why not and what to do.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise OutputError(f"{out_dir}: is a file; name a directory that does not exist yet")
    if out_dir.exists() and any(out_dir.iterdir()) and not overwrite:
        raise OutputError(
            f"{out_dir}: already exists; add --overwrite to replace it, or name another with --out"
        )
    existing = next(parent for parent in out_dir.absolute().parents if parent.exists())
    try:
        # Only writing shows whether a place can be written: permissions do not say it for root.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise output_error(error, out_dir) from error


_UNWRITABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT,
}  # fmt: skip


def output_error(error: OSError, path: Path) -> Exception:
    """Return what the user is told where a place cannot be written; other faults as they are."""
    if error.errno == errno.ENOSPC:
        return OutputError(f"{path}: the disk is full; free some space or choose another --out")
    if error.errno in _UNWRITABLE:
        return OutputError(f"{path}: cannot be written ({error.strerror}); choose another --out")
    return error

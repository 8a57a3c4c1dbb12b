"""What a user may see: errors that say what is wrong with which value, where, and what to do.

Anything else that escapes is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend; printed in one to three lines, exit status 2."""

    exit_status = 2


class ConfigError(UserError):
    """A recipe, study or option value that cannot be used."""


class ModelError(UserError):
    """A model, adapter or checkpoint that cannot be used."""


class ServerError(ModelError):
    """A model behind a server that cannot be reached, refuses, or answers nonsense."""


class TaskError(UserError):
    """A task or an examples file that cannot be used."""


class AssetError(UserError):
    """A pinned asset that cannot be had: no network, wrong content, or a licence not accepted."""


class OutputError(UserError):
    """A place that cannot be written to, or that already holds something."""


class TrainingError(UserError):
    """Training that cannot go on: the loss is not a number, or nothing would be trained."""


class StudyError(UserError):
    """A study that cannot be run, or a figure that its results do not allow."""


class GateError(UserError):
    """A gate that was asked for (such as `--require-retention`) did not hold; exit status 3."""

    exit_status = 3


def nearest(value: str, known: Iterable[str]) -> str | None:
    """Return the known name that `value` most resembles, or None if nothing comes close."""
    names = list(known)
    lowered = {name.lower(): name for name in names}
    matches = difflib.get_close_matches(value.lower(), list(lowered), n=1, cutoff=0.5)
    return lowered[matches[0]] if matches else None


def unknown(what: str, value: str, known: Iterable[str], listing: str) -> str:
    """Word the message for a name that does not exist, with the nearest one that does."""
    close = nearest(value, known)
    hint = f"; nearest is {close!r}" if close else ""
    return f"{what} {value!r} is unknown{hint}; {listing}"


def is_full_disk(error: BaseException) -> bool:
    """Say whether an error means that no more can be written: disk, quota or file size limit.

    What safetensors and torch write comes back without an error number, in their own words.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = ("(os error 28)", "(os error 27)", "(os error 122)", "inline_container.cc")
    return any(word in str(error) for word in words)

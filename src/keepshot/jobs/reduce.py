"""A tuned model with its difference from the base made smaller, to be blended as any other."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import assert_never

from keepshot.blending.reshape import (
    ChangeReport,
    prune,
    shrink_intruders,
    write_changed,
    write_lore,
)
from keepshot.blending.write import check_apart
from keepshot.errors import ModelError
from keepshot.jobs.specs import BlendSpec, parse_reduction
from keepshot.jobs.write import Locate, find_both
from keepshot.models.bases import is_adapter
from keepshot.models.shards import open_checkpoint
from keepshot.outputs import claim
from keepshot.progress import Progress


@contextmanager
def reduced(
    spec: BlendSpec, locate: Locate, out_dir: Path, progress: Progress, *, overwrite: bool = False
) -> Generator[tuple[Path, tuple[str, ...]]]:
    """Yield the reduced tuned model, which exists while the block runs, and notes.

    Args:
        spec: has a `reduce`.
        locate: finds the directory of a reference.
        out_dir: where the blend will lie; what is made on the way lies beside it.
        progress: told of the stage.
        overwrite: `out_dir` may hold something.

    Raises:
        ModelError: if either side is an adapter, or the two do not fit.
        OutputError: if the blend could not be written to `out_dir` later.
    """
    assert spec.reduce is not None
    kind, share = parse_reduction(spec.reduce)
    base, tuned = find_both(spec, locate)
    for path in (base, tuned):
        if is_adapter(path):
            raise ModelError(f"{path}: is an adapter; merge it into its base to reduce it")
    check_apart(out_dir, (base, tuned))
    claim(out_dir, overwrite=overwrite)
    progress.stage(f"reducing the difference ({spec.reduce})")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    place = out_dir.parent / f".{out_dir.name}.reduced"
    shutil.rmtree(place, ignore_errors=True)  # of a start that was killed
    try:
        notes: tuple[str, ...] = ()
        match kind:
            case "lore":
                report = write_lore(base, tuned, share, place)
                notes = (
                    f"the adapter reproduces {report.explained:.3f} of the squared difference; "
                    f"{len(report.left_out)} tensors that no linear layer holds are the base's",
                )
            case "prune":
                notes = _left_out(write_changed(base, tuned, partial(prune, share=share), place))
            case "shrink-intruders":
                shrink = partial(shrink_intruders, factor=share)
                notes = _left_out(write_changed(base, tuned, shrink, place))
            case _:
                assert_never(kind)
        _date(place, [spec.reduce, *_states(base), *_states(tuned)])
        yield place, notes
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _left_out(report: ChangeReport) -> tuple[str, ...]:
    if not report.left_out:
        return ()
    return (
        f"{len(report.left_out)} tensors with {report.share:.3f} of the squared difference were "
        "not reduced: embeddings, the head, and what is no matrix",
    )


def _states(directory: Path) -> list[str]:
    stats = [file.stat() for file in open_checkpoint(directory).files]
    return [f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats]


def _date(place: Path, made_of: list[str]) -> None:
    """Let the files' time of change say what they were made of, not when.

    A write that was stopped goes on from inputs whose times are the same.
    """
    digest = hashlib.sha256(" ".join(made_of).encode()).digest()
    time = int.from_bytes(digest[:7], "little")
    for file in place.iterdir():
        os.utime(file, ns=(time, time))

"""Where a run's resume states lie, and whose they are.

A directory of states carries the recipe that made them and the fingerprint of the samples, so that
nothing of another run is ever taken up, and what differs can be said.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from keepshot.errors import ConfigError, UserError
from keepshot.outputs import write_text
from keepshot.specs import changes
from keepshot.tuning.batch import Sample, fingerprint
from keepshot.tuning.recipe import Recipe

TRAINED_FILE = "trained.safetensors"
COMPLETE_FILE = "complete"
"""Written last into a resume state: without it the state is half-written and never used."""
MARK = "recipe"
"""The fingerprint of the recipe whose states lie there."""
ABOUT = "recipe.json"
"""What `MARK` stands for, and the fingerprint of the samples."""


@contextlib.contextmanager
def states(place: Path | None, recipe: Recipe, samples: Sequence[Sample]) -> Generator[Path]:
    """Yield the directory of resume states, which is gone once the run has ended by itself.

    It has not where it was stopped, or where memory, disk or a tracker gave out: the same run goes
    on from there. What the user has to mend ends it.

    Args:
        place: the directory; None keeps no states, and yields a temporary one.
        recipe: with learning rate and steps filled in.
        samples: those of all steps, in order.

    Raises:
        ConfigError: if states of another recipe, or of other data, lie there: naming what differs.
    """
    if place is None:
        with tempfile.TemporaryDirectory(prefix="keepshot-") as name:
            yield Path(name)
        return
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    about = {"recipe": recipe.model_dump(mode="json"), "samples": fingerprint(samples)}
    complaint = [_complaint(place, recipe, about) if first else None]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(complaint, src=0)
    if complaint[0] is not None:
        raise ConfigError(complaint[0])
    if first:
        write_text(json.dumps(about), place / ABOUT)
        write_text(recipe.fingerprint(), place / MARK)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    try:
        yield place
    except UserError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    if first:
        shutil.rmtree(place, ignore_errors=True)


def last_state(place: Path) -> str | None:
    """Return the newest complete state."""
    complete = [path.parent for path in place.glob(f"checkpoint-*/{COMPLETE_FILE}")]
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def _complaint(place: Path, recipe: Recipe, about: dict[str, Any]) -> str | None:
    """Say why the states in `place` are not of this run; None if they are, or there are none."""
    if last_state(place) is None:
        shutil.rmtree(place, ignore_errors=True)
        return None
    stored = place / ABOUT
    there: dict[str, Any] = json.loads(stored.read_text("utf-8")) if stored.is_file() else {}
    mark = place / MARK
    same = mark.is_file() and mark.read_text("utf-8") == recipe.fingerprint()
    if same and there.get("samples", about["samples"]) == about["samples"]:
        return None
    found: list[str] = []
    if there:
        found = changes(there["recipe"], about["recipe"], recipe.no_effect_on_results)
    if there and there["samples"] != about["samples"]:
        found.append("the samples differ (the data, the anchors' order or the tokenizer)")
    words = "; ".join(found) or "what differs was not recorded"
    return (
        f"{place}: the resume states there are of another run:\n{words};\n"
        "delete them to start anew, or go back to those settings and data"
    )

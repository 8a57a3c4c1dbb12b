"""Makes a model of a study, and writes it as a directory that every other command loads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from keepshot.jobs.ledger import model_record
from keepshot.models.degrade import degraded
from keepshot.models.loading import LanguageModel, save
from keepshot.outputs import write_text
from keepshot.progress import Progress
from keepshot.records import ModelRecord
from keepshot.study.directory import MAKING
from keepshot.study.spec import StudiedModel
from keepshot.tuning.from_scratch import train_from_scratch


@dataclass(frozen=True)
class Made:
    """What was made, and what it took besides loading."""

    model: ModelRecord
    seconds: float
    tokens: int


def make(
    studied: StudiedModel,
    out_dir: Path,
    load: Callable[[str], LanguageModel],
    progress: Progress,
) -> Made:
    """Make a model and write it to `out_dir`, `making.json` last.

    Args:
        studied: what to make.
        out_dir: where it will lie; what an earlier start left there is replaced.
        load: loads a reference.
        progress: told of steps of training.

    Raises:
        ModelError: if the reference cannot be loaded, or is not fit to be degraded so.
        OutputError: if `out_dir` cannot be written.
    """
    untouched = None if studied.degrade is None else load(studied.reference)
    began = time.perf_counter()
    if untouched is not None:
        assert studied.degrade is not None
        module = degraded(untouched.module, studied.degrade)
        count = sum(parameter.numel() for parameter in module.parameters())
        model, tokens = replace(untouched, module=module, num_parameters=count), 0
    else:
        assert studied.from_scratch is not None
        model, tokens = train_from_scratch(studied.from_scratch, progress)
    save(model, out_dir, overwrite=True)
    text = json.dumps(studied.model_dump(mode="json"), indent=1) + "\n"
    write_text(text, out_dir / MAKING)
    record = model_record(replace(model, reference=studied.label))
    return Made(record, time.perf_counter() - began, tokens)

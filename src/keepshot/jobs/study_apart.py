"""A unit of a study in a process of its own, where one was lost at it before."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from keepshot.assets import AssetStore
from keepshot.jobs.apart import done_apart
from keepshot.jobs.study_worker import Worker
from keepshot.progress import Silent
from keepshot.study.directory import StudyDirectory
from keepshot.study.grid import Unit
from keepshot.study.runner import Outcome, Perform, Tally, peak_bytes
from keepshot.study.spec import StudySpec


class Unwatched(Silent):
    """What a worker tells nobody."""

    def tally(self, tally: Tally) -> None:
        """Ignore."""


@dataclass(frozen=True)
class _Alone:
    """What the process needs."""

    spec: StudySpec
    store: AssetStore
    out_dir: Path
    unit: Unit
    threads: int


def apart(worker: Worker) -> Perform:
    """Return what does one unit of a worker's study in a process of its own.

    The worker lets go of its models first, so that they do not take the room.
    """

    def perform(unit: Unit) -> Outcome:
        worker.let_go()
        store, out_dir = worker.store.silent(), worker.directory.path
        return done_apart(
            _perform, _Alone(worker.spec, store, out_dir, unit, torch.get_num_threads())
        )

    return perform


def _perform(job: _Alone) -> Outcome:
    torch.set_num_threads(job.threads)
    worker = Worker(job.spec, job.store, StudyDirectory(job.out_dir), Unwatched())
    found = worker.perform(job.unit)
    return replace(found, processor_seconds=time.process_time(), peak_bytes=peak_bytes())

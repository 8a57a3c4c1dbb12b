"""Calls shared out to worker processes of Ray: the one place that imports it.

Knows nothing of models. A worker that meets something the user can mend hands it back as a value,
so that it is shown as if it had happened here; Ray's own faults are put in those words too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from keepshot.errors import ConfigError, UserError

Job = TypeVar("Job")
Found = TypeVar("Found")
REMOVALS = 50
"""Times that Ray's files are deleted, a tenth of a second apart."""


def shared_out(
    call: Callable[[Job], Found],
    jobs: Sequence[Job],
    *,
    workers: int,
    gpus: bool = False,
) -> Generator[tuple[int, Found]]:
    """Yield (number of the job, what `call` returns for it) as they come, in any order.

    A cluster is started on this machine and stopped however this ends. Each worker gets an equal
    share of the processors, as torch's number of threads too, so that they do not crowd each other.

    Args:
        call: a function of a module, run in a process of its own for each job.
        jobs: one argument each.
        workers: jobs at the same time, at most.
        gpus: each worker gets a GPU to itself.

    Raises:
        ConfigError: if Ray is not installed, or a worker died.
        UserError: as `call` does; the other jobs are then stopped.
    """
    ray = _ray()
    workers = min(workers, len(jobs))
    threads = max(1, processors() // workers)
    scratch = tempfile.mkdtemp(prefix="keepshot-ray-")  # short: sockets below it have long names
    try:
        ray.init(
            num_cpus=workers,
            num_gpus=workers if gpus else None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=scratch,
        )
        options = {"num_cpus": 1, "num_gpus": int(gpus), "max_retries": 0, "max_calls": 1}
        remote = ray.remote(**options)(_in_worker)
        waiting = {
            remote.remote(call, job, threads, os.getcwd()): number
            for number, job in enumerate(jobs)
        }
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(ready[0]), _result(ray, ready[0])
    finally:
        ray.shutdown()
        _remove(Path(scratch))


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _remove(scratch: Path) -> None:
    """Delete Ray's own files, some of which are still written while its processes end."""
    for _ in range(REMOVALS):
        shutil.rmtree(scratch, ignore_errors=True)
        if not scratch.exists():
            return
        time.sleep(0.1)


def _in_worker(call: Callable[[Any], Any], job: Any, threads: int, directory: str) -> Any:
    torch.set_num_threads(threads)
    with contextlib.suppress(OSError):  # another machine; what is relative is then not found
        os.chdir(Path(directory))
    try:
        return call(job)
    except UserError as error:
        return error


def _result(ray: Any, reference: Any) -> Any:
    try:
        found = ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        raise ConfigError(
            "a Ray worker was killed, most likely for want of memory; start again with fewer "
            "--workers, which goes on from what is finished if --out is given"
        ) from None
    if isinstance(found, UserError):
        raise found
    return found


def _ray() -> Any:
    try:
        return import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(
            "Ray is not installed, and --engine ray needs it;\n"
            "install it with: pip install 'keepshot[ray]'"
        ) from None

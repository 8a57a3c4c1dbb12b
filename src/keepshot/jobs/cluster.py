"""Calls shared out to worker processes of Ray: the one place that imports it.

Knows nothing of models. A worker that meets something the user can mend hands it back as a value,
so that it is shown as if it had happened here; Ray's own faults are put in those words too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from keepshot.errors import ConfigError, UserError

Job = TypeVar("Job")
Found = TypeVar("Found")
REMOVALS = 50
"""Times that Ray's files are deleted, a tenth of a second apart."""
IDLE_SECONDS = 1.0
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Cluster:
    """Where calls are shared out to, and what becomes of those that are lost."""

    workers: int
    """Jobs at the same time, at most."""
    gpus: bool = False
    """Each worker gets a GPU to itself."""
    address: str | None = None
    """HOST:PORT of a cluster that is there; None starts one on this machine."""
    times_again: int = 0
    """How often a job is begun again whose worker died."""
    idle: Callable[[], None] | None = None
    """Called about once a second while jobs are under way."""


def shared_out(
    call: Callable[[Job], Found], jobs: Sequence[Job], cluster: Cluster
) -> Generator[tuple[int, Found]]:
    """Yield (number of the job, what `call` returns for it) as they come, in any order.

    A cluster that is started on this machine is stopped however this ends. Each worker gets an
    equal share of the processors, as torch's number of threads too, so that they do not crowd each
    other.

    Args:
        call: a function of a module, run in a process of its own for each job.
        jobs: one argument each.
        cluster: where they run.

    Raises:
        ConfigError: if Ray is not installed, there is no cluster at the address, or a worker died
            more often than a job is begun again.
        UserError: as `call` does; the other jobs are then stopped.
    """
    ray = _ray()
    workers = min(cluster.workers, len(jobs))
    threads = max(1, processors() // workers)
    scratch = tempfile.mkdtemp(prefix="keepshot-ray-")  # short: sockets below it have long names
    try:
        _join(ray, cluster, workers, scratch)
        options = {"num_cpus": 1, "num_gpus": int(cluster.gpus), "max_retries": 0, "max_calls": 1}
        remote = ray.remote(**options)(_in_worker)

        def begin(number: int) -> Any:
            return remote.remote(call, jobs[number], threads, os.getcwd())

        waiting = {begin(number): number for number in range(len(jobs))}
        lost = [0] * len(jobs)
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=IDLE_SECONDS)
            if not ready:
                if cluster.idle is not None:
                    cluster.idle()
                continue
            number = waiting.pop(ready[0])
            try:
                found = _result(ray, ready[0])
            except _WorkerLostError as error:
                lost[number] += 1
                if lost[number] > cluster.times_again:
                    raise ConfigError(str(error)) from None
                waiting[begin(number)] = number
                continue
            yield number, found
    finally:
        ray.shutdown()
        _remove(Path(scratch))


class _WorkerLostError(Exception):
    """A worker died while it was at a job."""


def _join(ray: Any, cluster: Cluster, workers: int, scratch: str) -> None:
    if cluster.address is None:
        ray.init(
            num_cpus=workers,
            num_gpus=workers if cluster.gpus else None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=scratch,
        )
        return
    absent = f"no Ray cluster at {cluster.address!r}"
    host, _, port = cluster.address.rpartition(":")
    try:
        _greet(host, int(port))
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{absent} ({reason});\nstart one with `ray start --head`, give its HOST:PORT, or "
            "use --engine ray, which starts one on this machine"
        ) from None


def _greet(host: str, port: int) -> None:
    """See that what listens there speaks as Ray does (HTTP/2): Ray itself would wait for minutes.

    Raises:
        OSError: if nothing listens, it says nothing, or it is a web server of another kind. What
            hangs up is left to Ray, since a cluster with TLS does.
    """
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as line:
        line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        try:
            answer = line.recv(16)
        except TimeoutError:
            raise OSError("what listens there does not answer") from None
        except ConnectionError:
            return
    if answer.startswith(b"HTTP/1"):
        raise OSError("what listens there is a web server")


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
        raise _WorkerLostError(
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

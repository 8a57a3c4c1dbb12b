"""One call in a process of its own, so that whatever ends that process leaves this one standing.

The process ends with this one too: it belongs to it, and to nothing else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from keepshot.errors import OutputError, is_full_disk
from keepshot.study.attempts import Fault, FaultApartError, ProcessDiedError, death_of
from keepshot.study.runner import reason_of

Job = TypeVar("Job")
Found = TypeVar("Found")
LOOK_SECONDS = 0.1
"""Between two looks at the memory that the process holds."""


def done_apart(call: Callable[[Job], Found], job: Job) -> Found:
    """Return `call(job)` as found by a process of its own.

    Args:
        call: a function of a module.
        job: its argument; it and what is returned are pickled between the two.

    Raises:
        ProcessDiedError: if the process ended without an answer; says how, and at what peak.
        FaultApartError: if the call raised.
        OutputError: if it raised because the disk is full.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="keepshot-fault-") as faults:
        process = context.Process(target=_answer, args=(call, job, theirs, faults.name))
        process.start()
        theirs.close()
        peak: int | None = None
        answer: Any = None
        try:
            while not ours.poll(LOOK_SECONDS):
                peak = _peak_of(process.pid) or peak
            # It ended, before its answer or in the middle of it: the exit code tells more.
            with contextlib.suppress(EOFError, OSError):
                answer = ours.recv()
        finally:
            if answer is None and process.exitcode is None:
                # Interrupted; or its end of the pipe is closed, and it is about to end by itself.
                process.join(LOOK_SECONDS)
                process.kill()
            process.join()
            ours.close()
        trace = Path(faults.name).read_text("utf-8", errors="replace")
    if answer is None:
        raise ProcessDiedError(death_of(process.exitcode or 0, peak, _memory_bytes(), trace))
    if isinstance(answer, Fault):
        if answer.is_full_disk:
            raise OutputError(answer.reason) from OSError(28, "No space left on device")
        raise FaultApartError(answer)
    return answer


def _answer(call: Callable[[Any], Any], job: Any, theirs: Connection, faults: str) -> None:
    """Be the process: call, and send what comes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that waits decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with Path(faults).open("w", encoding="utf-8") as file:
        faulthandler.enable(file)
        try:
            theirs.send(call(job))
        except Exception as error:
            full = is_full_disk(error) or is_full_disk(error.__cause__ or error)
            theirs.send(Fault(reason_of(error), traceback.format_exc(), full))
        faulthandler.disable()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _peak_of(pid: int | None) -> int | None:
    """Return the most memory that a process has held, where the system says so."""
    try:
        text = Path(f"/proc/{pid}/status").read_text("utf-8")
    except OSError:
        return None
    line = next((line for line in text.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else None


def _memory_bytes() -> int | None:
    """Return the memory of this machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None

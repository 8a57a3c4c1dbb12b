"""sha256 of files, worked out beside other work, and known at any moment for what is read so far.

A blend reads its inputs anyway: hashing them meanwhile costs no second pass over the disk, since
whoever comes first brings the pages into memory for the other.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from keepshot.errors import ModelError

_BLOCK = 1 << 18
"""Bytes read at a time: they are hashed before they leave the processor's cache."""
_NUM_THREADS = 2


@dataclass(frozen=True)
class Mark:
    """What is known of a file: the sha256 of its first `position` bytes."""

    position: int
    sha256: str


class _Running:
    """The sha256 of one file, from its beginning as far as it has been read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.size = file.stat().st_size
        self._hash = hashlib.sha256()
        self._position = 0
        self._moved = threading.Condition()

    def mark(self) -> Mark:
        with self._moved:
            return Mark(self._position, self._hash.hexdigest())

    def advance(self, stop: int, stopped: threading.Event) -> None:
        block = memoryview(bytearray(_BLOCK))
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self._position)
            while self._position < stop and not stopped.is_set():
                count = stream.readinto(block[: min(_BLOCK, stop - self._position)])
                if not count:
                    raise ModelError(f"{self.file}: became shorter while it was read; get it again")
                with self._moved:
                    self._hash.update(block[:count])
                    self._position += count
                    self._moved.notify_all()

    def wait_for(self, position: int, work: Future[None]) -> None:
        with self._moved:
            while self._position < position and not work.done():
                self._moved.wait(0.05)


class Hashing:
    """Files hashed in threads of their own from `start` on; leaving the block stops them."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Take the files, by name and in the order in which they will be read."""
        self._running = {name: _Running(file) for name, file in files.items()}
        self._pool = ThreadPoolExecutor(_NUM_THREADS)
        self._work: dict[str, Future[None]] = {}
        self._stopped = threading.Event()

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def differing(self, marks: Mapping[str, Mark]) -> str | None:
        """Hash every file as far as its mark, and name the first one that is not as marked.

        What is hashed here is not hashed again later; call it before `start`.
        """
        work = {
            name: self._pool.submit(self._running[name].advance, mark.position, self._stopped)
            for name, mark in marks.items()
            if mark.position <= self._running[name].size
        }
        for future in work.values():
            future.result()
        return next((n for n, mark in marks.items() if self._running[n].mark() != mark), None)

    def start(self) -> None:
        """Begin."""
        self._work = {
            name: self._pool.submit(running.advance, running.size, self._stopped)
            for name, running in self._running.items()
        }

    def reached(self, ends: Mapping[str, int]) -> dict[str, Mark]:
        """Wait until the files are hashed at least as far as `ends`; return where all now are.

        Raises:
            ModelError: if a file became shorter.
        """
        for name, end in ends.items():
            self._running[name].wait_for(end, self._work[name])
            if self._work[name].done():
                self._work[name].result()
        return {name: running.mark() for name, running in self._running.items()}

    def digests(self) -> dict[str, str]:
        """Wait for the end, and return the sha256 of every file by name."""
        for future in self._work.values():
            future.result()
        return {name: running.mark().sha256 for name, running in self._running.items()}

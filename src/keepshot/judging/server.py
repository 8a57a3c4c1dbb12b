"""A judge behind an OpenAI-compatible server: retries, back-off, and nothing judged twice.

Every answer is appended to a journal as it comes, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from keepshot.client import Client
from keepshot.judging.judges import PROMPT_HASH, question, read_label
from keepshot.judging.pairwise import Opinion, Pair
from keepshot.outputs import Journal


@dataclass(frozen=True)
class Server:
    """Where and how to ask."""

    url: str
    """Base address, such as `http://localhost:8000/v1`."""
    model: str
    key: str | None = None
    """Sent as a bearer token; never written anywhere."""
    timeout: float = 60.0
    tries: int = 6
    first_wait: float = 1.0
    """Seconds before the second try; doubled after each, unless the server says how long."""
    workers: int = 4
    max_tokens: int = 8


class ServerJudge:
    """A judge that answers in text; see `Server`."""

    def __init__(
        self,
        server: Server,
        *,
        journal: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.identity = f"{server.model} at {server.url}"
        self.prompt_hash = PROMPT_HASH
        self.num_asked = 0
        """How many pairs were put to the server, and not found in the journal."""
        self._server, self._journal = server, Journal(journal, ("answer",))
        self._progress = progress
        self._client = Client(
            server.url, server.key, server.timeout, server.tries, server.first_wait, sleep
        )
        self._lock = Lock()

    def judge(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """Ask about every pair; those in the journal are not asked again.

        Raises:
            ServerError: if the server refuses (such as 401), or keeps failing after all tries.
        """
        known = {key: str(answer) for key, (answer,) in self._journal.read().items()}
        keys = [self._key(pair) for pair in pairs]
        waiting = {key: p for key, p in zip(keys, pairs, strict=True) if key not in known}
        with ThreadPoolExecutor(self._server.workers) as pool:
            jobs = {key: pool.submit(self._ask, key, pair) for key, pair in waiting.items()}
            try:
                for number, (key, job) in enumerate(jobs.items(), start=1):
                    known[key] = job.result()
                    if self._progress is not None:
                        self._progress(number, len(jobs))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [read_label(known[key]) for key in keys]

    def _key(self, pair: Pair) -> str:
        content = f"{self._server.url}\0{self._server.model}\0{question(pair)}"
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def _ask(self, key: str, pair: Pair) -> str:
        body = {
            "model": self._server.model,
            "messages": [{"role": "user", "content": question(pair)}],
            "temperature": 0,
            "max_tokens": self._server.max_tokens,
        }
        answer = self._client.ask("chat/completions", body, "a comparison", _content)
        with self._lock:
            self.num_asked += 1
            self._journal.append(key, answer)
        return answer


def _content(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"] or "")

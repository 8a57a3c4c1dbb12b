"""JSON over HTTP to a server that may be busy: retries, growing pauses, what failed in words."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from keepshot.errors import ServerError

Value = TypeVar("Value")
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP statuses after which the same request may well succeed."""
LONGEST_PAUSE = 120.0
"""Seconds waited at most, whatever a server asks for."""


@dataclass(frozen=True)
class Client:
    """Sends requests to one server, and how patiently.

    Args:
        base: address that paths are joined to.
        key: sent as a bearer token; never shown.
        timeout: seconds to wait for one answer.
        tries: how often a request is sent at most.
        pause: seconds before the second try, doubled before each further one; a server's
            `Retry-After` goes before it.
    """

    base: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    tries: int = 4
    pause: float = 1.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def ask(
        self, path: str, body: dict[str, Any] | None, what: str, read: Callable[[Any], Value]
    ) -> Value:
        """Return what `read` finds in the answer; an answer that it cannot read is asked for again.

        Args:
            path: joined to the base.
            body: posted as JSON; None gets.
            what: names the request in errors.
            read: raises KeyError, IndexError, TypeError or ValueError on an answer of another form.

        Raises:
            ServerError: if the server refuses (such as 401), or all tries failed.
        """
        reason, content = "", b""
        for number in range(self.tries):
            pause = self.pause * 2**number
            try:
                with urllib.request.urlopen(self._request(path, body), timeout=self.timeout) as got:
                    content = got.read()
                return read(json.loads(content))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_detail(error)}"
                if error.code not in RETRIED:
                    raise ServerError(f"server {self.base!r} refused {what}: {reason}") from None
                pause = _seconds(error.headers.get("Retry-After"), pause)
            except json.JSONDecodeError:
                reason = "it answered something that is not JSON"
            except (KeyError, IndexError, TypeError, ValueError):
                reason = f"it answered nonsense: {content.decode(errors='replace')[:120]}"
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if number + 1 < self.tries:
                self.sleep(pause)
        raise ServerError(
            f"server {self.base!r} gave no answer to {what} after {self.tries} tries: {reason};\n"
            "what is finished is kept; start the server and give the same command again"
        )

    def _request(self, path: str, body: dict[str, Any] | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(f"{self.base.rstrip('/')}/{path}", data, headers)


def _detail(error: urllib.error.HTTPError) -> str:
    detail = error.read(300).decode("utf-8", errors="replace").strip().replace("\n", " ")
    return detail or "check address, model name and key"


def _seconds(header: str | None, otherwise: float) -> float:
    try:
        return min(LONGEST_PAUSE, max(0.0, float(header))) if header else otherwise
    except ValueError:
        return otherwise

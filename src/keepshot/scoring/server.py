"""Generation by a server that speaks OpenAI's completions, log-likelihoods by our engine.

vLLM, SGLang, llama.cpp and `transformers serve` speak it. Prompts go as text, answers come as text
and are cut at stop strings here, whatever the server does with them. A bounded number of requests
is in flight; each is tried several times; what is finished is kept in a file and not asked again.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

from keepshot.errors import ConfigError, ModelError
from keepshot.models.loading import LanguageModel
from keepshot.outputs import Journal
from keepshot.scoring.engine import Engine
from keepshot.scoring.request import (
    Generate,
    GenerateResult,
    GreedyMatch,
    GreedyMatchResult,
    LogLikelihood,
    Request,
    Result,
)

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may well succeed."""
LINE_END = ("\n",)


@dataclass(frozen=True)
class Completion:
    """What the server said; `stopped`: it ended by itself."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class Server:
    """Where to send prompts, and how patiently.

    Args:
        url: base address, with or without `/v1`.
        model: name that the server knows the model by; None asks the server for its only one.
        timeout: seconds to wait for one answer.
        tries: how often a request is sent at most.
        in_flight: how many requests the server gets at once.
        pause: seconds before the second try; doubled before each further one.
    """

    url: str
    model: str | None = None
    timeout: float = 120.0
    tries: int = 4
    in_flight: int = 8
    pause: float = 1.0
    _names: dict[str, str] = field(default_factory=dict[str, str], repr=False, compare=False)

    @property
    def base(self) -> str:
        """The address up to and including `/v1`."""
        trimmed = self.url.rstrip("/")
        if not trimmed.startswith(("http://", "https://")):
            raise ConfigError(
                f"--server {self.url!r}: expected an address such as http://host:8000"
            )
        return trimmed if trimmed.endswith("/v1") else f"{trimmed}/v1"

    def model_name(self) -> str:
        """Return the name to ask for.

        Raises:
            ConfigError: if the server has several models, or none.
            ModelError: if it does not answer.
        """
        if self.model is not None:
            return self.model
        if "only" not in self._names:
            answer = self._send("models", None, "the list of models")
            names = [str(entry["id"]) for entry in answer.get("data", []) if "id" in entry]
            if len(names) != 1:
                raise ConfigError(
                    f"server {self.url!r} has {len(names)} models ({', '.join(names[:5])}); "
                    "say which one with --server-model NAME"
                )
            self._names["only"] = names[0]
        return self._names["only"]

    def complete(
        self,
        prompt: str,
        max_tokens: int,
        stop: Sequence[str],
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Completion:
        """Return the continuation of `prompt`, cut before the first stop string.

        Greedy at temperature 0; above, how `seed` is used is the server's affair.

        Raises:
            ModelError: naming the request and how often it was tried.
        """
        body: dict[str, Any] = {
            "model": self.model_name(),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if temperature > 0:
            body["seed"] = seed
        if stop:
            body["stop"] = list(stop)[:4]  # OpenAI's limit; the cut below knows all of them
        what = f"the prompt that ends in {prompt[-40:]!r}"
        answer = self._send("completions", body, what)
        try:
            choice = answer["choices"][0]
            text, reason = choice["text"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError):
            text, reason = None, None
        if not isinstance(text, str):
            raise ModelError(
                f"server {self.url!r} answered nonsense to {what}: {json.dumps(answer)[:120]};\n"
                "is it an OpenAI-compatible /v1/completions? Finished requests are kept"
            )
        places = [place for string in stop if (place := text.find(string)) >= 0]
        cut = text[: min(places, default=len(text))]
        return Completion(cut, bool(places) or reason == "stop")

    def _send(self, path: str, body: dict[str, Any] | None, what: str) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        reason = ""
        for number in range(self.tries):
            if number:
                time.sleep(self.pause * 2 ** (number - 1))
            request = urllib.request.Request(f"{self.base}/{path}", data, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    answer = json.loads(response.read())
                if isinstance(answer, dict):
                    return answer
                reason = f"it answered {str(answer)[:80]!r}"
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {error.read(200).decode(errors='replace')}"
                if error.code not in RETRIED:
                    raise ModelError(
                        f"server {self.url!r} refused {what}: {reason.strip()}"
                    ) from None
            except json.JSONDecodeError:
                reason = "it answered something that is not JSON"
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise ModelError(
            f"server {self.url!r} gave no answer to {what} after {self.tries} tries: {reason};\n"
            "finished requests are kept; start the server and give the same command again"
        )


class ServedEngine(Engine):
    """Sends what is generated to a server; the model here tokenises and gives likelihoods.

    Args:
        model: the same model as the server's.
        server: where generation goes.
        kept: JSON lines file of finished generations; None keeps none.
    """

    def __init__(self, model: LanguageModel, server: Server, *, kept: Path | None = None) -> None:
        super().__init__(model)
        self._server = server
        self._kept = Journal(kept, ("text", "stopped"))

    def _answer(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Result]]:
        yield from super()._answer([r for r in requests if isinstance(r, LogLikelihood)])
        there = {key: Completion(*said) for key, said in self._kept.read().items()}
        waiting: list[tuple[Generate | GreedyMatch, str]] = []
        for request in requests:
            if isinstance(request, LogLikelihood):
                continue
            key = _key(self.model.sha256, request)
            if key in there:
                yield request, self._judge(request, there[key])
            else:
                waiting.append((request, key))
        yield from self._ask(waiting)

    def _ask(
        self, waiting: Sequence[tuple[Generate | GreedyMatch, str]]
    ) -> Iterator[tuple[Request, Result]]:
        if waiting:
            self._server.model_name()  # a server that is down is noticed once, not by each thread
        queue = iter(waiting)
        flying: dict[Future[Completion], tuple[Generate | GreedyMatch, str]] = {}
        failure: Exception | None = None
        with ThreadPoolExecutor(self._server.in_flight) as pool:
            while True:
                while failure is None and len(flying) < self._server.in_flight:
                    entry = next(queue, None)
                    if entry is None:
                        break
                    flying[pool.submit(self._complete, entry[0])] = entry
                if not flying:
                    break
                done, _ = wait(flying, return_when=FIRST_COMPLETED)
                for future in done:
                    request, key = flying.pop(future)
                    if future.exception() is not None:
                        failure = failure or _as_exception(future.exception())
                        continue
                    said = future.result()
                    self._kept.append(key, said.text, said.stopped)
                    yield request, self._judge(request, said)
        if failure is not None:
            raise failure

    def _complete(self, request: Generate | GreedyMatch) -> Completion:
        ids = list(request.context)
        bos = list(self.model.bos_ids)
        if bos and ids[: len(bos)] == bos:
            ids = ids[len(bos) :]  # the server's tokenizer adds it again
        prompt = str(self.model.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        match request:
            case Generate():
                return self._server.complete(
                    prompt,
                    request.max_new_tokens,
                    request.stop,
                    temperature=request.temperature,
                    seed=request.seed,
                )
            case GreedyMatch():
                return self._server.complete(prompt, request.limit, LINE_END)
            case _:
                assert_never(request)

    def _judge(self, request: Generate | GreedyMatch, said: Completion) -> Result:
        match request:
            case Generate():
                return GenerateResult(said.text, said.stopped)
            case GreedyMatch():
                correct = said.stopped and said.text == self.model.decode(request.answer)
                return GreedyMatchResult(correct, said.text, said.stopped)
            case _:
                assert_never(request)


def _key(sha256: str, request: Request) -> str:
    return hashlib.sha256(f"{sha256} {request!r}".encode()).hexdigest()


def _as_exception(error: BaseException | None) -> Exception:
    assert isinstance(error, Exception)
    return error

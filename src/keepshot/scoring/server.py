"""Generation by a server that speaks OpenAI's completions, log-likelihoods by our engine.

vLLM, SGLang, llama.cpp and `transformers serve` speak it. Prompts go as text, answers come as text
and are cut at stop strings here, whatever the server does with them. A bounded number of requests
is in flight; each is tried several times; what is finished is kept in a file and not asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never

from keepshot.client import Client
from keepshot.errors import ConfigError
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
            ServerError: if it does not answer.
        """
        if self.model is not None:
            return self.model
        if "only" not in self._names:
            names = self._client.ask("models", None, "the list of models", _names_of)
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
            ServerError: naming the request and how often it was tried.
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
        text, reason = self._client.ask("completions", body, what, _said)
        places = [place for string in stop if (place := text.find(string)) >= 0]
        cut = text[: min(places, default=len(text))]
        return Completion(cut, bool(places) or reason == "stop")

    @property
    def _client(self) -> Client:
        return Client(self.base, timeout=self.timeout, tries=self.tries, pause=self.pause)


def _names_of(answer: Any) -> list[str]:
    return [str(entry["id"]) for entry in answer["data"]]


def _said(answer: Any) -> tuple[str, str | None]:
    choice = answer["choices"][0]
    if not isinstance(choice["text"], str):
        raise TypeError("a completion has a text")
    return choice["text"], choice.get("finish_reason")


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

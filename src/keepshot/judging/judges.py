"""Who compares two answers: a local model by the likelihood of two labels, or a server by text."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence

from keepshot.errors import TaskError
from keepshot.judging.answers import rendered, style_of
from keepshot.judging.pairwise import Opinion, Pair
from keepshot.judging.policy import Policy
from keepshot.models.loading import LanguageModel
from keepshot.scoring.engine import Engine
from keepshot.scoring.request import LogLikelihood, LogLikelihoodResult

LABELS = ("A", "B")
QUESTION = (
    "Two assistants were given the same instruction.\n\n"
    "Instruction:\n{instruction}\n\n"
    "Answer A:\n{first}\n\n"
    "Answer B:\n{second}\n\n"
    "Which answer is better: does what the instruction says, is correct, and reads well? "
    "Reply with one letter, A or B."
)
RAW_CUE = "The better answer is"
PROMPT_HASH = hashlib.sha256(f"{QUESTION}\0{RAW_CUE}".encode()).hexdigest()[:16]
MOST_CHARACTERS = 4000
"""Of each text that a judge is shown; longer ones are cut, and end in `[...]`."""


def question(pair: Pair) -> str:
    """Return what a judge is asked about `pair`."""
    texts = {"{instruction}": pair.instruction, "{first}": pair.first, "{second}": pair.second}
    parts = re.split(r"(\{instruction\}|\{first\}|\{second\})", QUESTION)
    return "".join(_shown(texts[part]) if part in texts else part for part in parts)


def read_label(text: str) -> Opinion:
    """Read a verdict out of what a judge wrote: the first A or B that stands alone."""
    found = re.search(r"(?<![A-Za-z'])([AB])(?![A-Za-z'])", text)
    if found is None:
        shown = text.strip()[:40]
        return Opinion(None, f"neither label in the answer {shown!r}" if shown else "empty answer")
    return Opinion(1.0 if found.group(1) == LABELS[0] else 0.0)


class LikelihoodJudge:
    """A local model, asked by the log-likelihoods of the two labels after the question.

    One forward pass for each pair, and no text to read. `off_label` counts pairs where the model
    would rather have said something else than either label.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        engine: Engine | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.identity = f"{model.reference} ({model.sha256[:12]}), log-likelihood of labels"
        self.prompt_hash = PROMPT_HASH
        self._model = model
        self._engine = engine or Engine(model)
        self._progress = progress

    def judge(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """Return, for each pair, the share of the first label in the two labels' probability.

        Raises:
            TaskError: if the labels cannot be told apart by their tokens.
        """
        asked = [self._requests(pair) for pair in pairs]
        whole = [self._fits(both) for both in asked]
        flat = [r for both, fits in zip(asked, whole, strict=True) if fits for r in both]
        results = iter(self._engine.run(flat, self._progress))
        opinions: list[Opinion] = []
        for fits in whole:
            if not fits:
                opinions.append(Opinion(None, "longer than the judge's context"))
                continue
            first, second = next(results), next(results)
            assert isinstance(first, LogLikelihoodResult)
            assert isinstance(second, LogLikelihoodResult)
            margin = first.log_likelihood - second.log_likelihood
            share = 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, margin))))
            off_label = not (first.is_greedy or second.is_greedy)
            opinions.append(Opinion(share, off_label=off_label))
        return opinions

    def _requests(self, pair: Pair) -> tuple[LogLikelihood, LogLikelihood]:
        policy = Policy()
        text = rendered(self._model, question(pair), policy)
        if style_of(self._model, policy) == "raw":
            pairs = [self._model.encode_pair(text + RAW_CUE, f" {label}") for label in LABELS]
        else:
            # A chat's answer begins right after the template, which ends in a newline.
            ids = self._model.encode(text)
            pairs = [(ids, self._model.encode(text + label)[len(ids) :]) for label in LABELS]
        first, second = (LogLikelihood(tuple(c), tuple(label)) for c, label in pairs)
        if first.continuation == second.continuation:
            raise TaskError(f"judge {self.identity!r}: its tokenizer has one token for A and B")
        return first, second

    def _fits(self, requests: tuple[LogLikelihood, LogLikelihood]) -> bool:
        longest = max(len(r.context) + len(r.continuation) for r in requests)
        return longest <= self._model.context_length


def _shown(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " [...]"

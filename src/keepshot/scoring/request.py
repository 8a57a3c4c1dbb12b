"""What can be asked of a model, and what it answers. Token ids only: no text, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LogLikelihood:
    """How likely is `continuation` after `context`? Both must hold at least one token."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that there is a token to predict, and one to predict it from."""
        assert self.context, "a context needs at least one token"
        assert self.continuation, "a continuation needs at least one token"


@dataclass(frozen=True)
class GreedyMatch:
    """Does greedy decoding give `answer` and then end?

    Judged in one forward pass. Where it does not, the model's own answer is decoded, up to
    `max_new_tokens` (None: six more than the answer has, and at least twelve).
    """

    context: tuple[int, ...]
    answer: tuple[int, ...]
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check that there is a token to predict, and one to predict it from."""
        assert self.context, "a context needs at least one token"
        assert self.answer, "an answer needs at least one token"

    @property
    def limit(self) -> int:
        """Number of tokens after which decoding gives up."""
        return max(12, len(self.answer) + 6) if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True)
class Generate:
    """Continue `context` until a stop string, an end token or `max_new_tokens`.

    Greedily at temperature 0, else with tokens drawn from the softmax of logits / temperature.
    `ends` are end tokens besides the model's own: those of a template that another model brought.
    """

    context: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0
    ends: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Check that there is something to continue."""
        assert self.context, "a context needs at least one token"
        assert self.max_new_tokens > 0, "at least one token must be asked for"
        assert self.temperature >= 0, "a temperature cannot be negative"


Request = LogLikelihood | GreedyMatch | Generate


@dataclass(frozen=True)
class LogLikelihoodResult:
    """`log_likelihood` is a natural-log sum over the continuation's tokens, in float32 or better.

    `is_greedy`: each of its tokens is the likeliest one.
    """

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class GreedyMatchResult:
    """`text` is the greedy answer without what ended it; `stopped`: it ended within the limit."""

    correct: bool
    text: str
    stopped: bool = True


@dataclass(frozen=True)
class GenerateResult:
    """`text` ends before the stop string; `stopped` is false if the limit came first."""

    text: str
    stopped: bool


Result = LogLikelihoodResult | GreedyMatchResult | GenerateResult


def tokens_to_read(request: Request) -> tuple[int, ...]:
    """Return the tokens a model must see before every asked-for prediction can be read."""
    match request:
        case LogLikelihood():
            return request.context + request.continuation[:-1]
        case GreedyMatch():
            return request.context + request.answer
        case Generate():
            return request.context


def longest(request: Request) -> int:
    """Return how many tokens context and answer may come to."""
    match request:
        case LogLikelihood():
            return len(request.context) + len(request.continuation)
        case GreedyMatch():
            return len(request.context) + max(len(request.answer), request.limit)
        case Generate():
            return len(request.context) + request.max_new_tokens


def targets(request: Request) -> tuple[int, ...]:
    """Return the tokens whose probability is read; the first is predicted by the context's end."""
    match request:
        case LogLikelihood():
            return request.continuation
        case GreedyMatch():
            return request.answer
        case Generate():
            return ()

"""Tasks put to one model: rows out, one for each question under fixed demonstrations.

Knows no formulas over rows (`summary` does) and nothing of how requests are answered (`engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from keepshot.errors import TaskError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example
from keepshot.records import Cost, ItemResult, Split
from keepshot.scoring.engine import Engine
from keepshot.scoring.request import (
    GreedyMatch,
    GreedyMatchResult,
    LogLikelihood,
    LogLikelihoodResult,
    Request,
    Result,
)
from keepshot.tasks.task import Task, item_id

_Asked = tuple[Task, int, int, Example]
"""Task, number of shots, draw of demonstrations, and question."""
SPECIAL_TOKENS = 16
"""Tokens that a tokenizer may add to a text, at most."""
MOST_CLOSED_LABELS = 32
"""A task with more answers than this is open, however often each of them occurs."""


@dataclass(frozen=True)
class Plan:
    """What is asked of every model: all tasks at all numbers of shots, under all draws.

    Args:
        tasks: what to measure.
        shots: numbers of demonstrations. Zero shots are measured once, as seed 0.
        seeds: draws of demonstrations.
        split: where questions come from.
        limit: questions of each task at most, the first ones (None: all).
        tuned_labels: answers of the task that was tuned for, to be noticed elsewhere.
        free_answers: let the model answer choice questions in its own words too, to see whether
            it keeps to the format.
    """

    tasks: tuple[Task, ...]
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    split: Split = "test"
    limit: int | None = None
    tuned_labels: frozenset[str] = frozenset()
    free_answers: bool = False


@dataclass(frozen=True)
class Measurement:
    """Rows in the order of the plan (task, shots, seed, question), and what they took."""

    items: list[ItemResult]
    cost: Cost


@dataclass(frozen=True)
class Question:
    """One item under one draw of demonstrations, with the requests that answer it."""

    task: Task
    shots: int
    seed: int
    example: Example
    likelihoods: tuple[LogLikelihood, ...]
    """One for each choice; empty for exact tasks."""
    free: GreedyMatch | None

    @property
    def requests(self) -> list[Request]:
        """All requests, the free answer last."""
        return [*self.likelihoods, *([self.free] if self.free else [])]


def measure(
    model: LanguageModel,
    plan: Plan,
    *,
    arm: str,
    lam: float | None = None,
    engine: Engine | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Put every question of `plan` to `model`.

    Choice questions are judged by the log-likelihood of each choice: `correct` takes the plain sum,
    `correct_per_character` the sum divided by the number of characters. Exact ones are judged by
    the text of greedy decoding. Questions of a task that the model has a soft prompt for are asked
    under it. Two rates say how an answer fails:

    * `format_failure`: the answer is no possible answer. It does not end, or: where the task has a
      closed set of answers (at most 32, each seen twice on average), it is none of them; where
      it has not, it is empty or more than twice as long as the longest known answer. For choice
      questions it is judged on the free answer if one is asked for, and 0 otherwise.
    * `label_leakage`: the answer is one of the tuned task's and none of this task's own.

    Args:
        model: the model.
        plan: what is asked.
        arm: what the rows call this model.
        lam: lambda, where the model is a blend.
        engine: answers the requests; None makes one for `model`.
        progress: called with (requests answered, requests in all).

    Raises:
        TaskError: before anything runs, if there are fewer examples than shots, nothing to ask, or
            a prompt is longer than the model's context (prompts are never cut).
    """
    engine = engine or Engine(model)
    assert engine.model is model, "the engine must be of the model that is measured"
    questions = list(ask(model, plan))
    requests = [request for question in questions for request in question.requests]
    before = engine.cost
    results = iter(engine.run(requests, progress))
    items = [
        _judge(
            question,
            [next(results) for _ in question.requests],
            (arm, model.reference, lam),
            plan,
        )
        for question in questions
    ]
    spent = Cost(
        seconds=engine.cost.seconds - before.seconds,
        tokens_prefilled=engine.cost.tokens_prefilled - before.tokens_prefilled,
        tokens_naive=engine.cost.tokens_naive - before.tokens_naive,
    )
    return Measurement(items, spent)


def ask(model: LanguageModel, plan: Plan) -> Iterator[Question]:
    """Yield the questions of `plan`, tokenised for `model`.

    Raises:
        TaskError: as `measure` does.
    """
    for asked, context in _contexts(plan):
        yield _question(model, asked, context, plan)


def check_prompts(model: LanguageModel, plan: Plan) -> None:
    """Check that every prompt of `plan` fits the model's context, without asking anything.

    Only prompts that might not fit are tokenised: no tokenizer makes more tokens than bytes, apart
    from a few special ones.

    Raises:
        TaskError: as `measure` does.
    """
    for asked, context in _contexts(plan):
        task, _, _, example = asked
        room = model.context_length - SPECIAL_TOKENS - len(model.soft_prompt(task.name))
        answers = [
            task.template.continuation(a) for a in (example.output, *(example.choices or ()))
        ]
        if len(context.encode()) + max(len(answer.encode()) for answer in answers) > room:
            _question(model, asked, context, plan)


def _contexts(plan: Plan) -> Iterator[tuple[_Asked, str]]:
    """Yield what is asked, in the order of the plan, with its rendered context."""
    for task in plan.tasks:
        examples = getattr(task, plan.split)[: plan.limit]
        if not examples:
            raise TaskError(f"task {task.name!r} has no {plan.split} items, so nothing to measure")
        for shots in plan.shots:
            for seed in plan.seeds if shots else (0,):
                demonstrations = task.draw(shots, seed)
                for example in examples:
                    context = task.template.context(demonstrations, example)
                    yield (task, shots, seed, example), context


def _question(model: LanguageModel, asked: _Asked, context: str, plan: Plan) -> Question:
    task, shots, seed, example = asked
    likelihoods: list[LogLikelihood] = []
    if task.kind == "choice":
        assert example.choices, f"task {task.name!r}: a choice question needs choices"
        pairs = [_encode(model, asked, context, choice) for choice in example.choices]
        likelihoods = [LogLikelihood(*pair) for pair in pairs]
    free = None
    if task.kind == "exact" or plan.free_answers:
        free = GreedyMatch(*_encode(model, asked, context, example.output))
    return Question(task, shots, seed, example, tuple(likelihoods), free)


def _encode(
    model: LanguageModel, asked: _Asked, context: str, answer: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    task, shots, _, example = asked
    before, after = model.encode_pair(context, task.template.continuation(answer))
    where = f"task {task.name!r}, {shots} shots, question {example.input[:60]!r}"
    if not before or not after:
        raise TaskError(f"{where}: answer {answer!r} gives no token to score; mend or drop the row")
    # A soft prompt is for the task it was trained on, and for no other.
    before = [*model.soft_prompt(task.name), *before]
    excess = len(before) + len(after) - model.context_length
    if excess > 0:
        raise TaskError(
            f"{where}: prompt and answer are {excess} tokens longer than the context of "
            f"{model.reference!r} ({model.context_length}); ask for fewer shots or drop the row"
        )
    return tuple(before), tuple(after)


def _judge(
    question: Question,
    results: Sequence[Result],
    who: tuple[str, str, float | None],
    plan: Plan,
) -> ItemResult:
    task, example = question.task, question.example
    choices = list(example.choices or ()) if question.likelihoods else []
    sums = [r.log_likelihood for r in results if isinstance(r, LogLikelihoodResult)]
    free = next((r for r in results if isinstance(r, GreedyMatchResult)), None)
    said = free.text.strip() if free else None
    if choices:
        answer = choices[int(np.argmax(sums))]
        correct = answer == example.output
        lengths = [max(1, len(choice)) for choice in choices]
        by_character = choices[int(np.argmax(np.array(sums) / lengths))]
    else:
        assert free is not None
        assert said is not None
        # The same text counts too when the model spells it with other tokens than ours.
        spelled = free.stopped and said == example.output.strip()
        answer, correct, by_character = said, free.correct or spelled, None
    arm, model, lam = who
    return ItemResult(
        arm=arm,
        model=model,
        lam=lam,
        task=task.name,
        split=plan.split,
        shots=question.shots,
        seed=question.seed,
        item=item_id(example),
        question=example.input,
        gold=example.output,
        answer=answer,
        choices=choices,
        log_likelihoods=sums,
        correct=float(correct),
        correct_per_character=None
        if by_character is None
        else float(by_character == example.output),
        format_failure=float(free is not None and not _keeps_format(task, example, free)),
        label_leakage=float((said or answer) in plan.tuned_labels - task.labels),
    )


def _keeps_format(task: Task, example: Example, free: GreedyMatchResult) -> bool:
    said = free.text.strip()
    if free.correct:
        return True
    if not free.stopped:
        return False
    if example.choices:
        return said in example.choices
    if is_closed(task):
        return said in task.labels
    return 0 < len(said) <= 2 * max(len(label) for label in task.labels)


def is_closed(task: Task) -> bool:
    """Say whether the task's answers form a set: few, and each seen twice on average."""
    num_examples = sum(
        len(split) for split in (task.demonstrations, task.validation, task.test, task.train)
    )
    return len(task.labels) <= min(MOST_CLOSED_LABELS, num_examples // 2)

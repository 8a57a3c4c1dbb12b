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
    Generate,
    GenerateResult,
    GreedyMatch,
    GreedyMatchResult,
    LogLikelihood,
    LogLikelihoodResult,
    Request,
    Result,
)
from keepshot.tasks.task import Answer, Examiner, Task, is_closed, item_id

_Asked = tuple[Task, int, int, Example]
"""Task, number of shots, draw of demonstrations, and question."""
SPECIAL_TOKENS = 16
"""Tokens that a tokenizer may add to a text, at most."""


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
    free: GreedyMatch | Generate | None

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

    What a task's own examiner asks, it grades. Else choice questions are judged by the
    log-likelihood of each choice: `correct` takes the plain sum, `correct_per_character` the sum
    divided by the number of characters. Exact ones are judged by the text of greedy decoding.
    Questions of a task that the model has a soft prompt for are asked under it. Two rates say how
    an answer fails:

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
    return Measurement(items, engine.cost.since(before))


def ask(model: LanguageModel, plan: Plan) -> Iterator[Question]:
    """Yield the questions of `plan`, tokenised for `model`.

    Raises:
        TaskError: as `measure` does.
    """
    for asked, demonstrations in _asked(plan):
        yield _question(model, asked, demonstrations, plan)


def check_prompts(model: LanguageModel, plan: Plan) -> None:
    """Check that every prompt of `plan` fits the model's context, without asking anything.

    Only prompts that might not fit are tokenised: no tokenizer makes more tokens than bytes, apart
    from a few special ones.

    Raises:
        TaskError: as `measure` does.
    """
    for asked, demonstrations in _asked(plan):
        task, _, _, example = asked
        if task.examiner:
            _question(model, asked, demonstrations, plan)
            continue
        context = task.template.context(demonstrations, example)
        room = model.context_length - SPECIAL_TOKENS - len(model.soft_prompt(task.name))
        answers = [
            task.template.continuation(a) for a in (example.output, *(example.choices or ()))
        ]
        if len(context.encode()) + max(len(answer.encode()) for answer in answers) > room:
            _question(model, asked, demonstrations, plan)


def _asked(plan: Plan) -> Iterator[tuple[_Asked, tuple[Example, ...]]]:
    """Yield what is asked, in the order of the plan, with its demonstrations."""
    for task in plan.tasks:
        examples = getattr(task, plan.split)[: plan.limit]
        if not examples:
            raise TaskError(f"task {task.name!r} has no {plan.split} items, so nothing to measure")
        for shots in plan.shots:
            for seed in plan.seeds if shots else (0,):
                demonstrations = task.draw(shots, seed)
                for example in examples:
                    yield (task, shots, seed, example), demonstrations


def _question(
    model: LanguageModel, asked: _Asked, demonstrations: Sequence[Example], plan: Plan
) -> Question:
    task, shots, seed, example = asked
    if task.examiner:
        return _examined(model, asked, demonstrations, task.examiner)
    context = task.template.context(demonstrations, example)
    likelihoods: list[LogLikelihood] = []
    if task.kind == "choice":
        assert example.choices, f"task {task.name!r}: a choice question needs choices"
        for choice in example.choices:
            pair = model.encode_pair(context, task.template.continuation(choice))
            likelihoods.append(LogLikelihood(*_checked(model, asked, pair, choice)))
    free = None
    if task.kind == "exact" or plan.free_answers:
        pair = model.encode_answer(context, task.template.continuation(example.output))
        free = GreedyMatch(*_checked(model, asked, pair, example.output))
    return Question(task, shots, seed, example, tuple(likelihoods), free)


def _examined(
    model: LanguageModel, asked: _Asked, demonstrations: Sequence[Example], examiner: Examiner
) -> Question:
    """Return a question as the task's own examiner words it."""
    task, shots, seed, example = asked
    likelihoods: list[LogLikelihood] = []
    free: Generate | None = None
    for text in examiner.ask(demonstrations, example):
        if text.continuation is None:
            before = [*model.soft_prompt(task.name), *model.encode(text.context)]
            _check_length(model, asked, len(before) + text.max_new_tokens)
            free = Generate(tuple(before or model.start_ids), text.max_new_tokens, text.stop)
        else:
            before, after = model.encode_pair(text.context, text.continuation)
            pair = _checked(model, asked, (before or model.start_ids, after), text.continuation)
            likelihoods.append(LogLikelihood(*pair))
    return Question(task, shots, seed, example, tuple(likelihoods), free)


def _checked(
    model: LanguageModel, asked: _Asked, pair: tuple[list[int], list[int]], answer: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Put the task's soft prompt before `pair`, and check that it can be scored."""
    before, after = pair
    if not before or not after:
        raise TaskError(
            f"{_where(asked)}: answer {answer!r} gives no token to score; mend or drop the row"
        )
    # A soft prompt is for the task it was trained on, and for no other.
    before = [*model.soft_prompt(asked[0].name), *before]
    _check_length(model, asked, len(before) + len(after))
    return tuple(before), tuple(after)


def _check_length(model: LanguageModel, asked: _Asked, length: int) -> None:
    excess = length - model.context_length
    if excess > 0:
        raise TaskError(
            f"{_where(asked)}: prompt and answer are {excess} tokens longer than the context of "
            f"{model.reference!r} ({model.context_length}); ask for fewer shots or drop the row"
        )


def _where(asked: _Asked) -> str:
    task, shots, _, example = asked
    return f"task {task.name!r}, {shots} shots, question {example.input[:60]!r}"


def _judge(
    question: Question,
    results: Sequence[Result],
    who: tuple[str, str, float | None],
    plan: Plan,
) -> ItemResult:
    task, example = question.task, question.example
    choices = list(example.choices or ()) if question.likelihoods else []
    likely = [r for r in results if isinstance(r, LogLikelihoodResult)]
    # An examiner may ask more than one text for each choice; the first are the choices themselves.
    sums = [r.log_likelihood for r in likely][: len(choices)]
    free = next((r for r in results if not isinstance(r, LogLikelihoodResult)), None)
    said = free.text.strip() if free else None
    answer, by_character = said or "", None
    if choices:
        answer = choices[int(np.argmax(sums))]
        lengths = [max(1, len(choice)) for choice in choices]
        by_character = choices[int(np.argmax(np.array(sums) / lengths))] == example.output
    if task.examiner:
        correct = task.examiner.grade(example, [_answer(result) for result in results])
        answer = answer or (example.output if correct == 1 else "")
    elif choices:
        correct = answer == example.output
    else:
        assert isinstance(free, GreedyMatchResult)
        # The same text counts too when the model spells it with other tokens than ours.
        correct = free.correct or (free.stopped and said == example.output.strip())
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
        correct_per_character=None if by_character is None else float(by_character),
        format_failure=float(free is not None and not _keeps_format(task, example, free)),
        label_leakage=float((said or answer) in plan.tuned_labels - task.labels),
    )


def _answer(result: Result) -> Answer:
    if isinstance(result, LogLikelihoodResult):
        return result.log_likelihood, result.is_greedy
    return result.text


def _keeps_format(task: Task, example: Example, free: GreedyMatchResult | GenerateResult) -> bool:
    said = free.text.strip()
    if isinstance(free, GenerateResult):
        return free.stopped and bool(said)
    if free.correct:
        return True
    if not free.stopped:
        return False
    if example.choices:
        return said in example.choices
    if is_closed(task):
        return said in task.labels
    return 0 < len(said) <= 2 * max(len(label) for label in task.labels)

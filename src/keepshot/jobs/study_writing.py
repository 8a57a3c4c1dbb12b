"""Questions to which a model writes its own demonstrations first (arXiv 2501.08716).

A model tuned with `samples: samplegen` writes two demonstrations for each question, greedily. What
it wrote, cut where the answer is to follow, becomes a prompt: for the same model (`samplegen`), or
for the model before tuning (`pipeline`), whose prompt then holds nothing of what asked for the
demonstrations. Answers are judged as those to any prompt of the task, so that all settings compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from keepshot.errors import TaskError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example, Template
from keepshot.records import ItemResult
from keepshot.scoring.engine import Engine
from keepshot.scoring.evaluate import SPECIAL_TOKENS, Plan, measure
from keepshot.scoring.request import Generate, GenerateResult
from keepshot.study.asks import Written
from keepshot.tasks.task import Task, item_id
from keepshot.tuning.samplegen import NUM_SHOWN, Form, Samples, form_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Draft:
    """What a model wrote to one question of a task."""

    task: Task
    form: Form
    example: Example
    written: str

    def prompt(self, setting: Written) -> str | None:
        """Return the prompt that the answer follows; None if the model did not get that far."""
        cut = self.form.cut(self.written)
        if cut is None:
            return None
        if setting == "pipeline":
            return self.form.alone(cut)
        return self.form.prompt(self.example) + cut


@dataclass(frozen=True)
class Continued(Template):
    """A template whose prompts are there already, by question."""

    prompts: Mapping[str, str] = field(default_factory=dict[str, str])

    def context(self, demonstrations: Sequence[Example], query: Example) -> str:
        """Return the prompt of a question."""
        assert not demonstrations, "they are in the prompt"
        return self.prompts[query.input]


def form_for(task: Task, samples: Samples) -> Form:
    """Return the form in which a task is put to a model that writes demonstrations.

    Raises:
        ConfigError: as `form_of` does.
        TaskError: if the task words its own prompts.
    """
    if task.examiner:
        raise TaskError(
            f"task {task.name!r} words its own prompts, so none can be put after demonstrations "
            "that a model writes; give it an ask without samplegen and pipeline"
        )
    return form_of(samples, task.template)


def write(
    engine: Engine, plan: Plan, samples: Samples, longest: int, progress: Progress | None = None
) -> list[Draft]:
    """Let a model write demonstrations for each question of a plan.

    Args:
        engine: of the model.
        plan: tasks, split and limit.
        samples: the form that the model has learned.
        longest: tokens that it writes at most.
        progress: called with (texts written, texts in all).

    Raises:
        TaskError: if a question is longer than the model's context.
    """
    model = engine.model
    asked = [
        (task, form, example, form.prompt(example))
        for task in plan.tasks
        for form in (form_for(task, samples),)
        for example in _examples(task, plan)
    ]
    requests: list[Generate] = []
    for task, form, example, prompt in asked:
        context = [*model.soft_prompt(task.name), *model.encode(prompt)]
        if len(context) >= model.context_length:
            raise TaskError(
                f"task {task.name!r}, question {example.input[:60]!r}: has {len(context)} tokens "
                f"where the context of {model.reference!r} is {model.context_length}; drop the row"
            )
        requests.append(Generate(tuple(context), longest, (form.end,) if form.end.strip() else ()))
    drafts: list[Draft] = []
    for (task, form, example, _), result in zip(
        asked, engine.run(requests, progress), strict=True
    ):  # fmt: skip
        assert isinstance(result, GenerateResult)
        drafts.append(Draft(task, form, example, result.text))
    return drafts


def answer(
    engine: Engine,
    plan: Plan,
    drafts: Sequence[Draft],
    setting: Written,
    *,
    arm: str,
    progress: Progress | None = None,
) -> list[ItemResult]:
    """Return a row for each question, answered after the demonstrations that were written for it.

    Where they do not lead up to an answer, the answer is wrong and a failure of format.

    Args:
        engine: of the model that answers.
        plan: as for `write`.
        drafts: what was written.
        setting: who answers.
        arm: what the rows call it.
        progress: as for `measure`.
    """
    model = engine.model
    prompts = [_fitting(model, draft, draft.prompt(setting)) for draft in drafts]
    tasks: list[Task] = []
    for task in plan.tasks:
        pairs = [
            (draft.example, prompt)
            for draft, prompt in zip(drafts, prompts, strict=True)
            if draft.task.name == task.name and prompt is not None
        ]
        if pairs:
            known = {example.input: prompt for example, prompt in pairs}
            whole = form_of_answers(next(d.form for d in drafts if d.task.name == task.name), known)
            examples = tuple(example for example, _ in pairs)
            tasks.append(replace(task, template=whole, **{plan.split: examples}))
    asked = replace(plan, tasks=tuple(tasks), shots=(0,), seeds=(0,), limit=None)
    measured = measure(model, asked, arm=arm, engine=engine, progress=progress).items
    found = {(row.task, row.item): row for row in measured}
    rows: list[ItemResult] = []
    for draft in drafts:
        row = found.get((draft.task.name, item_id(draft.example)))
        row = row or _failed(draft, plan, (arm, model.reference))
        rows.append(replace(row, shots=NUM_SHOWN, setting=setting, written=draft.written))
    return rows


def form_of_answers(form: Form, prompts: Mapping[str, str]) -> Continued:
    """Return the template of answers that follow prompts which are there already."""
    return Continued(form.solved.question, form.solved.answer, prompts=prompts)


def num_tokens(
    model: LanguageModel, plan: Plan, samples: Samples, settings: Sequence[Written]
) -> int:
    """Return the tokens that are read and written, if all is as long as in demonstrations."""
    total = 0
    for task in plan.tasks:
        form = form_for(task, samples)
        shown = (*task.draw(min(NUM_SHOWN, len(task.demonstrations)), 0), *task.train, *task.test)
        for example in _examples(task, plan):
            prompt = len(model.encode(form.prompt(example)))
            written = len(model.encode(form.written(shown[:NUM_SHOWN], example)))
            answered = {"samplegen": prompt + written, "pipeline": written}
            total += prompt + written + sum(answered[setting] for setting in settings)
    return total


def _examples(task: Task, plan: Plan) -> Sequence[Example]:
    examples: Sequence[Example] = getattr(task, plan.split)[: plan.limit]
    if not examples:
        raise TaskError(f"task {task.name!r} has no {plan.split} items, so nothing to measure")
    return examples


def _fitting(model: LanguageModel, draft: Draft, prompt: str | None) -> str | None:
    """Return a prompt if it leaves room for the answer in the model's context."""
    if prompt is None:
        return None
    answers = [
        draft.form.solved.continuation(text)
        for text in (draft.example.output, *(draft.example.choices or ()))
    ]
    room = model.context_length - SPECIAL_TOKENS - len(model.soft_prompt(draft.task.name))
    longest = max(answers, key=lambda text: len(model.encode_plain(text)))
    return prompt if len(model.encode(prompt + longest)) <= room else None


def _failed(draft: Draft, plan: Plan, who: tuple[str, str]) -> ItemResult:
    example = draft.example
    choices = list(example.choices or ()) if draft.task.kind == "choice" else []
    arm, model = who
    return ItemResult(
        arm=arm,
        model=model,
        lam=None,
        task=draft.task.name,
        split=plan.split,
        shots=0,
        seed=0,
        item=item_id(example),
        question=example.input,
        gold=example.output,
        answer="",
        choices=choices,
        log_likelihoods=[],
        correct=0.0,
        correct_per_character=0.0 if choices else None,
        format_failure=1.0,
        label_leakage=0.0,
    )

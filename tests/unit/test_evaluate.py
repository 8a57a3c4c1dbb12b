"""Rows that `measure` makes: what is asked, how it is judged, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from keepshot.errors import TaskError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example
from keepshot.records import ItemResult
from keepshot.scoring.engine import Engine
from keepshot.scoring.evaluate import Measurement, Plan, ask, measure
from keepshot.scoring.request import GreedyMatchResult, LogLikelihood
from keepshot.scoring.summary import summarise
from keepshot.tasks.task import Task, is_closed, item_id

WORDS = [a + b for a in "bdfgkl" for b in ("ana", "olo", "iti", "u")]


def some_task(kind: str = "exact", name: str = "toy", **changes: object) -> Task:
    choices = ("up", "down", "sideways") if kind == "choice" else None
    examples = [
        Example(word, choices[i % 3] if choices else word.upper(), choices)
        for i, word in enumerate(WORDS)
    ]
    task = Task(
        name=name, kind="choice" if choices else "exact", version=1, domain="toy",
        description="toy", demonstrations=tuple(examples[:8]), validation=tuple(examples[8:12]),
        test=tuple(examples[12:]),
    )  # fmt: skip
    return replace(task, **changes)


def rows_of(measurement: Measurement) -> dict[tuple[str, int, int, str], ItemResult]:
    return {(row.task, row.shots, row.seed, row.item): row for row in measurement.items}


def test_choice_rows_hold_plain_log_likelihoods(pico_models: dict[str, LanguageModel]) -> None:
    model, task = pico_models["llama"], some_task("choice")
    plan = Plan((task,), shots=(0, 3), seeds=(0, 1), limit=5)
    found = measure(model, plan, arm="before", lam=0.5)
    assert len(found.items) == 5 + 2 * 5, "zero shots are measured once"
    assert {row.seed for row in found.items if row.shots == 0} == {0}
    assert {(row.arm, row.model, row.lam) for row in found.items} == {("before", "pico-llama", 0.5)}
    for example in task.test[:5]:
        row = rows_of(found)["toy", 3, 1, item_id(example)]
        context = task.template.context(task.draw(3, 1), example)
        ids = model.encode(context)
        expected: list[float] = []
        for choice in ("up", "down", "sideways"):
            answer = model.encode(context + " " + choice)[len(ids) :]
            with torch.no_grad():
                logits = model.module(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
            log_probs = torch.log_softmax(logits, dim=-1)
            expected.append(float(sum(log_probs[i, token] for i, token in enumerate(answer))))
        np.testing.assert_allclose(row.log_likelihoods, expected, atol=5e-4)
        assert row.choices == ["up", "down", "sideways"]
        assert row.answer == row.choices[int(np.argmax(expected))]
        assert row.correct == float(row.answer == example.output)
        by_character = row.choices[int(np.argmax(np.array(expected) / [2, 4, 8]))]
        assert row.correct_per_character == float(by_character == example.output)
        assert (row.format_failure, row.label_leakage) == (0.0, 0.0)
    assert found.cost.tokens_naive > found.cost.tokens_prefilled > 0
    assert summarise(found.items)[0].num_items == 5


def test_demonstrations_do_not_depend_on_the_model(pico_models: dict[str, LanguageModel]) -> None:
    plan = Plan((some_task(),), shots=(2,), seeds=(0, 1))
    models = pico_models["llama"], pico_models["gpt2"]
    first, second = ([q.requests for q in ask(model, plan)] for model in models)
    assert first == second


def test_sharing_changes_no_row(pico_models: dict[str, LanguageModel]) -> None:
    model = pico_models["gemma3"]
    tasks = some_task(), some_task("choice", "pick")
    plan = Plan(tasks, shots=(0, 4), seeds=(0,), free_answers=True)
    plain = measure(model, plan, arm="a", engine=Engine(model, share=False))
    shared = measure(model, plan, arm="a")
    for row, reference in zip(shared.items, plain.items, strict=True):
        np.testing.assert_allclose(row.log_likelihoods, reference.log_likelihoods, atol=1e-3)
        assert replace(row, log_likelihoods=[]) == replace(reference, log_likelihoods=[])
    assert shared.cost.tokens_prefilled < 0.5 * plain.cost.tokens_prefilled


class Scripted(Engine):
    """Says what it is told to, so that judging can be tested apart from any model."""

    says: tuple[GreedyMatchResult, ...] = ()

    def run(self, requests: object, progress: object = None) -> list[GreedyMatchResult]:  # type: ignore[override]
        return list(self.says)


def judged(
    model: LanguageModel, task: Task, *says: GreedyMatchResult, tuned: frozenset[str] = frozenset()
) -> list[ItemResult]:
    engine = Scripted(model)
    engine.says = says
    plan = Plan((task,), shots=(1,), seeds=(0,), limit=len(says), tuned_labels=tuned)
    return measure(model, plan, arm="a", engine=engine).items


def test_failures_of_closed_and_open_tasks(pico_models: dict[str, LanguageModel]) -> None:
    model = pico_models["llama"]
    closed = some_task(
        test=tuple(Example(word, "yes" if i % 2 else "no") for i, word in enumerate(WORDS)),
        demonstrations=(Example("x", "yes"),), validation=(),
    )  # fmt: skip
    assert is_closed(closed)
    rows = judged(
        model, closed,
        GreedyMatchResult(True, " no"),
        GreedyMatchResult(False, " no"),
        GreedyMatchResult(False, " maybe"),
        GreedyMatchResult(False, " no no no", stopped=False),
        GreedyMatchResult(False, " spam"),
        tuned=frozenset({"spam", "no"}),
    )  # fmt: skip
    assert [row.correct for row in rows] == [1, 0, 0, 0, 0]
    assert [row.answer for row in rows] == ["no", "no", "maybe", "no no no", "spam"]
    assert [row.format_failure for row in rows] == [0, 0, 1, 1, 1]
    assert [row.label_leakage for row in rows] == [0, 0, 0, 0, 1], "`no` is this task's own label"
    opened = some_task()
    assert not is_closed(opened)
    rows = judged(
        model, opened,
        GreedyMatchResult(False, " anything"),
        GreedyMatchResult(False, " "),
        GreedyMatchResult(False, " far too long to be one"),
        GreedyMatchResult(False, " BANA", stopped=False),
    )  # fmt: skip
    assert [row.format_failure for row in rows] == [0, 1, 1, 1]


def test_free_answers_judge_the_format_of_choice_tasks(
    pico_models: dict[str, LanguageModel],
) -> None:
    model = pico_models["qwen2"]
    plan = Plan((some_task("choice"),), (1,), (0,), free_answers=True)
    rows = measure(model, plan, arm="a").items
    without = measure(model, replace(plan, free_answers=False), arm="a").items
    assert [row.answer for row in rows] == [row.answer for row in without]
    assert sum(row.format_failure for row in without) == 0
    assert sum(row.format_failure for row in rows) == len(rows), "a random model keeps no format"


def test_what_cannot_be_measured_is_refused_before_anything_runs(
    fresh_pico: Callable[..., LanguageModel],
) -> None:
    model = fresh_pico("llama")
    model.module.config.max_position_embeddings = 40
    engine = Engine(model)
    task = some_task()
    with pytest.raises(TaskError, match=r"'toy', 4 shots, .*prompt and answer are \d+ tokens long"):
        measure(model, Plan((task,), (0, 4), (0,)), arm="a", engine=engine)
    with pytest.raises(TaskError, match="8 demonstrations, fewer than the 9 shots"):
        measure(model, Plan((task,), (9,), (0,)), arm="a", engine=engine)
    empty = Plan((replace(task, validation=()),), (0,), (0,), split="validation")
    with pytest.raises(TaskError, match="no validation items"):
        measure(model, empty, arm="a", engine=engine)
    assert engine.cost.tokens_prefilled == 0


def test_one_token_too_many_is_counted(fresh_pico: Callable[..., LanguageModel]) -> None:
    model = fresh_pico("gpt2")
    task = some_task("choice")
    longest = max(
        len(request.context) + len(request.continuation)
        for question in ask(model, Plan((task,), (2,), (0,)))
        for request in question.requests
        if isinstance(request, LogLikelihood)
    )
    model.module.config.max_position_embeddings = longest - 1
    tight = replace(model)  # the context length is cached on the first one
    with pytest.raises(TaskError, match=rf"1 tokens longer than the context .*\({longest - 1}\)"):
        list(ask(tight, Plan((task,), (2,), (0,))))


def test_progress_ends_with_all_requests(pico_models: dict[str, LanguageModel]) -> None:
    told: list[tuple[int, int]] = []
    plan = Plan((some_task("choice"),), (0,), (0,), limit=4)
    measure(
        pico_models["gpt2"], plan, arm="a", progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (12, 12)

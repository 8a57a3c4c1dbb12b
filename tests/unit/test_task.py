"""Tasks: draws that are the same everywhere, chance, labels, identities."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from keepshot.errors import TaskError
from keepshot.prompts import TEMPLATES, Example
from keepshot.tasks.task import Task, group_by_input, item_id

COLOURS = ("red", "green", "blue")


def choice_task() -> Task:
    shown = tuple(Example(f"thing {i}", COLOURS[i % 3], COLOURS) for i in range(30))
    return Task(
        name="colours",
        kind="choice",
        version=1,
        domain="test",
        description="a thing -> its colour",
        demonstrations=shown,
        validation=(Example("v", "red", ("red", "green")),),
        test=(Example("t", "blue", ("red", "green", "blue", "grey")),),
    )


def exact_task() -> Task:
    task = choice_task()
    shown = tuple(Example(e.input, e.output) for e in task.demonstrations)
    return replace(task, kind="exact", demonstrations=shown, test=(Example("t", "pink"),))


def test_metric_chance_and_labels() -> None:
    assert choice_task().metric == "accuracy"
    assert choice_task().chance == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert choice_task().labels == {"red", "green", "blue", "grey"}
    assert exact_task().metric == "exact_match"
    assert exact_task().chance == 0.0
    assert exact_task().labels == {"red", "green", "blue", "pink"}


def test_draw_is_fixed_by_seed_and_differs_between_seeds() -> None:
    task = choice_task()
    assert task.draw(4, 0) == task.draw(4, 0)
    assert len({task.draw(4, seed) for seed in range(10)}) == 10
    assert task.draw(0, 0) == ()


@pytest.mark.parametrize("seed", range(20))
def test_draw_spreads_answers_and_nests(seed: int) -> None:
    task = choice_task()
    assert {e.output for e in task.draw(3, seed)} == set(COLOURS)
    assert sorted(e.output for e in task.draw(6, seed)) == sorted(COLOURS * 2)
    assert set(task.draw(4, seed)) < set(task.draw(8, seed))
    assert len(set(task.draw(30, seed))) == 30


def test_draw_order_of_classes_varies() -> None:
    first = {choice_task().draw(3, seed)[0].output for seed in range(20)}
    assert first == set(COLOURS)


def test_more_shots_than_demonstrations_is_an_error() -> None:
    with pytest.raises(TaskError, match=r"'colours' has 30 demonstrations, fewer than the 31"):
        choice_task().draw(31, 0)


def test_fingerprint_changes_with_questions_and_template() -> None:
    task = choice_task()
    variants = [
        task,
        replace(task, version=2),
        replace(task, template=TEMPLATES["arrow"]),
        replace(task, test=(Example("t", "red", COLOURS),)),
        replace(task, train=task.test),
    ]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)
    assert task.fingerprint() == choice_task().fingerprint()


def test_item_id_separates_question_from_answer() -> None:
    assert item_id(Example("Chile", "Santiago")) == "b7a842092c66"
    assert item_id(Example("ab", "c")) != item_id(Example("a", "bc"))


def test_group_by_input_ignores_case_and_outer_spaces() -> None:
    a, b, c = Example("Dog", "x"), Example("cat", "y"), Example(" dog ", "z")
    assert group_by_input([a, b, c]) == [[a, c], [b]]


def test_draw_does_not_depend_on_the_salt_of_hash() -> None:
    code = (
        "from keepshot.prompts import Example; from keepshot.tasks.task import Task\n"
        "shown = tuple(Example(str(i), str(i % 5)) for i in range(40))\n"
        "task = Task('n', 'exact', 1, 'd', 'd', shown, (), (shown[0],))\n"
        "print([e.input for e in task.draw(8, 3)], task.fingerprint())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(outputs) == 1

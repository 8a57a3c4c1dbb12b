"""Variants of a prompt: what each changes, and that it changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from keepshot.assets import AssetStore
from keepshot.errors import ConfigError, TaskError
from keepshot.prompts import VERBATIM, Example
from keepshot.study.grid import expand
from keepshot.study.spec import StudySpec
from keepshot.tasks.catalog import SUITES, load_task
from keepshot.tasks.task import Task
from keepshot.tasks.variants import WORDINGS, Demonstrations, VariedTask, varied

ANSWERS: tuple[Demonstrations, ...] = ("corrupted", "flipped", "random")
SEEDS, SHOTS = range(40), 6


@pytest.fixture(scope="module")
def tasks(store: AssetStore) -> dict[str, Task]:
    names = ("sentence-topic", "sentence-feeling", "word-group", "addition", "second-item",
             "extract-phone", *SUITES["composed"])  # fmt: skip
    return {name: load_task(name, store) for name in names}


def both(task: Task, demonstrations: Demonstrations, seed: int) -> list[tuple[Example, Example]]:
    """Return what is shown plainly beside what the variant shows."""
    other = varied(task, "plain", demonstrations)
    return list(zip(task.draw(SHOTS, seed), other.draw(SHOTS, seed), strict=True))


def closed(tasks: dict[str, Task]) -> list[Task]:
    names = ["sentence-topic", "sentence-feeling", "word-group"]
    return [tasks[name] for name in names] + [t for t in tasks.values() if t.kind == "choice"][3:6]


def test_plain_is_the_task_itself(tasks: dict[str, Task]) -> None:
    assert varied(tasks["addition"], "plain", "gold") is tasks["addition"]


@pytest.mark.parametrize("demonstrations", ANSWERS)
def test_questions_inputs_and_chance_stay(
    tasks: dict[str, Task], demonstrations: Demonstrations
) -> None:
    for task in closed(tasks):
        other = varied(task, "plain", demonstrations)
        assert other.test == task.test
        assert (other.chance, other.template, other.name) == (task.chance, task.template, task.name)
        for seed in SEEDS:
            for plain, changed in both(task, demonstrations, seed):
                assert (changed.input, changed.choices) == (plain.input, plain.choices)
        assert other.draw(SHOTS, 0) == other.draw(SHOTS, 0)
        few, more = other.draw(2, 3), other.draw(SHOTS, 3)
        assert {example.input: example.output for example in few}.items() <= {
            example.input: example.output for example in more
        }.items(), "more shots do not change what few show"


def test_corrupted_answers_are_no_answers(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        shown = [pair for seed in SEEDS for pair in both(task, "corrupted", seed)]
        assert all(changed.output not in task.labels for _, changed in shown)
        assert all(
            len(changed.output.split()) == len(plain.output.split()) for plain, changed in shown
        )
        assert len({changed.output for _, changed in shown}) > 3


def test_where_questions_hold_only_numbers_answers_become_letters() -> None:
    examples = tuple(Example(f"{n} + 1", str(n + 1)) for n in range(100, 140))
    task = Task("numbers", "exact", 1, "d", "d", examples[:20], (), examples[20:])
    for _, changed in both(task, "corrupted", 0):
        assert len(changed.output) == 3
        assert changed.output.isalpha()
    names = "abcdefghijklmnopqrstuvwxyz"
    letters = tuple(Example(f"{names[n % 26]} {names[n // 26]}", names[n % 26]) for n in range(52))
    task = Task("letters", "exact", 1, "d", "d", letters, (), letters)
    assert all(len(changed.output) > 1 for _, changed in both(task, "corrupted", 0))


def test_flipped_labels_are_exchanged_the_same_way_within_a_draw(tasks: dict[str, Task]) -> None:
    for task in closed(tasks):
        maps: list[dict[str, str]] = []
        for seed in SEEDS:
            pairs = [
                (plain.output, changed.output) for plain, changed in both(task, "flipped", seed)
            ]
            assert all(before != after for before, after in pairs)
            assert len(dict(pairs)) == len(set(pairs)), "one label becomes one label"
            assert len({after for _, after in pairs}) == len(dict(pairs)), "and no two the same"
            assert {after for _, after in pairs} <= task.labels
            maps.append(dict(pairs))
        if len(task.labels) > 2:
            assert len({str(sorted(one.items())) for one in maps}) > 5, "another way in others"


def test_random_labels_are_uniform_and_tell_nothing(tasks: dict[str, Task]) -> None:
    task = tasks["sentence-topic"]
    pairs = [pair for seed in range(400) for pair in both(task, "random", seed)]
    share = sum(plain.output == changed.output for plain, changed in pairs) / len(pairs)
    # 2,400 labels of 5: the standard error of a share of .2 is .008.
    assert share == pytest.approx(0.2, abs=0.033)
    for label in task.labels:
        drawn = sum(changed.output == label for _, changed in pairs) / len(pairs)
        assert drawn == pytest.approx(0.2, abs=0.033)


def test_another_task_s_demonstrations_come_whole(tasks: dict[str, Task]) -> None:
    among = [tasks[name] for name in ("sentence-topic", "addition", "second-item")]
    for place, task in enumerate(among):
        other = varied(task, "plain", "other-task", among)
        assert other.draw(4, 1) == among[(place + 1) % 3].draw(4, 1)
        assert other.test == task.test
    composed = [tasks[name] for name in SUITES["composed"]]
    for task in composed:
        found = varied(task, "plain", "other-task", composed)
        assert isinstance(found, VariedTask)
        assert found.others[0].domain != task.domain


def test_wordings_hold_no_field_name_or_too_many_words(tasks: dict[str, Task]) -> None:
    task = tasks["addition"]
    shown, query = task.draw(2, 0), task.test[0]
    bare = varied(task, "bare", "gold").template.context(shown, query)
    assert bare == "\n\n".join(
        [*(f"{example.input} : {example.output}" for example in shown), f"{query.input} :"]
    )
    ornate = varied(task, "ornate", "gold")
    assert len(ornate.template.context((), query)) > 150
    assert (ornate.draw(2, 0), ornate.test) == (shown, task.test)
    assert varied(task, "bare", "corrupted").draw(2, 0) == varied(task, "plain", "corrupted").draw(
        2, 0
    )


def test_what_has_no_such_variant_is_refused_by_name(tasks: dict[str, Task]) -> None:
    for demonstrations in ("flipped", "random"):
        with pytest.raises(TaskError, match="'extract-phone' has open answers"):
            varied(tasks["extract-phone"], "plain", demonstrations)
    with pytest.raises(TaskError, match="'addition' is asked alone"):
        varied(tasks["addition"], "plain", "other-task", [tasks["addition"]])
    rows = tuple(Example(f"say {n}", "x") for n in range(20))
    verbatim = Task("said", "exact", 1, "d", "d", rows[:10], (), rows[10:], template=VERBATIM)
    with pytest.raises(TaskError, match="'said' brings its own wording"):
        varied(verbatim, "ornate", "gold")


# -- as keys of an ask -------------------------------------------------------------------------


def spec_of(**ask: Any) -> StudySpec:
    content = {"models": ["a"], "asks": {"a": {"tasks": ["sentence-topic", "word-group"], **ask}}}
    return StudySpec.from_mapping(content, source="s")


def test_only_variants_are_other_units() -> None:
    plain = set(expand(spec_of()).units)
    assert set(expand(spec_of(wording="plain", demonstrations="gold")).units) == plain
    assert spec_of(wording="plain").fingerprint() == spec_of().fingerprint()
    found = [set(expand(spec_of(wording=wording)).units) for wording in WORDINGS]
    found += [
        set(expand(spec_of(settings=["gold"], demonstrations=one)).units)
        for one in ("gold", *ANSWERS, "other-task")
    ]
    assert len(set.union(plain, *found)) == 1 + 2 + 5


def test_names_in_the_frame() -> None:
    ask = spec_of(wording="ornate").asks["a"]
    assert [ask.setting_at(shots) for shots in (0, 4)] == ["direct, ornate", "gold, ornate"]
    both_ = spec_of(settings=["gold"], wording="bare", demonstrations="flipped").asks["a"]
    assert both_.setting_at(2) == "flipped, bare"


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"demonstrations": "flipped"}, r"write `settings: \[gold\]`"),
        ({"wording": "ornate", "template": "arrow"}, "leave `template` out"),
        ({"settings": ["samplegen"], "wording": "bare"}, "an ask of their own"),
        ({"wording": "ornated"}, "wording"),
    ],
)
def test_what_does_not_go_together_is_refused(ask: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(**ask)

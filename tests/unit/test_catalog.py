"""The catalog: suites, anchors apart from them, splits, files as tasks.

Tests that take the `store` fixture build tasks from pinned packages (a few small downloads, once).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from keepshot.assets import ASSETS, AssetStore
from keepshot.errors import TaskError
from keepshot.tasks import sentences
from keepshot.tasks.catalog import (
    CATALOG,
    SUITES,
    is_file,
    load_task,
    resolve_tasks,
    task_from_file,
)
from keepshot.tasks.targets import REQUESTS
from keepshot.tasks.task import Task

OWN = [name for name, entry in CATALOG.items() if not entry.assets]


class NoAssets:
    """A store for tasks that need none."""

    def fetch(self, name: str) -> Path:
        raise AssertionError(f"{name} was fetched")


@pytest.fixture(scope="module")
def store() -> AssetStore:
    return AssetStore.from_environment(os.environ, quiet=True)


@pytest.fixture(scope="module")
def built(store: AssetStore) -> dict[str, Task]:
    return {name: load_task(name, store) for name in CATALOG}


def write_rows(path: Path, count: int, **more: list[str]) -> Path:
    rows = [{"input": f"q{i}", "output": "ab"[i % 2], **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_suites_have_the_promised_sizes_and_name_tasks() -> None:
    assert 12 <= len(SUITES["core"]) <= 16
    assert len(SUITES["full"]) >= 24
    assert len(SUITES["anchors"]) >= 6
    assert set(SUITES["core"]) <= set(SUITES["full"])
    assert all(name in CATALOG for names in SUITES.values() for name in names)
    assert not set(SUITES) & set(CATALOG)
    assert sum(CATALOG[name].kind == "exact" for name in SUITES["core"]) >= 8
    assert all(asset in ASSETS for entry in CATALOG.values() for asset in entry.assets)


def test_anchors_share_nothing_with_the_suites_or_the_target() -> None:
    anchors = [CATALOG[name] for name in SUITES["anchors"]]
    # In capitals, or twice: a run refuses them beside the anchors.
    alike = {
        "third-capitals", "food-capitals", "second-twice", "animal-twice", "third-number-twice",
    }  # fmt: skip
    others = [CATALOG[name] for name in CATALOG if name not in {*SUITES["anchors"], *alike}]
    assert {CATALOG[name].rule for name in alike} == {"letter case", "repetition"}
    assert alike < set(SUITES["composed"])
    assert {entry.role for entry in anchors} == {"anchor"}
    for shared in ("rule", "domain", "source"):
        kept = {getattr(entry, shared) for entry in anchors}
        assert not kept & {getattr(entry, shared) for entry in others}, shared


def test_targets_are_in_no_suite_and_their_domains_in_none() -> None:
    targets = [name for name, entry in CATALOG.items() if entry.role == "target"]
    assert targets == [
        "support", "instructions", "instructions-homogeneous", "request-letters", "worked-sums",
        "compositions",
    ]  # fmt: skip
    measured = {name for names in SUITES.values() for name in names}
    assert not measured & set(targets)
    domains = {CATALOG[name].domain for name in measured}
    assert not domains & {CATALOG[name].domain for name in targets}


def test_no_anchor_question_occurs_in_a_measured_task(built: dict[str, Task]) -> None:
    def questions(task: Task) -> set[str]:
        everything = task.demonstrations + task.validation + task.test + task.train
        return {example.input.strip().casefold() for example in everything}

    asked = set().union(*(questions(built[n]) for n in CATALOG if n not in SUITES["anchors"]))
    for name in SUITES["anchors"]:
        assert not questions(built[name]) & asked, name


def test_names_too_long_for_a_path_are_unknown_tasks() -> None:
    """The system's refusal of such a path came as a traceback."""
    assert not is_file("x" * 300)
    for name, told in (("x" * 300, "is unknown"), ("x" * 300 + ".jsonl", "cannot be read")):
        with pytest.raises(TaskError, match=told):
            load_task(name, NoAssets())


def test_known_facts(built: dict[str, Task]) -> None:
    expected = {
        "country-capital": ("Chile", "Santiago"),
        "country-demonym": ("Chile", "Chilean"),
        "english-french": ("telephone", "t\u00e9l\u00e9phone"),
        "english-spanish": ("house", "casa"),
        "past-tense": ("sing", "sang"),
        "plural": ("shelf", "shelves"),
        "comparative": ("heavy", "heavier"),
        "number-name": ("forty-two", "42"),
        "opposite": ("empty", "full"),
        "short-facts": ("What do bees make?", "honey"),
    }
    for name, (question, answer) in expected.items():
        task = built[name]
        everything = task.demonstrations + task.validation + task.test
        found = {e.input: e.output for e in everything}
        assert found.get(question) == answer, name


def test_made_rules_hold(built: dict[str, Task]) -> None:
    for example in built["date-format"].test:
        year, month, day = example.input.split("-")
        assert example.output == f"!{month}!{day}!{year}!"
    for example in built["private-concatenation"].test:
        assert example.output == example.input.replace(" # ", "")
    for example in built["look-up"].test:
        table, key = example.input.split("; ")
        assert dict(pair.split("=") for pair in table.split())[key] == example.output
    assert {e.output in e.input for e in built["extract-town"].test} == {True}


def test_the_target_is_balanced_and_has_enough_to_tune_on() -> None:
    for name, each in (("support", 96), ("support-test", 40)):
        counts = Counter(message.output for message in sentences.written(name))
        assert len(counts) == 6
        assert set(counts.values()) == {each}
    task = load_task("support", NoAssets())
    sizes = [len(s) for s in (task.demonstrations, task.validation, task.test, task.train)]
    assert sizes == [64, 300, 240, 212]
    assert task.chance == pytest.approx(1 / 6)
    assert min(Counter(e.output for e in task.train).values()) >= 20


def test_no_class_of_the_target_is_given_away_by_one_word() -> None:
    """The best single word per class finds fewer than half of its messages."""
    messages = sentences.written("support") + sentences.written("support-test")
    found: dict[str, Counter[str]] = {}
    for message in messages:
        tokens = {token.strip(".,?!'\"") for token in message.input.lower().split()}
        for token in tokens:
            found.setdefault(token, Counter())[message.output] += 1
    for label in {message.output for message in messages}:
        telling = [c[label] for c in found.values() if c[label] > 0.8 * c.total()]
        assert max(telling) < 68, label


def test_splits_are_the_same_in_every_process() -> None:
    code = (
        "from keepshot.tasks.catalog import load_task\n"
        f"print([load_task(name, None).fingerprint() for name in {OWN[:12]!r}])"
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
    here = [load_task(name, NoAssets()).fingerprint() for name in OWN[:12]]
    assert outputs == {f"{here}\n"}


def test_seed_bears_on_files_and_not_on_embedded_tasks(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "f.jsonl", 100))
    embedded = [load_task("date-format", NoAssets(), seed=seed) for seed in (0, 1)]
    files = [load_task(path, NoAssets(), seed=seed) for seed in (0, 0, 1)]
    assert embedded[0] == embedded[1]
    assert files[0] == files[1]
    assert files[0].test != files[2].test


@pytest.mark.parametrize(
    ("count", "shots", "sizes"),
    [(300, 4, (64, 236)), (128, 4, (64, 64)), (20, 4, (10, 10)), (6, 4, (4, 2)), (1, 0, (0, 1))],
)
def test_a_file_is_used_whole(
    tmp_path: Path, count: int, shots: int, sizes: tuple[int, int]
) -> None:
    task = task_from_file(write_rows(tmp_path / "my.jsonl", count), shots=shots)
    assert (len(task.demonstrations), len(task.test)) == sizes
    assert task.validation == ()
    assert (task.name, task.kind, task.chance) == ("my.jsonl", "exact", 0.0)
    assert {e.input for e in task.demonstrations + task.test} == {f"q{i}" for i in range(count)}


def test_a_file_with_choices_is_a_choice_task(tmp_path: Path) -> None:
    task = task_from_file(write_rows(tmp_path / "my.jsonl", 40, choices=["a", "b"]))
    assert (task.kind, task.metric, task.chance) == ("choice", "accuracy", 0.5)


def test_validation_share_takes_from_test(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "my.jsonl", 264)
    task = task_from_file(path, validation_share=0.25)
    assert (len(task.demonstrations), len(task.validation), len(task.test)) == (64, 50, 150)
    assert task.demonstrations == task_from_file(path).demonstrations


def test_duplicates_are_allowed_and_stay_on_one_side(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "my.jsonl", 30)
    path.write_text(path.read_text(encoding="utf-8") * 3, encoding="utf-8")
    task = task_from_file(path, shots=4)
    assert len(task.demonstrations) + len(task.test) == 90
    assert not {e.input for e in task.demonstrations} & {e.input for e in task.test}


def test_fewer_rows_than_shots_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "my.jsonl", 4)
    with pytest.raises(TaskError, match=r"my.jsonl: has 4 rows, too few for 4 shots"):
        load_task(str(path), NoAssets(), shots=4)


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(TaskError, match=r"task 'plurals' is unknown; nearest is 'plural'"):
        resolve_tasks(["core,plurals"], NoAssets())
    with pytest.raises(TaskError, match=r"nearest is 'core'"):
        resolve_tasks(["cor"], NoAssets())
    with pytest.raises(TaskError, match=r"no task is named"):
        resolve_tasks([" , "], NoAssets())
    with pytest.raises(TaskError, match=r"nothere.jsonl: no such file"):
        resolve_tasks(["core", "nothere.jsonl"], NoAssets())


def test_resolving_flattens_suites_and_names_each_task_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "my.jsonl", 20)
    tasks = resolve_tasks(["anchors,addition", f"addition,{path}"], NoAssets(), shots=4)
    assert [task.name for task in tasks] == [*SUITES["anchors"], "addition", "my.jsonl"]


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [write_rows(folder / "my.jsonl", 20) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(TaskError, match=r"have the same file name"):
        resolve_tasks([str(path) for path in paths], NoAssets())


def test_listing_the_catalog_loads_nothing_that_takes_time() -> None:
    code = (
        "import sys, keepshot.tasks.catalog\n"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_worked_sums_are_right(built: dict[str, Task]) -> None:
    for example in built["worked-sums"].train:
        groups, each, change = map(int, re.findall(r"\d+", example.input))
        total = groups * each
        result = total - change if "gives" in example.input else total + change
        numbers = [int(number) for number in re.findall(r"\d+", example.output)]
        assert numbers == [groups, each, total, total, change, result, result]


def test_a_letter_asks_for_one_thing(built: dict[str, Task]) -> None:
    for example in built["request-letters"].train:
        asked = {
            label
            for label, wordings in REQUESTS.items()
            if any(wording in example.input for wording in wordings)
        }
        assert asked == {example.output}
        assert len(re.findall(r"[.?] |[.?]$", example.input)) == 5

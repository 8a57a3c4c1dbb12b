"""What every embedded task promises. Those with assets are built from pinned packages, once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cases import TASKS
from keepshot.assets import AssetStore
from keepshot.tasks.catalog import CATALOG, SUITES, load_task
from keepshot.tasks.task import Task

OWN = [name for name in TASKS if not CATALOG[name].assets]


class NoAssets:
    """A store for tasks that need none."""

    def fetch(self, name: str) -> Path:
        raise AssertionError(f"{name} was fetched")


@pytest.fixture(scope="module")
def built() -> dict[str, Task]:
    store = AssetStore.from_environment(os.environ, quiet=True)
    return {name: load_task(name, store) for name in TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_builds_with_disjoint_splits(name: str, built: dict[str, Task]) -> None:
    task, entry = built[name], CATALOG[name]
    splits = [task.demonstrations, task.validation, task.test, task.train]
    inputs = [e.input.strip().casefold() for split in splits for e in split]
    assert len(set(inputs)) == len(inputs)
    assert len(task.demonstrations) >= 32
    assert len(task.validation) >= 35
    assert 50 <= len(task.test) <= 240
    assert (task.kind, task.domain, task.version) == (entry.kind, entry.domain, entry.version)
    assert bool(task.train) == (entry.role == "target")
    for example in (e for split in splits for e in split):
        assert example.input == example.input.strip() != ""
        assert example.output == example.output.strip() != ""
        assert "\n" not in example.output
        assert (example.choices is not None) == (task.kind == "choice")
        if example.choices is not None:
            assert example.output in example.choices
            assert len(set(example.choices)) == len(example.choices) >= 2
    assert len(task.draw(8, seed=0)) == 8
    assert set(task.draw(4, seed=0)) < set(task.draw(8, seed=0))
    assert 0 <= task.chance <= 0.5


@pytest.mark.parametrize("name", OWN)
def test_what_is_made_here_needs_no_asset_and_never_changes(name: str) -> None:
    first, again = (load_task(name, NoAssets()) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()


@pytest.mark.parametrize("name", TASKS)
def test_it_says_what_it_is_and_is_asked_somewhere(name: str) -> None:
    entry = CATALOG[name]
    assert all((entry.description, entry.source, entry.licence, entry.domain, entry.rule))
    suites = [suite for suite, members in SUITES.items() if name in members]
    assert bool(suites) == (entry.role != "target")

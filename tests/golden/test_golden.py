"""What users and other programs see, as files: a change shows in the diff and must be meant.

`make golden` rewrites them. Times, versions and hashes are left out; numbers of the result document
are compared to 1e-4, since another processor rounds differently.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cases import TASKS
from coloured import write_colours
from command import status
from keepshot import __version__, cli
from keepshot.assets import AssetStore
from keepshot.models.loading import save
from keepshot.tasks.catalog import load_task
from pico import pico_model

HERE = Path(__file__).parent
STEPS = {"steps": 3, "batch_size": 4}
RECIPE: dict[str, Any] = {
    "name": "golden",
    "model": "base",
    "data": "colours.jsonl",
    "measure": {
        "tasks": ["sentence-feeling", "word-group"],
        "shots": [0, 2],
        "seeds": 2,
        "limit": 12,
    },
    "arms": {
        "plain": {"method": {"name": "full"}, "learning_rate": 1e-2, **STEPS},
        "kept": {
            "method": {"name": "lora", "rank": 2},
            "keep": [{"name": "kl", "prompts": 6, "prompts_per_step": 2, "shots": [1, 2]}],
            "learning_rate": 1e-3,
            **STEPS,
        },
    },
    "blended": {"lambdas": [0.5, 1.0], "pick": "keep-target:0.5", "limit": 4},
}
Compare = Callable[[str, str], None]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Compare:
    """Return what compares a text with a golden file, or rewrites that with `--golden`."""

    def compare(name: str, text: str) -> None:
        path = HERE / name
        if request.config.getoption("--golden"):
            path.write_text(text, encoding="utf-8")
        expected = path.read_text(encoding="utf-8")
        if name.endswith(".json"):
            assert_close(json.loads(text), json.loads(expected))
        else:
            assert text == expected

    return compare


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_close(found[number], value, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), where
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on a pico model: its directory, and what was printed."""
    root = tmp_path_factory.mktemp("golden")
    save(pico_model("llama"), root / "base")
    write_colours(root)
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(root)
        patch.setenv("COLUMNS", "100")
        assert status("run", "recipe.yaml", "--out", "out") == 0
    return root / "out", printed.getvalue()


def normalised(text: str) -> str:
    text = re.sub(r"[0-9a-f]{64}", "SHA256", text)
    text = re.sub(r'"seconds": [0-9.e-]+', '"seconds": 0.0', text)
    return text.replace(__version__, "VERSION")


def trimmed(text: str) -> str:
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def test_result_document(finished: tuple[Path, str], golden: Compare) -> None:
    text = (finished[0] / "results.json").read_text(encoding="utf-8")
    golden("results.json", normalised(text))


def test_terminal(finished: tuple[Path, str], golden: Compare) -> None:
    text = finished[1].replace(str(finished[0].parent), "PLACE")
    golden("terminal.txt", trimmed(text))


def test_page(finished: tuple[Path, str], golden: Compare) -> None:
    """Words and structure of the page; its figures and its style have tests of their own."""
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    for element in ("svg", "style", "script"):
        page = re.sub(rf"<{element}\b.*?</{element}>", f"<{element}/>", page, flags=re.DOTALL)
    golden("report.html", without_run(normalised(page)))


def without_run(page: str) -> str:
    """Leave out what it ran on, and how long it took."""
    page = re.sub(r"Measuring took [0-9,]+ s", "Measuring took SECONDS", page)
    machine = r"packages\.\w+|python|platform|processors|git_commit"
    page = re.sub(rf"(<th scope=.row.>(?:{machine})</th>)<td>.*?</td>", r"\1<td/>", page)
    start, runs, rest = page.partition('<table id="training-runs">')
    table, end, rest = rest.partition("</table>")
    table = re.sub(r"<td>[0-9.,]+</td></tr>", "<td>SECONDS</td></tr>", table)
    return start + runs + table + end + rest


def test_help(golden: Compare, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    # `lm-eval --help` is lm-eval's own, and changes with its version.
    ours = [name for name, command in commands.items() if command.add_help_option]
    for command in ("", *ours):
        assert status(*command.split(), "--help") == 0
    golden("help.txt", trimmed(capsys.readouterr().out))


def test_prompts(golden: Compare) -> None:
    store = AssetStore.from_environment(os.environ, quiet=True)
    blocks: list[str] = []
    for name in TASKS:
        task = load_task(name, store)
        asked = task.test[0]
        prompt = task.template.context(task.draw(2, seed=0), asked)
        answer = task.template.continuation(asked.output)
        blocks.append(f"== {name} v{task.version}\n{prompt}[{answer}]\n")
    golden("prompts.txt", "\n".join(blocks))

"""The command line: its literal surface, what bad input gets, and how fast it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from keepshot import cli, exits

COMMON = {"--out", "--json"}
SPEC = COMMON | {"--seed", "--device", "--dtype", "--set", "--overwrite", "--trust-remote-code"}
SURFACE = {
    "run": SPEC | {"--model", "--data", "--accept-licence", "--require-retention"},
    "measure": SPEC
    | {"--tasks", "--shots", "--seeds", "--limit", "--plan", "--template", "--accept-licence"}
    | {"--require-retention"},
    "tune": SPEC | {"--model", "--data", "--method", "--keep", "--accept-licence"},
    "blend": SPEC
    | {"--lambda", "--sweep", "--tasks", "--target", "--pick", "--shots", "--seeds", "--limit"}
    | {"--accept-licence"},
    "report": COMMON,
    "verify": {"--json"},
    "query": {"--json"},
    "tasks": {"--json"},
    "models": {"--json", "--fetch", "--accept-licence"},
    "methods": {"--json"},
}


def test_commands_and_flags_are_these() -> None:
    """A flag is a promise: adding or dropping one must be meant."""
    group = typer.main.get_command(cli.app)
    found = {
        name: {
            option
            for parameter in command.params
            for option in [*parameter.opts, *parameter.secondary_opts]
            if option.startswith("--") and option != "--help" and not option.startswith("--no-")
        }
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert found == SURFACE


def status(*arguments: str) -> int:
    return exits.status(lambda: cli.app(list(arguments), standalone_mode=False))


EXAMPLES = '{"input": "a", "output": "b"}\n'
BAD_INPUT = [
    (["mesure", "x"], "no such command 'mesure'. Did you mean 'measure'?"),
    (["measure", "x", "--task", "core"], "no such option: --task (Possible options: --tasks)"),
    (["measure"], "missing argument"),
    (["measure", "smollm2-135m-instuct"], "nearest is 'smollm2-135m-instruct'"),
    (["measure", "/no/such/directory"], "/no/such/directory"),
    (["measure", "no-such.gguf"], "no-such.gguf"),
    (["measure", "smollm2-135m-instruct", "--tasks", "counry-capital"], "'country-capital'"),
    (["measure", "smollm2-135m-instruct", "--tasks", "absent.jsonl"], "absent.jsonl"),
    (["measure", "smollm2-135m-instruct", "--shots", "four"], "--shots 'four'"),
    (["measure", "smollm2-135m-instruct", "--shots=-1"], "cannot be negative"),
    (["measure", "smollm2-135m-instruct", "--seeds", "0"], "`seeds` = 0"),
    (["measure", "smollm2-135m-instruct", "--set", "sheeds=2"], "nearest is 'seeds'"),
    (["measure", "smollm2-135m-instruct", "--dtype", "float23"], "`dtype` = 'float23'"),
    (["measure", "smollm2-135m-instruct", "--tasks", "broken.jsonl"], "broken.jsonl line 2"),
    (["measure", "smollm2-135m-instruct", "--tasks", "lacking.jsonl"], "lacking.jsonl line 1"),
    (["measure", "smollm2-135m-instruct", "--tasks", "latin.jsonl"], "latin.jsonl line 1"),
    (["measure", "smollm2-135m-instruct", "--tasks", "empty.jsonl"], "empty.jsonl"),
    (["measure", "smollm2-135m-instruct", "--tasks", "choices.jsonl"], "choices.jsonl line 1"),
    (["measure", "smollm2-135m-instruct", "--tasks", "few.jsonl", "--shots", "4"], "few"),
    (["measure", "smollm2-135m-instruct", "--out", "full"], "full: already exists"),
    (["measure", "smollm2-135m-instruct", "--out", "few.jsonl"], "few.jsonl: is a file"),
    (["run", "absent.yaml"], "absent.yaml: no such file"),
    (["run", "broken.yaml"], "broken.yaml line"),
    (["run", "--set", "arms.plain.method.nam=full"], "nam"),
    (["run", "--set", "blended.pick=knea"], "nearest is 'knee'"),
    (["run", "--set", "measure.tasks=[support]"], "'support' is the target"),
    (["run", "--data", "few.jsonl"], "too few to tune on"),
    (["run", "--data", "country-capital"], "nothing to train on"),
    (["tune"], "nothing to tune on"),
    (["tune", "--data", "few.jsonl", "--method", "lorra"], "nearest is 'lora'"),
    (["tune", "--data", "few.jsonl", "--keep", "kll"], "nearest is 'kl'"),
    (["blend", "smollm2-135m-instruct", "smollm2-135m-instruct"], "--lambda"),
    (["blend", "a", "b", "--sweep", "0:1"], "a"),
    (["blend", "a", "b", "--lambda", "half"], "'--lambda'"),
    (["blend", "a", "b", "--lambda", "nan"], "`lam` = nan"),
    (["blend", "few.jsonl", "--lambda", "0.4"], "expected BASE and TUNED, or a recipe"),
    (["blend", "a", "b", "--lambda", "0.4", "--set", "rule.rampe=[0,1]"], "nearest is 'ramp'"),
    (["blend", "a", "b", "--lambda", "0.4", "--set", "rounding=up"], "`rounding` = 'up'"),
    (["blend", "a", "b", "--sweep", "0:1:1", "--set", "second=c"], "not along a --sweep"),
    (
        ["blend", "smollm2-135m-instruct", "gemma-3-270m", "--sweep", "0:1", "--target", "support"],
        "0:1",
    ),
    (["report", "nowhere"], "no finished run lies here"),
    (["query", "select 1", "nowhere"], "no finished run to query"),
    (["models", "--fetch", "smollm"], "smollm"),
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with every kind of bad file."""
    monkeypatch.chdir(tmp_path)
    files = {
        "few.jsonl": EXAMPLES * 3,
        "broken.jsonl": EXAMPLES + "{not json\n",
        "lacking.jsonl": '{"input": "a"}\n',
        "empty.jsonl": "",
        "choices.jsonl": '{"input": "a", "output": "b", "choices": ["c", "d"]}\n',
        "broken.yaml": "name: [1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.jsonl").write_bytes(b'{"input": "caf\xe9", "output": "b"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.json").touch()
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=lambda value: str(value)[:60])
def test_bad_input_gets_a_short_message_and_status_2(
    arguments: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in workplace.iterdir())
    assert status(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    complaint = [line for line in output.err.splitlines() if line.startswith("keepshot: ")]
    assert len(complaint) == 1, output.err
    assert message in output.err
    assert len(output.err[output.err.index("keepshot: ") :].splitlines()) <= 3
    assert "Traceback" not in output.err
    assert sorted(path.name for path in workplace.iterdir()) == before


def test_tasks_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("tasks", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["tasks"]
    assert {"name", "kind", "suites", "source", "licence"} <= rows[0].keys()


def test_models_json_has_the_fields_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("models", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    names = {row["name"] for row in rows}
    assert names == {"smollm2-135m-instruct", "gemma-3-270m"}
    assert {"name", "source", "licence", "num_parameters", "path"} == rows[0].keys()


@pytest.mark.parametrize("command", [["--help"], ["tasks"], ["run", "--help"], ["methods"]])
def test_what_lists_never_loads_torch(command: list[str]) -> None:
    probe = (
        "import sys, keepshot.cli as c; sys.argv=['keepshot', *sys.argv[1:]]\n"
        "try: c.main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, *command], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", ["--help", "tasks"])
def test_lists_answer_at_once(command: str) -> None:
    """Asked for .3 s on a quiet machine: processor time here, since others may be at work."""
    seconds: list[float] = []
    for _ in range(5):
        began = os.times()
        subprocess.run([sys.executable, "-m", "keepshot", command], capture_output=True, check=True)
        ended = os.times()
        spent = ended.children_user + ended.children_system
        seconds.append(spent - began.children_user - began.children_system)
    assert min(seconds) < 0.6

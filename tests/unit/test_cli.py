"""The command line: its literal surface, and how fast it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import typer

from command import status
from keepshot import cli, exits
from keepshot.errors import ServerError

COMMON = {"--out", "--json"}
SPEC = COMMON | {"--seed", "--device", "--dtype", "--set", "--overwrite", "--trust-remote-code"}
SURFACE = {
    "run": SPEC | {"--model", "--data", "--accept-licence", "--require-retention"},
    "measure": SPEC
    | {"--tasks", "--shots", "--seeds", "--limit", "--plan", "--template", "--accept-licence"}
    | {"--require-retention", "--lm-eval-out", "--no-share", "--server", "--server-model"}
    | {"--engine", "--workers"}
    | {"--follow"},
    "tune": SPEC | {"--model", "--data", "--method", "--keep", "--merged", "--accept-licence"},
    "blend": SPEC
    | {"--lambda", "--sweep", "--tasks", "--target", "--pick", "--shots", "--seeds", "--limit"}
    | {"--accept-licence", "--no-check", "--follow", "--restore"},
    "judge": SPEC - {"--overwrite"}
    | {"--judge", "--prompts", "--ifeval", "--limit", "--no-sanity", "--accept-licence"},
    "study": SPEC
    | {"--engine", "--workers", "--plan", "--status", "--limit-minutes", "--yes", "--retry"}
    | {"--accept-licence"},
    "theory": COMMON
    | {"--claim", "--d", "--sigma2", "--spectrum", "--shots", "--pretrain-shots"}
    | {"--seed", "--device", "--dtype", "--set", "--overwrite"},
    "report": COMMON,
    "verify": {"--json"},
    "query": {"--json"},
    "tasks": {"--json"},
    "models": {"--json", "--fetch", "--accept-licence"},
    "methods": {"--json"},
    "lm-eval": set[str](),
}


def test_commands_and_flags_are_these() -> None:
    """A flag is a promise: adding or dropping one must be meant."""
    group = typer.main.get_command(cli.app)
    found = {
        name: {
            option
            for parameter in command.params
            for option in [*parameter.opts, *parameter.secondary_opts]
            if option.startswith("--") and option != "--help"
        }
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert found == SURFACE


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


def test_a_complaint_gives_the_terminal_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    """What a server answered is part of some."""

    def refused() -> None:
        raise ServerError("HTTP 401: \x1b]0;title\x07no;\ngive a key")

    assert exits.status(refused) == 2
    said = capsys.readouterr().err
    assert said == "keepshot: HTTP 401: \u241b]0;title\u2407no;\ngive a key\n"


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

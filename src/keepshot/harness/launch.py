"""lm-evaluation-harness' own command line, with our engine among its models."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import import_module

from keepshot.errors import ConfigError, TaskError, nearest
from keepshot.harness.extra import lm_eval
from keepshot.harness.once import each_read_once


def run_harness(arguments: Sequence[str]) -> None:
    """Run lm-eval's command line with `arguments`; `--model keepshot` is our engine.

    Raises:
        ConfigError: if lm-eval is not installed, or refuses an argument.
        TaskError: if a task does not exist, with the nearest names.
    """
    entry = lm_eval("__main__")
    import_module("keepshot.harness.model")
    before = sys.argv
    # lm-eval reads the process' own arguments, and rewrites them.
    sys.argv = ["lm-eval", *arguments]
    try:
        with each_read_once():
            entry.cli_evaluate()
    except (ValueError, KeyError, FileNotFoundError) as error:
        message = str(error).strip("'\"")
        missing = re.search(r"Tasks not found: (.*)", message)
        if missing:
            raise TaskError(unknown_tasks(missing[1].split(", "))) from None
        if raised_by_arguments(error):
            raise ConfigError(f"lm-eval: {message}") from None
        raise
    finally:
        sys.argv = before


def unknown_tasks(names: Sequence[str], known: Sequence[str] | None = None) -> str:
    """Word the message for tasks that lm-eval does not have, with the nearest that it has."""
    listed: Sequence[str] = known or lm_eval("tasks").TaskManager().all_tasks
    found = [f"{name!r}{_hint(nearest(name, listed))}" for name in names]
    tasks = "task" if len(found) == 1 else "tasks"
    return f"lm-eval has no {tasks} {', '.join(found)}; `keepshot lm-eval ls tasks` lists all"


def _hint(close: str | None) -> str:
    return f" (nearest is {close!r})" if close else ""


def raised_by_arguments(error: BaseException) -> bool:
    """Say whether lm-eval's own reading of its arguments raised `error`: the user can mend it."""
    frame = error.__traceback__
    modules: list[str] = []
    while frame:
        modules.append(str(frame.tb_frame.f_globals.get("__name__")))
        frame = frame.tb_next
    return modules[-1].startswith(("lm_eval.config", "lm_eval._cli", "lm_eval.utils"))

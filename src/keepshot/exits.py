"""How the program leaves: exit status and, for what the user can mend, one to three lines."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from keepshot.errors import UserError
from keepshot.unseen import visible

INTERRUPTED = 130


def leave(call: Callable[[], Any]) -> NoReturn:
    """Run `call` and leave with its status; an asked-for end (SIGTERM) cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(status(call))


def status(call: Callable[[], Any]) -> int:
    """Run `call` and return the exit status: 0, 2 (to mend), 3 (a gate), 130 (stopped).

    A fault of ours is not caught: its traceback is printed, and the status is 1.
    """
    try:
        code = call()
    except UserError as error:
        _complain(str(error))
        return error.exit_status
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except typer.TyperException as error:
        _complain(_usage(error))
        return 2
    if code == INTERRUPTED:  # also how typer reports Ctrl-C
        _complain("stopped; the same command goes on from what is finished")
    return code if isinstance(code, int) else 0


def _complain(message: str) -> None:
    shown = visible(message, keep="\n")  # it may quote what a server answered, or a file
    typer.echo(f"keepshot: {shown}", err=True)


def _usage(error: typer.TyperException) -> str:
    """Word a usage error in one line: what is wrong with which value, and where to look."""
    message = error.format_message().rstrip(".") or "no command given"
    context = getattr(error, "ctx", None)
    parameter = getattr(error, "param", None)
    given = _given_value(parameter.opts) if parameter is not None else None
    value = f" {given!r}" if given is not None else ""
    command = context.command_path if context else "keepshot"
    return f"{message[0].lower()}{message[1:]}{value}; see `{command} --help`"


def _given_value(names: list[str]) -> str | None:
    """Find the value that was given for an option, which the parser's message leaves out."""
    for place, word in enumerate(sys.argv):
        name, equals, value = word.partition("=")
        if name in names and name.startswith("-"):
            return value if equals else next(iter(sys.argv[place + 1 :]), None)
    return None


def _terminated(*_: object) -> NoReturn:
    sys.exit(143)

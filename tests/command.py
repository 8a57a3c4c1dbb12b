"""The command line as a user types it, inside the test's own process."""

from __future__ import annotations

from keepshot import cli, exits


def status(*arguments: str) -> int:
    """Run `keepshot` with these arguments and return its exit status."""
    return exits.status(
        lambda: cli.app(list(arguments), prog_name="keepshot", standalone_mode=False)
    )

"""What long work says while it goes on, apart from how it is shown."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of stages and of steps within the stage; the command line draws it."""

    def stage(self, title: str) -> None:
        """Begin a stage: a few words such as `plain: tuning`."""
        ...

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Say how far the stage is, with a short detail such as the loss."""
        ...

    def note(self, text: str) -> None:
        """Say one line that stays on the screen."""
        ...


class Silent:
    """Says nothing."""

    def stage(self, title: str) -> None:
        """Ignore."""

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

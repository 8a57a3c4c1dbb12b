"""A model inside someone else's trainer, seen as one of ours; and the tasks that need no download.

Reads through the wrappers that trainers put around a model. Its weights stay where they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from keepshot.errors import AssetError, ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.tasks.catalog import resolve_tasks
from keepshot.tasks.task import Task


def unwrapped(module: Any) -> Any:
    """Return the model under what accelerate, torch's data parallelism or `torch.compile` wrap."""
    while True:
        inner = getattr(module, "module", None) or getattr(module, "_orig_mod", None)
        if inner is None:
            return module
        module = inner


def live_model(module: Any, tokenizer: Any) -> LanguageModel:
    """Return a view of a model in training; peft's adapters in it stay switched on.

    Raises:
        ConfigError: if there is no tokenizer, or what trains is a soft prompt.
    """
    if tokenizer is None or not hasattr(tokenizer, "encode"):
        raise ConfigError(
            "the trainer has no tokenizer, which few-shot prompts are made with; "
            "give it processing_class=TOKENIZER"
        )
    inner = unwrapped(module)
    if hasattr(inner, "get_base_model"):
        config: Any = getattr(inner, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise ConfigError(
                f"what trains is a soft prompt ({config.peft_type.value}), and few-shot prompts "
                "come without it: the weights that\nread them stay as they are, so there is "
                "nothing to watch or to hold; leave the guard and the term out"
            )
        inner = inner.get_base_model()
    first = next(inner.parameters())
    return LanguageModel(
        reference=str(getattr(inner.config, "name_or_path", "") or "the model in training"),
        module=inner,
        tokenizer=tokenizer,
        sha256="",
        path=Path(),
        num_parameters=sum(parameter.numel() for parameter in inner.parameters()),
        dtype=str(first.dtype).removeprefix("torch."),
    )


@contextlib.contextmanager
def evaluating(module: Any) -> Generator[None]:
    """Put every part of a model into evaluation mode, and each back as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def named_tasks(tasks: str | Sequence[str | Task]) -> list[Task]:
    """Return tasks given as objects or by name: suites, tasks and files, also joined by commas.

    Raises:
        TaskError: if a name is unknown or a file cannot be used.
        AssetError: if a task is made of a package that must be fetched: load it with a store first.
    """
    given = [tasks] if isinstance(tasks, str) else list(tasks)
    found: dict[str, Task] = {}
    for one in given:
        loaded = [one] if isinstance(one, Task) else resolve_tasks([one], _NoStore())
        found |= {task.name: task for task in loaded}
    return list(found.values())


class _NoStore:
    """Stands where a store would; nothing is downloaded in the middle of a training run."""

    def fetch(self, name: str) -> Path:
        """Refuse.

        Raises:
            AssetError: always.
        """
        raise AssetError(
            f"this task is made of the package {name!r}, which is not fetched here; name tasks "
            "made by code, or give Task objects from `load_task(name, AssetStore(...))`"
        )

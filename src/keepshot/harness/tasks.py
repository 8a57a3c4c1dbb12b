"""Tasks of lm-evaluation-harness as ours: `lm-eval:NAME`, `lm-eval:GROUP`, `lm-eval:task.yaml`.

Questions, answers and demonstrations are rendered by lm-eval's own task; demonstrations are then
drawn our way, once for all questions, so that comparisons are paired and prefixes shared. What a
task asks for beyond that is refused, never quietly dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from keepshot.errors import TaskError
from keepshot.harness.extra import lm_eval
from keepshot.harness.launch import unknown_tasks
from keepshot.prompts import Example, Template
from keepshot.tasks.task import Task, group_by_input

PREFIX = "lm-eval:"
NUM_DEMONSTRATIONS = 64


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our own names and lm-eval's, of `names` that may be joined by commas."""
    parts = [part.strip() for name in names for part in name.split(",") if part.strip()]
    theirs = [part.removeprefix(PREFIX) for part in parts if part.startswith(PREFIX)]
    return [part for part in parts if not part.startswith(PREFIX)], theirs


def harness_tasks(
    names: Sequence[str], *, shots: int = 0, validation_share: float = 0.0
) -> list[Task]:
    """Build the tasks that `names` (without the prefix) stand for.

    Args:
        names: tasks, groups, tags or paths of task YAML files.
        shots: the most shots that will be asked.
        validation_share: share of the questions to choose on, not to report on.

    Raises:
        ConfigError: if lm-eval is not installed.
        TaskError: if a task does not exist, cannot be read, is judged in a way that is not ours, or
            its own settings refuse the shots.
    """
    # Reading lm-eval's thousands of tasks takes seconds, and files need none of them.
    manager = lm_eval("tasks").TaskManager(include_defaults=not all(map(_is_path, names)))
    missing = [n for n in names if not _is_path(n) and n not in manager.task_index]
    if missing:
        raise TaskError(unknown_tasks(missing, manager.all_tasks))
    tasks: dict[str, Task] = {}
    for name in names:
        for key, found in _load(manager, name).items():
            tasks[key] = _convert(key, found, shots, validation_share)
    return list(tasks.values())


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _load(manager: Any, name: str) -> dict[str, Any]:
    spec: Any = name
    if _is_path(name):
        if not Path(name).is_file():
            raise TaskError(f"{PREFIX}{name}: no such file")
        spec = lm_eval("tasks._yaml_loader").load_yaml(name, resolve_func=True)
    try:
        return manager.load([spec])["tasks"]
    # Data sets fail to come in as many ways as there are loaders: all of them are told alike.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TaskError(f"{PREFIX}{name} cannot be read: {reason}") from error


def _convert(name: str, found: Any, shots: int, validation_share: float) -> Task:
    _check(name, found, shots)
    config = found.config
    asked = [_example(name, found, doc) for doc in found.eval_docs]
    pool = _demonstrations(name, found) if shots else []
    shown_split, asked_split = _shown_and_asked(found)
    if shots and shown_split == asked_split:  # demonstrations are set aside from the questions
        num_pool = max(shots, min(NUM_DEMONSTRATIONS, len(asked) // 2))
        pool, asked = pool[:num_pool], asked[num_pool:]
    asked_inputs = {group[0].input.strip().casefold() for group in group_by_input(asked)}
    pool = [example for example in pool if example.input.strip().casefold() not in asked_inputs]
    if len(pool) < shots:
        raise TaskError(
            f"{PREFIX}{name} has {len(pool)} demonstrations that are not asked too, fewer than "
            f"the {shots} shots asked for; ask for fewer shots"
        )
    num_validation = int(len(asked) * validation_share)
    return Task(
        name=f"{PREFIX}{name}",
        kind="choice",
        version=_version(config.metadata),
        domain="lm-eval",
        description=f"lm-evaluation-harness task {name}",
        demonstrations=tuple(pool),
        validation=tuple(asked[:num_validation]),
        test=tuple(asked[num_validation:]),
        template=Template(
            question="{input}",
            answer=f"{config.target_delimiter}{{output}}",
            separator=config.fewshot_delimiter,
            description=_description(config),
        ),
    )


def _check(name: str, found: Any, shots: int) -> None:
    """Refuse what our measure would have to bend."""
    config = found.config
    instead = f"; `keepshot lm-eval run --model keepshot --tasks {name}` runs it as it is"
    if config.output_type != "multiple_choice":
        raise TaskError(
            f"{PREFIX}{name} is a {config.output_type} task; only multiple_choice is measured "
            f"here{instead}"
        )
    if shots and config.num_fewshot == 0:
        raise TaskError(
            f"{PREFIX}{name} sets num_fewshot: 0 itself, so {shots} shots are refused; "
            "ask for --shots 0, or leave the task out"
        )
    unusual = {
        "several contexts for one question": bool(found.multiple_input),
        "a gen_prefix": bool(config.gen_prefix),
        "its own process_results": config.process_results is not None,
        "a description that differs between questions": "{{" in _description(config),
    }
    for what, there in unusual.items():
        if there:
            raise TaskError(f"{PREFIX}{name} has {what}, which is not measured here{instead}")


def _description(config: Any) -> str:
    text = config.description
    return "{{a function}}" if callable(text) else str(text or "")


def _shown_and_asked(found: Any) -> tuple[str | None, str | None]:
    """Return the splits that demonstrations and questions come from; None for listed samples."""
    config, cfg = found.config, found.fewshot_cfg
    asked = config.test_split or config.validation_split
    if cfg.split is None and cfg.samples is not None:
        return None, asked
    return cfg.split or config.training_split or config.validation_split or asked, asked


def _demonstrations(name: str, found: Any) -> list[Example]:
    docs: Iterable[Any] | None = found.fewshot_docs()
    cfg = found.fewshot_cfg
    settings = (cfg.doc_to_text, cfg.doc_to_choice, cfg.doc_to_target)
    return [_example(name, found, doc, *settings) for doc in docs or ()]


def _example(
    name: str, found: Any, doc: Any, text: Any = None, choice: Any = None, target: Any = None
) -> Example:
    question = found.doc_to_text(doc, text)
    choices = tuple(str(answer) for answer in found.doc_to_choice(doc, choice))
    gold = found.doc_to_target(doc, target)
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if not isinstance(question, str) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise TaskError(
            f"{PREFIX}{name}: question {str(question)[:60]!r} has the right answer {gold!r}, which "
            f"is none of its {len(choices)} choices; such a task is not measured here"
        )
    return Example(question, choices[gold], choices)


def _version(metadata: Any) -> int:
    """Return lm-eval's version of a task as a whole number; what is none is hashed."""
    version = (metadata or {}).get("version", 0)
    try:
        return int(float(version) * 10)
    except (TypeError, ValueError):
        return int(hashlib.sha256(str(version).encode()).hexdigest()[:6], 16)

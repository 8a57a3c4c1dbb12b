"""Tasks of lm-evaluation-harness as ours: `lm-eval:NAME`, `lm-eval:GROUP`, `lm-eval:task.yaml`.

Prompts and grades are lm-eval's own; demonstrations are drawn our way, once for all questions, so
that comparisons are paired and prefixes shared. What cannot be is refused, never quietly dropped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepshot.errors import TaskError
from keepshot.harness.extra import MAX_GEN_TOKENS, lm_eval
from keepshot.harness.launch import unknown_tasks
from keepshot.harness.once import compile_templates_once
from keepshot.prompts import Example
from keepshot.tasks.catalog import take_groups
from keepshot.tasks.task import Answer, Asked, Task, group_by_input

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
        raise TaskError(f"{PREFIX}{name} cannot be read: {_first_line(error)}") from error


def _convert(name: str, found: Any, shots: int, validation_share: float) -> Task:
    _check(name, found, shots)
    examiner = HarnessExaminer(name, found)
    asked = [examiner.example(doc) for doc in found.eval_docs]
    pool = [examiner.shown(doc) for doc in found.fewshot_docs() or ()] if shots else []
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
    examiner.check(pool[:shots], asked[0])
    validation, test = _held_out(asked, int(len(asked) * validation_share))
    return Task(
        name=f"{PREFIX}{name}",
        kind="choice" if found.OUTPUT_TYPE == "multiple_choice" else "exact",
        version=_version(found.config.metadata),
        domain="lm-eval",
        description=f"lm-evaluation-harness task {name}",
        demonstrations=tuple(pool),
        validation=tuple(validation),
        test=tuple(test),
        examiner=examiner,
    )


def _held_out(asked: list[Example], count: int) -> tuple[list[Example], list[Example]]:
    """Take the first questions, at most `count`, with all that ask the same; return the rest too.

    Minimal pairs are all asked in the same words, or none: what they ask is their choices.
    """
    if not count:
        return [], asked
    taken, left = take_groups(group_by_input(asked), count)
    if not taken:
        pairs: dict[object, list[Example]] = defaultdict(list)
        for example in asked:
            pairs[example.input, example.choices].append(example)
        taken, left = take_groups(list(pairs.values()), count)
    return list(itertools.chain(*taken)), list(itertools.chain(*left))


def _check(name: str, found: Any, shots: int) -> None:
    """Refuse what has no score for each question, or would have to be bent."""
    config = found.config
    instead = f"; `keepshot lm-eval run --model keepshot --tasks {name}` runs it as it is"
    if found.OUTPUT_TYPE == "loglikelihood_rolling":
        raise TaskError(
            f"{PREFIX}{name} measures perplexity and asks nothing that could be answered rightly"
            f"{instead}"
        )
    if shots and config.num_fewshot == 0:
        raise TaskError(
            f"{PREFIX}{name} sets num_fewshot: 0 itself, so {shots} shots are refused; "
            "ask for --shots 0, or leave the task out"
        )
    unusual = {
        "images": bool(config.doc_to_image),
        "sound": bool(config.doc_to_audio),
        "sampled answers (do_sample)": bool((config.generation_kwargs or {}).get("do_sample")),
    }
    for what, there in unusual.items():
        if there:
            raise TaskError(f"{PREFIX}{name} has {what}, which is not measured here{instead}")


class HarnessExaminer:
    """One task of lm-eval: its prompts under demonstrations of ours, and its own grades.

    A question's grade is the task's first metric that gives each question a number, after the
    task's first filter.
    """

    def __init__(self, name: str, found: Any) -> None:
        """Take lm-eval's task; its settings are not touched, its sampler is replaced."""
        compile_templates_once()
        self._name, self._found = name, found
        self._docs: dict[Example, Any] = {}

    def example(self, doc: Any) -> Example:
        """Return a question of the task, and remember the document it comes from."""
        found = self._found
        return self._remember(doc, found.doc_to_text(doc), found.doc_to_target(doc), None)

    def shown(self, doc: Any) -> Example:
        """Return a demonstration of the task; they may be worded by settings of their own."""
        found, cfg = self._found, self._found.fewshot_cfg
        target = found.doc_to_target(doc, cfg.doc_to_target)
        return self._remember(doc, found.doc_to_text(doc, cfg.doc_to_text), target, cfg)

    def _remember(self, doc: Any, question: Any, gold: Any, cfg: Any) -> Example:
        found = self._found
        choices: tuple[str, ...] | None = None
        if found.OUTPUT_TYPE == "multiple_choice":
            choices = tuple(
                map(str, found.doc_to_choice(doc, *([cfg.doc_to_choice] if cfg else [])))
            )
            if found.multiple_input:  # choices are texts to begin with; the gold is their number
                question, gold = " | ".join(choices), question
            gold = gold[0] if isinstance(gold, list) and gold else gold
            if isinstance(gold, str) and gold in choices:
                gold = choices.index(gold)
            if not isinstance(gold, int) or not 0 <= gold < len(choices):
                raise TaskError(
                    f"{PREFIX}{self._name}: question {str(question)[:60]!r} has the right answer "
                    f"{gold!r}, which is none of its {len(choices)} choices; mend or drop the row"
                )
            gold = choices[gold]
        elif found.config.doc_to_choice is not None and isinstance(gold, int):
            gold = found.doc_to_choice(doc)[gold]
        text = " | ".join(map(str, gold)) if isinstance(gold, list | tuple) else str(gold)
        example = Example(str(question), text, choices)
        self._docs.setdefault(example, doc)
        return example

    def ask(self, demonstrations: Sequence[Example], example: Example) -> list[Asked]:
        """Return lm-eval's prompts for one question under `demonstrations`."""
        requests = self._requests(demonstrations, example)
        if self._found.OUTPUT_TYPE != "generate_until":
            return [Asked(*request.args) for request in requests]
        context, settings = requests[0].args
        normal = lm_eval("models.utils").normalize_gen_kwargs(settings, MAX_GEN_TOKENS)
        stop = tuple(text for text in normal.get("until") or () if text)
        return [Asked(context, None, stop, int(normal["max_gen_toks"]))]

    def _requests(self, demonstrations: Sequence[Example], example: Example) -> list[Any]:
        found, doc = self._found, self._docs[example]
        found.sampler = _Drawn([self._docs[shown] for shown in demonstrations])
        begun = found.doc_to_prefix(doc)
        try:
            context = found.fewshot_context(doc, len(demonstrations), gen_prefix=begun)
            requests = found.construct_requests(doc, context)
        # A task's templates and functions fail in as many ways as their authors had.
        except Exception as error:
            raise TaskError(
                f"{PREFIX}{self._name}: lm-eval cannot word question {example.input[:60]!r} with "
                f"{len(demonstrations)} demonstrations: {_first_line(error)}"
            ) from error
        return requests if isinstance(requests, list) else [requests]

    def grade(self, example: Example, answers: Sequence[Answer]) -> float:
        """Return the task's own first metric of the answers to one question."""
        found, doc = self._found, self._docs[example]
        requests = self._requests((), example)
        for request, answer in zip(requests, answers, strict=True):
            request.resps = [answer]
        first = found._filters[0]
        first.apply(requests)
        metrics = found.process_results(doc, [r.filtered_resps[first.name] for r in requests])
        higher: dict[str, bool] = found.higher_is_better()
        for metric, value in metrics.items():
            if isinstance(value, (bool, int, float)) and higher.get(metric, True):
                return float(value)
        raise TaskError(
            f"{PREFIX}{self._name} has no metric that gives each question a number "
            f"({', '.join(metrics) or 'none at all'}), so it is not measured here; "
            f"`keepshot lm-eval run --model keepshot --tasks {self._name}` runs it as it is"
        )

    def check(self, demonstrations: Sequence[Example], example: Example) -> None:
        """Grade an empty answer, so that a task which cannot be graded is refused at once."""
        asked = self.ask(demonstrations, example)
        told = [("" if text.continuation is None else (-1.0, False)) for text in asked]
        value = self.grade(example, told)
        if not 0 <= value <= 1:
            raise TaskError(
                f"{PREFIX}{self._name}: an empty answer has the score {value:g}, and scores here "
                "are between 0 and 1; run the task with `keepshot lm-eval run`"
            )

    def identity(self) -> str:
        """Return the task's settings as lm-eval writes them into its results."""
        return json.dumps(self._found.dump_config(), sort_keys=True, default=str)


@dataclass(frozen=True)
class _Drawn:
    """lm-eval's sampler, with demonstrations that are drawn already."""

    docs: list[Any]

    def sample(self, n: int, **_: object) -> list[Any]:
        """Return them all."""
        assert n == len(self.docs), "as many as were drawn"
        return self.docs


def _shown_and_asked(found: Any) -> tuple[str | None, str | None]:
    """Return the splits that demonstrations and questions come from; None for listed samples."""
    config, cfg = found.config, found.fewshot_cfg
    asked = config.test_split or config.validation_split
    if cfg.split is None and cfg.samples is not None:
        return None, asked
    return cfg.split or config.training_split or config.validation_split or asked, asked


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _version(metadata: Any) -> int:
    """Return lm-eval's version of a task as a whole number; what is none is hashed."""
    version = (metadata or {}).get("version", 0)
    try:
        return int(float(version) * 10)
    except (TypeError, ValueError):
        return int(hashlib.sha256(str(version).encode()).hexdigest()[:6], 16)

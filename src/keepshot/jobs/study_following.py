"""Verifiable instructions in a study: put to the models of its units; their rows by cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from keepshot.assets import AssetStore
from keepshot.judging.follow import Examiner, load_set
from keepshot.models.loading import LanguageModel
from keepshot.records import InstructionRow, read_instructions
from keepshot.scoring.engine import Engine
from keepshot.study.directory import StudyDirectory
from keepshot.study.grid import Grid, Unit
from keepshot.study.spec import StudySpec

Progress = Callable[[int, int], None]


def set_contents(spec: StudySpec) -> dict[str, str]:
    """Return the fingerprint of every set of prompts that the study puts.

    Raises:
        TaskError: if one cannot be read.
    """
    asked = {ask.following.prompts for ask in spec.asks.values() if ask.following}
    return {prompts: load_set(prompts).fingerprint() for prompts in sorted(asked)}


class Examiners:
    """One examiner for each ask that puts instructions."""

    def __init__(self, spec: StudySpec, store: AssetStore) -> None:
        """Read the prompts, so that a fault in them shows before a model is loaded.

        Raises:
            UserError: if prompts cannot be read, a split is empty, or nltk's tables are needed and
                not to be had.
        """
        self._by_ask: dict[str, Examiner] = {}
        for name, ask in spec.asks.items():
            if ask.following is not None:
                asked = load_set(ask.following.prompts)
                for split in ask.splits:
                    asked.part(split)
                self._by_ask[name] = Examiner(
                    asked, ask.following.answers, ask.following.judged, store
                )
        self._limits = {n: ask.following.limit for n, ask in spec.asks.items() if ask.following}

    def examine(
        self,
        unit: Unit,
        model: LanguageModel,
        engine: Engine,
        *,
        chat: LanguageModel | None,
        progress: Progress,
    ) -> list[InstructionRow] | None:
        """Return the rows of a unit; None where its ask puts no instructions.

        Args:
            unit: what is measured.
            model: its model, live.
            engine: of `model`.
            chat: whose chat template is used; None means `model`.
            progress: called with (answers, answers in all).
        """
        examiner = self._by_ask.get(str(unit.ask))
        if examiner is None:
            return None
        return examiner.examine(
            model, arm=unit.subject.label, lam=unit.subject.lam, split=unit.split,
            limit=self._limits[str(unit.ask)], engine=engine, chat=chat, progress=progress,
        )  # fmt: skip

    def num_tokens(self, unit: Unit, model: LanguageModel) -> int:
        """Return the most tokens that a unit's instructions take: prompts, and whole answers."""
        examiner = self._by_ask.get(str(unit.ask))
        if examiner is None:
            return 0
        prompts = examiner.asked.part(unit.split, self._limits[str(unit.ask)]).prompts
        longest = examiner.policy.max_new_tokens
        return sum(len(model.encode(prompt.prompt)) + longest for prompt in prompts)


def rows_of(spec: StudySpec, grid: Grid, directory: StudyDirectory) -> list[InstructionRow]:
    """Return the rows of all cells that are done, each under its own arm's name.

    The ask is part of the name where several put instructions.
    """
    several = sum(ask.following is not None for ask in spec.asks.values()) > 1
    # At once: the directory is listed each time, and has many files.
    records = directory.records({cell.unit for cell in grid.cells})
    found: list[InstructionRow] = []
    for cell in grid.cells:
        path, record = directory.instructions(cell.unit), records.get(cell.unit)
        if record is None or record.status != "done" or not path.exists():
            continue
        name = replace(cell.subject, lam=None).label
        arm = f"{name}: {cell.ask}" if several else name
        found += [replace(row, arm=arm) for row in read_instructions(path)]
    return found

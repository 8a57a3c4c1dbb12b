"""Instruction following beside few-shot ability: asked of the same live models, kept as it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from keepshot import records
from keepshot.assets import AssetStore
from keepshot.jobs.workspace import Workspace
from keepshot.judging.follow import Examiner, instruction_scores, load_set
from keepshot.judging.policy import Following
from keepshot.models.loading import LanguageModel
from keepshot.progress import Progress
from keepshot.records import InstructionRow, InstructionScore, Split
from keepshot.scoring.engine import Engine
from keepshot.scoring.processes import ALONE, Processes


class Follower:
    """Asks what a spec's `following` says; without one, does nothing."""

    def __init__(
        self,
        spec: Following | None,
        store: AssetStore,
        workspace: Workspace | None,
        progress: Progress,
        *,
        processes: Processes = ALONE,
    ) -> None:
        """Read the prompts, so that a fault in them shows before a model is loaded.

        Raises:
            UserError: if the prompts cannot be read, or nltk's tables are needed and not to be had.
        """
        self.rows: list[InstructionRow] = []
        self.chat: LanguageModel | None = None
        """Whose chat template all are asked in; None: each model's own."""
        self._spec, self._workspace, self._progress = spec, workspace, progress
        self._processes = processes
        self._examiner = (
            Examiner(load_set(spec.prompts), spec.answers, spec.judged, store) if spec else None
        )

    def check(self, model: LanguageModel, *splits: Split) -> None:
        """Check that every prompt leaves room for an answer, without asking anything.

        Raises:
            UserError: naming the prompt that does not, or why it cannot be put.
        """
        if self._examiner is None or self._spec is None:
            return
        for split in splits or (None,):
            self._examiner.check(self.chat or model, split=split, limit=self._spec.limit)

    def follow(
        self,
        part: str,
        model: LanguageModel | Callable[[], LanguageModel],
        *,
        arm: str,
        lam: float | None = None,
        split: Split | None = None,
        engine: Callable[[LanguageModel], Engine] = Engine,
    ) -> None:
        """Ask `model`, and add its rows; those of an earlier start are taken from the workspace.

        Args:
            part: name of the workspace part that holds the rows.
            model: a live model, or what makes it live when its rows are not there yet.
            arm: name of the arm in the rows.
            lam: lambda in the rows.
            split: the half of the set that is asked; None asks all.
            engine: gives an engine of the model.
        """
        if self._examiner is None or self._spec is None:
            return
        kept = self._processes.of_first(self.kept(part, arm))
        if kept is not None:
            self.rows += kept
            return
        live = model if isinstance(model, LanguageModel) else model()
        where = "" if lam is None else f" at lambda {lam:g}"
        self._progress.stage(f"{arm}: instructions{where}")
        found = self._examiner.examine(
            live,
            arm=arm,
            lam=lam,
            split=split,
            limit=self._spec.limit,
            engine=engine(live),
            chat=self.chat,
            progress=self._progress.update,
        )
        self.keep(part, found)
        self.rows += found

    def kept(self, part: str, arm: str) -> list[InstructionRow] | None:
        """Return the rows that an earlier start has finished; none are wanted without prompts."""
        if self._spec is None:
            return []
        path = self._path(part)
        if path is None or not path.exists():
            return None
        return [replace(row, arm=arm) for row in records.read_instructions(path)]

    def keep(self, part: str, rows: Sequence[InstructionRow]) -> None:
        """Write rows that are finished to the workspace, if there is one; does not add them."""
        path = self._path(part)
        if path is not None and self._spec is not None:
            records.write_instructions(rows, path)

    def _path(self, part: str) -> Path | None:
        return self._workspace.part(f"{part}.parquet") if self._workspace else None

    def scores(self) -> list[InstructionScore]:
        """Return the scores of all rows so far."""
        return instruction_scores(self.rows)

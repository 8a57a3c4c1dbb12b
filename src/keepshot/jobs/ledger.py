"""What a job has measured so far: rows kept in the workspace, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from keepshot import records
from keepshot.jobs.workspace import Workspace
from keepshot.models.loading import LanguageModel
from keepshot.progress import Progress
from keepshot.records import Cost, ItemResult, ModelRecord
from keepshot.scoring.engine import Engine
from keepshot.scoring.evaluate import Plan, measure
from keepshot.scoring.processes import ALONE, Processes
from keepshot.scoring.server import ServedEngine, Server


class Ledger:
    """Measures arms, keeps their rows in the workspace, and adds up what it cost."""

    def __init__(
        self,
        workspace: Workspace | None,
        progress: Progress,
        *,
        processes: Processes = ALONE,
        server: Server | None = None,
        share: bool = True,
    ) -> None:
        self._share = share
        self.cost = Cost()
        self._workspace, self.progress = workspace, progress
        self._processes, self._server = processes, server
        self._engine: Engine | None = None

    def measured(
        self,
        part: str,
        model: LanguageModel | Callable[[], LanguageModel],
        plans: Sequence[Plan],
        *,
        arm: str,
        lam: float | None = None,
    ) -> list[ItemResult]:
        """Return the rows of `model` on `plans`, from the workspace if they are there already.

        Args:
            part: name of the workspace part that holds the rows.
            model: a live model, or what makes it live when its rows are not there yet.
            plans: what is asked.
            arm: name of the arm in the rows.
            lam: lambda in the rows.
        """
        kept = self._processes.of_first(self.kept(part, arm))
        if kept is not None:
            return kept
        live = model if isinstance(model, LanguageModel) else model()
        rows: list[ItemResult] = []
        for plan in plans:
            title = f"{arm}: measuring" if lam is None else f"{arm}: measuring at lambda {lam:g}"
            self.progress.stage(title)
            found = measure(
                live,
                plan,
                arm=arm,
                lam=lam,
                engine=self.engine(live),
                progress=self.progress.update,
            )
            rows += found.items
            self.cost = add_costs(self.cost, found.cost)
        self.keep(part, rows)
        return rows

    def kept(self, part: str, arm: str) -> list[ItemResult] | None:
        """Return the rows that an earlier start has finished, if there are any."""
        path = self._path(part)
        if path is None or not path.exists():
            return None
        return [replace(row, arm=arm) for row in records.read_items(path)]

    def keep(self, part: str, rows: Sequence[ItemResult]) -> None:
        """Write rows that are finished to the workspace, if there is one."""
        path = self._path(part)
        if path is not None:
            records.write_items(rows, path)

    def _path(self, part: str) -> Path | None:
        return self._workspace.part(f"{part}.parquet") if self._workspace else None

    def sharing_of(self, model: LanguageModel) -> str | None:
        """Return how far requests about `model` could share; None if none was asked now."""
        engine = self._engine
        return engine.sharing if engine is not None and engine.model is model else None

    def engine(self, model: LanguageModel) -> Engine:
        """Return an engine, the same one along a path: its start-up trial takes a second."""
        if self._engine is None or self._engine.model is not model:
            if self._server is None:
                self._engine = Engine(model, share=self._share, processes=self._processes)
            else:
                part = self._workspace.part("served.jsonl") if self._workspace else None
                self._engine = ServedEngine(model, self._server, kept=part)
        return self._engine


def model_record(model: LanguageModel) -> ModelRecord:
    """Return what identifies `model` in a result."""
    return ModelRecord(
        reference=model.reference,
        sha256=model.sha256,
        num_parameters=model.num_parameters,
        dtype=model.dtype,
    )


def add_costs(first: Cost, second: Cost) -> Cost:
    """Return the sum of two costs."""
    return Cost(
        seconds=first.seconds + second.seconds,
        tokens_prefilled=first.tokens_prefilled + second.tokens_prefilled,
        tokens_naive=first.tokens_naive + second.tokens_naive,
    )

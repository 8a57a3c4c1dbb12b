"""Run the theory lab: check the claims, write their record and their page."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from keepshot import records
from keepshot.errors import ConfigError
from keepshot.jobs.workspace import environment, free_name
from keepshot.progress import Progress
from keepshot.records import ResultDocument, SummaryRow
from keepshot.report.study import is_study, read_study
from keepshot.report.theory import write_theory_report
from keepshot.study.document import StudyArm
from keepshot.study.tables import grouped, name_of
from keepshot.theory.document import RECORD, RealArm, TheoryDocument, TheorySpec
from keepshot.theory.experiments import run_claims


def theory(
    spec: TheorySpec, out_dir: Path | None, progress: Progress, *, overwrite: bool = False
) -> tuple[TheoryDocument, Path]:
    """Check the claims of a spec and write a directory with `theory.json` and `report.html`.

    Args:
        spec: which claims, in which world.
        out_dir: where to write; a free name under `runs` if None.
        progress: told of every claim.
        overwrite: replace what is there.

    Returns:
        The document, and where it was written.

    Raises:
        UserError: if the world, the device or the place cannot be used.
    """
    place = out_dir or free_name(Path("runs"), "theory", RECORD)
    records.claim(place, overwrite=overwrite)
    try:
        torch.zeros(1, dtype=torch.float64, device=spec.device)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {spec.device!r}: {reason}; give one that is there") from None
    document = run_claims(spec, progress, real_arms(spec.study) if spec.study else ())
    with records.building_directory(place, overwrite=overwrite) as folder:
        text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        records.write_text(text, folder / "spec.yaml")
        records.write_text(json.dumps(environment(), indent=1), folder / "environment.json")
        write_theory_report(document, folder)
        records.write_text(document.to_json(), folder / RECORD)
    return document, place


def real_arms(folder: Path) -> list[RealArm]:
    """Read what each arm of a finished run or study gained on its target and lost elsewhere.

    Raises:
        ConfigError: if there is none with both figures, or the document cannot be read.
    """
    found = _study_arms(folder) if is_study(folder) else _run_arms(folder)
    if not found:
        raise ConfigError(
            f"study {str(folder)!r}: no arm with a target score and a retention; give a directory "
            "that `keepshot run` or `keepshot study` wrote"
        )
    return found


def _run_arms(folder: Path) -> list[RealArm]:
    document = ResultDocument.read(folder)
    shots = max((row.shots for row in document.summary), default=0)
    listed = [row for row in document.summary if row.shots == shots]
    return [
        arm
        for row in listed[1:]
        if (arm := _arm(("real models", row.arm, row.arm), listed[0].target, row))
    ]


def _study_arms(folder: Path) -> list[RealArm]:
    document = read_study(folder)
    found: list[RealArm] = []
    for title, arms in grouped(document.arms):
        untuned = next((arm for arm in arms if arm.recipe is None), None)
        for arm in arms:
            if untuned is None or arm is untuned:
                continue
            made = _arm((title, name_of(arm), _family(arm)), untuned.target_score, arm)
            if made:
                found.append(made)
    return found


def _family(arm: StudyArm) -> str:
    """Return the recipe's own name, without what the study varies of it."""
    recipe = (arm.recipe or "").split(" ")[0]
    return recipe if arm.lam is None else f"{recipe}, lambda {arm.lam:g}"


def _arm(
    names: tuple[str, str, str], before: float | None, row: SummaryRow | StudyArm
) -> RealArm | None:
    """Return an arm by its group, name and family, beside the untuned model's target score."""
    target = row.target if isinstance(row, SummaryRow) else row.target_score
    if before is None or target is None or row.retention is None or before >= 1.0:
        return None
    group, name, family = names
    left = 1.0 - before
    return RealArm(
        group=group, name=name, family=family, gained=(target - before) / left,
        lost=1.0 - row.retention, se=_standard_error(row.retention_ci95),
        gained_se=_standard_error(row.target_ci95) / left, num_items=row.num_items,
    )  # fmt: skip


def _standard_error(interval: tuple[float, float] | None) -> float:
    """Return the standard error that a 95 % interval stands for."""
    return (interval[1] - interval[0]) / 3.92 if interval else 0.0

"""A study's rows as one frame, and its scores. Pure but for reading what was recorded.

One row for each item under one draw of demonstrations, put to one model; plain columns, so that
SQL, pandas and `keepshot.study.analysis` read it alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from keepshot.errors import StudyError
from keepshot.outputs import replacing
from keepshot.records import read_item_table
from keepshot.stats import Matrix
from keepshot.study.directory import UnitRecord
from keepshot.study.grid import Grid
from keepshot.study.spec import StudySpec
from keepshot.tuning.samplegen import is_plain

Frame: TypeAlias = Any
"""A pandas DataFrame, whose columns and groups its own types leave open."""
SCORE_KEYS = [
    "model", "family", "num_parameters", "stage", "recipe", "samples", "target", "tuning_seed",
    "lam", "ask", "setting", "split", "task", "is_target", "shots", "seed",
]  # fmt: skip
KEPT_COLUMNS = (
    "task", "split", "shots", "seed", "item", "gold", "answer", "correct", "format_failure",
    "label_leakage",
)  # fmt: skip


def check_tags(spec: StudySpec) -> None:
    """Check, before any work, that tags can be columns of the frame.

    Raises:
        StudyError: if a tag has the name of a column, or values of several kinds.
    """
    kinds: dict[str, dict[str, str]] = {}
    for model in spec.models:
        for name, value in model.columns.items():
            kinds.setdefault(name, {}).setdefault(_kind(value), model.label)
    for name, models in sorted(kinds.items()):
        if name in {*_columns(), "is_target", "chance"}:
            raise StudyError(f"tag {name!r} has the name of a column of the frame; rename it")
        if len(models) > 1:
            found = ", ".join(f"a {kind} of model {label!r}" for kind, label in models.items())
            raise StudyError(f"tag {name!r} is {found}; write one kind, since it is one column")


def item_frame(
    spec: StudySpec,
    grid: Grid,
    records: Mapping[str, UnitRecord],
    rows: Callable[[str], Path],
) -> Frame:
    """Return the rows of all cells that are done; a unit that fills several comes in each.

    Args:
        spec: names families and tags.
        grid: the cells.
        records: of the units.
        rows: where a unit's rows are.
    """
    parts: list[pa.Table] = []
    tags = {name for model in spec.models for name in model.columns}
    for cell in grid.cells:
        record = records.get(cell.unit)
        if record is None or record.status != "done":
            continue
        subject, model = cell.subject, spec.model(cell.subject.model)
        recipe = spec.recipes[subject.recipe] if subject.recipe is not None else None
        table = read_item_table(rows(cell.unit))
        size = record.model.num_parameters if record.model else 0
        constants: dict[str, tuple[Any, pa.DataType]] = {
            "unit": (cell.unit, pa.string()),
            "model": (subject.model, pa.string()),
            "family": (model.family or model.label, pa.string()),
            "num_parameters": (size, pa.int64()),
            "stage": (subject.stage, pa.string()),
            "recipe": (subject.recipe, pa.string()),
            "samples": (recipe.samples if recipe else None, pa.string()),
            "target": (subject.target, pa.string()),
            "tuning_seed": (subject.seed, pa.int32()),
            "lam": (subject.lam, pa.float64()),
            "ask": (cell.ask, pa.string()),
        }
        columns = {name: _repeated(v, table.num_rows, t) for name, (v, t) in constants.items()}
        columns |= {name: table[name] for name in KEPT_COLUMNS}
        shots, ask = table["shots"].to_numpy(), spec.asks[cell.ask]
        own = pa.array(np.where(shots == 0, *(ask.setting_at(number) for number in (0, 1))))
        there = "setting" in table.column_names
        columns["setting"] = table["setting"] if there else own
        num_choices = [len(choices) for choices in table["choices"].to_pylist()]
        columns["num_choices"] = pa.array(num_choices, pa.int64())
        parts.append(pa.table(columns))
    frame = pa.concat_tables(parts).to_pandas() if parts else pd.DataFrame(columns=_columns())
    num_choices = frame.pop("num_choices").to_numpy(float)
    frame["chance"] = np.where(num_choices > 0.0, 1.0 / np.maximum(num_choices, 1.0), 0.0)
    targets = [target_name(target) for target in spec.targets]
    own = frame["target"].map(target_name, na_action="ignore")
    frame["is_target"] = np.where(own.isna(), frame["task"].isin(targets), frame["task"] == own)
    for name in sorted(tags):
        of = {model.label: model.columns.get(name) for model in spec.models}
        frame[name] = [of[label] for label in frame["model"]]
    return frame


def target_name(target: str) -> str:
    """Return a target's name as a task: a file's is its own name."""
    return Path(target).name if "/" in target else target


def score_frame(items: Frame) -> Frame:
    """Return one row for each model, task, shots and draw: `value`, `chance`, `num_items`."""
    keys = [name for name in SCORE_KEYS if name in items.columns]
    grouped = items.groupby(keys, dropna=False, sort=False, observed=True)
    return grouped.agg(
        value=("correct", "mean"),
        chance=("chance", "mean"),
        num_items=("correct", "size"),
        format_failure=("format_failure", "mean"),
        label_leakage=("label_leakage", "mean"),
    ).reset_index()


def pairs(scores: Frame, *, shots: int, split: str = "test", by_task: bool = True) -> Frame:
    """Return tuned direct scores beside their base's scores from gold demonstrations.

    The frame that `mixed_model` takes; its columns go into `correlate` (`family` as clusters). Both
    scores are of one ask where one has both. Models that were taught to write their own examples
    are none of these, as in `findings`.

    Args:
        scores: as `score_frame` returns.
        shots: demonstrations of the base.
        split: the split of both.
        by_task: a row for each tuned model and task; else means over tasks.

    Returns:
        Columns `model`, `family`, `recipe`, `target`, `tuning_seed`, `task`, `base`, `tuned`,
        `base_direct` (the negative control), `noise` (variance of `tuned` by its items) and
        `log_size`.
    """
    there = scores[(scores["split"] == split) & (scores["stage"] != "blend")]
    there = there[there["setting"].isin(["direct", "gold"])]
    base = there[there["stage"] == "base"]
    shown = base[base["shots"] == shots]
    tuned = there[(there["stage"] == "tuned") & (there["shots"] == 0)]
    if "samples" in tuned.columns:
        tuned = tuned[tuned["samples"].map(is_plain).astype(bool)]
    by = ["model", "task"]
    if not set(shown["ask"]).isdisjoint(tuned["ask"]):
        by.append("ask")  # as `findings` has it: items of another ask are others
    gold = shown.groupby(by)["value"].mean().rename("base")
    plain = base[base["shots"] == 0].groupby(by)["value"].mean().rename("base_direct")
    tuned = tuned.rename(columns={"value": "tuned"})
    found = tuned.join(gold, on=by, how="inner").join(plain, on=by)
    found["noise"] = found["tuned"] * (1.0 - found["tuned"]) / (found["num_items"] - 1).clip(1)
    found["log_size"] = np.log(found["num_parameters"].clip(lower=1))
    keys = ["model", "family", "recipe", "target", "tuning_seed"]
    values = ["base", "tuned", "base_direct", "noise", "log_size"]
    if by_task:
        return found[[*keys, "task", *values]].reset_index(drop=True)
    groups = found.groupby(keys, dropna=False, sort=False)
    means = groups[values].mean()
    means["noise"] /= groups.size()  # of a mean of independent scores
    return means.reset_index()


def matrix(rows: Frame) -> Matrix:
    """Return `correct` as [draws, items]: draws of demonstrations, under every seed of tuning."""
    table = rows.pivot(index=["tuning_seed", "seed"], columns="item", values="correct")
    found = table.to_numpy(dtype=np.float64)
    assert not np.isnan(found).any(), "every draw must see the same items"
    return found


def write_frames(items: Frame, scores: Frame, out_dir: Path) -> Sequence[Path]:
    """Write `frame.parquet` (a row for each item) and `scores.parquet`; atomically."""
    paths = (out_dir / "frame.parquet", out_dir / "scores.parquet")
    for frame, path in zip((items, scores), paths, strict=True):
        with replacing(path) as temporary:
            pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), temporary)
    return paths


def _repeated(value: Any, count: int, kind: pa.DataType) -> pa.Array:
    return pa.nulls(count, kind) if value is None else pa.repeat(pa.scalar(value, kind), count)


def _kind(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "truth value"
    return "text" if isinstance(value, str) else "number"


def _columns() -> list[str]:
    made = ("is_target",)
    named = ["unit", "samples", "num_choices", *SCORE_KEYS, *KEPT_COLUMNS]
    return [name for name in dict.fromkeys(named) if name not in made]

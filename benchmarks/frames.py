"""The rows of a study, small enough to lie beside its tables.

    python benchmarks/frames.py runs/keep-auto --out docs/studies/rows/keep-auto.parquet

Takes run directories, or files written like this; the scripts that make a study's tables read
either, so that tables can be made anew without the runs. Rows of the same question to the same
model are kept once, those of the first place given. Answers themselves are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

WHO = ["model", "stage", "recipe", "target", "tuning_seed", "lam"]
ASKED = ["ask", "setting", "split", "task", "shots", "seed", "item"]
FOUND = ["chance", "correct", "format_failure", "label_leakage"]
TUNED = ["model", "target", "recipe"]
COST = ["few_shot_divergence", "target_divergence", "tuning_seconds"]
"""Of a tuned model as such, on each of its rows: means over seeds, where the study is finished."""


def read(places: Sequence[Path]) -> pd.DataFrame:
    """Return the rows of run directories and files together."""
    parts: list[pd.DataFrame] = []
    for number, place in enumerate(places):
        file = place / "frame.parquet" if place.is_dir() else place
        rows = pd.read_parquet(file)
        if (place / "study.json").exists():
            rows = rows.merge(_costs(place / "study.json"), on=TUNED, how="left")
        known = [name for name in COST if name in rows]
        parts.append(rows[WHO + ASKED + FOUND + known].assign(run=number))
    rows = pd.concat(parts, ignore_index=True)
    rows["tuning_seed"] = rows["tuning_seed"].astype("Int32")
    first = rows.groupby(WHO + ASKED[:-1], dropna=False, observed=True)["run"].transform("min")
    return rows[rows["run"] == first].drop(columns="run").reset_index(drop=True)


def _costs(file: Path) -> pd.DataFrame:
    arms = json.loads(file.read_text(encoding="utf-8"))["arms"]
    tuned = [arm for arm in arms if arm["recipe"] is not None and arm["lam"] is None]
    found = pd.DataFrame(tuned, columns=TUNED + COST).drop_duplicates(TUNED)
    return found.astype(dict.fromkeys(COST, float))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("places", type=Path, nargs="+", help="run directories, or files of rows")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = read(given.places).sort_values(WHO + ASKED, kind="stable")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(given.out, compression="zstd", compression_level=19, index=False)
    print(f"{given.out}: {len(rows):,} rows, {given.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

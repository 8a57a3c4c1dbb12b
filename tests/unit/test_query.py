"""SQL over the records of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keepshot.errors import ConfigError
from keepshot.query import query
from keepshot.records import Cost, ResultDocument, TrainingRecord, write_items


def finished(place: Path, training: list[TrainingRecord]) -> Path:
    document = ResultDocument(models=[], scores=[], summary=[], training=training, cost=Cost())
    place.mkdir()
    (place / "results.json").write_text(document.to_json(), encoding="utf-8")
    write_items([], place / "items.parquet")
    return place


def trained(arm: str, **more: Any) -> TrainingRecord:
    return TrainingRecord(
        arm=arm, method="lora", keep=[], learning_rate=1e-4, steps=1, seconds=1.0, num_trainable=1,
        **more,
    )  # fmt: skip


def test_a_column_that_the_first_row_lacks_is_there(tmp_path: Path) -> None:
    """Columns were the first row's: of `plain`, so that nobody found where `auto` left `kept`."""
    kept = trained("kept", lam=0.7, divergence={"target": [0.5]})
    run = finished(tmp_path / "run", [trained("plain"), kept])
    columns, rows = query('select arm, "lambda" from training', [run])
    assert columns == ["arm", "lambda"]
    assert rows == [("plain", None), ("kept", 0.7)]
    assert query("select divergence from training", [run])[1] == [(None,), ("{'target': [0.5]}",)]


@pytest.mark.parametrize("sql", ["", "  ", "-- nothing", ";"])
def test_a_query_without_sql_is_refused(sql: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", [trained("plain")])
    with pytest.raises(ConfigError, match=r"asks nothing; write SQL such as .*; tables are items"):
        query(sql, [run])

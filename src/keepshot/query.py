"""SQL over the records of run directories, by duckdb, read-only and offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from keepshot.errors import ConfigError
from keepshot.records import ResultDocument, read_item_table


def query(sql: str, run_dirs: Sequence[Path]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Run `sql` on tables `items`, `scores`, `summary`, `path`, `training` and `instructions`.

    Each table has a first column `run` with the name of the directory. Files cannot be reached
    from the query.

    Returns:
        Column names, and rows.

    Raises:
        ConfigError: if no finished run is given, or the SQL is refused.
    """
    finished = [d for d in run_dirs if (d / "results.json").exists()]
    if not finished:
        raise ConfigError("no finished run to query; give run directories, or run in their parent")
    connection = duckdb.connect(config={"enable_external_access": False})
    for name, table in _tables(finished).items():
        connection.register(name, table)
    try:
        result = connection.execute(sql)
        return [column[0] for column in result.description or []], result.fetchall()
    except duckdb.Error as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"query: {first}; tables are {', '.join(_tables(finished))}") from None


def _tables(run_dirs: Sequence[Path]) -> dict[str, pa.Table]:
    rows: dict[str, list[dict[str, Any]]] = {
        "scores": [],
        "summary": [],
        "path": [],
        "training": [],
        "instructions": [],
    }
    items: list[pa.Table] = []
    for directory in run_dirs:
        document = ResultDocument.read(directory).model_dump(mode="json", by_alias=True)
        for name, collected in rows.items():
            collected += [{"run": directory.name, **_flat(row)} for row in document[name]]
        table = read_item_table(directory / "items.parquet")
        names = pa.array([directory.name] * table.num_rows, pa.string())
        items.append(table.add_column(0, "run", names))
    tables = {name: pa.Table.from_pylist(found) for name, found in rows.items() if found}
    return {"items": pa.concat_tables(items), **tables}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, dict) else value for key, value in row.items()}

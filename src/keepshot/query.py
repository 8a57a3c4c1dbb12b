"""SQL over the records of run directories, by duckdb, read-only and offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from keepshot.errors import ConfigError
from keepshot.records import ResultDocument, read_item_table

STUDY_TABLES = {
    "study": "frame.parquet",
    "study_scores": "scores.parquet",
    "study_instructions": "instructions.parquet",
}


def query(sql: str, run_dirs: Sequence[Path]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Run `sql` on tables `items`, `scores`, `summary`, `path`, `training` and `instructions`.

    Of studies there are `study`, a row for each item put to each model, `study_scores`, and
    `study_instructions` where some were put. Each table has a first column `run` with the name of
    the directory. Files cannot be reached from the query.

    Returns:
        Column names, and rows.

    Raises:
        ConfigError: if no finished run is given, or the SQL is refused.
    """
    finished = [d for d in run_dirs if (d / "results.json").exists()]
    studies = [d for d in run_dirs if (d / "study.json").exists()]
    if not finished and not studies:
        raise ConfigError("no finished run to query; give run directories, or run in their parent")
    connection = duckdb.connect(config={"enable_external_access": False})
    tables = {**_tables(finished), **_study_tables(studies)}
    for name, table in tables.items():
        connection.register(name, table)
    try:
        if not connection.extract_statements(sql):
            raise ConfigError(
                f"query: {sql!r} asks nothing; write SQL such as 'select * from items limit 5'; "
                f"tables are {', '.join(tables)}"
            )
        result = connection.execute(sql)
        return [column[0] for column in result.description or []], result.fetchall()
    except duckdb.Error as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"query: {first}; tables are {', '.join(tables)}") from None


def _study_tables(studies: Sequence[Path]) -> dict[str, pa.Table]:
    found: dict[str, pa.Table] = {}
    for name, file in STUDY_TABLES.items():
        places = [place for place in studies if (place / file).exists()]
        parts = [_named(read_item_table(place / file), place.name) for place in places]
        if parts:
            # Studies differ in their tags, which are columns too.
            try:
                found[name] = pa.concat_tables(parts, promote_options="permissive")
            except pa.ArrowTypeError as error:
                first = str(error).splitlines()[0]
                raise ConfigError(
                    f"query: studies have a column of one name and two kinds: {first};\n"
                    "query one of them at a time"
                ) from None
    return found


def _named(table: pa.Table, name: str) -> pa.Table:
    return table.add_column(0, "run", pa.array([name] * table.num_rows, pa.string()))


def _tables(run_dirs: Sequence[Path]) -> dict[str, pa.Table]:
    if not run_dirs:
        return {}
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
        items.append(_named(read_item_table(directory / "items.parquet"), directory.name))
    tables = {name: _table(found) for name, found in rows.items() if found}
    return {"items": pa.concat_tables(items), **tables}


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Return rows as a table of all their columns, of which the first row need not have each."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, dict) else value for key, value in row.items()}

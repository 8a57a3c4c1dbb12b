"""The atomic store: nothing half-written, nothing overwritten unasked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from keepshot import outputs, records
from keepshot.errors import ConfigError, OutputError
from keepshot.records import Cost, ItemResult, ResultDocument

ITEM = ItemResult(
    arm="before", model="m", lam=None, task="t", split="test", shots=4, seed=1, item="ab",
    question="Q?", gold="yes", answer="<script>", choices=["yes", "no"],
    log_likelihoods=[-0.1, -2.5], correct=1.0, correct_per_character=None,
    format_failure=0.0, label_leakage=1.0,
)  # fmt: skip


def test_items_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    records.write_items([ITEM, ITEM], path)
    assert records.read_items(path) == [ITEM, ITEM]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    records.write_text("old", path)

    def write_half() -> None:
        with records.replacing(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text("utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_directory_appears_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def build_half() -> None:
        with records.building_directory(out) as building:
            (building / "part").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build_half()
    assert os.listdir(tmp_path) == []
    with records.building_directory(out) as building:
        (building / "part").touch()
        assert not out.exists()
    assert os.listdir(out) == ["part"]


def test_what_exists_is_refused_unless_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").touch()
    with pytest.raises(OutputError, match="already exists; add --overwrite"):
        records.claim(tmp_path / "run")
    records.claim(tmp_path / "run", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        records.claim(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        records.claim(tmp_path / "file" / "below")
    with pytest.raises(OutputError, match="choose another --out"):
        records.claim(tmp_path / ("x" * 300))


def test_a_full_disk_is_said_in_words() -> None:
    """/dev/full refuses every byte with the error of a full disk, as a real one would."""
    error = None
    try:
        with Path("/dev/full").open("w", encoding="utf-8") as full:
            full.write("x" * 10_000)
    except OSError as caught:
        error = outputs.output_error(caught, Path("out"))
    assert isinstance(error, OutputError)
    assert "the disk is full" in str(error)


def test_the_document_uses_the_names_of_the_contract() -> None:
    text = ResultDocument(models=[], scores=[], summary=[], cost=Cost()).to_json()
    assert '"schema": 1' in text
    assert ResultDocument.model_validate_json(text).cost == Cost()


def test_a_directory_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run"):
        ResultDocument.read(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 2}', encoding="utf-8")
    with pytest.raises(ConfigError, match="not a results document"):
        ResultDocument.read(tmp_path)

"""General data of the hub, read from a local directory of its layout: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keepshot.assets import AssetStore
from keepshot.errors import TaskError
from keepshot.jobs.hub import read_hub
from keepshot.jobs.tune import general_rows
from keepshot.prompts import Example
from keepshot.tasks.source import Message, MessagesRow
from keepshot.tuning.keep import Mix
from keepshot.tuning.recipe import Recipe


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "owner" / "general"
    (place / "data").mkdir(parents=True)
    rows = [
        {"instruction": "Name a colour.", "input": "", "output": "red"},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), place / "data" / "train-00000-of-00001.parquet")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat = tmp_path / "owner" / "chat"
    chat.mkdir()
    (chat / "test.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    write_rows(tmp_path / "owner" / "uneven", "a", {"input": "a", "output": "b"})
    write_rows(tmp_path / "owner" / "uneven", "b", {"text": "a"})
    listed = {"instruction": ["Name", "a colour"], "input": "", "output": "red"}
    write_rows(tmp_path / "owner" / "listed", "a", listed)
    return tmp_path / "owner"


def write_rows(place: Path, name: str, row: object) -> None:
    place.mkdir(exist_ok=True)
    (place / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def test_instructions_become_questions_and_answers(layout: Path) -> None:
    expected = [Example("Name a colour.", "red"), Example("Add.\n1 and 2", "3")]
    assert read_hub(str(layout / "general")) == expected
    term = Mix(icl_share=0.0, general_share=0.1, general_data=f"hub:{layout / 'general'}")
    recipe = Recipe(data="x", keep=(term,))
    assert general_rows(recipe, AssetStore(layout / "store")) == expected


def test_a_split_is_named_and_conversations_are_read(layout: Path) -> None:
    found = read_hub(f"{layout / 'chat'}:test")
    assert found == [MessagesRow((Message("user", "Hi"), Message("assistant", "Hello")))]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/place", "there is no directory '/no/such/place'"),
        ("./" + "x" * 300, "there is no directory './x"),
        ("{layout}/general:validation", "cannot be read as a data set"),
        ("{layout}/uneven", "cannot be read as a data set"),
        ("{layout}/listed", r"row 1: field 'instruction' is \['Name', 'a colour'\]; expected"),
    ],
)
def test_what_is_not_there_is_said(name: str, message: str, layout: Path) -> None:
    with pytest.raises(TaskError, match=message):
        read_hub(name.format(layout=layout))

"""Examples files: the four forms, three formats, and every fault named by file and line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keepshot.errors import TaskError
from keepshot.prompts import VERBATIM, Example, Template
from keepshot.tasks.source import (
    Message,
    MessagesRow,
    PromptRow,
    TextRow,
    file_fingerprint,
    read_examples,
    read_examples_file,
    read_rows,
)

GOOD = {"input": "Peru", "output": "Lima"}


def write_lines(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_all_four_forms_are_read_in_order_with_duplicates(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write_lines(
        tmp_path / "all.jsonl",
        GOOD,
        GOOD,
        {"input": "2+2", "output": "4", "choices": ["3", "4"], "id": 7},
        {"prompt": "Once ", "completion": "upon"},
        "",
        {"messages": turns},
        {"text": "free"},
    )
    assert read_rows(path) == [
        Example("Peru", "Lima"),
        Example("Peru", "Lima"),
        Example("2+2", "4", ("3", "4")),
        PromptRow("Once ", "upon"),
        MessagesRow((Message("user", "hi"), Message("assistant", "hello"))),
        TextRow("free"),
    ]


def test_csv_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [
        Example('a "b", c', "yes", ("yes", "no")),
        Example("two\nlines \u00e9", "no", ("yes", "no")),
    ]
    csv_path = tmp_path / "rows.csv"
    csv_path.write_text(
        'input,output,choices\n"a ""b"", c",yes,"[""yes"", ""no""]"\r\n'
        '"two\nlines \u00e9",no,"[""yes"", ""no""]"\n',
        encoding="utf-8-sig",
        newline="",
    )
    assert read_examples(csv_path) == rows
    parquet_path = tmp_path / "rows.parquet"
    content = [
        {"input": e.input, "output": e.output, "choices": list(e.choices or ())} for e in rows
    ]
    pq.write_table(pa.Table.from_pylist(content), parquet_path)
    assert read_examples(parquet_path) == rows


def test_null_choices_in_parquet_mean_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    schema = pa.schema([("input", pa.string()), ("output", pa.string()), ("choices", pa.null())])
    pq.write_table(pa.Table.from_pylist([GOOD], schema=schema), path)
    assert read_examples(path) == [Example("Peru", "Lima")]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", r"f.jsonl line 2: is not JSON"),
        ("[1, 2]", r"f.jsonl line 2: is \[1, 2\]; expected a JSON object"),
        ({"input": "a"}, r"f.jsonl line 2: field 'output' is missing"),
        ({"input": "a", "outputs": "b"}, r"line 2: field 'output' is missing; is 'outputs' meant"),
        ({"input": "a", "output": 4}, r"line 2: field 'output' is 4; expected a text"),
        ({"input": "a", "output": " "}, r"line 2: field 'output' is empty"),
        ({"question": "a"}, r"line 2: holds 'question'; expected \"input\" and \"output\""),
        ({"input": "a", "output": "b", "choices": ["c", "B"]}, r"line 2: output 'b' is not among"),
        ({"input": "a", "output": "b", "choices": "b"}, r"line 2: 'choices' is 'b'"),
        ({"input": "a", "output": "b", "choices": ["b"]}, r"line 2: choices .* two or more"),
        ({"input": "a", "output": "b", "choices": ["b", "b"]}, r"line 2: choices .* different"),
        ({"prompt": "a"}, r"line 2: field 'completion' is missing"),
        ({"messages": []}, r"line 2: 'messages' is \[\]"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"line 2, message 1: role 'bot'"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"line 2: the last message must be"),
        ({"input": "a \ud83d", "output": "b"}, r"line 2: field 'input' holds half a character"),
        (
            {"input": "a", "output": "b", "choices": ["b", "\ud83d"]},
            r"line 2: choice '\\ud83d' holds half a character \('\\ud83d'\); write the whole one",
        ),
        (f'{{"input": {"1" * 5000}}}', r"line 2: is not JSON \(a number is too long\)"),
        ("[" * 100_000, r"line 2: is not JSON \(nested too deeply\)"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, bad: Any, message: str) -> None:
    path = write_lines(tmp_path / "f.jsonl", GOOD, bad)
    with pytest.raises(TaskError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_not_utf8_names_the_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"input": "caf\xe9", "output": "x"}\n')
    with pytest.raises(TaskError, match=r"line 2: is not UTF-8 \(byte 0xe9 at column 15"):
        read_rows(path)


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TaskError, match=r"empty.jsonl: is empty"):
        read_rows(path)


def test_header_alone_is_an_empty_csv(tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.write_text("input,output\n", encoding="utf-8")
    with pytest.raises(TaskError, match=r"is empty"):
        read_rows(path)


def test_csv_faults_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text('input,output\n"two\nlines",x\na,b,c\n', encoding="utf-8")
    with pytest.raises(TaskError, match=r"f.csv line 4: has more or fewer cells"):
        read_rows(path)
    path.write_text("input,output,choices\na,b,b|c\n", encoding="utf-8")
    with pytest.raises(TaskError, match=r"f.csv line 2: cell 'choices' is 'b\|c'"):
        read_rows(path)


def test_missing_file_unknown_suffix_directory_and_bad_parquet(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(TaskError, match=r"no such file; nearest in .* is 'train.jsonl'"):
        read_rows(tmp_path / "trian.jsonl")
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(TaskError, match=r"suffix '.txt'; expected one of .jsonl"):
        read_rows(tmp_path / "a.txt")
    with pytest.raises(TaskError, match=r"is a directory"):
        read_rows(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(TaskError, match=r"a.parquet: is not a parquet file"):
        read_rows(tmp_path / "a.parquet")


def test_measured_files_hold_one_form(tmp_path: Path) -> None:
    completion = {"prompt": "a", "completion": "b"}
    mixed = write_lines(tmp_path / "mixed.jsonl", GOOD, completion)
    with pytest.raises(TaskError, match=r"line 2: is of another form than .* line 1"):
        read_examples(mixed)
    some = write_lines(tmp_path / "some.jsonl", GOOD, GOOD | {"choices": ["Lima", "Rome"]})
    with pytest.raises(TaskError, match=r"line 2: has its 'choices' while .* line 1 has none"):
        read_examples(some)
    text = write_lines(tmp_path / "text.jsonl", {"text": "free"})
    with pytest.raises(TaskError, match=r"line 1: free text has no question"):
        read_examples(text)


def test_form_decides_the_template(tmp_path: Path) -> None:
    completion = write_lines(tmp_path / "c.jsonl", {"prompt": "2+2=", "completion": "4"})
    assert read_examples_file(completion).template == VERBATIM
    assert read_examples(completion) == [Example("2+2=", "4")]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    chat = write_lines(tmp_path / "m.jsonl", {"messages": turns})
    assert read_examples_file(chat).template == Template()
    assert read_examples(chat) == [Example("hi", "hello")]
    longer = write_lines(tmp_path / "l.jsonl", {"messages": turns + turns})
    with pytest.raises(TaskError, match=r"one user message and one assistant message"):
        read_examples(longer)


def test_fingerprint_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "f.jsonl", GOOD)
    assert file_fingerprint(path) == hashlib.sha256(path.read_bytes()).hexdigest()

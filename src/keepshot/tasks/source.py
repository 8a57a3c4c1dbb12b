"""Rows of an examples file: JSONL, CSV or parquet in, typed rows out, faults named by line.

Four forms are read: `{"input", "output", "choices"?}`, `{"prompt", "completion"}`,
`{"messages": [...]}` and `{"text"}`; further keys are left alone. Measuring needs questions with
answers (`read_examples`), tuning takes all four (`read_rows`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never, cast

from keepshot.errors import TaskError, nearest
from keepshot.prompts import VERBATIM, Example, Template

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
FORMS = '"input" and "output", "prompt" and "completion", "messages", or "text"'


@dataclass(frozen=True)
class PromptRow:
    """A prompt and its completion, to be joined as they are."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class MessagesRow:
    """A conversation that ends with the assistant's turn."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class TextRow:
    """Free text."""

    text: str


Row = Example | PromptRow | MessagesRow | TextRow


@dataclass(frozen=True)
class LocatedRow:
    """A row and where it stands, such as `my.jsonl line 3`."""

    row: Row
    where: str


@dataclass(frozen=True)
class ExamplesFile:
    """The questions of a file, all of one form, and the template that form is rendered with."""

    examples: tuple[Example, ...]
    template: Template


def read_rows(path: Path) -> list[Row]:
    """Read every row of a file, in file order, duplicates included.

    Raises:
        TaskError: naming file and line, if the file cannot be read, holds no row, or holds a row
            of no known form.
    """
    return [located.row for located in _located(path)]


def read_examples(path: Path) -> list[Example]:
    """Read the questions of a file; see `read_examples_file`."""
    return list(read_examples_file(path).examples)


def read_examples_file(path: Path) -> ExamplesFile:
    """Read a file of questions and answers, with the template its form asks for.

    A prompt with its completion is a question put verbatim; so is a conversation of one user turn
    and one assistant turn, under the usual template.

    Raises:
        TaskError: as `read_rows`, and if rows differ in form, if only some have choices, or if a
            row has no single question and answer.
    """
    located = _located(path)
    first = located[0]
    examples = [_as_example(item) for item in located]
    for item, example in zip(located, examples, strict=True):
        if type(item.row) is not type(first.row):
            raise TaskError(
                f"{item.where}: is of another form than {first.where}; "
                "a file that is measured holds rows of one form"
            )
        if (example.choices is None) != (examples[0].choices is None):
            has, other = ("no", "has") if example.choices is None else ("its", "has none")
            raise TaskError(
                f"{item.where}: has {has} 'choices' while {first.where} {other}; "
                "give choices in every row or in none"
            )
    template = VERBATIM if isinstance(first.row, PromptRow) else Template()
    return ExamplesFile(tuple(examples), template)


def file_fingerprint(path: Path) -> str:
    """Return the sha256 of the file's bytes, in hexadecimal."""
    return hashlib.sha256(_read_bytes(path)).hexdigest()


def parse_row(content: Mapping[str, Any], where: str) -> Row:
    """Turn one object into a row; `where` names its place in error messages.

    Raises:
        TaskError: if the object is of no known form, or a field is not what it must be.
    """
    if "input" in content or "output" in content:
        return _parse_example(content, where)
    if "prompt" in content or "completion" in content:
        return PromptRow(_text(content, "prompt", where), _text(content, "completion", where))
    if "messages" in content:
        return _parse_messages(content["messages"], where)
    if "text" in content:
        return TextRow(_text(content, "text", where))
    keys = ", ".join(repr(key) for key in content) or "nothing"
    raise TaskError(f"{where}: holds {keys}; expected {FORMS}")


def _parse_example(content: Mapping[str, Any], where: str) -> Example:
    question = _text(content, "input", where).strip()
    output = _text(content, "output", where).strip()
    given = content.get("choices")
    if given is None:
        return Example(question, output)
    if not isinstance(given, list) or not all(isinstance(c, str) for c in cast(list[Any], given)):
        raise TaskError(f"{where}: 'choices' is {_short(given)}; expected a list of texts")
    choices = tuple(choice.strip() for choice in cast(list[str], given))
    for choice in choices:
        _check_characters(choice, f"{where}: choice {_short(choice)}")
    if len(set(choices)) < max(2, len(choices)) or "" in choices:
        raise TaskError(f"{where}: choices {_short(given)} must be two or more different texts")
    if output not in choices:
        close = nearest(output, choices)
        hint = f"; nearest is {close!r}" if close else ""
        raise TaskError(
            f"{where}: output {_short(output)} is not among its choices {_short(given)}{hint}"
        )
    return Example(question, output, choices)


def _parse_messages(given: Any, where: str) -> MessagesRow:
    if not isinstance(given, list) or not given:
        raise TaskError(f"{where}: 'messages' is {_short(given)}; expected a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(cast(list[Any], given), start=1):
        place = f"{where}, message {number}"
        if not isinstance(turn, Mapping):
            raise TaskError(f'{place}: is {_short(turn)}; expected {{"role", "content"}}')
        fields = cast(Mapping[str, Any], turn)
        role = _text(fields, "role", place)
        known: Role | None = next((name for name in ROLES if name == role), None)
        if known is None:
            raise TaskError(
                f"{place}: role {role!r} is unknown; expected one of {', '.join(ROLES)}"
            )
        messages.append(Message(known, _text(fields, "content", place)))
    if messages[-1].role != "assistant":
        raise TaskError(f"{where}: the last message must be the assistant's, which is learned")
    return MessagesRow(tuple(messages))


def _as_example(located: LocatedRow) -> Example:
    match located.row:
        case Example():
            return located.row
        case PromptRow(prompt, completion):
            return Example(prompt, completion)
        case MessagesRow(messages):
            if [message.role for message in messages] != ["user", "assistant"]:
                raise TaskError(
                    f"{located.where}: a conversation is measured only if it is one user message "
                    "and one assistant message; give longer ones to `tune`"
                )
            return Example(messages[0].content.strip(), messages[1].content.strip())
        case TextRow():
            raise TaskError(
                f"{located.where}: free text has no question and answer to measure; "
                'give "input" and "output", or use the file with `tune` only'
            )
        case _:
            assert_never(located.row)


def _text(content: Mapping[str, Any], key: str, where: str) -> str:
    if key not in content or content[key] is None:
        close = nearest(key, [name for name in content if name not in ("input", "output")])
        hint = f"; is {close!r} meant?" if close else ""
        raise TaskError(f"{where}: field {key!r} is missing{hint}")
    value = content[key]
    if not isinstance(value, str):
        raise TaskError(f"{where}: field {key!r} is {_short(value)}; expected a text in quotes")
    if not value.strip():
        raise TaskError(f"{where}: field {key!r} is empty")
    _check_characters(value, f"{where}: field {key!r}")
    return value


def _check_characters(text: str, where: str) -> None:
    """Refuse half of a character, which JSON can hold and no tokenizer and no file can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TaskError(
            f"{where} holds half a character ({text[error.start]!a}); write the whole one"
        ) from None


def read_objects(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the objects of a file, of whatever form, each with its place for error messages.

    Raises:
        TaskError: naming file and line, if the file cannot be read or has another suffix.
    """
    content = _read_bytes(path)
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _json_lines(content, path)
        case ".csv":
            return _csv_lines(content, path)
        case ".parquet":
            return _parquet_rows(content, path)
        case suffix:
            raise TaskError(
                f"{path}: cannot be read as examples with suffix {suffix!r}; "
                f"expected one of {', '.join(SUFFIXES)}"
            )


def _located(path: Path) -> list[LocatedRow]:
    rows = [LocatedRow(parse_row(fields, where), where) for fields, where in read_objects(path)]
    if not rows:
        raise TaskError(f"{path}: is empty; expected one row a line with {FORMS}")
    return rows


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        folder = path.parent
        siblings = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        close = nearest(path.name, siblings)
        hint = f"; nearest in {folder} is {close!r}" if close else ""
        raise TaskError(f"{path}: no such file{hint}") from None
    except IsADirectoryError:
        raise TaskError(f"{path}: is a directory; name an examples file in it") from None
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror})") from None


def _decoded_lines(content: bytes, path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            yield number, line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise TaskError(
                f"{path} line {number}: is not UTF-8 (byte {error.object[error.start]:#04x} "
                f"at column {error.start + 1}); save the file as UTF-8"
            ) from None


def _json_lines(content: bytes, path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    for number, line in _decoded_lines(content, path):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = _reason(error)
            raise TaskError(
                f"{where}: is not JSON ({reason}): {_short(line)}; expected one object a line"
            ) from None
        if not isinstance(value, dict):
            raise TaskError(f"{where}: is {_short(value)}; expected a JSON object with {FORMS}")
        yield cast(Mapping[str, Any], value), where


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


def _csv_lines(content: bytes, path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the rows under the header; the cells `choices` and `messages` hold JSON."""
    text = "\n".join(line for _, line in _decoded_lines(content, path))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    while True:
        begins = reader.line_num + 1 if reader.line_num else 2
        where = f"{path} line {begins}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise TaskError(f"{where}: is not CSV ({error})") from None
        if cells is None:
            return
        if None in cells or None in cells.values():
            count = len(reader.fieldnames or ())
            raise TaskError(f"{where}: has more or fewer cells than the header's {count}")
        yield _decode_cells(cells, where), where


def _decode_cells(cells: Mapping[str, str], where: str) -> Mapping[str, Any]:
    content: dict[str, Any] = dict(cells)
    for key in ("choices", "messages"):
        cell = cells.get(key)
        if not cell:
            content.pop(key, None)
            continue
        try:
            content[key] = json.loads(cell)
        except (ValueError, RecursionError):
            raise TaskError(
                f"{where}: cell {key!r} is {_short(cell)}; expected a JSON list"
            ) from None
    return content


def _parquet_rows(content: bytes, path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    # Imported here because listing tasks must not wait for a library that only this format needs.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise TaskError(f"{path}: is not a parquet file ({error})") from None
    for number, row in enumerate(rows, start=1):
        yield row, f"{path} row {number}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

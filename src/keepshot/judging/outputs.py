"""Answers and judgements on disk, in the formats that AlpacaEval reads and writes.

Outputs: a JSON list (or one object a line) of `{"instruction", "output", "generator"}`.
Judgements: the same with `output_1` (the reference), `output_2` (the candidate), `annotator` and
`preference`: 1 where the reference wins, 2 where the candidate does, anything between for doubt,
null where there is no judgement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from keepshot.errors import TaskError
from keepshot.records import write_text

TIE = 1.5


@dataclass(frozen=True)
class Outputs:
    """One generator's answers by instruction, in file order."""

    generator: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """Two answers to one instruction."""

    instruction: str
    candidate: str
    reference: str


def read_outputs(path: Path) -> Outputs:
    """Read an outputs file.

    Raises:
        TaskError: naming the file and row, if it is of another form or repeats an instruction.
    """
    answers: dict[str, str] = {}
    names: set[str] = set()
    for number, row in enumerate(_rows(path), start=1):
        where = f"{path} row {number}"
        instruction, output = row.get("instruction"), row.get("output")
        if not isinstance(instruction, str) or not isinstance(output, str):
            raise TaskError(f"{where}: needs the texts 'instruction' and 'output'")
        if instruction in answers:
            raise TaskError(f"{where}: instruction {instruction[:60]!r} is there twice")
        answers[instruction] = output
        names.add(str(row.get("generator", path.stem)))
    if len(names) != 1:
        listing = ", ".join(sorted(names)) or "nothing"
        raise TaskError(f"{path}: expected the answers of one generator, found {listing}")
    return Outputs(names.pop(), answers)


def write_outputs(outputs: Outputs, path: Path) -> None:
    """Write an outputs file that `read_outputs` and AlpacaEval read."""
    rows = [
        {"instruction": instruction, "output": output, "generator": outputs.generator}
        for instruction, output in outputs.answers.items()
    ]
    write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", path)


def pair_up(candidate: Outputs, reference: Outputs) -> list[Comparison]:
    """Pair the answers of two generators, in the candidate's order.

    Raises:
        TaskError: if they do not cover the same instructions: a win rate on what happens to be in
            both files would be another figure.
    """
    for ours, theirs in ((candidate, reference), (reference, candidate)):
        lacking = [name for name in ours.answers if name not in theirs.answers]
        if lacking:
            raise TaskError(
                f"{len(lacking)} of {len(ours.answers)} instructions of {ours.generator!r} are "
                f"not among those of {theirs.generator!r}, such as {lacking[0][:60]!r};\n"
                "give two outputs files of the same prompts"
            )
    return [
        Comparison(instruction, answer, reference.answers[instruction])
        for instruction, answer in candidate.answers.items()
    ]


def read_preferences(
    path: Path, comparisons: Sequence[Comparison]
) -> tuple[str, dict[str, float | None]]:
    """Read judgements: the annotator's name, and each instruction's preference in [1, 2] or None.

    As AlpacaEval has it, 0 is an old way to write a tie. A row with `output_1` and `output_2` must
    judge the two answers that are compared; where they are exchanged, so is its preference. A row
    without goes by its instruction alone.

    Raises:
        TaskError: naming file and row, if a row is of another form, judges other answers than
            those of `comparisons`, or repeats an instruction.
    """
    compared = {comparison.instruction: comparison for comparison in comparisons}
    found: dict[str, float | None] = {}
    names: set[str] = set()
    for number, row in enumerate(_rows(path), start=1):
        where = f"{path} row {number}"
        instruction, preference = row.get("instruction"), row.get("preference")
        if not isinstance(instruction, str):
            raise TaskError(f"{where}: needs the text 'instruction'")
        if instruction in found:
            raise TaskError(
                f"{where}: instruction {instruction[:60]!r} is there twice; keep one judgement of "
                "each"
            )
        if preference is not None:
            if not isinstance(preference, int | float) or isinstance(preference, bool):
                raise TaskError(f"{where}: 'preference' is {preference!r}; expected 1 to 2 or null")
            preference = TIE if preference == 0 else float(preference)
            if math.isnan(preference):
                preference = None
            elif not 1.0 <= preference <= 2.0:
                raise TaskError(f"{where}: 'preference' is {preference!r}; expected 1 to 2 or null")
        if _is_exchanged(row, compared.get(instruction), where) and preference is not None:
            preference = 3.0 - preference
        found[instruction] = preference
        names.add(str(row.get("annotator", path.stem)))
    return " and ".join(sorted(names)), found


def _is_exchanged(row: Mapping[str, Any], compared: Comparison | None, where: str) -> bool:
    """Say whether a judgement has the compared answers the other way round.

    Raises:
        TaskError: if it is of other answers.
    """
    judged = row.get("output_1"), row.get("output_2")
    if compared is None or not all(isinstance(answer, str) for answer in judged):
        return False
    wanted = compared.reference, compared.candidate
    if judged not in (wanted, wanted[::-1]):
        raise TaskError(
            f"{where}: judges other answers to {compared.instruction[:60]!r} than the two that are "
            "compared;\ngive the two outputs files that were judged, or judge these"
        )
    return judged != wanted


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TaskError(f"{path}: cannot be read ({reason})") from None
    try:
        content: Any = json.loads(text)
    except json.JSONDecodeError:
        try:
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise TaskError(
                f"{path}: is neither a JSON list nor one JSON object a line ({error})"
            ) from None
    rows = cast(list[Any], content) if isinstance(content, list) else [content]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise TaskError(f"{path}: expected a list of objects, one for each instruction")
    return rows

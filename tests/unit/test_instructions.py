"""Prompts with instructions: the file's format, what is refused, and the embedded set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instruction_answers import satisfying
from keepshot.errors import TaskError
from keepshot.judging.verifiable.verdict import judge
from keepshot.tasks.instruction_templates import embedded_set, level_of
from keepshot.tasks.instructions import ARGUMENTS, read_instructions, types_of


def written(folder: Path, **changes: Any) -> Path:
    row = {
        "key": 7,
        "prompt": "Write without commas, in at least two words.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"num_words": 2, "relation": "at least"}],
    } | changes
    path = folder / "mine.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def test_the_public_format_is_read(tmp_path: Path) -> None:
    # The hub's copy of the file names every argument everywhere, most of them null.
    padded = [{"num_words": None}, {"num_words": 2, "relation": "at least", "letter": None}]
    found = read_instructions(str(written(tmp_path, kwargs=padded)))
    (prompt,) = found.prompts
    assert (found.name, prompt.key) == ("mine.jsonl", "7")
    assert [i.type for i in prompt.instructions] == [
        "punctuation:no_comma",
        "length_constraints:number_words",
    ]
    assert prompt.instructions[1].arguments == {"num_words": 2, "relation": "at least"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"instruction_id_list": ["punctuation:no_coma", "length_constraints:number_words"]},
            r"line 1: instruction 'punctuation:no_coma' is unknown; nearest is "
            r"'punctuation:no_comma'",
        ),
        ({"kwargs": [{}]}, "line 1: field 'kwargs' must be a list with one object for each"),
        ({"kwargs": [{}, {"num_words": 2}]}, "number_words' needs 'relation'"),
        ({"kwargs": [{}, {"num_words": 0, "relation": "at least"}]}, "'num_words' is 0; expected"),
        ({"kwargs": [{}, {"num_words": 2, "relation": "over"}]}, "'less than' or 'at least'"),
        ({"kwargs": [{"letter": "a"}, None]}, "does not take 'letter'; its arguments: none"),
        ({"prompt": " "}, "line 1: field 'prompt' is missing or empty"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        read_instructions(str(written(tmp_path, **changes)))


def test_the_embedded_set_is_graded_and_whole() -> None:
    prompts = embedded_set().prompts
    assert len(prompts) == 360
    assert len({p.prompt for p in prompts}) == 360
    assert types_of(prompts) == ARGUMENTS.keys()
    assert [level_of(p) for p in prompts[:4]] == [1, 2, 3, 4]
    assert [len(p.instructions) for p in prompts[:4]] == [1, 1, 2, 3]
    assert embedded_set().fingerprint() == "d7286c26cb865efd"


def test_halves_part_the_set_whatever_its_order() -> None:
    prompts = embedded_set()
    test, validation = prompts.part("test").prompts, prompts.part("validation").prompts
    assert len(test) + len(validation) == 360
    assert min(len(test), len(validation)) > 150
    assert {p.key for p in test}.isdisjoint({p.key for p in validation})
    assert prompts.part("test", 5).prompts == test[:5]


def test_every_embedded_prompt_can_be_satisfied() -> None:
    for prompt in embedded_set().prompts:
        verdict = judge(prompt, satisfying(prompt), variant="repaired")
        assert all(verdict.strict), (prompt.key, satisfying(prompt), verdict)

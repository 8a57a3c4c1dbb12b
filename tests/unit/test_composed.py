"""Composed tasks: answers worked out a second time, and what is measured is never trained on."""

from __future__ import annotations

import re

import numpy as np
import pytest

from keepshot.models.blank import word_tokenizer
from keepshot.models.made import FromScratch
from keepshot.prompts import Template
from keepshot.tasks.catalog import CATALOG, SUITES
from keepshot.tasks.composed import (
    KINDS,
    Rule,
    kind_words,
    measured_rules,
    rules,
    trained_rules,
    training_questions,
    vocabulary,
)

ORDER = {"first": [0], "second": [1], "third": [2], "outer": [0, 2]}


def answer_of(rule: Rule, instruction: str, listed: list[str]) -> str:
    """What the words of the instruction ask for, by other means than the maker's."""
    kind = {word: kind for kind in KINDS for word in kind_words(kind)}
    if said := re.fullmatch(r"Say (\w+) for (\w+) and (\w+) for (\w+)", instruction):
        return {said[2]: said[1], said[4]: said[3]}[kind[listed[0]]]
    wanted = re.search(r"the (first|second|third|outer|largest|smallest|animal|food|tool)",
                       instruction)  # fmt: skip
    assert wanted is not None
    if wanted[1] in ("largest", "smallest"):
        chosen = [sorted(listed, key=int)[-1 if wanted[1] == "largest" else 0]]
    elif wanted[1] in ORDER:
        chosen = [listed[place] for place in ORDER[wanted[1]]]
    else:
        chosen = [word for word in listed if kind[word] == wanted[1]]
    if "kind of" in instruction:
        chosen = [kind[word] for word in chosen]
    if "plus one" in instruction:
        chosen = [str(int(number) + 1) for number in chosen]
    text = " ".join(chosen)
    text = text.upper() if "capitals" in instruction else text
    text = " ".join(f"{word} {word}" for word in text.split()) if "twice" in instruction else text
    text = f"( {text} )" if "brackets" in instruction else text
    return f"{text} !" if "mark" in instruction else text


@pytest.mark.parametrize("name", rules())
def test_answers_are_what_the_instruction_says(name: str) -> None:
    rule = rules()[name]
    generator = np.random.default_rng(3)
    for _ in range(12):
        example = rule.example(generator)
        instruction, _, question = example.input.partition(": ")
        assert example.output == answer_of(rule, instruction, question.split())
        assert example.choices is None or example.output in example.choices
        plain = rule.example(generator, instructed=False).input
        assert ":" not in plain
        assert len(plain.split()) == len(question.split())


def test_what_is_measured_is_never_trained_on() -> None:
    """No measured composition is among the trained ones, nor any of its questions."""
    measured, trained = measured_rules(), trained_rules()
    assert len(measured) == 24 == len(SUITES["composed"])
    assert len(trained) == 61
    instructions = {rule.instruction for rule in measured}
    assert not instructions & {rule.instruction for rule in trained}
    rows = training_questions(np.random.default_rng(0))
    assert len(rows) > 900
    assert {row.input.partition(": ")[0] for row in rows} == {r.instruction for r in trained}
    assert not set(SUITES["composed"]) & {name for name, entry in CATALOG.items()
                                          if entry.role == "target"}  # fmt: skip


def test_every_part_of_a_measured_task_is_trained_on_in_several_others() -> None:
    """Words as `first` and `twice`: each in three trained compositions or more."""
    trained = [set(rule.name.split("-")) for rule in trained_rules() if rule.family != "labels"]
    for rule in measured_rules():
        if rule.family == "labels":
            continue
        for part in rule.name.replace("plus-one", "plus").split("-"):
            assert sum(part in parts for parts in trained) >= 2, (rule.name, part)


def test_the_vocabulary_holds_every_word_and_texts_come_back_as_they_were() -> None:
    tokenizer = word_tokenizer(vocabulary())
    generator = np.random.default_rng(1)
    for rule in rules().values():
        examples = [rule.example(generator) for _ in range(2)]
        text = Template().context(examples, rule.example(generator)) + " left\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids, rule.name
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) < 700
    kinds = [set(kind_words(kind)) for kind in KINDS]
    assert sum(map(len, kinds)) == len(set().union(*kinds)) == 24 * len(KINDS)


def test_the_length_of_training_is_part_of_what_a_model_is() -> None:
    made = FromScratch(architecture="llama", width=32, depth=2, steps=5)
    assert made.fingerprint() != made.model_copy(update={"steps": 6}).fingerprint()

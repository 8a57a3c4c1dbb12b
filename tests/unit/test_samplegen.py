"""Samples that show two demonstrations and then the answer: their text, their draws, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from keepshot.errors import ConfigError
from keepshot.models.blank import blank_model
from keepshot.models.loading import LanguageModel
from keepshot.prompts import TEMPLATES, VERBATIM, Example, Template
from keepshot.tasks.composed import training_questions, vocabulary
from keepshot.tasks.source import PromptRow, TextRow
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.samplegen import REQUEST, form_of, samplegen_rows
from keepshot.tuning.tokenised import Extra, tokenise

CAPITALS = [Example("Peru", "Lima"), Example("Chile", "Santiago"), Example("Cuba", "Havana")]
WORDS, FRAMED = form_of("samplegen", Template()), form_of("samplegen-template", Template())


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_paper_s_structure_in_words() -> None:
    [row, *_] = samplegen_rows(CAPITALS, WORDS, generator(), source="x")
    assert row.prompt == f"Question: Peru\n{REQUEST}"
    first, second = sorted(("Chile\nAnswer {}: Santiago", "Cuba\nAnswer {}: Havana"),
                           key=lambda text: row.completion.index(text[:4]))  # fmt: skip
    assert row.completion == (
        f"\nExample 1: {first.format(1)}\nExample 2: {second.format(2)}"
        "\nSolution: Peru\nAnswer Solution: Lima\nEND_EXAMPLES"
    )


def test_the_task_s_own_template_makes_a_prompt_like_any_other() -> None:
    written = FRAMED.written(CAPITALS[1:], CAPITALS[0])
    assert FRAMED.prompt(CAPITALS[0]) == Template().context((), CAPITALS[0])
    cut = FRAMED.cut(written)
    assert cut is not None
    assert FRAMED.alone(cut) == Template().context(CAPITALS[1:], CAPITALS[0])
    assert written == cut + " Lima\n"


@pytest.mark.parametrize("template", TEMPLATES.values())
def test_cut_is_at_the_cue_of_the_solution(template: Template) -> None:
    for samples in ("samplegen", "samplegen-template"):
        form = form_of(samples, template)
        written = form.written(CAPITALS[1:], CAPITALS[0])
        cut = form.cut(written + "\nExample 3: Q: more\nA: ->")
        assert cut is not None
        assert written == cut + " Lima" + form.end
        assert form.cut(cut[:-1]) is None, "the answer was not reached"


def test_demonstrations_are_of_the_same_instruction_and_never_the_query() -> None:
    questions = training_questions(generator())
    template = Template()
    rows = samplegen_rows(
        questions, form_of("samplegen-template", template), generator(), source="x"
    )
    inputs = {question.input: question for question in questions}
    shown: set[str] = set()
    for question, row in zip(questions, rows, strict=True):
        parts = row.completion.removeprefix("\n\n").removesuffix("\n").split("\n\n")
        asked, answers = zip(
            *(part.removeprefix("Q: ").split("\nA: ") for part in parts), strict=True
        )
        assert asked[2] == question.input
        assert len(set(asked)) == 3
        assert {text.partition(": ")[0] for text in asked} == {question.input.partition(": ")[0]}
        assert [inputs[text].output for text in asked] == list(answers)
        shown.update(asked[:2])
    # About e^-2 of the rows are never drawn, if all are as likely.
    assert 0.80 < len(shown) / len(inputs) < 0.92


def test_few_of_an_instruction_take_from_the_whole_data_set() -> None:
    rows = [Example(f"add: {n}", str(n)) for n in range(2)] + [Example("odd", "even")] + CAPITALS
    [row, *_] = samplegen_rows(rows, WORDS, generator(), source="x")
    assert "Example 2" in row.completion
    assert row.completion.count("add: 0") == 1


def test_draws_are_seeded_and_held_out_rows_are_shown_training_rows() -> None:
    rows = [Example(f"thing {n}", str(n)) for n in range(30)]
    once = samplegen_rows(rows, WORDS, generator(), source="x")
    assert once == samplegen_rows(rows, WORDS, generator(), source="x")
    assert once != samplegen_rows(rows, WORDS, np.random.default_rng(1), source="x")
    [held] = samplegen_rows([CAPITALS[0]], WORDS, generator(), source="x", pool=rows)
    assert held.completion.count("thing") == 2
    assert "Solution: Peru" in held.completion


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'x: holds rows of prompt and completion.*"input"'):
        samplegen_rows([*CAPITALS, PromptRow("a", "b")], WORDS, generator(), source="x")
    with pytest.raises(ConfigError, match="holds rows of text"):
        samplegen_rows([TextRow("a")], WORDS, generator(), source="x")
    with pytest.raises(ConfigError, match="2 different questions are too few"):
        samplegen_rows([*CAPITALS[:2], CAPITALS[0]], WORDS, generator(), source="x")
    with pytest.raises(ConfigError, match="take samples: samplegen"):
        form_of("samplegen-template", VERBATIM)


def recipe_of(**changes: object) -> Recipe:
    return Recipe.from_mapping({"data": "x", **changes}, source="test")


def test_a_recipe_without_it_is_what_it_was() -> None:
    """The fingerprint is that of recipes before there was the key."""
    assert "samples" not in recipe_of().model_dump(mode="json")
    assert recipe_of().fingerprint() == recipe_of(samples="plain").fingerprint()
    assert recipe_of().fingerprint() == "1a2bace8cbcd8685"
    assert recipe_of(samples="samplegen").fingerprint() != recipe_of().fingerprint()
    with pytest.raises(ConfigError, match="samples"):
        recipe_of(samples="samplegne")


def test_tokenised_samples_are_learned_from_the_demonstrations_on() -> None:
    """In a closed vocabulary too: no token of the template form is unknown."""
    model: LanguageModel = blank_model("llama", 32, 1, vocabulary(), 0)
    questions = training_questions(generator())[:180]
    recipe = recipe_of(samples="samplegen-template")
    data = tokenise(recipe, model, questions, anchors=(), validation=questions[:3], extra=Extra())
    assert len(data.encoded.samples) == 180
    assert data.held_out is not None
    form = form_of(recipe.samples, Template())
    unknown, end = model.tokenizer.unk_token_id, model.tokenizer.eos_token_id
    for question, sample in zip(questions, data.encoded.samples, strict=True):
        prompt = model.encode(form.prompt(question))
        assert list(sample.ids[: len(prompt)]) == prompt
        assert sample.read == tuple(range(len(prompt) - 1, len(sample.ids) - 1))
        assert unknown not in sample.ids
        assert sample.ids[-1] == end
        text = model.decode(sample.ids)
        assert text.endswith(f"\n\nQ: {question.input}\nA: {question.output}\n")
    words = recipe_of(samples="samplegen")
    with pytest.raises(ConfigError, match="cannot write 'Answer Solution:'"):
        tokenise(words, model, questions, anchors=(), extra=Extra())
    other = dataclasses.replace(Extra(), origins=(("a", 90), ("b", 90)))
    parts = tokenise(recipe, model, questions, anchors=(), extra=other).mixture.tree[0].parts
    assert [part.samples for part in parts] == [90, 90]

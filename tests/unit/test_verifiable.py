"""Checks of verifiable instructions: against the reference, and each repair's own story."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from instruction_answers import mutations, satisfying
from keepshot.assets import AssetStore
from keepshot.errors import AssetError
from keepshot.judging.verifiable.language import detect
from keepshot.judging.verifiable.sentences import ASSET, Punkt, count_sentences
from keepshot.judging.verifiable.verdict import OFFICIAL, REPAIRS, judge, readings
from keepshot.tasks.instruction_templates import embedded_set
from keepshot.tasks.instructions import (
    ARGUMENTS,
    InstructionPrompt,
    InstructionSet,
    instruction,
    read_instructions,
)
from keepshot.tasks.task import seeded

GENERATIONS = Path(__file__).parent.parent / "golden" / "generations.jsonl"


@pytest.fixture(scope="module")
def punkt(store: AssetStore) -> Punkt:
    try:
        return Punkt.fetch(store)
    except AssetError as error:
        pytest.skip(f"nltk's tables cannot be had: {error}")


@pytest.fixture(scope="module")
def reference(store: AssetStore, punkt: Punkt) -> Any:
    """The reference implementation, with its language detection seeded as ours is."""
    import langdetect
    import nltk

    folder = store.fetch(ASSET) / "llama_index/core/_static/nltk_cache"
    nltk.data.path.insert(0, str(folder))
    module = pytest.importorskip("lm_eval.tasks.ifeval.utils")
    langdetect.DetectorFactory.seed = 0
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    yield importlib.reload(module)
    langdetect.DetectorFactory.seed = None
    nltk.data.path.remove(str(folder))


def odd_prompts() -> list[InstructionPrompt]:
    """Prompts of every type with arguments that the embedded set does not use."""
    given: list[tuple[str, dict[str, Any]]] = [
        ("keywords:existence", {"keywords": ["art", "a.t"]}),
        ("keywords:frequency", {"keyword": " is ", "frequency": 2, "relation": "less than"}),
        ("keywords:forbidden_words", {"forbidden_words": ["here", "people?"]}),
        ("keywords:letter_frequency",
            {"letter": "Z", "let_frequency": 1, "let_relation": "less than"}),
        ("language:response_language", {"language": "en"}),
        ("length_constraints:number_sentences", {"num_sentences": 5, "relation": "less than"}),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 1}),
        ("length_constraints:number_words", {"num_words": 35, "relation": "less than"}),
        ("length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "Many"}),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
        ("detectable_content:postscript", {"postscript_marker": "Note:"}),
        ("detectable_format:number_bullet_lists", {"num_bullets": 1}),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 3}),
        ("detectable_format:multiple_sections",
            {"section_spliter": "SECTION", "num_sections": 3}),
        ("detectable_format:multiple_sections", {"section_spliter": "Day.", "num_sections": 1}),
        ("startend:end_checker", {"end_phrase": " Yes it is. "}),
        ("change_case:capital_word_frequency",
            {"capital_frequency": 4, "capital_relation": "less than"}),
    ]  # fmt: skip
    given += [(name, {}) for name, needs in ARGUMENTS.items() if not needs]
    generator = seeded("odd prompts")
    prompts: list[InstructionPrompt] = []
    for number in range(160):
        chosen = [given[int(i)] for i in generator.permutation(len(given))[: 1 + number % 3]]
        asked = tuple(instruction(name, arguments, "odd") for name, arguments in chosen)
        prompts.append(InstructionPrompt(f"odd-{number}", "?", asked))
    return prompts


def disagreements(reference: Any, punkt: Punkt, asked: InstructionSet) -> list[tuple[str, str]]:
    """Return (type, kind of answer) wherever our official verdict is not the reference's."""
    found: list[tuple[str, str]] = []
    texts = [row.prompt for row in read_generations()]
    for number, prompt in enumerate(asked.prompts):
        made = satisfying(prompt)
        answers = {"made": made, "generated": texts[number % len(texts)]}
        for kind, text in (answers | mutations(made, number)).items():
            given = reference.InputExample(
                key=0,
                prompt=prompt.prompt,
                instruction_id_list=[i.type for i in prompt.instructions],
                kwargs=[dict(i.arguments) for i in prompt.instructions],
            )
            strict = reference.test_instruction_following_strict(given, text)
            loose = reference.test_instruction_following_loose(given, text)
            ours = judge(prompt, text, punkt=punkt)
            theirs = zip(strict.follow_instruction_list, loose.follow_instruction_list, strict=True)
            for asked_for, *verdicts in zip(
                prompt.instructions, zip(ours.strict, ours.loose, strict=True), theirs, strict=True
            ):
                if verdicts[0] != verdicts[1]:
                    found.append((asked_for.type, kind))
    return found


def read_generations() -> tuple[InstructionPrompt, ...]:
    """Answers of the small model to embedded prompts; each stands where a prompt would."""
    import json

    lines = GENERATIONS.read_text("utf-8").splitlines()
    return tuple(InstructionPrompt(r["key"], r["output"], ()) for r in map(json.loads, lines))


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_official_verdicts_are_the_references(reference: Any, punkt: Punkt, every: int) -> None:
    """520 prompts with 27 kinds of answer each, strict and loose: no disagreement."""
    both = (*embedded_set().prompts, *odd_prompts())
    assert len(both) == 520
    # What tells kinds apart is in the answers; a fifth of the embedded prompts has every type.
    asked = InstructionSet("all", 1, (*embedded_set().prompts[::every], *odd_prompts()))
    types = {one.type for prompt in asked.prompts for one in prompt.instructions}
    assert types == OFFICIAL.keys()
    assert disagreements(reference, punkt, asked) == []


@pytest.mark.skipif("KEEPSHOT_IFEVAL" not in os.environ, reason="names the public file")
def test_official_verdicts_on_the_public_file(reference: Any, punkt: Punkt) -> None:
    """The only disagreement: for a character that is no letter, the reference draws a letter."""
    asked = read_instructions(os.environ["KEEPSHOT_IFEVAL"])
    assert len(asked.prompts) == 541
    found = disagreements(reference, punkt, asked)
    assert {type_ for type_, _ in found} <= {"keywords:letter_frequency"}
    odd = [i.arguments.get("letter", "a") for p in asked.prompts for i in p.instructions]
    assert sum(not letter.isalpha() for letter in odd) == 2


def test_every_type_has_a_check_and_repairs_name_existing_ones() -> None:
    assert OFFICIAL.keys() == ARGUMENTS.keys()
    assert REPAIRS.keys() <= OFFICIAL.keys()


@pytest.mark.parametrize(
    ("type_", "arguments", "answer", "official", "repaired"),
    [
        ("keywords:existence", {"keywords": ["art"]}, "A party.", True, False),
        ("keywords:frequency", {"keyword": "is", "frequency": 2, "relation": "at least"},
            "This is.", True, False),
        ("keywords:forbidden_words", {"forbidden_words": ["C#"]}, "I like C# a lot", True, False),
        ("language:response_language", {"language": "fr"}, "12345", True, False),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one *** two", True, False),
        ("length_constraints:number_words", {"num_words": 4, "relation": "at least"},
            "don't well-known", True, False),
        ("length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
            "First.\n\n\n\nThen: this.", False, True),
        ("detectable_content:number_placeholders", {"num_placeholders": 2},
            "[] [link](http://a)", True, False),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Sent by U.P.S. today",
            True, False),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi\nP.S. and more",
            True, True),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Hi\nP. P. S. more",
            True, True),
        ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* a\n---", False, True),
        ("detectable_format:constrained_response", {}, "My answer is no. My answer is yes.",
            True, False),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "2 * 3 * 4",
            True, False),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 3},
            "*a* and **b c** and *d*", True, True),
        ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
            "Section 1\nSee Section 2", True, False),
        ("detectable_format:json_format", {}, "42", True, False),
        ("change_case:english_capital", {}, "THE BEES.", False, True),
        ("punctuation:no_comma", {}, "\u4f60\u597d\uff0c\u4e16\u754c", True, False),
    ],
)  # fmt: skip
def test_a_repair_follows_the_words_of_the_instruction(
    type_: str, arguments: dict[str, Any], answer: str, official: bool, repaired: bool
) -> None:
    prompt = InstructionPrompt("1", "?", (instruction(type_, arguments, "test"),))
    assert judge(prompt, answer).strict == (official,)
    assert judge(prompt, answer, variant="repaired").strict == (repaired,)


def test_counting_with_tables_and_without(punkt: Punkt) -> None:
    text = "Dr. Who met Mr. Smith. They left...\n1. apples\n2. pears"
    assert len(punkt.sentences(text)) == 2  # a list has no ends that it sees
    assert count_sentences(text) == 4
    assert count_sentences("- milk\n- bread\n\nP.S. Eggs too") == 3
    assert count_sentences("One. Two! Three? four") == 4
    assert count_sentences("...\n---\n") == 0


def test_nothing_is_fetched_at_import() -> None:
    """The reference downloads nltk's tables when it is imported; here no connection is tried."""
    code = (
        "import socket\n"
        "def refuse(*_): raise SystemExit('a connection at import')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import keepshot.judging.follow, keepshot.judging.verifiable.verdict\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_text_has_one_language() -> None:
    # Unseeded, this text is called one language or another from call to call.
    assert len({detect("Ok la casa is good") for _ in range(30)}) == 1
    assert detect("Beaucoup de gens aiment bien cette chose.") == "fr"
    assert detect("123") is None


def test_loose_forgives_a_preamble_and_asterisks() -> None:
    quoted = InstructionPrompt("1", "?", (instruction("startend:quotation", {}, "test"),))
    verdict = judge(quoted, 'Here it is:\n"All quoted."')
    assert (verdict.strict, verdict.loose) == ((False,), (True,))
    assert judge(quoted, '**"All quoted."**').loose == (True,)
    assert judge(quoted, " \n ") == judge(quoted, "")
    assert len(readings("a\nb\nc")) == 8
    assert readings("a\n*b*\nc")[3] == "*b*"

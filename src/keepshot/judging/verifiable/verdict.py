"""An answer against its prompt's instructions: strict and loose, official and repaired.

IFEval, arXiv 2311.07911. Strict judges the answer as it stands. Loose counts an instruction as
followed if any of eight readings does: the answer with or without its first line, its last line
and its asterisks. An empty answer follows nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from keepshot.judging.verifiable import layout, words
from keepshot.judging.verifiable.sentences import Punkt
from keepshot.tasks.instructions import Instruction, InstructionPrompt

Variant = Literal["official", "repaired"]
Check = Callable[..., bool]

OFFICIAL: dict[str, Check] = {
    "keywords:existence": words.has_keywords,
    "keywords:frequency": words.keyword_frequency,
    "keywords:forbidden_words": words.lacks_words,
    "keywords:letter_frequency": words.letter_frequency,
    "language:response_language": words.is_in_language,
    "length_constraints:number_sentences": words.sentence_count,
    "length_constraints:number_paragraphs": words.paragraph_count,
    "length_constraints:number_words": words.word_count,
    "length_constraints:nth_paragraph_first_word": words.first_word_of_paragraph,
    "detectable_content:number_placeholders": layout.placeholder_count,
    "detectable_content:postscript": layout.has_postscript,
    "detectable_format:number_bullet_lists": layout.bullet_count,
    "detectable_format:constrained_response": layout.is_constrained,
    "detectable_format:number_highlighted_sections": layout.highlight_count,
    "detectable_format:multiple_sections": layout.section_count,
    "detectable_format:json_format": layout.is_json,
    "detectable_format:title": layout.has_title,
    "combination:two_responses": layout.has_two_responses,
    "combination:repeat_prompt": layout.repeats_prompt,
    "startend:end_checker": layout.ends_with,
    "startend:quotation": layout.is_quoted,
    "change_case:capital_word_frequency": words.capital_words,
    "change_case:english_capital": words.is_english_capitals,
    "change_case:english_lowercase": words.is_english_lowercase,
    "punctuation:no_comma": words.has_no_comma,
}
NEEDS_PUNKT = frozenset(
    {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
)
"""Types whose official check counts with nltk's tables."""


@dataclass(frozen=True)
class Repair:
    """What is wrong with an official check, and the check that mends it."""

    fault: str
    check: Check


REPAIRS: dict[str, Repair] = {
    "keywords:existence": Repair(
        "`art` is found in `party`, and a keyword is read as a regular expression",
        words.repaired_has_keywords,
    ),
    "keywords:frequency": Repair(
        "counts the keyword inside longer words, and reads it as a regular expression",
        words.repaired_keyword_frequency,
    ),
    "keywords:forbidden_words": Repair(
        "reads the word as a regular expression; one that ends in a mark is never found",
        words.repaired_lacks_words,
    ),
    "language:response_language": Repair(
        "a text without any letters counts as being in the language asked for",
        words.repaired_is_in_language,
    ),
    "length_constraints:number_sentences": Repair(
        "a list without full stops is one sentence, and the count depends on nltk's version",
        words.repaired_sentence_count,
    ),
    "length_constraints:number_paragraphs": Repair(
        "three asterisks count as a divider inside a line and inside longer rows of them",
        words.repaired_paragraph_count,
    ),
    "length_constraints:number_words": Repair(
        "`don't` and `well-known` are two words each", words.repaired_word_count
    ),
    "length_constraints:nth_paragraph_first_word": Repair(
        "empty paragraphs shift the count; `Word:` is not read as `word`",
        words.repaired_first_word_of_paragraph,
    ),
    "detectable_content:number_placeholders": Repair(
        "empty brackets and markdown links count", layout.repaired_placeholder_count
    ),
    "detectable_content:postscript": Repair(
        "the marker counts inside a word (`U.P.S.`), and with nothing after it",
        layout.repaired_has_postscript,
    ),
    "detectable_format:number_bullet_lists": Repair(
        "dividers, negative numbers and lines that begin with a highlight count as bullets",
        layout.repaired_bullet_count,
    ),
    "detectable_format:constrained_response": Repair(
        "an answer that names two options, or goes on, counts", layout.repaired_is_constrained
    ),
    "detectable_format:number_highlighted_sections": Repair(
        "`2 * 3 * 4` and the text between two highlights of a line count",
        layout.repaired_highlight_count,
    ),
    "detectable_format:multiple_sections": Repair(
        "a mention of a section in running text counts as one", layout.repaired_section_count
    ),
    "detectable_format:json_format": Repair(
        "a bare number or word such as `true` counts", layout.repaired_is_json
    ),
    "change_case:capital_word_frequency": Repair(
        "`I`, `A` and split-off `'S` count as words in capitals", words.repaired_capital_words
    ),
    "change_case:english_capital": Repair(
        "language detection, trained on small letters, often takes capitals for another language",
        words.repaired_is_english_capitals,
    ),
    "punctuation:no_comma": Repair(
        "commas of other scripts do not count", words.repaired_has_no_comma
    ),
}


@dataclass(frozen=True)
class Verdict:
    """For each instruction of one prompt, in order: is it followed?"""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def judge(
    prompt: InstructionPrompt,
    answer: str,
    *,
    variant: Variant = "official",
    punkt: Punkt | None = None,
) -> Verdict:
    """Judge one answer.

    Args:
        prompt: what was asked.
        answer: the answer's text.
        variant: `official` decides as the reference implementation does, `repaired` uses the
            checks of `REPAIRS` where there is one.
        punkt: needed by the official variant for the types in `NEEDS_PUNKT`.
    """
    given = [reading for reading in readings(answer) if reading.strip()]
    strict: list[bool] = []
    loose: list[bool] = []
    for asked in prompt.instructions:
        check = _check(asked, variant, punkt)
        first = bool(answer.strip()) and check(answer)
        strict.append(first)
        loose.append(first or any(check(reading) for reading in given))
    return Verdict(tuple(strict), tuple(loose))


def readings(answer: str) -> list[str]:
    """Return the eight readings of the loose criterion, the answer itself first."""
    lines = answer.split("\n")
    parts = [lines[1:], lines[:-1], lines[1:-1]]
    cut = [answer, *("\n".join(part).strip() for part in parts)]
    return list(itertools.chain(cut, (text.replace("*", "") for text in cut)))


def _check(asked: Instruction, variant: Variant, punkt: Punkt | None) -> Callable[[str], bool]:
    arguments: dict[str, Any] = dict(asked.arguments)
    if variant == "repaired" and asked.type in REPAIRS:
        check = REPAIRS[asked.type].check
    else:
        check = OFFICIAL[asked.type]
        if asked.type in NEEDS_PUNKT:
            assert punkt is not None, f"{asked.type} is judged with nltk's tables"
            arguments["punkt"] = punkt

    def bound(text: str) -> bool:
        return check(text, **arguments)

    return bound


def describe_repairs() -> Mapping[str, str]:
    """Return, for each repaired type, what is wrong with the official check."""
    return {name: repair.fault for name, repair in REPAIRS.items()}

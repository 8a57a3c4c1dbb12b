"""The embedded instruction set: prompts made from topics and constraint templates by seed.

Four levels, taken in turn so that any first part of the set holds all of them:
1 one easy constraint, 2 one hard constraint, 3 two, 4 three that do not contradict each other.
Answers fit into some sixty words, so that a small model can be asked a hundred of them in minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from numpy.random import Generator

from keepshot.tasks.instructions import Instruction, InstructionPrompt, InstructionSet, instruction
from keepshot.tasks.task import seeded

EMBEDDED_SET = "embedded"
VERSION = 1
PER_LEVEL = 90

TOPICS = (
    "rain", "tea", "bicycles", "a small garden", "trains", "honey bees", "the moon", "chess",
    "bread", "libraries", "swimming", "maps", "winter", "a good breakfast", "lighthouses", "coffee",
    "sleep", "mountains", "a rainy Sunday", "dogs", "cheese", "the sea", "music lessons", "robots",
    "paper", "windmills", "photography", "apples", "kites", "public parks", "clocks", "salt",
    "volcanoes", "friendship", "bridges", "owls", "a long walk", "soap", "stamps", "thunder",
)  # fmt: skip
REQUESTS = (
    "Write a short text about {topic}.",
    "Tell me something about {topic}.",
    "Explain to a child why people care about {topic}.",
    "Write a short message to a friend about {topic}.",
    "Describe {topic} in your own words.",
    "Write a few lines that advertise {topic}.",
)
QUESTIONS = (
    "Is the sun hot?", "Can fish fly to the moon?", "Is ice colder than steam?",
    "Do cats read books?", "Will it rain in Rome next week?", "Is seven larger than three?",
    "Is a stone alive?", "Do most people sleep at night?", "Can a spoon sing?",
    "Is it always warm in winter?",
)  # fmt: skip
WORDS = (
    "morning", "river", "small", "people", "color", "window", "simple", "garden", "quiet", "story",
    "market", "paper", "summer", "bright", "door", "music", "stone", "travel", "family", "gentle",
)  # fmt: skip
COMMON = ("the", "and", "is", "it", "of", "a", "to", "in", "people", "can")
PHRASES = (
    "That is all.", "Thank you for reading.", "See you tomorrow.", "Is there anything else?",
    "Have a good day.",
)  # fmt: skip
LANGUAGES = {"fr": "French", "es": "Spanish", "de": "German", "it": "Italian"}
SMALL = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}

Made = tuple[str, Instruction]
"""The sentence that asks, and what is checked."""


@dataclass(frozen=True)
class Constraint:
    """One kind of constraint: how it is worded, how hard it is, and what it cannot stand beside."""

    make: Callable[[Generator], Made]
    easy: bool = False
    alone: bool = False
    clashes: str = ""
    """A word shared by constraints of which one prompt holds at most one."""


@cache
def embedded_set() -> InstructionSet:
    """Return the embedded set: the same prompts on every machine."""
    levels = [_level(level) for level in (1, 2, 3, 4)]
    prompts = [prompt for turn in zip(*levels, strict=True) for prompt in turn]
    return InstructionSet(EMBEDDED_SET, VERSION, tuple(prompts))


def level_of(prompt: InstructionPrompt) -> int:
    """Return the level, 1 to 4, of a prompt of the embedded set."""
    return int(prompt.key.partition("-")[0])


def _level(level: int) -> list[InstructionPrompt]:
    easy = [c for c in CONSTRAINTS if c.easy]
    hard = [c for c in CONSTRAINTS if not c.easy]
    free = [c for c in CONSTRAINTS if not c.alone]
    made: list[InstructionPrompt] = []
    seen: set[str] = set()
    number = 0
    while len(made) < PER_LEVEL:
        generator = seeded(EMBEDDED_SET, VERSION, level, number)
        number += 1
        if level <= 2:
            pool = easy if level == 1 else hard
            chosen = [pool[len(made) % len(pool)]]
        else:
            chosen = _compatible(free, level - 1, generator)
        prompt = _prompt(f"{level}-{len(made):03d}", chosen, generator)
        if prompt.prompt not in seen:
            seen.add(prompt.prompt)
            made.append(prompt)
    return made


def _compatible(pool: Sequence[Constraint], count: int, generator: Generator) -> list[Constraint]:
    chosen: list[Constraint] = []
    for index in generator.permutation(len(pool)):
        candidate = pool[int(index)]
        taken = {word for other in chosen for word in other.clashes.split()}
        if taken.isdisjoint(candidate.clashes.split()):
            chosen.append(candidate)
        if len(chosen) == count:
            break
    return chosen


def _prompt(key: str, chosen: Sequence[Constraint], generator: Generator) -> InstructionPrompt:
    made = [constraint.make(generator) for constraint in chosen]
    request = _pick(generator, REQUESTS).replace("{topic}", _pick(generator, TOPICS))
    if chosen[0].alone:
        request = _pick(generator, QUESTIONS)
    sentences = [sentence for sentence, _ in made]
    instructions = [asked for _, asked in made]
    return InstructionPrompt(key, " ".join([request, *sentences]), tuple(instructions))


# -- the constraints ---------------------------------------------------------------------------


def _asked(type_: str, **arguments: Any) -> Instruction:
    return instruction(type_, arguments, "embedded set")


def _pick(generator: Generator, options: Sequence[str]) -> str:
    return options[int(generator.integers(len(options)))]


def _between(generator: Generator, low: int, high: int) -> int:
    return int(generator.integers(low, high + 1))


def _fixed(sentence: str, type_: str, **arguments: Any) -> Callable[[Generator], Made]:
    return lambda generator: (sentence, _asked(type_, **arguments))


def _keywords(generator: Generator) -> Made:
    first, second = (WORDS[int(i)] for i in generator.permutation(len(WORDS))[:2])
    asked = _asked("keywords:existence", keywords=[first, second])
    return f'Use the words "{first}" and "{second}".', asked


def _one_keyword(generator: Generator) -> Made:
    word = _pick(generator, WORDS)
    return f'Use the word "{word}".', _asked("keywords:existence", keywords=[word])


def _frequency(generator: Generator) -> Made:
    word, count = _pick(generator, WORDS), _between(generator, 2, 4)
    asked = _asked("keywords:frequency", keyword=word, frequency=count, relation="at least")
    return f'Use the word "{word}" at least {SMALL[count]} times.', asked


def _forbidden(generator: Generator) -> Made:
    word = _pick(generator, COMMON)
    return f'Do not use the word "{word}".', _asked(
        "keywords:forbidden_words", forbidden_words=[word]
    )


def _letters(generator: Generator) -> Made:
    letter, count = _pick(generator, "aeiost"), _between(generator, 3, 12)
    asked = _asked(
        "keywords:letter_frequency", letter=letter, let_frequency=count, let_relation="at least"
    )
    return f'The letter "{letter}" must occur at least {count} times.', asked


def _few_letters(generator: Generator) -> Made:
    letter, count = _pick(generator, "bcdfgkpvwy"), _between(generator, 2, 6)
    asked = _asked(
        "keywords:letter_frequency", letter=letter, let_frequency=count, let_relation="less than"
    )
    return f'The letter "{letter}" must occur less than {count} times.', asked


def _most_words(generator: Generator) -> Made:
    count = 10 * _between(generator, 2, 5)
    asked = _asked("length_constraints:number_words", num_words=count, relation="less than")
    return f"Use less than {count} words.", asked


def _least_words(generator: Generator) -> Made:
    count = 10 * _between(generator, 2, 4)
    asked = _asked("length_constraints:number_words", num_words=count, relation="at least")
    return f"Use at least {count} words.", asked


def _most_sentences(generator: Generator) -> Made:
    count = _between(generator, 3, 5)
    asked = _asked("length_constraints:number_sentences", num_sentences=count, relation="less than")
    return f"Write less than {SMALL[count]} sentences.", asked


def _least_sentences(generator: Generator) -> Made:
    count = _between(generator, 2, 4)
    asked = _asked("length_constraints:number_sentences", num_sentences=count, relation="at least")
    return f"Write at least {SMALL[count]} sentences.", asked


def _paragraphs(generator: Generator) -> Made:
    count = _between(generator, 2, 3)
    asked = _asked("length_constraints:number_paragraphs", num_paragraphs=count)
    return (
        f"Write exactly {SMALL[count]} paragraphs with a line of three asterisks, ***, between "
        "them.",
        asked,
    )


def _first_word(generator: Generator) -> Made:
    word = _pick(generator, WORDS)
    asked = _asked(
        "length_constraints:nth_paragraph_first_word",
        num_paragraphs=2, nth_paragraph=_between(generator, 1, 2), first_word=word,
    )  # fmt: skip
    nth = {1: "first", 2: "second"}[asked.arguments["nth_paragraph"]]
    return (
        "Write exactly two paragraphs with an empty line between them. The "
        f'{nth} paragraph must begin with the word "{word}".',
        asked,
    )


def _placeholders(generator: Generator) -> Made:
    count = _between(generator, 1, 3)
    asked = _asked("detectable_content:number_placeholders", num_placeholders=count)
    plural = "" if count == 1 else "s"
    return (
        f"Include at least {SMALL[count]} placeholder{plural} in square brackets, such as [name].",
        asked,
    )


def _bullets(generator: Generator) -> Made:
    count = _between(generator, 2, 4)
    asked = _asked("detectable_format:number_bullet_lists", num_bullets=count)
    return (
        f"Answer with exactly {SMALL[count]} bullet points. Begin each with an asterisk and a "
        "space, such as: * This is a point.",
        asked,
    )


def _highlights(generator: Generator) -> Made:
    count = _between(generator, 1, 2)
    asked = _asked("detectable_format:number_highlighted_sections", num_highlights=count)
    plural = "" if count == 1 else "s"
    return (
        f"Highlight at least {SMALL[count]} part{plural} of your answer with asterisks, such as "
        "*highlighted part*.",
        asked,
    )


def _sections(generator: Generator) -> Made:
    asked = _asked("detectable_format:multiple_sections", section_spliter="Section", num_sections=2)
    return "Write two sections. Begin them with the lines Section 1 and Section 2.", asked


def _end(generator: Generator) -> Made:
    phrase = _pick(generator, PHRASES)
    asked = _asked("startend:end_checker", end_phrase=phrase)
    return f'End your answer with these exact words: "{phrase}"', asked


def _language(generator: Generator) -> Made:
    code = _pick(generator, tuple(LANGUAGES))
    asked = _asked("language:response_language", language=code)
    return f"Answer in {LANGUAGES[code]} only.", asked


def _capital_words(generator: Generator) -> Made:
    count = _between(generator, 1, 3)
    asked = _asked(
        "change_case:capital_word_frequency", capital_frequency=count, capital_relation="at least"
    )
    plural = "" if count == 1 else "s"
    return f"Write at least {SMALL[count]} word{plural} in capital letters only.", asked


def _repeat(generator: Generator) -> Made:
    question = _pick(generator, QUESTIONS)
    asked = _asked("combination:repeat_prompt", prompt_to_repeat=question)
    return f'Begin your answer with this question, word for word: "{question}"', asked


CONSTRAINTS: tuple[Constraint, ...] = (
    Constraint(_one_keyword, easy=True, clashes="keyword language"),
    Constraint(_letters, easy=True, clashes="letter"),
    Constraint(_most_sentences, easy=True, clashes="length"),
    Constraint(_least_sentences, easy=True, clashes="length"),
    Constraint(_most_words, easy=True, clashes="length"),
    Constraint(_least_words, easy=True, clashes="length"),
    Constraint(_highlights, easy=True, clashes="star"),
    Constraint(_placeholders, easy=True, clashes="bracket"),
    Constraint(_fixed("Do not use any commas.", "punctuation:no_comma"), easy=True, clashes="json"),
    Constraint(_capital_words, easy=True, clashes="case"),
    Constraint(_keywords, clashes="keyword language"),
    Constraint(_frequency, clashes="keyword language"),
    Constraint(_forbidden, clashes="forbidden start end"),
    Constraint(_few_letters, clashes="letter keyword start end"),
    Constraint(_language, clashes="language"),
    Constraint(_paragraphs, clashes="length star parts"),
    Constraint(_first_word, clashes="start parts length language case"),
    Constraint(
        _fixed(
            "At the end, add a postscript that begins with P.S.", "detectable_content:postscript",
            postscript_marker="P.S.",
        ),
        clashes="end case",
    ),
    Constraint(_bullets, clashes="star parts length start"),
    Constraint(
        _fixed(
            "Answer with one of these sentences and nothing else: My answer is yes. My answer is "
            "no. My answer is maybe.",
            "detectable_format:constrained_response",
        ),
        alone=True,
    ),
    Constraint(_sections, clashes="parts case language length"),
    Constraint(
        _fixed("Your whole answer must be one JSON object.", "detectable_format:json_format"),
        alone=False,
        clashes="json star start end parts case bracket language length",
    ),
    Constraint(
        _fixed(
            "Give the text a title in double angular brackets, such as <<a title>>.",
            "detectable_format:title",
        ),
        clashes="start",
    ),
    Constraint(
        _fixed(
            "Give two different answers with six asterisks, ******, between them.",
            "combination:two_responses",
        ),
        clashes="star parts end length start",
    ),
    Constraint(_repeat, clashes="start case language json"),
    Constraint(_end, clashes="end case language json"),
    Constraint(
        _fixed("Put your whole answer in double quotation marks.", "startend:quotation"),
        clashes="start end json",
    ),
    Constraint(
        _fixed("Write in capital letters only.", "change_case:english_capital"),
        clashes="case language",
    ),
    Constraint(
        _fixed(
            "Write in small letters only, without a single capital letter.",
            "change_case:english_lowercase",
        ),
        clashes="case language",
    ),
)  # fmt: skip

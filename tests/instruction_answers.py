"""Answers made to satisfy the instructions of a prompt, and mutations that break them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from keepshot.tasks.instructions import InstructionPrompt
from keepshot.tasks.task import seeded

PLAIN = (
    "Many people like this very much and talk about it often. ",
    "There is a lot to see and to learn here. ",
    "It takes some time to get to know it well. ",
    "Ask a friend who has been there for years. ",
)
FOREIGN = {
    "fr": "Beaucoup de gens aiment bien cette chose et ils en parlent souvent avec leurs amis. ",
    "es": "Muchas personas quieren mucho esta cosa y hablan de ella con sus amigos. ",
    "de": "Viele Menschen kennen diese Sache sehr gut und sprechen gern mit Freunden. ",
    "it": "Molte persone amano molto questa cosa e ne parlano spesso con i loro amici. ",
}


def satisfying(prompt: InstructionPrompt) -> str:
    """Do what a prompt asks, one instruction after another in an order that keeps all of them."""
    asked = {instruction.type: dict(instruction.arguments) for instruction in prompt.instructions}
    text = _body(asked)
    for type_, apply in _STEPS:
        if type_ in asked:
            text = apply(text, asked[type_])
    return text


def mutations(answer: str, seed: int) -> dict[str, str]:
    """Return variations that break one kind of instruction or another."""
    lines = answer.split("\n")
    middle = len(answer) // 2
    generator = seeded("mutations", seed)
    shuffled = answer.split(" ")
    generator.shuffle(shuffled)
    return {
        "empty": " \n",
        "upper": answer.upper(),
        "lower": answer.lower(),
        "title": answer.title(),
        "comma": answer[:middle] + ", " + answer[middle:],
        "preamble": f"Sure! Here is what you asked for:\n\n{answer}",
        "postamble": f"{answer}\n\nI hope this helps.",
        "half": answer[:middle],
        "twice": f"{answer}\n\n{answer}",
        "double space": answer.replace("\n", "\n\n\n\n"),
        "quoted": f'"{answer}"',
        "unquoted": answer.strip().strip('"'),
        "fenced": f"```json\n{answer}\n```",
        "starred": " ".join(f"*{word}*" if i % 7 == 0 else word for i, word in enumerate(lines)),
        "stripped": "".join(c for c in answer if c not in "*[]<>{}"),
        "bulleted": "\n".join(
            f"- {line}" if i % 2 else f" * {line}" for i, line in enumerate(lines)
        ),
        "dashes": answer + "\n---\n-5 degrees *really*\n",
        "abbreviated": "Dr. Who paid approx. $3.50 in the U.S. on Jan. 5. IT'S. A test... "
        + answer,
        "sections": "Section 1\nSee Section 2 and SECTION 3.\n" + answer + "\nP.S. x\nU.P.S.",
        "asterisks": answer.replace(". ", ". *** ", 1) + "*******",
        "brackets": answer + " [] [link](http://example.com) <<>> << >>",
        "shuffled": " ".join(shuffled),
        "digits": "12345 67890 !!! ###",
        "foreign": FOREIGN["fr"] * 2,
        "number": "42",
    }


def _body(asked: dict[str, dict[str, Any]]) -> str:
    if "detectable_format:constrained_response" in asked:
        return "My answer is yes."
    language = asked.get("language:response_language", {}).get("language", "en")
    sentences: Sequence[str] = [FOREIGN[language]] * 3 if language in FOREIGN else PLAIN[:3]
    limit = asked.get("length_constraints:number_sentences", {})
    if limit.get("relation") == "less than":
        sentences = sentences[: max(0, int(limit["num_sentences"]) - 2)] or ["Yes it is."]
    elif limit:
        sentences = [sentences[i % 3] for i in range(int(limit["num_sentences"]) + 1)]
    words = asked.get("length_constraints:number_words", {})
    if words.get("relation") == "less than":
        short = int(words["num_words"]) < 30 and language not in FOREIGN
        sentences = ["Yes it is. "] if short else sentences[:1]
    elif words:
        sentences = [PLAIN[i % 4] for i in range(int(words["num_words"]) // 8 + 1)]
    return "".join(sentences).strip()


def _insert_keywords(text: str, arguments: dict[str, Any]) -> str:
    return f"{' and '.join(arguments['keywords'])} {text}"


def _insert_often(text: str, arguments: dict[str, Any]) -> str:
    if arguments["relation"] == "less than":
        return text
    return f"{' '.join([arguments['keyword']] * int(arguments['frequency']))} {text}"


def _avoid(text: str, arguments: dict[str, Any]) -> str:
    banned = {word.lower() for word in arguments["forbidden_words"]}
    return " ".join(word for word in text.split(" ") if word.lower().strip(".") not in banned)


def _letters(text: str, arguments: dict[str, Any]) -> str:
    letter, count = arguments["letter"], int(arguments["let_frequency"])
    if arguments["let_relation"] == "less than":
        return "".join(c for c in text if c.lower() != letter.lower())
    return f"{letter * count} {text}"


def _paragraphs(text: str, arguments: dict[str, Any]) -> str:
    return "\n***\n".join(f"{text}" for _ in range(int(arguments["num_paragraphs"])))


def _first_word(text: str, arguments: dict[str, Any]) -> str:
    parts = [text] * int(arguments["num_paragraphs"])
    nth = int(arguments["nth_paragraph"]) - 1
    parts[nth] = f"{arguments['first_word'].capitalize()} {parts[nth]}"
    return "\n\n".join(parts)


def _bullets(text: str, arguments: dict[str, Any]) -> str:
    count = int(arguments["num_bullets"])
    return "\n".join(f"* {text}" if i == 0 else "* And more" for i in range(count))


def _sections(text: str, arguments: dict[str, Any]) -> str:
    mark = arguments["section_spliter"]
    return "\n".join(f"{mark} {i + 1}\n{text}" for i in range(int(arguments["num_sections"])))


Step = Callable[[str, dict[str, Any]], str]
_STEPS: tuple[tuple[str, Step], ...] = (
    ("keywords:forbidden_words", _avoid),
    ("keywords:letter_frequency", _letters),
    ("keywords:existence", _insert_keywords),
    ("keywords:frequency", _insert_often),
    ("change_case:capital_word_frequency", lambda t, a: "NOTE " * a["capital_frequency"] + t
        if a["capital_relation"] == "at least" else t),
    ("detectable_content:number_placeholders", lambda t, a: "[name] " * a["num_placeholders"] + t),
    ("detectable_format:number_highlighted_sections",
        lambda t, a: t + " *good*" * a["num_highlights"]),
    ("length_constraints:number_paragraphs", _paragraphs),
    ("length_constraints:nth_paragraph_first_word", _first_word),
    ("detectable_format:number_bullet_lists", _bullets),
    ("detectable_format:multiple_sections", _sections),
    ("detectable_format:title", lambda t, a: f"<<one>>\n{t}"),
    ("combination:two_responses", lambda t, a: f"{t}\n******\nor: {t}"),
    ("combination:repeat_prompt", lambda t, a: f"{a['prompt_to_repeat']}\n{t}"),
    ("detectable_format:json_format", lambda t, a: json.dumps({"answer": t})),
    ("punctuation:no_comma", lambda t, a: t.replace(",", "")),
    ("detectable_content:postscript", lambda t, a: f"{t}\n{a['postscript_marker']} More soon"),
    ("startend:end_checker", lambda t, a: f"{t} {a['end_phrase']}"),
    ("startend:quotation", lambda t, a: f'"{t}"'),
    ("change_case:english_capital", lambda t, a: t.upper()),
    ("change_case:english_lowercase", lambda t, a: t.lower()),
)  # fmt: skip

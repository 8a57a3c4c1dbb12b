"""Instructions about sentences, passages, tables and formats."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from keepshot.tasks.pairs.kind import PEOPLE, PLACES, THINGS, Kind, Made, number, pick, sample

if TYPE_CHECKING:
    from numpy.random import Generator

NOT_TOLD = "The text does not say."


def _json(g: Generator) -> Made:
    name, place, age = pick(g, PEOPLE), pick(g, PLACES), number(g, 18, 80)
    answer = json.dumps({"name": name, "age": age, "place": place})
    return {"name": name, "age": str(age), "place": place}, answer


def _address(g: Generator) -> tuple[str, str]:
    name = pick(g, PEOPLE).lower()
    return name, f"{name}.{pick(g, THINGS)}@{pick(g, THINGS)}.example"


def _email(g: Generator) -> Made:
    name, address = _address(g)
    fields = {"name": name.title(), "address": address, "place": pick(g, PLACES)}
    return fields, address


def _domain(g: Generator) -> Made:
    _, address = _address(g)
    return {"address": address}, address.partition("@")[2]


def _tagged(g: Generator) -> Made:
    tag, word = pick(g, ("b", "i", "u", "em", "code", "strong", "li", "h1")), pick(g, THINGS)
    return {"tag": tag, "word": word}, f"<{tag}>{word}</{tag}>"


def _letter(g: Generator) -> Made:
    name, thing, place = pick(g, PEOPLE), pick(g, THINGS), pick(g, PLACES)
    answer = f"Dear {name}, your {thing} is waiting in {place}."
    return {"name": name, "thing": thing, "place": place}, answer


def _passage(g: Generator) -> tuple[str, dict[str, str]]:
    """Return a passage of three sentences, and the answers to what it tells."""
    who, other = sample(g, PEOPLE, 2)
    place, thing, year = pick(g, PLACES), pick(g, THINGS), number(g, 1900, 2020)
    text = pick(g, (
        "{who} moved to {place} in {year}. There {who} found an old {thing}. "
        "{other} repaired it.",
        "In {year}, {who} opened a museum in {place}. Its pride is a {thing}. "
        "It was a present from {other}.",
        "{other} lost a {thing} in {place}. It lay there until {year}. "
        "Then {who} dug it up.",
    ))  # fmt: skip
    facts = {"who": who, "other": other, "place": place, "thing": thing, "year": str(year)}
    return text.format(**facts), facts


def _told(g: Generator) -> Made:
    text, facts = _passage(g)
    question, key = pick(g, (
        ("Which year is mentioned?", "year"), ("Where did it happen?", "place"),
        ("What object is it about?", "thing"),
    ))  # fmt: skip
    return {"text": text, "question": question}, facts[key]


def _perhaps_told(g: Generator) -> Made:
    """Two times in three the passage does not tell, so that neither answer is safe."""
    if g.integers(3) == 0:
        return _told(g)
    text, facts = _passage(g)
    question = pick(g, (
        "How old is {who}?", "What is {other}'s trade?", "How much is the {thing} worth?",
        "Who governs {place}?", "What was the weather like that year?",
        "How tall is {other}?", "What colour is the {thing}?",
    ))  # fmt: skip
    return {"text": text, "question": question.format(**facts)}, NOT_TOLD


def _row(g: Generator) -> Made:
    thing, price, stock = pick(g, THINGS), number(g, 2, 90), number(g, 2, 40)
    fields = {"row": f"{thing} | {price} euros | {stock}"}
    return fields, f"The {thing} costs {price} euros and {stock} are in stock."


def _first_step(g: Generator) -> Made:
    who = pick(g, PEOPLE)
    first, second, third = sample(g, THINGS, 3)
    text = pick(g, (
        "{who} packed the {b}, but only after the {a}; the {c} went in at the end.",
        "Before the {b} {who} packed the {a}, and after the {b} the {c}.",
        "{who} packed the {a} first, then the {b}, then the {c}.",
    ))  # fmt: skip
    return {"text": text.format(who=who, a=first, b=second, c=third), "who": who}, first


def _question(g: Generator) -> Made:
    who, place, thing = pick(g, PEOPLE), pick(g, PLACES), pick(g, THINGS)
    verb, rest = pick(g, (
        ("live", f"in {place}"), ("work", f"in {place}"), ("own", f"a {thing}"),
        ("need", f"a {thing}"), ("sell", f"a {thing}"),
    ))  # fmt: skip
    return {"sentence": f"{who} {verb}s {rest}."}, f"Does {who} {verb} {rest}?"


TEXT_KINDS = (
    Kind("as-json", (
        "Give this as JSON with the keys name, age and place: {name}, {age}, from {place}.",
        "{name} is {age} years old and lives in {place}. Write that as a JSON object "
        "(name, age, place).",
        "Make a JSON object with name, age and place for {name} ({age}) of {place}.",
        "Record for our database, as JSON (name, age, place): {name}, aged {age}, {place}.",
    ), _json),
    Kind("find-address", (
        "Find the e-mail address: {name} in {place} reads {address} every evening.",
        "Which e-mail address is given here? Write to {name} ({address}), {place} branch.",
        "Copy only the e-mail address out of this line: {place} / {name} / {address}",
        "How can I mail {name}? The card says: {name}, {place}, {address}.",
    ), _email),
    Kind("mail-domain", (
        "What is the domain of {address}?",
        "Give the part after the @ sign: {address}",
        "On which server does the mailbox {address} lie?",
        "Strip the user from {address} and keep the domain.",
    ), _domain),
    Kind("html-tag", (
        "Put the word {word} into the HTML tag {tag}.",
        "Wrap \"{word}\" in <{tag}> and close it.",
        "Write HTML that shows {word} in a {tag} element.",
        "Mark up {word} with {tag}.",
    ), _tagged),
    Kind("fill-form-letter", (
        "Fill in \"Dear NAME, your ITEM is waiting in PLACE.\" "
        "with NAME {name}, ITEM {thing}, PLACE {place}.",
        "Use the template \"Dear [name], your [item] is waiting in [place].\" "
        "for {name}, {thing}, {place}.",
        "Complete for {name} ({thing}, {place}): Dear ..., your ... is waiting in ....",
        "Our form letter is \"Dear (1), your (2) is waiting in (3).\" "
        "Write it with 1 = {name}, 2 = {thing}, 3 = {place}.",
    ), _letter),
    Kind("answer-from-text", (
        "{text} {question}",
        "Read the text and answer. {question}\n{text}",
        "{question} Answer from this passage: {text}",
        "Passage: {text}\nQuestion: {question}",
    ), _told),
    Kind("not-in-text", (
        "{text} {question} If the text does not say, reply \"The text does not say.\"",
        "Answer from the text only, and if it cannot be known write \"The text does not say.\" "
        "{question}\n{text}",
        "{question} Use nothing but this: {text} Where it is silent, answer "
        "\"The text does not say.\"",
        "Text: {text}\nQuestion: {question} (Or: The text does not say.)",
    ), _perhaps_told),
    Kind("row-to-sentence", (
        "Columns: item | price | stock. Put this row into a sentence: {row}",
        "Say in words what the row \"{row}\" of our stock table (item | price | stock) tells.",
        "item | price | stock\n{row}\nDescribe this row in one sentence.",
        "Summarise the table row {row} (item, price, number in stock) in a sentence.",
    ), _row),
    Kind("what-came-first", (
        "{text} What went in first?",
        "Which thing did {who} pack before all others? {text}",
        "{text} Name the one that was packed earliest.",
        "Put in order of time, what stands at the beginning? {text}",
    ), _first_step),
    Kind("make-a-question", (
        "Turn this statement into a yes-or-no question: {sentence}",
        "Ask whether it is true: {sentence}",
        "{sentence} Make a question with \"does\" of it.",
        "Rewrite as a question: {sentence}",
    ), _question),
)  # fmt: skip
"""Ten kinds."""

"""Instructions about numbers, units, times and dates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepshot.tasks.pairs.kind import MONTHS, PEOPLE, THINGS, Kind, Made, number, pick, sample

if TYPE_CHECKING:
    from numpy.random import Generator

UNITS = (
    ("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000), ("hours", "minutes", 60), ("minutes", "seconds", 60),
    ("weeks", "days", 7), ("dozens", "pieces", 12), ("centimetres", "millimetres", 10),
)  # fmt: skip


def _converted(g: Generator) -> Made:
    large, small, factor = pick(g, UNITS)
    amount = number(g, 2, 40)
    return {"amount": str(amount), "large": large, "small": small}, f"{amount * factor} {small}"


def _fewer(g: Generator) -> Made:
    first, second = sample(g, PEOPLE, 2)
    a, b = sample(g, range(3, 60), 2)
    fields = {"first": first, "second": second, "a": str(a), "b": str(b)}
    return fields | {"thing": pick(g, THINGS)}, first if a < b else second


def _between(g: Generator) -> Made:
    low = number(g, 1, 80)
    high = low + number(g, 3, 7)
    answer = ", ".join(str(n) for n in range(low + 1, high))
    return {"low": str(low), "high": str(high)}, answer


def _parity(g: Generator) -> Made:
    value = number(g, 10, 999)
    return {"value": str(value)}, "odd" if value % 2 else "even"


def _pattern(g: Generator) -> Made:
    start, step = number(g, 1, 30), number(g, 2, 12)
    # Without commas: a measured task asks about numbers in that form.
    shown = " ".join(str(start + step * n) for n in range(4))
    return {"shown": shown}, str(start + 4 * step)


def _price(g: Generator) -> Made:
    count, price = number(g, 2, 9), number(g, 2, 12)
    fields = {"count": str(count), "price": str(price), "thing": pick(g, THINGS)}
    return fields, f"{count * price} euros"


def _rounded(g: Generator) -> Made:
    value = number(g, 11, 989)
    value += value % 10 == 5
    return {"value": str(value)}, str((value + 5) // 10 * 10)


def _later(g: Generator) -> Made:
    hour, minute, wait = number(g, 6, 20), 5 * number(g, 0, 11), 5 * number(g, 1, 18)
    end = 60 * hour + minute + wait
    return {"time": f"{hour:02}:{minute:02}", "wait": str(wait)}, f"{end // 60:02}:{end % 60:02}"


def _date(g: Generator) -> Made:
    year, month, day = number(g, 1950, 2030), number(g, 1, 12), number(g, 1, 28)
    return {"date": f"{day} {MONTHS[month - 1]} {year}"}, f"{year}-{month:02}-{day:02}"


def _allowed(g: Generator) -> Made:
    low = number(g, 5, 20)
    high = low + number(g, 5, 20)
    value = number(g, low, high) if g.integers(2) else pick(g, [*range(1, low), high + 3, high + 9])
    fields = {"low": str(low), "high": str(high), "value": str(value), "thing": pick(g, THINGS)}
    return fields, "yes" if low <= value <= high else "no"


NUMBER_KINDS = (
    Kind("convert-unit", (
        "Convert {amount} {large} to {small}.",
        "How much is {amount} {large} in {small}?",
        "Express {amount} {large} in {small}.",
        "A form asks for {small}, but I have {amount} {large}. What do I write?",
    ), _converted),
    Kind("who-has-fewer", (
        "{first} has {a} of them, {second} has {b}. Who has fewer?",
        "{first} counted {a} and {second} counted {b}. Whose count is lower?",
        "Between {first} with {a} points and {second} with {b} points, who is behind?",
        "A {thing} costs {first} {a} coins and {second} {b} coins. Who pays less?",
    ), _fewer),
    Kind("numbers-between", (
        "List the whole numbers between {low} and {high}, without the two.",
        "Which integers lie strictly between {low} and {high}?",
        "Count up from {low} to {high}, but leave out both ends.",
        "Name all whole numbers greater than {low} and less than {high}.",
    ), _between),
    Kind("odd-or-even", (
        "Is {value} odd or even?",
        "Say whether the number {value} is even or odd.",
        "{value}: odd or even? Answer with one word.",
        "Can {value} be split in two equal whole parts? Call it even if so, and odd if not.",
    ), _parity),
    Kind("next-number", (
        "What comes next? {shown} ...",
        "Continue the series {shown} by one number.",
        "The numbers grow by the same step: {shown}. Which is the next one?",
        "Complete the pattern: {shown} __",
    ), _pattern),
    Kind("total-price", (
        "A {thing} costs {price} euros. What do {count} of them cost?",
        "I buy {count} items, a {thing} each, at {price} euros apiece. How much do I pay?",
        "Price per {thing}: {price} euros. Quantity: {count}. Total?",
        "Work out the bill for {count} times a {thing} at {price} euros.",
    ), _price),
    Kind("round-to-ten", (
        "Round {value} to the nearest ten.",
        "Which multiple of ten is closest to {value}?",
        "Give {value} rounded to tens.",
        "About how many is {value}, to the nearest 10?",
    ), _rounded),
    Kind("add-minutes", (
        "It is {time}. What time will it be in {wait} minutes?",
        "A train leaves at {time} and rides for {wait} minutes. When does it arrive?",
        "Add {wait} minutes to {time}.",
        "The cake goes in at {time} and needs {wait} minutes. At what time is it done?",
    ), _later),
    Kind("iso-date", (
        "Rewrite the date {date} as year-month-day in digits.",
        "Write {date} in ISO format.",
        "Our files are named by ISO date. How is {date} written?",
        "Turn \"{date}\" into the form YYYY-MM-DD.",
    ), _date),
    Kind("within-limits", (
        "The rule allows {low} to {high}. Is {value} allowed? Answer yes or no.",
        "Valid values run from {low} to {high}, ends included. Is {value} valid (yes/no)?",
        "A {thing} may weigh {low} to {high} kilos. Mine weighs {value}. Does it pass, yes or no?",
        "Yes or no: does {value} lie in the range {low} to {high}?",
    ), _allowed),
)  # fmt: skip
"""Ten kinds."""

"""Self-distilled targets: the model puts answers into its own words (arXiv 2402.13669).

What it would have said anyway pulls less on its weights. A rewriting is taken only if it agrees
with the given answer; else that one stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example, Template
from keepshot.scoring.engine import Engine
from keepshot.scoring.request import Generate, GenerateResult
from keepshot.tasks.source import PromptRow, Row
from keepshot.tuning.keep import SelfDistil

ASK = Template(
    description=(
        "Each question comes with a reference answer. "
        "Give the same answer in your own words, in one line.\n\n"
    ),
    question="{input}\nYour answer:",
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Rewritten:
    """The rows, in their order, and how many answers are the model's own words."""

    rows: list[Row]
    num_rewritten: int


def rewrite(model: LanguageModel, rows: Sequence[Row], term: SelfDistil) -> Rewritten:
    """Let the untuned model rewrite the answers of questions, greedily; other rows stay.

    Questions that leave no room in the model's context for a rewriting keep their answer.

    Args:
        model: the untuned model.
        rows: what is tuned on.
        term: how long a rewriting may be.
    """
    asked: dict[int, Generate] = {}
    for number, row in enumerate(rows):
        pair = _question(row)
        if pair is None:
            continue
        question, answer = pair
        shown = Example(f"Question: {question}\nReference answer: {answer}", "")
        context = tuple(model.encode(ASK.context([], shown)))
        if len(context) + term.max_new_tokens <= model.context_length:
            asked[number] = Generate(context, term.max_new_tokens, ("\n",))
    made = list(rows)
    results = Engine(model).run(list(asked.values())) if asked else []
    num_rewritten = 0
    for (number, _), result in zip(asked.items(), results, strict=True):
        assert isinstance(result, GenerateResult)
        own = result.text.strip()
        row = rows[number]
        pair = _question(row)
        assert pair is not None
        if result.stopped and own != pair[1].strip() and agrees(own, pair[1]):
            made[number] = _answered(row, own)
            num_rewritten += 1
    return Rewritten(made, num_rewritten)


def agrees(own: str, answer: str) -> bool:
    """Say whether a rewriting holds the given answer.

    Of answers with numbers the last number must be the last one of both; all others must occur in
    the rewriting word for word, case apart.

    >>> agrees("That makes 12 euros.", "3 * 4 = 12"), agrees("It is blue.", "Blue")
    (True, True)
    >>> agrees("That makes 13 euros.", "12"), agrees("", "Blue"), agrees("bluebell", "Blue")
    (False, False, False)
    """
    wanted, found = NUMBER.findall(answer), NUMBER.findall(own)
    if wanted:
        return bool(found) and float(found[-1]) == float(wanted[-1])
    words = re.escape(answer.strip().rstrip(".").casefold())
    return re.search(rf"(?<!\w){words}(?!\w)", own.casefold()) is not None


def _question(row: Row) -> tuple[str, str] | None:
    match row:
        case Example():
            return row.input, row.output
        case PromptRow(prompt, completion):
            return prompt, completion
        case _:
            return None


def _answered(row: Row, answer: str) -> Row:
    match row:
        case Example():
            # What a classification task's labels were says nothing about the new wording.
            return replace(row, output=answer, choices=None)
        case PromptRow(prompt, completion):
            # The space or newline between the two belongs to the completion.
            opening = completion[: len(completion) - len(completion.lstrip())]
            return PromptRow(prompt, opening + answer)
        case _:
            return row

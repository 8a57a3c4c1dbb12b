r"""Rows become tokenised samples: a prompt with its answer, a conversation, or free text.

`{input, output}` rows are rendered by a `Template` and tokenised as they are when measured; the
answer ends in a newline, that of `{prompt, completion}` rows in EOS, and only it is learned.
Nothing is cut unless it is asked for.
Knows nothing of methods and losses.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import numpy as np
from jinja2 import TemplateError

from keepshot.errors import TaskError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example, Template
from keepshot.tasks.source import Message, MessagesRow, PromptRow, Role, Row, TextRow
from keepshot.tuning.batch import Sample

LongRows = Literal["error", "drop", "cut"]


@dataclass(frozen=True)
class Encoded:
    """The samples of a data set, and how many rows were too long and left out."""

    samples: tuple[Sample, ...]
    num_dropped: int
    num_cut: int = 0
    """Samples that are only the beginning of their row."""
    num_unanswered: int = 0
    """Rows left out since nothing of the answer was left after cutting."""

    @property
    def num_rows(self) -> int:
        """How many rows there were, those left out included."""
        return len(self.samples) + self.num_dropped + self.num_unanswered


def encode_rows(
    model: LanguageModel,
    rows: Sequence[Row],
    *,
    template: Template,
    max_length: int,
    long_rows: LongRows,
    source: str,
    most_unanswered: float = 1.0,
    held_out: Encoded | None = None,
) -> Encoded:
    """Tokenise rows of any form; `source` names where they are from in error messages.

    Args:
        model: whose tokenizer is used.
        rows: what to tokenise.
        template: how `{input, output}` rows are written.
        max_length: longest sample in tokens.
        long_rows: what happens to longer ones.
        source: a file or a task.
        most_unanswered: largest share of answers that cutting may lose wholly.
        held_out: what can be used of rows that were held out of these, in that share too.

    Raises:
        TaskError: if there is no row, if all are left out, if cutting leaves nothing of more than
            the share `most_unanswered` of answers, or as `encode_usable` does.
    """
    if not rows:
        raise TaskError(
            f"{source}: there is no row to tune on; give a file or a task with examples"
        )
    encoded = encode_usable(
        model, rows, template=template, max_length=max_length, long_rows=long_rows, source=source
    )
    parts = [encoded] if held_out is None else [encoded, held_out]
    num_rows = sum(part.num_rows for part in parts)
    num_unanswered = sum(part.num_unanswered for part in parts)
    if num_unanswered > most_unanswered * num_rows:
        raise TaskError(
            f"{source}: cut to max_length {max_length}, {num_unanswered} of {num_rows} rows have "
            f"no token of their answer left, more than most_unanswered {most_unanswered:g};\n"
            "raise max_length, or give shorter questions"
        )
    if not encoded.samples:
        raise TaskError(
            f"{source}: all {len(rows)} rows have more tokens than max_length {max_length}; raise "
            "it, or set long_rows=cut to keep their beginnings"
        )
    return encoded


def encode_usable(
    model: LanguageModel,
    rows: Sequence[Row],
    *,
    template: Template,
    max_length: int,
    long_rows: LongRows,
    source: str,
) -> Encoded:
    """Tokenise the rows that can be used, however few they are.

    Raises:
        TaskError: if a row is longer than `max_length` tokens and `long_rows` is `error`, or if a
            conversation does not fit the chat template.
    """
    samples: list[Sample] = []
    num_dropped = num_cut = num_unanswered = 0
    for row in rows:
        # Rows were shuffled and some held out, so that no line number would be right.
        where = f"{source}: row {_opening(row)!r}"
        sample = encode_row(model, row, template, where=where)
        if len(sample.ids) <= max_length:
            samples.append(sample)
            continue
        if long_rows == "error":
            raise TaskError(
                f"{where} has {len(sample.ids)} tokens, {len(sample.ids) - max_length} more than "
                f"max_length {max_length};\nraise max_length (up to the model's context, "
                f"{model.context_length}), or set long_rows=drop to leave such rows out"
            )
        left = tuple(position for position in sample.read if position < max_length - 1)
        if long_rows == "drop":
            num_dropped += 1
        elif not left:
            num_unanswered += 1
        else:
            num_cut += 1
            samples.append(Sample(sample.ids[:max_length], left))
    return Encoded(tuple(samples), num_dropped, num_cut, num_unanswered)


def encode_row(model: LanguageModel, row: Row, template: Template, *, where: str) -> Sample:
    """Tokenise one row; `where` names it in error messages.

    Raises:
        TaskError: if nothing in the row can be learned, or it does not fit the chat template.
    """
    match row:
        case Example():
            return encode_few_shot(model, template, [], row)
        case PromptRow(prompt, completion):
            return _encode_completion(model, prompt, completion)
        case MessagesRow(messages):
            return _encode_conversation(model, messages, where)
        case TextRow(text):
            ids = (*model.encode(text), *_end_of_text(model))
            if len(ids) < 2:
                raise TaskError(f"{where}: text {text!r} is one token; there is nothing to predict")
            return Sample(ids, tuple(range(len(ids) - 1)))
        case _:
            assert_never(row)


def encode_few_shot(
    model: LanguageModel, template: Template, demonstrations: Sequence[Example], query: Example
) -> Sample:
    """Tokenise demonstrations and a query; only the query's answer and its end are learned."""
    context = template.context(demonstrations, query)
    return _encode_answer(model, context, template.continuation(query.output))


def encode_demonstrations(
    model: LanguageModel,
    template: Template,
    shown: Sequence[Example],
    positions: Literal["answers", "all"],
) -> Sample:
    """Tokenise a list of worked examples, to be read at the tokens of every answer and its end.

    The spans are found as answers are split off when measured: by the length of what precedes
    them, tokenised alone.

    Args:
        model: whose tokenizer is used.
        template: how the examples are written.
        shown: the worked examples.
        positions: `all` reads every position instead.
    """
    if positions == "all":
        ids = model.encode(template.shared_prefix(shown))
        return Sample(tuple(ids), tuple(range(len(ids) - 1)))
    # One more question follows, since some tokenizers join newlines at the end of a text only.
    ids = model.encode(template.context(shown, shown[0]))
    read: set[int] = set()
    for index, example in enumerate(shown):
        question = template.context(shown[:index], example)
        answered = question + template.continuation(example.output)
        start, end = len(model.encode(question)), len(model.encode(answered))
        # Token j is predicted at position j - 1; token `end` opens the separator.
        read.update(range(max(start - 1, 0), end))
    return Sample(tuple(ids[: max(read) + 2]), tuple(sorted(read)))


def slide_few_shot(
    model: LanguageModel,
    template: Template,
    examples: Sequence[Example],
    shots: int,
    generator: np.random.Generator,
    learned: Literal["last", "every"] = "last",
) -> list[Sample]:
    """Build few-shot samples by sliding a window over shuffled examples: `shots`, then a query.

    Every example is the query once. Its answer is learned, or every answer of the sample.

    Raises:
        TaskError: if there are no more examples than shots.
    """
    if len(examples) <= shots:
        raise TaskError(
            f"{len(examples)} examples are too few for prompts of {shots} demonstrations "
            "and a query; lower `shots`, or give more"
        )
    shuffled = [examples[int(index)] for index in generator.permutation(len(examples))]
    wrapped = shuffled + shuffled[:shots]
    windows = [wrapped[i : i + shots + 1] for i in range(len(shuffled))]
    return [encode_window(model, template, window, learned) for window in windows]


def encode_window(
    model: LanguageModel,
    template: Template,
    window: Sequence[Example],
    learned: Literal["last", "every"],
) -> Sample:
    """Tokenise demonstrations and a query, of which the last answer or every answer is learned."""
    if learned == "every":
        return encode_demonstrations(model, template, window, "answers")
    return encode_few_shot(model, template, window[:-1], window[-1])


def hold_out(
    rows: Sequence[Row], *, share: float, seed: int, source: str = "the data"
) -> tuple[list[Row], list[Row]]:
    """Split rows into those to train on and at least one held out, both in their old order.

    Rows that ask the same thing stay together, unless each question has more rows than are held
    out: then these are single rows.

    Args:
        rows: two at least.
        share: how much of them is held out, about.
        seed: of the draw.
        source: where the rows are from, for the error message.

    Raises:
        TaskError: if there are fewer than two rows.
    """
    if len(rows) < 2:
        raise TaskError(
            f"{source}: 1 row is too few, since one is learned and another held out to judge what "
            "was learned; give at least two, better some twenty"
        )
    alike: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault(_question(row), []).append(index)
    groups = list(alike.values())
    count = max(1, round(share * len(rows)))
    if min(map(len, groups)) > count:
        groups = [[index] for index in range(len(rows))]
    held: set[int] = set()
    for place in np.random.default_rng(seed).permutation(len(groups)):
        if len(held) + len(groups[place]) <= count:
            held.update(groups[place])
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [row for index, row in enumerate(rows) if index in held]


def _question(row: Row) -> Hashable:
    """Return what a row asks, up to case and outer spaces."""
    match row:
        case Example():
            return row.input.strip().casefold()
        case PromptRow():
            return row.prompt.strip().casefold()
        case MessagesRow():
            return tuple(message.content.strip().casefold() for message in row.messages[:-1])
        case TextRow():
            return row.text.strip().casefold()
        case _:
            assert_never(row)


def _opening(row: Row) -> str:
    match row:
        case Example():
            text = row.input
        case PromptRow():
            text = row.prompt
        case MessagesRow():
            text = row.messages[0].content
        case TextRow():
            text = row.text
        case _:
            assert_never(row)
    return text[:40]


def _encode_answer(model: LanguageModel, context: str, completion: str) -> Sample:
    ended = completion if completion.endswith("\n") else completion + "\n"
    before, answer = model.encode_answer(context, ended)
    start = max(len(before), 1)
    ids = (*before, *answer)
    return Sample(ids, tuple(range(start - 1, len(ids) - 1)))


def _encode_completion(model: LanguageModel, prompt: str, completion: str) -> Sample:
    """Tokenise a prompt and what follows it, which may hold newlines and ends in EOS."""
    end = _end_of_text(model)
    if not end:
        return _encode_answer(model, prompt, completion)
    before, answer = model.encode_answer(prompt, completion)
    ids = (*before, *answer, *end)
    return Sample(ids, tuple(range(max(len(before), 1) - 1, len(ids) - 1)))


_REMEDIES: dict[Role, str] = {
    "system": "put what the system says into the user's first turn",
    "user": "let user and assistant speak in turn",
    "assistant": "let the user speak first",
}
"""What may help where a template refuses a conversation that begins with this role."""


def _encode_conversation(model: LanguageModel, messages: Sequence[Message], where: str) -> Sample:
    """Render with the chat template; the assistant's turns are what follows their openings."""
    tokenizer: Any = model.tokenizer
    if tokenizer.chat_template is None:
        raise TaskError(
            f"{where}: holds messages, but the tokenizer of {model.reference!r} has no chat "
            "template; give prompt and completion instead, or take an instruct model"
        )

    turns = [{"role": message.role, "content": message.content} for message in messages]
    template = f"{where}: the chat template of {model.reference!r}"

    def render(count: int, *, opened: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                turns[:count], tokenize=False, add_generation_prompt=opened
            )
        # transformers itself refuses to render no turns at all.
        except (TemplateError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            reason, remedy = str(error).rstrip("."), _REMEDIES[messages[0].role]
            raise TaskError(
                f"{template} refuses turns of {roles}: {reason};\n{remedy}, or give prompt and "
                "completion instead"
            ) from error

    # The template writes its own special tokens.
    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = render(len(turns), opened=False)
    ids = tokenize(whole)
    read: list[int] = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        opening, turn = render(index, opened=True), render(index + 1, opened=False)
        if not (whole.startswith(turn) and turn.startswith(opening)):
            before = render(index, opened=False) if index else ""
            fault = "rewrites earlier turns"
            if whole.startswith(turn) and turn.startswith(before):
                fault = (
                    f"asks for an answer with {opening.removeprefix(before)!r}, and writes "
                    "answers that were given without it"
                )
            raise TaskError(
                f"{template} {fault}, so the assistant's words cannot be told apart; give prompt "
                "and completion instead"
            )
        start, end = (len(tokenize(text)) for text in (opening, turn))
        read.extend(range(start - 1, end - 1))
    if not read:
        raise TaskError(f"{where}: the assistant says nothing, so there is nothing to learn")
    return Sample(tuple(ids), tuple(read))


def _end_of_text(model: LanguageModel) -> tuple[int, ...]:
    token: Any = model.tokenizer.eos_token_id
    return () if token is None else (token,)

"""Anchor prompts that the untuned model writes itself: lists of questions with its own answers.

Nothing but the model is needed. Each list is written line by line in the shape of a few-shot
prompt: a question is sampled after the examples so far, and answered greedily under them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example, Template
from keepshot.tasks.task import Task
from keepshot.tuning.keep import OWN
from keepshot.tuning.live import evaluating

MOST_TOKENS = 16
"""Longest question and longest answer; longer ones are ended there."""
NUM_LISTS, LENGTH, SHORTEST = 32, 6, 3
"""Lists that are written, examples in each, and how many one has at least that is of use."""
LISTS_AT_ONCE = 16


def write_tasks(
    model: LanguageModel, seed: int, *, count: int = NUM_LISTS, length: int = LENGTH
) -> list[Task]:
    """Let the model write `count` lists of `length` worked examples, each returned as a task.

    Args:
        model: the untuned model.
        seed: of the sampling.
        count: how many lists.
        length: examples in each; those of which no line came are left out.

    Raises:
        ConfigError: if the model writes nothing of that shape.
    """
    shape = Template()
    before_input = shape.question.partition("{input}")[0]
    generator = torch.Generator().manual_seed(
        int(np.random.default_rng([seed, 23]).integers(2**31))
    )
    lists: list[list[Example]] = [[] for _ in range(count)]
    with evaluating(model.module), torch.no_grad():
        for _ in range(length):
            asked = [shape.shared_prefix(shown) + before_input for shown in lists]
            questions = _lines(model, asked, generator)
            opened = [
                shape.context(shown, Example(question, ""))
                for shown, question in zip(lists, questions, strict=True)
            ]
            answers = _lines(model, opened, None)
            for shown, question, answer in zip(lists, questions, answers, strict=True):
                if question and answer:
                    shown.append(Example(question, answer))
    whole = [shown for shown in lists if len(shown) >= SHORTEST]
    if not whole:
        raise ConfigError(
            f"tasks: {OWN!r}: {model.reference!r} writes no list of questions and answers; "
            "name tasks or a file"
        )
    return [
        Task(f"{OWN}-{number}", "exact", 1, "own", "written by the model", tuple(shown), (), ())
        for number, shown in enumerate(whole)
    ]


def _lines(
    model: LanguageModel, texts: Sequence[str], generator: torch.Generator | None
) -> list[str]:
    """Continue every text to the end of its line; drawn from the model, or greedily without."""
    found: list[str] = []
    for start in range(0, len(texts), LISTS_AT_ONCE):
        rows = [model.encode(text.rstrip(" ")) for text in texts[start : start + LISTS_AT_ONCE]]
        found += _continue(model, rows, generator)
    return found


def _continue(
    model: LanguageModel, rows: list[list[int]], generator: torch.Generator | None
) -> list[str]:
    module: Any = model.module
    width = max(map(len, rows))
    ids_BT = torch.zeros((len(rows), width), dtype=torch.long, device=model.device)
    mask_BT = torch.zeros_like(ids_BT)
    for number, row in enumerate(rows):
        ids_BT[number, width - len(row) :] = torch.tensor(row)
        mask_BT[number, width - len(row) :] = 1
    written: list[list[int]] = [[] for _ in rows]
    cache: Any = None
    fed_BT = ids_BT
    while len(written[0]) < MOST_TOKENS:
        places_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -fed_BT.shape[1] :]
        out = module(
            input_ids=fed_BT, attention_mask=mask_BT, position_ids=places_BT,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = out.past_key_values
        chosen_B = _choose(out.logits[:, -1].float().cpu(), generator)
        for row, token in zip(written, chosen_B.tolist(), strict=True):
            row.append(token)
        fed_BT = chosen_B[:, None].to(ids_BT.device)
        mask_BT = torch.cat([mask_BT, torch.ones_like(fed_BT)], dim=1)
    return [_first_line(model, row) for row in written]


def _choose(logits_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return logits_BV.argmax(dim=1)
    return torch.multinomial(logits_BV.softmax(dim=1), 1, generator=generator)[:, 0]


def _first_line(model: LanguageModel, row: list[int]) -> str:
    ends = [number for number, token in enumerate(row) if token in model.eos_ids]
    text = model.decode(row[: ends[0]] if ends else row)
    return text.lstrip(" ").partition("\n")[0].strip()

"""Free answers to choice questions, judged by which choice they are most like (arXiv 2501.08716).

Alike is the F1 of greedy token matching, as in BERTScore (arXiv 1904.09675, equations 1 to 3,
without weights or rescaling), between the last hidden states of any model. Those of a causal model
see only what stands before, so figures are not those of the encoder that the paper takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from keepshot.models.loading import LanguageModel
from keepshot.records import ItemResult

Embed = Callable[[str], NDArray[np.float32]]
"""Text to the vectors of its tokens, [tokens, width]."""


def likeness(first_TD: NDArray[np.float32], second_TD: NDArray[np.float32]) -> float:
    """Return the F1 of matching each token with the nearest of the other text, by cosine.

    Args:
        first_TD: vectors of one text's tokens, [tokens, width]; may have none.
        second_TD: of the other's.
    """
    if not len(first_TD) or not len(second_TD):
        return 0.0
    cosines = _unit(first_TD) @ _unit(second_TD).T
    precision, recall = cosines.max(axis=1).mean(), cosines.max(axis=0).mean()
    total = float(precision + recall)
    return 0.0 if abs(total) < 1e-12 else float(2.0 * precision * recall / total)


def nearest_choice(answer: str, choices: Sequence[str], embed: Embed) -> str:
    """Return the choice that an answer is most like; the first of equals."""
    said = embed(answer.strip())
    return choices[int(np.argmax([likeness(said, embed(choice)) for choice in choices]))]


def judge_by_likeness(
    rows: Sequence[ItemResult], choices: Mapping[tuple[str, str], Sequence[str]], embed: Embed
) -> list[ItemResult]:
    """Return rows of free answers as rows of the choices they are most like.

    An empty answer is like none, and stays wrong. Whether the format was kept is left as it was.

    Args:
        rows: with what the model said as `answer`.
        choices: of each question, by task and item; rows of other tasks are left alone.
        embed: gives the vectors; asked once for a text.
    """
    known: dict[str, NDArray[np.float32]] = {}

    def once(text: str) -> NDArray[np.float32]:
        if text not in known:
            known[text] = embed(text)
        return known[text]

    found: list[ItemResult] = []
    for row in rows:
        given = choices.get((row.task, row.item))
        if given is None:
            found.append(row)
            continue
        chosen = nearest_choice(row.answer, given, once) if row.answer.strip() else ""
        correct = float(chosen == row.gold)
        found.append(replace(row, answer=chosen, choices=list(given), correct=correct))
    return found


def embedder(model: LanguageModel) -> Embed:
    """Return what embeds texts by the last hidden states of a model, its BOS left out."""

    def embed(text: str) -> NDArray[np.float32]:
        ids = model.encode(text)
        module: Any = model.module
        device = next(module.parameters()).device
        with torch.inference_mode():
            states = module(
                input_ids=torch.tensor([ids], device=device), output_hidden_states=True
            ).hidden_states[-1][0]
        return states[len(model.bos_ids) :].float().cpu().numpy()

    return embed


def _unit(vectors_TD: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors_TD / np.maximum(np.linalg.norm(vectors_TD, axis=1, keepdims=True), 1e-12)

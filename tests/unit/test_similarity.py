"""Free answers as the choice they are most like: the formula, and rows judged by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from keepshot.models.loading import LanguageModel
from keepshot.records import ItemResult
from keepshot.scoring.similarity import embedder, judge_by_likeness, likeness, nearest_choice


def by_hand(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """The same in loops."""

    def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
        return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))

    precision = sum(max(cosine(a, b) for b in second) for a in first) / len(first)
    recall = sum(max(cosine(a, b) for a in first) for b in second) / len(second)
    return 2 * precision * recall / (precision + recall)


def test_the_formula() -> None:
    generator = np.random.default_rng(0)
    for tokens in ((1, 1), (2, 5), (7, 3)):
        first, second = (generator.normal(size=(n, 8)).astype(np.float32) + 1 for n in tokens)
        assert likeness(first, second) == pytest.approx(by_hand(first, second), abs=1e-6)
        assert likeness(first, second) == pytest.approx(likeness(second, first), abs=1e-6)
        assert likeness(first, 3 * first) == pytest.approx(1.0, abs=1e-6)
    # Two of three tokens have their like: precision 2/3, recall 1.
    axes = np.eye(4, dtype=np.float32)
    assert likeness(axes[:3], axes[:2]) == pytest.approx(0.8)
    assert likeness(axes[:0], axes[:2]) == 0.0


def letters(text: str) -> NDArray[np.float32]:
    return np.eye(128, dtype=np.float32)[[ord(letter) for letter in text]]


def row(answer: str, gold: str, task: str = "t") -> ItemResult:
    return ItemResult(
        arm="a", model="m", lam=None, task=task, split="test", shots=0, seed=0, item="i",
        question="q", gold=gold, answer=answer, choices=[], log_likelihoods=[], correct=0.0,
        correct_per_character=None, format_failure=1.0, label_leakage=0.0,
    )  # fmt: skip


def test_the_nearest_choice_is_taken() -> None:
    assert nearest_choice(" redd ", ("blue", "red"), letters) == "red"
    choices = {("t", "i"): ("blue", "red")}
    rows = [row("reddish", "red"), row("bleu", "red"), row("", "red"), row("red", "red", "other")]
    found = judge_by_likeness(rows, choices, letters)
    assert [one.answer for one in found] == ["red", "blue", "", "red"]
    assert [one.correct for one in found] == [1.0, 0.0, 0.0, 0.0]
    assert [len(one.choices) for one in found] == [2, 2, 2, 0]
    assert all(one.format_failure == 1.0 for one in found), "the format is judged elsewhere"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_s_states_without_its_first_token(
    pico_models: dict[str, LanguageModel], family: str
) -> None:
    """One vector a character, BOS left out, as transformers itself computes them."""
    model = pico_models[family]
    found = embedder(model)("two red")
    ids = torch.tensor([model.encode("two red")])
    with torch.inference_mode():
        expected = model.module.model(input_ids=ids).last_hidden_state[0]  # type: ignore[operator]
    assert found.shape == (7, 32)
    np.testing.assert_allclose(found, expected[-7:].numpy(), atol=1e-5)

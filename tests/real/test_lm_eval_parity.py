"""Our scores against lm-evaluation-harness' own `hf` backend, on the same strings."""

from __future__ import annotations

import math
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from keepshot.assets import AssetStore
from keepshot.models.loading import LanguageModel, load
from keepshot.scoring.engine import Engine
from keepshot.scoring.evaluate import Plan, measure
from keepshot.scoring.request import (
    GreedyMatch,
    GreedyMatchResult,
    LogLikelihood,
    LogLikelihoodResult,
)
from keepshot.tasks.catalog import load_task
from keepshot.tasks.task import Task

NUM_ITEMS, SHOTS, SEED = 12, 4, 0

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2(store: AssetStore) -> LanguageModel:
    return load("smollm2-135m-instruct", store)


@pytest.fixture(scope="module")
def harness(smollm2: LanguageModel) -> Any:
    backend: Any = HFLM
    return backend(pretrained=smollm2.module, tokenizer=smollm2.tokenizer, batch_size=8)


def strings(task: Task) -> list[tuple[str, str]]:
    """Every (context, continuation) of the first items, choices in order."""
    demonstrations = task.draw(SHOTS, SEED)
    return [
        (task.template.context(demonstrations, example), task.template.continuation(choice))
        for example in task.test[:NUM_ITEMS]
        for choice in example.choices or (example.output,)
    ]


def encoded(model: LanguageModel, pair: tuple[str, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    context, continuation = model.encode_pair(*pair)
    return tuple(context), tuple(continuation)


def harness_scores(harness: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]
    return harness.loglikelihood(instances, disable_tqdm=True)


@pytest.mark.parametrize("name", ["word-feeling", "english-french", "sentence-topic"])
def test_choice_task_agrees_with_lm_eval(
    smollm2: LanguageModel, harness: Any, store: AssetStore, name: str
) -> None:
    task = load_task(name, store)
    pairs = strings(task)
    reference = harness_scores(harness, pairs)
    requests = [LogLikelihood(*encoded(smollm2, pair)) for pair in pairs]
    for result, (log_likelihood, is_greedy) in zip(
        Engine(smollm2).run(requests), reference, strict=True
    ):
        assert isinstance(result, LogLikelihoodResult)
        assert result.log_likelihood == pytest.approx(log_likelihood, abs=1e-3)
        assert result.is_greedy == is_greedy
    plan = Plan((task,), (SHOTS,), (SEED,), limit=NUM_ITEMS)
    rows = measure(smollm2, plan, arm="a").items
    scores = iter(log_likelihood for log_likelihood, _ in reference)
    for example, row in zip(task.test[:NUM_ITEMS], rows, strict=True):
        choices = example.choices
        assert choices
        theirs = [next(scores) for _ in choices]
        assert row.correct == float(choices[theirs.index(max(theirs))] == example.output)
    assert 0 < math.fsum(row.correct for row in rows) <= NUM_ITEMS


@pytest.mark.parametrize("name", ["country-capital", "past-tense"])
def test_exact_task_agrees_with_lm_eval(
    smollm2: LanguageModel, harness: Any, store: AssetStore, name: str
) -> None:
    task = load_task(name, store)
    pairs = strings(task)
    with_newline = [(context, answer + "\n") for context, answer in pairs]
    reference = harness_scores(harness, with_newline)
    requests = [GreedyMatch(*encoded(smollm2, pair)) for pair in pairs]
    for result, (_, is_greedy) in zip(Engine(smollm2).run(requests), reference, strict=True):
        assert isinstance(result, GreedyMatchResult)
        assert result.correct == is_greedy

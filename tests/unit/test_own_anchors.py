"""Anchors that the untuned model writes itself, against transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from keepshot.errors import ConfigError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example, Template
from keepshot.tuning.keep import KL
from keepshot.tuning.method_specs import LoRA
from keepshot.tuning.own_anchors import MOST_TOKENS, write_tasks
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.train import train

Build = Callable[..., LanguageModel]
ROWS = [Example(word, word[0].upper()) for word in ("fig", "pea", "oat", "rye", "nut", "yam")]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_every_answer_is_the_models_own(family: str, fresh_pico: Build):
    model = fresh_pico(family)
    tasks = write_tasks(model, 0, count=5, length=4)
    assert [task.name for task in tasks] == [f"self-{n}" for n in range(len(tasks))]
    assert write_tasks(model, 0, count=5, length=4) == tasks
    if family != "gemma3":  # a random one of this size has one answer to everything
        assert write_tasks(model, 1, count=5, length=4) != tasks
    module: Any = model.module
    for task in tasks[:2]:
        shown = task.demonstrations
        for number, example in enumerate(shown):
            context = Template().context(shown[:number], Example(example.input, ""))
            ids = torch.tensor([model.encode(context)])
            with torch.no_grad():
                written = module.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST_TOKENS,
                    do_sample=False, pad_token_id=2,
                )  # fmt: skip
            text = model.decode([t for t in written[0, ids.shape[1] :].tolist() if t > 2])
            assert text.lstrip(" ").partition("\n")[0].strip() == example.output


def test_a_term_draws_from_them_without_any_task(fresh_pico: Build, monkeypatch: Any):
    monkeypatch.setattr("keepshot.tuning.own_anchors.NUM_LISTS", 4)
    model = fresh_pico("llama")
    term = KL(tasks="self", prompts=8, prompts_per_step=2, shots=(2, 3))
    recipe = Recipe(data="x", method=LoRA(rank=2), keep=(term,), steps=2, batch_size=4)
    record = train(recipe, model, ROWS, None)
    assert abs(record.losses[0]["kl"]) < 1e-4
    assert record.sources[-1].samples == 8


def test_a_model_that_writes_no_line_is_told_of(fresh_pico: Build):
    model = fresh_pico("llama")
    with torch.no_grad():
        head: Any = model.module.get_output_embeddings()
        head.weight.zero_()
    # All logits are alike, so that every answer begins with <s>, which is no text.
    with pytest.raises(ConfigError, match="writes no list of questions and answers"):
        write_tasks(model, 0, count=2, length=3)

"""The divergence from the untuned model, beside what plain softmaxes give."""

from __future__ import annotations

import pytest
import torch

from keepshot.errors import ConfigError
from keepshot.tuning.drift import READ, Drift, few_shot_prompts, questions
from keepshot.tuning.live import named_tasks
from pico import pico_model


def test_nothing_moved_and_something_moved() -> None:
    model = pico_model("llama")
    (task,) = named_tasks("addition")
    prompts = questions(model, task)
    drift = Drift(model, prompts)
    assert len(prompts) == READ.prompts
    # The cache is in float32, and no token is left out of so small a vocabulary.
    assert drift.read(model) == pytest.approx([0.0] * len(prompts), abs=1e-6)
    before = [log_probs(model, prompt) for prompt in prompts]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.module.parameters():
            weights += 0.02 * torch.randn(weights.shape, generator=generator)
    after = [log_probs(model, prompt) for prompt in prompts]
    expected = [
        float((old.exp() * (old - new)).sum(dim=-1).mean())
        for old, new in zip(before, after, strict=True)
    ]
    assert min(expected) > 0.0
    assert sorted(drift.read(model)) == pytest.approx(sorted(expected), rel=1e-3)


def log_probs(model, prompt):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        logits = model.module(torch.tensor([prompt.ids])).logits[0, list(prompt.read)]
    return torch.log_softmax(logits.double(), dim=-1)


def test_reading_leaves_a_model_as_it_was() -> None:
    model = pico_model("llama")
    model.module.train()
    weights = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    drift = Drift(model, few_shot_prompts(model, named_tasks("guard")))
    assert len(drift.read(model)) == READ.prompts
    assert model.module.training
    assert all(parameter.grad is None for parameter in model.module.parameters())
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_a_context_that_is_too_short_is_said() -> None:
    model = pico_model("llama")
    model.module.config.max_position_embeddings = 16
    with pytest.raises(ConfigError, match="gives no prompt of 2 demonstrations"):
        few_shot_prompts(model, named_tasks("guard"))

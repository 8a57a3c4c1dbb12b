"""Tuning the real small model: a few steps, what they change, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from keepshot.assets import AssetStore
from keepshot.errors import ModelError
from keepshot.models.loading import LanguageModel, load
from keepshot.prompts import Template
from keepshot.tasks.catalog import load_task, resolve_tasks
from keepshot.tuning.adapters import detach_
from keepshot.tuning.data import encode_demonstrations, encode_few_shot
from keepshot.tuning.keep import KL
from keepshot.tuning.method_specs import Full, LoRA, ValueOnly
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.train import train

pytestmark = pytest.mark.real
NAME = "smollm2-135m-instruct"


def recipe(**settings: object) -> Recipe:
    return Recipe.model_validate({"data": "support", "batch_size": 8, "steps": 5, **settings})


def logits(model: LanguageModel) -> torch.Tensor:
    ids = torch.tensor([model.encode("Q: Peru\nA: Lima\n\nQ: Chile\nA:")])
    with torch.no_grad():
        return model.module(input_ids=ids).logits[0, -1]


def test_an_adapter_is_trained_written_and_loaded_again(store: AssetStore, tmp_path: Path):
    model = load(NAME, store)
    untuned = logits(model)
    target, anchors = load_task("support", store), resolve_tasks(["anchors"], store)
    keep = (KL(prompts=8, shots=(2, 3)),)
    record = train(
        recipe(method=LoRA(), keep=keep, learning_rate=1e-3, warmup=0.0, scheduler="constant"),
        model,
        target.train,
        tmp_path,
        anchors=anchors,
    )
    # 30 blocks of q, o (576 x 576), k, v (576 x 192), gate, up and down (576 x 1536), rank 16.
    assert record.num_trainable == 30 * 16 * (2 * 1152 + 2 * 768 + 3 * 2112)
    first, last = record.losses[0], record.losses[-1]
    assert abs(first["kl"]) < 1e-4
    assert last["next_token"] < 0.8 * first["next_token"]
    tuned = logits(model)
    assert not torch.allclose(tuned, untuned, atol=0.05)
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert written == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "keepshot-base.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "tuning.json").read_text())["model_sha256"] == model.sha256
    again = load(str(tmp_path / "adapter"), store)
    assert torch.allclose(logits(again), tuned, atol=2e-3)
    detach_(model.module, merge=False)
    assert torch.equal(logits(model), untuned)


def test_the_adapter_is_refused_on_another_base(store: AssetStore, tmp_path: Path):
    model = load(NAME, store)
    settings = recipe(method=LoRA(rank=2, targets="query-value"), steps=1)
    train(settings, model, load_task("support", store).train, tmp_path)
    place = tmp_path / "adapter" / "keepshot-base.json"
    place.write_text(place.read_text().replace(model.sha256, "0" * 64), encoding="utf-8")
    with pytest.raises(ModelError, match="was trained on"):
        load(str(tmp_path / "adapter"), store)


@pytest.mark.parametrize("method", [Full(), ValueOnly()], ids=lambda method: method.name)
def test_the_loss_falls_within_a_few_steps(method: object, store: AssetStore):
    model = load(NAME, store)
    settings = recipe(method=method, learning_rate=1e-3, warmup=0.0)
    record = train(settings, model, load_task("support", store).train, None)
    assert record.losses[-1]["loss"] < 0.7 * record.losses[0]["loss"]


def test_training_and_measuring_tokenise_alike(store: AssetStore):
    model, template = load(NAME, store), Template()
    examples = load_task("support", store).train[:8]
    for example in examples:
        sample = encode_few_shot(model, template, [], example)
        context, answer = model.encode_pair(
            template.context([], example), template.continuation(example.output)
        )
        assert list(sample.ids[:-1]) == context + answer
        assert model.ends_answer(sample.ids[-1])
    shown = encode_demonstrations(model, template, examples, "answers")
    expected = "".join(template.continuation(example.output) + "\n" for example in examples)
    assert model.decode(shown.targets) == expected

"""What holds for every pico family, and that the lists of contract cases are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from cases import FAMILIES, METHODS, TASKS, TERMS
from keepshot.assets import AssetStore
from keepshot.models.anatomy import anatomy
from keepshot.models.loading import LanguageModel, load, outline, save
from keepshot.scoring.evaluate import Plan, check_prompts, measure
from keepshot.tasks.catalog import CATALOG, load_task
from keepshot.tuning import keep, method_specs
from pico import PICO_CONFIGS

Build = Callable[..., LanguageModel]
IDS = torch.arange(3, 60).reshape(1, -1)


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.module(input_ids=IDS).logits


def test_lists_are_whole() -> None:
    def members(union: object) -> set[type]:
        return set(get_args(get_args(union)[0]))

    assert {type(method) for method in METHODS} == members(method_specs.Method)
    assert {type(term) for term in TERMS} == members(keep.Term)
    assert list(dict.fromkeys(method.name for method in METHODS)) == list(method_specs.METHODS)
    assert [term.name for term in TERMS] == list(keep.TERMS)
    assert list(CATALOG) == TASKS
    assert list(PICO_CONFIGS) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_is_the_same_model(family: str, fresh_pico: Build, tmp_path: Path) -> None:
    model = fresh_pico(family)
    save(model, tmp_path / "saved")
    store = AssetStore(tmp_path / "cache")
    loaded = load(str(tmp_path / "saved"), store)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.num_parameters == model.num_parameters
    assert loaded.encode("Q: a\nA:") == model.encode("Q: a\nA:")
    light = outline(str(tmp_path / "saved"), store)
    assert light.sha256 == loaded.sha256
    assert light.num_parameters == loaded.num_parameters
    assert light.context_length == loaded.context_length
    assert light.encode("Q: a\nA:") == loaded.encode("Q: a\nA:")


@pytest.mark.parametrize("family", FAMILIES)
def test_anatomy_names_every_attention_weight_once(family: str, fresh_pico: Build) -> None:
    module = fresh_pico(family).module
    weights = dict(module.named_parameters())
    blocks = anatomy(module).blocks
    assert len(blocks) == module.config.num_hidden_layers
    for block in blocks:
        parts = [block.query, block.key, block.value]
        sizes = [part.of(weights[part.parameter]).numel() for part in parts]
        stored = {part.parameter: weights[part.parameter].numel() for part in parts}
        assert sum(sizes) == sum(stored.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_measured_and_its_prompts_checked(family: str, fresh_pico: Build) -> None:
    model = fresh_pico(family)
    plan = Plan((load_task("addition", None),), (0, 2), (0,), limit=3)  # type: ignore[arg-type]
    check_prompts(model, plan)
    first, again = (measure(model, plan, arm="a").items for _ in range(2))
    assert first == again
    assert [row.shots for row in first] == [0, 0, 0, 2, 2, 2]

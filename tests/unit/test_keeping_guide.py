"""The examples of docs/guide/keeping.md run as they stand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from keepshot.models.loading import LanguageModel
from keepshot.tuning.recipe import Recipe

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "keeping.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)


def trainer(model: LanguageModel, place: Path) -> Any:
    tokenizer: Any = model.tokenizer
    ids = tokenizer("Q: fig\nA: F\n")["input_ids"]
    return Trainer(
        model=model.module,
        args=TrainingArguments(
            output_dir=str(place), max_steps=2, use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, logging_steps=1,
        ),
        train_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids}] * 8),
        processing_class=tokenizer,
    )  # fmt: skip


def test_the_recipe_is_one():
    (text,) = blocks("yaml")
    content = {"data": "my.jsonl", **yaml.safe_load(text)}
    recipe = Recipe.from_mapping(content, source="guide")
    assert [term.name for term in recipe.keep] == ["mix"]


def test_three_lines_are_enough(fresh_pico: Callable[..., LanguageModel], tmp_path: Path):
    joining, guarding = blocks("python")
    names: dict[str, Any] = {"trainer": trainer(fresh_pico("llama"), tmp_path)}
    exec(joining, names)
    logged = [row for row in names["trainer"].state.log_history if "keep/kl" in row]
    assert len(logged) == 2
    names = {"trainer": trainer(fresh_pico("llama"), tmp_path)}
    exec(guarding, names)
    assert names["guard"] in names["trainer"].callback_handler.callbacks
    for block in (joining, guarding):
        assert len([line for line in block.splitlines() if line]) == 3

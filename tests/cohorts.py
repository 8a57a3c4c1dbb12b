"""A made study's rows: models whose ability is known, asked tasks whose difficulty is known.

Every model has an ability, every task a difficulty, every item luck of its own that all models
share; a tuned model's ability is `slope` of its base's and something of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


def made_items(
    num_models: int = 90,
    num_tasks: int = 24,
    num_items: int = 16,
    *,
    families: int = 10,
    draws: int = 3,
    slope: float = 0.8,
    own: float = 0.3,
    degraded: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """Return rows as `item_frame` returns: bases direct and gold, tuned direct and gold.

    Args:
        num_models: bases, each of which is tuned once, by one of two recipes.
        num_tasks: named task-00, task-01, ...
        num_items: of each task.
        families: which take turns.
        draws: of demonstrations.
        slope: how much of a base's ability (standard deviation 1) its tuned model has.
        own: standard deviation of what the tuned model has besides.
        degraded: models at the end that are degraded.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    shape = (num_models, num_tasks, num_items)
    family = np.arange(num_models) % families
    ability = rng.normal(0, 0.6, families)[family] + rng.normal(0, 0.8, num_models)
    harm = np.where(np.arange(num_models) >= num_models - degraded, -2.0, 0.0)
    ability = ability + harm
    tuned = slope * ability + rng.normal(0, own, num_models)
    hard = (rng.normal(0, 0.8, num_tasks)[:, None] + rng.normal(0, 0.7, shape[1:])).ravel()
    parts = [("base", "gold", 4, s, ability) for s in range(draws)]
    parts += [("tuned", "gold", 4, s, tuned + 0.2) for s in range(draws)]
    parts += [("base", "direct", 0, 0, ability * 0.1 - 2.5), ("tuned", "direct", 0, 0, tuned)]
    model, task, item = (a.ravel() for a in np.indices(shape))
    frames: list[pd.DataFrame] = []
    for stage, setting, shots, draw, skill in parts:
        chance = 1 / (1 + np.exp(hard[task * num_items + item] - skill[model]))
        frames.append(
            pd.DataFrame(
                {
                    "model": model, "stage": stage, "setting": setting, "shots": shots,
                    "seed": draw, "task": task, "item": item,
                    "correct": (rng.random(len(model)) < chance).astype(float),
                }
            )
        )  # fmt: skip
    return _named(pd.concat(frames, ignore_index=True), family, degraded, num_models, rng)


def _named(
    rows: Any, family: Any, degraded: int, num_models: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Put names in the place of numbers, and the columns that make no difference here."""
    number = rows["model"].to_numpy()
    is_tuned = (rows["stage"] == "tuned").to_numpy()
    sizes = 10 ** rng.uniform(5, 8, num_models)
    recipe = np.where(number % 2, "lora", "full")
    names = {
        "model": [f"model-{n:03d}" for n in range(num_models)],
        "family": [f"family-{n}" for n in family],
        "degraded": [None] * (num_models - degraded) + ["noised"] * degraded,
        "tuned_already": [bool(n % 3 == 0) for n in range(num_models)],
    }
    rows["task"] = pd.Series([f"task-{n:02d}" for n in range(rows["task"].max() + 1)]).loc[
        rows["task"]
    ].to_numpy()  # fmt: skip
    rows["item"] = "i" + rows["item"].astype(str)
    for name, values in names.items():
        rows[name] = np.array(values, dtype=object)[number]
    rows["num_parameters"] = sizes.astype(np.int64)[number]
    rows["recipe"] = np.array(
        [r if t else None for r, t in zip(recipe, is_tuned, strict=True)], object
    )
    rows["target"] = np.array(["compositions" if t else None for t in is_tuned], object)
    rows["tuning_seed"] = np.where(is_tuned, 0.0, np.nan)
    rows["lam"] = np.nan
    constants = {
        "ask": "composed", "split": "test", "is_target": False, "gold": "", "answer": "",
        "format_failure": 0.0, "label_leakage": 0.0, "chance": 0.0, "unit": "ask-0",
    }  # fmt: skip
    return rows.assign(**constants)

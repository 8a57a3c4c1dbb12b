"""What every tuning method and every keep term promises, on pico models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import FAMILIES, METHODS, TERMS
from keepshot.assets import AssetStore
from keepshot.jobs.recipes import describe
from keepshot.models.loading import LanguageModel, load, save
from keepshot.progress import Silent
from keepshot.prompts import Example
from keepshot.tasks.task import Task
from keepshot.tuning.keep import Term, parse_keep
from keepshot.tuning.recipe import (
    Full,
    LoRA,
    Recipe,
    ValueOnly,
    default_learning_rate,
    parse_method,
)
from keepshot.tuning.train import Extra, TuneRecord, train

Build = Callable[..., LanguageModel]
FRUIT = ["apple", "berry", "cherry", "date", "egg", "fig", "grape", "honey", "ice", "jam", "kiwi"]
EXAMPLES = [Example(word, word[0].upper()) for word in FRUIT]
WORDS = ["one", "two", "six", "ten", "red", "blue", "cat", "dog", "sun", "sky", "sea", "tree"]
ANCHOR = Task(
    "upper", "exact", 1, "words", "", tuple(Example(w, w.upper()) for w in WORDS), (), ()
)  # fmt: skip
IDS = torch.arange(3, 60).reshape(1, -1)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
every_keep = pytest.mark.parametrize(
    "keep", [(), *((term,) for term in TERMS), tuple(TERMS)],
    ids=lambda keep: "+".join(term.name for term in keep) or "none",
)  # fmt: skip


def recipe(**settings: Any) -> Recipe:
    return Recipe(**{"data": "x", "steps": 4, "batch_size": 6, "learning_rate": 1e-2, **settings})


def tune(model: LanguageModel, out_dir: Path | None = None, **settings: Any) -> TuneRecord:
    return train(recipe(**settings), model, EXAMPLES, out_dir, anchors=[ANCHOR])


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(weight, second[name]) for name, weight in first.items()
    )


@every_method
def test_it_is_found_by_name_and_listed(method: Any) -> None:
    assert type(parse_method(method.name)) is type(method)
    assert 0 < default_learning_rate(method) < 0.1
    rows = {row["name"]: row for row in describe()}
    assert rows[method.name]["kind"] == "method"
    assert rows[method.name]["description"].endswith(".")


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_a_term_is_found_by_name_and_listed(term: Any) -> None:
    assert [found.name for found in parse_keep(term.name)] == [term.name]
    rows = {row["name"]: row for row in describe()}
    assert rows[term.name]["kind"] == "keep term"


@every_method
def test_the_loss_falls(method: Any, fresh_pico: Build) -> None:
    record = tune(fresh_pico("llama"), method=method, steps=25)
    first, last = record.losses[0], record.losses[-1]
    assert last["loss"] < 0.75 * first["loss"]
    assert [row["step"] for row in record.losses] == list(range(1, 26))


@every_keep
@every_method
def test_the_same_seed_gives_the_same_bits(
    method: Any, keep: tuple[Term, ...], fresh_pico: Build
) -> None:
    models = [fresh_pico("llama"), fresh_pico("llama"), fresh_pico("llama")]
    torch.manual_seed(1)
    first = tune(models[0], method=method, keep=keep)
    torch.manual_seed(2)
    again = tune(models[1], method=method, keep=keep)
    tune(models[2], method=method, keep=keep, seed=1)
    assert first.losses == again.losses
    assert first.keep == [term.name for term in keep]
    assert equal(weights(models[0]), weights(models[1]))
    assert not equal(weights(models[0]), weights(models[2]))


@pytest.mark.parametrize("family", FAMILIES)
@every_method
def test_what_is_written_loads_as_what_was_trained(
    method: Any, family: str, fresh_pico: Build, tmp_path: Path
) -> None:
    store = AssetStore(tmp_path / "cache")
    save(fresh_pico(family), tmp_path / "base")
    model = load(str(tmp_path / "base"), store)
    untuned = model.module(input_ids=IDS).logits
    tune(model, tmp_path / "tuned", method=method)
    tuned = model.module(input_ids=IDS).logits
    assert not torch.allclose(tuned, untuned, atol=1e-3)
    loaded = load(str(tmp_path / "tuned"), store)
    assert torch.allclose(loaded.module(input_ids=IDS).logits, tuned, atol=1e-4)
    pickles = [f for f in (tmp_path / "tuned").rglob("*") if f.suffix in (".bin", ".pt", ".pth")]
    assert pickles == []


@every_method
def test_a_run_that_was_killed_resumes_to_the_same_bits(
    method: Any, fresh_pico: Build, tmp_path: Path
) -> None:
    settings = recipe(method=method, keep=(TERMS[0],), steps=9, save_every=3)
    whole, broken, resumed = (fresh_pico("gpt_neox") for _ in range(3))
    expected = train(settings, whole, EXAMPLES, None, anchors=[ANCHOR])
    state_dir = tmp_path / "state"

    class Stopping(Silent):
        def update(self, done: int, total: int, detail: str = "") -> None:
            if done == 8:
                raise KeyboardInterrupt

    extra = Extra(state_dir=state_dir)
    with pytest.raises(KeyboardInterrupt):
        train(settings, broken, EXAMPLES, None, anchors=[ANCHOR], progress=Stopping(), extra=extra)
    assert [path.name for path in state_dir.glob("checkpoint-*")] == ["checkpoint-6"]
    record = train(settings, resumed, EXAMPLES, None, anchors=[ANCHOR], extra=extra)
    assert record.losses == expected.losses
    assert equal(weights(resumed), weights(whole))
    assert not state_dir.exists()


every_term = pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)


@every_term
def test_a_term_of_no_strength_changes_no_bit(term: Any, fresh_pico: Build) -> None:
    """A weight of 1e-30 is lost in every sum, so that only what a term does besides would show."""
    # A random model's rewritings never agree, which is self-distillation at strength zero.
    weakest: Any = {"mix": None, "stm": {"threshold": 1e30}, "self-distil": {}}.get(
        term.name, {"weight": 1e-30}
    )
    if weakest is None:
        pytest.skip("a mixture has shares, which cannot all be zero")
    plain, kept = fresh_pico("llama"), fresh_pico("llama")
    first = tune(plain, method=Full())
    weak = tune(kept, method=Full(), keep=(term.model_copy(update=weakest),))
    assert [row["loss"] for row in weak.losses] == [row["loss"] for row in first.losses]
    assert equal(weights(plain), weights(kept))


@every_term
def test_a_term_moves_nothing_that_the_method_leaves(term: Any, fresh_pico: Build) -> None:
    plain, kept, before = (fresh_pico("falcon") for _ in range(3))
    tune(plain, method=ValueOnly())
    tune(kept, method=ValueOnly(), keep=(term,))

    def moved(model: LanguageModel) -> dict[str, Tensor]:
        start, end = weights(before), weights(model)
        return {name: (start[name] != end[name]).any(dim=-1) for name in start}

    assert equal(moved(plain), moved(kept))


@every_term
def test_a_killed_run_resumes_to_the_same_bits_under_every_term(
    term: Any, fresh_pico: Build, tmp_path: Path
) -> None:
    settings = recipe(method=LoRA(rank=2), keep=(term,), steps=4, save_every=2)
    whole, broken, resumed = (fresh_pico("llama") for _ in range(3))
    expected = train(settings, whole, EXAMPLES, None, anchors=[ANCHOR])
    extra = Extra(state_dir=tmp_path / "state")

    class Stopping(Silent):
        def update(self, done: int, total: int, detail: str = "") -> None:
            if done == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, broken, EXAMPLES, None, anchors=[ANCHOR], progress=Stopping(), extra=extra)
    record = train(settings, resumed, EXAMPLES, None, anchors=[ANCHOR], extra=extra)
    assert record.losses == expected.losses
    assert equal(weights(resumed), weights(whole))

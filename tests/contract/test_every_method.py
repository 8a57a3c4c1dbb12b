"""What every tuning method and every keep term promises, on pico models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cases import FAMILIES, METHODS, TERMS, WITH_BIASES
from keepshot.assets import AssetStore
from keepshot.blending.sweep import rescale_adapter, sweep
from keepshot.jobs.recipes import describe
from keepshot.models.anatomy import anatomy
from keepshot.models.loading import LanguageModel, identify, load, save
from keepshot.models.soft_prompts import attached
from keepshot.progress import Silent
from keepshot.prompts import Example
from keepshot.tasks.task import Task
from keepshot.tuning import adapters
from keepshot.tuning.keep import Term, parse_keep
from keepshot.tuning.method_specs import Full, LoRA, ValueOnly, default_learning_rate, parse_method
from keepshot.tuning.methods import prepare
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.record import TuneRecord
from keepshot.tuning.stages import attach_prompts
from keepshot.tuning.tokenised import Extra
from keepshot.tuning.train import train

Build = Callable[..., LanguageModel]
FRUIT = ["apple", "berry", "cherry", "date", "egg", "fig", "grape", "honey", "ice", "jam", "kiwi"]
EXAMPLES = [Example(word, word[0].upper()) for word in FRUIT]
WORDS = ["one", "two", "six", "ten", "red", "blue", "cat", "dog", "sun", "sky", "sea", "tree"]
ANCHOR = Task(
    "upper", "exact", 1, "words", "", tuple(Example(w, w.upper()) for w in WORDS), (), ()
)  # fmt: skip
IDS = torch.arange(3, 60).reshape(1, -1)


def title(method: Any) -> str:
    """Name a method with what sets it apart from others of its kind."""
    parts = [getattr(method, key, None) for key in ("targets", "prompt")]
    then = getattr(method, "then", None)
    words = [word for word in (*parts, then.name if then else None) if word]
    return "-".join([method.name, *(w for w in words if w not in ("all-linear", "trained"))])


every_method = pytest.mark.parametrize("method", METHODS, ids=title)
in_every_family = pytest.mark.parametrize(
    ("method", "family"),
    [
        (method, family)
        for method in METHODS
        for family in (WITH_BIASES if method.name == "bias-only" else FAMILIES)
    ],
    ids=lambda value: value if isinstance(value, str) else title(value),
)
ONE_OF_A_KIND = {"full", "lora", "prompt-tuning", "promot-full"}
"""What is written differs between these; within a kind, one layout of each sort will do."""
written_in_families = pytest.mark.parametrize(
    ("method", "family"),
    [
        (method, family)
        for method in METHODS
        for family in (FAMILIES if title(method) in ONE_OF_A_KIND else ["gpt2", "gpt_neox"])
    ],
    ids=lambda value: value if isinstance(value, str) else title(value),
)
with_every_keep = pytest.mark.parametrize(
    ("method", "keep"),
    [
        (method, keep)
        for method in METHODS
        for keep in [(), *((term,) for term in TERMS), tuple(TERMS)]
        # No term can reach what prompt tuning trains; each term alone meets one method.
        if not keep or (method.name != "prompt-tuning" and len(keep) > 1) or method.name == "full"
    ],
    ids=lambda value: (
        "+".join(term.name for term in value) or "none"
        if isinstance(value, tuple)
        else title(value)
    ),
)


def recipe(**settings: Any) -> Recipe:
    return Recipe(**{"data": "x", "steps": 4, "batch_size": 6, "learning_rate": 1e-2, **settings})


def tune(model: LanguageModel, out_dir: Path | None = None, **settings: Any) -> TuneRecord:
    return train(recipe(**settings), model, EXAMPLES, out_dir, anchors=[ANCHOR])


def home(method: Any) -> str:
    """Return a family in which the method finds something to train."""
    return "gpt_neox" if method.name == "bias-only" else "llama"


def weights(model: LanguageModel) -> dict[str, Tensor]:
    """Return everything that tuning may have changed, by name."""
    prompts = attached(model.module)
    found = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    return {**found, **({"prompt": prompts.table.detach().clone()} if prompts else {})}


def logits(model: LanguageModel) -> Tensor:
    """Return the logits of a text of the tuned task, under its soft prompt if it has one."""
    prompt = torch.tensor([model.soft_prompt("x")], dtype=torch.long)
    with torch.no_grad():
        return model.module(input_ids=torch.cat([prompt, IDS], dim=1)).logits[:, -IDS.shape[1] :]


def may_change(method: Any, model: LanguageModel) -> dict[str, Tensor]:
    """Return, for each weight of an untuned model, which entries the method says it trains."""
    if method.name == "promot":
        return may_change(method.then, model)
    known, module = anatomy(model.module), model.module
    found = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in module.named_parameters()}
    roles = {
        "value-only": ("value",), "query-key-only": ("query", "key"),
        "attention-only": ("query", "key", "value", "output"),
    }.get(method.name) or {"value": ("value",), "query-value": ("query", "value")}.get(
        getattr(method, "targets", ""), ()
    )  # fmt: skip
    adapted = isinstance(method, LoRA)
    if adapted and method.targets == "all-linear":
        for name, layer in module.named_modules():
            if (
                isinstance(layer, nn.Linear | Conv1D)
                and layer is not module.get_output_embeddings()
            ):
                found[f"{name}.weight"][:] = True
    for part in [getattr(block, role) for block in known.blocks for role in roles]:
        for name in filter(None, (part.parameter, None if adapted else part.bias)):
            by_output = found[name].T if part.transposed and found[name].ndim == 2 else found[name]
            by_output[slice(None) if part.rows is None else part.rows] = True
    first = known.blocks[0].name if method.name == "bottom-frozen" else None
    for name, entries in found.items():
        below = name.startswith((f"{first}.", known.embeddings, "transformer.wpe"))
        if method.name == "full" or (first and not below):
            entries[:] = True
        if method.name == "bias-only" and name.endswith(".bias"):
            entries[:] = True
    return found


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
    # What is only before or beside the weights moves a random model slowly.
    rate = 0.1 if method.name in ("prompt-tuning", "bias-only") else 1e-2
    record = tune(fresh_pico(home(method)), method=method, steps=25, learning_rate=rate)
    first, last = record.losses[0], record.losses[-1]
    assert last["loss"] < 0.75 * first["loss"]
    steps = 25 + (method.prompt_steps if getattr(method, "prompt", "") == "trained" else 0)
    assert [row["step"] for row in record.losses] == list(range(1, steps + 1))


@in_every_family
def test_it_trains_what_it_says_and_nothing_else(
    method: Any, family: str, fresh_pico: Build
) -> None:
    model = fresh_pico(family)
    allowed, before = may_change(method, model), weights(model)
    tune(model, method=method)
    adapters.detach_(model.module, merge=True)
    after = weights(model)
    for name, entries in allowed.items():
        changed = after[name] != before[name]
        assert not (changed & ~entries).any(), name
        # A few letters in a few steps reach few embeddings.
        share = 0.005 if "embed" in name or "wte" in name or "wpe" in name else 0.5
        assert changed.sum() >= share * entries.sum(), name
    if method.name == "prompt-tuning":
        assert not any(entries.any() for entries in allowed.values())


@in_every_family
def test_it_is_the_identity_before_the_first_step(
    method: Any, family: str, fresh_pico: Build
) -> None:
    model = fresh_pico(family)
    with torch.no_grad():
        untuned = model.module(input_ids=IDS).logits
    attach_prompts(recipe(method=method), model.module, ["x"])
    prepare(getattr(method, "then", method), model.module, 0)
    with torch.no_grad():
        assert torch.equal(model.module(input_ids=IDS).logits, untuned)


@every_method
def test_it_blends_from_base_to_tuned_bit_for_bit(method: Any, fresh_pico: Build) -> None:
    base, tuned = fresh_pico(home(method)), fresh_pico(home(method))
    tune(tuned, method=method)
    expected = tuned.module(input_ids=IDS).logits
    if any(isinstance(part, LoraLayer) for part in tuned.module.modules()):
        with rescale_adapter(tuned.module, 0.0):
            found = tuned.module(input_ids=IDS).logits
            assert torch.allclose(found, base.module(input_ids=IDS).logits, atol=1e-4)
        assert torch.equal(tuned.module(input_ids=IDS).logits, expected)
        return
    before = weights(base)
    state = tuned.module.state_dict()
    found = dict(sweep(base, state, [0.0, 1.0], lambda _: weights(base)))
    assert equal(found[0.0], before)
    last = weights(tuned)
    assert equal(found[1.0], {name: last[name] for name in before})


@with_every_keep
def test_the_same_seed_gives_the_same_bits(
    method: Any, keep: tuple[Term, ...], fresh_pico: Build
) -> None:
    models = [fresh_pico(home(method)) for _ in range(2)]
    torch.manual_seed(1)
    first = tune(models[0], method=method, keep=keep)
    torch.manual_seed(2)
    again = tune(models[1], method=method, keep=keep)
    assert first.losses == again.losses
    assert first.keep == [term.name for term in keep]
    assert equal(weights(models[0]), weights(models[1]))
    if not keep:
        other = fresh_pico(home(method))
        tune(other, method=method, seed=1)
        assert not equal(weights(models[0]), weights(other))


@written_in_families
def test_what_is_written_loads_as_what_was_trained(
    method: Any, family: str, fresh_pico: Build, tmp_path: Path
) -> None:
    store = AssetStore(tmp_path / "cache")
    save(fresh_pico(family), tmp_path / "base")
    model = load(str(tmp_path / "base"), store)
    untuned = logits(model)
    tune(model, tmp_path / "tuned", method=method)
    tuned = logits(model)
    assert not torch.allclose(tuned, untuned, atol=1e-3)
    loaded = load(str(tmp_path / "tuned"), store)
    assert torch.allclose(logits(loaded), tuned, atol=1e-4)
    assert loaded.sha256 == identify(str(tmp_path / "tuned"), store)
    pickles = [f for f in (tmp_path / "tuned").rglob("*") if f.suffix in (".bin", ".pt", ".pth")]
    assert pickles == []


@every_method
def test_a_run_that_was_killed_resumes_to_the_same_bits(
    method: Any, fresh_pico: Build, tmp_path: Path
) -> None:
    keep = () if method.name == "prompt-tuning" else (TERMS[0],)
    settings = recipe(method=method, keep=keep, steps=9, save_every=3)
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
    assert [path.name for path in state_dir.rglob("checkpoint-*")] == ["checkpoint-6"]
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

"""Training on pico models: it learns, repeats, keeps, resumes, and stops when it must."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keepshot.errors import ConfigError, TaskError, TrainingError
from keepshot.models.loading import LanguageModel
from keepshot.progress import Silent
from keepshot.prompts import Example
from keepshot.tasks.source import TextRow
from keepshot.tasks.task import Task
from keepshot.tuning import loop
from keepshot.tuning.anchors import AnchorKL, cache_teacher, draw_prompts
from keepshot.tuning.batch import pad, read_logits
from keepshot.tuning.keep import KL, Mix
from keepshot.tuning.method_specs import Full, LoRA, ProMoT
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.record import TuneRecord
from keepshot.tuning.terms import kl_divergence
from keepshot.tuning.train import train

Build = Callable[..., LanguageModel]
FRUIT = ["apple", "berry", "cherry", "date", "egg", "fig", "grape", "honey", "ice", "jam", "kiwi"]
EXAMPLES = [Example(word, word[0].upper()) for word in FRUIT]
WORDS = ["one", "two", "six", "ten", "red", "blue", "cat", "dog", "sun", "sky", "sea", "tree"]
ANCHOR = Task(
    "upper", "exact", 1, "words", "", tuple(Example(w, w.upper()) for w in WORDS), (), ()
)  # fmt: skip


def recipe(**settings: Any) -> Recipe:
    defaults = {"data": "x", "steps": 12, "batch_size": 6, "learning_rate": 1e-2}
    return Recipe(**{"method": Full(), **defaults, **settings})


def tune(model: LanguageModel, **settings: Any) -> TuneRecord:
    return train(recipe(**settings), model, EXAMPLES, None, anchors=[ANCHOR])


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(weight, second[name]) for name, weight in first.items()
    )


def divergence(model: LanguageModel, untuned: LanguageModel, term: KL, seed: int) -> float:
    """KL(untuned || tuned) on anchor prompts of another seed than those trained with."""
    padded = pad(draw_prompts(untuned, [ANCHOR], term, max_length=512, seed=seed))
    with torch.no_grad():
        student, teacher = (
            read_logits(m.module, padded.ids_BT, padded.read_N, m.module.get_output_embeddings())
            for m in (model, untuned)
        )
    everywhere = torch.ones(len(student), dtype=torch.bool)
    return kl_divergence(student, teacher, everywhere, "forward").item()


def test_the_first_loss_is_the_mean_over_answer_tokens(fresh_pico: Build):
    model = fresh_pico("llama")
    expected: list[float] = []
    for example in EXAMPLES:
        before, answer = model.encode_pair(f"Q: {example.input}\nA:", f" {example.output}\n")
        with torch.no_grad():
            logits = model.module(input_ids=torch.tensor([before + answer])).logits[0]
        chosen = logits.log_softmax(-1)[range(len(before) - 1, len(before + answer) - 1), answer]
        expected += (-chosen).tolist()
    record = tune(model, batch_size=len(EXAMPLES), steps=1)
    assert record.losses[0]["loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)


@pytest.mark.parametrize("method", [Full(), LoRA(rank=4)], ids=lambda m: m.name)
def test_the_kl_term_holds_the_model_to_its_base(method: Any, fresh_pico: Build):
    untuned, free, held = (fresh_pico("llama") for _ in range(3))
    term = KL(prompts=24, weight=5.0)
    plain = tune(free, method=method, steps=30)
    kept = tune(held, method=method, steps=30, keep=(term,))
    assert divergence(held, untuned, term, 9) < 0.5 * divergence(free, untuned, term, 9)
    assert kept.losses[-1]["next_token"] < plain.losses[0]["next_token"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon"])
def test_kl_at_base_is_zero_up_to_the_caches_rounding(family: str, fresh_pico: Build):
    model = fresh_pico(family)
    head = model.module.get_output_embeddings()
    term = KL(prompts=8)
    prompts = draw_prompts(model, [ANCHOR], term, max_length=512, seed=0)
    pool = cache_teacher(model, prompts, term, head=head)
    assert {len(batch) for batch in pool.batches} == {4}
    with torch.no_grad():
        for step in range(4):
            value = AnchorKL("kl", 5.0, pool, "forward", 0)(model.module, step, head)
            assert abs(value.item()) < 1e-5


def test_the_cache_limits_the_pool(fresh_pico: Build):
    model = fresh_pico("llama")
    head = model.module.get_output_embeddings()
    prompts = draw_prompts(model, [ANCHOR], KL(prompts=400), max_length=512, seed=0)
    pool = cache_teacher(model, prompts, KL(prompts=400, cache_mb=1), head=head)
    sizes = [table.numel() * table.element_size() for table in pool.log_probs]
    assert 0.8 * 2**20 < sum(sizes) <= 2**20


def test_the_tree_shows_the_prompts_that_are_read(fresh_pico: Build):
    """It showed those that were drawn, of which the cache may hold a third."""
    model = fresh_pico("llama")
    head = model.module.get_output_embeddings()
    term = KL(prompts=400, cache_mb=1)
    prompts = draw_prompts(model, [ANCHOR], term, max_length=2048, seed=0)
    pool = cache_teacher(model, prompts, term, head=head)
    read = sum(len(batch) for batch in pool.batches)
    shown = tune(model, steps=1, keep=(term,)).sources[-1]
    assert 100 < read < 400
    assert (shown.samples, shown.tokens) == (read, sum(map(len, prompts[:read])))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_cache_of_top_tokens_is_small_and_holds_as_well(direction: Any, fresh_pico: Build):
    untuned, free, held = (fresh_pico("llama") for _ in range(3))
    head = untuned.module.get_output_embeddings()
    term = KL(prompts=24, direction=direction, top_k=8)
    prompts = draw_prompts(untuned, [ANCHOR], term, max_length=512, seed=0)
    pool = cache_teacher(untuned, prompts, term, head=head)
    count = sum(len(sample.read) for sample in prompts)
    assert sum(table.numel() for table in pool.log_probs) == 9 * count
    with torch.no_grad():
        value = AnchorKL("kl", 5.0, pool, direction, 0)(untuned.module, 0, head)
    assert abs(value.item()) < 1e-6
    tune(free, steps=30)
    tune(held, steps=30, keep=(term,))
    assert divergence(held, untuned, term, 9) < 0.5 * divergence(free, untuned, term, 9)


def test_anchor_prompts_vary_in_shots_and_fit(fresh_pico: Build):
    model = fresh_pico("llama")
    term = KL(prompts=40, shots=(2, 8))
    prompts = draw_prompts(model, [ANCHOR], term, max_length=512, seed=0)
    shots = {model.decode(prompt.ids).count("Q: ") - 1 for prompt in prompts}
    assert shots == set(range(2, 9))
    short = draw_prompts(model, [ANCHOR], term, max_length=60, seed=0)
    assert max(len(prompt) for prompt in short) <= 60
    with pytest.raises(ConfigError, match="no prompt of 2 demonstrations within 20 tokens"):
        draw_prompts(model, [ANCHOR], term, max_length=20, seed=0)


class Breaking(AnchorKL):
    """A term that is not a number from one step on."""

    def __call__(self, module: Any, step: int, head: Any) -> Tensor:
        value = super().__call__(module, step, head)
        return value * math.nan if step >= 13 else value


@pytest.mark.parametrize("method", [Full(), LoRA(rank=2)], ids=lambda m: m.name)
def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_weights(
    method: Any, fresh_pico: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("keepshot.tuning.train.AnchorKL", Breaking)
    keep = (KL(prompts=8),)
    model, stopped = fresh_pico("llama"), fresh_pico("llama")
    long = recipe(method=method, keep=keep, steps=20, scheduler="constant", warmup=0.0)
    with pytest.raises(TrainingError) as error:
        train(long, model, EXAMPLES, tmp_path, anchors=[ANCHOR])
    assert "the loss is nan at step 14; the weights after step 10 are kept" in str(error.value)
    assert (tmp_path / "tuning.json").exists()
    # The first ten steps of twenty are those of a run of ten.
    monkeypatch.undo()
    train(long.model_copy(update={"steps": 10}), stopped, EXAMPLES, None, anchors=[ANCHOR])
    assert equal(weights(model), weights(stopped))


class Rotten(AnchorKL):
    """A term that is a number, but whose gradient is not."""

    def __call__(self, module: Any, step: int, head: Any) -> Tensor:
        value = super().__call__(module, step, head)
        return value + 0.0 * (0.0 * value).sqrt()


def test_weights_broken_by_the_last_step_are_noticed(
    fresh_pico: Build, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("keepshot.tuning.train.AnchorKL", Rotten)
    model = fresh_pico("llama")
    before = weights(model)
    with pytest.raises(TrainingError, match=r"not a number after step 1; no step is kept"):
        tune(model, steps=1, keep=(KL(prompts=8),))
    assert equal(weights(model), before)


@pytest.mark.parametrize("method", [Full(), LoRA(rank=2)], ids=lambda m: m.name)
def test_parts_of_a_batch_and_checkpointing_change_nothing(method: Any, fresh_pico: Build):
    keep = (KL(prompts=8, prompts_per_step=1),)
    whole, parts, again = (fresh_pico("llama") for _ in range(3))
    expected = tune(whole, method=method, keep=keep, learning_rate=1e-3)
    divided = tune(parts, method=method, keep=keep, learning_rate=1e-3, accumulate=3)
    for one, other in zip(expected.losses, divided.losses, strict=True):
        assert other == pytest.approx(one, abs=1e-5)
    recomputed = tune(again, method=method, keep=keep, learning_rate=1e-3, checkpointing=True)
    assert recomputed.losses == expected.losses
    assert equal(weights(again), weights(whole))


def test_checkpointing_changes_nothing_under_a_soft_prompt(fresh_pico: Build):
    method = ProMoT(tokens=3, prompt_steps=3, then=LoRA(rank=2))
    plain, again = fresh_pico("llama"), fresh_pico("llama")
    expected = tune(plain, method=method, steps=3)
    assert tune(again, method=method, steps=3, checkpointing=True).losses == expected.losses
    assert len({row["loss"] for row in expected.losses}) == 6


def test_bfloat16_is_close_and_the_weights_stay_as_they_were_loaded(fresh_pico: Build):
    plain, coarse = fresh_pico("llama"), fresh_pico("llama")
    expected = tune(plain, learning_rate=1e-3, steps=4).losses
    found = tune(coarse, learning_rate=1e-3, steps=4, bf16=True).losses
    assert found != expected
    assert [row["loss"] for row in found] == pytest.approx(
        [row["loss"] for row in expected], rel=0.05
    )
    assert {str(weight.dtype) for weight in weights(coarse).values()} == {"torch.float32"}


@pytest.mark.parametrize(
    "method", [Full(), ProMoT(tokens=3, prompt_steps=2)], ids=lambda method: method.name
)
def test_bfloat16_ends_with_the_training(method: Any, fresh_pico: Build):
    """Autocast stayed around the module, which was then measured in it."""
    model, loaded = fresh_pico("llama"), fresh_pico("llama")
    tune(model, method=method, steps=2, bf16=True)
    state = weights(model)
    loaded.module.load_state_dict({name: state[name] for name in weights(loaded)}, strict=False)
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        found, expected = (m.module(input_ids=ids).logits for m in (model, loaded))
    assert torch.equal(found, expected)


def test_a_second_run_of_a_module_is_in_bfloat16_too(fresh_pico: Build):
    once, twice = fresh_pico("llama"), fresh_pico("llama")
    tune(twice, steps=2, learning_rate=1e-30, bf16=True)
    assert equal(weights(once), weights(twice))
    expected = tune(once, steps=2, bf16=True)
    assert tune(twice, steps=2, bf16=True).losses == expected.losses


@pytest.mark.parametrize("direction", ["forward", "k3"])
def test_the_untuned_model_is_read_in_the_precision_of_training(direction: Any, fresh_pico: Build):
    """In float32 it was as far from itself in bfloat16 as a few steps go."""
    term = KL(prompts=8, direction=direction)
    losses = tune(fresh_pico("llama"), steps=1, keep=(term,), bf16=True).losses
    assert losses[0]["kl"] == pytest.approx(0.0, abs=1e-5)


def test_the_only_step_is_no_warmup(fresh_pico: Build):
    """It was taken at a rate of zero, as the first of several steps still is."""
    model = fresh_pico("llama")
    before = weights(model)
    tune(model, steps=1)
    assert not equal(weights(model), before)
    first, second, third = tune(model, steps=3, batch_size=len(EXAMPLES)).losses
    assert second["loss"] == pytest.approx(first["loss"], abs=1e-5)
    assert third["loss"] != pytest.approx(first["loss"], abs=1e-3)


def test_the_record_says_what_was_done(fresh_pico: Build, tmp_path: Path):
    model = fresh_pico("llama")
    rows = [*EXAMPLES, TextRow("far too long " * 40)]
    settings = recipe(steps=None, epochs=2.0, max_length=60, long_rows="drop", batch_size=4)
    record = train(settings, model, rows, tmp_path, validation=EXAMPLES[:3])
    assert (record.num_rows, record.num_dropped, record.num_validation) == (11, 1, 3)
    assert record.steps == 6
    assert record.num_trainable == model.num_parameters
    assert record.validation_loss is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tuning.json"]
    assert record.training_record("plain").steps == 6


def test_training_leaves_the_model_as_it_was_but_for_its_weights(fresh_pico: Build):
    model = fresh_pico("llama")
    use_cache = model.module.config.use_cache
    tune(model, steps=1)
    assert not model.module.training
    assert model.module.config.use_cache == use_cache
    assert all(p.grad is None for p in model.module.parameters())
    assert not [m for m in model.module.modules() if m._forward_pre_hooks]


def test_progress_is_told_of_every_step(fresh_pico: Build):
    told: list[tuple[int, int]] = []

    class Listening(Silent):
        def update(self, done: int, total: int, detail: str = "") -> None:
            assert detail.startswith("loss ")
            told.append((done, total))

    train(recipe(steps=3), fresh_pico("llama"), EXAMPLES, None, progress=Listening())
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": (KL(),)}, "the kl term has no anchor tasks"),
        ({"keep": (Mix(),)}, "the mix term has no anchor tasks"),
        ({"max_length": 100_000}, "max_length 100000 is more than the context"),
        ({"report_to": ("no-such-tracker",)}, "report_to .*no-such-tracker.* is not supported"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str, fresh_pico: Build):
    with pytest.raises(ConfigError, match=message):
        train(recipe(**settings), fresh_pico("llama"), EXAMPLES, None)


def test_too_few_anchor_examples_for_a_mix(fresh_pico: Build):
    small = replace(ANCHOR, demonstrations=ANCHOR.demonstrations[:3])
    with pytest.raises(TaskError, match="3 examples are too few"):
        train(recipe(keep=(Mix(),)), fresh_pico("llama"), EXAMPLES, None, anchors=[small])


def test_good_copies_are_taken_often_enough():
    assert loop.GOOD_EVERY <= 10

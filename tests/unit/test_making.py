"""Models that are made: harm that is what it says, and small models that learn from examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from keepshot.assets import AssetStore
from keepshot.errors import ModelError
from keepshot.jobs.making import make
from keepshot.models.anatomy import anatomy
from keepshot.models.blank import blank_model
from keepshot.models.degrade import degraded, noised, pruned, quantised
from keepshot.models.loading import LanguageModel, load, save
from keepshot.models.made import ARCHITECTURES, Degradation, FromScratch
from keepshot.progress import Silent
from keepshot.study.spec import StudiedModel
from keepshot.tasks.composed import vocabulary
from keepshot.tuning.from_scratch import lists_of_examples, train_from_scratch

TINY = FromScratch(architecture="llama", width=32, depth=2, steps=3, batch_size=4)


def test_pruning_takes_the_smallest_share() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0], [-3.0, 6.0, -5.0]])
    assert pruned(weight, 0.5).tolist() == [[0.0, -4.0, 0.0], [0.0, 6.0, -5.0]]
    assert pruned(torch.ones(4, 5), 0.25).sum() == 15.0, "ties too are only as many as asked"


def test_rounding_leaves_so_many_levels_in_each_row() -> None:
    """By numpy: 3 bits are the 7 levels -3 .. 3 of a row's largest weight over 3."""
    weight = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    found = quantised(weight, 3).numpy()
    step = np.abs(weight.numpy()).max(axis=1, keepdims=True) / 3
    assert np.allclose(found, np.round(weight.numpy() / step) * step, atol=1e-6)
    levels = [len(np.unique(np.round(row / s))) for row, s in zip(found, step, strict=True)]
    assert set(levels) <= {6, 7}, "the largest weight has one sign, and the other end may be free"
    assert np.abs(found - weight.numpy()).max() <= step.max() / 2 + 1e-6
    assert quantised(torch.zeros(2, 3), 4).tolist() == [[0.0] * 3] * 2


def test_noise_has_the_size_that_is_asked_for() -> None:
    weight = 0.02 * torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    found = noised(weight, 0.25, torch.Generator().manual_seed(2))
    share = (found - weight).std() / weight.square().mean().sqrt()
    assert share.item() == pytest.approx(0.25, rel=0.02)
    again = noised(weight, 0.25, torch.Generator().manual_seed(2))
    assert torch.equal(found, again)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3"])
def test_harm_stays_within_the_matrices_of_the_blocks(
    family: str, fresh_pico: Callable[..., LanguageModel]
) -> None:
    before = fresh_pico(family).module.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    harmed = degraded(fresh_pico(family).module, Degradation(kind="pruned", dose=0.5))
    changed = {n for n, t in harmed.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all(before[name].ndim == 2 for name in changed)
    assert not any("embed" in name or "wte" in name or "lm_head" in name for name in changed)
    halves = {(before[name] == 0).float().mean().item() for name in changed}
    assert max(halves) == 0.0
    zeros = {round((harmed.state_dict()[n] == 0).float().mean().item(), 3) for n in changed}
    assert zeros == {0.5}


def test_dropped_blocks_are_passed_over() -> None:
    """The shorter model gives what the whole one gives when those blocks add nothing."""
    whole = blank_model("gpt2", 32, 5, vocabulary(), 0).module
    short = degraded(whole, Degradation(kind="layers-dropped", dose=2))
    assert len(short.transformer.h) == 3 == short.config.num_hidden_layers
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        before = whole(ids, use_cache=False).logits
        for block in (whole.transformer.h[1], whole.transformer.h[2]):
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
        after = whole(ids, use_cache=False).logits
        found = short(ids, use_cache=False).logits
    assert not torch.allclose(found, before, atol=1e-4)
    assert torch.allclose(found, after, atol=1e-5)


def test_lists_of_one_for_each_block_are_shortened(
    fresh_pico: Callable[..., LanguageModel],
) -> None:
    """Gemma says of each block how far it looks: here sliding, full, sliding, full."""
    short = degraded(fresh_pico("gemma3").module, Degradation(kind="layers-dropped", dose=1))
    before = fresh_pico("gemma3").module.config.layer_types
    assert short.config.layer_types == [before[0], *before[2:]]
    with pytest.raises(ModelError, match="at most 0"):
        degraded(short, Degradation(kind="layers-dropped", dose=1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blank_models_have_an_anatomy_and_differ(architecture: str) -> None:
    model = blank_model(architecture, 32, 2, vocabulary(), 0)  # type: ignore[arg-type]
    found = anatomy(model.module)
    assert len(found.blocks) == 2
    assert found.tied
    together = {found.blocks[0].query.module, found.blocks[0].value.module}
    assert len(together) == (2 if architecture == "llama" else 1)
    again = blank_model(architecture, 32, 2, vocabulary(), 0)  # type: ignore[arg-type]
    other = blank_model(architecture, 32, 2, vocabulary(), 1)  # type: ignore[arg-type]
    weights = [m.module.get_input_embeddings().weight for m in (model, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_only_answers_after_the_first_are_learned() -> None:
    model = blank_model("llama", 32, 2, vocabulary(), 0)
    batch = lists_of_examples(model, TINY, np.random.default_rng(0))
    assert len(batch) == TINY.batch_size
    for sample in batch:
        blocks = model.decode(sample.ids).removesuffix("\n").split("\n\n")
        answers = [block.split("\nA: ")[1] for block in blocks]
        assert len(answers) == TINY.shots
        learned = model.decode(sample.targets)
        # what ends an answer is learned with it: the next question, or the end of the line
        expected = "".join(f" {answer}\n\nQ:" for answer in answers[1:-1]) + f" {answers[-1]}\n"
        assert learned == expected


def test_training_from_scratch_is_repeatable_and_learns() -> None:
    steps = TINY.model_copy(update={"steps": 21, "learning_rate": 1e-2})
    losses: list[float] = []

    class Noted(Silent):
        def update(self, done: int, total: int, detail: str = "") -> None:
            losses.append(float(detail.removeprefix("loss ")))

    first, tokens = train_from_scratch(steps, Noted())
    again, _ = train_from_scratch(steps, Silent())
    same = zip(first.module.parameters(), again.module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)
    assert losses[0] > 6.0, "as much as guessing among 650 words"
    assert losses[-1] < 5.8
    assert tokens > 21 * 4 * 30


def test_what_is_made_is_a_directory_that_loads(
    tmp_path: Path, store: AssetStore, fresh_pico: Callable[..., LanguageModel]
) -> None:
    def loaded(reference: str) -> LanguageModel:
        return load(reference, store)

    scratch = make(StudiedModel(name="s", from_scratch=TINY), tmp_path / "s", loaded, Silent())
    model = load(str(tmp_path / "s"), store)
    assert model.sha256 != "0" * 64
    assert model.num_parameters == scratch.model.num_parameters
    assert model.encode("Q: a cow\nA: cow\n\nQ: cow")[-2:] == [*model.encode("\n\nQ: cow")]
    assert (tmp_path / "s" / "making.json").exists()
    save(fresh_pico("llama"), tmp_path / "base")
    asked = StudiedModel(
        reference=str(tmp_path / "base"), degrade=Degradation(kind="noised", dose=0.1)
    )
    make(asked, tmp_path / "d", loaded, Silent())
    first = load(str(tmp_path / "d"), store)
    make(asked, tmp_path / "d", loaded, Silent())
    assert load(str(tmp_path / "d"), store).sha256 == first.sha256
    assert first.sha256 != load(str(tmp_path / "base"), store).sha256

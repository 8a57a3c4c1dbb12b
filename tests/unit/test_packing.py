"""Packed samples: the same losses and gradients as padded ones, and none sees another."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keepshot.errors import ModelError
from keepshot.models.loading import LanguageModel
from keepshot.prompts import Example
from keepshot.tuning.batch import Padded, Sample, pad, read_logits
from keepshot.tuning.method_specs import LoRA
from keepshot.tuning.packing import ROW_TOKENS, pack, refuse_leaks
from keepshot.tuning.recipe import Recipe
from keepshot.tuning.terms import next_token
from keepshot.tuning.train import train

Build = Callable[..., LanguageModel]
FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen2", "gemma3"]


def samples(*lengths: int, seed: int = 0) -> list[Sample]:
    drawn = random.Random(seed)
    return [
        Sample(tuple(drawn.choices(range(3, 90), k=length)), tuple(range(length // 2, length - 1)))
        for length in lengths
    ]


def learned(module: Any, rows: list[Padded]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each position and the gradients of their mean."""
    head = module.get_output_embeddings()
    module.zero_grad()
    logits = [read_logits(module, r.ids_BT, r.read_N, head, r.positions_BT) for r in rows]
    targets = torch.cat([row.targets_N for row in rows])
    next_token(torch.cat(logits), targets).backward()
    losses = nn.functional.cross_entropy(torch.cat(logits), targets, reduction="none")
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return losses.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def test_rows_hold_whole_samples_and_no_more_than_fits():
    given = samples(30, 12, 19, 50, 22, 8, 41)
    rows = pack(given, row_tokens=60)
    # Nothing is read after the last position, so that a sample counts one token less.
    assert [row.ids_BT.shape[1] for row in rows] == [49 + 11, 40 + 18, 29 + 21 + 7]
    read = sorted(token for row in rows for token in row.targets_N.tolist())
    assert read == sorted(token for sample in given for token in sample.targets)
    assert [row.ids_BT.shape[1] for row in pack(samples(90, 10), row_tokens=60)] == [89, 9]
    assert len(pack(samples(200, 200, 100))) == 1
    assert ROW_TOKENS >= 500


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_padded_batch(
    family: str, attention: str, fresh_pico: Build
):
    # Longer than the window of the family that slides one.
    given = sorted(samples(30, 12, 19, 50, 22), key=len, reverse=True)
    module = fresh_pico(family).module
    module.set_attn_implementation(attention)
    refuse_leaks(module, module.get_output_embeddings())
    expected, gradients = learned(module, [pad(given)])
    rows = pack(given)
    assert len(rows) == 1
    found, packed = learned(module, rows)
    assert torch.allclose(found, expected, rtol=1e-6, atol=2e-5)
    assert found.mean().item() == pytest.approx(expected.mean().item(), rel=1e-6)
    assert packed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert (packed[name] - gradient).abs().max().item() <= 3e-6 * scale + 1e-9, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_neighbours_change_no_bit_of_an_examples_loss(
    family: str, attention: str, fresh_pico: Build
):
    module = fresh_pico(family).module
    module.set_attn_implementation(attention)
    longer, ours, last = samples(40, 30, 20)
    other, _, another = samples(40, 30, 20, seed=1)
    count = slice(len(longer.read), len(longer.read) + len(ours.read))
    first, _ = learned(module, pack([longer, ours, last]))
    second, _ = learned(module, pack([other, ours, another]))
    assert torch.equal(first[count], second[count])
    assert not torch.equal(first[: count.start], second[: count.start])


def test_a_packed_run_learns_as_a_padded_one(fresh_pico: Build):
    words = ["apple", "berry", "a much longer fruit", "date", "egg", "fig", "another long one"]
    rows = [Example(word, word[0].upper()) for word in words]
    recipes = [
        Recipe(data="x", method=LoRA(rank=2), steps=8, batch_size=6, accumulate=2,
               learning_rate=1e-2, packing=packing)
        for packing in (False, True)
    ]  # fmt: skip
    padded, packed = (train(recipe, fresh_pico("llama"), rows, None) for recipe in recipes)
    assert [row["loss"] for row in packed.losses] == pytest.approx(
        [row["loss"] for row in padded.losses], rel=1e-5
    )
    assert (packed.recipe["packing"], padded.recipe.get("packing")) == (True, None)
    assert packed.tokens == padded.tokens


def test_a_recipe_without_packing_keeps_the_fingerprint_of_earlier_versions():
    plain = Recipe(data="x")
    assert "packing" not in plain.model_dump()
    assert plain.fingerprint() == Recipe(data="x", packing=False).fingerprint()
    assert plain.fingerprint() != Recipe(data="x", packing=True).fingerprint()


def test_a_family_that_sees_across_is_refused_by_name(fresh_pico: Build):
    recipe = Recipe(data="x", steps=1, batch_size=2, packing=True)
    rows = [Example(word, "A") for word in ("one", "two", "three")]
    with pytest.raises(ModelError, match="'falcon' cannot be packed: a sample sees the one before"):
        train(recipe, fresh_pico("falcon"), rows, None)


class Counting(nn.Module):
    """Keeps samples apart by a mask, but counts positions from the beginning of the row."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.inner, self.config = module, module.config

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        number = (position_ids == 0).cumsum(dim=1)
        apart = (number[:, :, None] == number[:, None, :]).tril()
        return self.inner(input_ids=input_ids, attention_mask=apart[:, None], use_cache=use_cache)


class Deaf(Counting):
    """Takes no positions."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return self.inner(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [(Counting, "positions do not begin anew"), (Deaf, "takes no positions")],
)
def test_positions_must_reach_the_model(wrapper: Any, reason: str, fresh_pico: Build):
    module = fresh_pico("gpt2").module
    with pytest.raises(ModelError, match=reason):
        refuse_leaks(wrapper(module), module.get_output_embeddings())

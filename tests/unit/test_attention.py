"""Attention to shared keys apart from own ones is attention to all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_engine import assert_same, other_pico, some_requests, with_right_answers
from torch import Tensor
from transformers import Gemma2Config

from keepshot.scoring.attention import (
    Masks,
    Part,
    Scoring,
    Shared,
    attend,
    partial,
    partial_by_hand,
)
from keepshot.scoring.engine import Engine
from keepshot.scoring.forward import Trunk
from pico import PICO_CONFIGS, SHARED, pico_model

ROWS, LENGTH, HEADS, GROUPS, WIDTH = 5, 7, 6, 2, 8
FORBIDDEN = torch.finfo(torch.float32).min


def states(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring
) -> Tensor:
    """Softmax over all keys in float64, written out: [R, L, H, E]."""
    repeated = [t.double().repeat_interleave(HEADS // GROUPS, dim=1) for t in (key, value)]
    scores = query.double() @ repeated[0].transpose(2, 3)
    scores *= scoring.scaling or WIDTH**-0.5
    if scoring.softcap:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    shares = torch.softmax(scores + mask.double(), dim=-1)
    return (shares @ repeated[1]).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_two_parts_and_own_keys_equal_one_softmax(
    scaling: float | None, softcap: float | None
) -> None:
    """Rows 0-1 share 11 keys, row 2 shares none, rows 3-4 share 40, of which some are masked."""
    query = states(ROWS, HEADS, LENGTH, WIDTH, seed=1) * 3
    key, value = (states(ROWS, GROUPS, LENGTH, WIDTH, seed=s) for s in (2, 3))
    own = torch.triu(torch.full((LENGTH, LENGTH), FORBIDDEN), 1).expand(ROWS, 1, -1, -1).clone()
    first, second = (
        [(states(1, GROUPS, n, WIDTH, seed=n), states(1, GROUPS, n, WIDTH, seed=n + 1))]
        for n in (11, 40)
    )
    hidden = torch.zeros(2 * LENGTH, 40)
    hidden[3:9, :25] = FORBIDDEN
    hidden[12] = FORBIDDEN  # this token sees none of the shared keys
    parts = (Part(slice(0, 2), first), Part(slice(3, 5), second))
    shared = Shared(parts, (Masks(own, (None, hidden[None, None])),))
    found, _ = attend(
        SimpleNamespace(layer_idx=0), query, key, value, own, scaling, softcap, shared=shared
    )
    scoring = Scoring(scaling, softcap)
    for rows, layers, mask in (
        (slice(0, 2), first[0], torch.zeros(2, LENGTH, 11)),
        (slice(2, 3), None, torch.zeros(1, LENGTH, 0)),
        (slice(3, 5), second[0], hidden.view(2, LENGTH, 40)),
    ):
        keys, values = key[rows], value[rows]
        if layers is not None:
            ahead = [t.expand(len(keys), -1, -1, -1) for t in layers]
            keys, values = torch.cat([ahead[0], keys], dim=2), torch.cat([ahead[1], values], dim=2)
        seen = torch.cat([mask[:, None], own[rows]], dim=3)
        expected = whole_attention(query[rows], keys, values, seen, scoring)
        torch.testing.assert_close(found[rows].double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_the_form_for_other_devices_agrees(masked: bool) -> None:
    query = states(ROWS, HEADS, LENGTH, WIDTH, seed=1)
    key, value = (states(ROWS, GROUPS, 9, WIDTH, seed=s) for s in (2, 3))
    mask = torch.where(states(ROWS, 1, LENGTH, 9, seed=4) > 1, FORBIDDEN, 0.0) if masked else None
    for own, other in zip(
        partial(query, key, value, mask, Scoring(None)),
        partial_by_hand(query, key, value, mask, Scoring(None)),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)


def test_what_it_does_not_know_is_refused() -> None:
    query = states(1, HEADS, 2, WIDTH, seed=0)
    key = states(1, GROUPS, 2, WIDTH, seed=1)
    own = torch.zeros(1, 1, 2, 2)
    shared = Shared((), (Masks(own, ()),))
    with pytest.raises(ValueError, match="cannot attend"):
        attend(None, query, key, key, own, shared=shared, s_aux=torch.zeros(HEADS))
    with pytest.raises(ValueError, match="cannot attend"):
        attend(None, query, key, key, own)
    with pytest.raises(ValueError, match="did not reach"):
        attend(None, query, key, key, own.clone(), shared=shared)


def only_decoding_apart(trunk: Trunk) -> None:
    """As on a GPU."""
    trunk.prefills_apart = False


def nothing_apart(trunk: Trunk) -> None:
    """As for a family whose attention is of another kind."""
    trunk.prefills_apart = trunk.apart = False


@pytest.mark.parametrize("without", [only_decoding_apart, nothing_apart])
@pytest.mark.parametrize("family", [f for f in PICO_CONFIGS if f != "falcon"])
def test_every_way_through_gives_the_same(family: str, without: Callable[[Trunk], None]) -> None:
    model = pico_model(family)
    requests = with_right_answers(model, some_requests(4, seed=5))
    usual, other = Engine(model), Engine(model)
    assert usual._trunk.apart
    before: Any = model.module.config._attn_implementation
    without(other._trunk)
    assert_same(usual.run(requests), Engine(model, share=False).run(requests), requests)
    assert_same(other.run(requests), usual.run(requests), requests)
    assert model.module.config._attn_implementation == before, "the model is left as it was"


def test_capped_scores_are_shared_too() -> None:
    config = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, head_dim=8, sliding_window=16,
        attn_logit_softcapping=2.0, attn_implementation="eager", **SHARED,
    )  # fmt: skip
    model = other_pico(config)
    requests = some_requests(4, seed=6)
    engine = Engine(model)
    assert engine._trunk.apart
    assert_same(engine.run(requests), Engine(model, share=False).run(requests), requests)

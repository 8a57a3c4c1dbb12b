"""Attention of many rows to keys that they share, and to keys of their own.

    keys:  demonstrations (held once)  .  the row's own tokens

Each part is attended to by itself and the two are joined by their log-sum-exp, which is exact
(Flash-Decoding's split over keys; arXiv:2402.05099 shares a prefix so). Shared keys are never
copied, and no mask is as long as they are.

Shapes: R rows, L tokens a row, P shared keys, C own keys, H heads, G groups of keys, E head width.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer

NAME = "keepshot"
"""Under which transformers finds `attend`, while a pass asks for it."""
LayerStates = tuple[Tensor, Tensor]
"""Keys and values of one layer, [R, G, tokens, E]."""
REFUSED = ("s_aux", "position_bias")
"""What some families add to attention, and this does not know."""


@dataclass(frozen=True)
class Scoring:
    """How a family turns products of queries and keys into scores."""

    scaling: float | None
    """Factor; None: one over the root of E."""
    softcap: float | None = None
    """Scores are squeezed between this and its negative, before masks."""


@dataclass(frozen=True)
class Part:
    """Some rows, and the keys that these rows share."""

    rows: slice
    layers: Sequence[LayerStates]
    """[1, G, P, E] of each layer."""

    @property
    def num_keys(self) -> int:
        """P."""
        return int(self.layers[0][0].shape[2])


@dataclass(frozen=True)
class Masks:
    """For one kind of layer: what is added to scores, of own keys and of each part's."""

    own: Tensor
    """[R, 1, L, C]."""
    parts: tuple[Tensor | None, ...]
    """[1, 1, rows * L, P] of each part; None where everything is seen."""


@dataclass(frozen=True)
class Shared:
    """What `attend` must know besides what the model hands it."""

    parts: tuple[Part, ...]
    masks: tuple[Masks, ...]

    def masks_of(self, own: Tensor | None) -> Masks:
        """Return the masks of the layer that was given `own`, which names its kind.

        Raises:
            ValueError: if the model changed the mask on its way, and cannot be run so.
        """
        for masks in self.masks:
            if masks.own is own:
                return masks
        raise ValueError("the mask did not reach attention as it was given")


class FreshLayer(DynamicLayer):
    """Holds what one pass adds, without a copy; what came before is in parts."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> LayerStates:
        """Hold the states of the pass and return them."""
        self.keys, self.values = key_states, value_states
        self.is_initialized = True
        return key_states, value_states


@contextmanager
def attending(config: Any) -> Generator[None]:
    """Let the model of `config` attend by `attend`."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    shared: Shared | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return what transformers expects of attention: [R, L, H, E], and no weights.

    Args:
        module: the layer that asks.
        query: [R, H, L, E].
        key: own keys [R, G, C, E].
        value: own values.
        attention_mask: one of the masks in `shared`.
        scaling: factor on scores; None: one over the root of E.
        softcap: bound on scores.
        shared: parts and masks.
        others: what families hand over besides; most of it is for other kinds of attention.

    Raises:
        ValueError: if the family asks for what this does not do.
    """
    if shared is None or any(others.get(name) is not None for name in REFUSED):
        raise ValueError("this model cannot attend to shared keys apart")
    masks, scoring = shared.masks_of(attention_mask), Scoring(scaling, softcap)
    output, weight = partial(query, key, value, masks.own, scoring)
    if not shared.parts:
        return output, None
    number: int = module.layer_idx
    for part, mask in zip(shared.parts, masks.parts, strict=True):
        _join_(output[part.rows], weight[part.rows], query[part.rows], part.layers[number], mask,
               scoring)  # fmt: skip
    return output, None


AttentionInterface.register(NAME, attend)


def _join_(
    output: Tensor,
    weight: Tensor,
    query: Tensor,
    layer: LayerStates,
    mask: Tensor | None,
    scoring: Scoring,
) -> None:
    """Bring the shared keys into `output` [R, L, H, E], in place; `weight` is [R, L, H]."""
    rows, heads, length, width = query.shape
    one_row = query.transpose(1, 2).reshape(1, rows * length, heads, width).transpose(1, 2)
    theirs, their_weight = partial(one_row, *layer, mask, scoring)
    share = torch.sigmoid(their_weight.view(rows, length, heads) - weight)
    output.lerp_(theirs.view(rows, length, heads, width), share[..., None].to(output.dtype))


def partial(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Return attention [R, L, H, E] to these keys alone, and the log-sum-exp [R, L, H] of scores.

    Args:
        query: [R, H, L, E].
        key: [R, G, C, E], G dividing H.
        value: like `key`.
        mask: added to scores, [R, 1, L, C]; None adds nothing.
        scoring: how scores come about.
    """
    if query.device.type == "cpu" and scoring.softcap is None:
        output, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scoring.scaling
        )
        return output.transpose(1, 2), weight.transpose(1, 2)
    return partial_by_hand(query, key, value, mask, scoring)


def partial_by_hand(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Do as `partial` for any device and family, holding all scores."""
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(rows, groups, heads // groups * length, width).float()
    scores = grouped @ key.transpose(2, 3).float()
    scores *= width**-0.5 if scoring.scaling is None else scoring.scaling
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.view(rows, heads, length, -1)
    if mask is not None:
        scores = scores + mask
    weight = torch.logsumexp(scores, dim=-1)
    shares = torch.exp(scores - weight[..., None]).view(rows, groups, -1, key.shape[2])
    output = (shares @ value.float()).view(rows, heads, length, width).to(query.dtype)
    return output.transpose(1, 2).contiguous(), weight.transpose(1, 2)

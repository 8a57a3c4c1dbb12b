"""Differences between two models made smaller: truncated, pruned, or freed of intruders.

Pure functions on one weight matrix at a time; `keepshot.blending.reshape` writes the results.
Sources: LoRE, arXiv 2405.15007 (RE-Adapt); FAPM, arXiv 2509.08255; intruder dimensions,
arXiv 2410.21228.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keepshot.errors import ConfigError


@dataclass(frozen=True)
class LowRank:
    """A matrix as `up` (out x rank) times `down` (rank x in), and how much of it that explains."""

    up: Tensor
    down: Tensor
    explained: float


def truncate(delta: Tensor, share: float) -> LowRank:
    """Return the smallest truncated SVD that explains at least `share` of the variance.

    The variance explained by rank r is the sum of the first r squared singular values over that
    of all (arXiv 2405.15007; a share of 0.5 worked best there). The root of the singular values
    goes to both factors, so that neither overflows 16 bits.

    Args:
        delta: out x in.
        share: above 0, at most 1.

    Raises:
        ConfigError: if the share is out of range.
    """
    _check_share("explained variance", share)
    left, sizes, right = torch.linalg.svd(delta.double(), full_matrices=False)
    total = sizes.square().sum()
    if total == 0:
        empty = delta.new_zeros
        return LowRank(empty(delta.shape[0], 0), empty(0, delta.shape[1]), 1.0)
    explained = sizes.square().cumsum(0) / total
    # Rounding must not cost a rank: a share of 1 is reached at the last one that is not 0.
    rank = int((explained < share - 1e-12).sum()) + 1
    root = sizes[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return LowRank(up.to(delta.dtype), down.to(delta.dtype), float(explained[rank - 1]))


def prune(base: Tensor, tuned: Tensor, share: float) -> Tensor:
    """Return the base with only the most important changes of the tuned weights (FAPM).

    The score of a change is |dW| - mean|W| * |dW| / |W|, with W the base: large changes count,
    changes that are large beside the weight they change count against it (arXiv 2509.08255).

    Args:
        base: any shape.
        tuned: the shape of `base`.
        share: of the elements, how many keep their change; 0.1 is a sparsity of 90 %.

    Raises:
        ConfigError: if the share is out of range.
    """
    _check_share("kept share", share)
    origin, end = base.double(), tuned.double()
    change = (end - origin).abs()
    size = origin.abs()
    relative = torch.where(size > 0, change / size, torch.where(change > 0, torch.inf, 0.0))
    score = change - size.mean() * relative
    count = round(share * base.numel())
    if count == 0:
        return base.clone()
    kept = torch.zeros_like(score, dtype=torch.bool).view(-1)
    kept[score.reshape(-1).topk(count).indices] = True
    return torch.where(kept.view(base.shape), tuned, base)


def intruders(base: Tensor, tuned: Tensor, *, top: int = 10, similarity: float = 0.5) -> list[int]:
    """Return which of the tuned matrix's first singular directions resemble none of the base's.

    Args:
        base: out x in.
        tuned: the shape of `base`.
        top: how many singular vectors of the tuned matrix are looked at.
        similarity: greatest cosine to any singular vector of the base that still counts as none.
    """
    found = torch.linalg.svd(tuned.double(), full_matrices=False)[0][:, :top]
    known = torch.linalg.svd(base.double(), full_matrices=False)[0]
    closest = (known.T @ found).abs().max(dim=0).values
    return [int(place) for place in (closest < similarity).nonzero().flatten()]


def shrink_intruders(
    base: Tensor, tuned: Tensor, factor: float, *, top: int = 10, similarity: float = 0.5
) -> Tensor:
    """Return the tuned matrix with the singular values of its intruders times `factor`.

    arXiv 2410.21228: W + (factor - 1) * sum over intruders of s_i u_i v_i^T.

    Raises:
        ConfigError: if the factor is not between 0 and 1.
    """
    if not 0.0 <= factor <= 1.0:
        raise ConfigError(f"factor on intruders {factor!r}: expected a number from 0 to 1")
    places = intruders(base, tuned, top=top, similarity=similarity)
    if not places or factor == 1.0:
        return tuned.clone()
    left, sizes, right = torch.linalg.svd(tuned.double(), full_matrices=False)
    part = (left[:, places] * sizes[places]) @ right[places]
    return (tuned.double() + (factor - 1.0) * part).to(tuned.dtype)


def _check_share(what: str, share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"{what} {share!r}: expected a number above 0 and at most 1")

"""Which lambda each tensor gets: one number, a ramp or list over blocks, or by kind of module.

Works on names and on what `keepshot.blending.parts` says they are; needs no torch.
Sources: arXiv 2410.17146 (LiNeS: a ramp), arXiv 2309.06256 (HMA: one ratio per group of blocks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from keepshot.blending.arithmetic import Lambda, RowLambda
from keepshot.errors import ConfigError
from keepshot.specs import Spec

Kind = Literal[
    "query", "key", "value", "output", "attention", "mlp", "norms", "embeddings", "head", "other"
]
"""What a weight is for; "attention" is all four projections, "other" what no kind here names."""
KINDS: tuple[Kind, ...] = get_args(Kind)
_WHOLE: dict[Kind, Kind] = {name: "attention" for name in ("query", "key", "value", "output")}

LambdaRule = Callable[[str], Lambda]
"""A pure function from a tensor's name to its lambda."""


def as_rule(lam: float | LambdaRule) -> LambdaRule:
    """Return `lam` as a function of the tensor's name; a number means the same for every tensor."""
    return lam if callable(lam) else lambda _name: lam


def check_lambda(lam: object) -> str | None:
    """Check one lambda, and return a note for the user if it lies outside [0, 1].

    Raises:
        ConfigError: if `lam` is not a finite number.
    """
    if isinstance(lam, RowLambda):
        notes = [check_lambda(value) for value in sorted(set(lam.values))]
        return next((note for note in notes if note), None)
    # Booleans are integers to Python, but `lambda: true` in a file is a slip.
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not math.isfinite(lam):
        raise ConfigError(f"lambda {lam!r} is not a number; give one such as 0.4")
    if 0.0 <= lam <= 1.0:
        return None
    side = "beyond the tuned model" if lam > 1.0 else "away from the tuned model"
    return f"lambda {lam:g} lies outside 0..1: this extrapolates {side}; measure before you use it"


@dataclass(frozen=True)
class Part:
    """Some or all output features of a tensor: what for, and in which block (None: outside).

    `rows` None means the whole tensor; a fused projection has one part per kind.
    """

    kind: Kind
    block: int | None
    rows: tuple[int, ...] | None = None
    transposed: bool = False


class LambdaMap(Spec):
    """Factors on lambda by block and by kind of module; what is not named here has factor 1.

    Factors, so that lambda 0 is the base under every rule, and a path can be swept under it.
    """

    ramp: tuple[float, float] | None = None
    """Factor of the first and of the last block, evenly in between. Outside the blocks: embeddings
    get the first, the final norm and the head the last."""
    blocks: tuple[float, ...] | None = Field(default=None, min_length=1)
    """Factor of even groups of blocks, from the first on; outside the blocks as for `ramp`."""
    kinds: Mapping[Kind, float] = {}
    """Factor by kind of module, in place of `ramp` and `blocks`; 0 keeps the base's weights.
    `other` stands for all kinds not named, so `{value: 1, other: 0}` moves values alone."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ramp is not None and self.blocks is not None:
            raise ValueError("give either `ramp` or `blocks`")
        if self.ramp is None and self.blocks is None and not self.kinds:
            raise ValueError("is empty; give `ramp`, `blocks` or `kinds`")
        for lam in (*(self.ramp or ()), *(self.blocks or ()), *self.kinds.values()):
            if not math.isfinite(lam):
                raise ValueError(f"{lam} is not a number")
        return self


def by_part(rule: LambdaMap, lam: float, parts: Mapping[str, Sequence[Part]]) -> LambdaRule:
    """Return the lambda of every tensor under a rule.

    Args:
        rule: the factors.
        lam: what they multiply.
        parts: what each tensor is, from `keepshot.blending.parts.parts_of`.

    Raises:
        ConfigError: if the rule has more groups than the model has blocks, or names a kind that
            the model does not have.
    """
    count = _num_blocks(parts)
    _check_fits(rule, parts, count)

    def of(part: Part) -> float:
        kinds: tuple[Kind, ...] = (part.kind, _WHOLE.get(part.kind, part.kind), "other")
        for kind in kinds:
            if kind in rule.kinds:
                return lam * rule.kinds[kind]
        block = part.block
        if block is None:
            block = 0 if part.kind == "embeddings" else count - 1
        return lam * _at_block(rule, block, count)

    return _lookup(parts, of, lam)


@dataclass(frozen=True)
class Share:
    """A block of layers, or all weights of one kind."""

    block: int | None = None
    kind: Kind | None = None

    @property
    def label(self) -> str:
        """Words for tables."""
        return f"block {self.block}" if self.kind is None else self.kind

    def holds(self, part: Part) -> bool:
        """Say whether it includes a part."""
        if self.kind is None:
            return part.block == self.block
        return self.kind in (part.kind, _WHOLE.get(part.kind))


def shares(parts: Mapping[str, Sequence[Part]], by: Literal["blocks", "kinds"]) -> list[Share]:
    """Return the blocks of a model from the lowest on, or the kinds of weight that it has."""
    if by == "blocks":
        return [Share(block=number) for number in range(_num_blocks(parts))]
    found = [part for own in parts.values() for part in own]
    kinds = [Share(kind=kind) for kind in KINDS]
    return [share for share in kinds if any(share.holds(part) for part in found)]


def restoring(share: Share, parts: Mapping[str, Sequence[Part]]) -> LambdaRule:
    """Return the rule of the tuned model with one share of its weights put back to the base's."""
    return _lookup(parts, lambda part: 0.0 if share.holds(part) else 1.0, 1.0)


def _lookup(
    parts: Mapping[str, Sequence[Part]], of: Callable[[Part], float], lam: float
) -> LambdaRule:
    """Return the lambda of every tensor from that of its parts; `lam` is for rows of no part."""

    def lookup(name: str) -> Lambda:
        found = parts.get(name, (Part("other", None),))
        if len(found) == 1 and found[0].rows is None:
            return of(found[0])
        size = sum(len(part.rows or ()) for part in found)
        values = [lam] * size
        for part in found:
            for row in part.rows or ():
                values[row] = of(part)
        if len(set(values)) == 1:
            return values[0]
        return RowLambda(-1 if found[0].transposed else 0, tuple(values))

    return lookup


def _num_blocks(parts: Mapping[str, Sequence[Part]]) -> int:
    numbers = [part.block for found in parts.values() for part in found if part.block is not None]
    return max(numbers, default=-1) + 1


def _check_fits(rule: LambdaMap, parts: Mapping[str, Sequence[Part]], count: int) -> None:
    if rule.blocks is not None and len(rule.blocks) > count:
        raise ConfigError(
            f"rule.blocks: {len(rule.blocks)} groups for a model of {count} blocks; "
            f"give at most {count}"
        )
    present = {part.kind for found in parts.values() for part in found}
    present |= {_WHOLE[kind] for kind in present if kind in _WHOLE} | {"other"}
    for kind in rule.kinds:
        if kind not in present:
            raise ConfigError(
                f"rule.kinds.{kind}: this model has no such weights; it has "
                f"{', '.join(sorted(present))}"
            )


def _at_block(rule: LambdaMap, block: int, count: int) -> float:
    if rule.blocks is not None:
        return rule.blocks[block * len(rule.blocks) // count]
    if rule.ramp is not None:
        first, last = rule.ramp
        return first if count < 2 else first + (last - first) * block / (count - 1)
    return 1.0

"""Models that are made here, as frozen specs: another one degraded, or a small one from scratch.

Knows no torch: `degrade` and `blank` do what these ask for, `tuning.from_scratch` trains.
"""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from keepshot.specs import Spec

MAKING_VERSION = 1
"""Raised when the same spec would make another model than before."""
DegradedBy = Literal["layers-dropped", "pruned", "quantised", "noised"]
Architecture = Literal["llama", "gpt2", "gpt-neox"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


class Degradation(Spec):
    """Harm of one kind and strength to the matrices of a model's blocks."""

    kind: DegradedBy
    """`layers-dropped`: whole blocks, the last two kept; `pruned`: the smallest weights of each
    matrix become 0; `quantised`: each row is rounded to few bits; `noised`: Gaussian noise."""
    dose: float = Field(gt=0.0)
    """Blocks dropped; share of the weights pruned; bits (from 2); standard deviation of the noise
    as a share of the matrix's root mean square."""
    seed: int = Field(default=0, ge=0)
    """Of the noise."""

    @model_validator(mode="after")
    def _check_dose(self) -> Self:
        if self.kind in ("layers-dropped", "quantised") and self.dose != int(self.dose):
            raise ValueError(f"a dose of {self.dose:g} {self.kind} is no whole number")
        if self.kind == "quantised" and not 2 <= self.dose <= 16:
            raise ValueError(f"{self.dose:g} bits: expected 2 to 16")
        if self.kind == "pruned" and self.dose >= 1.0:
            raise ValueError(f"a share of {self.dose:g} pruned leaves nothing; give less than 1")
        return self


class FromScratch(Spec):
    """A small model trained here on lists of worked examples of composed tasks."""

    architecture: Architecture
    """Structure of its blocks."""
    width: int = Field(ge=32, multiple_of=32)
    """Of the hidden states."""
    depth: PositiveInt
    """Number of blocks."""
    steps: PositiveInt
    """Batches that it is trained on."""
    batch_size: PositiveInt = 32
    """Lists of examples in each."""
    shots: int = Field(default=6, ge=2)
    """Examples in each list."""
    instructed: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the lists whose questions hold the words of the instruction."""
    learning_rate: PositiveFloat = 3e-3
    """Peak of AdamW's, after which it falls to 0."""
    seed: int = Field(default=0, ge=0)
    """Of the weights and of what is read."""

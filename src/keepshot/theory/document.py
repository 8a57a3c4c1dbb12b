"""What the theory lab is asked, and what it returns: plain data, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from keepshot import __version__
from keepshot.errors import ConfigError, unknown
from keepshot.specs import Spec

Claim = Literal["pretraining", "full", "value-only", "auxiliary", "sweeps", "extensions", "bridge"]
CLAIMS: tuple[Claim, ...] = get_args(Claim)
DEFAULT_CLAIMS = CLAIMS[:-1]
"""Those that need nothing but this lab: the bridge trains a transformer."""
RECORD = "theory.json"


class TheorySpec(Spec):
    """`keepshot theory`: which claims, in which world."""

    no_effect_on_results = frozenset({"device"})

    claims: tuple[Claim, ...] = Field(default=DEFAULT_CLAIMS, min_length=1)
    """Claims to check."""
    d: int = Field(default=5, ge=1, le=200)
    """Number of inputs; at 1 an unseen task is the target or its opposite."""
    sigma2: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Variance of a label's error."""
    spectrum: tuple[float, ...] | None = None
    """Eigenvalues of the inputs' covariance, d of them; all 1 if not given."""
    covariance: tuple[tuple[float, ...], ...] | None = None
    """The whole covariance, in place of a spectrum."""
    norm: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """|theta_0|, weighted by the covariance: the square root of a task's signal."""
    tau2: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Variance of a pretraining task's entries, theta ~ N(0, tau2 I); 1 / d if not given."""
    shots: tuple[int, ...] = Field(default=(0, 1, 2, 5, 10, 20, 50, 100), min_length=1)
    """Demonstrations at which errors are compared."""
    pretrain_shots: float | None = None
    """Demonstrations m per pretraining prompt; if not given, infinitely many, and as many as in
    the test prompt (m = n) for the claim `auxiliary`."""
    step_size: float | None = Field(default=None, gt=0.0)
    """Step size of the sampled tuning of values; a tenth of the largest stable one if not given."""
    num_prompts: int = Field(default=100_000, ge=100)
    """Prompts per Monte Carlo estimate, at most."""
    num_numbers: int = Field(default=4_000_000, ge=10_000)
    """Random numbers per Monte Carlo estimate, at most: long prompts are fewer."""
    study: Path | None = None
    """Directory of a finished run or study of tuned real models, for the claim `bridge`."""
    seed: int = Field(default=0, ge=0)
    """Seed of every draw."""
    device: str = "cpu"
    """Torch device."""
    dtype: Literal["float64"] = "float64"
    """The lab computes in float64 alone."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, content: object) -> object:
        if isinstance(content, dict):
            for name in content.get("claims") or ():
                if name not in CLAIMS:
                    raise ConfigError(
                        unknown("claim", str(name), CLAIMS, f"known are {', '.join(CLAIMS)}")
                    )
            for key in ("spectrum", "covariance"):
                rows = content.get(key)
                if "d" not in content and isinstance(rows, list | tuple) and rows:
                    content = {**content, "d": len(rows)}
        return content

    @model_validator(mode="after")
    def _check_world(self) -> Self:
        if any(count < 0 for count in self.shots):
            raise ConfigError(f"--shots {min(self.shots)}: a number of shots cannot be negative")
        m = self.pretrain_shots
        if m is not None and not (m == math.inf or (m >= 0 and m == int(m))):
            raise ConfigError(
                f"--pretrain-shots {m:g}: expected a whole number of at least 0, or inf"
            )
        if self.spectrum is not None and self.covariance is not None:
            raise ConfigError("--spectrum and covariance: give one of them")
        if self.spectrum is not None and len(self.spectrum) != self.d:
            raise ConfigError(
                f"--spectrum: {len(self.spectrum)} eigenvalues for --d {self.d}; give {self.d}"
            )
        if self.spectrum is not None and not all(0 < value < math.inf for value in self.spectrum):
            raise ConfigError(
                f"--spectrum {min(self.spectrum):g}: the covariance is not positive definite; "
                "every eigenvalue must be above 0"
            )
        if self.covariance is not None and len(self.covariance) != self.d:
            raise ConfigError(f"covariance: {len(self.covariance)} rows for --d {self.d}")
        return self

    def in_words(self) -> str:
        """Say in which world, and how precisely, everything is computed."""
        inputs = "of the given covariance" if self.covariance else "of covariance I"
        if self.spectrum:
            inputs = "with eigenvalues " + ", ".join(f"{value:g}" for value in self.spectrum)
        m = self.pretrain_shots
        shots = "infinitely many" if m is None or m == math.inf else f"{m:g}"
        exception = " (claim auxiliary: as many as in the test prompt)" if m is None else ""
        return (
            f"d = {self.d} inputs {inputs}, sigma2 = {self.sigma2:g}, |theta_0| = {self.norm:g}, "
            f"pretraining tasks N(0, {self.tau2 or 1 / self.d:g} I) with {shots} demonstrations"
            f"{exception}; each estimate from at most {self.num_prompts:,} prompts or "
            f"{self.num_numbers:,} random numbers; seed {self.seed}."
        )


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TheoryRow(_Record):
    """One error, predicted in closed form and measured on sampled prompts."""

    claim: Claim
    method: str
    """pretrained, full, value_only, value_only_aux, or a further one."""
    task: Literal["target", "unseen"]
    """unseen: mean over random directions of the target's norm."""
    shots: int
    predicted: float
    measured: float
    se: float

    @property
    def z(self) -> float:
        """How many standard errors measured and predicted lie apart."""
        return z_score(self.predicted, self.measured, self.se)


class Check(_Record):
    """A figure that is no error on prompts: a parameter, a limit, a crossing."""

    claim: Claim
    quantity: str
    predicted: float
    measured: float
    se: float | None
    """Standard error; None where nothing was sampled."""


class Point(_Record):
    """A point of a figure: the curve's closed form, and what was measured there, if it was."""

    panel: str
    series: str
    x: float
    predicted: float | None
    measured: float | None = None
    se: float | None = None
    x_se: float | None = None
    """Standard error of `x`, where that was measured too."""
    family: str = ""
    """Series of one family look the same and are joined; the series itself if empty."""


class RealArm(_Record):
    """What one way of tuning gained and lost in a real model; see the claim `bridge`."""

    group: str
    """The model and what it was tuned for."""
    name: str
    family: str = ""
    """The recipe, whatever of it is varied."""
    gained: float
    lost: float
    se: float
    """Of `lost`."""
    gained_se: float = 0.0
    """Of `gained`, the untuned model's score taken as known."""
    num_items: int = 0
    """Items behind `lost`."""


class Panel(_Record):
    """Axes of one small chart."""

    name: str
    x_title: str
    y_title: str = "squared error"
    log_x: bool = False
    log_y: bool = False
    axes: str = ""
    """Panels of one figure with the same name here have the same axes."""
    labelled: bool = False
    """Whether each point is a method, with its name beside it."""


class ClaimRecord(_Record):
    """Everything on one claim."""

    claim: Claim
    sentences: list[str]
    """What was found, with figures."""
    rows: list[TheoryRow]
    checks: list[Check] = Field(default_factory=list)
    panels: list[Panel] = Field(default_factory=list)
    points: list[Point] = Field(default_factory=list)
    seconds: float = 0.0


class TheoryDocument(_Record):
    """The document behind `keepshot theory --json` and its `theory.json`."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    keepshot: str = __version__
    rows: list[TheoryRow]
    checks: list[Check]
    claims: list[ClaimRecord]
    notes: list[str] = Field(default_factory=list)
    setting: str = ""
    """World, target, precision and seed, in words."""

    def to_json(self) -> str:
        """Return the document as JSON; a claim's rows and checks stand at the top alone."""
        inner: dict[str, bool] = {"rows": True, "checks": True}
        return self.model_dump_json(by_alias=True, indent=1, exclude={"claims": {"__all__": inner}})

    @classmethod
    def of(
        cls, claims: Sequence[ClaimRecord], notes: Sequence[str] = (), setting: str = ""
    ) -> TheoryDocument:
        """Put claims together."""
        return cls(
            schema=1,
            rows=[row for claim in claims for row in claim.rows],
            checks=[check for claim in claims for check in claim.checks],
            claims=list(claims),
            notes=list(notes),
            setting=setting,
        )

    @classmethod
    def read(cls, path: Path) -> TheoryDocument:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: if the file is none.
        """
        try:
            content = _Stored.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise ConfigError(f"{path}: not a theory document: {error}") from None
        claims = [
            ClaimRecord(
                **stored.model_dump(),
                rows=[row for row in content.rows if row.claim == stored.claim],
                checks=[check for check in content.checks if check.claim == stored.claim],
            )
            for stored in content.claims
        ]
        return cls.of(claims, content.notes, content.setting)


class _StoredClaim(_Record):
    claim: Claim
    sentences: list[str]
    panels: list[Panel]
    points: list[Point]
    seconds: float


class _Stored(_Record):
    schema_version: Literal[1] = Field(alias="schema")
    keepshot: str
    rows: list[TheoryRow]
    checks: list[Check]
    claims: list[_StoredClaim]
    notes: list[str]
    setting: str = ""


ROUNDING = 1e-6
"""Trained heads are settled to about this much, relative to 1: smaller gaps are none."""


def z_score(predicted: float, measured: float, se: float | None) -> float:
    """Return (measured - predicted) / se, where a standard error is never taken below rounding."""
    return (measured - predicted) / max(se or 0.0, ROUNDING * max(1.0, abs(predicted)))

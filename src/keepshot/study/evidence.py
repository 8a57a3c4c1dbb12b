"""What the analysis of a study found, as part of its document. No pandas, no torch.

Every figure stands with its interval and with the numbers of models, families and tasks behind it.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field

from keepshot.errors import StudyError

Found = TypeVar("Found")
Kind = Literal["spearman", "pearson"]
Role = Literal["question", "control", "other"]
"""question: tuned direct against base gold; control: against base direct, which sees no examples.
"""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def checked(found: Found) -> Found:
    """Return a finding as it is.

    Raises:
        StudyError: if a figure of it is no number.
    """
    if not is_finite(found):
        raise StudyError("a figure of it is no number")
    return found


def is_finite(found: Any) -> bool:
    """Say whether all figures of a finding are numbers, and so can be written as JSON."""
    match found:
        case float():
            return math.isfinite(found)
        case BaseModel():
            return all(is_finite(value) for _, value in found)
        case list() | tuple():
            return all(is_finite(value) for value in cast("list[Any]", found))
        case dict():
            return all(is_finite(value) for value in cast("dict[Any, Any]", found).values())
        case _:
            return True


class Figure(_Record):
    """A figure with its 95 % interval."""

    value: float
    ci95: tuple[float, float]


class Tested(Figure):
    """A correlation with its interval, and how likely one as large is where there is none."""

    p_value: float
    p_adjusted: float
    """By Benjamini and Hochberg, over the figures of its list that are of the same kind."""
    num_points: int
    num_clusters: int


class CorrelationFinding(Tested):
    """Two settings over models, each a mean over tasks; families are resampled."""

    first: str
    """Setting on the horizontal axis, such as `base gold, 4 shots`."""
    second: str
    role: Role
    models: str = "all"
    """`all`, `not degraded`, or the models that do, or do not, have a tag."""
    tasks: str = "all"
    """`all`; or `tuned for` and `not tuned for`, where both were asked."""
    kind: Kind
    num_tasks: int
    given_size: Figure | None = None
    """Both settings freed from log parameters; None where sizes say nothing."""
    without_noise: Figure | None = None
    """Corrected for finite test sets; reliabilities taken as known, and noise as independent in
    the two settings: an upper estimate where both were asked the same items."""
    reliabilities: tuple[float, float] | None = None
    without_a_family: tuple[float, float] | None = None
    """Least and greatest value when one family is left out."""
    models_needed: int | None = None
    """Independent models for an interval of half-width .1 around this value."""
    models_needed_clustered: int | None = None
    """The same for models as alike within families as these."""


class TaskFinding(Tested):
    """One task over models (Spearman)."""

    first: str
    second: str
    task: str
    domain: str


class ModelFinding(Tested):
    """One tuned model over tasks (Spearman); domains are resampled where there are three."""

    first: str
    second: str
    point: int
    """Its place in `points` of the comparison."""


class Within(_Record):
    """Correlations over tasks, one for each model, and their mean over models."""

    kind: Kind
    mean: Figure
    num_models: int
    num_families: int
    num_tasks: int
    num_left_out: int
    """Models with the same score on all tasks."""


class Share(Figure):
    """How much of the variance of tuned scores between models a cause explains."""

    cause: str


class MixedFinding(_Record):
    """tuned = intercept + slope * base + family + task + noise."""

    slope: Figure
    family_variance: float
    task_variance: float
    residual_variance: float
    num_rows: int
    converged: bool


class BoundFinding(_Record):
    """Share of items solved by the tuned model, and by its base under no draw of demonstrations."""

    beyond: Figure
    control: Figure
    """The same share for a further draw of the base itself."""
    excess: Figure
    """`beyond` less `control`; a mean over base models, by families."""
    num_draws: int
    num_models: int
    num_families: int
    num_items: int


class StudyPoint(_Record):
    """One tuned model beside its base: means over the tasks of the comparison."""

    model: str
    family: str
    recipe: str
    target: str
    tuning_seed: int
    num_parameters: int
    degraded: str | None
    base: float
    tuned: float
    base_by_task: list[float]
    tuned_by_task: list[float]


class Comparison(_Record):
    """Tuned direct beside base gold at one number of shots: the question of the study."""

    first: str
    second: str
    models: str = "all"
    """`all`, or `not degraded`."""
    tasks: list[str]
    domains: list[str]
    num_items: int
    """Items of all tasks together, each once."""
    points: list[StudyPoint]
    within: list[Within] = Field(default_factory=list[Within])
    by_task: list[TaskFinding] = Field(default_factory=list[TaskFinding])
    by_model: list[ModelFinding] = Field(default_factory=list[ModelFinding])
    shares: list[Share] = Field(default_factory=list[Share])
    mixed: MixedFinding | None = None
    bound: BoundFinding | None = None


class Findings(_Record):
    """All that the analysis of a study found, and what it could not say."""

    split: str
    settings: list[str]
    """Settings of the matrix, in its order."""
    correlations: list[CorrelationFinding] = Field(default_factory=list[CorrelationFinding])
    comparisons: list[Comparison] = Field(default_factory=list[Comparison])
    notes: list[str] = Field(default_factory=list[str])
    """What was refused, and why."""

"""What a study has found, as the document that other programs read. No pandas, no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from keepshot import __version__
from keepshot.records import InstructionScore
from keepshot.specs import is_none
from keepshot.study.evidence import Findings

RECORD = "study.json"
"""Where a study's directory holds its document."""


class StudyArm(BaseModel):
    """One way of tuning (or a base, or a lambda), over all seeds, on one ask and split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    target: str
    recipe: str | None
    lam: float | None
    ask: str
    split: str
    shots: int
    icl: float
    """Mean score over the tasks that it was not tuned for."""
    icl_ci95: tuple[float, float]
    retention: float | None
    retention_ci95: tuple[float, float] | None
    target_score: float | None
    """At 0 shots, on the same split."""
    target_ci95: tuple[float, float] | None
    target_num_items: int | None = None
    format_failure: float
    label_leakage: float
    num_tasks: int
    num_items: int
    num_seeds: int
    """Seeds of tuning."""
    tuning_seconds: float | None
    few_shot_divergence: float | None = None
    """KL(base || tuned) in nats a token, on few-shot prompts of tasks that nothing trains on."""
    few_shot_divergence_ci95: tuple[float, float] | None = None
    target_divergence: float | None = None
    """The same on validation items of the target."""
    target_divergence_ci95: tuple[float, float] | None = None
    """Mean over seeds."""


class StudyDocument(BaseModel):
    """What `keepshot study --json` prints, and `study.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = Field(
        default=1,
        validation_alias=AliasChoices("schema", "schema_version"),
        serialization_alias="schema",
    )
    keepshot: str = __version__
    name: str
    question: str
    total: int
    done: int
    failed: int
    arms: list[StudyArm]
    instructions: list[InstructionScore] = Field(default_factory=list[InstructionScore])
    """One for each model asked, lambda and split."""
    findings: Findings | None = Field(default=None, exclude_if=is_none)
    """Correlations and what explains them; none where no tuned model was asked."""
    failures: list[dict[str, str]]
    notes: list[str] = Field(default_factory=list)

    def to_json(self) -> str:
        """Return the document as JSON."""
        return self.model_dump_json(by_alias=True, indent=1)

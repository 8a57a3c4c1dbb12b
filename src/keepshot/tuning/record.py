"""What was trained, on what, for how long, and how it went: `tuning.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from keepshot.records import TrainingRecord
from keepshot.tuning.auto import Decisions
from keepshot.tuning.mixture import Branch


@dataclass(frozen=True)
class TuneRecord:
    """What was trained, on what, for how long, and how the loss went."""

    recipe: dict[str, Any]
    recipe_fingerprint: str
    model: str
    model_sha256: str
    method: str
    keep: list[str]
    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    num_trainable: int
    num_rows: int
    num_dropped: int
    num_validation: int
    data_fingerprint: str
    tokens: int
    """Tokens of the training samples that went through the model, the KL term's not counted."""
    seconds: float
    num_cut: int = 0
    """Samples that are only the beginning of their row."""
    num_unanswered: int = 0
    """Rows left out since nothing of the answer was left after cutting."""
    num_masked_tokens: int = 0
    """Answer tokens that an `stm` term left out of the loss, among different samples."""
    num_masked_samples: int = 0
    """Samples of which it left nothing."""
    num_rewritten: int = 0
    """Rows whose answer is the model's own wording, by a `self-distil` term."""
    sources: tuple[Branch, ...] = ()
    """What each step reads: a tree of sources with sizes and fingerprints."""
    auto: Decisions | None = None
    """What `auto` found out, if it was asked for."""
    losses: list[dict[str, float]] = field(default_factory=list)
    """One row a step: `step`, `loss`, and each of its parts before weighting."""
    validation_loss: float | None = None
    """Next-token loss on the held-out rows after tuning; None if there are none, or if they were
    learned once a rate had been chosen on them."""

    def training_record(self, arm: str) -> TrainingRecord:
        """Return the part that goes into a results document."""
        return TrainingRecord(
            arm=arm,
            method=self.method,
            keep=self.keep,
            learning_rate=self.learning_rate,
            steps=self.steps,
            seconds=self.seconds,
            num_trainable=self.num_trainable,
            losses=self.losses,
            lam=self.auto.lam if self.auto else None,
        )

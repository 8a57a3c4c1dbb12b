"""Gates that a user asks for: a run that does not hold what was wanted leaves with status 3."""

from __future__ import annotations

from keepshot.errors import ConfigError, GateError
from keepshot.records import ResultDocument, SummaryRow


def check_retention(document: ResultDocument, required: float) -> None:
    """Check the retention of the arm that is meant to keep it, at the most shots.

    That arm is `kept` in a run; in a measurement it is every model but the first.

    Raises:
        GateError: naming the arm, its retention with interval, and what was required.
        ConfigError: if the document holds no retention to check.
    """
    rows = guarded(document)
    if not rows:
        raise ConfigError("--require-retention: there is no second model whose retention to check")
    for row in rows:
        if row.retention is None or row.retention_ci95 is None:
            raise GateError(
                f"{row.arm}: retention is unknown, since the first model is not reliably above "
                "chance on these tasks; measure tasks that it can do"
            )
        if not row.retention >= required:  # so that nothing reaches nan
            low, high = row.retention_ci95
            raise GateError(
                f"{row.arm}: retention {row.retention:.3f} [{low:.3f}, {high:.3f}] at "
                f"{row.shots} shots is below the {required:g} that was required"
            )


def guarded(document: ResultDocument) -> list[SummaryRow]:
    """Return the rows that a retention gate looks at."""
    shots = max((row.shots for row in document.summary), default=0)
    rows = [row for row in document.summary if row.shots == shots]
    kept = [row for row in rows if row.arm == "kept"]
    return kept or rows[1:]

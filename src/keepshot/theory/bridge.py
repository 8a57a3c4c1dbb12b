"""The bridge from theory to models."""

from __future__ import annotations

from keepshot.theory.document import ClaimRecord
from keepshot.theory.lab import Lab


def bridge(lab: Lab) -> ClaimRecord:
    """To be written."""
    return ClaimRecord(claim="bridge", sentences=[], rows=[])

"""Run the theory lab: check the claims, write their record and their page."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from keepshot import records
from keepshot.errors import ConfigError
from keepshot.jobs.workspace import environment, free_name
from keepshot.progress import Progress
from keepshot.report.theory import write_theory_report
from keepshot.theory.document import RECORD, TheoryDocument, TheorySpec
from keepshot.theory.experiments import run_claims


def theory(
    spec: TheorySpec, out_dir: Path | None, progress: Progress, *, overwrite: bool = False
) -> tuple[TheoryDocument, Path]:
    """Check the claims of a spec and write a directory with `theory.json` and `report.html`.

    Args:
        spec: which claims, in which world.
        out_dir: where to write; a free name under `runs` if None.
        progress: told of every claim.
        overwrite: replace what is there.

    Returns:
        The document, and where it was written.

    Raises:
        UserError: if the world, the device or the place cannot be used.
    """
    place = out_dir or free_name(Path("runs"), "theory", RECORD)
    records.claim(place, overwrite=overwrite)
    try:
        torch.zeros(1, dtype=torch.float64, device=spec.device)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {spec.device!r}: {reason}; give one that is there") from None
    document = run_claims(spec, progress)
    with records.building_directory(place, overwrite=overwrite) as folder:
        text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        records.write_text(text, folder / "spec.yaml")
        records.write_text(json.dumps(environment(), indent=1), folder / "environment.json")
        write_theory_report(document, folder)
        records.write_text(document.to_json(), folder / RECORD)
    return document, place

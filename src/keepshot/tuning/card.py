"""The model card beside what a run wrote: the recipe, what was read, decided and seen.

Knows nothing of tensors. Everything in it is also in `tuning.json`.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from keepshot import __version__
from keepshot.outputs import write_text
from keepshot.tuning.mixture import lines
from keepshot.tuning.record import TuneRecord


def write_card(record: TuneRecord, out_dir: Path) -> None:
    """Write `README.md` into the adapter or model that lies in `out_dir`."""
    kind = "adapter" if (out_dir / "adapter").is_dir() else "model"
    write_text(card(record, kind), out_dir / kind / "README.md")


def card(record: TuneRecord, kind: str) -> str:
    """Return the card of what was trained, in Markdown with the hub's front matter.

    Args:
        record: of the run.
        kind: `adapter` or `model`.
    """
    front: dict[str, object] = {
        "base_model": record.model,
        "library_name": "peft" if kind == "adapter" else "transformers",
        "tags": ["keepshot", record.method],
    }
    used = {key: value for key, value in record.recipe.items() if value not in (None, [], ())}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {record.model}, tuned on {record.recipe['data']}",
        f"Tuned with keepshot {__version__}: {record.method}"
        + (f" held by {', '.join(record.keep)}" if record.keep else "")
        + f", {record.steps} steps of {record.batch_size} samples at learning rate "
        f"{record.learning_rate:g}, {record.num_trainable:,} parameters trained.\n"
        f"Base sha256 `{record.model_sha256}`, data fingerprint `{record.data_fingerprint}`, "
        f"recipe `{record.recipe_fingerprint}`.",
        _measured(record),
        *_decided(record),
        "## Data\n\n" + _block("\n".join(lines(record.sources))),
        "## Recipe\n\n" + _block(yaml.safe_dump(used, sort_keys=False), "yaml"),
    ]
    return "\n\n".join(parts) + "\n"


def _measured(record: TuneRecord) -> str:
    rows = [f"- training loss at the last step: {record.losses[-1]['loss']:.3f}"]
    if record.validation_loss is not None:
        rows.append(
            f"- next-token loss on {record.num_validation} held-out rows: "
            f"{record.validation_loss:.3f}"
        )
    if record.auto is not None:
        for reading in record.auto.guard:
            low, high = reading.ci95
            rows.append(
                f"- few-shot score of the guard's tasks at step {reading.step}: "
                f"{reading.score:.3f}, retention {reading.retention:.2f} [{low:.2f}, {high:.2f}], "
                f"n = {reading.num_items}"
            )
    return "## Measured while tuning\n\n" + "\n".join(rows)


def decided(record: TuneRecord) -> list[str]:
    """Return what a run decided by itself and why, a line each; none if it was not asked to."""
    auto = record.auto
    if auto is None:
        return []
    return [
        f"learning rate {auto.learning_rate:g}: {auto.why_learning_rate}",
        f"{auto.steps} steps: {auto.why_steps}",
        f"lambda {auto.lam:g}: {auto.why_lambda}",
        f"{auto.seconds:.0f} of {record.seconds:.0f} seconds went into finding this out",
    ]


def _decided(record: TuneRecord) -> list[str]:
    auto = record.auto
    if auto is None:
        return []
    rows = [f"- {line}" for line in decided(record)]
    if auto.trials:
        rows += [
            "",
            "| learning rate | held-out loss of the target | keep terms |",
            "|---|---|---|",
        ]
        rows += [
            f"| {t.learning_rate:g} | {_loss(t.target_loss)} | {_loss(t.keep_loss)} |"
            for t in auto.trials
        ]
    if auto.path:
        learned = record.num_validation > 0 and record.validation_loss is None
        which = "held out from the short runs, learned since" if learned else "held out"
        rows += ["", f"| lambda | retention | target loss on rows {which} |", "|---|---|---|"]
        rows += [
            f"| {p.lam:g} | {p.retention:.2f} [{p.ci95[0]:.2f}, {p.ci95[1]:.2f}] | "
            f"{p.target_loss:.3f} |"
            for p in auto.path
        ]
    return ["## Decided by itself\n\n" + "\n".join(rows)]


def _loss(value: float | None) -> str:
    return "broke" if value is None else f"{value:.3f}"


def _block(text: str, language: str = "") -> str:
    return f"```{language}\n{text.rstrip()}\n```"

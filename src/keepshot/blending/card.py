"""What lies beside a written blend: its record (`keepshot.json`), and a short model card.

Knows nothing of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from keepshot import __version__
from keepshot.errors import ModelError

RECORD_NAME = "keepshot.json"
CARD_NAME = "README.md"
SCHEMA = 1


@dataclass(frozen=True)
class RealisedLambda:
    """Where rounding let the weights land: slopes of (written - base) on (tuned - base).

    `overall` is over all weights together; `lowest` and `highest` are the furthest tensors, by
    name. `num_changed` counts tensors that tuning changed at all; only they have a slope, and
    `by_tensor` holds it. Where two differences are added, slopes are on their weighted sum: 1 is
    exact.
    """

    overall: float | None
    lowest: tuple[str, float] | None
    highest: tuple[str, float] | None
    num_changed: int
    by_tensor: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_sums(cls, sums: Mapping[str, tuple[float, float]]) -> RealisedLambda:
        """Compute the slopes from <written - base, delta> and |delta|^2 of every tensor."""
        changed = {name: pair for name, pair in sums.items() if pair[1] > 0.0}
        if not changed:
            return cls(None, None, None, 0)
        slopes = {name: along / norm for name, (along, norm) in changed.items()}
        lowest, highest = (choose(slopes, key=lambda name: slopes[name]) for choose in (min, max))
        along, norm = (sum(pair[n] for pair in changed.values()) for n in (0, 1))
        ends = (lowest, slopes[lowest]), (highest, slopes[highest])
        return cls(along / norm, *ends, len(slopes), slopes)


@dataclass(frozen=True)
class BlendRecord:
    """What was written, from what.

    `lam` is None where lambda differed by tensor. The sha256 are by file name: of every weight
    file of the inputs, and of every file of the output but the record itself; none where
    hashing was left out. `second` is the further model that was added, with its factor.
    """

    kind: Literal["model", "adapter"]
    lam: float | None
    base: str
    tuned: str
    dtype: str
    num_tensors: int
    num_bytes: int
    realised: RealisedLambda
    base_sha256: dict[str, str]
    tuned_sha256: dict[str, str]
    output_sha256: dict[str, str]
    second_sha256: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rounding: str = "nearest"
    seed: int = 0
    second: tuple[str, float] | None = None
    checked: tuple[str, ...] = ()
    keepshot: str = __version__

    def as_dict(self) -> dict[str, Any]:
        """Return plain data with the record's own key names (`lambda`, not `lam`)."""
        content = asdict(self)
        return {
            "schema": SCHEMA,
            "kind": content.pop("kind"),
            "lambda": content.pop("lam"),
        } | content

    @classmethod
    def read(cls, directory: Path) -> BlendRecord:
        """Read the record of a written blend.

        Raises:
            ModelError: if there is none, or it is not one of ours.
        """
        path = directory / RECORD_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(
                f"{directory}: no {RECORD_NAME}, so this is no finished blend; "
                "give a directory that `keepshot blend --out` wrote"
            ) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
        try:
            if content.pop("schema") != SCHEMA:
                raise ModelError(f"{path}: of another schema; write the blend again")
            realised = RealisedLambda(**_as_tuples(content.pop("realised")))
            return cls(lam=content.pop("lambda"), realised=realised, **_as_tuples(content))
        except (AttributeError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: not a record of a blend: {error}") from None


def model_card(record: BlendRecord) -> str:
    """Return the text of `README.md`: what this is, lambda, and the sha256 of all weight files."""
    what = "an adapter at lambda" if record.kind == "adapter" else "a language model"
    library = "peft" if record.kind == "adapter" else "transformers"
    base, tuned = Path(record.base).name, Path(record.tuned).name
    lam = "set tensor by tensor" if record.lam is None else f"{record.lam:g}"
    lines = [
        "---", f"library_name: {library}", "tags: [partial-adaptation, keepshot]", "---", "",
        f"# {base} + {lam if record.lam is not None else 'lambda'} x ({tuned} - {base})", "",
        f"This is {what}, written by keepshot {record.keepshot} without training: partial",
        "adaptation, `base + lambda * (tuned - base)` (arXiv 2504.11626, arXiv 2109.01903).", "",
        "| | |", "|---|---|", f"| lambda | {lam} |", f"| base | `{base}` |",
        f"| tuned | `{tuned}` |", f"| dtype | {record.dtype} |",
    ]  # fmt: skip
    if record.realised.overall is not None:
        lines.append(f"| lambda realised after rounding | {record.realised.overall:.4f} |")
    if record.rounding != "nearest":
        lines.append(f"| rounding | {record.rounding}, seed {record.seed} |")
    if record.second is not None:
        lines.append(f"| added | {record.second[1]:g} x (`{Path(record.second[0]).name}` - base) |")
    lines += ["", "Tokenizer, chat template and generation settings are the tuned model's,",
              "unless a note says otherwise."]  # fmt: skip
    if record.notes:
        lines += ["", "Notes:", *(f"- {note}" for note in record.notes)]
    if not record.output_sha256:
        return "\n".join([*lines, "", "Nothing was hashed (--no-check).", ""])
    lines += ["", "sha256 of the weights read and written:", ""]
    lines += _hashes("base", record.base_sha256) + _hashes("tuned", record.tuned_sha256)
    lines += _hashes("second", record.second_sha256) + _hashes("output", record.output_sha256)
    lines += ["", f"`keepshot verify` checks the files here against `{RECORD_NAME}`.", ""]
    return "\n".join(lines)


def _hashes(side: str, files: Mapping[str, str]) -> list[str]:
    return [f"- {side} `{name}`: `{digest}`" for name, digest in sorted(files.items())]


def _as_tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}

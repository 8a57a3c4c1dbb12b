"""Results that cross borders, and their atomic store.

`ResultDocument` is the contract that other programs read (`results.json`, `measure --json`);
`ItemResult` rows lie beside it in `items.parquet`, so that every comparison can be paired.
Knows nothing of models or tasks beyond their names.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from keepshot import __version__
from keepshot.errors import ConfigError, OutputError, is_full_disk

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class ItemResult:
    """One question put to one model under fixed demonstrations.

    `log_likelihoods` are natural-log sums over the answer's tokens, one per choice (empty for
    exact match). `answer` is what the model said: the likeliest choice, or its greedy text.
    """

    arm: str
    model: str
    lam: float | None
    task: str
    split: Split
    shots: int
    seed: int
    item: str
    question: str
    gold: str
    answer: str
    choices: list[str]
    log_likelihoods: list[float]
    correct: float
    correct_per_character: float | None
    format_failure: float
    label_leakage: float


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# `lambda` is a keyword of Python: `lam` in code, `lambda` in JSON, and either is read.
_LAMBDA = AliasChoices("lam", "lambda")


class ModelRecord(_Record):
    """A model that was measured."""

    reference: str
    sha256: str
    num_parameters: int
    dtype: str
    sharing: Literal["packed", "rows", "plain"] | None = None
    """How far prompts could share what they have in common; None if it was not measured now."""


class Score(_Record):
    """The main metric of one (model, task, shots, seed)."""

    arm: str
    model: str
    task: str
    task_version: int
    shots: int
    seed: int
    metric: Literal["accuracy", "exact_match"]
    value: float
    ci95: tuple[float, float]
    chance: float
    num_items: int
    format_failure: float
    label_leakage: float
    setting: str = "raw"
    other_metrics: dict[str, float] = Field(default_factory=dict)


class SummaryRow(_Record):
    """Few-shot ability of one arm at one number of shots, with target score and retention."""

    arm: str
    model: str
    lam: float | None = Field(default=None, validation_alias=_LAMBDA, serialization_alias="lambda")
    shots: int
    icl: float
    icl_ci95: tuple[float, float]
    icl_gain: float | None
    retention: float | None
    retention_ci95: tuple[float, float] | None
    changed: float | None = None
    """Share of answers, right or wrong, that are not those of the first arm; mean over tasks."""
    changed_ci95: tuple[float, float] | None = None
    target: float | None = None
    target_ci95: tuple[float, float] | None = None
    num_items: int


class Cost(_Record):
    """What the measuring took."""

    seconds: float = 0.0
    tokens_prefilled: int = 0
    tokens_naive: int = 0
    processes: int = 1


class PathPoint(_Record):
    """One lambda on the path between two models, measured on one split."""

    lam: float = Field(validation_alias=_LAMBDA, serialization_alias="lambda")
    split: Split
    icl: float
    icl_ci95: tuple[float, float]
    retention: float | None
    retention_ci95: tuple[float, float] | None
    target: float | None
    target_ci95: tuple[float, float] | None
    num_items: int


class TrainingRecord(_Record):
    """How one arm was tuned."""

    arm: str
    method: str
    keep: list[str]
    learning_rate: float
    steps: int
    seconds: float
    num_trainable: int
    losses: list[dict[str, float]] = Field(default_factory=list)


class PickRecord(_Record):
    """Which lambda was picked, by which stated rule, from which points."""

    rule: str
    lam: float | None = Field(validation_alias=_LAMBDA, serialization_alias="lambda")
    reason: str


class ResultDocument(_Record):
    """The document behind `--json` and `results.json`."""

    schema_version: Literal[1] = Field(
        default=1,
        validation_alias=AliasChoices("schema", "schema_version"),
        serialization_alias="schema",
    )
    keepshot: str = __version__
    models: list[ModelRecord]
    scores: list[Score]
    summary: list[SummaryRow]
    cost: Cost
    target_task: str | None = None
    path: list[PathPoint] = Field(default_factory=list)
    pick: PickRecord | None = None
    training: list[TrainingRecord] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    def to_json(self) -> str:
        """Return the document with the contract's own key names."""
        return self.model_dump_json(by_alias=True, indent=1)

    @classmethod
    def read(cls, run_dir: Path) -> ResultDocument:
        """Read `results.json` of a finished run directory.

        Raises:
            ConfigError: if the directory holds no finished run, or one of another schema.
        """
        path = run_dir / "results.json"
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{run_dir}: no results.json, so no finished run lies here; "
                "give a directory that `keepshot run`, `measure` or `blend` wrote"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{path}: not a results document: {place}: {first['msg']}") from None


ITEM_SCHEMA = pa.schema(
    [
        ("arm", pa.string()),
        ("model", pa.string()),
        ("lam", pa.float64()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("shots", pa.int32()),
        ("seed", pa.int32()),
        ("item", pa.string()),
        ("question", pa.string()),
        ("gold", pa.string()),
        ("answer", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("log_likelihoods", pa.list_(pa.float64())),
        ("correct", pa.float64()),
        ("correct_per_character", pa.float64()),
        ("format_failure", pa.float64()),
        ("label_leakage", pa.float64()),
    ]
)


def write_items(items: Sequence[ItemResult], path: Path) -> None:
    """Write per-item rows as parquet (atomically: temporary name, then renamed)."""
    table = pa.Table.from_pylist([asdict(item) for item in items], schema=ITEM_SCHEMA)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def read_items(path: Path) -> list[ItemResult]:
    """Read the rows that `write_items` wrote.

    Raises:
        ConfigError: if they cannot be read.
    """
    names = {field.name for field in fields(ItemResult)}
    rows: list[dict[str, Any]] = read_item_table(path).to_pylist()
    return [ItemResult(**{key: row[key] for key in names}) for row in rows]


def read_item_table(path: Path) -> pa.Table:
    """Read the rows that `write_items` wrote, as a table; raises as `read_items` does."""
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"{path}: cannot be read as parquet ({reason}); run again") from None


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _output_error(error, path) from error
    temporary = _beside(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _output_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def building_directory(out_dir: Path, *, overwrite: bool = False) -> Generator[Path]:
    """Yield a temporary directory that becomes `out_dir` when the block ends without error.

    Raises:
        OutputError: if `out_dir` already holds something and `overwrite` is false, if it cannot
            be written, or if the disk is full.
    """
    claim(out_dir, overwrite=overwrite)
    try:
        temporary = _beside(out_dir)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise _output_error(error, out_dir) from error
    try:
        yield temporary
        _follow_umask(temporary)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        temporary.replace(out_dir)
    except (OSError, SafetensorError) as error:
        raise _output_error(error, out_dir) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def claim(out_dir: Path, *, overwrite: bool = False) -> None:
    """Check, before any work, that `out_dir` can be written and holds nothing worth keeping.

    Raises:
        OutputError: saying why not and what to do.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise OutputError(f"{out_dir}: is a file; name a directory that does not exist yet")
    if out_dir.exists() and any(out_dir.iterdir()) and not overwrite:
        raise OutputError(
            f"{out_dir}: already exists; add --overwrite to replace it, or name another with --out"
        )
    existing = next(parent for parent in out_dir.absolute().parents if parent.exists())
    try:
        # Only writing shows whether a place can be written: permissions do not say it for root.
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise _output_error(error, out_dir) from error


_UNWRITABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT,
}  # fmt: skip
_PROBE_BYTES = 4096


def _output_error(error: Exception, path: Path) -> Exception:
    if is_full_disk(error):
        return OutputError(f"{path}: the disk is full; free some space or choose another --out")
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return OutputError(f"{path}: cannot be written ({error.strerror}); choose another --out")
    return error


def _beside(path: Path) -> Path:
    """Return a hidden name of its own beside `path`; what is made there follows the umask."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _follow_umask(folder: Path) -> None:
    """Give every file the mode of one that is simply opened: safetensors makes its own 0600."""
    probe = _beside(folder / "mode")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)

"""Results that cross borders, and their atomic store.

`ResultDocument` is the contract that other programs read (`results.json`, `measure --json`);
`ItemResult` rows lie beside it in `items.parquet`, so that every comparison can be paired.
Knows nothing of models or tasks beyond their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from keepshot import __version__
from keepshot.errors import ConfigError
from keepshot.outputs import building_directory, claim, replacing, write_text

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class ItemResult:
    """One question put to one model under fixed demonstrations.

    `log_likelihoods` are natural-log sums over the answer's tokens, one per choice (empty for
    exact match). `answer` is what the model said: the likeliest choice, or its greedy text.
    Where the model wrote its own demonstrations, `written` holds them, and `setting` says who
    answered after them.
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
    setting: str | None = None
    written: str | None = None


@dataclass(frozen=True)
class InstructionRow:
    """One prompt with verifiable instructions put to one model; a flag for each instruction."""

    arm: str
    model: str
    lam: float | None
    prompt_set: str
    split: str
    variant: str
    style: str
    key: str
    prompt: str
    answer: str
    truncated: bool
    types: list[str]
    strict: list[bool]
    loose: list[bool]


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

    def since(self, before: Cost) -> Cost:
        """Return what came on top of an earlier reading of the same engine."""
        return Cost(
            seconds=self.seconds - before.seconds,
            tokens_prefilled=self.tokens_prefilled - before.tokens_prefilled,
            tokens_naive=self.tokens_naive - before.tokens_naive,
        )


class PathPoint(_Record):
    """One lambda on the path between two models, measured on one split.

    `tasks` is the few-shot score by task; `below_base` names those whose paired 95 % interval of
    the difference from the base lies below 0. `answer_length` counts characters, where answers
    are free text. `following` is the share of prompts whose instructions are all followed, `recall`
    the few-shot score over the tasks that ask for knowledge alone.
    """

    lam: float = Field(validation_alias=_LAMBDA, serialization_alias="lambda")
    split: Split
    icl: float
    icl_ci95: tuple[float, float]
    retention: float | None
    retention_ci95: tuple[float, float] | None
    target: float | None
    target_ci95: tuple[float, float] | None
    num_items: int
    tasks: dict[str, float] = Field(default_factory=dict)
    below_base: list[str] = Field(default_factory=list)
    format_failure: float | None = None
    label_leakage: float | None = None
    answer_length: float | None = None
    following: float | None = None
    following_ci95: tuple[float, float] | None = None
    recall: float | None = None
    recall_ci95: tuple[float, float] | None = None


class RestoredPart(PathPoint):
    """The tuned model with one part put back to what it was before tuning.

    `part` names a block of layers ("block 3") or what weights are for ("mlp").
    """

    part: str


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
    divergence: dict[str, list[float]] = Field(
        default_factory=dict, exclude_if=lambda value: not value
    )
    """KL(untuned || tuned) in nats a token, prompt by prompt: on `few_shot` prompts of unseen
    tasks, and on the `target`'s validation items. Studies read it."""
    lam: float | None = Field(
        default=None,
        validation_alias=_LAMBDA,
        serialization_alias="lambda",
        exclude_if=lambda value: value is None,
    )
    """Where `auto` left the change; None without `auto`."""


class InstructionScore(_Record):
    """How well one arm follows verifiable instructions, at one lambda on one part of a set."""

    arm: str
    model: str
    lam: float | None = Field(default=None, validation_alias=_LAMBDA, serialization_alias="lambda")
    prompt_set: str
    split: str
    variant: str
    style: str
    prompt_strict: float
    prompt_strict_ci95: tuple[float, float]
    prompt_loose: float
    prompt_loose_ci95: tuple[float, float]
    instruction_strict: float
    instruction_strict_ci95: tuple[float, float]
    instruction_loose: float
    instruction_loose_ci95: tuple[float, float]
    num_prompts: int
    num_instructions: int
    truncated: float
    by_type: dict[str, float] = Field(default_factory=dict)


class PickRecord(_Record):
    """Which lambda was picked, by which stated rule, from which points.

    The interval is of the whole choice under resampled questions and draws; `share_same` of the
    resamples pick this lambda again, `share_none` none at all. `pareto` are the lambdas that no
    other beats in both few-shot and target score.
    """

    rule: str
    lam: float | None = Field(validation_alias=_LAMBDA, serialization_alias="lambda")
    reason: str
    lambda_ci95: tuple[float, float] | None = None
    share_same: float | None = None
    share_none: float | None = None
    pareto: list[float] = Field(default_factory=list)


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
    restored: list[RestoredPart] = Field(default_factory=list)
    """What returns where one part of the tuned model is the base's again; empty if not asked."""
    pick: PickRecord | None = None
    training: list[TrainingRecord] = Field(default_factory=list)
    instructions: list[InstructionScore] = Field(default_factory=list)
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


class WinRate(_Record):
    """The candidate's share of wins, ties counted half; percentages, with 95 % intervals."""

    candidate: str
    reference: str
    judge: str
    prompt_hash: str
    win_rate: float
    win_rate_ci95: tuple[float, float]
    discrete_win_rate: float
    length_controlled_win_rate: float | None
    length_controlled_ci95: tuple[float, float] | None
    position_bias: float | None
    """How much more often than half the first answer is preferred, whichever it is; in points."""
    num_comparisons: int
    num_judged: int
    num_tied: int
    num_failed: int
    num_off_label: int
    failures: dict[str, int]
    mean_length_candidate: float
    mean_length_reference: float


class Agreement(_Record):
    """How far two judges agree on the comparisons that both judged."""

    judges: tuple[str, str]
    num_items: int
    same_side: float
    """Share on which both prefer the same answer, or both none."""
    kappa: float
    """Cohen's kappa of the same; 0 is what chance would give."""
    rank_correlation: float


class JudgeDocument(_Record):
    """What `keepshot judge` prints and writes."""

    keepshot: str = __version__
    win_rates: list[WinRate] = Field(default_factory=list)
    sanity: list[WinRate] = Field(default_factory=list)
    agreement: list[Agreement] = Field(default_factory=list)
    instructions: list[InstructionScore] = Field(default_factory=list)
    policy: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


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
        ("setting", pa.string()),
        ("written", pa.string()),
    ]
)
SOME_HAVE = ("setting", "written")
"""Columns that are left out where no row has them."""


def write_items(items: Sequence[ItemResult], path: Path) -> None:
    """Write per-item rows as parquet (atomically: temporary name, then renamed)."""
    table = pa.Table.from_pylist([asdict(item) for item in items], schema=ITEM_SCHEMA)
    empty = [name for name in SOME_HAVE if table[name].null_count == len(table)]
    table = table.drop_columns(empty) if empty else table
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def read_items(path: Path) -> list[ItemResult]:
    """Read the rows that `write_items` wrote.

    Raises:
        ConfigError: if they cannot be read.
    """
    names = {field.name for field in fields(ItemResult)}
    rows: list[dict[str, Any]] = read_item_table(path).to_pylist()
    return [ItemResult(**{key: row[key] for key in names & row.keys()}) for row in rows]


INSTRUCTION_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("arm", "model")),
        ("lam", pa.float64()),
        *((name, pa.string()) for name in ("prompt_set", "split", "variant", "style")),
        *((name, pa.string()) for name in ("key", "prompt", "answer")),
        ("truncated", pa.bool_()),
        ("types", pa.list_(pa.string())),
        ("strict", pa.list_(pa.bool_())),
        ("loose", pa.list_(pa.bool_())),
    ]
)


def write_instructions(rows: Sequence[InstructionRow], path: Path) -> None:
    """Write rows of verifiable instructions as parquet, atomically."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=INSTRUCTION_SCHEMA)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def read_instructions(path: Path) -> list[InstructionRow]:
    """Read the rows that `write_instructions` wrote; raises as `read_items` does."""
    return [InstructionRow(**row) for row in read_item_table(path).to_pylist()]


def read_item_table(path: Path) -> pa.Table:
    """Read the rows that `write_items` wrote, as a table; raises as `read_items` does."""
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"{path}: cannot be read as parquet ({reason}); run again") from None


__all__ = [
    "Agreement", "Cost", "InstructionRow", "InstructionScore", "ItemResult", "JudgeDocument",
    "ModelRecord", "PathPoint", "PickRecord", "ResultDocument", "Score", "SummaryRow",
    "TrainingRecord", "WinRate", "building_directory", "claim", "read_instructions",
    "read_item_table", "read_items", "replacing", "write_instructions", "write_items",
    "write_text",
]  # fmt: skip
